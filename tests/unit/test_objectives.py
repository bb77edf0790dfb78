"The multiplier (E7), the three objectives, and the identities that tie them together."
import json
import math
from itertools import pairwise
import numpy as np
import pytest
import torch
from saferlhf.advantages import gae, token_rewards
from saferlhf.objectives import Multiplier, combine, cost_slope, ppo, ppo_lag, reward_shaping

close = lambda a, b, tol=1e-10: np.testing.assert_allclose(np.asarray(a, dtype=float),
                                                           np.asarray(b, dtype=float), rtol=tol, atol=tol)
LAMBDAS = (.01, .5, 1., 4.9)


# --- multiplier
def test_direction():
    assert Multiplier().step([1.]) > 1  # too costly: the price rises
    assert Multiplier().step([-1.]) < 1
    assert Multiplier().step([0.]) == 1
    assert Multiplier(threshold=-3).step([-2.]) > 1  # d = 3: a mean cost of -2 is not safe enough
    assert Multiplier(threshold=+3).step([2.]) < 1


def test_by_hand():
    m = Multiplier(init=1., lr=.1)
    close(m.step([1., 3.]), math.exp(.2))
    close(m.step([-4., -4.]), math.exp(.2 - .1 * math.exp(.2)))  # the window still holds 1 and 3


@pytest.mark.parametrize('seed', range(3))
def test_golden(seed):
    g = np.random.default_rng(seed)
    init, lr, cap, floor, threshold, window, delay = .5, .5, 1., .4, -.2, 24, 2
    m = Multiplier(init, lr, cap, threshold, window, delay, floor)
    u, seen, hit = np.log(init), np.zeros(0), set()
    for k in range(60):
        costs = g.normal(loc=1.2 * np.sin(k / 5), size=g.integers(1, 9))
        seen = np.concatenate([seen, costs])
        if k >= delay: u = np.clip(u + lr * np.exp(u) * (seen[-window:].mean() - threshold), np.log(floor),
                                   np.log(cap))
        close(m.step(torch.tensor(costs)), np.exp(u))
        close(m.window_cost, seen[-window:].mean())
        hit.add(m.value)
    assert {floor, cap} <= hit  # both bounds were met, and exactly


def test_equals_sgd_on_log_lambda():
    u = torch.zeros((), dtype=torch.float64, requires_grad=True)
    m = Multiplier(window=1, max=100.)
    for cost in (2., -1., .5, -3.):
        grad, = torch.autograd.grad(-cost * u.exp(), u)  # the loss whose descent is E7
        u = (u - .1 * grad).detach().requires_grad_()
        close(m.step([cost]), u.exp().item())


def test_constant_violation_rises_faster_than_an_exponential_up_to_the_cap():
    m = Multiplier(lr=.05, window=1)
    lam = [m.value] + [m.step([.25]) for _ in range(200)]
    free = [x for x in lam if x < 5.]
    assert all(a < b for a, b in pairwise(free)) and lam[-1] == 5. and max(lam) == 5.
    assert np.all(np.diff(np.diff(np.log(free))) > 0)  # the growth rate itself grows


def test_decay_is_hyperbolic_and_min_zero_is_no_floor():
    m = Multiplier(lr=.05, window=1)
    lam = [m.step([-.25]) for _ in range(4000)]
    close(lam[-1], 1 / (1 + .05 * .25 * 4000), 2e-2)
    assert 1.9 < lam[1999] / lam[3999] < 2.1  # twice the time, half the value
    assert Multiplier(lr=1., window=1, min=.3).step([-50.]) == .3


def test_window_is_the_last_costs_and_delay_counts_rollouts():
    m = Multiplier(window=4, delay=2)
    # two rollouts of any size are waited for
    assert m.step([100., 100., 100.]) == 1. and m.step([100., 2., 2.]) == 1.
    close(m.step([-2., -2.]), 1.)  # window: 2, 2, -2, -2
    close(m.window_cost, 0.)


@pytest.mark.parametrize('costs,what',
                         [([], 'N > 0'), (1., 'N > 0'), ([[1., 2.]], 'N > 0'), ([0.] * 5, 'do not fit'),
                                        ([1., math.nan], 'NaN'), ([math.inf], 'infinite')])
def test_bad_costs_are_refused_and_change_nothing(costs, what):
    m = Multiplier(window=4); m.step([1.])
    before = m.state_dict()
    with pytest.raises(ValueError, match=what): m.step(torch.tensor(costs))
    assert m.state_dict() == before


@pytest.mark.parametrize('bad', [dict(init=0.), dict(init=-1.), dict(init=6.), dict(init=math.nan),
                                 dict(min=2.), dict(min=-1.),
                                 dict(window=0), dict(delay=-1), dict(lr=-.1), dict(max=math.inf),
                                 dict(threshold=math.nan)])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError): Multiplier(**bad)


def test_resume_is_exact_through_json_and_torch(tmp_path):
    a = Multiplier(window=5, delay=1); b, c = Multiplier(window=5, delay=1), Multiplier(window=5, delay=1)
    for k in range(4): a.step(torch.randn(3, generator=torch.Generator().manual_seed(k)))
    torch.save(a.state_dict(), tmp_path / 'm.pt')
    b.load_state_dict(json.loads(json.dumps(a.state_dict())))
    c.load_state_dict(torch.load(tmp_path / 'm.pt'))
    for _ in range(3): assert a.step([.1, .2]) == b.step([.1, .2]) == c.step([.1, .2])
    assert a.state_dict() == b.state_dict() == c.state_dict()
    state = a.state_dict(); a.step([9.])
    assert state == b.state_dict()                                                       # a state is a copy
    with pytest.raises(ValueError): Multiplier(window=2).load_state_dict(state)
    with pytest.raises(ValueError): Multiplier().load_state_dict({'log_lam': 0.})


def test_cost_order_within_a_rollout_does_not_matter():
    costs = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert Multiplier(window=64).step(costs) == Multiplier(window=64).step(costs.flip(0))


def test_repr_prints_both_conventions():
    assert 'threshold=-3 (d=3)' in repr(Multiplier(threshold=-3))
    assert 'threshold=0 (d=0)' in repr(Multiplier())


# --- objectives
SCORES = dict(reward=torch.tensor([8.]), cost=torch.tensor([4.]))


def test_channels_by_hand():
    score = lambda o: {name: (f(SCORES).item(), sign) for name, (f, sign) in o.channels.items()}
    assert score(ppo()) == {'reward': (8., -1)}
    assert score(reward_shaping(3.)) == {'shaped': (-4., -1)}
    assert score(reward_shaping(3., normalise=True)) == {'shaped': (-1., -1)}
    assert score(ppo_lag(Multiplier())) == {'reward': (8., -1), 'cost': (4., +1)}


def test_weights_by_hand():
    assert ppo().weights(SCORES) == {'reward': 1.} and reward_shaping(3.).weights(SCORES) == {'shaped': 1.}
    w = ppo_lag(Multiplier(init=3.)).weights(SCORES)
    close([w['reward'], w['cost']], [.25, -.75])
    close(combine({'reward': torch.tensor([[8.]]), 'cost': torch.tensor([[4.]])}, w), [[-1.]])


def test_models_needed():
    assert ppo().scorers == ('reward',)
    assert reward_shaping(1.).scorers == ppo_lag(Multiplier()).scorers == ('reward', 'cost')
    assert ppo().critic_init == {'reward': 'reward'}
    assert reward_shaping(1.).critic_init == {'shaped': 'reward'}
    assert ppo_lag(Multiplier()).critic_init == {'reward': 'reward', 'cost': 'cost'}


def test_observe():
    scores = dict(reward=torch.tensor([1., 3.]), cost=torch.tensor([2., 6.]))
    assert ppo().observe(scores) == {'reward': 2., 'cost': 4.}
    assert ppo().observe({'reward': scores['reward']}) == {'reward': 2.}
    assert reward_shaping(2.).observe(scores) == {'reward': 2., 'cost': 4., 'shaped': -6.}
    assert reward_shaping(2.).state is None and ppo().state is None
    m = Multiplier(max=100., threshold=1.)
    o = ppo_lag(m); out = o.observe(scores)
    assert o.state is m and m.rollouts == 1  # lambda moves once, and here
    close(m.value, math.exp(.1 * 3))
    assert out == dict(reward=2., cost=4., lam=m.value, window_cost=4., threshold=1., cost_slope=4. + 2.)
    o.weights(scores)
    assert m.rollouts == 1  # asking for weights moves nothing
    close(o.weights(scores)['cost'], -m.value / (1 + m.value))


def test_negative_price_is_refused():
    for nu in (-1., math.nan, math.inf):
        with pytest.raises(ValueError, match='price'): reward_shaping(nu)


def test_combine_takes_one_weight_per_row_and_refuses_other_names():
    A = {'a': torch.ones(2, 3), 'b': torch.ones(2, 3)}
    assert combine(A, {'a': torch.tensor([1., 2.]), 'b': -.5}).tolist() == [[.5] * 3, [1.5] * 3]
    with pytest.raises(ValueError, match='weights for'): combine(A, {'a': 1.})


# --- identities
@pytest.fixture(params=range(2))
def world(request):
    g = torch.Generator().manual_seed(request.param)
    B, T = 5, 7
    rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    mask = (torch.arange(T) < torch.tensor([7, 4, 1, 0, 6])[:, None]).long()
    return dict(reward=rand(B), cost=rand(B)), rand(B, T), rand(B, T), rand(B, T), mask


def advantage(objective, scores, values, kl, mask, kl_coef=.1):
    A = {name: gae(token_rewards(f(scores), kl, mask, sign, kl_coef), values[name], mask)[0]
         for name, (f, sign) in objective.channels.items()}
    return combine(A, objective.weights(scores))


@pytest.mark.parametrize('lam', LAMBDAS)
def test_ppo_lag_at_fixed_lambda_is_normalised_reward_shaping(world, lam):
    scores, kl, Vr, Vc, mask = world
    lag = advantage(ppo_lag(Multiplier(init=lam)), scores, dict(reward=Vr, cost=Vc), kl, mask)
    close(lag, advantage(reward_shaping(lam, normalise=True), scores,
                         dict(shaped=(Vr - lam * Vc) / (1 + lam)), kl, mask))


@pytest.mark.parametrize('lam', LAMBDAS)
def test_kl_pressure_is_the_same_for_every_lambda(world, lam):
    scores, kl, _, _, mask = world
    none, zero = {k: 0 * v for k, v in scores.items()}, torch.zeros_like(kl)
    pressure = np.zeros(kl.shape)  # -kl_coef * kl, discounted by hand
    for i, n in enumerate(mask.sum(1).tolist()):
        for t in range(n): pressure[i, t] = sum(.95 ** (k - t) * -.1 * kl[i, k].item() for k in range(t, n))
    close(advantage(ppo_lag(Multiplier(init=lam)), none, dict(reward=zero, cost=zero), kl, mask), pressure)
    close(advantage(ppo(), none, dict(reward=zero), kl, mask), pressure)
    close(advantage(reward_shaping(lam), none, dict(shaped=zero), kl, mask), pressure)


def test_plain_shaping_feels_less_kl(world):
    scores, kl, Vr, _, mask = world
    zero, nu = torch.zeros_like(kl), 3.
    plain = advantage(reward_shaping(nu), scores, dict(shaped=zero), kl, mask, kl_coef=.1)
    close(plain / (1 + nu), advantage(reward_shaping(nu, normalise=True), scores, dict(shaped=zero), kl, mask,
                                      kl_coef=.1 / (1 + nu)))


# --- when the cost rises with lambda
def bandit(r, c, lam, kl_coef): # the exact optimum on a uniform reference -> answer probabilities
    z = np.exp((r - lam * c) / ((1 + lam) * kl_coef))
    return z / z.sum()


def slope_of(p, r, c): # cost_slope wants answers, not probabilities: draw each in proportion
    n = np.round(p * 200_000).astype(int)
    return cost_slope(torch.tensor(np.repeat(r, n)), torch.tensor(np.repeat(c, n)))


@pytest.mark.parametrize('r', [(-1., 0., 1.), (3., 0., -3.), (0., 2., -1.)])
@pytest.mark.parametrize('lam,kl_coef', [(.5, 1.), (2., 1.), (1., .5)])
def test_cost_slope_is_the_derivative(r, lam, kl_coef):
    r, c, h = np.array(r), np.array([-1., 0., 1.]), 1e-5
    slope = (bandit(r, c, lam + h, kl_coef) @ c - bandit(r, c, lam - h, kl_coef) @ c) / (2 * h)
    close(slope, -slope_of(bandit(r, c, lam, kl_coef), r, c) / ((1 + lam) ** 2 * kl_coef), 2e-3)


def test_counter_example_the_controller_runs_to_the_cap():
    r, c, e = np.array([3., 0., -3.]), np.array([-1., 0., 1.]), math.e
    close(bandit(r, c, 0., 1.) @ c, -(e ** 3 - e ** -3) / (e ** 3 + 1 + e ** -3))        # -0.948 at lambda 0
    costs = [bandit(r, c, lam, 1.) @ c for lam in (0., .5, 1., 2., 5.)]
    assert all(a < b for a, b in pairwise(costs)) and slope_of(bandit(r, c, 1., 1.), r, c) < 0
    m = Multiplier(lr=.2, threshold=-.9, window=1)
    for _ in range(400): m.step([bandit(r, c, m.value, 1.) @ c])
    assert m.value == 5. and costs[0] < -.9 < costs[-1]  # feasible at 0, never at the cap
