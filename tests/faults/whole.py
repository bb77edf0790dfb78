"Two commands at once, altered runs, checkpoints of other runs, folders that were moved, and kills of what comes late."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PIPES = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
MAIN = 'import sys; from saferlhf.apps.commands import main; sys.exit(main(sys.argv[1:]))'


def command(lab, runs, home, *argv):
    "`saferlhf ARGV`, started."
    env = lab.env(runs) | dict(SAFERLHF_HOME=str(home))
    return subprocess.Popen([sys.executable, '-c', MAIN, *argv], env=env, start_new_session=True, **PIPES)


def call(lab, runs, home, *argv): # its exit status, all that it said
    p = command(lab, runs, home, *argv); said = p.communicate(timeout=500)[0]
    return p.returncode, said


MANY = """if True:
    import json, sys
    from saferlhf.apps.commands import main
    from saferlhf.reproduction.results import publish_all
    for argv in json.loads(sys.argv[1]):
        try: code = publish_all('smoke', 0) or 0 if argv == ['publish'] else main(argv)
        except Exception as e: code = print(e) or 1
        print(f'\\n@@ {code}', flush=True)
"""


def calls(lab, runs, home, *lines):
    "Several commands in one process, also `publish` -> (exit status, what was said) each."
    env = lab.env(runs) | dict(SAFERLHF_HOME=str(home))
    argv = [x.split() if isinstance(x, str) else x for x in lines]
    said = subprocess.run([sys.executable, '-c', MANY, json.dumps(argv)], env=env, timeout=900, **PIPES).stdout
    parts = said.split('\n@@ '); codes = [int(x.split('\n')[0]) for x in parts[1:]]
    texts = [parts[0], *(x.partition('\n')[2] for x in parts[1:-1])]
    return [*zip(codes, texts, strict=True)] + [(-1, line(said))] * (len(lines) - len(codes))


def copied(lab, name, *without):
    "The finished reproduction in another place, without some stages; and an empty home."
    shutil.copytree(lab.base, runs := lab.fresh(name), symlinks=True); (home := lab.fresh(f'{name}-home')).mkdir()
    for stage in without: shutil.rmtree(folder(lab, runs, stage))
    book = json.loads((runs/'ledger-smoke-0.json').read_text())
    for stage in BY_NOTEBOOK: book[stage]['key'] = ''                            # its notebook publishes into this home, too
    (runs/'ledger-smoke-0.json').write_text(json.dumps(book))
    return runs, home


BY_NOTEBOOK = 'base_lm', 'two_token', 'constraints'


def folder(lab, runs, stage): return Path(runs)/json.loads((lab.base/'ledger-smoke-0.json').read_text())[stage]['folder']


def tables(home, drawn=False):
    "Published tables, seconds apart; and the figures."
    skip = 'times.csv', 'base_lm.csv', 'two_token_world.csv', 'constraints.csv'  # seconds; what notebooks publish
    found = {p.name: p.read_bytes() for p in Path(home).glob('data/results/smoke/*.csv') if p.name not in skip}
    return found | ({p.name: p.read_bytes() for p in Path(home).glob('figures/smoke/*.png')} if drawn else {})


def published(lab):
    "The tables of the reproduction, published by one process that was left alone."
    if not hasattr(lab, 'tables'):
        runs, home = copied(lab, 'published')
        own(lab, runs, home, 'publish'); lab.tables = tables(home)
    return lab.tables


def own(lab, runs, home, *argv): # own.py -> exit status, all that it said
    env = lab.env(runs) | dict(SAFERLHF_HOME=str(home))
    p = subprocess.run([sys.executable, ROOT/'tests/faults/own.py', *map(str, argv)], env=env, timeout=500, **PIPES)
    return p.returncode, p.stdout


def line(said): return said.strip().splitlines()[-1] if said.strip() else ''


def run_id(path): return f'{Path(path).parent.name}/{Path(path).name}'


# --- two starts

def twice(lab, table):
    "A reproduction is under way; other commands are started in its folder at three moments."
    wanted = published(lab)
    runs, home = copied(lab, 'twice', 'judge', 'evaluate')
    first = command(lab, runs, home, 'reproduce', '--profile', 'smoke')
    moments = (('reproduce', 'at its start', lambda: (runs/'.reproduce-smoke-0.holder').exists()),
               ('run judge', 'in a stage', lambda: (folder(lab, runs, 'judge')/'.holder').exists()),
               ('reproduce', 'between or in stages', lambda: (folder(lab, runs, 'judge')/'DONE').exists()),
               ('reproduce --jobs 2', 'while publishing or drawing', lambda: (home/'data/results/smoke/times.csv').exists()))
    outcomes = []
    for argv, when, there in moments:
        while first.poll() is None and not there(): time.sleep(.01)
        code, said = call(lab, runs, home, *argv.split(), '--profile', 'smoke')
        good = code == 1 and said.count('\n') == 1 and 'another run holds' in said and first.poll() is None
        outcomes.append((argv, when, 'refused in one line' if good else f'FAILED: exit status {code}: {line(said)[:200]}'))
    said = first.communicate(timeout=500)[0]
    same = first.returncode == 0 and tables(home) == wanted and 'null' not in (runs/'ledger-smoke-0.json').read_text()
    for k, (argv, when, outcome) in enumerate(outcomes):
        if not same: outcome = f'FAILED: the first one ended with {first.returncode}: {line(said)[:200]}; {outcome}'
        table.add('two commands at once', argv, 'torch', k, when, '', outcome.replace('line', 'line, the first one published the same'), 0,
                  run_id(folder(lab, runs, 'evaluate')))


# --- altered runs

def negate(path):
    from safetensors.torch import load_file, save_file
    tensors = load_file(path); name = next(k for k in tensors if 'head' in k)
    save_file(tensors | {name: -tensors[name]}, path, metadata={'format': 'pt'})


def swap(path):
    text = path.read_text(); assert '_response_id": 0' in text
    for old, new in (('0', '2'), ('1', '0'), ('2', '1')): text = text.replace(f'_response_id": {old}', f'_response_id": {new}')
    path.write_text(text)


def cut(path): path.write_bytes(path.read_bytes()[:-9])


def number(path): path.write_text(path.read_text().replace('0.', '1.', 1))


def flip(path): path.write_bytes((data := path.read_bytes())[:-5] + bytes([data[-5] ^ 1]) + data[-4:])


def forge(path):
    "The model and its hash are changed together, and the seal over them."
    from saferlhf.data import sha256
    negate(weights := path.parent/'model/model.safetensors'); seal = json.loads(path.read_text())
    seal['files']['model/model.safetensors'] = sha256(weights); path.write_text(json.dumps(seal))
    (path.parent/'DONE').write_text(f'then {sha256(path)}')


def told(path, **facts): path.write_text(json.dumps(json.loads(path.read_text()) | facts))


ALTERED = [('reward-1', 'model/model.safetensors', 'head times -1', negate, 'policy-1'),
           ('cost-1', 'model/model.safetensors', 'a bit', flip, 'policy-1'),
           ('collect-1', 'preferences.jsonl', 'emptied', lambda p: p.write_text(''), 'reward-1'),
           ('collect-2', 'preferences.jsonl', 'labels swapped', swap, 'cost-2'),
           ('policy-1', 'metrics.jsonl', 'last line cut', cut, 'policy-2'), ('cost-1', 'summary.json', 'a number', number, 'policy-1'),
           ('sft', 'model/tokenizer.json', 'removed', Path.unlink, 'collect-1'), ('gold', 'manifest.json', 'a number', number, 'collect-1'),
           ('judge', 'model/config.json', 'a digit', lambda p: p.write_text(p.read_text().replace('2', '3', 1)), 'evaluate'),
           ('collect-3', 'more.jsonl', 'added', lambda p: p.write_text('{}\n'), 'reward-3'),
           ('cost-2', 'files.json', 'head times -1, hashes forged', forge, 'policy-2')]
UNFINISHED = [('sft', 'seed in manifest.json', lambda run: told(run/'manifest.json', seed=5)),
              ('policy-2', 'config.json', lambda run: told(run/'config.json', actor_lr=.1)),
              ('reward-1', 'the folder of its', lambda run: told(run/'manifest.json', parent_folders={'sft': 'elsewhere'})),
              ('collect-2', 'sources in manifest.json', lambda run: told(run/'manifest.json', sources={}))]


def altered_one(lab, table, stage, name, how, alter, child, seed):
    "A finished run is altered: its child, publishing and verify name the file; the command that they name makes it again."
    runs, home = copied(lab, 'altered', child)
    path = folder(lab, runs, stage); alter(path/name)
    again = f'saferlhf run {stage} --profile smoke --seed 0'
    said = calls(lab, runs, home, f'run {child} --profile smoke', 'publish', 'verify')
    told = [code == 1 and name in text and str(path) in text and again in text for code, text in said]
    silent = not tables(home) and not (folder(lab, runs, child)/'DONE').exists()
    shutil.rmtree(path); ends = calls(lab, runs, home, again[9:], f'run {child} --profile smoke', 'verify')
    same = not any(code for code, _ in ends) and (folder(lab, runs, child)/'DONE').exists()
    good = all(told) and silent and same
    outcome = 'named by child, publishing and verify; made again, the same ids'
    if not good: outcome = f'FAILED: named {told}, nothing written {silent}, made again {[c for c, _ in ends]}: {line(ends[-1][1])[:200]}'
    table.add(f'altered: {how}', stage, 'torch', seed, name, '', outcome, 0, run_id(path))


def ledger_one(lab, table, stage, other, child, seed):
    "A ledger that points to another stage's run."
    runs, home = copied(lab, 'altered', child)
    path = runs/'ledger-smoke-0.json'; book = json.loads(path.read_text())
    path.write_text(json.dumps(book | {stage: book[stage] | dict(folder=book[other]['folder'])}))
    again = f'saferlhf run {stage} --profile smoke --seed 0'
    said = calls(lab, runs, home, f'run {child} --profile smoke', 'publish', 'verify')
    told = [code == 1 and str(path) in text and f'is no run of {stage}' in text and again in text for code, text in said]
    ends = calls(lab, runs, home, again[9:], f'run {child} --profile smoke', 'verify')
    good = all(told) and not tables(home) and not any(code for code, _ in ends) and (folder(lab, runs, child)/'DONE').exists()
    outcome = 'named by child, publishing and verify; put right by the command'
    if not good: outcome = f'FAILED: named {told}, {[c for c, _ in ends]}: {line(ends[-1][1])[:200]}'
    table.add('ledger points to another stage', stage, 'torch', seed, other, '', outcome, 0, run_id(folder(lab, runs, stage)))


def unfinished_one(lab, table, stage, what, alter, seed):
    "A run that was stopped is altered: the command refuses to go on, and without it makes the same again."
    from faults.suite import progress, run_folder
    lab.run(stage, runs := lab.fresh('altered-part'), dict(fault='signal', name='SIGTERM', at=3))
    n, path = progress(stage, runs), run_folder(runs); alter(path)
    code, said = lab.run(stage, runs)
    refused = code != 0 and f'{path}: {what}' in line(said) and 'is not as it was when the run began' in line(said)
    shutil.rmtree(path); outcome, _ = lab.finish(stage, 'torch', runs)
    outcome = 'refused by name; made again, identical' if refused and outcome == 'identical' else f'FAILED: {line(said)[:200]}, {outcome}'
    table.add('unfinished run altered', stage, 'torch', seed, what, n, outcome, '', run_id(path))


def altered(lab, table):
    for seed, case in enumerate(ALTERED): altered_one(lab, table, *case, seed)
    for seed, case in enumerate(UNFINISHED): unfinished_one(lab, table, *case, seed)
    pointed = ('policy-1', 'reward-only', 'policy-2'), ('cost-1', 'reward-1', 'policy-1'), ('policy-2', 'policy-1', 'policy-3')
    for seed, case in enumerate(pointed): ledger_one(lab, table, *case, seed)
    runs, home = copied(lab, 'altered')
    at = lambda s: str(folder(lab, runs, s))
    (prompts := home/'p.jsonl').write_text('{"prompt": "how are you"}\n' * 3); negate(folder(lab, runs, 'cost-1')/'model/model.safetensors')
    asked = ['--prompts', str(prompts)]
    commands = (['align', '--policy', at('sft'), '--reward', at('reward-1'), '--cost', at('cost-1'), *asked],
                ['limit', '--policy', at('sft'), '--reward', at('reward-1'), '--cost', at('cost-1'), *asked],
                ['judge', at('policy-1'), at('sft'), '--by', at('cost-1'), *asked], ['export', at('cost-1'), str(home/'out')],
                ['chat', at('policy-1'), *asked])
    for seed, (argv, (code, said)) in enumerate(zip(commands, calls(lab, runs, home, *commands), strict=True)):
        good = code == 1 and at('cost-1') in said and 'model/model.safetensors was changed' in line(said)
        table.add('altered: head times -1', f'own {argv[0]}', 'torch', seed, 'model/model.safetensors', '',
                  'refused in one line' if good else f'FAILED: exit status {code}: {line(said)[:200]}', 0, run_id(at('cost-1')))


# --- checkpoints of other runs

def identity_one(lab, table, stage, engine, seed):
    "A checkpoint of a run with another seed, whose hashes are right, lies in the folder of a run that was stopped."
    from faults.suite import PIECES, run_folder, zero
    told = json.loads(lab.job(stage).read_text())
    (job := lab.folder/f'other-{stage}.json').write_text(json.dumps(told | dict(seed=1)))
    argv = lab.command(stage, dict(fault='signal', name='SIGTERM', at=3) | zero(engine))
    other, runs = lab.fresh('other'), lab.fresh('identity')
    subprocess.run([*argv[:3], job, argv[4]], env=lab.env(other), timeout=300, **PIPES)
    lab.run(stage, runs, dict(fault='signal', name='SIGTERM', at=3) | zero(engine))
    here, there = run_folder(runs), run_folder(other); held = json.loads((there/'manifest.json').read_text())['stage']
    pattern = '*/step-*' if stage in PIECES else 'step-*'
    found = max((there/'checkpoint').glob(pattern)); target = here/found.relative_to(there)
    shutil.rmtree(target, ignore_errors=True); shutil.copytree(found, target)
    code, said = lab.run(stage, runs, zero(engine))
    refused = code != 0 and f'is a checkpoint of {held}/{there.name}, not of {held}/{here.name}' in line(said)
    shutil.rmtree(target)
    outcome, said = lab.finish(stage, engine, runs)
    if refused and outcome == 'identical': outcome = 'refused by name; without it identical'
    else: outcome = f'FAILED: refused {refused} ({line(said)[:150]}), {outcome}'
    table.add('checkpoint of another run', stage, engine, seed, str(found.relative_to(there/'checkpoint')), '', outcome, '', run_id(here))


def identity(lab, table):
    cases = [('sft', 'torch'), ('sft', 'zero1'), ('policy-2', 'torch'), ('policy-2', 'zero2'), ('reward-1', 'torch'), ('gold', 'zero0'),
             ('base_lm', 'torch'), ('collect-2', 'torch'), ('evaluate', 'torch'), ('two_token', 'torch')]
    for seed, case in enumerate(cases): identity_one(lab, table, *case, seed)


# --- other places

def moved_one(lab, table, how, seed):
    "A finished runs folder is copied or moved; its commands work there, and a stage that is lost is made again under the same id."
    runs, home = copied(lab, 'place')
    new = lab.fresh(f'{how}-place')/'runs'; new.parent.mkdir()
    (shutil.move if how == 'moved' else shutil.copytree)(str(runs), str(new))
    if how == 'copied': os.rename(runs, lab.fresh('away'))
    ends = calls(lab, new, home, 'verify', 'status'); shutil.rmtree(folder(lab, new, 'evaluate'))
    ends += calls(lab, new, home, *(f'{argv} --profile smoke' for argv in ('run evaluate', 'reproduce', 'figures')), 'verify')
    ran = [x for x in ends[3][1].splitlines() if x.startswith('[') and 'done before' not in x and not {*x.split()} & {*BY_NOTEBOOK}]
    same = tables(home) == published(lab) and (folder(lab, new, 'evaluate')/'DONE').exists() and not ran
    good = not any(code for code, _ in ends) and same
    outcome = 'verify, status, run, reproduce and figures work, same ids and tables' if good else (
        f'FAILED: {[c for c, _ in ends]}, same {same}, ran {ran}: {[line(s)[:150] for c, s in ends if c]}')
    table.add(f'runs folder {how}', 'all', 'torch', seed, 'finished', '', outcome, 0, run_id(folder(lab, new, 'evaluate')))


def moved_unfinished(lab, table, stage, seed):
    "A run that was stopped goes on in a folder that was moved."
    from faults.suite import progress, run_folder
    lab.run(stage, runs := lab.fresh('place'), dict(fault='signal', name='SIGTERM', at=3))
    n = progress(stage, runs); os.rename(runs, new := lab.fresh('moved-place'))
    outcome, said = lab.finish(stage, 'torch', new)
    table.add('runs folder moved', stage, 'torch', seed, 'stopped', n, outcome, 0, run_id(run_folder(new)))


def link_one(lab, table, finished, seed):
    "A symbolic link in place of a run."
    from faults.suite import run_folder
    lab.run('sft', runs := lab.fresh('link'), {} if finished else dict(fault='signal', name='SIGTERM', at=3))
    here = run_folder(runs); os.rename(here, away := lab.fresh('link-away')); here.symlink_to(away)
    code, said = lab.run('sft', runs)
    seen = call(lab, runs, lab.folder, 'verify', str(here))
    good = code != 0 and seen[0] == 1 and all('is a symbolic link' in x and str(here) in x for x in (said, seen[1]))
    table.add('link in place of a run', 'sft', 'torch', seed, 'finished' if finished else 'stopped', '',
              'refused by name' if good else f'FAILED: {code}, {seen[0]}: {line(said)[:200]}', '', run_id(here))


def moved(lab, table):
    for seed, how in enumerate(('copied', 'moved')): moved_one(lab, table, how, seed)
    for seed, stage in enumerate(('sft', 'policy-2', 'collect-2')): moved_unfinished(lab, table, stage, seed)
    for seed, finished in enumerate((True, False)): link_one(lab, table, finished, seed)


# --- what comes late

def everything(runs):
    "Run -> the content of each finished run."
    from faults.suite import content
    return {run_id(p.parent): content(p.parent) for p in Path(runs).glob('*/*/DONE')}


KEPT = {} # of calls that were left alone


@contextmanager
def endpoint(): # a server whose verdict depends on the question alone; yields what it was asked
    asked = []
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *a): pass
        def do_POST(self):
            asked.append(self.rfile.read(int(self.headers['Content-Length'])))
            said = ('A', 'B', 'tie')[zlib.crc32(asked[-1]) % 3]
            with suppress(OSError):                                                # who asked may be dead
                self.send_response(200); self.end_headers()
                self.wfile.write(json.dumps({'choices': [{'message': {'content': said}}]}).encode())
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        os.environ['ENDPOINT'] = f'http://127.0.0.1:{http.server_port}/v1#judge'
        try: yield asked
        finally: http.shutdown()


def late_own(lab, table, what, seed, asked=()): # what an endpoint was asked
    "A command of one's own (see own.py), killed at a file; the same call goes on. Of questions at most those under way are asked again."
    made = lab.folder/'own-models'
    if not made.exists(): code, said = own(lab, made, lab.folder, 'make'); assert code == 0, said[-2000:]
    def fresh(): shutil.copytree(made, runs := lab.fresh('own')); return runs    # always there: an adapter names its base's folder
    if what not in KEPT:
        code, said = own(lab, runs := fresh(), lab.folder, what); assert code == 0, said[-2000:]
        KEPT[what] = everything(runs), int(line(said).split()[-1])
    wanted, files = KEPT[what]
    g, runs = random.Random(seed), fresh()
    n, when = g.randint(3, files - 1), g.choice(('before', 'after'))
    if asked: asked.clear()
    killed, _ = own(lab, runs, lab.folder, what, n, when)
    before = len(everything(runs)); code, said = own(lab, runs, lab.folder, what)
    found = everything(runs); differ = [k for k in wanted | found if wanted.get(k) != found.get(k)]
    again = len(asked) - len({*asked})
    good = killed == -signal.SIGKILL and code == 0 and not differ and again <= 4
    outcome = 'identical' if good else (
        f'FAILED: killed {killed}, exit status {code}: {line(said)[:200]}, differs in {differ}, {again} questions asked again')
    last = max((p.parent for p in runs.glob('*/*/DONE')), key=lambda p: (p/'DONE').stat().st_mtime)
    table.add('kill -9', what, 'torch', seed, f'{when} file {n} of {files}', before, outcome, again, run_id(last))


def late_publishing(lab, table, seed):
    "Publishing is killed: the tables are not drawn until the same command has published all of them."
    wanted = published(lab); runs, home = copied(lab, 'late')
    g = random.Random(seed); n, when = g.randint(1, 40), g.choice(('before', 'after'))
    killed, _ = own(lab, runs, home, 'publish', n, when)
    written = len(tables(home)); drawn = call(lab, runs, home, 'figures', '--profile', 'smoke')
    code, said = own(lab, runs, home, 'publish')
    refused = drawn[0] == 1 and 'not published to the end' in line(drawn[1])
    good = killed == -signal.SIGKILL and refused and code == 0 and tables(home) == wanted
    outcome = 'not drawn, then identical'
    if not good: outcome = f'FAILED: killed {killed}, drawn {drawn[0]}: {line(drawn[1])[:150]}; {code}: {line(said)[:150]}'
    table.add('kill -9', 'publishing', 'torch', seed, f'{when} file {n}', written, outcome, 0, run_id(folder(lab, runs, 'evaluate')))


def late_drawing(lab, table, seed):
    "Drawing is killed with its kernel; drawn again, the pictures are those of a call that was left alone."
    published(lab); runs, home = copied(lab, 'late')
    shutil.copytree(lab.folder/'published-home/data', home/'data')
    made = calls(lab, runs, home, *(f'run {stage} --profile smoke' for stage in BY_NOTEBOOK)); assert not any(c for c, _ in made)
    if 'drawn' not in KEPT:
        code, said = call(lab, runs, home, 'figures', '--profile', 'smoke'); assert code == 0, said[-2000:]
        KEPT['drawn'] = tables(home, True)
        shutil.rmtree(home/'figures'); shutil.rmtree(runs/'notebooks')
    p = command(lab, runs, home, 'figures', '--profile', 'smoke'); g = random.Random(seed)
    while p.poll() is None and len([*home.glob('figures/smoke/*.png')]) < 2 + seed * 5: time.sleep(.02)
    time.sleep(g.random()); os.killpg(p.pid, signal.SIGKILL); p.communicate()
    n = len([*home.glob('figures/smoke/*.png')]); code, said = call(lab, runs, home, 'figures', '--profile', 'smoke')
    good = p.returncode == -signal.SIGKILL and code == 0 and tables(home, True) == KEPT['drawn']
    outcome = 'identical' if good else f'FAILED: killed {p.returncode}, exit status {code}: {line(said)[:200]}'
    table.add('kill -9', 'drawing', 'torch', seed, f'after {n} pictures', n, outcome, 0, run_id(folder(lab, runs, 'evaluate')))


def late(lab, table):
    for seed in range(6): late_own(lab, table, 'align', seed)
    for seed in range(4): late_own(lab, table, 'adapters', seed)
    with endpoint() as asked:
        for seed in range(6): late_own(lab, table, 'judging', seed, asked)
    for seed in range(8): late_own(lab, table, 'rounds', seed)
    for seed in range(5): late_publishing(lab, table, seed)
    for seed in range(2): late_drawing(lab, table, seed)
