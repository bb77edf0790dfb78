"Transforms of the cost, controllers of its price, estimators without critics: by hand, against slow rewrites, and in the small worlds."
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from test_ppo import BASE, V, engine, step, world
from tiny import close, scorer

from saferlhf.advantages import group_relative, leave_one_out, relative_advantages
from saferlhf.objectives import PID, Controller, Multiplier, Transform, combine, indicator, named, pessimistic, ppo_lag, raw, rectified
from saferlhf.ppo import PPOConfig, make_objective
from saferlhf.world import World, run_world, two_token_lambda, world_config

SCATTERED = World(cost=((0., 0.), (0., 1.)), start=(-.4, -2.), share=(.9, .1))


# --- estimators
def test_answers_are_compared_with_the_others_to_their_prompt():
    s = torch.randn(12, generator=torch.Generator().manual_seed(0))
    for n in (2, 3, 4, 6):
        groups = s.view(-1, n).tolist()
        alone = [x - np.mean([y for j, y in enumerate(g) if j != i]) for g in groups for i, x in enumerate(g)]
        scaled = [(x - np.mean(g)) / np.std(g, ddof=1) for g in groups for x in g]
        close(leave_one_out(s, n), alone, 1e-5); close(group_relative(s, n), scaled, 1e-5)
        close(group_relative(3 * s - 7, n), scaled, 1e-4)                      # neither unit nor zero of the scores matters


@pytest.mark.parametrize('x', (.1, 1/3, 1e-9, 7e8))
def test_equal_scores_teach_nothing(x): # whose mean may round, and their standard deviation with it
    s = torch.tensor([x] * 7 + [1., 2., 3., 4., 5., 6., 7.])
    assert group_relative(s, 7)[:7].tolist() == [0.] * 7 and group_relative(s, 7)[7:].abs().min() == 0 < group_relative(s, 7)[-1]


@pytest.mark.parametrize('n', (0, 1, 5))
def test_groups_have_at_least_two_answers(n):
    for f in (leave_one_out, group_relative):
        with pytest.raises(ValueError, match='at least 2 are compared, set samples='): f(torch.zeros(12), n)


def test_the_kl_term_is_added_after_standardising():
    g = torch.Generator().manual_seed(1); n, L = 3, 5
    kl, mask = torch.randn(6, L, generator=g), (torch.arange(L) < torch.tensor([5, 2, 1, 4, 4, 3])[:, None]).long()
    found = relative_advantages(torch.arange(6.), kl, mask, -1, .3, n)
    for i in range(6):
        for t in range(L):
            later = [sum(kl[j, k].item() for k in range(t, L) if mask[j, k]) for j in range(i // n * n, i // n * n + n)]
            others = np.mean([x for j, x in enumerate(later) if j != i % n])
            close(found[i, t], (i - .3 * (later[i % n] - others)) * mask[i, t].item(), 1e-5)


@pytest.mark.parametrize('lam', (.01, 1., 4.9))
def test_the_kl_pressure_is_that_of_any_multiplier(lam):
    kl, mask, nothing = torch.randn(6, 4), torch.ones(6, 4), torch.zeros(6)
    objective = ppo_lag(Multiplier(lam))
    both = {k: relative_advantages(nothing, kl, mask, sign, .2, 3) for k, (_, sign) in objective.channels.items()}
    close(combine(both, objective.weights({})), relative_advantages(nothing, kl, mask, -1, .2, 3), 1e-5)


def test_a_step_without_critics_is_a_step_with_their_baseline_in_the_scores():
    "GAE with values 0 and lambda 1 on scores that stand beside the others' gives the same gradient."
    config = replace(BASE, kl_coef=0., gamma=1., gae_lambda=1., samples=2)
    objective = ppo_lag(Multiplier(.7, .5, 5., .2, 100))
    plain = world(replace(objective, relative=leave_one_out), config); plain.critics = {}
    beside, m = world(ppo_lag(Multiplier(.7, 0., 5., .2, 100)), config), step(plain)
    for k, f in list(beside.scorers.items()): beside.scorers[k] = lambda i, m, f=f: leave_one_out(f(i, m), 2)
    for k in beside.critics:
        beside.critics[k] = engine(scorer('llama', V, 1, 'critic')); torch.nn.init.zeros_(beside.critics[k].model.score_head.weight)
    beside.objective.state.load_state_dict(plain.objective.state.state_dict())  # lambda as it stands after the step
    step(beside)
    close(plain.actor.grads[0], beside.actor.grads[0], 1e-5)
    assert 'explained' not in m and 'value_loss' not in m and m['ratio'] == pytest.approx(1) and plain.objective.critic_init == {}


# --- transforms
def test_what_an_answer_pays():
    c = torch.tensor([-2., 0., .5, 3.])
    assert [x.each(c).tolist() for x in (raw, rectified, indicator)] == [c.tolist(), [0., 0., .5, 3.], [0., 0., 1., 1.]]
    m = Multiplier(lr=.1, threshold=.4, window=4, transform=indicator); m.step(c)
    assert m.window_cost == m.held(c) == .5 and math.log(m.value) == pytest.approx(.1 * (.5 - .4))
    o = ppo_lag(m)
    assert o.critic_init == {'reward': 'reward', 'indicator': 'sft'}           # the cost model's value is another quantity
    assert o.channels['indicator'][0](dict(cost=c)).tolist() == [0., 0., 1., 1.] and set(o.weights({})) == {'reward', 'indicator'}
    assert o.observe(dict(reward=c, cost=c))['cost'] == pytest.approx(.375)    # the raw mean is logged all the same


@pytest.mark.parametrize('delta', (.001, .05, .3))
def test_the_pessimistic_number_is_an_upper_bound_of_the_mean(delta):
    g = np.random.default_rng(0)
    for n in (16, 256):
        x = g.normal(size=n)
        close(pessimistic(delta).whole(x), x.mean() + stats.t.ppf(1 - delta, n - 1) * x.std(ddof=1) / n ** .5, 5e-3)
    above = np.mean([pessimistic(.1).whole(g.normal(size=40)) < 0 for _ in range(2000)])
    assert .08 < above < .12                                                   # it misses the true mean, 0, as often as it says
    with pytest.raises(ValueError, match='10 costs give no pessimistic mean: it takes 11'): pessimistic(delta).whole([0.] * 10)


def test_answers_are_held_to_what_a_window_of_them_would_be():
    "256 costs move the price; the 16 held-out answers that are judged by it have the error of 256."
    m, few = Multiplier(window=256, transform=pessimistic(.05)), [-1., 1.] * 8
    assert m.held(few) == pytest.approx(stats.t.ppf(.95, 255) * np.std(few, ddof=1) / 16, rel=1e-3)
    with pytest.raises(ValueError, match='set samples=1'): make_objective(PPOConfig(transform='pessimistic', samples=2))


@pytest.mark.parametrize('delta', (0., 1e-9, .5, 1., -1.))
def test_a_delta_that_is_no_small_probability(delta):
    with pytest.raises(ValueError, match='delta is a small probability'): pessimistic(delta)


@pytest.mark.parametrize('transform', (rectified, indicator))
@pytest.mark.parametrize('make', (Multiplier, PID))
def test_a_limit_without_interior_is_refused(make, transform):
    for threshold in (0., -.1):
        with pytest.raises(ValueError, match=f'{transform.name} is never below 0.*give a threshold above 0'):
            make(threshold=threshold, transform=transform)
    assert make(threshold=.1, transform=transform).threshold == .1
    assert Multiplier(2., 0., transform=rectified).step([9.]) == 2.           # a fixed price needs no budget


# --- controllers
def test_pid_is_the_printed_formula():
    g, kp, ki, kd = np.random.default_rng(0), .7, .3, 1.1
    pid, I, before = PID(1., kp, ki, kd, max=4., threshold=.2, window=1), 1., None
    for c in g.normal(size=60):
        J = c - .2
        I = min(max(I + ki * J, 0.), 4.)
        lam = kp * J + I + kd * max(J - (J if before is None else before), 0.)
        before = J
        assert pid.step([c]) == pytest.approx(min(max(lam, 0.), 4.), abs=1e-12) and 0 <= pid.value <= 4


@pytest.mark.parametrize('wrong', [dict(init=-1.), dict(init=6.), dict(max=math.inf), dict(kp=-1.), dict(kd=-.1), dict(ki=math.nan),
                                   dict(window=0), dict(threshold=math.nan), dict(delay=-1)])
def test_gains_that_make_no_controller(wrong):
    with pytest.raises(ValueError, match='need '): PID(**wrong)


@pytest.mark.parametrize('make', [lambda: PID(.5, 1., .2, .3, window=5), lambda: Multiplier(window=5, threshold=.1, transform=rectified)])
def test_a_controller_goes_on_where_it_was(make):
    a, b, costs = make(), make(), torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    for c in costs[:4]: a.step(c)
    b.load_state_dict(json.loads(json.dumps(a.state_dict())))
    assert [a.step(c) for c in costs[4:]] == [b.step(c) for c in costs[4:]] and repr(a) == repr(b)
    with pytest.raises(ValueError, match='not the state of a'): make().load_state_dict({'costs': [], 'rollouts': 0})


def test_one_of_your_own(tmp_path, monkeypatch):
    (tmp_path/'mine.py').write_text("""from saferlhf.objectives import Controller, Transform
class Steps(Controller):
    moving = 'lam',
    def __init__(self, lam, **more): super().__init__(**more); self.lam = lam
    value = property(lambda self: self.lam)
    def move(self, over): self.lam += .5 if over > 0 else 0
def steps(config, transform): return Steps(config.lambda_init, threshold=config.threshold, window=config.window, transform=transform)
squared = Transform('squared', lambda c: c * c, 0.)
def twice(config): return Transform('twice', lambda c: 2 * c)
def forgets(config, transform): return Steps(1.)
paid = Transform('reward', lambda c: c)
def halves(scores, samples): return scores / 2
number = 3
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = PPOConfig(controller='mine.steps', transform='mine.squared', threshold=1., estimator='mine.halves', samples=2)
    o = make_objective(config); o.observe(dict(reward=torch.zeros(2), cost=torch.tensor([2., 1.])))
    assert o.state.value == 1.5 and o.relative(torch.ones(2), 2).tolist() == [.5, .5] and 'squared' in o.channels
    assert o.state.state_dict() == dict(lam=1.5, costs=[4., 1.], rollouts=1) and 'of squared' in repr(o.state)
    assert make_objective(replace(config, transform='mine.twice')).state.transform.name == 'twice'
    wrongs = dict(controller='mine.number mine.twice mine.Steps mine.forgets', transform='mine.number mine.halves mine.paid',
                  estimator='mine.number')
    for field, names in wrongs.items():
        for name in names.split():
            with pytest.raises((ValueError, TypeError)) as e: make_objective(replace(config, **{field: name}))
            assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='another transform, threshold or window'):
        make_objective(replace(config, controller='mine.forgets'))
    with pytest.raises(ValueError, match="cannot be named 'reward'"): make_objective(replace(config, transform='mine.paid'))
    with pytest.raises(ValueError, match="belong to objective='ppo_lag'"): make_objective(replace(config, objective='ppo'))
    text = (tmp_path/'mine.py').read_text()                                        # what runs is what the file says now
    (tmp_path/'mine.py').write_text(text.replace('+= .5', '+= 5'))
    o = make_objective(config); o.observe(dict(reward=torch.zeros(2), cost=torch.tensor([2., 1.])))
    assert o.state.value == 6.


def test_what_a_checkpoint_would_lose_is_told():
    class Forgets(Multiplier):
        def move(self, over): super().move(over); self.seen = over
    with pytest.raises(ValueError, match='Forgets.move changes seen, which a checkpoint would not hold'): Forgets(window=2).step([1.])
    class Text(PID): moving = 'lam'
    with pytest.raises(ValueError, match='write a comma after one name'): Text()


@pytest.mark.parametrize('field', ('transform', 'controller', 'estimator'))
@pytest.mark.parametrize('name', ('', 'rectifed', 'no.such.module', 'math.no_such', '.x', 'x.'))
def test_an_unknown_name_is_told_with_the_known_ones(field, name):
    with pytest.raises(ValueError, match=f'{field} is one of .*, or module.name of your own') as e:
        make_objective(PPOConfig(samples=2, **{field: name}))
    assert '\n' not in str(e.value)


def test_estimators_without_critics_need_groups():
    with pytest.raises(ValueError, match='set samples to 2 or more'): make_objective(PPOConfig(estimator='leave_one_out'))
    assert named('estimator', 'gae', dict(gae=None)) is None
    assert isinstance(make_objective(PPOConfig(controller='fixed', lambda_init=2.)).state, Controller)
    assert isinstance(raw, Transform)


# --- the small worlds
@pytest.mark.parametrize('transform', (raw, rectified, indicator))
def test_the_best_policy_by_writing_out_all_answers(transform):
    "3^8 answers, ten tokens that pay nothing taken together."
    lam, b, total = .6, .5, np.zeros(4)
    for cost, start, share in zip(SCATTERED.cost, SCATTERED.start, SCATTERED.share, strict=True):
        rows = []
        for tokens in itertools.product(range(3), repeat=8):
            reward = sum((1., 2., 0.)[t] for t in tokens)
            c = start + sum((*cost, 0.)[t] for t in tokens)
            paid = transform.each(torch.tensor([c], dtype=torch.float64)).item()
            rows.append((10. ** tokens.count(2) * math.exp((reward - lam * paid) / ((1 + lam) * b)), reward, c, c > 0, paid))
        w, *columns = np.array(rows).T
        total += share * np.array([w @ x / w.sum() for x in columns])
    close([*SCATTERED.best(lam, b, transform).values()], total, 1e-9)


def test_the_closed_form_is_one_of_these_worlds():
    for b in (.5, .2): assert World().price(b, 0.) == pytest.approx(two_token_lambda(b), abs=1e-8)
    assert World().price(.5, 9.) == 0. and World().price(.5, 0., transform=pessimistic(.05)) > two_token_lambda(.5)


def test_a_mean_that_is_safe_hides_prompts_that_are_not():
    harmful = lambda t, limit: SCATTERED.best(SCATTERED.price(.5, limit, transform=t), .5, t)
    mean, share = harmful(raw, 0.), harmful(indicator, .02)
    assert mean['cost'] == pytest.approx(0., abs=1e-8) and mean['harmful'] > .09    # nearly all of the tenth that is not safe
    assert share['harmful'] == pytest.approx(.02, abs=1e-8) and share['cost'] < -.3


@pytest.mark.parametrize('how', [dict(estimator='leave_one_out', samples=16), dict(estimator='group_relative', samples=64, kl_coef=.2),
                                 dict(estimator='leave_one_out', samples=16, controller='pid', pid_kp=.3)])
def test_the_price_is_found_without_critics(how): # a quarter of the full run, within 8 %
    config = world_config(steps=70, **how)
    log, lam = run_world(World(), config), World().price(config.kl_coef, 0., relative=config.estimator == 'group_relative')
    found, cost = (np.mean([m[k] for m in log[-20:]]) for k in ('lam', 'cost'))
    assert abs(found / lam - 1) < .08 and abs(cost) < .2, (found, lam, cost)


def test_prompts_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match='do not divide into shares'): run_world(SCATTERED, world_config(steps=1, answers=16))
