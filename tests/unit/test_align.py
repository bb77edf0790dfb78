"A policy aligned on prompts of one's own: what is refused, what the limit counts from, and a run that was killed is one that was not."
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import close, finished, lm, own_models, scorer, sentences, tokenizer

from saferlhf.apps import align as module
from saferlhf.apps.align import align
from saferlhf.apps.settings import AlignSettings
from saferlhf.data import sha256
from saferlhf.models import load_lm
from saferlhf.record.files import read_json, read_lines
from saferlhf.record.resume import Interrupted

SIZES = dict(steps=4, prompts=4, minibatches=1, window=8, look=2, max_new_tokens=6, max_prompt_tokens=48, test_share=.3, actor_lr=3e-3)
PROMPTS = [dict(prompt=p) for p in sorted(set(sentences(40)))]
GOOD = dict(beats_rule=dict(rank=True, sign=True), zero='labels')


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/'runs'))
    for name in ('SPREAD', 'SAVE_STEPS', 'SAVE_MINUTES', 'COMMAND'): monkeypatch.delenv(f'SAFERLHF_{name}', raising=False)


@pytest.fixture
def models(home): return own_models(GOOD)


def go(models, limit=0., source=PROMPTS, **settings):
    return align(*models.values(), source, limit, SIZES | settings)


def result(record): # all that a run computed
    rows = {n: [{k: v for k, v in r.items() if k != 'seconds'} for r in read_lines(record.path(f'{n}.jsonl'))]
            for n in ('metrics', 'samples', 'looks', 'alarms')}
    return rows, record.summary, load_lm(record.path('model')).state_dict()


def same(a, b): return a[:2] == b[:2] and all(torch.equal(v, b[2][k]) for k, v in a[2].items())


# --- a whole run
def test_what_a_run_leaves(models, capsys):
    record = go(models)
    rows, summary, weights = result(record)
    train, test = ([r['prompt'] for r in read_lines(record.path(f'data/{n}.jsonl'))] for n in ('train', 'test'))
    assert sorted(train + test) == [r['prompt'] for r in PROMPTS] and not set(train) & set(test)
    assert [x['step'] for x in rows['looks']] == [-1, 1, 3] and len(rows['metrics']) == 4
    assert {r['step'] for r in rows['samples']} == {-1, 1, 3} and [r['prompt'] for r in rows['samples'][:len(test)]] == test
    assert abs(rows['looks'][0]['kl']) < 1e-4 < rows['looks'][-1]['kl']
    start, now = ([r for r in rows['samples'] if r['step'] == s] for s in (-1, 3))
    for name in ('reward', 'cost', 'length'):
        a, b = (np.mean([r[name] for r in x]) for x in (start, now))
        close([summary[f'{name}_start'][0], summary[name][0], summary[f'{name}_change'][0]], [a, b, b - a])
        for value, low, high in (summary[name], summary[f'{name}_change']): assert low <= value <= high
    assert summary['limit'] == 0 and summary['lam'] == rows['metrics'][-1]['lam'] and summary['steps'] == 4
    assert not all(torch.equal(v, load_lm(models['policy']/'model').state_dict()[k]) for k, v in weights.items())
    out, card = capsys.readouterr().out, record.path('model/README.md').read_text(encoding='utf-8')
    assert 'harmful share' in out and ' before: ' in out and '2 PTX rows' in out and '| cost_change |' in card
    assert not record.path('kept').exists() and record.done
    cut = np.mean([r['truncated'] for r in start]); assert cut > .5
    assert [a['text'] for a in rows['alarms'] if a['alarm'] == 'cut'][0].startswith(f'{cut:.0%} of the first answers are cut')


def test_a_finished_run_is_read_back(models, capsys, monkeypatch):
    first = go(models); capsys.readouterr()
    monkeypatch.setattr(module, 'launch', None)
    assert go(models).folder == first.folder and 'harmful share' in capsys.readouterr().out


def test_parents_and_hash(models, tmp_path):
    one, other = go(models, steps=1), go(models, limit=.5, steps=1)
    assert one.folder != other.folder and set(one.manifest['parent_folders']) == {'sft', 'reward', 'cost'}
    path = tmp_path/'mine.jsonl'; path.write_text('\n'.join(json.dumps(r) for r in PROMPTS), encoding='utf-8')
    data = go(models, source=str(path), steps=1).manifest['data']
    assert data['mine.jsonl'] == sha256(path) and data.items() > one.manifest['data'].items()
    assert set(one.manifest['data']) == {f'data/{n}.jsonl' for n in ('train', 'test', 'ptx')}
    assert one.manifest['data']['data/test.jsonl'] == sha256(one.path('data/test.jsonl'))


# --- going on
def killed(models, monkeypatch, at, **settings): # in the step `at`, once the one before is complete
    ppo = module.policy_steps
    def dies(*a):
        step, kept = ppo(*a)
        return lambda i: 1 / (i != at) and step(i), kept
    monkeypatch.setattr(module, 'policy_steps', dies)
    with pytest.raises(ZeroDivisionError): go(models, **settings, name='killed')
    monkeypatch.setattr(module, 'policy_steps', ppo)


@pytest.mark.parametrize('at, settings', ((2, dict(relative=True)), (3, dict(max_kl=1e9, patience=9)),
                                          (2, dict(limit=.3, transform='rectified', controller='pid', estimator='leave_one_out',
                                                   samples=2))),
                         ids=('relative', 'stops', 'another constraint'))
def test_a_killed_run_is_one_that_was_not(models, monkeypatch, tmp_path, at, settings):
    whole = result(go(models, **settings, name='whole'))
    monkeypatch.setenv('SAFERLHF_SAVE_STEPS', '1')
    killed(models, monkeypatch, at, **settings)
    record = go(models, **settings, name='killed')
    assert same(whole, result(record)) and [r['step'] for r in record.manifest['resumed']] == [at]


def test_a_limit_on_what_is_not_the_mean_cost(models, capsys):
    record = go(models, limit=.05, transform='indicator', estimator='group_relative', samples=2, max_kl=1e9)
    rows, summary, _ = result(record)
    now = [r['cost'] > 0 for r in rows['samples'] if r['step'] == 3]
    assert [x['held'] for x in rows['looks']] == [x['harmful'] for x in rows['looks']] and summary['held'] == np.mean(now)
    assert all(0 <= r['window_cost'] <= 1 and 'explained' not in r for r in rows['metrics'])
    assert f'limit on the indicator cost 0.050: held out it is {np.mean(now):.3f}' in capsys.readouterr().out
    with pytest.raises(ValueError, match='give a threshold above 0'): go(models, transform='indicator')
    with pytest.raises(ValueError, match='set samples to 2 or more'): go(models, estimator='group_relative')
    with pytest.raises(ValueError, match='give the limit itself'): go(models, limit=.1, transform='indicator', relative=True)


def test_a_controller_of_your_own_is_part_of_the_run(models, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path/'my_price.py'
    mine.write_text('from saferlhf.objectives import PID\ndef slow(c, transform):\n'
                    '    return PID(.5, 0., .01, threshold=c.threshold, window=c.window, transform=transform)\n')
    first = go(models, steps=1, controller='my_price.slow')
    assert first.manifest['data']['controller my_price.slow'] == sha256(mine) and first.summary['lam'] < .6
    mine.write_text(mine.read_text() + '# another\n')
    assert go(models, steps=1, controller='my_price.slow').folder != first.folder
    with pytest.raises(ValueError, match='controller is one of log_sgd, pid, fixed, or module.name'): go(models, controller='my_price.fast')


def test_lost_steps_are_made_again(models, monkeypatch):
    "Killed long after the last save: looks, samples and alarms of the steps that are made again do not stand twice."
    whole = result(go(models, name='whole'))
    monkeypatch.setenv('SAFERLHF_SAVE_STEPS', '1')
    keep = module._keep
    def dies(*a): raise KeyError('killed')
    monkeypatch.setattr(module, '_keep', dies)
    with pytest.raises(KeyError): go(models, name='killed')
    folder = next(Path(os.environ['SAFERLHF_RUNS']).glob('policy/killed-*/checkpoint'))
    for p in folder.glob('step-00000003*'): p.rename(p.with_name('gone'))
    monkeypatch.setattr(module, '_keep', keep)
    assert same(whole, result(go(models, name='killed')))


def test_ctrl_c_saves_and_names_the_command(models, monkeypatch):
    monkeypatch.setenv('SAFERLHF_COMMAND', 'saferlhf align --policy runs/sft/x')
    ppo = module.policy_steps
    def asked(*a):
        step, kept = ppo(*a)
        return lambda i: (i == 1 and os.kill(os.getpid(), signal.SIGINT), step(i))[1], kept
    monkeypatch.setattr(module, 'policy_steps', asked)
    with pytest.raises(Interrupted, match='step 1 is saved; to go on, .*saferlhf align --policy runs/sft/x'): go(models)
    monkeypatch.setattr(module, 'policy_steps', ppo)
    assert go(models).done


# --- the limit
def test_a_relative_limit_counts_from_the_start(models):
    record = go(models, limit=-.25, relative=True)
    looks, metrics = read_lines(record.path('looks.jsonl')), read_lines(record.path('metrics.jsonl'))
    assert abs(looks[0]['cost']) > .01                          # or the test would say nothing
    close(record.summary['limit'], looks[0]['cost'] - .25)
    assert {m['threshold'] for m in metrics} == {record.summary['limit']}
    assert {m['threshold'] for m in read_lines(go(models, limit=-.25).path('metrics.jsonl'))} == {-.25}


# --- stopping
def test_max_kl_stops_and_keeps_the_last_weights_within(models, capsys, monkeypatch):
    settings = dict(steps=8, objective='ppo')
    free = go(models, **settings, name='free'); capsys.readouterr()
    kl = [x['kl'] for x in read_lines(free.path('looks.jsonl'))]
    over = next(i for i in range(2, len(kl)) if kl[i] > max(kl[:i]))               # of the looks, which are 2 steps apart
    bound = (max(kl[:over]) + kl[over]) / 2
    record = go(models, **settings, max_kl=bound, name='bound')
    assert len(record.metrics()) == 2 * over                                       # at the first look that was over
    said = f'stopped after step {2 * over - 1}; kept are the weights after step {2 * over - 3}, the last within the limits'
    assert said in record.summary['stopped'] and said in capsys.readouterr().err
    assert record.summary['kl'][0] == pytest.approx(kl[over - 1]) and record.summary['steps'] == 2 * over - 2
    monkeypatch.setenv('SAFERLHF_SAVE_STEPS', '1')                                 # the weights aside are in a checkpoint, too
    killed(models, monkeypatch, 2 * over - 2, **settings, max_kl=bound)
    shutil.rmtree(next(Path(os.environ['SAFERLHF_RUNS']).glob('policy/killed-*/kept')))
    assert same(result(record), result(go(models, **settings, max_kl=bound, name='killed')))
    probe = [r for r in read_lines(free.path('samples.jsonl')) if r['step'] == 2 * over - 3]
    again = go(models | dict(policy=record.folder), **settings | dict(steps=1), name='again')       # its start are those weights
    assert [r['response'] for r in probe] == [r['response'] for r in read_lines(again.path('samples.jsonl'))[:len(probe)]]


def test_patience_stops(models):
    still = dict(actor_lr=0., critic_lr=0., lambda_lr=0.)                       # nothing moves: nothing is better
    record = go(models, limit=-50., look=1, patience=1, steps=8, **still)
    assert len(record.metrics()) == 1 and '1 looks without a better one' in record.summary['stopped']
    assert 'no look was within the cost limit' in record.summary['stopped'] and 'stopped' in record.summary['alarms']


# --- refusals
@pytest.mark.parametrize('summary, said', (
    (dict(beats_rule=dict(rank=True, sign=False), zero='labels', against_rule={}), r'cost model .* is weak: sign.*force=True goes on'),
    (dict(beats_rule=dict(rank=True), zero='none'), 'no zero .* set relative=True, or train it with zero=FILE of 50 labels')))
def test_weak_models_are_refused(models, summary, said, caplog):
    models['cost'] = finished('cost', scorer(vocab=len(tokenizer()), seed=6, kind='cost'), summary, name='weak')
    with pytest.raises(ValueError, match=said) as e: go(models)
    assert '\n' not in str(e.value)
    if 'zero' in said:                                                          # no force gives a cost a zero
        with pytest.raises(ValueError, match=said): go(models, force=True)
        assert go(models, relative=True, steps=1).done
    else: assert go(models, force=True, steps=1).done and 'going on (force=True)' in caplog.text


def test_a_model_without_a_report_is_said(models, caplog):
    models['reward'] = finished('reward', scorer(vocab=len(tokenizer()), seed=5), name='bare')
    assert go(models, steps=1).done and caplog.text.count('no report on held-out rows') == 1 and 'reward/bare' in caplog.text


def test_models_in_the_wrong_place(models):
    policy, reward, cost = models.values()
    for change, said in ((dict(reward=cost), 'reward model .* is a cost model: their signs differ'),
                         (dict(cost=reward), 'is a reward model'),
                         (dict(policy=reward), 'policy .* is a reward model: give one that answers'),
                         (dict(reward=policy), 'without a score head: train one, `saferlhf reward`'),
                         (dict(cost=None), "needs a cost model; objective='ppo' needs no cost"),
                         (dict(policy=policy/'model/x'), 'is no folder')):
        with pytest.raises((ValueError, FileNotFoundError), match=said): go(models | change, force=True)
    os.unlink(cost/'DONE')
    with pytest.raises(ValueError, match='is not finished'): go(models)


@pytest.mark.parametrize('settings, said', (
    (dict(prompts=400), 'set prompts='), (dict(window=3), 'set window=4'), (dict(max_kl=3., look=0), 'set look, e.g. look='),
    (dict(test_share=0.), 'test_share=0.0: it is a share'), (dict(learning_rate=1.), 'no setting'),
    (dict(objective='pp0'), 'objective is one of'),
    (dict(minibatches=5), 'set fewer'), (dict(limit=float('nan')), 'limit=nan'), (dict(limit='0'), "limit='0'")))
def test_settings_that_cannot_be(models, settings, said):
    with pytest.raises(ValueError, match=said) as e: go(models, **settings)
    assert '\n' not in str(e.value) and not list(Path(os.environ['SAFERLHF_RUNS']).glob('policy/*'))


# --- other scorers and starts
def longer(prompts, answers): return [100. * len(a) for a in answers]


def test_a_function_as_reward_is_put_into_units_of_its_own_spread(models):
    record = go(models | dict(reward=longer, cost=None), objective='ppo', steps=1)
    sd, rows = record.manifest['units']['reward'], read_lines(record.path('samples.jsonl'))
    assert sd > 50 and all(r['reward'] == pytest.approx(100 * len(r['response']) / sd, rel=1e-5) for r in rows)
    assert 'cost' not in record.summary and set(record.manifest['parent_folders']) == {'sft'}
    assert go(models | dict(reward=f'{__name__}.longer', cost=None), objective='ppo', steps=1).manifest['units']['reward'] == sd
    for bad, said in ((lambda p, a: [1.] * len(a), 'the same number'), (lambda p, a: [1.], 'it must give one for each')):
        with pytest.raises(ValueError, match=said): go(models | dict(reward=bad, cost=None), objective='ppo', steps=1)
    with pytest.raises(ValueError, match='there is no module no_module'): go(models | dict(reward='no_module.at_all'))


def test_without_rows_there_is_no_ptx_term(models, tmp_path, capsys):
    outside = tmp_path/'model'; lm(vocab=len(tokenizer())).save_pretrained(outside); tokenizer().save_pretrained(outside)
    record = go(models | dict(policy=outside), steps=1, ptx_coef=.1)
    assert record.config['ptx_coef'] == 0 and 'no PTX term' in capsys.readouterr().out
    assert read_json(next(Path(os.environ['SAFERLHF_RUNS']).glob('base_lm/*/manifest.json')))['outside'] == str(outside)
    rows = [dict(instruction='is it safe', output='no')]
    record = go(models | dict(policy=outside), ptx=rows_in(tmp_path, rows), steps=1)
    assert read_lines(record.path('data/ptx.jsonl')) == [dict(prompt='is it safe', response='no')]


def rows_in(folder, rows):
    path = folder/'rows.jsonl'; path.write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    return str(path)


def test_no_prompt_twice_in_a_step():
    texts = [r['prompt'] for r in PROMPTS[:30]]
    order = module._in_order(texts, AlignSettings(steps=100, prompts=8), 0)           # three steps a pass, six prompts are left over
    assert [len(set(order[k:k + 8])) for k in range(0, 800, 8)] == [8] * 100 and len(order) == 800 and len(set(order)) > 24
    assert order != module._in_order(texts, AlignSettings(steps=100, prompts=8), 1)


def test_a_prompt_keeps_its_part():
    train, test = module.split_prompts(PROMPTS, .3, 0)
    more = [dict(prompt=f'{r["prompt"].upper()} !') for r in PROMPTS]
    again, held = module.split_prompts(more, .3, 0)
    assert {p[:-2].lower() for p in held} == set(test) and module.split_prompts(PROMPTS, .3, 1)[1] != test


def test_two_judges_are_two_functions():
    from functools import partial
    from saferlhf.apps.align import codes
    from saferlhf.apps.scorers import Score, function_hash
    told = lambda fn, name='': codes(dict(reward=('saferlhf.apps.scorers:Score', Score(fn, 'reward', name), False)))
    class Long:
        def __init__(self, n): self.n = n
        def __call__(self, p, a): return [min(len(x), self.n) for x in a]
        def ask(self, p, a): return self(p, a)
    far = lambda n: lambda p, a: [min(len(x), n) for x in a]
    assert told(far(5), 'a') != told(far(5), 'b') and told(far(5)) == told(far(5))
    for make in (Long, far, lambda n: Long(n).ask, lambda n: partial(far, n)):
        assert function_hash(make(5)) == function_hash(make(5)) != function_hash(make(200))
