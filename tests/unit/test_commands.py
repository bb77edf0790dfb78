"The command line: pages of help, options that are refused, errors in one line; and results of two machines."
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from saferlhf.apps import commands, own_commands
from saferlhf.record.execute import publish
from saferlhf.reproduction import pipeline
from saferlhf.reproduction.results import join


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/'runs')); monkeypatch.setenv('SAFERLHF_HOME', str(tmp_path))
    return tmp_path


def test_help_imports_nothing_heavy():
    code = '''import sys, time
from saferlhf.apps.commands import main
try: main(['--help'])
except SystemExit:
    heavy = {'torch', 'pandas', 'numpy', 'transformers'}
    print(time.process_time(), sorted({m.split('.')[0] for m in sys.modules} & heavy))'''
    shown = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.splitlines()
    seconds, heavy = shown[-1].split(' ', 1)
    assert heavy == '[]' and float(seconds) < .5
    listed = [line.split()[0] for line in shown if line.startswith('    ') and not line.startswith('     ')]
    assert listed == [name for names in commands._GROUPS.values() for name in names]
    assert sorted(listed) == sorted([*commands._COMMANDS, *own_commands.OWN]) and listed[:7] == [*own_commands.OWN]
    assert [line.rstrip(':') for line in shown if line.rstrip(':') in commands._GROUPS] == [*commands._GROUPS]


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


def page(name, capsys):
    with pytest.raises(SystemExit) as stopped: commands.main([name, '--help'])
    assert stopped.value.code == 0
    return ' '.join(capsys.readouterr().out.split())


@pytest.mark.parametrize('name', ['sft', 'reward', 'cost', 'align', 'limit'])
def test_every_field_is_an_option_once_with_its_default_and_where_it_comes_from(name, capsys):
    from saferlhf.apps.limit import LimitSettings
    from saferlhf.apps.settings import settable
    shown, fields = page(name, capsys), [*LimitSettings.__dataclass_fields__] if name == 'limit' else [*settable(name)]
    options = commands._options(name)
    assert [how['dest'] for how in options.values() if how.get('dest', '').startswith('field_')] == [f'field_{k}' for k in fields]
    shown = shown[shown.index(' options: '):]
    for option, how in options.items():
        value = f'{how["metavar"]} ' if 'metavar' in how and option != '--offload' else ''
        assert shown.count(f' {option} {value}') == 1, option
        if how.get('dest', '').startswith('field_'): assert ' (default: ' in how['help'], option
    if name != 'limit': assert '(measured' in shown and 'at 7B (paper)' in shown and '--gpus' in shown and '--push-to-hub NAME' in shown
    if name == 'align': assert '--actor-lr N peak rate' in shown and '4e-05 at 135M' in shown and '--max-kl NATS' in shown


@dataclass(frozen=True)
class Asked:
    rows:int = 256 # prompts


def stub(monkeypatch, name, **functions): monkeypatch.setitem(sys.modules, f'saferlhf.apps.{name}', SimpleNamespace(**functions))


def test_options_become_settings_and_the_command_is_told_to_go_on(monkeypatch, capsys):
    seen = []
    def cost(*a): seen.append((*a, os.environ['SAFERLHF_COMMAND'])); raise ValueError('enough')
    stub(monkeypatch, 'stages', cost=cost)
    argv = ['cost', '--model', 'm', '--data', 'my data.jsonl', '--max_new_tokens=48', '--lr', '1e-4', '--zero-labels', 'z_1.jsonl',
            '--labels', 'rank']
    assert told(argv, capsys) == 'enough'
    *given, command = seen[0]
    assert given == ['m', 'my data.jsonl', dict(max_new_tokens=48, lr=1e-4, labels='rank', zero='z_1.jsonl')]
    assert shlex.split(command) == ['saferlhf', *argv[:5], '--max-new-tokens=48', *argv[6:]] and 'SAFERLHF_COMMAND' not in os.environ
    monkeypatch.setenv('SAFERLHF_COMMAND', 'mine'); told(argv, capsys); assert os.environ['SAFERLHF_COMMAND'] == 'mine'


def test_align_has_a_file_of_prompts_and_prompts_per_step_and_one_micro_batch(monkeypatch, capsys):
    seen = []
    def align(*a): seen.append((a, json.loads(os.environ['SAFERLHF_SPREAD'] or '{}'))); raise ValueError('enough')
    stub(monkeypatch, 'align', align=align)
    base = ['align', '--policy', 'p', '--reward', 'r', '--prompts', 'x.jsonl', '--limit', '-0.5', '--relative', '--gpus', '2']
    assert told([*base, '--prompts-per-step', '64', '--micro-batch', '8'], capsys) == 'enough'
    assert seen[0][0] == ('p', 'r', None, 'x.jsonl', -.5, dict(prompts=64, micro_batch=8, relative=True))
    assert seen[0][1]['gpus'] == 2 and not seen[0][1].get('micro_batch')


def test_chat_and_judge_pass_on_what_they_were_told(monkeypatch, capsys):
    seen = []
    stub(monkeypatch, 'chat', chat=lambda *a: seen.append(a))
    stub(monkeypatch, 'judge', judge=lambda *a: seen.append(a), AnswerSettings=Asked)
    assert commands.main(['chat', 'p', '--beside', 's', '--json', '--temperature', '.7']) == 0
    base = ['judge', 'a', 'b', '--prompts', 'x.jsonl', '--by', 'runs/cost/c', 'my.rule']
    assert commands.main([*base, '--rows', '9', '--labels', 'unsafe=1', 'a=b=-1', '--yes']) == commands.main(base) == 0
    assert seen[0] == ('p', 's', None, None, '', True, dict(temperature=.7), {})
    assert seen[1] == ('a', 'b', 'x.jsonl', ['runs/cost/c', 'my.rule'], dict(rows=9), dict(yes=True, labels={'unsafe': 1, 'a=b': -1}), '')
    assert seen[2][4:] == ({}, {}, '')
    assert 'WORD=1' in told([*base, '--labels', 'unsafe'], capsys)


WRONG_VALUES = [(['--steps', 'many'], "'many' is no whole number"), (['--lr', 'nan'], "'nan' is no number"), (['--force'], '--force'),
                (['--epochs', 'inf'], "'inf' is no number"), (['--learning-rate', '1'], '--learning-rate')]


@pytest.mark.parametrize('wrong, said', WRONG_VALUES)
def test_wrong_values_of_fields_are_refused_with_their_option(wrong, said, capsys):
    command = ['sft', '--model', 'm', '--data', 'd']
    if wrong[0] == '--steps': command = ['align', '--policy', 'p', '--reward', 'r', '--prompts', 'x']
    with pytest.raises(SystemExit) as stopped: commands.main([*command, *wrong])
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def finished(stage, parents=(), **summary):
    from saferlhf.record.run import Run
    run = Run.start(stage, dict(n=len(parents)), dict(parents), name='mine'); run.finish(summary)
    return Run.open(run.folder)


def test_each_command_names_the_next_one(home, monkeypatch, capsys):
    monkeypatch.chdir(home); stub(monkeypatch, 'judge', AnswerSettings=Asked)
    start = finished('base_lm'); sft = finished('sft', dict(base=start.folder))
    short = lambda run: str(run.folder.relative_to(home))
    def after(command, run, **a):
        capsys.readouterr(); own_commands._end(command, SimpleNamespace(push_to_hub='', **a), run)
        title, *lines = capsys.readouterr().out.splitlines()
        assert title == 'next:'
        for line in lines:                                                     # what is said can be typed
            argv = shlex.split(line)[1:]; assert commands._parser(argv[0]).parse_args(argv).command == argv[0]
        return [line.strip().removeprefix('saferlhf ') for line in lines]
    here = short(sft)
    assert after('sft', sft) == [f'{k} --model {here} --data preferences.jsonl' for k in ('reward', 'cost')]
    reward = finished('reward', dict(base=sft.folder))
    assert after('reward', reward, data='p q.jsonl') == [f"cost --model {here} --data 'p q.jsonl'"]
    assert after('reward', reward, data='x', field_chosen_is='overall') == [f'cost --model {here} --data LABELS.jsonl']
    cost = finished('cost', dict(base=sft.folder)); finished('cost', dict(base=start.folder))      # of another start
    both = f'--policy {here} --reward {short(reward)} --cost {short(cost)} --prompts prompts.jsonl'
    assert after('cost', cost, data='x') == [f'limit {both}', f'align {both} --limit 0'] == after('reward', reward, data='x')
    finished('cost', dict(base=sft.folder, reward=reward.folder), zero='none')                # without a zero a limit is relative
    assert after('reward', reward, data='x')[1].endswith(' --limit -0.5 --relative')
    choices = {'paper': -.6, 'half': -.437, 'safest': -.5}
    limit = finished('limit', dict(policy=sft.folder), choices=choices, relative=False, cost=[.2], samples=8)
    given = dict(policy='p', reward='', cost='c', prompts='x')
    assert after('limit', limit, **given) == ['align --policy p --reward REWARD --cost c --prompts x --limit -0.44']
    policy = finished('policy', dict(sft=sft.folder))
    assert after('align', policy, reward='r', cost='c', prompts='x') == [f'chat {short(policy)} --beside {here}',
                                                                       f'judge {short(policy)} {here} --prompts x --by c']


def test_a_model_is_pushed_to_a_private_place_or_nothing_is_lost(monkeypatch, capsys):
    import huggingface_hub
    seen = []
    class Api:
        def create_repo(self, name, **how): seen.append((name, how)); return SimpleNamespace(repo_id=name)
        def upload_folder(self, **how): seen.append(how)
    run = finished('sft'); monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    own_commands._end('sft', SimpleNamespace(push_to_hub='me/mine'), run)
    assert seen[0] == ('me/mine', dict(private=True, exist_ok=True))
    assert seen[1]['folder_path'] == run.folder/'model' and seen[1]['repo_id'] == 'me/mine'
    def refuse(self, *b, **c): raise OSError('401 Client Error\nlong story')
    monkeypatch.setattr(Api, 'create_repo', refuse); stub(monkeypatch, 'stages', sft=lambda *b: run); capsys.readouterr()
    assert commands.main(['sft', '--model', 'm', '--data', 'd', '--push-to-hub', 'me/mine']) == 1
    out, err = capsys.readouterr()
    assert 'next:' in out and len(err.splitlines()) == 1 and 'hf auth login' in err
    assert err.startswith('saferlhf: not pushed to me/mine: 401 Client Error; the model lies in ')
    assert commands.main(['sft', '--model', 'm', '--data', 'd']) == 0 and len(seen) == 2                       # only when asked for


def test_a_full_memory_names_the_settings_that_help_by_how_much(monkeypatch, capsys):
    from saferlhf.apps.defaults import defaults
    from saferlhf.apps.settings import settings_of
    from saferlhf.record.run import Run
    shape = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
    base = Run.start('base_lm', {}, name='mine'); (base.folder/'model').mkdir()
    (base.folder/'model/config.json').write_text(json.dumps(shape)); base.finish({})
    found = defaults('cost', shape, 9999, ([90] * 9, [90] * 9), 80., True)
    config = settings_of('cost', dict(kind='cost'), {k: d.value for k, d in found.items()})
    def cost(*a):
        run = Run.start('cost', config, dict(base=base.folder), name='mine')
        raise RuntimeError(f'CUDA out of memory. Tried to allocate 2 GiB for {run.id}')
    argv = ['cost', '--model', 'm', '--data', 'd']
    stub(monkeypatch, 'stages', cost=cost)
    assert commands.main(argv) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith('saferlhf: CUDA')
    for part in ('micro_batch=8 instead of 32 needs ', 'recompute needs ', ' GB; as it was, about '): assert part in line, line
    stub(monkeypatch, 'stages', cost=lambda *a: (_ for _ in ()).throw(RuntimeError('CUDA out of memory. Tried')))
    assert '--recompute' in told(argv, capsys)                                 # of a run that is not here: in general


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


def test_a_folder_that_was_deleted_is_told(tmp_path, capsys, monkeypatch):
    (tmp_path/'gone').mkdir(); monkeypatch.chdir(tmp_path/'gone'); (tmp_path/'gone').rmdir()
    assert commands.main(['status']) == 1 and 'the folder that you are in was deleted' in capsys.readouterr().err


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


MANIFESTS = {'{"form': 'is damaged', '[]': 'is damaged (a list', '{"format": 3}': "manifest.json lacks 'seed'; delete this folder",
             '{"stage": "sft"}': 'another version made it; make it again with `saferlhf run sft`'}


def test_status_says_what_is_wrong_with_a_run(home, capsys):
    assert commands.main(['status']) == 0 and f'no runs in {home/"runs"}: start with' in capsys.readouterr().out
    for k, text in enumerate(MANIFESTS):
        run = home/f'runs/sft/{k}'; run.mkdir(parents=True); (run/'manifest.json').write_text(text); (run/'config.json').write_text('{}')
    good = home/'runs/sft/9'; good.mkdir(); (good/'DONE').touch(); (good/'config.json').write_text('{}')
    (good/'manifest.json').write_text('{"format": 3, "seed": 0, "seconds": 3}')
    assert commands.main(['status']) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    for line, said in zip(lines, MANIFESTS.values(), strict=True): assert said in line
    assert last.split() == ['sft/9', 'seed', '0', 'done', '3']


@pytest.mark.parametrize('argv', [['figures', '--profile', 'paper'],
                                  ['figures', '--profile', 'cpu', '--seed', '77'], ['report', '--profile', 'paper']])
def test_without_results_the_command_that_makes_them_is_named(argv, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, 'execute', lambda *a, **k: pytest.fail('a notebook was started'))
    assert f'saferlhf reproduce --profile {argv[2]}' in told(argv, capsys)


@pytest.mark.parametrize('content, said', [(b'', 'is damaged'), (b'\xff\xfe"', 'is damaged'),
                                           (b'a,b\n1,2\n', 'it lacks the columns seed, round'),
                                           (b'seed,round,kind,what,run_id\n0,1,a,b,sft/1-a\n0,1,a,b,sft/1-b\n',
                                            "'0 1 a b' stands there twice, of two runs")])
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
