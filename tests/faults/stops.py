"""Kernels that die where nothing waits for them, signals in the middle of something long, and what is left in the temporary folder."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from faults import suite

ROOT = suite.ROOT
SLOW = '''
import hashlib as _h, time as _t, saferlhf.train as _train, saferlhf.record.run as _records
def _python():
    for _ in range(6000): _t.sleep(.01)
def _c(): _h.pbkdf2_hmac('sha256', b'x', b'y', 80_000_000)                # one call, a minute or so
def _long(how):
    print('LONG', flush=True); open({mark!r}, 'w').close(); dict(c=_c, python=_python)[how]()
_check, _cached, _pieces = _train._check_metrics, _records.cached, []
def _step(metrics, step):
    if step == {at}: _long({how!r})
    return _check(metrics, step)
def _piece(folder, make, again):
    _pieces.append(folder)
    return _cached(folder, lambda: (len(_pieces) == {at} and _long({how!r}), make())[1], again)
if {where!r} == 'step': _train._check_metrics = _step
else: _records.cached = _piece
'''
# stage, where it takes long, at which step or piece, in what, the signals: the last one is to be obeyed
LONG = [('sft', 'step', 3, 'c', 'SIGTERM'), ('policy-2', 'step', 3, 'python', 'SIGTERM'), ('reward-1', 'step', 3, 'c', 'SIGINT SIGINT'),
        ('policy-2', 'step', 2, 'python', 'SIGINT SIGINT'), ('collect-2', 'piece', 2, 'c', 'SIGTERM'),
        ('evaluate', 'piece', 3, 'python', 'SIGINT SIGINT'), ('evaluate', 'piece', 2, 'python', 'SIGTERM')]


def slowed(lab, stage, **how):
    "A template of which a step, or a piece, takes long."
    book = json.loads((ROOT/f'nbs/templates/{suite.STAGE[stage]}.ipynb').read_text())
    at = next(i for i, c in enumerate(book['cells']) if 'parameters' in c['metadata'].get('tags', []))
    cell = dict(cell_type='code', id='slow', metadata={}, outputs=[], execution_count=None, source=SLOW.format(**how))
    book['cells'].insert(at + 1, cell)
    path = lab.folder/f'slow/{suite.STAGE[stage]}.ipynb'
    path.parent.mkdir(exist_ok=True); path.write_text(json.dumps(book))
    return path


def waiting(p, done, seconds=240):
    end = time.monotonic() + seconds
    while not done(): assert p.poll() is None and time.monotonic() < end, 'it did not come that far'; time.sleep(.01)


def signalled(p, log, names):
    """Send them; seconds until the last one was acknowledged, and until the command said its last line, or was gone without one
    (what Python then takes to end is not counted: it grows with what else the machine is doing)."""
    for k, name in enumerate(names):
        if k: time.sleep(1)
        before, began = len(log.read_text()), time.monotonic()
        p.send_signal(getattr(signal, name))
        while f'{name}: stopping' not in log.read_text()[before:] and time.monotonic() < began + 9: time.sleep(.005)
        said = time.monotonic() - began
    while p.poll() is None and 'stopped' not in log.read_text() and time.monotonic() < began + 60: time.sleep(.005)
    ended = time.monotonic() - began
    p.wait(60)
    return said, ended


def verdict(said, ended, end): # seconds; how the end compares
    good = said < 1 and ended < 5 and end == 'identical'
    return f'{"" if good else "FAILED: "}said in {said:.1f} s, stopped in {ended:.1f} s, {end}'


def long_one(lab, table, stage, where, at, how, names, seed):
    "A signal in the middle of a long step or piece of a stage under papermill."
    runs, mark, log = lab.fresh('long'), lab.folder/'mark', lab.folder/'long.log'
    mark.unlink(missing_ok=True)
    template, told = slowed(lab, stage, where=where, at=at, how=how, mark=str(mark)), json.loads(lab.job(stage).read_text())
    out = str(lab.folder/'long.ipynb')
    code = f'from saferlhf.record.execute import execute; execute({str(template)!r}, {out!r}, {told!r}, progress=False)'
    with open(log, 'w') as f: p = subprocess.Popen([sys.executable, '-c', code], env=lab.env(runs), stdout=f, stderr=f)
    waiting(p, mark.exists)
    said, ended = signalled(p, log, names.split())
    n = suite.progress(stage, runs)
    end, text = lab.finish(stage, 'torch', runs)
    again = suite.lost(stage, runs, n, text) if end == 'identical' else ''
    if again not in ('', 0, 1): end = f'{again} steps lost'
    table.add(f'{names.replace(" ", ", ")} in a long {where}', stage, 'torch', seed, WITHIN[how], n, verdict(said, ended, end), again,
              suite.name_of(suite.run_folder(runs)))


WITHIN = dict(c='one call of C code', python='Python code')
OWN = '''import sys; sys.argv[0] = 'saferlhf'
import saferlhf.apps.commands as _commands
{slow}
sys.exit(_commands.main({argv!r}))'''


def own_one(lab, table, how, names, seed):
    "The same in a command on people's own rows, without a kernel: `saferlhf reward`."
    from faults.large import write
    data, log, mark = lab.folder/'own.jsonl', lab.folder/'own.log', lab.folder/'mark'
    write(data, 80); mark.unlink(missing_ok=True)
    argv = f'reward --model {ROOT}/data/models/nano --data {data} --batch-size 16 --max-prompt-tokens 64 --max-new-tokens 64'.split()
    def start(runs, slow):
        code = OWN.format(slow=SLOW.format(where='step', at=2, how=how, mark=str(mark)) if slow else '', argv=argv)
        with open(log, 'w') as f: return subprocess.Popen([sys.executable, '-c', code], env=lab.env(runs), stdout=f, stderr=f)
    def folder(runs): return next(p.parent for p in Path(runs).glob('reward/*/manifest.json'))
    alone, runs = lab.fresh('own-alone'), lab.fresh('own')
    assert start(alone, False).wait(300) == 0, log.read_text()
    p = start(runs, True); waiting(p, mark.exists)
    said, ended = signalled(p, log, names.split())
    n = (folder(runs)/'metrics.jsonl').read_bytes().count(b'\n')
    code = start(runs, False).wait(300)
    same = code == 0 and suite.content(folder(runs)) == suite.content(folder(alone))
    resumed = json.loads((folder(runs)/'manifest.json').read_text()).get('resumed')
    again = n - (resumed[-1]['step'] if resumed else 0)
    end = 'identical' if same and again < 2 else f'status {code}, same {same}, {again} steps lost: {log.read_text()[-300:]}'
    table.add(f'{names.replace(" ", ", ")} in a long step', 'saferlhf reward', 'torch', seed, WITHIN[how], n,
              verdict(said, ended, end), again, suite.name_of(folder(runs)))


BETWEEN = '''import json, os, signal, sys, time
import saferlhf.record.execute as x
jobs, where = json.loads(sys.argv[1]), sys.argv[2]
fresh = x._freshen
def kill(): os.kill(km.provisioner.pid, signal.SIGKILL); time.sleep(.3); began.append(time.monotonic())
def first(km, env=None): fresh(km, env); env is None and where != 'each time' or kill()
began = []
with x.warm_kernel() as km:
    for k, (template, out, told) in enumerate(jobs):
        if k and where == 'between stages': kill()
        if k and where != 'between stages': x._freshen = first
        x.execute(template, out, told, progress=False, km=km)
print('killed', len(began), flush=True)'''


def between_one(lab, table, stages, where, seed):
    "The kernel is killed while no notebook runs in it."
    runs = lab.fresh('between')
    jobs = [(suite.STAGE[s], str(lab.folder/f'between-{s}.ipynb'), json.loads(lab.job(s).read_text())) for s in stages]
    began = time.monotonic()
    p = subprocess.run([sys.executable, '-c', BETWEEN, json.dumps(jobs), where], env=lab.env(runs), timeout=300, text=True,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    took, last = time.monotonic() - began, p.stdout.strip().splitlines()[-1]
    folders = [next(p.parent for p in runs.glob(f'{kind}/*/manifest.json')) for kind in ('sft', 'gold') if [*runs.glob(f'{kind}/*')]]
    same = [suite.content(f) == lab.reference(s, 'torch')[0] for f, s in zip(folders, stages, strict=False)]
    if where == 'each time':
        good, what = p.returncode and 'the kernel of gold.ipynb died' in last and same == [True], 'started again once, then named'
    else: good, what = p.returncode == 0 and same == [True] * 2 and 'it is started again' in p.stdout, 'started again, identical'
    if not good or took > 110: what = f'FAILED: {what}: {took:.0f} s, {last[-200:]}'
    table.add('SIGKILL to the kernel', stages[-1], 'torch', seed, where, 0, what, 0, suite.name_of(folders[-1]))


def sockets_one(lab, table, seed):
    "The process that waits, and its kernel, are killed; the next start deletes what they left."
    home, mark = lab.fresh('tmp'), lab.folder/'mark'
    home.mkdir(); mark.unlink(missing_ok=True)
    env = lab.env(lab.fresh('sockets')) | dict(TMPDIR=str(home))
    code = 'import time; from saferlhf.record.execute import warm_kernel\n' \
           f'with warm_kernel(): open({str(mark)!r}, "w").close(); time.sleep(600)'
    p = subprocess.Popen([sys.executable, '-c', code], env=env, stderr=subprocess.DEVNULL)
    waiting(p, mark.exists)
    child = suite.kernel_of(p.pid)
    for pid in (p.pid, child): os.kill(pid, signal.SIGKILL)
    p.wait()
    left = [*home.glob('saferlhf-*')]
    for f in left: os.utime(f, (0, 0))                                                # as after an hour
    subprocess.run([sys.executable, '-c', code.replace('time.sleep(600)', 'pass')], env=env, check=True, stderr=subprocess.DEVNULL)
    after = [*home.glob('saferlhf-*')]
    what = 'deleted at the next start' if len(left) == 1 and not after else f'FAILED: {left}, {after}'
    table.add('kill -9 to process and kernel', 'a kernel', 'torch', seed, 'sockets', len(left), what, 0, '')
    shutil.rmtree(home)


def cases(lab, table):
    for seed, case in enumerate(LONG): long_one(lab, table, *case, seed)
    for seed, case in enumerate([('c', 'SIGTERM'), ('python', 'SIGINT SIGINT')]): own_one(lab, table, *case, seed)
    for seed, where in enumerate(('between stages', 'before the first cell', 'each time')):
        between_one(lab, table, ['sft', 'gold'], where, seed)
    sockets_one(lab, table, 0)
