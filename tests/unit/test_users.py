"What people do with the commands that nobody foresaw: it works, or one line says what to do, and nothing is left behind."
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import tiny
from test_scorers import Server

from saferlhf.apps import commands
from saferlhf.apps import judge as judging
from saferlhf.apps import limit as limiting
from saferlhf.apps import rounds as rounding
from saferlhf.apps.align import align
from saferlhf.apps.chat import Speaker, chat
from saferlhf.apps.defaults import defaults
from saferlhf.apps.judge import judge
from saferlhf.apps.limit import advised, limit, limit_lines
from saferlhf.apps.own_data import answer_rows, answers_of, cost_rows, held_out_prompt, reward_rows, split_prompts, split_rows
from saferlhf.apps.scorers import Score
from saferlhf.apps.stages import cost, reward, sft
from saferlhf.data import load_prompts, load_sft
from saferlhf.record.files import read_lines
from saferlhf.record.run import Run

GOOD = dict(beats_rule=dict(rank=True, sign=True), zero='labels')
PROMPTS = sorted({*tiny.sentences(40)})
ROWS = [dict(prompt=p) for p in PROMPTS]
SIZES = dict(steps=2, prompts=4, minibatches=1, window=8, look=1, max_new_tokens=6, max_prompt_tokens=48, test_share=.3, actor_lr=3e-3)
FAST = dict(epochs=1., lr=1e-2, batch_size=4, max_prompt_tokens=64, max_new_tokens=12)
length = Score(lambda p, a: [float(len(x)) for x in a], 'reward', 'length')
answer = lambda p, k=0: dict(prompt=p, response=f'ask your doctor {k}')
LABELS = dict(better_response_id=0, safer_response_id=0, is_response_0_safe=True, is_response_1_safe=False)
pair = lambda p, k=0, **more: dict(prompt=p, response_0=f'no never {k}', response_1=f'sure bomb {k}') | LABELS | more


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/'runs')); monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path/'cache')
    for name in ('SPREAD', 'SAVE_STEPS', 'SAVE_MINUTES', 'COMMAND'): monkeypatch.delenv(f'SAFERLHF_{name}', raising=False)
    return tmp_path


@pytest.fixture
def models(home): return tiny.own_models(GOOD)


def write(path, rows):
    path = Path(path); path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8')
    return str(path)


def prompts(name='p.jsonl'): return write(name, ROWS)
def left(stage): return sorted(p.name for p in Path(os.environ['SAFERLHF_RUNS']).glob(f'{stage}/*'))


def one_line(match, call, *args, **kw):
    with pytest.raises((ValueError, OSError), match=match) as e: call(*args, **kw)
    assert '\n' not in str(e.value) and len(str(e.value)) < 500
    return str(e.value)

# --- Ctrl-C

def interrupted(monkeypatch, capsys, argv, where, name):
    "The command while a function is at work; what it says in its last line."
    inner = getattr(where, name)
    def asked(*a, **k): os.kill(os.getpid(), signal.SIGINT); return inner(*a, **k)
    monkeypatch.setattr(where, name, asked); capsys.readouterr()
    assert commands.main(argv) == 130
    monkeypatch.setattr(where, name, inner)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith('saferlhf: stopped')
    return said


def test_ctrl_c_ends_every_command_with_130_and_names_it(models, monkeypatch, capsys):
    import saferlhf.apps.align as aligning
    import saferlhf.reproduction.training as training
    policy, helps, harms = map(str, models.values())
    for name, row in (('a.jsonl', answer), ('x.jsonl', pair)): write(name, [row(p, k) for k, p in enumerate(PROMPTS)])
    prompts()
    small = ['--max-new-tokens', '6', '--max-prompt-tokens', '48']
    learn = ['--test-share', '.3', '--epochs', '1', '--batch-size', '4', *small]
    asks = ['--prompts', 'p.jsonl', '--test-share', '.3', *small]
    steer = ['--steps', '2', '--prompts-per-step', '4', '--minibatches', '1', '--window', '8', *asks]
    for argv, where, name in (
            (['sft', '--model', policy, '--data', 'a.jsonl', *learn], training, 'sft_step'),
            (['reward', '--model', policy, '--data', 'x.jsonl', *learn], training, 'score_step'),
            (['cost', '--model', policy, '--data', 'x.jsonl', *learn], training, 'score_step'),
            (['align', '--policy', policy, '--reward', helps, '--cost', harms, *steer], aligning, 'policy_steps'),
            (['align', '--policy', policy, '--rounds', '1', '--collect', '4', *steer], rounding, 'ask'),
            (['limit', '--policy', policy, '--cost', harms, '--rows', '4', *asks], limiting, '_sampled'),
            (['judge', policy, policy, '--prompts', 'p.jsonl', '--by', harms, '--rows', '4', *small], Speaker, 'answers'),
            (['chat', policy, '--prompts', 'p.jsonl', *small], Speaker, 'answers')):
        said = interrupted(monkeypatch, capsys, argv, where, name)
        if argv[0] != 'chat': assert f'saferlhf {argv[0]} {argv[1]}' in said and argv[-1] in said, said


def test_sigterm_is_no_ctrl_c(models, monkeypatch, capsys):
    import saferlhf.reproduction.training as training
    write('a.jsonl', [answer(p, k) for k, p in enumerate(PROMPTS)])
    inner = training.sft_step
    monkeypatch.setattr(training, 'sft_step', lambda *a: os.kill(os.getpid(), signal.SIGTERM) or inner(*a))
    argv = ['sft', '--model', str(models['policy']), '--data', 'a.jsonl', '--test-share', '.3', '--max-prompt-tokens', '48']
    assert commands.main(argv) == 143 and 'is saved; to go on' in capsys.readouterr().err

# --- files

@pytest.mark.parametrize('mark', [';', '\t', '|', ','])
def test_a_csv_of_any_separator(home, mark):
    rows = [('prompt', 'response'), ('a, b; c', 'no, never'), ('d', '"quoted; e"')]
    import csv
    with open('a.csv', 'w', newline='') as f: csv.writer(f, delimiter=mark).writerows(rows)
    for name in ('a.csv', 'a.tsv'):
        Path(name).write_bytes(Path('a.csv').read_bytes())
        assert [tuple(r[k] for k in ('prompt', 'response')) for r in load_sft(name, 'raise')] == rows[1:]


def test_prompts_a_line_each_are_read_by_every_command(models, capsys):
    Path('p.txt').write_text('\ufeff' + '\r\n'.join(PROMPTS) + '\n\n', encoding='utf-8')
    assert load_prompts('p.txt')['prompt'][:] == PROMPTS and split_prompts('p.txt', .3, 0) == split_prompts(prompts(), .3, 0)
    run = align(*models.values(), 'p.txt', 0., SIZES)
    assert 'p.txt' in run.manifest['data']
    assert limit(models['policy'], models['cost'], 'p.txt', settings=dict(test_share=.3, samples=2)).done
    Path('none.txt').write_text('\n'); one_line('none.txt: it holds no prompt', load_prompts, 'none.txt')


def test_what_chosen_means_is_said_in_the_users_word(caplog):
    rows = [dict(prompt=p, chosen='no never', rejected='sure bomb') for p in PROMPTS]
    for word, call, means in (('overall', reward_rows, 'one preference for everything'), ('better', reward_rows, 'more helpful'),
                              ('safer', cost_rows, 'less harmful')):
        caplog.clear(); call(rows, 0, .3, word)
        assert f"chosen is taken to mean '{word}' ({means})" in caplog.text and caplog.text.count('taken to mean') == 1
    native = [pair(p) for p in PROMPTS]
    one_line("chosen_is='overall' does nothing", reward_rows, native, 0, .3, 'overall')


def test_a_file_for_another_command_is_called_what_it_is(home):
    chosen, pairs = [dict(prompt=p, chosen='no never', rejected='sure bomb') for p in PROMPTS], [pair(p) for p in PROMPTS]
    for rows in (chosen, pairs):
        write('a.jsonl', rows)
        said = one_line('a.jsonl holds preferences, two answers to a prompt: `saferlhf reward` and', answer_rows, 'a.jsonl', 0, .3)
        assert 'columns prompt and response' in said
        one_line('ptx=a.jsonl holds preferences', answers_of, 'a.jsonl', 'ptx=a.jsonl')
    for call in (reward_rows, cost_rows):
        one_line('a.jsonl holds answers: `saferlhf sft` learns from them', call, write('a.jsonl', map(answer, PROMPTS)), 0, .3)
        one_line('p.jsonl holds prompts alone: `saferlhf align` asks them', call, prompts(), 0, .3)
    ranked = [pair(p, is_response_0_safe=None, is_response_1_safe=None) for p in PROMPTS]
    one_line('zero=a.jsonl holds preferences', cost_rows, ranked, 0, .3, zero=write('a.jsonl', pairs))
    both = [dict(prompt=p, chosen='x', rejected='y', response='fine') for p in PROMPTS]
    assert len(answers_of(both, 'rows')) == len(PROMPTS)


@pytest.mark.parametrize('n', [2, 5, 9])
@pytest.mark.parametrize('share', [1e-9, .999999])
def test_few_rows_name_a_share_that_works(n, share):
    import re
    rows = [answer(f'{p} ?', k) for k, p in enumerate(PROMPTS[:n])]
    said = one_line(f'{n} prompts leave none to', split_rows, rows, 0, share)
    assert all(split_rows(rows, 0, float(re.search('set test_share=([0-9.]+)', said)[1])))
    one_line('bring two different prompts or more', split_rows, rows[:1], 0, share)


def test_five_rows_are_enough(models, capsys):
    five = PROMPTS[:5]
    share = next(s / 10 for s in range(1, 10) if 0 < sum(held_out_prompt(p, 0, s / 10) for p in five) < 5)
    told, small = dict(test_share=share), dict(max_new_tokens=6, max_prompt_tokens=48)
    start = sft(models['policy'], [answer(p, k) for k, p in enumerate(five)], told | small)
    rows = [pair(p, k) for k, p in enumerate(five)]
    helps, harms = reward(start, rows, told | small), cost(start, rows, told | small)
    assert align(start, helps, harms, [dict(prompt=p) for p in five], 0., told | small | dict(steps=1, force=True)).done
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    n = len(read_lines(start.path('data/train.jsonl')))
    assert [line[1] for line in shown if line[:1] in (['rows'], ['pairs'])] == [str(n)] * 3      # that there are


def test_a_test_file_beside_the_training_file_is_held_out(home, caplog):
    for folder, row in (('a', answer), ('x', pair), ('p', lambda p, k: dict(prompt=p))):
        for name, part in (('train', PROMPTS[:20]), ('test', [PROMPTS[3].upper(), *PROMPTS[20:24]]), ('dev', PROMPTS[30:32])):
            write(f'{folder}/{name}.jsonl', [row(p, k) for k, p in enumerate(part)])
    for read in (answer_rows('a', 0, .3), reward_rows('x', 0, .3), cost_rows('x', 0, .3)):
        assert {r['prompt'].lower() for r in read.test} == {PROMPTS[3], *PROMPTS[20:24]} and 'as its test split says' in read.said[0]
        assert {r['prompt'] for r in read.train} == {*PROMPTS[:20]} - {PROMPTS[3]}
    assert sorted(split_prompts('p', .3, 0)[0]) == sorted({*PROMPTS[:20]} - {PROMPTS[3]})
    assert 'of other splits: dev.jsonl, test.jsonl' in caplog.text
    parts = dict(train=PROMPTS[:9], test=PROMPTS[9:12])
    both = datasets.DatasetDict({k: datasets.Dataset.from_list([answer(p) for p in part]) for k, part in parts.items()})
    both.save_to_disk('saved')
    for source in ('saved', both): assert {r['prompt'] for r in answer_rows(source, 0, .3).test} == {*PROMPTS[9:12]}
    write('p/test.jsonl', [dict(prompt=p) for p in PROMPTS[:20]])
    one_line('p: by its test split, 20 prompts leave none to train on', split_prompts, 'p', .3, 0)


def test_other_splits_of_a_hub_are_named(home, monkeypatch, caplog):
    table = datasets.Dataset.from_list([answer(p) for p in PROMPTS])
    table.info.splits = dict(train=1, test=1, extra=1)
    monkeypatch.setattr('saferlhf.hardware.rows.load_dataset', lambda name, **how: table)
    assert len(load_sft('owner/name')) == len(PROMPTS) and 'owner/name: read split train; other splits: test, extra' in caplog.text
    caplog.clear(); load_sft(dict(train=table, validation=table)); assert 'other splits: validation' in caplog.text

# --- what is refused leaves nothing

def test_a_refusal_leaves_no_folder(models, monkeypatch):
    rows, all_rows = [answer(p, k) for k, p in enumerate(PROMPTS)], ROWS
    flat = lambda p, a: [1.] * len(a)
    one_line('leaves no room for the template', sft, models['policy'], rows, dict(test_share=.3, max_prompt_tokens=3))
    one_line('is a score model, not a language model', sft, models['cost'], rows, dict(test_share=.3))
    one_line('leaves no room for the template', align, *models.values(), all_rows, 0., SIZES | dict(max_prompt_tokens=3))
    one_line('the same number', align, models['policy'], flat, models['cost'], all_rows, 0., SIZES)
    one_line('name a cost model', limit, models['policy'], models['reward'], all_rows)
    one_line('holds a language model: name a cost model', limit, models['policy'], models['policy']/'model', all_rows)
    broken = Score(lambda p, a: [float('nan')] * len(a), 'reward', 'broken')
    one_line('broken gives nan', judge, models['policy'], models['policy'], PROMPTS[:3], broken)
    assert [len(left(k)) for k in ('sft', 'policy', 'limit', 'judged')] == [1, 0, 0, 0]


@pytest.mark.parametrize('wrong, said', [(dict(scores=dict(epochs=0.)), 'epochs=0.0: it is'), (dict(prompts=400), 'set prompts='),
                                         (dict(minibatches=5), 'set fewer'), (dict(ptx='p.jsonl'), 'ptx=p.jsonl holds prompts alone'),
                                         (dict(scores=dict(rate=1.)), "no setting 'rate'"), (dict(limit=float('inf')), 'limit=inf')])
def test_rounds_are_refused_before_anybody_answers(models, wrong, said):
    told, limit_ = SIZES | wrong, wrong.get('limit', 0.); told.pop('limit', None); prompts()
    both = lambda p, a: ([0.] * len(a), [0.] * len(a))
    one_line(said, rounding.rounds, models['policy'], both, ROWS, 1, limit_, told)
    assert not left('collect')


def test_what_was_kept_stays(home):
    for name, stays in (('metrics.jsonl', True), ('data', False)):
        with pytest.raises(ValueError, match='late'), Run.start('sft', {}, name=name.split('.')[0]) as run:
            (run.folder/name).touch() if stays else (run.folder/name).mkdir()
            raise ValueError('late')
        assert run.folder.exists() == stays
    with pytest.raises(SystemExit), Run.start('sft', {}, name='asked') as run: raise SystemExit('stopped by SIGINT')
    assert run.folder.exists()

# --- numbers of functions

@pytest.mark.parametrize('number', [1e300, float('nan'), float('inf'), -1e38])
def test_a_number_that_training_cannot_hold_names_function_and_prompt(models, number):
    def mine(prompts, answers): return [number if p == PROMPTS[1] else float(len(a)) for p, a in zip(prompts, answers, strict=True)]
    said = one_line('gives', Score(mine, 'reward', 'mine'), PROMPTS[:3], ['a', 'bb', 'c'])
    assert said.startswith(f'mine gives {number}') and repr(PROMPTS[1][:80]) in said and 'finite numbers of at most 1e30' in said
    one_line('must give numbers', Score(lambda p, a: [10**400], 'reward', 'huge'), ['p'], ['a'])


def test_a_server_is_paid_only_after_a_yes(models, monkeypatch, capsys):
    monkeypatch.setattr('saferlhf.apps.chat.load', lambda *a, **k: pytest.fail('a model was loaded'))
    more = ['--prompts', prompts(), '--tokens', '50', '--key', 'NONE', '--scale', 'yes-no', '--seed', '1']
    with Server('5') as s:
        said = one_line('6 calls and 96 tokens to write.*agree to them', judge, models['policy'], models['policy'], PROMPTS[:3], s.address)
        assert 'yes=True' in said and not left('answers') and not s.asked
        for argv in (['judge', *[str(models['policy'])] * 2, '--by', s.address], ['chat', str(models['policy']), '--cost', s.address]):
            assert commands.main([*argv, *more]) == 1
            assert '--yes' in (err := capsys.readouterr().err) and 'calls and' in err


def test_chat_and_judge_have_the_options_of_judges(capsys):
    chats, judges = (commands._options(k) for k in ('chat', 'judge'))
    for k in 'yes tokens key scale labels temperature seed max-new-tokens max-prompt-tokens'.split():
        assert f'--{k}' in chats and f'--{k}' in judges, k

# --- fair comparisons

def test_two_policies_are_asked_what_neither_was_trained_on_within_one_budget(models, capsys):
    tok, seen = tiny.tokenizer(), PROMPTS[:4]
    first = tiny.finished('sft', tiny.lm(vocab=len(tok)), rows=[answer(p) for p in seen], name='first')
    def trained(budget, parents, rows, name):
        run = Run.start('policy', dict(max_new_tokens=budget), parents, name=name)
        tiny.lm(vocab=len(tok), seed=3).save_pretrained(run.path('model')); tok.save_pretrained(run.path('model')); run.path('data').mkdir()
        write(run.path('data/train.jsonl'), [dict(prompt=p) for p in rows]); run.finish({})
        return run.folder
    a = trained(9, dict(sft=first, reward=models['reward']), PROMPTS[4:6], 'a')
    record = judge(a, models['policy'], PROMPTS[:10], length, dict(max_prompt_tokens=48))
    out = capsys.readouterr().out
    assert '6 of 10 prompts are left out' in out and '4 prompts for both: ' in out and '9 of an answer' in out
    assert {r['prompt'] for r in read_lines(record.path('judged.jsonl'))} == {*PROMPTS[6:10]}
    one_line('trained on all 6 prompts: bring others, or force=True', judge, a, models['policy'], PROMPTS[:6], length)
    assert judge(a, models['policy'], PROMPTS[:6], length, dict(force=True, max_prompt_tokens=48)).summary['n'] == 6
    told = [json.loads((Path(f)/'config.json').read_text())['max_new_tokens'] for f in record.manifest['parent_folders'].values()]
    assert told == [9, 9]
    write('q.jsonl', [dict(prompt=p) for p in seen])
    argv = ['judge', str(a), str(models['policy']), '--prompts', 'q.jsonl', '--by', str(models['cost'])]
    assert commands.main(argv) == 1 and '--force asks them all the same' in capsys.readouterr().err
    chat(a, models['policy'], prompts_file='q.jsonl', json=True); assert 'and 9 of an answer' in capsys.readouterr().err
    share = dict(test_share=.5, samples=2, max_new_tokens=6, max_prompt_tokens=48)
    held = [p for p in PROMPTS[:10] if held_out_prompt(p, 0, .5)]; known = [p for p in held if p in PROMPTS[:6]]
    assert known and len(known) < len(held)
    run = limit(a, models['cost'], [dict(prompt=p) for p in PROMPTS[:10]], settings=share)
    assert run.summary['prompts'] == len(held) - len(known) and f'{len(known)} held-out prompts are left out' in capsys.readouterr().out
    one_line('was trained on all', limit, a, models['cost'], [dict(prompt=p) for p in PROMPTS[:6]], settings=share)


def test_a_limit_that_is_kept_already_is_not_advised(capsys):
    from saferlhf.apps.own_commands import following
    a = SimpleNamespace(policy='p', reward='r', cost='c', prompts='x')
    def asked(mean, **choices):
        rows = [dict(limit=0., none=[0., 0., 0.])]
        found = dict(cost=[mean], choices=choices, relative=False, samples=4, limits=rows, prompts=3, harm_from='x')
        run = SimpleNamespace(summary=found, folder=Path('l'), manifest={})
        return advised(found), following('limit', a, run)[0], limit_lines(found)[-1]
    value, line, said = asked(.4, half=-.1, paper=0., least=-.8)
    assert value == 0. and line.endswith('--limit 0.00') and 'binds below the mean cost, +0.40' in said
    value, line, said = asked(-.4, paper=0., least=-.8)
    assert value == pytest.approx(-.6) and line.endswith('--limit -0.60')
    assert 'binds below the mean cost, -0.40; these answers reach -0.80' in said
    value, line, said = asked(-.4, paper=0., least=-.4)
    assert value is None and line == 'saferlhf limit --policy p --reward r --cost c --prompts x --samples 16' and 'no limit' in said

# --- alarms

def test_held_out_prompts_that_are_not_new_are_said(models, capsys):
    start = tiny.finished('sft', tiny.lm(vocab=len(tiny.tokenizer())), rows=[answer(p) for p in PROMPTS], name='all')
    n = len(split_prompts(ROWS, .3, 0)[1])
    align(*(models | dict(policy=start)).values(), ROWS, 0., SIZES)
    assert f'{n} of {n} held-out prompts are not new: {start.parent.name}/{start.name} was trained on them' in capsys.readouterr().out
    align(*models.values(), ROWS, 0., SIZES); assert 'not new' not in capsys.readouterr().out


def test_alarms_are_said_once(models, monkeypatch, capsys):
    from saferlhf.apps import align as module
    monkeypatch.setenv('SAFERLHF_SAVE_STEPS', '1')
    ppo = module.policy_steps
    def dies(*a):
        step, kept = ppo(*a)
        return lambda i: 1 / (i != 1) and step(i), kept
    go = lambda: align(*models.values(), ROWS, 50., SIZES)
    monkeypatch.setattr(module, 'policy_steps', dies)
    with pytest.raises(ZeroDivisionError): go()
    monkeypatch.setattr(module, 'policy_steps', ppo)
    record = go()
    out, err = capsys.readouterr()
    first = [a for a in record.manifest['alarms'] if a['step'] < 0]
    assert first and 'step -1' not in out + err and 'rang ' not in out
    for x in first: assert (out + err).count(x['text']) == err.count(f'alarm before the first step: {x["alarm"]}: ') == 1
    assert 'held-out prompts before the first step: ' in out + err and 'is within the limit, 50.00: it binds only where' in out
    go(); assert f'rang before the first step: {first[0]["alarm"]}: ' in capsys.readouterr().out      # read back: not said here yet


# --- what somebody met who had read the README alone
def test_ids_that_count_from_one_are_refused(home):
    rows = [pair(p, k) | dict(better_response_id=1 + k % 2) for k, p in enumerate(PROMPTS[:20])]
    for stage in (reward_rows, cost_rows): one_line('better_response_id counts answers from 1: response_0 is 0', stage, rows, 0, .2)
    wide = pd.DataFrame(rows).astype(dict(better_response_id=float))                # as pandas reads a column with gaps
    one_line('counts answers from 1', reward_rows, wide, 0, .2)
    assert reward_rows([r | dict(better_response_id=r['better_response_id'] - 1) for r in rows], 0, .2).train


def test_the_same_answer_twice_is_a_tie():
    noise = iter([1e-7, -1e-7])
    for kind, gaps in (('cost', lambda *a: np.array([next(noise) for _ in a[0]])), ('better', lambda *a: np.ones(len(a[0])))):
        found = judging._verdicts(SimpleNamespace(kind=kind, name='x', gaps=gaps), ['p'], ['same'], ['same'], 0)
        assert found.wins.tolist() == [0.], kind
    long = SimpleNamespace(kind='cost', name='x', gaps=lambda p, t: np.array([float(len(x)) for x in t]))
    found = judging._verdicts(long, ['p'], ['ab'], ['a'], 0)
    assert found.wins.tolist() == [-1.]


def test_judge_refuses_a_score_model_before_anybody_answers(models, monkeypatch):
    monkeypatch.setattr(judging, '_answers', lambda *a: pytest.fail('somebody answered'))
    one_line('is a reward model: name two that answer', judge, models['policy'], models['reward'], prompts(), 'cost=' + str(models['cost']))


def test_a_folder_of_runs_is_no_model(models):
    one_line('is no folder of a model .it has no config.json.: name a run', chat, models['policy'].parent, None, None, None, prompts())


def test_few_held_out_prompts_are_said(capsys):
    split_prompts(ROWS[:30], .1, 0)
    assert 'prompts are held out: what is measured on them says little' in capsys.readouterr().out
    split_prompts([dict(prompt=f'{p} {k}') for p in PROMPTS for k in range(8)], .1, 0)
    assert 'says little' not in capsys.readouterr().out


def test_layers_that_the_model_has_not_leave_no_folder(models):
    before = left('*')
    rows = [answer(p) for p in PROMPTS]
    one_line("no layer is named 'q_prj'", sft, models['policy'], rows, FAST | dict(lora_rank=2, lora_targets='q_prj'))
    one_line('this model has 2 layers', align, *models.values(), ROWS, 0., SIZES | dict(lora_rank=2, lora_first=2))
    assert left('*') == before


def test_adapters_start_with_larger_rates():
    shape, tokens = tiny.lm().config, ([9] * 40, [9] * 40)
    for command, fields in (('sft', ['lr']), ('align', ['actor_lr', 'critic_lr'])):
        whole, adapted = (defaults(command, shape, 400, tokens, rank=r) for r in (0, 8))
        for k in fields: assert adapted[k].value == 10 * whole[k].value and adapted[k].source == 'guess'
