"Losses against a float64 NumPy rewrite, numbers by hand, and properties that a sign flip would break."
import math
import numpy as np
import pytest
import torch
from saferlhf.losses import (actor_loss, cost_loss, critic_loss, lm_loss, lm_loss_from_logp, masked_mean,
                             pairwise_loss, reward_loss)

SEEDS = range(3)
close = lambda a, b, tol=1e-10: np.testing.assert_allclose(np.asarray(a, dtype=float),
                                                           np.asarray(b, dtype=float), rtol=tol, atol=tol)
T = lambda x: torch.tensor(np.asarray(x))
softplus = lambda x: np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)         # -log sigmoid(x) = softplus(-x)


def rows_np(x, lengths): # the slow obvious mean: slice each row, no mask at all
    means = [x[i, :n].mean() for i, n in enumerate(lengths) if n]
    return sum(means) / len(means)


@pytest.fixture(params=SEEDS)
def batch(request):
    g = np.random.default_rng(request.param)
    B, L = 7, 9
    lengths = g.integers(1, L + 1, B); lengths[2] = 0; lengths[0] = L
    mask = (np.arange(L) < lengths[:, None]).astype(np.int64)
    x = {k: g.normal(size=(B, L)) for k in ('logp', 'old', 'adv', 'values', 'old_values', 'returns')}
    x['old'] = x['logp'] + 0.3 * x['old']
    return lengths, mask, x


@pytest.fixture(params=SEEDS)
def pairs(request):
    g = np.random.default_rng(100 + request.param)
    high, low = 2 * g.normal(size=(2, 11))
    return high, low, g.integers(-1, 2, 11), g.integers(-1, 2, 11), g.integers(0, 2, 11).astype(float)


# --- masked_mean
def test_masked_mean_golden(batch):
    lengths, mask, x = batch
    close(masked_mean(T(x['adv']), T(mask)), rows_np(x['adv'], lengths))
    for kind in (bool, np.float64): close(masked_mean(T(x['adv']), T(mask.astype(kind))),
                                          rows_np(x['adv'], lengths))


def test_masked_mean_counts_sequences_not_tokens():
    x, m = torch.tensor([[2., 2., 2., 2.], [8., 0., 0., 0.]]), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    assert masked_mean(x, m) == 5.                                           # a token mean would be 3.2


def test_empty_rows_give_zero_and_no_nan_gradient():
    x = torch.full((2, 3), math.nan).masked_fill(torch.tensor([[True, False, False], [False] * 3]),
                                                 4.).requires_grad_()
    m = torch.tensor([[1, 0, 0], [0, 0, 0]])
    out = masked_mean(x, m); out.backward()
    assert out == 4. and x.grad.tolist() == [[1., 0., 0.], [0., 0., 0.]]
    assert masked_mean(x[1:], m[1:]) == 0.


# --- pairwise, reward
def test_pairwise_and_reward_golden(pairs):
    high, low, *_ = pairs
    order = softplus(-(high - low)).mean()
    close(pairwise_loss(T(high), T(low)), order)
    close(reward_loss(T(high), T(low), 0.3), order + 0.3 * np.concatenate([high, low]).__pow__(2).mean())


def test_swapping_high_and_low_mirrors_the_loss(pairs):
    high, low, hs, ls, _ = pairs
    close(pairwise_loss(T(low), T(high)) - pairwise_loss(T(high), T(low)), (high - low).mean())
    close(pairwise_loss(T(-low), T(-high)), pairwise_loss(T(high), T(low)))
    # harm turned round everywhere
    close(cost_loss(T(-low), T(-high), T(-ls), T(-hs), 0.1), cost_loss(T(high), T(low), T(hs), T(ls), 0.1))


def test_pairwise_by_hand():
    close(pairwise_loss(T([math.log(3)]), T([0.])), math.log(4 / 3))
    close(pairwise_loss(T([0.]), T([math.log(3)])), math.log(4))
    close(pairwise_loss(T([-1000.]), T([1000.])), 2000.)                     # no overflow


# --- cost
def test_cost_golden(pairs):
    high, low, hs, ls, paired = pairs
    total = 0.
    for h, l, a, b, p in zip(high, low, hs, ls, paired, strict=True):
        total += p * softplus(l - h) + 0.2 * (h * h + l * l) / 2
        total += 0.7 * ((softplus(-a * h) if a else 0.) + (softplus(-b * l) if b else 0.))
    close(cost_loss(T(high), T(low), T(hs), T(ls), 0.2, pairwise=T(paired), sign=0.7), total / len(high))


def test_cost_signs_by_hand():
    a, one = math.log(3), torch.tensor([1])
    high, low = T([a]), T([-a])
    close(cost_loss(high, low, one, -one), math.log(10 / 9) + 2 * math.log(4 / 3))
    close(cost_loss(high, low, -one, one), math.log(10 / 9) + 2 * math.log(4))
    close(cost_loss(high, low, one, 0 * one, pairwise=0.), math.log(4 / 3))
    # `low` labelled harmful at a negative cost
    close(cost_loss(high, low, 0 * one, one, pairwise=0.), math.log(4))


def test_cost_gradient_pushes_harmful_up_and_safe_down():
    high, low = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    cost_loss(high, low, torch.tensor([1]), torch.tensor([-1]), pairwise=0.).backward()
    assert high.grad == -0.5 and low.grad == 0.5                             # descent: harmful up, safe down
    high.grad = low.grad = None
    cost_loss(high, low, torch.tensor([0]), torch.tensor([0])).backward()
    assert high.grad == -0.5 and low.grad == 0.5  # order alone: the more harmful one up


def test_sign_zero_contributes_nothing_and_divides_by_the_batch(pairs):
    high, low, hs, ls, _ = pairs
    zero = torch.zeros(len(high), dtype=torch.int64)
    close(cost_loss(T(high), T(low), zero, zero), pairwise_loss(T(high), T(low)))
    one = zero.clone(); one[0] = 1
    close(cost_loss(T(high), T(low), one, zero, pairwise=0.), softplus(-high[0]) / len(high))


def test_unpaired_rows_feed_only_the_sign_terms():
    one = torch.tensor([1, 1])
    both = cost_loss(T([2., 5.]), T([1., -5.]), one, -one, pairwise=T([1., 0.]))
    close(both, (softplus(-1.) + softplus(-2.) + softplus(1.) + softplus(-5.) + softplus(-5.)) / 2)
    close(cost_loss(T([2., 5.]), T([1., -5.]), one, -one, sign=T([0., 0.])),
          (softplus(-1.) + softplus(-10.)) / 2)


# --- actor, critic
def actor_np(logp, old, adv, lengths, eps):
    out = np.zeros_like(logp)
    for i, t in np.ndindex(*logp.shape):
        ratio = math.exp(logp[i, t] - old[i, t])
        out[i, t] = min(ratio * adv[i, t], min(max(ratio, 1 - eps), 1 + eps) * adv[i, t])
    return -rows_np(out, lengths)


def critic_np(v, old, ret, lengths, clip):
    out = np.zeros_like(v)
    for i, t in np.ndindex(*v.shape):
        near = old[i, t] + min(max(v[i, t] - old[i, t], -clip), clip)
        out[i, t] = max((v[i, t] - ret[i, t]) ** 2, (near - ret[i, t]) ** 2)
    return 0.5 * rows_np(out, lengths)


def test_actor_and_critic_golden(batch):
    lengths, mask, x = batch
    close(actor_loss(T(x['logp']), T(x['old']), T(x['adv']), T(mask), 0.2),
          actor_np(x['logp'], x['old'], x['adv'], lengths, 0.2))
    close(critic_loss(T(x['values']), T(x['old_values']), T(x['returns']), T(mask), 0.5),
          critic_np(x['values'], x['old_values'], x['returns'], lengths, 0.5))


def test_actor_by_hand():
    m, zero = torch.ones(1, 1), torch.zeros(1, 1)
    for ratio, adv, loss in ((1., 3., -3.), (1.5, 2., -2.4), (1.5, -2., 3.), (.5, 2., -1.), (.5, -2., 1.6)):
        close(actor_loss(torch.full((1, 1), math.log(ratio)), zero, torch.full((1, 1), adv), m, 0.2), loss,
              1e-6)


def test_first_minibatch_is_the_policy_gradient():
    logp = torch.tensor([[-1., -2.]], requires_grad=True)
    actor_loss(logp, logp.detach(), torch.tensor([[4., -6.]]), torch.ones(1, 2), 0.2).backward()
    assert logp.grad.tolist() == [[-2., 3.]]  # descent raises the good token and lowers the bad one


def test_critic_by_hand():
    m = torch.ones(1, 1)
    for value, clip, loss in ((3., 1., 4.5), (-3., 1., 24.5), (3., 100., .5)):
        assert critic_loss(torch.full((1, 1), value), torch.zeros(1, 1), torch.full((1, 1), 4.), m,
                           clip) == loss


# --- language modelling
def lm_np(logits, labels):
    means = []
    for z, y in zip(logits, labels, strict=True):
        logp = [z[t, y[t + 1]] - np.log(np.exp(z[t]).sum()) for t in range(len(y) - 1) if y[t + 1] != -100]
        if logp: means.append(sum(logp) / len(logp))
    return -sum(means) / len(means)


@pytest.mark.parametrize('seed', SEEDS)
def test_lm_golden(seed):
    g = np.random.default_rng(seed)
    logits, labels = g.normal(size=(5, 8, 6)), g.integers(0, 6, (5, 8))
    for row, (a, b) in enumerate(((2, 8), (0, 5), (3, 4), (8, 8), (0, 1))): # the last two rows have no target
        labels[row, :a] = labels[row, b:] = -100
    close(lm_loss(T(logits), T(labels)), lm_np(logits, labels))


def test_lm_shift_by_hand():
    # position 0 predicts token 2, position 1 predicts token 1
    sure = torch.zeros(1, 3, 4); sure[0, 0, 2] = sure[0, 1, 1] = 50.
    close(lm_loss(sure, torch.tensor([[3, 2, 1]])), 0., 1e-6)
    close(lm_loss(sure, torch.tensor([[2, 1, 3]])), 50., 1e-5)               # labels one place early
    close(lm_loss(torch.zeros(1, 3, 4), torch.tensor([[-100, -100, 1]])), math.log(4), 1e-6)


def test_lm_from_logp_and_half_precision():
    close(lm_loss_from_logp(torch.tensor([[-1., -3., math.nan]]), torch.tensor([[1, 1, 0]])), 2.)
    logits, labels = torch.randn(2, 5, 7).bfloat16(), torch.randint(0, 7, (2, 5))
    assert lm_loss(logits, labels).dtype == torch.float32
    close(lm_loss(logits, labels), lm_loss(logits.float(), labels), 0)


# --- what batches, padding and ranks must not change
def calls(x, mask): # name -> loss of rows i
    f = lambda k, i: T(x[k])[i]
    m = T(mask)
    return dict(
        masked_mean=lambda i, **d: masked_mean(f('adv', i), m[i], **d),
        actor=lambda i, **d: actor_loss(f('logp', i), f('old', i), f('adv', i), m[i], 0.2, **d),
        critic=lambda i, **d: critic_loss(f('values', i), f('old_values', i), f('returns', i), m[i], 0.5,
                                          **d),
        lm=lambda i, **d: lm_loss_from_logp(f('logp', i), m[i], **d))


def test_micro_batches_add_up(batch, pairs):
    lengths, mask, x = batch
    # unequal; the second is one empty row
    rows, parts = int((lengths > 0).sum()), (slice(0, 2), slice(2, 3), slice(3, 7))
    for loss in calls(x, mask).values():
        close(sum(loss(i, denominator=rows) for i in parts), loss(slice(None)))
    high, low, hs, ls, paired = map(T, pairs)
    parts, n = (slice(0, 1), slice(1, 1), slice(1, 6), slice(6, 11)), 11  # unequal; the second is empty
    for loss in (lambda i, **d: pairwise_loss(high[i], low[i], **d), lambda i,
                 **d: reward_loss(high[i], low[i], 0.3, **d),
                 lambda i, **d: cost_loss(high[i], low[i], hs[i], ls[i], 0.3, pairwise=paired[i], sign=0.5,
                                          **d)):
        close(sum(loss(i, denominator=n) for i in parts), loss(slice(None)))


def test_micro_batches_of_lm_loss_add_up():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 5, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 5, (4, 6), generator=g)
    labels[0, :4] = -100; labels[3] = -100
    close(lm_loss(logits[:1], labels[:1], denominator=3) + lm_loss(logits[1:], labels[1:], denominator=3),
          lm_loss(logits, labels))


def test_batch_order_changes_nothing(batch, pairs):
    lengths, mask, x = batch
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(1))
    for loss in calls(x, mask).values(): close(loss(order), loss(slice(None)))
    high, low, hs, ls, paired = map(T, pairs)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(2))
    close(cost_loss(high[order], low[order], hs[order], ls[order], .3, paired[order]),
          cost_loss(high, low, hs, ls, .3, paired))


@pytest.mark.parametrize('junk', [0., 1e4, -1e4, math.nan, math.inf])
def test_right_padding_changes_nothing(batch, junk):
    lengths, mask, x = batch
    pad = lambda a, value: np.concatenate([np.where(mask == 1, a, value), np.full((len(a), 3), value)], 1)
    wide = {k: pad(v, junk if k in ('logp', 'adv', 'values') else -junk) for k, v in x.items()}
    wide_mask = np.concatenate([mask, np.zeros((len(mask), 3), dtype=np.int64)], 1)
    for name, loss in calls(x, mask).items(): close(calls(wide, wide_mask)[name](slice(None)),
                                                    loss(slice(None)))


@pytest.mark.parametrize('junk', [1e4, math.nan, math.inf])
def test_padding_gets_no_gradient(junk):
    m = torch.tensor([[1, 0]])
    for loss in (lambda v: actor_loss(v, torch.zeros(1, 2), torch.ones(1, 2), m, .2),
                 lambda v: lm_loss_from_logp(v, m),
                 lambda v: critic_loss(v, torch.zeros(1, 2), torch.ones(1, 2), m, .2)):
        v = torch.tensor([[0.1, junk]], requires_grad=True)
        loss(v).backward()
        assert v.grad[0, 0] != 0 and v.grad[0, 1] == 0
