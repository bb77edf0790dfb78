"What a limit would mean: by hand, then with tiny models whose scores are known."
import json

import numpy as np
import pytest
from tiny import lm, scorer, sentences, tokenizer

from saferlhf.apps import limit as module
from saferlhf.apps.limit import best_under, choices, harm_at, limit, limit_lines, measured
from saferlhf.apps.own_data import held_out_prompt
from saferlhf.record.files import read_lines, seal
from saferlhf.record.run import Run

COST, REWARD = np.array([[.5, -1., -2.], [1., 3., 2.]]), np.array([[9., 1., 2.], [0., 5., 7.]])


def test_the_share_at_a_limit_is_that_of_the_least_change():
    found = harm_at(np.array([[0., 2.]]), np.array([[.1, .9]]), [3., 1., .5, 0., -.1], n=10)
    np.testing.assert_allclose([x.value for x in found[:4]], [.5, .5, .3, .1], atol=1e-6)     # the looser one changes nothing
    assert np.isnan(found[4].value)
    cost = np.array([[0., 1.], [0., 3.]])                    # one tilt for both prompts: w = 1 / (1 + e^t), 3w' = 3 / (1 + e^3t)
    t = .7; w = 1 / (1 + np.exp(t)), 1 / (1 + np.exp(3 * t))
    assert harm_at(cost, (cost > 0).astype(float), [(w[0] + 3 * w[1]) / 2], n=10)[0].value == pytest.approx(sum(w) / 2, abs=1e-3)


def test_the_interval_of_a_share_is_by_prompt():
    g = np.random.default_rng(0)
    cost = np.repeat(g.normal(size=(40, 1)), 8, 1) + .1 * g.normal(size=(40, 8)); harm = (cost > 0).astype(float)
    (value, low, high), = harm_at(cost, harm, [cost.mean()])
    assert value == pytest.approx(harm.mean()) and low < value - .05 and high > low
    assert harm_at(cost, harm, [cost.mean()]) == harm_at(cost, harm, [cost.mean()])


def test_the_best_of_n_by_hand():
    pick, under = best_under(COST, REWARD, 0.)
    assert pick.tolist() == [2, 0] and under.tolist() == [True, False]       # reward 2 of -1, -2; none under 0: the lowest cost
    assert best_under(COST, REWARD, 2.)[0].tolist() == [0, 2] and best_under(COST, REWARD, -2.)[0].tolist() == [2, 0]
    assert best_under(COST, None, 2.)[0].tolist() == [0, 0] and best_under(COST, None, -.5)[0].tolist() == [1, 0]
    rows, _ = measured(COST, REWARD, (COST > 0).astype(float))
    zero, = (r for r in rows if r['limit'] == 0)
    assert (zero['best_reward'][0], zero['best_cost'][0], zero['best_harmful'][0], zero['none'][0]) == (1., -.5, .5, .5)


def test_limits_to_choose_from():
    cost, harm = np.array([[0., 2.]] * 3), np.array([[.1, .9]] * 3)
    found = choices(cost, harm)
    assert found.pop('half as many harmful answers') == pytest.approx(.375, abs=1e-6)         # .1 + .8 * .375 / 2 = .25
    assert found == {'the paper, round 1': 0., 'the safest of the sampled answers': 0.}
    rows, found = measured(cost + 1, None, harm)
    said = limit_lines(dict(limits=rows, choices=found, samples=2, prompts=3, cost=[-.5], harm_from='here'))
    assert '  +0.00  the paper, round 1; the policy is within it already' in said
    said = limit_lines(dict(limits=rows, choices=found, samples=2, prompts=3, cost=[2.], harm_from='here'))
    assert '  +0.00  the paper, round 1; not reached by 2 answers' in said
    assert 'not reached' in next(x for x in said if x.lstrip().startswith('+0.00'))          # nor is there a share for it
    assert 'half as many harmful answers' not in choices(cost, .5 + 0 * harm)                 # nothing at hand halves it
    assert 'half as many harmful answers' not in choices(cost, None) and 'harmful' not in measured(cost)[0][0]


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/'runs'))
    tok, out = tokenizer(), {}
    n = len(tok)
    for stage, model in dict(sft=lm(vocab=n), cost=scorer(vocab=n, kind='cost'), reward=scorer(vocab=n, seed=1)).items():
        run = Run.start(stage, dict(max_prompt_tokens=96, max_new_tokens=6), name='tiny')
        model.save_pretrained(run.path('model')); tok.save_pretrained(run.path('model'))
        run.finish(dict(zero='labels') if stage == 'cost' else {}); out[stage] = run.folder
    return out


PROMPTS = [dict(prompt=f'{s} {i}') for i, s in enumerate(sentences(40))]
SETTINGS = dict(samples=4, rows=6, test_share=.5)


def test_a_run_of_tiny_models_says_what_its_answers_say(models, capsys):
    run = limit(models['sft'], models['cost'], PROMPTS, models['reward'], SETTINGS)
    said = capsys.readouterr().out
    rows, s = read_lines(run.folder/'answers.jsonl'), run.summary
    assert len(rows) == 24 and len({r['prompt'] for r in rows}) == 6 and all(held_out_prompt(r['prompt'], 0, .5) for r in rows)
    cost = np.array([r['cost'] for r in rows]).reshape(6, 4); reward = np.array([r['reward'] for r in rows]).reshape(6, 4)
    assert (s['cost'][0], s['harmful'][0]) == pytest.approx((cost.mean(), (cost > 0).mean())) and s['harm_from'] == 'cost above 0'
    for r in s['limits']:
        pick, under = best_under(cost, reward, r['limit'])
        assert (r['best_reward'][0], r['none'][0]) == pytest.approx((np.mean(reward[range(6), pick]), 1 - under.mean()))
    assert s['choices']['the paper, round 1'] == 0. and f'{s["choices"]["the safest of the sampled answers"]:+.2f}' in said
    assert (run.folder/'limit.png').stat().st_size > 2000
    assert len((run.folder/'limits.csv').read_text().splitlines()) == len(s['limits']) + 1
    assert 'NaN' not in (run.folder/'summary.json').read_text()
    again = limit(models['sft'], models['cost'], PROMPTS, models['reward'], SETTINGS)
    assert again.folder == run.folder and again.manifest['finished'] == run.manifest['finished']


def test_an_interrupted_run_does_not_sample_again(models, monkeypatch):
    whole = limit(models['sft'], models['cost'], PROMPTS, settings=SETTINGS).summary
    again = lambda: limit(models['sft'], models['cost'], PROMPTS, settings=SETTINGS | dict(name='two', rows=5))
    with monkeypatch.context() as m:
        m.setattr(module, '_figure', lambda *a: (_ for _ in ()).throw(OSError('no room')))
        with pytest.raises(OSError, match='no room'): again()
    monkeypatch.setattr(module, '_sampled', lambda *a: pytest.fail('sampled again'))
    run = again()
    assert run.done and run.summary['prompts'] == 5 and whole['prompts'] == 6 and 'best_reward' not in run.summary['limits'][0]


def put(folder, name, text): # as if the run had been finished with it
    (folder/name).write_text(text); (folder/'DONE').write_text(seal(folder))


def test_harm_is_calibrated_on_the_held_out_labels(models):
    g = np.random.default_rng(0)
    scores = np.linspace(-2, 2, 60); harmful = g.random(60) < 1 / (1 + np.exp(-2 * (scores - 1)))
    rows = [dict(prompt=f'p {i}', high=f'a {i}', low=f'b {i}', high_sign=1 if h else -1, low_sign=0, high_score=x, low_score=9.)
            for i, (x, h) in enumerate(zip(scores, harmful, strict=True))]
    put(models['cost'], 'test_scores.jsonl', ''.join(json.dumps(r) + '\n' for r in rows))
    s = limit(models['sft'], models['cost'], PROMPTS, settings=SETTINGS).summary
    assert s['harm_from'] == 'calibrated on 60 held-out labels'
    p, _ = module._harm(Run.open(models['cost']), np.array([[-2., 0., 2.]]))
    assert (np.diff(p[0]) >= 0).all() and p[0, 1] < .5 < p[0, 2]               # people put the line at 1, not at 0


def test_a_cost_without_a_zero_gives_limits_from_the_mean(models, monkeypatch, capsys):
    put(models['cost'], 'summary.json', '{"zero": "none"}')
    s = limit(models['sft'], models['cost'], PROMPTS, settings=SETTINGS).summary
    assert s['relative'] and abs(s['cost'][0]) < 1e-9 and [*s['choices']] == ['the safest of the sampled answers']
    assert 'harmful' not in s and 'harmful: not known' in capsys.readouterr().out


def test_what_is_wrong_is_one_line(models):
    ask = lambda policy='sft', cost='cost', prompts=PROMPTS, **settings: limit(models[policy], models[cost], prompts, settings=settings)
    for said, wrong in {"no setting 'sample': did you mean 'samples'": dict(sample=3), 'samples=0': dict(samples=0),
                        'holds a reward model: name a cost model': dict(cost='reward'),
                        'holds a cost model: name a language model': dict(policy='cost'),
                        'leave none to test on': dict(prompts=PROMPTS[:1], test_share=1e-9)}.items():
        with pytest.raises(ValueError, match=said) as e: ask(**wrong)
        assert '\n' not in str(e.value)
    assert not list((models['sft'].parent.parent).glob('limit'))
