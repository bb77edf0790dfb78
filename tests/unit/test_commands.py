"The command line: pages of help, options that are refused, errors in one line; and results of two machines."
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from saferlhf.apps import commands
from saferlhf.record.execute import publish
from saferlhf.reproduction import pipeline
from saferlhf.reproduction.results import join


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/'runs')); monkeypatch.setenv('SAFERLHF_HOME', str(tmp_path))
    return tmp_path


def test_help_imports_nothing_heavy():
    code = '''import sys
from saferlhf.apps.commands import main
try: main(['--help'])
except SystemExit: print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'pandas', 'numpy', 'transformers'}))'''
    shown = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.splitlines()
    assert shown[-1] == '[]'
    listed = [line.split()[0] for line in shown if line.startswith('    ') and not line.startswith('     ')]
    assert listed == list(commands._COMMANDS)


@pytest.mark.parametrize('name', commands._COMMANDS)
def test_a_command_has_its_page_and_refuses_other_options(name, capsys):
    function, options = commands._COMMANDS[name]
    with pytest.raises(SystemExit) as stopped: commands.main([name, '--help'])
    page = capsys.readouterr().out
    assert stopped.value.code == 0 and ' '.join(function.__doc__.split()) in ' '.join(page.split())
    for option, how in options.items(): assert how['help'] and (how.get('metavar') or option) in page
    given = ['x'] * len({'stage', 'folder', 'source', 'out'} & set(options))
    for wrong in ('--unheard-of', '--gpu-mem' if name == 'plan' else '--gpu-memory'):         # no abbreviations either
        with pytest.raises(SystemExit) as stopped: commands.main([name, *given, wrong, '1'])
        assert stopped.value.code == 2 and f'unrecognized arguments: {wrong}' in (said := capsys.readouterr().err)
        assert f'usage: saferlhf {name} [-h]' in said


def test_errors_end_in_one_line_and_a_status(monkeypatch, capsys):
    def stop(profile, seed): raise KeyboardInterrupt
    monkeypatch.setattr(pipeline, 'reproduce', stop)
    assert commands.main(['reproduce', '--profile', 'cpu']) == 130
    assert commands.main(['join', 'nowhere', '--profile', 'cpu']) == 1
    assert commands.main(['run', 'sft', '--profile', 'cpu', '--set', 'lr']) == 1
    assert commands.main(['run', 'sft', '--profile', 'cpu', '--offload', 'actor']) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and all(line.startswith('saferlhf: ') for line in said)
    for line, part in zip(said, ('goes on', 'no results', 'FIELD=VALUE', 'ROLE=WHAT'), strict=True): assert part in line
    with pytest.raises(SystemExit) as stopped: commands.main(['list', '--profile', 'huge'])
    assert stopped.value.code == 2 and "no profile 'huge'" in capsys.readouterr().err


def told(argv, capsys):
    "The one line of a command that fails, less its beginning."
    assert commands.main(argv) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith('saferlhf: '), said
    return said[0].removeprefix('saferlhf: ')


RUN = ['run', 'sft', '--profile', 'smoke']
WRONG = {('run', 'sfft', '--profile', 'smoke'): "no stage 'sfft': did you mean 'sft'?",
         (*RUN, '--set', 'rowss=1'): "did you mean 'rows'?",
         (*RUN, '--set', "rows='x'"): "rows is 'x', a str: it wants a int",
         (*RUN, '--set', 'rows={[]: 1}'): 'FIELD=VALUE with a literal',
         ('run', 'evaluate', '--profile', 'smoke', '--set', 'unsafe=.5'): 'unsafe is 0.5, a float',
         ('run', 'compare-core', '--profile', 'smoke', '--set', 'lr=1.'): 'EvalConfig',
         (*RUN, '--zero', '7'): 'ZeRO has the stages', ('arms', 'bore', '--profile', 'smoke'): "no arms ['bore']"}


@pytest.mark.parametrize('argv', WRONG, ids=' '.join)
def test_what_is_misspelt_is_told_before_anything_starts(argv, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, 'run_stage', lambda *a: pytest.fail('a stage was started'))
    assert WRONG[argv] in told([*argv], capsys)


@pytest.mark.parametrize('option', ['--seed=-1', '--gpus=0', '--micro-batch=x', '--nodes=1.5'])
def test_numbers_out_of_range_are_refused_with_their_option(option, capsys):
    with pytest.raises(SystemExit) as stopped: commands.main([*RUN, option])
    assert stopped.value.code == 2 and 'is no number from' in capsys.readouterr().err


ERRORS = [(OSError(28, 'No space left on device', 'runs/a'), 'make room'),
          (PermissionError(13, 'Permission denied', 'runs'), 'SAFERLHF_RUNS'),
          (FileExistsError(17, 'File exists', 'runs/a'), 'move it away'),
          (RuntimeError('CUDA out of memory. Tried'), '--micro-batch'), (MemoryError(), '--recompute'),
          (RuntimeError('Address already in use'), 'MASTER_PORT'), (ImportError('No module named x'), 'named x'),
          (FloatingPointError('a loss is NaN'), 'a loss is NaN')]


@pytest.mark.parametrize('error, advice', ERRORS, ids=lambda x: type(x).__name__)
def test_errors_of_the_machine_say_what_helps(error, advice, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, 'draw', lambda *a: (_ for _ in ()).throw(error))
    assert advice in told(['figures', '--profile', 'smoke'], capsys)


def test_what_takes_more_than_a_line_lies_in_a_file(tmp_path, capsys, monkeypatch):
    import tempfile
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    for error in (KeyError('lr'), RuntimeError('rank 1 first: ValueError: rows\nexit status 1'), ZeroDivisionError('division by zero')):
        monkeypatch.setattr(pipeline, 'draw', lambda *a, error=error: (_ for _ in ()).throw(error))
        line = told(['figures', '--profile', 'smoke'], capsys)
        kept = Path(line.split('[all of it: ')[1].rstrip(']'))
        assert str(error).splitlines()[0] in line and str(error) in (text := kept.read_text(encoding='utf-8')) and 'Traceback' in text
    assert line.startswith('ZeroDivisionError: ')


def test_who_stops_reading_sees_no_trace():
    code = '''import sys; from saferlhf.apps import commands
def write(a):
    "Much."
    print('λ' * 10**5)
commands._COMMANDS['status'] = write, {}
sys.exit(commands.main(['status']))'''
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8',
                         env=os.environ | {'PYTHONIOENCODING': 'ascii'})
    p.stdout.close(); assert p.stderr.read() == '' and p.wait() == 141


def test_a_limit_of_time_is_kept_by_one_job_too(monkeypatch):
    asked = []
    monkeypatch.setattr(pipeline, 'campaign', lambda wanted, *how: asked.append((len(wanted), *how)))
    monkeypatch.setattr(pipeline, 'reproduce', lambda profile, seed: asked.append(seed))
    assert commands.main(['reproduce', '--profile', 'cpu', '--minutes', '7']) == 0
    assert commands.main(['reproduce', '--profile', 'cpu', '--seeds', '1', '2']) == 0
    assert asked[0][1:] == ('cpu', 1, 7.) and asked[1:] == [1, 2]


def test_the_spread_of_ranks_reaches_the_stage_alone(monkeypatch):
    seen = []
    def run(*a, **k): seen.append(json.loads(os.environ['SAFERLHF_SPREAD'] or '{}')); raise ValueError('enough')
    monkeypatch.setattr(pipeline, 'run_stage', run)
    base = ['run', 'sft', '--profile', 'cpu']
    assert commands.main([*base, '--gpus', '8', '--zero', '3', '--offload', 'model=all']) == commands.main(base) == 1
    assert seen[0].items() >= dict(gpus=8, zero=3, offload={'model': 'all'}, engine='deepspeed').items() and seen[1] == {}
    assert not os.environ['SAFERLHF_SPREAD']


MANIFESTS = {'{"form': 'is damaged', '[]': 'is damaged (a list', '{"format": 2}': "manifest.json lacks 'seed'; delete this folder",
             '{"stage": "sft"}': 'another version made it; make it again with `saferlhf run sft`'}


def test_status_says_what_is_wrong_with_a_run(home, capsys):
    assert commands.main(['status']) == 0 and f'no runs in {home/"runs"}: start with' in capsys.readouterr().out
    for k, text in enumerate(MANIFESTS):
        run = home/f'runs/sft/{k}'; run.mkdir(parents=True); (run/'manifest.json').write_text(text); (run/'config.json').write_text('{}')
    good = home/'runs/sft/9'; good.mkdir(); (good/'DONE').touch(); (good/'config.json').write_text('{}')
    (good/'manifest.json').write_text('{"format": 2, "seed": 0, "seconds": 3}')
    assert commands.main(['status']) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    for line, said in zip(lines, MANIFESTS.values(), strict=True): assert said in line
    assert last.split() == ['sft/9', 'seed', '0', 'done', '3']


@pytest.mark.parametrize('argv', [['figures', '--profile', 'paper'], ['figures', '--profile', 'cpu', '--seed', '77'], ['report', '--profile', 'paper']])
def test_without_results_the_command_that_makes_them_is_named(argv, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, 'execute', lambda *a, **k: pytest.fail('a notebook was started'))
    assert f'saferlhf reproduce --profile {argv[2]}' in told(argv, capsys)


@pytest.mark.parametrize('content, said', [(b'', 'is damaged'), (b'\xff\xfe"', 'is damaged'), (b'a,b\n1,2\n', 'it lacks the columns seed, round')])
def test_damaged_results_are_not_joined(home, capsys, content, said):
    (home/'again').mkdir(); (home/'again/rounds.csv').write_bytes(content)
    line = told(['join', str(home/'again'), '--profile', 'cpu'], capsys)
    assert str(home/'again/rounds.csv') in line and said in line


def test_nothing_to_export_is_told_without_asking_a_hub(home, capsys):
    (home/'empty').mkdir()
    for source in ('empty', 'nowhere'): assert 'holds no model (config.json)' in told(['export', str(home/source), str(home/'out')], capsys)


def test_a_page_of_the_report_folds_code_and_hides_parameters_and_warnings(home):
    from nbformat import v4

    from saferlhf.apps.report import _formulas, _page
    def code(source, *outputs, tags=()): return v4.new_code_cell(source, metadata=dict(tags=list(tags)), outputs=list(outputs))
    table = v4.new_output('display_data', {'text/markdown': '| a |\n| --- |\n| 1 |'})
    warning = v4.new_output('stream', name='stderr', text='/somewhere: a warning')
    text = v4.new_markdown_cell('# Title\n\n$\\lambda$, see [other](other.ipynb)\n\n## Part')
    cells = [text, code('seed = 0', tags=['parameters']), code('print(1)', table, warning)]
    path = home/'one.ipynb'; path.write_text(json.dumps(v4.new_notebook(cells=cells)))
    made = _page(dict(one=path, other=path), 'cpu', {'policy/x': ['models']})
    shown = '<h2 id="one">Title</h2>', 'id="one-part"', '&#x003BB;', 'href="#other"', '<td>1</td>', 'policy/x'
    for wanted in shown: assert wanted in made, wanted
    for gone in ('seed = 0', 'a warning', 'src="http', '<link'): assert gone not in made
    assert _formulas('<p>5 $</p><code>$HOME$</code>') == '<p>5 $</p><code>$HOME$</code>'


def test_results_of_two_machines(home):
    "Joining again changes nothing; a column that only one of them has is no difference."
    def machine(name, cost, *arms, **more):
        rows = [dict(seed=0, round=1, arm=arm, step=step, gold_cost=cost) | more for arm in arms for step in (0, 10)]
        publish([dict(seed=0, round=1, cost=cost, steps=40)], f'{name}/policies.csv', 'policy/1', ['round'])
        publish(rows, f'{name}/probes.csv', 'policy/1', ['arm', 'round'])
    results = home/'data/results'; results.mkdir(parents=True)
    machine('gpu', -.2, 'ppo-lag'); machine('second', -.3, 'ppo-lag', 'classifier')
    for _ in range(2): compared = join(results/'second', 'gpu')
    assert compared.query('what == "cost"')[['first', 'again']].values.tolist() == [[-.2, -.3]]
    rows = compared.query('what == "rows"')[['table', 'first', 'again']]
    assert rows.values.tolist() == [['probes', 4, 2]]                          # `classifier` joined before
    means = pd.read_csv(results/'gpu/probes.csv').groupby('arm').gold_cost.mean().to_dict()
    assert means == {'ppo-lag': -.2, 'ppo-lag-again': -.3, 'classifier': -.3}
    machine('old', -.2, 'ppo-lag'); machine('new', -.2, 'ppo-lag', refused=.1); join(results/'new', 'old')
    assert set(pd.read_csv(results/'old/probes.csv').arm) == {'ppo-lag'}
    with pytest.raises(FileNotFoundError, match='has no results'): join(results/'nowhere', 'gpu')
