"Runs: what the folder's hash covers, what is refused, and what papermill would let pass."
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
import pandas as pd
import pytest
import saferlhf.record.run as records
from saferlhf.record.files import save_checkpoint
from saferlhf.reproduction.profiles import PROFILES
from saferlhf.record.run import Run, latest, results_home, templates_home
from saferlhf.record.execute import check_parameters, execute, parameters, publish, warm_kernel
from saferlhf.record.config import check_profiles, deviations, resolve
from saferlhf.record.launch import launch


@dataclass(frozen=True)
class Config:
    lr:float=field(default=1e-5, metadata={'paper': 1e-5})
    clip:float=field(default=.3, metadata={'paper': .2})
    steps:int=field(default=500, metadata={'scale': True})
    name:str='x'


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/'runs')); monkeypatch.delenv('SAFERLHF_HOME', raising=False)
    return tmp_path


def start(**kw):
    run = Run.start(**(dict(stage='sft', config=Config(), profile='smoke', sources=('record.files',), data={'a': '1'}) | kw))
    run.close()
    return run


def test_hash_covers_what_decides_the_numbers(tmp_path, monkeypatch):
    parents = []
    for seed in (1, 2): p = Run.start('base_lm', {}, seed=seed); p.finish({}); parents.append(p.folder)
    base = dict(parents={'base': parents[0]}); one = start(**base).folder
    assert start(**base).folder == one and one.parent == tmp_path/'runs/sft' and one.name.startswith('smoke-')
    changes = ({'config': Config(lr=2e-5)}, {'seed': 1}, {'data': {'a': '2'}}, {'parents': {'base': parents[1]}}, {'parents': {}},
               {'sources': ('losses',)}, {'stage': 'reward'})
    assert len({one, *(start(**base | kw).folder for kw in changes)}) == 8
    assert start(**base, name='other').folder.name[-12:] == one.name[-12:]      # a label decides nothing


def test_hash_of_code_follows_every_import_and_reads_syntax(tmp_path, monkeypatch):
    package = tmp_path/'package'; (package/'hardware').mkdir(parents=True); monkeypatch.setattr(records, 'PACKAGE', package)
    write = lambda name, text: (package/name).write_text(text)
    write('__init__.py', ''); write('hardware/__init__.py', ''); write('data.py', 'y = 1'); write('train.py', 'z = 1')
    write('ppo.py', 'from .losses import x\nfrom . import data\nfrom saferlhf.hardware import packing\nimport saferlhf.train\nimport torch.nn')
    write('losses.py', '"Words."\n__all__ = ["x"]\ndef x(): return 1'); write('hardware/packing.py', 'from ..losses import x\nfrom .ranks import w')
    write('hardware/ranks.py', 'w = 1')
    before = records.source_hashes(('ppo',))
    assert set(before) == {'ppo', 'losses', 'data', 'train', 'hardware.packing', 'hardware.ranks'}
    write('losses.py', '# %% nb #2\n"Other words."\n__all__ = ["x", "y"]\ndef x():\n    "What it does."\n    return 1   # one\n')
    assert records.source_hashes(('ppo',)) == before                            # comments, docstrings and lists of names say nothing
    write('hardware/ranks.py', 'w = 2'); after = records.source_hashes(('ppo',))
    assert {m for m in after if after[m] != before[m]} == {'hardware.ranks'} and start(sources=('ppo',)).folder != start(sources=('data',)).folder
    for bad in ('from .gone import x', 'import saferlhf.gone', 'from saferlhf.hardware.gone import x', 'from . import gone\nfrom .gone import x'):
        write('losses.py', bad)
        with pytest.raises(FileNotFoundError, match='losses imports saferlhf.*gone'): records.source_hashes(('ppo',))
    write('losses.py', 'import saferlhf.record.run'); (package/'record').mkdir(); write('record/__init__.py', '')
    write('record/run.py', '1'); kept = records.source_hashes(('ppo',)); write('record/run.py', '2')
    assert records.source_hashes(('ppo',)) == kept and not any(m.startswith('record') for m in kept)   # bookkeeping


def test_finish_writes_done_last_and_only_once(monkeypatch):
    order = []; write = records.atomic_write
    monkeypatch.setattr(records, 'atomic_write', lambda path, content: (order.append(Path(path).name), write(path, content)))
    run = Run.start('sft', Config()); run.log(0, {'loss': 2.}); run.sample([{'text': 'a'}]); run.data(buckets=[57, 55], hashes={'f': 'h'})
    assert not run.done; order.clear(); run.finish({'loss': 1.})
    assert order == ['summary.json', 'manifest.json', 'DONE'] and run.done
    again = Run.start('sft', Config()); assert again.done; again.finish({'loss': 9.})
    back = Run.open(run.folder)
    assert back.summary == {'loss': 1.} and back.metrics().loss.tolist() == [2.] and back.config['clip'] == .3
    assert back.manifest['buckets'] == [55, 57] and back.manifest['data'] == {'f': 'h'} and back.manifest['seconds'] >= 0
    assert back.manifest['deviations'] == {'clip': {'value': .3, 'paper': .2}} and back.manifest['versions']['torch']
    with pytest.raises(RuntimeError, match='is finished'): again.log(1, {})
    with pytest.raises(FileNotFoundError): Run.open(run.folder.parent)


def test_unfinished_run_goes_on_from_its_checkpoint(capsys):
    run = Run.start('sft', Config())
    for step in range(4): run.log(step, {'loss': 1.}); run.sample([{'step': step}])
    save_checkpoint(run.folder/'checkpoint', 1, {'a': b''}); save_checkpoint(run.folder/'checkpoint', 2, {'a': b'1'})
    (run.folder/'checkpoint/step-00000002/a').write_bytes(b'2'); time.sleep(.05); run.close()
    with open(run.folder/'metrics.jsonl', 'a') as f: f.write('{"step": 4, "lo')
    run = Run.start('sft', Config())
    assert run.checkpoint.name == 'step-00000001' and run.metrics().step.tolist() == [0, 1]
    assert 'skipped the damaged' in capsys.readouterr().out
    run.log(2, {'loss': 1.}); assert run.metrics().seconds.is_monotonic_increasing and len(run.manifest['starts']) == 2
    assert (run.folder/'samples.jsonl').read_text().count('\n') == 2; run.close()


def test_printed_configuration_names_deviations(capsys):
    start(config=Config(lr=3e-5, steps=2)); out = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert 'DEVIATION from 1e-05' in out['lr'] and 'scale' in out['steps'] and 'DEVIATION' not in out['steps'] + out['name']


@pytest.mark.parametrize('bad', [{'name': '../x'}, {'name': 'a/b'}, {'stage': '..'}, {'stage': '../y'}, {'profile': 'a\nb'}])
def test_names_may_not_leave(bad):
    with pytest.raises(ValueError, match='leads out'): start(**bad)


def test_run_path_and_parents():
    run = start(); assert run.path('model/x').parent.parent == run.folder
    with pytest.raises(ValueError, match='leads out'): run.path('../x')
    with pytest.raises(ValueError, match='finish it first'): start(stage='reward', parents={'sft': run.folder})
    with pytest.raises(FileNotFoundError, match='saferlhf run sft'): latest('sft')
    done = Run.start('sft', {}, profile='cpu'); done.finish({})
    assert latest('sft') == latest('sft', 'cpu') == done.folder
    with pytest.raises(FileNotFoundError): latest('sft', 'gpu')


def test_second_process_is_refused():
    run = Run.start('sft', {})
    code = "from saferlhf.record.run import Run; Run.start('sft', {})"
    other = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert other.returncode and 'another run holds' in other.stderr
    again = Run.start('sft', {}); assert again.folder == run.folder; again.close()    # the same notebook, all cells run again


def test_resolve_and_profiles():
    assert resolve(Config, {'steps': 2, 'override': {'lr': 1}}, {'lr': 2}) == Config(lr=2., steps=2)
    for bad, why in (({'step': 1}, "did you mean 'steps'"), ({'steps': 1.}, 'wants a int'), ({'lr': '1e-5'}, 'wants a float'),
                     ({'lr': True}, 'wants a float')):
        with pytest.raises(ValueError, match=why): resolve(Config, {}, bad)
    assert deviations(Config(lr=2., steps=1)) == {'lr': {'value': 2., 'paper': 1e-5}, 'clip': {'value': .3, 'paper': .2}}
    check_profiles({'cpu': {'sft': {'steps': 1, 'override': {'lr': .1}}}}, {'sft': Config})
    assert set(PROFILES) == {'smoke', 'cpu', 'gpu', 'paper'}
    for bad in ({'sft': {'lr': .1}}, {'stf': {}}, {'sft': {'override': {'rl': .1}}}):
        with pytest.raises(ValueError): check_profiles({'cpu': bad}, {'sft': Config})


def notebook(path, *cells):
    cells = [{'cell_type': 'code', 'id': f'c{i}', 'source': s, 'outputs': [], 'execution_count': None,
              'metadata': {'tags': ['parameters'] if s.startswith('seed') else []}} for i, s in enumerate(cells)]
    meta = {'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}
    path.write_text(json.dumps({'cells': cells, 'metadata': meta, 'nbformat': 4, 'nbformat_minor': 5}))
    return path


def test_templates_are_checked_before_they_run(tmp_path):
    t = notebook(tmp_path/'t.ipynb', 'seed = 0\nparents = {}', 'pass')
    check_parameters(t, {'seed': 1})
    with pytest.raises(ValueError, match="did you mean 'seed'"): execute(t, tmp_path/'o.ipynb', {'sede': 1})
    with pytest.raises(ValueError, match='no cell tagged'): execute(notebook(tmp_path/'u.ipynb', 'x = 0'), tmp_path/'o.ipynb', {})
    with pytest.raises(ValueError, match='not a literal'): check_parameters(notebook(tmp_path/'v.ipynb', 'seed = 1 + len("a")'), {})
    with pytest.raises(ValueError, match='defines the parameter'): check_parameters(notebook(tmp_path/'w.ipynb', 'seed = 0\nrate = 1.'), {})
    assert not (tmp_path/'o.ipynb').exists()


def test_parameters_inside_the_notebook():
    assert parameters({'seed': 1, 'profile': 'cpu', 'In': ['# Parameters\nseed = 1']}, ['seed', 'profile']) == {'seed': 1, 'profile': 'cpu'}
    for scope in ({'seed': '1'}, {'seed': True}, {}, {'seed': 1, 'In': ['# Parameters\nsede = 1']}):
        with pytest.raises(ValueError): parameters(scope, ['seed'])


def test_kernels(tmp_path, monkeypatch):
    "One warm kernel: a run with its notebook, a fresh start for the next one, an error, plain papermill's trap, the stored command."
    import papermill
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('SAFERLHF_HOME', str(tmp_path)); (tmp_path/'nbs/templates').mkdir(parents=True)
    t = notebook(tmp_path/'nbs/templates/sft.ipynb', 'seed = 0', '''import os, sys; from saferlhf.record.execute import parameters; from saferlhf.record.run import Run
import matplotlib, matplotlib.pyplot as plt
assert 'left' not in globals() and 'LEFT' not in os.environ and matplotlib.rcParams['lines.linewidth'] < 9 and not plt.get_fignums()
p = parameters(globals(), ['seed'])''', '''run = Run.start('sft', {}, seed=seed)
if not run.done: run.log(0, {'loss': 1.})
run.finish({'pid': os.getpid(), 'cwd': os.getcwd()})
left = 1; os.environ['LEFT'] = '1'; matplotlib.rcParams['lines.linewidth'] = 9; os.chdir('/'); plt.plot([1]);''')
    bad = notebook(tmp_path/'bad.ipynb', 'seed = 0', "print('before')", "raise KeyError('the cause')")
    with warm_kernel() as km:
        folders = [execute('sft', tmp_path/f'{s}.ipynb', {'seed': s}, progress=False, km=km) for s in (1, 2)]
        runs = [Run.open(f) for f in folders]
        assert runs[0].summary == runs[1].summary and runs[0].summary['cwd'] == str(tmp_path)       # one process, the caller's folder
        for r in runs: assert r.done and 'image/png' in r.path('notebook.ipynb').read_text()
        kept = runs[0].path('notebook.ipynb').read_bytes()
        assert execute('sft', tmp_path/'1.ipynb', {'seed': 1}, progress=False, km=km) == folders[0]
        assert runs[0].path('notebook.ipynb').read_bytes() == kept
        with pytest.raises(RuntimeError, match=r"^KeyError: 'the cause'\n  in cell 2 of bad.ipynb; .*partial.ipynb"):
            execute(bad, tmp_path/'partial.ipynb', {}, progress=False, km=km)
        assert 'before' in (tmp_path/'partial.ipynb').read_text()
        with pytest.raises(papermill.PapermillExecutionError, match="no parameter 'sede'"):
            papermill.execute_notebook(t, tmp_path/'plain.ipynb', {'sede': 1}, kernel_name='python3', progress_bar=False, km=km)
    assert runs[0].manifest['command'] == '''python -c "from saferlhf.record.execute import execute; execute('sft', '1.ipynb', {'seed': 1})"'''


def test_launch(capfd):
    assert launch(max, 1, [2, 3]) == 3
    assert launch('json.dumps'.join, 1, [['a', 'b']]) == 'ajson.dumpsb'
    with pytest.raises(ValueError, match='move it into a module'): launch(lambda: 0, 2)
    with pytest.raises(RuntimeError, match='(?s)exit status 1:.*bad batch'): launch(['-c', 'print("seen"); raise ValueError("bad batch")'])
    assert 'seen' in capfd.readouterr().out


def test_launch_ranks(tmp_path, monkeypatch, capfd):
    (tmp_path/'ranked.py').write_text('''import os, time
def work(folder, fails):
    rank = os.environ['RANK']; open(f'{folder}/{rank}', 'w').write(os.environ['WORLD_SIZE'])
    while len(os.listdir(folder)) < 2: time.sleep(.05)
    if fails and rank == '1': raise ValueError('rank one broke')
    if fails: time.sleep(30)''')
    (tmp_path/'out').mkdir()
    monkeypatch.setenv('PYTHONPATH', str(tmp_path)); monkeypatch.syspath_prepend(str(tmp_path)); monkeypatch.setenv('OMP_NUM_THREADS', '1')
    import ranked
    with pytest.raises(RuntimeError, match='(?s)rank +: 1 .*rank one broke'): launch(ranked.work, 2, [str(tmp_path/'out'), True])
    assert [(tmp_path/'out'/r).read_text() for r in '01'] == ['2', '2']


def test_publish_merges(tmp_path):
    f = tmp_path/'results/t.csv'
    publish([{'seed': 0, 'round': r, 'value': r/3, 'n': 10**7} for r in (10, 2, 1)], f, 'a', ['round'])
    publish([{'seed': 1, 'round': 1, 'value': .5, 'n': 1}], f, 'b', ['round'])
    before = f.read_text()
    publish(pd.DataFrame([{'seed': 0, 'round': 2, 'value': None, 'n': 3, 'extra': 'x,y'}]), f, 'c', ['round'])
    t = pd.read_csv(f)
    assert t[['seed', 'round']].values.tolist() == [[0, 1], [0, 2], [0, 10], [1, 1]] and t.run_id.tolist() == ['a', 'c', 'a', 'b']
    assert t.n.tolist() == [10**7, 3, 10**7, 1] and pd.isna(t.value[1])
    assert '0,10,3.33333,10000000,a\n' in before and '0,10,3.33333,10000000,a,\n' in f.read_text()
    publish([{'seed': 0, 'round': 2, 'step': s} for s in (0, 1)], f, 'd', ['round'])             # a curve: the whole round is replaced
    assert pd.read_csv(f).run_id.tolist() == ['a', 'd', 'd', 'a', 'b']
    for bad in ([{'seed': 0}], [{'round': 0}], []):
        with pytest.raises(ValueError): publish(bad, f, 'e', ['round'])
    with pytest.raises(ValueError, match='leads out'): publish([{'seed': 0}], '../t.csv', 'e', [])


def test_homes(tmp_path, monkeypatch):
    assert results_home().parts[-2:] == ('data', 'results') and templates_home().name == 'templates'
    monkeypatch.setattr(records, 'PACKAGE', tmp_path/'site/saferlhf')
    for find in (results_home, templates_home):
        with pytest.raises(FileNotFoundError, match='set SAFERLHF_HOME'): find()
    (tmp_path/'site/saferlhf/_templates').mkdir(parents=True); assert templates_home() == tmp_path/'site/saferlhf/_templates'
    (tmp_path/'own').mkdir(); monkeypatch.setenv('SAFERLHF_HOME', str(tmp_path/'own')); assert results_home() == tmp_path/'own/data/results'


def test_threads_are_left_alone(monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    with warm_kernel(): assert os.environ['OMP_NUM_THREADS'] == '1'


def test_a_changed_size_is_another_stage(monkeypatch): # a stage that is done with other sizes is not done
    from saferlhf.apps.pipeline import graph, key_of
    from saferlhf.reproduction.profiles import PROFILES
    stage = next(s for s in graph('cpu') if s.name == 'collect-2')
    key = key_of(stage, dict(profile='cpu', seed=0))
    assert key == key_of(stage, dict(profile='cpu', seed=0)) != key_of(stage, dict(profile='cpu', seed=1))
    monkeypatch.setitem(PROFILES['cpu'], 'collect', PROFILES['cpu']['collect'] | dict(candidates=7))
    assert key_of(stage, dict(profile='cpu', seed=0)) != key


def test_gpus_are_dealt_out_to_workers(monkeypatch):
    from contextlib import nullcontext
    from queue import SimpleQueue

    from saferlhf.apps import pipeline
    for name, value in dict(CUDA_VISIBLE_DEVICES='3,5', OMP_NUM_THREADS='9').items(): monkeypatch.setenv(name, value)
    assert pipeline.dealt(3) == ['3', '5', '3']
    gpus = SimpleQueue(); gpus.put('5'); gpus.put('')
    monkeypatch.setattr(pipeline, 'warm_kernel', nullcontext)
    pipeline._open(2, gpus); assert (os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS']) == ('5', '2')
    pipeline._open(2, gpus); assert os.environ['CUDA_VISIBLE_DEVICES'] == '5'                   # no GPU to name: as it was
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES'); monkeypatch.setattr(pipeline.torch.cuda, 'device_count', lambda: 0)
    assert pipeline.dealt(2) == ['', '']


def test_rounds_without_red_teaming_have_a_table_of_their_own(tmp_path, monkeypatch):
    "Their evaluation holds the other policies too: none of its rows gets among those of the rounds."
    from saferlhf.reproduction import results as publishing
    from saferlhf.reproduction.graph import find
    (run := tmp_path/'run').mkdir()
    row = dict(prompt_kind='unsafe', judge='gold', decoding='sampled', harmful=.1)
    lines = ''.join(json.dumps(row | dict(policy=p)) + '\n' for p in ('initial', 'no-red-2', 'no-red-3'))
    for name, text in {'config.json': '{}', 'manifest.json': '{"stage": "evaluate", "seconds": 1}', 'summary.json': '{}',
                       'DONE': '', 'models.jsonl': lines}.items():
        (run/name).write_text(text)
    monkeypatch.setenv('SAFERLHF_HOME', str(tmp_path))
    monkeypatch.setattr(publishing, 'graph', lambda profile: [find('evaluate-no-red', 'gpu')])
    monkeypatch.setattr(publishing, 'folder_of', lambda *a: run)
    publishing.publish_all('gpu', 0)
    home = tmp_path/'data/results/gpu'
    assert {p.stem for p in home.iterdir()} == {'no_red', 'times'}
    assert pd.read_csv(home/'no_red.csv').policy.tolist() == ['no-red-2', 'no-red-3']
