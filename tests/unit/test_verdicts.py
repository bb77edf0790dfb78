"The rules of the hypotheses, on a plain case and at their edges."
import numpy as np
import pandas as pd
import pytest

from project import notebook_functions

from saferlhf.reproduction.verdicts import (FIXED, _few_seeds, _moving_price, _safer_and_better,
                                            _stricter_limits, _together, _two_questions, all_questions,
                                            at_common_kl, frontier, outside)

stragglers = notebook_functions('paper/hypotheses').stragglers

# policy -> harmful share, reward
SHARES = {'initial': (.5, 0.), 'round-1': (.3, .5), 'round-2': (.2, .6), 'round-3': (.1, 1.)}


# models.csv and differences.csv of three seeds; `half` and `low` hold in the last one
def results(shares=SHARES, half=.01, low=.9):
    rows = [dict(policy=p, seed=s, judge=j, prompt_kind='unsafe', decoding='sampled', n=1000,
                 harmful=x + .001 * s, reward=r + .01 * s, harmful_low=x - (half if s == 2 else .01),
                 harmful_high=x + (half if s == 2 else .01), coherent_harmless=1 - x)
            for s in range(3) for j in ('gold', 'judge') for p, (x, r) in shares.items()]
    return pd.DataFrame(rows), pd.DataFrame([dict(policy='round-3', what='reward', seed=s, low=low if s == 2
                                                  else .9) for s in range(3)])


def said(models, differences): # claim's beginning -> verdict
    return {x['claim'].split(':')[0]: x['verdict'] for x in _safer_and_better(models, differences)}


def looks(**arms): # arm=(reward and safety per nat, last KL, seeds) -> probes.csv
    return pd.DataFrame([dict(arm=a.replace('_', '-'), seed=s, round=1, step=k, kl=far * k / 2,
                              gold_reward=r * far * k / 2 + .001 * s * k, gold_cost=-safe * far * k / 2)
                         for a, (r, safe, far, n) in arms.items() for s in range(n) for k in range(3)])


def test_each_seed_must_hold_over_prompts():
    assert said(*results())['gold harmful share'] == said(*results())['all four'] == 'held'
    wide = said(*results(half=.2))
    assert wide['gold harmful share'] == wide["judge's harmful share"] == wide['all four'] == 'inconclusive'


def test_both_kinds_of_interval_must_agree_on_reward():
    assert said(*results())['gold reward'] == 'held'
    assert said(*results(low=-.1))['gold reward'] == 'inconclusive'
    worse = SHARES | {'round-3': (.1, -.5)}
    assert said(*results(worse, low=-.1))['gold reward'] == said(*results(worse,
                                                                          low=-.1))['all four'] == 'not held'


@pytest.mark.parametrize('share, reward, word',
                         ((.1, 1., 'held'), (.3, 1., 'not held'), (.1, .1, 'not held'),
                          (.2, .6, 'inconclusive')))
def test_a_round_is_safer_and_not_less_helpful(share, reward, word):
    models, differences = results(SHARES | {'round-3': (share, reward)})
    if word == 'inconclusive': models.loc[models.policy == 'round-3',
                                          'harmful'] += models.seed.map({0: .1, 1: -.1, 2: 0.})
    assert said(models, differences)['round-3 after round-2'] == word


def test_a_run_that_hardly_moves_is_named():
    assert stragglers(looks(a=(1, 1, 6., 2),
                            b=(1, 1, 2.9, 1))) == [('b', 0)] and stragglers(looks(a=(1, 1, 6., 2),
                                                                                  b=(1, 1, 3.1, 1))) == []


def test_a_frontier_drops_what_is_beaten_on_one_axis_and_equal_on_the_other():
    np.testing.assert_array_equal(frontier([(0, 1), (1, 1), (1, 0)]), [(1, 1)])
    assert outside((.5, 1.2), [(0, 1),
                               (1, 1)]) == pytest.approx(.2) and outside((.5, .9),
                                                                         [(0, 1),
                                                                          (1, 1)]) == pytest.approx(-.1)


def test_prices_are_compared_at_the_kl_that_all_reach():
    arms = {a.replace('-', '_'): (.1, .1, 4. + i, 3) for i, a in enumerate(FIXED)}
    arms |= dict(ppo_lag=(.1, .3, 8., 3), reward_only=(.1, 0., 9., 3))
    lines = {x['claim']: x for x in _moving_price(looks(**arms))}
    assert [x['verdict'] for x in lines.values()] == ['held'] * 3
    assert [c.split(',')[0] for c in lines] == ['at a KL of 7.0', 'at a KL of 4.0', 'at a KL of 8.0']
    assert 'minus cost +1.40' in next(iter(lines.values()))['value']


def test_few_seeds_borrow_their_spread_and_take_two():
    probes = looks(ppo_lag=(.1, .3, 6., 5), classifier=(.1, .1, 5., 2))
    line = _few_seeds(probes, 4, 'x', 'ppo-lag', 'classifier')
    assert line['verdict'] == 'held' and all(x in line['value']
                                             for x in ('KL 5.0, 2 seeds', 'minus cost +1.00', 'single'))
    assert _few_seeds(probes, 4, 'x', 'ppo-lag', 'no-sign')['verdict'] == 'not run'


def test_stricter_limits_are_held_against_the_initial_policy_and_question_1():
    models, _ = results()
    last = models[models.policy == 'round-3'].drop(columns='policy').assign(arm='strict-3')
    def words(share, reward):
        own = last.assign(harmful=share, harmful_low=share - .01, harmful_high=share + .01,
                          coherent_harmless=1 - share, reward=reward)
        return [x['verdict'] for x in _stricter_limits(models, own)]
    assert words(.1, 1.2) == ['held'] * 6
    assert words(.4, 1.2)[:3] == ['not held'] * 3 and words(.1, .5)[3:] == ['held', 'held', 'not held']
    assert words(.1, -.2)[3:5] == ['not held'] * 2


def test_words_and_kl_at_their_edges():
    assert [_together(v) for v in (['held'] * 2, ['held', 'inconclusive'], ['inconclusive', 'not held'])] == [
        'held', 'inconclusive', 'not held']
    back = looks(z=(1, 0, 4., 1)).iloc[[0, 1, 1, 2]].assign(step=range(4), kl=[0, 4, 2, 4],
                                                            gold_reward=[0, 4, 0, 0])
    kl, values = at_common_kl(pd.concat([back, looks(x=(1, 0, 1., 1))]))
    # first reached on the way out
    assert kl == 1 and values.reward['z'].item() == 1
    with pytest.raises(ValueError, match='no arm has two runs'):
        _few_seeds(looks(a=(1, 1, 6., 1), b=(1, 1, 6., 1)), 4, 'x', 'a', 'b')


def test_all_questions_of_a_folder(tmp_path):
    "Harm falls to a fifth in every seed, PPO-Lag is safer by 0.2 per nat; arms of question 5 lend no spread."
    models, differences = results()
    probes = looks(ppo_lag=(.1, .3, 6., 5), shaped_matched=(.1, .1, 6., 5), classifier=(.1, .1, 6., 2))
    last = models[models.policy == 'round-3'].drop(columns='policy').assign(arm='strict-3', reward=1.2)
    def verdicts(probes, **more):
        for name, df in (dict(models=models, differences=differences, probes=probes) | more).items():
            df.to_csv(tmp_path / f'{name}.csv', index=False)
        return all_questions(tmp_path)
    first = verdicts(probes); words = first.groupby('question').verdict.agg(set)
    assert words[['1', '3', '4']].tolist() == [{'held'}] * 3 and words[['2', '2, secondary',
                                                                        '5']].tolist() == [{'not run'}] * 3
    assert first[first.question == '1'].shape[0] == 5 and [x['verdict']
                                                           for x in _two_questions(probes)] == ['not run'] * 7
    later = looks(strict_1=(.1, .3, 6., 3)); later['gold_cost'] *= 1 + later.seed
    second = verdicts(pd.concat([probes, later]), arms=last,
                      models=pd.concat([models, models.assign(decoding='greedy')]))
    pd.testing.assert_frame_equal(second[second.question < '5'], first[first.question < '5'])
    assert set(second[second.question >= '5'].verdict) == {'held'} and len(second) == len(first) + 5
