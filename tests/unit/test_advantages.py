"KL, sparse score and GAE: golden numbers from the definition as a double sum, cases by hand, invariances."
import math
import numpy as np
import pytest
import torch
from saferlhf.advantages import gae, kl_per_token, place_at_end, token_rewards

close = lambda a, b, tol=1e-10: np.testing.assert_allclose(np.asarray(a, dtype=float),
                                                           np.asarray(b, dtype=float), rtol=tol, atol=tol)
T = lambda x: torch.tensor(np.asarray(x))


@pytest.fixture(params=range(3))
def batch(request):
    g = np.random.default_rng(request.param)
    B, L = 6, 10
    lengths = g.integers(1, L + 1, B); lengths[3] = 0; lengths[0] = L
    mask = (np.arange(L) < lengths[:, None]).astype(np.int64)
    return lengths, mask, g.normal(size=(B, L)), g.normal(size=(B, L)), g.normal(size=B)


# A_t = sum_k (gamma lam)^k delta_{t+k}, row by row on the unpadded answer
def gae_np(rewards, values, lengths, gamma, lam):
    A, G = np.zeros_like(rewards), np.zeros_like(rewards)
    for i, n in enumerate(lengths):
        r, v = rewards[i, :n], np.append(values[i, :n], 0.)
        for t in range(n):
            A[i, t] = sum((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, n))
            G[i, t] = A[i, t] + v[t]
    return A, G


# --- kl, score, token rewards
def test_kl_sign():
    # likelier under the policy: positive
    assert kl_per_token(torch.tensor([[-1.]]), torch.tensor([[-3.]])).item() == 2.
    p, q = torch.tensor([.7, .3]).double(), torch.tensor([.4, .6]).double()
    assert (p * kl_per_token(p.log(), q.log())).sum() > 0                                   # a divergence


def test_place_at_end_golden(batch):
    lengths, mask, _, _, score = batch
    out = np.zeros(mask.shape)
    for i, n in enumerate(lengths):
        if n: out[i, n - 1] = score[i]
    for kind in (np.int64, bool, np.float64): close(place_at_end(T(score), T(mask.astype(kind))), out)


def test_nan_score_of_an_empty_row_stays_out():
    assert place_at_end(torch.tensor([math.nan]),
                        torch.zeros(1, 3, dtype=torch.int64)).tolist() == [[0., 0., 0.]]


def test_token_rewards_by_hand():
    kl, m = torch.tensor([[1., 2., 99.]]).double(), torch.tensor([[1, 1, 0]])
    close(token_rewards(T([10.]), kl, m, -1, 0.1), [[-.1, 9.8, 0.]])  # a reward pays for divergence
    close(token_rewards(T([10.]), kl, m, +1, 0.1), [[+.1, 10.2, 0.]])  # a cost grows with it


# --- GAE
@pytest.mark.parametrize('gamma,lam', [(1., .95), (.9, .8), (1., 1.), (1., 0.), (.5, 1.)])
def test_gae_golden(batch, gamma, lam):
    lengths, mask, rewards, values, _ = batch
    A, G = gae(T(rewards), T(values), T(mask), gamma, lam)
    A_np, G_np = gae_np(rewards, values, lengths, gamma, lam)
    close(A, A_np); close(G, G_np)


def test_gae_by_hand():
    A, G = gae(torch.tensor([[0., 8., 100.]]), torch.tensor([[2., 4., 100.]]), torch.tensor([[1, 1, 0]]),
               lam=.5)
    assert A.tolist() == [[4., 4., 0.]] and G.tolist() == [[6., 8., 0.]]


def test_gae_runs_backwards():
    A = lambda *rewards: gae(torch.tensor([rewards]), torch.zeros(1, 3), torch.ones(1, 3), lam=.5)[0].tolist()
    assert A(0., 0., 1.) == [[.25, .5, 1.]]  # credit flows to earlier tokens,
    assert A(1., 0., 0.) == [[1., 0., 0.]]  # never to later ones


def test_defaults_are_the_papers():
    r, v, m = torch.randn(2, 5), torch.randn(2, 5), torch.ones(2, 5)
    close(gae(r, v, m)[0], gae(r, v, m, gamma=1., lam=.95)[0])


def test_a_perfect_critic_leaves_no_advantage(batch):
    lengths, mask, rewards, _, _ = batch
    values = np.cumsum((rewards * mask)[:, ::-1], 1)[:, ::-1].copy()                        # rewards to come
    A, G = gae(T(rewards), T(values), T(mask))
    close(A, np.zeros(A.shape)); close(G, values * mask)


def test_gae_is_linear(batch):
    _, mask, r, v, _ = batch
    r2, v2 = np.flip(r, 0).copy(), np.flip(v, 1).copy()
    both = gae(T(2 * r - 3 * r2), T(2 * v - 3 * v2), T(mask))
    for out, a, b in zip(both, gae(T(r), T(v), T(mask)), gae(T(r2), T(v2), T(mask)),
                         strict=True): close(out, 2 * a - 3 * b)


@pytest.mark.parametrize('junk', [0., 1e6, math.nan, math.inf])
def test_right_padding_changes_nothing(batch, junk):
    _, mask, r, v, score = batch
    pad = lambda a: np.concatenate([np.where(mask == 1, a, junk), np.full((len(a), 4), junk)], 1)
    wide = np.concatenate([mask, np.zeros((len(mask), 4), dtype=np.int64)], 1)
    for a, b in zip(gae(T(pad(r)), T(pad(v)), T(wide)), gae(T(r), T(v), T(mask)), strict=True):
        close(a[:, :-4], b); close(a[:, -4:], np.zeros((len(a), 4)))
    close(token_rewards(T(score), T(pad(r)), T(wide), -1, .1)[:, :-4],
          token_rewards(T(score), T(r), T(mask), -1, .1))


def test_batch_order_changes_nothing(batch):
    _, mask, r, v, _ = batch
    order = torch.randperm(len(r), generator=torch.Generator().manual_seed(0))
    for a, b in zip(gae(T(r)[order], T(v)[order], T(mask)[order]), gae(T(r), T(v), T(mask)),
                    strict=True): close(a, b[order])


def test_advantages_are_constants_and_keep_fp32():
    v = torch.randn(2, 3, requires_grad=True)
    A, G = gae(torch.randn(2, 3), v, torch.ones(2, 3, dtype=torch.int64))
    assert not A.requires_grad and not G.requires_grad and A.dtype == G.dtype == torch.float32


def test_only_masks_of_lengths():
    for m in ([[0, 1, 1]], [[1, 0, 1]]):
        for kind in (torch.int64, torch.bool):
            with pytest.raises(ValueError, match='1 after a 0'):
                gae(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor(m, dtype=kind))
