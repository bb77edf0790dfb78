"""The fault suite: what goes wrong, when, and what was left of the run. Results go to data/results/reliability/*.csv.

    python tests/faults/suite.py [kill disk damage numbers ranks kernel lock rows twice altered identity moved late pages weights large]

Every run is a stage of nbs/templates at smoke size, in a process of its own. After the fault the same command is given again, and the
end is compared with that of a run that was left alone: weights, tables and metrics (their seconds apart) must have the same bytes.
Columns: `step` is the number of steps (or pieces, or rows) that were complete, `lost` how many of them had to be made again.
"""
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT/'tests')]
COLUMNS = 'fault stage engine seed phase step outcome lost run_id'.split()
# stage of the smoke reproduction -> fields that make it long enough to be killed
LONGER = {**{k: dict(epochs=2.) for k in ('gold', 'sft', 'reward-1', 'cost-2', 'judge')}, 'base_lm': dict(epochs=.28),
          'policy-2': dict(steps=6), 'collect-2': {}, 'evaluate': {}, 'two_token': dict(steps=8)}
PHASES = 'write-start write-half flushed before-rename after-rename before-clean'.split()
STAGE = {k: k for k in ('base_lm', 'gold', 'sft', 'evaluate', 'two_token')} | {'policy-2': 'policy', 'collect-2': 'collect'} | \
        dict.fromkeys(('reward-1', 'cost-2', 'judge'), 'score_model')
PIECES = ('collect-2', 'evaluate', 'two_token')          # stages without steps


def content(folder):
    "What a finished run is compared by: name -> hash; seconds and paths are left out."
    skip, out = 'checkpoint .lock .holder manifest.json files.json DONE notebook.ipynb README.md'.split(), {}
    for p in sorted(q for q in folder.rglob('*') if q.is_file()):
        name = str(p.relative_to(folder))
        if name.split('/')[0] in skip or name.endswith('README.md'): continue
        data = p.read_bytes()
        if name == 'metrics.jsonl': data = repr([json.loads(x) | {'seconds': 0} for x in data.splitlines()]).encode()
        out[name] = hashlib.sha256(data).hexdigest()
    return out


class Lab:
    "A folder with a finished smoke reproduction, jobs of its stages, and runs that were left alone."
    def __init__(self, folder=None, base=None):
        self.folder = Path(folder or tempfile.mkdtemp(prefix='faults-')); self.folder.mkdir(parents=True, exist_ok=True)
        self.base, self.refs, self.spans = Path(base or self.folder/'base'), {}, {}
        if not (self.base/'ledger-smoke-0.json').exists() or not self._all(): self._reproduce()

    def _all(self): return set(LONGER) <= set(json.loads((self.base/'ledger-smoke-0.json').read_text()))

    def _reproduce(self):
        home = self.folder/'home'; home.mkdir(exist_ok=True)
        print('making the parents: saferlhf reproduce --profile smoke', flush=True)
        code = 'from saferlhf.apps.commands import main; import sys; sys.exit(main(["reproduce", "--profile", "smoke"]))'
        env = self.env(self.base) | {'SAFERLHF_HOME': str(home)}
        subprocess.run([sys.executable, '-c', code], env=env, check=True, stdout=subprocess.DEVNULL)

    def env(self, runs, steps=1):
        keep = {k: v for k, v in os.environ.items() if not k.startswith('SAFERLHF_')}
        return keep | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', SAFERLHF_RUNS=str(runs), SAFERLHF_SAVE_STEPS=str(steps))

    def job(self, stage):
        "Where the parameters of a stage are written down."
        from saferlhf.reproduction.graph import find
        path = self.folder/f'{stage}.json'
        if not path.exists():
            book, s = json.loads((self.base/'ledger-smoke-0.json').read_text()), find(stage, 'smoke')
            told = dict(profile='smoke', seed=0, overrides=s.overrides | LONGER[stage])
            at = lambda p: str(self.base.resolve()/book[p]['folder'])
            if s.template not in ('base_lm', 'two_token'): told['parents'] = {role: at(p) for role, p in s.parents.items()}
            if s.round is not None: told['round'] = s.round
            path.write_text(json.dumps(told))
        return path

    def command(self, stage, fault=None):
        return [sys.executable, ROOT/'tests/faults/drive.py', STAGE[stage], self.job(stage), json.dumps(fault or {})]

    def run(self, stage, runs, fault=None):
        "One process: its exit status and all that it said."
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        p = subprocess.run(self.command(stage, fault), env=self.env(runs), timeout=300, **pipes)
        return p.returncode, p.stdout

    def reference(self, stage, engine):
        "The content of a run that was left alone, and its seconds from the first step on."
        if (stage, engine) not in self.refs:
            code, said = self.run(stage, runs := self.folder/f'left-alone-{stage}-{engine}', zero(engine))
            assert code == 0, said[-2000:]
            self.refs[stage, engine] = content(run_folder(runs)), float(said.split('finished ')[-1].split()[0])
        return self.refs[stage, engine]

    def fresh(self, name):
        shutil.rmtree(runs := self.folder/name, ignore_errors=True)
        return runs

    def finish(self, stage, engine, runs):
        "Give the command again, and say how the end compares; '' for identical."
        code, said = self.run(stage, runs, zero(engine))
        if code: return f'FAILED: exit status {code}: {said.strip().splitlines()[-1][:200]}', said
        a, b = content(run_folder(runs)), self.reference(stage, engine)[0]
        return 'identical' if a == b else f'FAILED: differs in {sorted(k for k in {*a, *b} if a.get(k) != b.get(k))}', said


def zero(engine): return {} if engine == 'torch' else {'zero': int(engine[-1])}


def run_folder(runs): return next(p.parent for p in Path(runs).glob('*/*/manifest.json'))


def name_of(folder): return f'{folder.parent.name}/{folder.name}'


def progress(stage, runs):
    "Steps, or pieces, that were complete."
    folder = run_folder(runs)
    if stage in PIECES: return len([p for p in folder.glob('checkpoint/*/step-*')])
    path = folder/'metrics.jsonl'
    return sum(1 for x in path.read_bytes().split(b'\n')[:-1] if x) if path.exists() else 0


def lost(stage, runs, before, said):
    "Steps or pieces that were complete and had to be made again; the one that was being made is not counted."
    if stage in PIECES: return max(0, before - said.count('done before the interruption'))
    resumed = json.loads((run_folder(runs)/'manifest.json').read_text()).get('resumed')
    return before - (resumed[-1]['step'] if resumed else 0)


class Table:
    "Rows of one CSV file, written after each of them."
    def __init__(self, name, home): self.path, self.rows = Path(home)/f'{name}.csv', []

    def add(self, *row):
        self.rows.append(dict(zip(COLUMNS, row, strict=True))); print(*row, flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, 'w', newline='') as f:
            w = csv.DictWriter(f, COLUMNS, lineterminator='\n'); w.writeheader(); w.writerows(self.rows)


def kill_one(lab, table, stage, engine, seed, phase):
    "One kill -9 and what was left; phase '' is a moment drawn between the first step and the end."
    g, runs = random.Random(seed), lab.fresh('killed')
    span = lab.reference(stage, engine)[1]
    fault = dict(fault='kill-in-checkpoint', phase=phase, at=g.randint(2, 4))
    if not phase: fault = dict(fault='kill-after-seconds', seconds=g.random() * span)
    for _ in range(6):
        code, said = lab.run(stage, runs, fault | zero(engine))
        if code == -signal.SIGKILL and not (run_folder(runs)/'DONE').exists(): break
        code = 0 if code == -signal.SIGKILL else code
        assert code == 0, said[-2000:]
        runs = lab.fresh('killed')                                  # it was finished before the moment came: an earlier one
        fault = fault | ({'at': fault['at'] - 1} if phase else {'seconds': fault['seconds'] * .7})
    else: return table.add('kill -9', stage, engine, seed, phase or 'anywhere', '', 'FAILED: not killed', '', '')
    n = progress(stage, runs)
    outcome, said = lab.finish(stage, engine, runs)
    again = lost(stage, runs, n, said) if outcome == 'identical' else ''
    table.add('kill -9', stage, engine, seed, phase or 'anywhere', n, outcome, again, name_of(run_folder(runs)))


PLAIN = 'sft policy-2 reward-1 collect-2 policy-2 sft gold evaluate cost-2 base_lm two_token judge'.split()      # in a save, torch
DEEP = 'sft policy-2 reward-1 cost-2 policy-2 sft'.split(), 'zero0 zero1 zero2 zero1 zero2 zero1'.split()         # in a save, DeepSpeed
TIMES = {'sft': 3, 'policy-2': 5, 'reward-1': 2, 'cost-2': 2, 'gold': 1, 'judge': 1, 'collect-2': 3, 'evaluate': 3, 'two_token': 2,
         'base_lm': 1}
ANY = [s for s, n in TIMES.items() for _ in range(n)]
ANY_DEEP = ('sft policy-2 reward-1 sft policy-2 cost-2 gold judge base_lm'.split(),
            'zero1 zero0 zero1 zero2 zero2 zero0 zero2 zero1 zero1'.split())
KILLS = [*[(s, 'torch', p) for s, p in zip(PLAIN, PHASES * 2, strict=True)], *zip(*DEEP, PHASES, strict=True),
         *[(s, 'torch', '') for s in ANY], *[(s, e, '') for s, e in zip(*ANY_DEEP, strict=True)]]


def kill(lab, home):
    table = Table('kill', home)
    for seed, (stage, engine, phase) in enumerate(KILLS): kill_one(lab, table, stage, engine, seed, phase)


DISKS = [('sft', 'torch', 'write-half', 2), ('sft', 'zero1', 'before-rename', 2), ('policy-2', 'torch', 'write-half', 3),
         ('reward-1', 'torch', 'flushed', 1), ('collect-2', 'torch', 'write-half', 2), ('evaluate', 'torch', 'before-rename', 5),
         ('sft', 'torch', 'metrics', 3), ('policy-2', 'torch', 'metrics', 2), ('cost-2', 'zero2', 'metrics', 4),
         ('gold', 'torch', 'metrics', 1)]


def disk_one(lab, table, stage, engine, phase, at, seed):
    "The disk is full; then there is room again."
    kind = 'disk-full-in-metrics' if phase == 'metrics' else 'disk-full-in-checkpoint'
    code, said = lab.run(stage, runs := lab.fresh('full'), dict(fault=kind, phase=phase, at=at) | zero(engine))
    n, told = progress(stage, runs), 'No space left on device' in said
    outcome, said = lab.finish(stage, engine, runs)
    if code == 0 or not told: outcome = f'FAILED: exit status {code}, cause {"" if told else "not "}told'
    table.add('disk full', stage, engine, seed, phase, n, outcome, lost(stage, runs, n, said), name_of(run_folder(runs)))


def disk(lab, home):
    table = Table('disk', home)
    for seed, (stage, engine, phase, at) in enumerate(DISKS): disk_one(lab, table, stage, engine, phase, at, seed)


def harm(checkpoint, how, g):
    "Truncate a file of a checkpoint, or turn a bit of it."
    f = g.choice([p for p in sorted(checkpoint.rglob('*')) if p.is_file() and p.stat().st_size])
    data = f.read_bytes(); k = g.randrange(len(data))
    f.write_bytes(data[:k] if how == 'truncated' else data[:k] + bytes([data[k] ^ 1 << g.randrange(8)]) + data[k + 1:])
    return f'{f.relative_to(checkpoint)} at {k}'


def damage_one(lab, table, stage, engine, how, seed):
    "The newest checkpoint of a stopped run is damaged: it is reported, and the one before is used."
    kept = lab.folder/f'stopped-{stage}-{engine}'
    if not kept.exists(): lab.run(stage, kept, dict(fault='signal', name='SIGTERM', at=4) | zero(engine))
    shutil.copytree(kept, runs := lab.fresh('damaged'), symlinks=True)
    folder, g = run_folder(runs)/'checkpoint', random.Random(seed)
    saved = sorted(folder.glob('*/step-*') if stage in PIECES else folder.glob('step-*'))
    where, n = harm(saved[-1], how, g), progress(stage, runs)
    outcome, said = lab.finish(stage, engine, runs)
    if 'skipped the damaged checkpoint' not in said: outcome = f'FAILED: not reported; {outcome}'
    outcome = outcome.replace('identical', 'reported, identical')
    table.add(f'checkpoint {how}', stage, engine, seed, where, n, outcome, lost(stage, runs, n, said), name_of(run_folder(runs)))


def damage(lab, home):
    table = Table('damage', home)
    places = [('sft', 'torch'), ('policy-2', 'torch'), ('reward-1', 'torch'), ('sft', 'zero1'), ('collect-2', 'torch')]
    for seed in range(20): damage_one(lab, table, *places[seed % 5], ('truncated', 'flipped')[seed // 5 % 2], seed)


NUMBERS = [(s, w, v, at) for v in ('nan', 'inf') for s, w, at in (
    ('sft', 'loss', 2), ('sft', 'gradient', 2), ('reward-1', 'loss', 2), ('base_lm', 'gradient', 2),
    ('policy-2', 'loss', 1), ('policy-2', 'gradient', 2), ('policy-2', 'reward', 1), ('policy-2', 'cost', 1))]


def same_weights(a, b, but):
    "Whether two stored states hold the same models and optimizers."
    import torch
    from saferlhf.record.resume import read_state
    a, b = read_state(a)['objects'], read_state(b)['objects']
    def equal(x, y):
        if torch.is_tensor(x): return torch.equal(x, y)
        if isinstance(x, dict): return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
        if isinstance(x, list | tuple): return len(x) == len(y) and all(map(equal, x, y))
        return x == y
    return all(equal(a[k], b[k]) for k in a if k not in but)


def numbers_one(lab, table, stage, what, value, at, seed):
    "A number that is none: the step is refused, the state stored, the cause told, the weights are those of the step before."
    code, said = lab.run(stage, runs := lab.fresh('numbers'), dict(fault='not-finite', what=what, value=value, at=at))
    n, folder = progress(stage, runs), run_folder(runs)/'checkpoint'
    dumped, last = list(folder.glob('refused/rank-0/step-*')), max(folder.glob('step-*'))
    # what was drawn before the updates has moved lambda when it is a loss or a gradient that is refused
    same = dumped and same_weights(dumped[0]/'state/common', last/'state/common', ('multiplier',) if what in ('loss', 'gradient') else ())
    told = f'a {what} is NaN or infinite' in said or what == 'loss' and 'a gradient is NaN or infinite' in said
    outcome, _ = lab.finish(stage, 'torch', runs)
    good = code != 0 and dumped and same and told
    if good and outcome == 'identical': outcome = 'refused, state stored, weights untouched'
    else: outcome = f'FAILED: code {code}, stored {bool(dumped)}, untouched {same}, told {told}, {outcome}'
    table.add(f'{what} {value}', stage, 'torch', seed, 'step', n, outcome, 0, name_of(run_folder(runs)))


def numbers(lab, home):
    table = Table('numbers', home)
    for seed, case in enumerate(NUMBERS): numbers_one(lab, table, *case, seed)


def kernel_of(parent):
    "The kernel that a process has started, or None."
    for p in Path('/proc').glob('[0-9]*'):
        try:
            if b'ipykernel' in (p/'cmdline').read_bytes() and f'PPid:\t{parent}\n' in (p/'status').read_text(): return int(p.name)
        except OSError: pass


def kernel_one(lab, table, stage, who, name, seed):
    "A stage under papermill: its kernel is killed, or the process that waits for it gets a signal."
    runs, told = lab.fresh('kernel'), json.loads(lab.job(stage).read_text())
    out = str(lab.folder/'kernel.ipynb')
    code = f'from saferlhf.record.execute import execute; execute({STAGE[stage]!r}, {out!r}, {told!r}, progress=False)'
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    start = lambda: subprocess.Popen([sys.executable, '-c', code], env=lab.env(runs), **pipes)
    p = start()
    logs, pieces = lambda: list(runs.glob('*/*/metrics.jsonl')), lambda: list(runs.glob('*/*/checkpoint/*/step-*'))
    while p.poll() is None and not (pieces() if stage in PIECES else logs() and logs()[0].read_bytes().count(b'\n') > 1): time.sleep(.005)
    os.kill(kernel_of(p.pid) if who == 'kernel' else p.pid, getattr(signal, name))
    said = p.communicate(timeout=120)[0]
    n, told = progress(stage, runs), 'died' in said if who == 'kernel' else 'again' in said and 'stopped' in said
    stopped = p.returncode not in (0, -signal.SIGTERM, -signal.SIGINT, -signal.SIGKILL)
    p = start(); said = p.communicate(timeout=200)[0]
    same = p.returncode == 0 and content(run_folder(runs)) == lab.reference(stage, 'torch')[0]
    shown = (run_folder(runs)/'notebook.ipynb').read_text()
    shown = 'goes on after step' in shown or 'done before the interruption' in shown
    good = 'identical, the notebook shows where it went on'
    outcome = good if same and told and stopped and shown else f'FAILED: same {same}, told {told}, stopped {stopped}, shown {shown}'
    again = '' if stage in PIECES else lost(stage, runs, n, said)
    table.add(f'{name} to the {who}', stage, 'torch', seed, 'papermill', n, outcome, again, name_of(run_folder(runs)))


def kernel(lab, home):
    table = Table('kernel', home)
    cases = [('policy-2', 'kernel', 'SIGKILL'), ('sft', 'kernel', 'SIGKILL'), ('evaluate', 'kernel', 'SIGKILL'),
             ('policy-2', 'process', 'SIGTERM'), ('policy-2', 'process', 'SIGINT'), ('collect-2', 'process', 'SIGTERM')]
    for seed, case in enumerate(cases): kernel_one(lab, table, *case, seed)
    from faults import stops
    stops.cases(lab, table)


def lock_one(lab, table, stage, seed):
    "A second run in the folder of one that is under way is refused; the first one is then killed, and goes on."
    runs = lab.fresh('lock')
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = subprocess.Popen(lab.command(stage, dict(fault='pause', at=2)), env=lab.env(runs), **quiet)
    while first.poll() is None and Path(f'/proc/{first.pid}/stat').read_text().rpartition(')')[2].split()[0] != 'T': time.sleep(.02)
    before = content(run_folder(runs))
    code, said = lab.run(stage, runs)
    refused, alone = code != 0 and 'another run holds' in said, content(run_folder(runs)) == before
    n = progress(stage, runs)
    os.kill(first.pid, signal.SIGKILL); first.wait()
    outcome, said = lab.finish(stage, 'torch', runs)
    if refused and alone and outcome == 'identical': outcome = 'refused, the first one identical'
    else: outcome = f'FAILED: refused {refused}, left alone {alone}, {outcome}'
    again = lost(stage, runs, n, said)
    table.add('two runs in one folder', stage, 'torch', seed, 'second start', n, outcome, again, name_of(run_folder(runs)))


def lock(lab, home):
    table = Table('lock', home)
    for seed, stage in enumerate(('sft', 'policy-2', 'reward-1')): lock_one(lab, table, stage, seed)


def ranks(lab, home):
    from faults.ranked import cases
    table = Table('ranks', home)
    cases(lab, table)


def rows(lab, home):
    from faults.rows import fuzz
    table = Table('rows', home)
    for row in fuzz(10_000): table.add(*row)


def whole(name):
    "A group of `faults.whole`."
    def group(lab, home):
        from faults import whole
        getattr(whole, name)(lab, Table(name, home))
    return group


GROUPS = dict(kill=kill, disk=disk, damage=damage, numbers=numbers, kernel=kernel, lock=lock, ranks=ranks, rows=rows)
GROUPS |= {name: whole(name) for name in ('twice', 'altered', 'identity', 'moved', 'late')}


def strangers(name):
    "A group of tests/faults/strangers.py, which needs no run."
    def group(lab, home):
        import faults.strangers
        getattr(faults.strangers, name)(Table(name, home))
    return group


GROUPS |= {name: strangers(name) for name in ('pages', 'weights')}


def large(lab, home):
    from faults.large import cases
    cases(lab, Table('large', home))


GROUPS['large'] = large


def main(names, home=ROOT/'data/results/reliability', base=None):
    if unknown := set(names) - set(GROUPS): sys.exit(f'no faults {sorted(unknown)}; there are {list(GROUPS)}')
    lab, start = Lab(os.environ.get('FAULTS_FOLDER'), base or os.environ.get('FAULTS_BASE')), time.time()
    for name in names or GROUPS: GROUPS[name](lab, home)
    bad = [r for p in Path(home).glob('*.csv') for r in csv.DictReader(open(p)) if r['outcome'].startswith('FAILED')]
    print(f'{(time.time() - start) / 60:.1f} minutes, {len(bad)} failed')
    return bool(bad)


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
