"Runs: what the folder's hash covers, what is refused, and what papermill would let pass."
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
import pandas as pd
import psutil
import pytest
import saferlhf.record.code as code
import saferlhf.record.run as records
from saferlhf.record.code import source_hashes
from saferlhf.record.config import deviations, resolve
from saferlhf.record.execute import _check_parameters, execute, parameters, publish, warm_kernel
from saferlhf.hardware.ranks import Spread
from saferlhf.record.files import lock, newest, save_checkpoint
from saferlhf.record.launch import launch
from saferlhf.record.resume import Interrupted
from saferlhf.record.run import Record, Run, results_home, templates_home


@dataclass(frozen=True)
class Config:
    lr:float=1e-5
    clip:float=.3
    steps:int=field(default=500, metadata={'scale': True})
    name:str='x'


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/'runs'))
    monkeypatch.delenv('SAFERLHF_HOME', raising=False)
    return tmp_path


def start(**kw):
    run = Run.start(**(dict(stage='sft', config=Config(), profile='smoke', sources=('hardware.packing',),
                            data={'a': '1'}) | kw))
    run.close()
    return run


def test_hash_covers_what_decides_the_numbers(tmp_path, monkeypatch):
    parents = []
    for seed in (1, 2): p = Run.start('base_lm', {}, seed=seed); p.finish({}); parents.append(p.folder)
    base = dict(parents={'base': parents[0]}); one = start(**base).folder
    assert start(**base).folder == one and one.parent == tmp_path/'runs/sft' and one.name.startswith('smoke-')
    changes = ({'config': Config(lr=2e-5)}, {'seed': 1}, {'data': {'a': '2'}},
               {'parents': {'base': parents[1]}}, {'parents': {}},
               {'sources': ('losses',)}, {'stage': 'reward'})
    assert len({one, *(start(**base | kw).folder for kw in changes)}) == 8
    assert start(**base, name='other').folder.name[-12:] == one.name[-12:]      # a label decides nothing


@pytest.fixture
def package(tmp_path, monkeypatch):
    "A small package whose code is hashed; write(name, text) makes a module, or the __init__ of a package."
    home = tmp_path/'package'; monkeypatch.setattr(code, 'PACKAGE', home)
    def write(name, text=''):
        path = home.joinpath(*name.split('.'))
        path = path/'__init__.py' if name in ('', 'hardware', 'hardware.deep', 'record',
                                              'apps') else path.with_suffix('.py')
        path.parent.mkdir(parents=True, exist_ok=True); path.write_text(text)
    for name in ('', 'hardware', 'hardware.deep', 'record', 'apps'): write(name)
    write('losses', 'def x(): return 1'); write('data', 'y = 1'); write('hardware.packing', 'z = 1')
    write('hardware.seeds', 'w = 1')
    return write


IMPORTS = {  # (module, an import in it) -> what counts beside it; x, y and z are no modules
    ('ppo', 'from .losses import x'): {'losses'},
    ('ppo', 'from . import data, losses as l'): {'data', 'losses'},
    ('ppo', 'from saferlhf.hardware import packing'): {'hardware.packing'},
    ('ppo', 'from saferlhf import data'): {'data'},
    ('ppo', 'import saferlhf.hardware.packing as p'): {'hardware.packing'},
    ('ppo', 'import torch.nn, saferlhf.data'): {'data'},
    ('ppo', 'from saferlhf.losses import *'): {'losses'}, ('ppo', 'from torch.data import losses'): set(),
    ('ppo', 'def f():\n    class C:\n        from .losses import x'): {'losses'},
    ('ppo', 'try: import saferlhf.data\nexcept ImportError: from . import losses'): {'data', 'losses'},
    ('hardware.a', 'from .packing import z'): {'hardware.packing'},
    ('hardware.a', 'from . import packing'): {'hardware.packing'},
    ('hardware.a', 'from ..losses import x'): {'losses'}, ('hardware.a', 'from .. import data'): {'data'},
    ('hardware.a', 'from ..hardware import packing'): {'hardware.packing'},
    ('hardware', 'from .packing import z'): {'hardware.packing'},
    ('hardware', 'from ..losses import x'): {'losses'},
    ('hardware', 'from .. import data'): {'data'},
    ('hardware.deep', 'from ..packing import z'): {'hardware.packing'},
    ('hardware.deep', 'from ... import data'): {'data'},
    ('hardware.deep.b', 'from ...losses import x'): {'losses'},
    ('hardware.deep.b', 'from .. import packing'): {'hardware.packing'},
    ('ppo', 'from saferlhf.record.run import Run'): set(), ('ppo', 'from . import record, apps'): set(),
    ('ppo', 'from .record import run'): set()}


@pytest.mark.parametrize('module, text', IMPORTS)
def test_the_hash_of_code_finds_imports_of_every_kind(package, module, text):
    package('record.run', '1'); package(module, f'{text}\nthis = 1')
    assert set(source_hashes([module])) == {module} | IMPORTS[module, text]


@pytest.mark.parametrize('text',
                         ['from .gone import x', 'import saferlhf.gone',
                          'from saferlhf.hardware.gone import x',
                                  'from .gone import x, y', 'def f(): import saferlhf.record.gone'])
def test_an_import_that_leads_nowhere_is_an_error(package, text):
    package('losses', text); package('ppo', 'from .losses import x')
    with pytest.raises(FileNotFoundError, match='saferlhf.losses imports saferlhf.*gone'):
        source_hashes(['ppo'])
    with pytest.raises(FileNotFoundError, match="no module 'rnus'"): source_hashes(['rnus'])
    package('losses', 'from ...data import x')
    with pytest.raises(ImportError): source_hashes(['losses'])


def test_a_package_counts_where_its_init_holds_code(package):
    assert set(source_hashes(['hardware.packing'])) == {'hardware.packing'}
    package('hardware', '"Words."\n__all__ = []')
    assert set(source_hashes(['hardware.packing'])) == {'hardware.packing'}
    package('hardware', 'import torch; torch.set_default_dtype(torch.float64)')
    package('', 'from .data import y')
    assert set(source_hashes(['hardware.packing'])) == {'hardware.packing', 'hardware', 'saferlhf', 'data'}


SAYS = 'class C:\n    def f(self): return 1\n    x = 1\ndef g(): return 2'
SAME = ['"Module."\n__all__ = ["C"]\n__all__ += ["g"]\n_all_ = ["x"]\n' + SAYS, '__all__: list = []\n' + SAYS,
        '__version__ = "2"\n' + SAYS,
        SAYS.replace('class C:', 'class C: # one\n    "What C is."'),
        SAYS.replace('return 1', '\n        "What f does."\n        return 1'),
        SAYS.replace('x = 1', 'x = 1\n    "What x is."'), SAYS.replace('\n', '\r\n'),
        '# %% ../nb.ipynb #3\n' + SAYS + '\n\n']
OTHER = [SAYS.replace('return 2', f'return {v}') for v in ('2.', '"2"', 'b"2"', '-2', '2j', '(2,)', '[2]',
                                                           '...', 'None', 'f"2"')]
OTHER += [SAYS.replace('x = 1', 'x: int = 1'), SAYS.replace('x = 1', 'y = 1'),
          SAYS + '\ndef h(): "Says nothing."']


def test_the_hash_of_code_reads_syntax(package):
    def of(text): package('losses', text); return source_hashes(['losses']).get('losses')
    assert {of(text) for text in SAME} == {of(SAYS)}
    assert len({of(text) for text in [SAYS, *OTHER]}) == 1 + len(OTHER)
    assert of('def f(): "One."') == of('def f():\n    "Another."\n    # word') != of('def f(): return 1')
    assert of('"Words alone."\n__all__ = []') is None                            # nothing is said
    # every Python version has to give this one: a new kind of field would move all run folders
    every = """async def f[T](a, /, b: int = 1, *c, d=None, **e): pass""".replace('[T]', '') + """
@d(1)
class C(B, metaclass=M): x: int = u'\u00e9\U0001fae8'; y = 1e999, 0.1, 10**20, {**a, 'k': [*b]}
with a as b, c: print(f'a{b!r:>{c}}{{d=}}', 'e' f'{f}')
match x:
    case {'a': [1, *_], **r} if (n := r): lambda z=1, *, k: z[1:2, ::-1]
try: assert x if y else not z, 'm'
except* E as e: raise e from None
else: del x[0], y.z; global g
"""
    assert of(every) == EVERY


EVERY = '657b64b84511b26da286c7cedfbb260b0bde3d5262917e51656b3d78ba282187'


def test_every_run_counts_how_it_is_seeded(package):
    package('ppo', 'v = 1'); one = start(sources=['ppo'])
    assert set(one.manifest['sources']) == {'ppo', 'hardware.seeds'}
    package('losses', 'v = 3')
    assert start(sources=['ppo']).folder == one.folder != start(sources=['data']).folder
    package('hardware.seeds', 'w = 2'); assert start(sources=['ppo']).folder != one.folder


def test_bookkeeping_decides_no_number():
    "Neither wing counts; how a run is seeded does, and lies below them."
    assert not any(m.split('.')[0] in ('record', 'apps') for m in source_hashes(['reproduction.training']))
    assert 'hardware.seeds' in source_hashes(['reproduction.training'])
    for module in ('files', 'resume', 'run'):
        assert not any(n.startswith('seed') for n in dir(sys.modules[f'saferlhf.record.{module}']))


def test_finish_writes_done_last_and_only_once(monkeypatch):
    order = []; write = records.atomic_write
    monkeypatch.setattr(records, 'atomic_write', lambda path,
                        content: (order.append(Path(path).name), write(path, content)))
    paper = {'clip': (.2, 'the script has .3')}
    run = Run.start('sft', Config(), paper=paper); run.log(0, {'loss': 2.}); run.sample([{'text': 'a'}])
    run.data(buckets=[57, 55], hashes={'f': 'h'})
    assert not run.done; order.clear(); run.finish({'loss': 1.})
    assert order == ['summary.json', 'manifest.json', 'DONE'] and run.done
    again = Run.start('sft', Config()); assert again.done; again.finish({'loss': 9.})
    back = Run.open(run.folder)
    assert back.summary == {'loss': 1.} and back.metrics().loss.tolist() == [2.] and back.config['clip'] == .3
    assert back.manifest['buckets'] == [55, 57] and back.manifest['data'] == {'f': 'h'}
    assert back.manifest['seconds'] >= 0
    assert back.manifest['deviations'] == {'clip': {'value': .3, 'paper': .2, 'reason': 'the script has .3'}}
    assert back.manifest['versions']['torch']
    with pytest.raises(RuntimeError, match='is finished'): again.log(1, {})
    with pytest.raises(FileNotFoundError): Run.open(run.folder.parent)


def test_unfinished_run_goes_on_from_its_checkpoint(capsys):
    run = Run.start('sft', Config())
    for step in range(4): run.log(step, {'loss': 1.}); run.sample([{'step': step}])
    save_checkpoint(run.folder/'checkpoint', 1, {'a': Path.touch})
    save_checkpoint(run.folder/'checkpoint', 2, {'a': lambda path: path.write_bytes(b'1')})
    (run.folder/'checkpoint/step-00000002/a').write_bytes(b'2'); time.sleep(.05); run.close()
    with open(run.folder/'metrics.jsonl', 'a') as f: f.write('{"step": 4, "lo')
    run = Run.start('sft', Config())
    assert run.metrics().step.tolist() == [0, 1] and 'skipped the damaged' in capsys.readouterr().out
    assert newest(run.folder/'checkpoint').name == 'step-00000001'
    run.log(2, {'loss': 1.})
    assert run.metrics().seconds.is_monotonic_increasing and len(run.manifest['starts']) == 2
    assert (run.folder/'samples.jsonl').read_text().count('\n') == 2; run.close()


def test_printed_configuration_names_deviations(capsys):
    start(config=Config(lr=3e-5, steps=2), paper={'lr': (1e-5, 'a small model')})
    out = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert 'DEVIATION from 1e-05: a small model' in out['lr'] and 'scale' in out['steps']
    assert 'DEVIATION' not in out['steps'] + out['name']


@pytest.mark.parametrize('bad',
                         [{'name': '../x'}, {'name': 'a/b'}, {'stage': '..'}, {'stage': '../y'},
                          {'profile': 'a\nb'}])
def test_names_may_not_leave(bad):
    with pytest.raises(ValueError, match='leads out'): start(**bad)


def test_run_path_and_parents():
    run = start(); assert run.path('model/x').parent.parent == run.folder
    with pytest.raises(ValueError, match='leads out'): run.path('../x')
    with pytest.raises(ValueError, match='finish it first'):
        start(stage='reward', parents={'sft': run.folder})
    with pytest.raises(ValueError, match='finish it first'):
        start(stage='reward', parents={'sft': run.folder/'none'})


@pytest.mark.parametrize('format', [None, 1, 2, 4])
def test_a_folder_of_another_version_is_refused_in_one_line(format):
    "One of format 1, for example: module names were flat, and the text of modules was hashed."
    run = Run.start('sft', {}); run.finish({'loss': 1.}); folder, manifest = run.folder, run.manifest; del run
    path, format = folder/'manifest.json', {'format': format} if format else {}
    path.write_text(json.dumps({k: v for k, v in manifest.items() if k != 'format'} | format))
    for read in (Record, Run.open, Run.attach, lambda folder: start(stage='reward', parents={'sft': folder})):
        with pytest.raises(ValueError, match='another version made it; make it again with `saferlhf run sft`') as e:
            read(folder)
        assert str(folder) in str(e.value) and '\n' not in str(e.value)
    assert json.loads(path.read_text()).get('format') == format.get('format')  # nothing was written into it


def test_facts_for_the_ranks_are_no_part_of_the_hash():
    run = Run.start('sft', {}); run.note(round=2, spread={'gpus': 1})
    assert Run.attach(run.folder) is run and Record(run.folder).manifest['round'] == 2
    hash_ = run.manifest['hash']; run.finish({}); run.note(round=3); run.data(buckets=[1])
    assert Record(run.folder).manifest['round'] == 2 and Record(run.folder).manifest['hash'] == hash_
    assert Run.attach(str(run.folder)).done


def test_second_process_is_refused():
    run = Run.start('sft', {})
    code = "from saferlhf.record.run import Run; Run.start('sft', {})"
    other = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert other.returncode and 'another run holds' in other.stderr
    # the same notebook, all cells run again
    again = Run.start('sft', {}); assert again.folder == run.folder; again.close()


def test_resolve_and_deviations():
    assert resolve(Config, {'steps': 2, 'lr': 1}, {'lr': 2}) == Config(lr=2., steps=2)
    for bad, why in (({'step': 1}, "did you mean 'steps'"), ({'steps': 1.}, 'wants a int'),
                     ({'lr': '1e-5'}, 'wants a float'), ({'lr': True}, 'wants a float')):
        with pytest.raises(ValueError, match=why): resolve(Config, bad)
    paper = {'clip': (.2, 'why'), 'steps': (9, '')}
    assert deviations(Config(lr=2., steps=1), paper) == {
        'lr': {'value': 2., 'paper': 1e-5, 'reason': ''}, 'clip': {'value': .3, 'paper': .2, 'reason': 'why'}}
    assert deviations(Config(clip=.2), paper) == {} == deviations({'lr': 2.}, paper)


def notebook(path, *cells):
    cells = [{'cell_type': 'code', 'id': f'c{i}', 'source': s, 'outputs': [], 'execution_count': None,
              'metadata': {'tags': ['parameters'] if s.startswith('seed') else []}} for i,
              s in enumerate(cells)]
    meta = {'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}
    path.write_text(json.dumps({'cells': cells, 'metadata': meta, 'nbformat': 4, 'nbformat_minor': 5}))
    return path


def test_templates_are_checked_before_they_run(tmp_path):
    t = notebook(tmp_path/'t.ipynb', 'seed = 0\nparents = {}', 'pass')
    _check_parameters(t, {'seed': 1})
    with pytest.raises(ValueError, match="did you mean 'seed'"): execute(t, tmp_path/'o.ipynb', {'sede': 1})
    with pytest.raises(ValueError, match='no cell tagged'):
        execute(notebook(tmp_path/'u.ipynb', 'x = 0'), tmp_path/'o.ipynb', {})
    with pytest.raises(ValueError, match='not a literal'):
        _check_parameters(notebook(tmp_path/'v.ipynb', 'seed = 1 + len("a")'), {})
    with pytest.raises(ValueError, match='defines the parameter'):
        _check_parameters(notebook(tmp_path/'w.ipynb', 'seed = 0\nrate = 1.'), {})
    assert not (tmp_path/'o.ipynb').exists()


def test_parameters_inside_the_notebook():
    assert parameters({'seed': 1, 'profile': 'cpu', 'In': ['# Parameters\nseed = 1']},
                      ['seed', 'profile']) == {'seed': 1, 'profile': 'cpu'}
    for scope in ({'seed': '1'}, {'seed': True}, {}, {'seed': 1, 'In': ['# Parameters\nsede = 1']}):
        with pytest.raises(ValueError): parameters(scope, ['seed'])


def test_kernels(tmp_path, monkeypatch):
    "One warm kernel: a run with its notebook, a fresh start for the next one, an error, the stored command."
    import papermill
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('SAFERLHF_HOME', str(tmp_path))
    (tmp_path/'nbs/templates').mkdir(parents=True)
    t = notebook(tmp_path/'nbs/templates/sft.ipynb', 'seed = 0',
                 '''import os, sys
from saferlhf.record.execute import parameters
from saferlhf.record.run import Run
import matplotlib, matplotlib.pyplot as plt
assert 'left' not in globals() and 'LEFT' not in os.environ
assert matplotlib.rcParams['lines.linewidth'] < 9 and not plt.get_fignums()
p = parameters(globals(), ['seed'])''', '''run = Run.start('sft', {}, seed=seed)
if not run.done: run.log(0, {'loss': 1.})
run.finish({'pid': os.getpid(), 'cwd': os.getcwd()})
left = 1; os.environ['LEFT'] = '1'; os.chdir('/')
matplotlib.rcParams['lines.linewidth'] = 9; plt.plot([1]);''')
    bad = notebook(tmp_path/'bad.ipynb', 'seed = 0', "print('before')", "raise KeyError('the cause')")
    with warm_kernel() as km:
        folders = [execute('sft', tmp_path/f'{s}.ipynb', {'seed': s}, progress=False, km=km) for s in (1, 2)]
        runs = [Run.open(f) for f in folders]
        # one process, the caller's folder
        assert runs[0].summary == runs[1].summary and runs[0].summary['cwd'] == str(tmp_path)
        for r in runs: assert r.done and 'image/png' in r.path('notebook.ipynb').read_text()
        kept = runs[0].path('notebook.ipynb').read_bytes()
        assert execute('sft', tmp_path/'1.ipynb', {'seed': 1}, progress=False, km=km) == folders[0]
        assert runs[0].path('notebook.ipynb').read_bytes() == kept
        with pytest.raises(RuntimeError,
                           match=r"^KeyError: 'the cause' \(in cell 2 of bad.ipynb, .*partial.ipynb\)") as e:
            execute(bad, tmp_path/'partial.ipynb', {}, progress=False, km=km)
        assert '\n' not in str(e.value) and "raise KeyError('the cause')" in e.value.__notes__[0]
        assert 'before' in (tmp_path/'partial.ipynb').read_text()
        with pytest.raises(papermill.PapermillExecutionError, match="no parameter 'sede'"):
            papermill.execute_notebook(t, tmp_path/'plain.ipynb', {'sede': 1}, kernel_name='python3',
                                       progress_bar=False, km=km)
    call = "from saferlhf.record.execute import execute; execute('sft', '1.ipynb', {'seed': 1})"
    assert runs[0].manifest['command'] == f'python -c "{call}"'


def test_a_kernel_that_died_is_started_again_once(tmp_path, monkeypatch, capsys):
    "Before it is reset, before the first cell, and again and again: seconds, and one line."
    import saferlhf.record.execute as module
    monkeypatch.setenv('SAFERLHF_HOME', str(tmp_path))
    t, fresh, answer = notebook(tmp_path/'t.ipynb', 'seed = 0', 'import os; print(os.getpid())'), module._freshen, module._answer
    def go(): execute(t, tmp_path/'o.ipynb', {}, progress=False, km=km)
    def die(): os.kill(km.provisioner.pid, signal.SIGKILL); time.sleep(.2)
    began = time.monotonic()
    with warm_kernel() as km:
        go(); slow = max(1, (time.monotonic() - began) / 5)
        began = time.monotonic(); die(); go()
        assert 'the kernel had died: it is started again' in capsys.readouterr().out and time.monotonic() - began < 20 * slow
        monkeypatch.setattr(module, '_freshen', lambda km, env=None: (fresh(km, env), env is not None and die()))
        go(); assert str(km.provisioner.pid) in (tmp_path/'o.ipynb').read_text()
        monkeypatch.setattr(module, '_freshen', lambda km, env=None: (fresh(km, env), die()))
        with pytest.raises(RuntimeError, match=r'^the kernel of t.ipynb died.*\)$'): go()
        monkeypatch.setattr(module, '_freshen', fresh)
        monkeypatch.setattr(module, '_answer', lambda km, code: (die(), answer(km, code)))
        with pytest.raises(RuntimeError, match='^the kernel died, was started again and died once more .* the same command again$'): go()


def test_sockets_of_processes_that_are_gone_are_deleted(tmp_path, monkeypatch):
    import saferlhf.record.execute as module
    monkeypatch.setattr(module.tempfile, 'tempdir', str(tmp_path))
    first, held = module._sockets()
    dead, young, other = (tmp_path/f'{first.name[:-8]}{x}' for x in ('deaddead', 'youngone', 'othersxx'))
    for p in (dead, young, other): p.mkdir(); (p/'k-1').touch()
    for p in (first, dead, other): os.utime(p, (0, 0))
    stat = Path.lstat
    monkeypatch.setattr(Path, 'lstat', lambda p: os.stat_result([*stat(p)[:4], 4242, *stat(p)[5:]]) if p == other else stat(p))
    second, more = module._sockets()
    assert {*tmp_path.iterdir()} == {first, second, young, other} and first != second     # the first is in use
    for taken in (held, more): taken.release()


def test_the_kernel_is_this_interpreter_wherever_it_lies(tmp_path, monkeypatch):
    "Another kernel called python3 is on the path, the temporary folder has a long name, and nothing of the user's IPython runs."
    spec, used = tmp_path/'kernels/python3', tmp_path/'used'; spec.mkdir(parents=True)
    other = dict(argv=['touch', str(used)], display_name='old', language='python')
    (spec/'kernel.json').write_text(json.dumps(other))
    startup = tmp_path/'ipython/profile_default/startup'; startup.mkdir(parents=True); (startup/'mine.py').write_text('seed = 7')
    long = tmp_path/('x' * 90); long.mkdir()
    monkeypatch.setattr('tempfile.tempdir', str(long))
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path)); monkeypatch.setenv('IPYTHONDIR', str(tmp_path/'ipython'))
    monkeypatch.setenv('JUPYTER_RUNTIME_DIR', '/dev/null/none'); monkeypatch.setenv('SAFERLHF_HOME', str(tmp_path))
    which = notebook(tmp_path/'which.ipynb', 'seed = 0', "import sys; print(sys.executable); assert 'mine' not in dir()")
    execute(which, tmp_path/'out.ipynb', {}, progress=False)
    assert sys.executable in (tmp_path/'out.ipynb').read_text(encoding='utf-8') and not used.exists()
    assert not list(long.iterdir())


def test_a_notebook_is_executed_by_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr('saferlhf.record.execute.warm_kernel', lambda: pytest.fail('a kernel was started'))
    with lock(tmp_path, 'a.ipynb'), pytest.raises(RuntimeError, match='another run holds .*a.ipynb'):
        execute(notebook(tmp_path/'t.ipynb', 'seed = 0'), tmp_path/'a.ipynb', {})


def test_a_signal_between_two_cells_stops_the_notebook(tmp_path, monkeypatch):
    "A kernel that is between two cells takes no notice of a signal: here it never gets it."
    monkeypatch.setenv('SAFERLHF_HOME', str(tmp_path)); monkeypatch.setattr(os, 'kill', lambda *a: None)
    t = notebook(tmp_path/'t.ipynb', 'seed = 0', 'import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(.5)', '1 / 0')
    with pytest.raises(Interrupted, match='stopped between two cells: run the same command again'):
        execute(t, tmp_path/'o.ipynb', {}, progress=False)


def ended(pid):
    try: return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return True


def within(seconds, what):
    end = time.monotonic() + seconds
    while not (found := what()): assert time.monotonic() < end, f'not within {seconds} s'; time.sleep(.01)
    return found


def killed(folder, code, pids, number=signal.SIGTERM, group=True): # pids: of a process -> those that must end with it
    "Start code, wait for what it starts, send a signal; the exit status and what was printed."
    (folder/'tmp').mkdir()
    env = os.environ | dict(TMPDIR=str(folder/'tmp'), SAFERLHF_HOME=str(folder), PYTHONPATH=f'{Path(__file__).parents[2]}:{folder}')
    p = subprocess.Popen([sys.executable, '-c', code], env=env, cwd=folder, start_new_session=True, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    started = within(120, lambda: pids(p.pid))
    (os.killpg if group else os.kill)(p.pid, number)
    said = p.communicate(timeout=60)[0]
    try: within(30, lambda: all(map(ended, started)))
    finally: [os.kill(k, signal.SIGKILL) for k in started if not ended(k)]
    return p.returncode, said


SLOW = "import os, time; open('pids', 'w').write(f'{os.getpid()} {os.getppid()} ;'); time.sleep(40)"


def written(folder):
    there = lambda: (folder/'pids').read_text() if (folder/'pids').exists() else ''
    return lambda pid: [int(x) for x in s.split()[:-1]] if ';' in (s := there()) else []


@pytest.mark.parametrize('moment', ['at its start', 'before a cell', 'in a cell'])
def test_no_kernel_stays_behind(tmp_path, moment):
    notebook(tmp_path/'t.ipynb', 'seed = 0', SLOW)
    code = "from saferlhf.record import execute; execute.execute('t.ipynb', 'o.ipynb', {}, progress=False)"
    if moment == 'before a cell': # which nobody but this process sees
        slow = f"def slow(km, *a): os.getppid = lambda: km.provisioner.pid; exec({SLOW!r})"
        code = code.replace('execute;', f'execute; import os\n{slow}\nexecute._freshen = slow;')
    def kernels(pid):
        try: return [c.pid for c in psutil.Process(pid).children() if 'ipykernel_launcher' in c.cmdline()]
        except psutil.NoSuchProcess: return []                                  # a child that has ended between the two questions
    status, said = killed(tmp_path, code, kernels if moment == 'at its start' else written(tmp_path))
    at_once, *said = said.splitlines()
    assert status == 1 and at_once == 'SIGTERM: stopping within five seconds', at_once
    assert len(said) == 1 and 'run the same command again' in said[0], said
    assert not [*(tmp_path/'tmp').glob('tmp*'), *(tmp_path/'tmp').glob('saferlhf-*')]


def test_what_a_signal_cuts_off_is_not_complained_about(tmp_path):
    "A coroutine between its making and its first step, as in each call of a kernel."
    code = """import os, signal, time; from saferlhf.record.resume import exit_on_sigterm
async def ask(): pass
def later():
    asked = ask(); os.kill(os.getpid(), signal.SIGTERM); time.sleep(10)
print('there', flush=True)
with exit_on_sigterm('run it again'): later()"""
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parents[2]))
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    said = [s.split(':')[0] for s in done.stderr.splitlines()]
    assert done.stdout == 'there\n' and said == ['SIGTERM', 'stopped by SIGTERM'], done.stderr


def test_a_client_that_does_not_close_keeps_nobody(tmp_path):
    "A signal that comes while a client opens may leave a socket that its context waits for. The first client makes room for a second."
    notebook(tmp_path/'t.ipynb', 'seed = 0')
    code = """import time, jupyter_client.client as c
calls = []
c.KernelClient.stop_channels = lambda self: calls.append(1) or len(calls) > 1 and time.sleep(100)
from saferlhf.record.execute import execute; execute('t.ipynb', 'o.ipynb', {}, progress=False); print(len(calls))"""
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parents[2]))
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=90)
    assert done.stdout.split()[-1:] == ['2'], done.stderr


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGKILL'])
def test_workers_end_with_the_command(tmp_path, name):
    "The process that waits for them gets the signal alone."
    notebook(tmp_path/'t.ipynb', 'seed = 0', SLOW)
    (tmp_path/'slow.py').write_text("""from saferlhf.record.execute import execute
from saferlhf.reproduction import pipeline
_work = pipeline._work
def work(*a):
    pipeline.run_stage = lambda *a, km: execute('t.ipynb', 'o.ipynb', {}, km=km, progress=False)
    return _work(*a)""")
    code = """if True:
    import slow; from saferlhf.reproduction import graph, pipeline
    pipeline._work = slow.work; pipeline.reads = lambda *a: {}
    pipeline._side_by_side([(graph.find('sft', 'smoke'), 0)], 'smoke', 1, 0)"""
    status, said = killed(tmp_path, code, written(tmp_path), getattr(signal, name), group=False)
    assert status == (1 if name == 'SIGTERM' else -9) and 'Parent appears to have exited' not in said, said
    assert 'run the same command again' in said
    if name == 'SIGTERM': assert not list((tmp_path/'tmp').glob('tmp*'))


def test_seeds_publish_side_by_side(tmp_path):
    def rows(seed):
        for k in range(25): publish([dict(seed=seed, k=k)], tmp_path/'t.csv', 'a/b', ['k'])
    with ThreadPoolExecutor(2) as pool: list(pool.map(rows, (0, 1)))
    assert len(pd.read_csv(tmp_path/'t.csv')) == 50


@pytest.mark.parametrize('text', ['', '{"stage": "sft", "se', '[]', '"x"', '\ufeff{', '{"a": \udcff}'])
def test_a_damaged_manifest_is_named(text):
    path = start().folder/'manifest.json'; path.write_bytes(text.encode('utf-8', 'surrogateescape'))
    for read in (start, lambda: Run.open(path.parent)):
        with pytest.raises(ValueError, match='manifest.json is damaged .*delete it and run') as e: read()
        assert '\n' not in str(e.value)
    path.unlink(); assert start().folder == path.parent                         # what it says to do works


def test_what_a_start_cannot_take_is_told():
    for seed in (-1, 1., '0'):
        with pytest.raises(ValueError, match='seed=.*whole number'): start(seed=seed)
    with pytest.raises(ValueError, match='plain values'): start(config={'model': object()})
    with pytest.raises(ValueError, match='no slash, backslash or colon'): start(name='12:30')
    folder = start().folder; (folder/'manifest.json').unlink(); (folder/'config.json').unlink(); (folder/'.lock').unlink()
    folder.rmdir(); folder.write_text('')
    with pytest.raises(FileExistsError, match='File exists'): start()


def test_settings_that_are_no_numbers_are_named(monkeypatch):
    run = start()
    for name in ('SAFERLHF_SAVE_STEPS', 'SAFERLHF_SAVE_MINUTES'):
        monkeypatch.setenv(name, 'often')
        with pytest.raises(ValueError, match=f'{name}=often'): run.saver({})
        monkeypatch.delenv(name)
    for told in ('{"gpus":', '[2]', '{"gpu": 2}', '{"gpus": "2"}', '{"offload": ["x"]}'):
        monkeypatch.setenv('SAFERLHF_SPREAD', told)
        with pytest.raises(ValueError, match='SAFERLHF_SPREAD|spread') as e: Spread.wanted()
        assert '\n' not in str(e.value)


def test_a_resume_under_other_versions_is_told_and_kept(capsys):
    run = start(); path = run.folder/'manifest.json'; now = run.manifest['versions']
    assert 'versions_from' not in start().manifest                              # the same ones
    def begun_under(**others):
        facts = json.loads(path.read_bytes()); facts['versions'] |= others; path.write_text(json.dumps(facts))
    begun_under(torch='2.9.0', transformers='5.0.0')
    save_checkpoint(run.folder/'checkpoint', 4, {}); capsys.readouterr()
    sets = start().manifest['versions_from']
    line, = [x for x in capsys.readouterr().out.splitlines() if 'other versions' in x]
    assert f'from step 5 on: torch 2.9.0 before, {now["torch"]} now, transformers 5.0.0' in line
    assert [s['step'] for s in sets] == [0, 5] and [s['versions']['torch'] for s in sets] == ['2.9.0', now['torch']]
    assert start().manifest['versions_from'] == sets and 'other versions' not in capsys.readouterr().out      # told once


def test_launch(capfd):
    assert launch(max, 1, [2, 3]) == 3
    assert launch('json.dumps'.join, 1, [['a', 'b']]) == 'ajson.dumpsb'
    with pytest.raises(ValueError, match='move it into a module'): launch(lambda: 0, 2)
    with pytest.raises(RuntimeError, match='(?s)exit status 1:.*bad batch'):
        launch(['-c', 'print("seen"); raise ValueError("bad batch")'])
    assert 'seen' in capfd.readouterr().out


def test_launch_ranks(tmp_path, monkeypatch, capfd):
    (tmp_path/'ranked.py').write_text('''import os, time
def work(folder, fails):
    rank = os.environ['RANK']; open(f'{folder}/{rank}', 'w').write(os.environ['WORLD_SIZE'])
    while len(os.listdir(folder)) < 2: time.sleep(.05)
    if fails and rank == '1': raise ValueError('rank one broke')
    if fails: time.sleep(30)''')
    (tmp_path/'out').mkdir()
    monkeypatch.setenv('PYTHONPATH', str(tmp_path)); monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    import ranked
    with pytest.raises(RuntimeError, match='(?s)rank +: 1 .*rank one broke'):
        launch(ranked.work, 2, [str(tmp_path/'out'), True])
    assert [(tmp_path/'out'/r).read_text() for r in '01'] == ['2', '2']


def test_publish_merges(tmp_path):
    f = tmp_path/'results/t.csv'
    publish([{'seed': 0, 'round': r, 'value': r/3, 'n': 10**7} for r in (10, 2, 1)], f, 'a', ['round'])
    publish([{'seed': 1, 'round': 1, 'value': .5, 'n': 1}], f, 'b', ['round'])
    before = f.read_text()
    publish(pd.DataFrame([{'seed': 0, 'round': 2, 'value': None, 'n': 3, 'extra': 'x,y'}]), f, 'c', ['round'])
    t = pd.read_csv(f)
    assert t[['seed', 'round']].values.tolist() == [[0, 1], [0, 2], [0, 10], [1, 1]]
    assert t.run_id.tolist() == ['a', 'c', 'a', 'b']
    assert t.n.tolist() == [10**7, 3, 10**7, 1] and pd.isna(t.value[1])
    assert '0,10,3.33333,10000000,a\n' in before and '0,10,3.33333,10000000,a,\n' in f.read_text()
    # a curve: the whole round is replaced
    publish([{'seed': 0, 'round': 2, 'step': s} for s in (0, 1)], f, 'd', ['round'])
    assert pd.read_csv(f).run_id.tolist() == ['a', 'd', 'd', 'a', 'b']
    for bad in ([{'seed': 0}], [{'round': 0}], []):
        with pytest.raises(ValueError): publish(bad, f, 'e', ['round'])
    with pytest.raises(ValueError, match='leads out'): publish([{'seed': 0}], '../t.csv', 'e', [])


def test_homes(tmp_path, monkeypatch):
    assert results_home().parts[-2:] == ('data', 'results') and templates_home().name == 'templates'
    site = tmp_path/'site/saferlhf'
    monkeypatch.setattr(records, 'PACKAGE', site)
    monkeypatch.setitem(records.homes.__globals__, 'PACKAGE', site)
    for find in (results_home, templates_home):
        with pytest.raises(FileNotFoundError, match='set SAFERLHF_HOME'): find()
    (site/'_templates').mkdir(parents=True); assert templates_home() == site/'_templates'
    (tmp_path/'own').mkdir(); monkeypatch.setenv('SAFERLHF_HOME', str(tmp_path/'own'))
    assert results_home() == tmp_path/'own/data/results'


def test_threads_are_left_alone(monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    with warm_kernel(): assert os.environ['OMP_NUM_THREADS'] == '1'


def test_a_changed_size_is_another_stage(monkeypatch): # a stage that is done with other sizes is not done
    from saferlhf.reproduction.graph import graph
    from saferlhf.reproduction.ledger import _key_of
    from saferlhf.reproduction.profiles import PROFILES
    stage = next(s for s in graph('cpu') if s.name == 'collect-2')
    key = _key_of(stage, dict(profile='cpu', seed=0))
    assert key == _key_of(stage, dict(profile='cpu', seed=0)) != _key_of(stage, dict(profile='cpu', seed=1))
    for told, changed in (('collect', dict(candidates=7)), ('policy-2', dict(threshold=-.4))):     # of a round too
        with monkeypatch.context() as m:
            m.setitem(PROFILES['cpu'], told, PROFILES['cpu'][told] | changed)
            assert _key_of(stage, dict(profile='cpu', seed=0)) != key


def test_gpus_are_dealt_out_to_workers(monkeypatch):
    from contextlib import nullcontext
    from queue import SimpleQueue

    from saferlhf.reproduction import pipeline
    for name, value in dict(CUDA_VISIBLE_DEVICES='3,5', OMP_NUM_THREADS='9', SAFERLHF_SIBLINGS='').items():
        monkeypatch.setenv(name, value)
    assert pipeline._gpus(3) == ['3', '5', '3']
    gpus = SimpleQueue(); gpus.put('5'); gpus.put('')
    monkeypatch.setattr(pipeline, 'warm_kernel', nullcontext)
    pipeline._open(2, gpus)
    assert (os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS']) == ('5', '2')
    # no GPU to name: as it was
    pipeline._open(2, gpus); assert os.environ['CUDA_VISIBLE_DEVICES'] == '5'
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    monkeypatch.setattr(pipeline.torch.cuda, 'device_count', lambda: 0)
    assert pipeline._gpus(2) == ['', '']


def test_rounds_without_red_teaming_have_a_table_of_their_own(tmp_path, monkeypatch):
    "Their evaluation holds the other policies too: none of its rows gets among those of the rounds."
    from saferlhf.reproduction import results as publishing
    from saferlhf.reproduction.graph import find
    run = start(stage='evaluate', config={})
    row = dict(prompt_kind='unsafe', judge='gold', decoding='sampled', harmful=.1)
    lines = '\n'.join(json.dumps(row | dict(policy=p)) for p in ('initial', 'no-red-2', 'no-red-3'))
    (run.folder/'models.jsonl').write_text(lines + '\n'); run.finish({})
    monkeypatch.setenv('SAFERLHF_HOME', str(tmp_path))
    monkeypatch.setattr(publishing, 'graph', lambda profile: [find('evaluate-no-red', 'gpu')])
    monkeypatch.setattr(publishing, 'folder_of', lambda *a: run.folder)
    monkeypatch.setattr(publishing, 'reads', lambda *a: {})
    publishing.publish_all('gpu', 0)
    home = tmp_path/'data/results/gpu'
    assert {p.stem for p in home.glob('*.csv')} == {'no_red', 'times'}
    assert pd.read_csv(home/'no_red.csv').policy.tolist() == ['no-red-2', 'no-red-3']


def test_a_notebook_leaves_ctrl_c_as_it_was(tmp_path, monkeypatch): # nbclient leaves a handler that does nothing
    monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/'runs'))
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    execute(notebook(tmp_path/'t.ipynb', 'seed = 0', '1 + 1'), tmp_path/'o.ipynb', {}, progress=False)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(RuntimeError, match='by zero'):
        execute(notebook(tmp_path/'f.ipynb', 'seed = 0', '1 / 0'), tmp_path/'p.ipynb', {}, progress=False)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
