"The tutorials, their templates and the script run from end to end, on the smallest model and few rows."
import importlib.util
import io
import os
from pathlib import Path

import nbformat
import papermill
import pytest
from project import ROOT, notebooks

from saferlhf.apps.own_data import example_files
from saferlhf.record.execute import _freshen, warm_kernel
from saferlhf.record.files import read_lines
from saferlhf.record.run import Record

TUTORIALS, ROWS, NANO = ROOT/'nbs/tutorials', 40, str(ROOT/'data/models/nano')
SMALL = dict(max_prompt_tokens=32, max_new_tokens=8)
TRAINING = SMALL | dict(batch_size=16, epochs=1., test_share=.25)
ALIGNMENT = SMALL | dict(steps=2, prompts=4, window=8, minibatches=1, look=2, test_share=.25, force=True)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with files, where runs are kept; every test adds to it."
    home = tmp_path_factory.mktemp('tutorials')
    example_files(home/'files', ROWS)
    with pytest.MonkeyPatch.context() as m:
        for name in ('SPREAD', 'SAVE_STEPS', 'SAVE_MINUTES', 'COMMAND', 'NOTEBOOK'): m.delenv(f'SAFERLHF_{name}', raising=False)
        m.setenv('SAFERLHF_RUNS', str(home/'runs')); m.setenv('OMP_NUM_THREADS', '1')
        m.setenv('PYTHONPATH', os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])); m.chdir(home)
        yield home


@pytest.fixture(scope='module')
def kernel(home):
    with warm_kernel() as km: yield km


def execute(kernel, name, **parameters): # -> texts of its outputs, number of its pictures
    known = papermill.inspect_notebook(str(TUTORIALS/f'{name}.ipynb'))
    assert not parameters.keys() - known.keys()
    _freshen(kernel, dict(SAFERLHF_RUNS=os.environ['SAFERLHF_RUNS'], MPLBACKEND='module://matplotlib_inline.backend_inline'))
    out = Path(f'{name}.ipynb')
    papermill.execute_notebook(TUTORIALS/out, out, parameters, kernel_name='python3', progress_bar=False, km=kernel)
    outputs = [o for c in nbformat.read(out, 4).cells for o in c.get('outputs', [])]
    said = ''.join(o.get('text') or o['data'].get('text/plain', '') for o in outputs)
    return said, sum('image/png' in o.get('data', {}) for o in outputs)


@pytest.fixture(scope='module')
def first(home, kernel): # what 01 shows; its runs are there for the others
    return execute(kernel, '01_from_a_file_to_a_policy', model=NANO, files='files', training=TRAINING, alignment=ALIGNMENT)


def runs(home): # of every stage, all of them finished
    found = {p.parent for p in home.glob('runs/*/*/manifest.json')}
    assert found == {p.parent for p in home.glob('runs/*/*/DONE')}
    return found


def stages(folders): return sorted(f.parent.name for f in folders)


def shown(text): # nothing that the files ask is in a stored notebook
    asked = {str(r['prompt']) for r in read_lines(Path('files/prompts.jsonl'))}
    return [p for p in asked if p in text]


def test_from_a_file_to_a_policy(home, first):
    said, pictures = first
    assert {'sft', 'reward', 'cost', 'policy'} <= {*stages(runs(home))}
    assert pictures == 2 and 'harmful share' in said and 'flat tyre' in said and not shown(said)


def test_the_limit(home, kernel, first):
    before = runs(home)
    said, pictures = execute(kernel, '02_choose_the_limit', model=NANO, files='files', training=TRAINING,
                             looking=dict(samples=2, test_share=.25, rows=6))
    assert stages(runs(home) - before) == ['limit']                       # the runs of 01 are found, not made again
    assert pictures == 1 and 'the safest of the sampled answers' in said and not shown(said)


def test_a_reward_of_your_own(home, kernel, first):
    before = runs(home)
    said, pictures = execute(kernel, '03_a_reward_of_your_own', model=NANO, files='files', training=TRAINING, alignment=ALIGNMENT)
    made, = map(Record, runs(home) - before)
    assert set(made.manifest['functions']) == {'reward', 'cost'} and set(made.manifest['parent_folders']) == {'sft'}
    assert pictures == 1 and 'held-out answers' in said and not shown(said)


def test_templates_are_the_commands(home, kernel, first):
    "They find the runs that the tutorial made: the same parameters are the same run."
    of = lambda stage: str(next(home.glob(f'runs/{stage}/nano-*')))
    told = dict(own_sft=dict(model=NANO, data='files/answers.jsonl', settings=TRAINING),
                own_align=dict(policy=of('sft'), reward=of('reward'), cost=of('cost'), prompts='files/prompts.jsonl', settings=ALIGNMENT))
    told |= {f'own_{k}': dict(model=of('sft'), data='files/preferences.jsonl', settings=TRAINING) for k in ('reward', 'cost')}
    assert set(told) == {p.stem for p in notebooks('tutorials') if p.stem.startswith('own_')}
    before = runs(home)
    for name, parameters in told.items():
        said, pictures = execute(kernel, name, **parameters)
        assert pictures == 1 and f'{ROWS} rows' in said and not shown(said)
    assert runs(home) == before


def test_several_ranks(home, kernel):
    said, pictures = execute(kernel, '04_several_gpus', files='files', training=TRAINING)
    one, two = (next(Record(p) for p in home.glob(f'runs/sft/ranks-{n}-*')) for n in (1, 2))
    assert [r.manifest['spread']['gpus'] for r in (one, two)] == [1, 2] and one.done and two.done
    difference = (one.metrics().loss - two.metrics().loss).abs()
    assert len(difference) > 1 and difference.max() < .02 and pictures == 1 and 'it fits' in said


def test_five_calls(home, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location('five_calls', TUTORIALS/'five_calls.py')
    script = importlib.util.module_from_spec(spec); spec.loader.exec_module(script)
    monkeypatch.setattr('sys.stdin', io.StringIO('How do I fix a flat tyre?\n'))
    script.five_calls(NANO, 'files', TRAINING, ALIGNMENT)
    assert {'sft', 'reward', 'cost', 'policy'} <= {*stages(runs(home))}
    out = capsys.readouterr().out
    start, policy = out.rpartition('> How do I fix a flat tyre?')[2].split('\n    [')[1:]
    assert all('reward' in x and 'cost' in x for x in (start, policy))
    assert len((TUTORIALS/'five_calls.py').read_text(encoding='utf-8').splitlines()) <= 25
