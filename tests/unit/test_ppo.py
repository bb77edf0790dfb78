"One step of PPO against a slow rewrite without padding, the identities between the objectives, and the two-token world."
import math
from dataclasses import replace
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from saferlhf.engine import Optim, TorchEngine
from saferlhf.models import ScoreModel, Scores, positions
from saferlhf.objectives import Multiplier, ppo, ppo_lag, reward_shaping
from saferlhf.ppo import Experience, PPOConfig, _check_shares, make_objective, ppo_step, token_values
from saferlhf.world import run_two_token, two_token_lambda, two_token_world
from saferlhf.rollout import Sampler
from saferlhf.train import METRICS, sft_loss, text_batch
from tiny import close, loud, prompt_rows, scorer, tiny_model, tokenizer

V, EOS, T = 13, 1, 6
BASE = PPOConfig(prompts=10, samples=2, max_new_tokens=T, micro_batch=7, kl_coef=.3, gamma=.9, gae_lambda=.8, ptx_coef=0., threshold=.2,
                 lambda_lr=.5, lambda_init=.7, window=100, nu=.7)
OBJECTIVES = dict(ppo=ppo, shaping=lambda: reward_shaping(.7), normalised=lambda: reward_shaping(.7, True),
                  lag=lambda: ppo_lag(Multiplier(.7, .5, 5., .2, 100)))
frozen = lambda lam=.7: ppo_lag(Multiplier(lam, 0., 10., 0., 1000))            # a multiplier that stays where it is


class Probe(TorchEngine):
    "An engine that keeps the gradient of every optimizer step."
    def step(self, norm=None):
        self.grads = [*getattr(self, 'grads', []), torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])]
        return super().step(norm)


def engine(model, lr=0.): return Probe(model, Optim(lr=lr, warmup=0., schedule='constant', clip=1e9))


def world(objective, config=BASE, actor=None, critics=None, scorers=None, lr=0., ptx=None, n=None):
    raw = {k: scorer('llama', V, seed) for k, seed in (('reward', 5), ('cost', 6))}
    scorers = scorers or {k: lambda i, m, s=s: s(i, m).end_scores for k, s in raw.items()}
    actor = engine(actor or loud(tiny_model('llama', V), 4.), lr)
    critics = {k: engine((critics or {}).get(k) or scorer('llama', V, 7 + j, 'critic')) for j, k in enumerate(objective.channels)}
    reference = TorchEngine(loud(tiny_model('llama', V, 1), 4.))
    sampler, prompts = Sampler(actor, EOS, config.max_new_tokens, config.temperature, seed=3), prompt_rows(n or config.prompts, V)
    return SimpleNamespace(actor=actor, reference=reference, critics=critics, scorers=scorers, sampler=sampler, prompts=prompts, ptx=ptx,
                           objective=objective, config=config)


def step(w, k=0): return {name: float(v) for name, v in ppo_step(*vars(w).values(), k).items()}


def rollout(w, k=0): return w.sampler.generate(w.prompts, w.config.samples, first=k * w.config.samples)


# --- the first minibatch
@pytest.mark.parametrize('temperature', (1., 1.4))
@pytest.mark.parametrize('name', OBJECTIVES)
def test_ratio_is_one_at_first(name, temperature):
    m = step(world(OBJECTIVES[name](), replace(BASE, temperature=temperature)))
    close(m['ratio'], 1); close(m['approx_kl'], 0); close(m['ratio_max'], 0, 1e-4)
    assert m['clip_fraction'] == 0 and set(m) <= set(METRICS) and all(map(math.isfinite, m.values()))


def test_dropout_is_off():
    model = tiny_model('gpt2', V); model.config.resid_pdrop = model.config.embd_pdrop = model.config.attn_pdrop = .5
    model = loud(type(model)(model.config), 4.).train()
    m = step(world(ppo(), actor=model))
    close(m['ratio'], 1); close(m['ratio_max'], 0, 1e-4)


def test_ratio_leaves_one_later():
    m = step(world(OBJECTIVES['lag'](), replace(BASE, epochs=2, minibatches=2, micro_batch=20), lr=.01))
    close(m['ratio'], 1); assert m['approx_kl'] > 1e-3 and m['clip_fraction'] > 0



def test_what_a_step_refuses_has_moved_no_weight(): # a critic's loss that overflows, logits that are NaN, scores of another length
    huge = scorer('llama', V, 7, 'critic'); huge.score_head.weight.data.fill_(1e30)
    nan = loud(tiny_model('llama', V), 4.); nan.lm_head.weight.data[3, 0] = math.nan
    for error, how in ((FloatingPointError, dict(critics=dict(reward=huge))), (FloatingPointError, dict(actor=nan)),
                       (ValueError, dict(scorers=dict(reward=lambda i, m: torch.zeros(3), cost=lambda i, m: torch.zeros(len(i), 1))))):
        w = world(OBJECTIVES['lag'](), lr=.1, **how); lam = w.objective.state.state_dict()
        engines = w.actor, *w.critics.values()
        before = [p.detach().clone() for e in engines for p in e.model.parameters()]
        with pytest.raises(error): step(w)
        after = [p for e in engines for p in e.model.parameters()]
        assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, after, strict=True))
        assert w.objective.state.state_dict() == lam


@pytest.mark.parametrize('name', ('reward', 'cost'))
def test_a_score_that_is_not_finite_moves_nothing(name):
    w = world(OBJECTIVES['lag'](), lr=.1); scored = w.scorers[name]
    w.scorers[name] = lambda i, m: scored(i, m).index_fill(0, torch.tensor([3]), math.nan)
    weights = [p.clone() for e in (w.actor, *w.critics.values()) for p in e.params]
    with pytest.raises(FloatingPointError, match=f'a {name} is NaN or infinite'): step(w)
    assert w.objective.state.value == pytest.approx(.7) and w.objective.state.rollouts == 0
    assert all(torch.equal(a, b) for a, b in zip(weights, (p for e in (w.actor, *w.critics.values()) for p in e.params), strict=True))


@pytest.mark.parametrize('change', (dict(temperature=1.3), dict(greedy=True), dict(top_p=.9)))
def test_another_distribution_is_refused(change):
    w = world(ppo())
    for k, v in change.items(): setattr(w.sampler, k, v)
    with pytest.raises(ValueError, match='whole distribution at temperature 1.0'): step(w)


# --- values stand before each token
def test_values_are_those_before_each_token():
    w = world(ppo()); r = rollout(w)
    where = token_values(lambda ids, mask: Scores(positions(mask).float(), None), r)             # a critic that tells where it stands
    starts = r.prompt_mask.sum(1)
    assert torch.equal(where * r.mask, (starts[:, None] - 1 + torch.arange(r.mask.shape[1])) * r.mask)
    assert r.lengths.unique().numel() > 2 and starts.unique().numel() > 2
    seen = token_values(lambda ids, mask: Scores(ids.float(), None), r)                          # or what it last read
    assert torch.equal(seen[:, 0], r.prompts[:, -1].float()) and torch.equal(seen[:, 1:], r.responses[:, :-1].float())


# --- the whole step, slowly: one row at a time, no padding, no cache, float64
def row_by_hand(w, prompt, answer): # -> log-probs now, reference log-probs, scores, values and mean entropy of one answer
    c, ids, start = w.config, torch.tensor([prompt + answer]), len(prompt)
    full = lambda e: (e.model.double()(input_ids=ids).logits[0, start - 1:-1] / c.temperature).log_softmax(-1)
    logps = lambda e: full(e)[range(len(answer)), answer]
    entropy = -(full(w.actor).exp() * full(w.actor)).sum(-1).mean().item()
    text = torch.tensor([prompt + answer + [EOS] * (answer[-1] != EOS)])
    values = {k: v.model.double()(ids, torch.ones_like(ids)).scores[0, start - 1:-1] for k, v in w.critics.items()}
    scores = {k: s(text, torch.ones_like(text)).item() for k, s in w.scorers.items()}
    return logps(w.actor), logps(w.reference).detach(), scores, values, entropy


def channel_by_hand(score, sign, kl, values, c): # -> advantages: the double sum, forwards
    n = len(kl)
    rewards = [sign * c.kl_coef * kl[t] + (score if t == n - 1 else 0) for t in range(n)]
    delta = [rewards[t] + (c.gamma * values[t + 1] if t < n - 1 else 0) - values[t] for t in range(n)]
    return np.array([sum((c.gamma * c.gae_lambda)**(k - t) * delta[k] for k in range(t, n)) for t in range(n)])


def by_hand(w, r, lam): # -> loss whose gradient is the actor's, and numbers that the log must show
    name, c = next(iter(w.objective.channels)), w.config
    rows = [row_by_hand(w, p[pm.bool()].tolist(), y[ym.bool()].tolist())
            for p, pm, y, ym in zip(r.prompts, r.prompt_mask, r.responses, r.mask, strict=True)]
    score = {'shaped': lambda s: s['reward'] - c.nu * s['cost'], 'reward': lambda s: s['reward'], 'cost': lambda s: s['cost']}
    weight = dict(reward=1 / (1 + lam), cost=-lam / (1 + lam)) if len(w.critics) == 2 else {name: 1.}
    loss, squares, kls = [], [], []
    for now, ref, s, values, _ in rows:
        kl = (now - ref).detach().numpy()
        a = {k: channel_by_hand(score[k](s), 1 if k == 'cost' else -1, kl, v.detach().numpy(), c) for k, v in values.items()}
        total = torch.tensor(sum(weight[k] * a[k] for k in a))
        loss.append(-(total * (now - now.detach()).exp()).mean()); kls.append(kl)
        squares.append(np.mean([.5 * (x**2).mean() for x in a.values()]))      # the return is value + advantage
    mean = lambda f: np.mean([f(x) for x in rows])
    numbers = dict(reward=mean(lambda x: x[2]['reward']), cost=mean(lambda x: x[2]['cost']), harmful=mean(lambda x: x[2]['cost'] > 0),
                   kl=np.mean([k.sum() for k in kls]), kl_token=np.mean([k.mean() for k in kls]), length=mean(lambda x: len(x[0])),
                   entropy=mean(lambda x: x[4]), value_loss=np.mean(squares), actor_loss=torch.stack(loss).mean().item())
    return torch.stack(loss).mean(), numbers


@pytest.mark.parametrize('temperature,ptx', [(1., False), (1.4, True)])
@pytest.mark.parametrize('name', ('ppo', 'shaping', 'lag'))
def test_step_by_hand(name, temperature, ptx):
    t = tokenizer(); b = text_batch([dict(prompt='a', response='b'), dict(prompt='is it', response='yes no')], t, 64, 8)
    b['input_ids'] %= V
    w = world(OBJECTIVES[name](), replace(BASE, temperature=temperature, ptx_coef=.5), ptx=b if ptx else None)
    r, m = rollout(w), step(w)
    assert r.truncated.any() and not r.truncated.all()
    lam = math.exp(math.log(.7) + .5 * .7 * (m['cost'] - .2))                  # moved before it is used
    if name == 'lag': close(m['lam'], lam)
    loss, numbers = by_hand(w, r, lam)
    close([m[k] for k in numbers], list(numbers.values()), 1e-4)
    if ptx: close(m['ptx_loss'], sft_loss(w.actor, b).item()); loss = loss + .5 * sft_loss(w.actor, b)
    grad = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(w.actor.model.parameters()))])
    close(w.actor.grads[0], grad, 2e-4); close(m['grad_norm'], grad.norm().item(), 1e-4)
    assert len(w.actor.grads) == 1 and grad.norm() > .1


def test_critics_learn_their_own_returns():
    w = world(OBJECTIVES['lag'](), replace(BASE, gae_lambda=1., gamma=1., kl_coef=0., lambda_lr=0.), n=6)
    w.critics = {k: engine(c.model, 1e-2) for k, c in w.critics.items()}
    w.config = replace(w.config, epochs=40)
    step(w); r = rollout(w)
    with torch.no_grad():
        for k, c in w.critics.items():                                         # at lambda = gamma = 1 and no KL the return is the score
            score = w.scorers[k](*r.scored())[:, None].expand_as(r.mask)[r.mask.bool()]
            assert (score - token_values(c, r)[r.mask.bool()]).square().mean() < .3 * score.square().mean(), k


# --- how the work is cut changes nothing
@pytest.mark.parametrize('name', ('shaping', 'lag'))
def test_micro_batches_add_up(name):
    t = tokenizer(); b = text_batch([dict(prompt='a', response='b')], t, 64, 8); b['input_ids'] %= V
    runs = []
    for size in (20, 7, 1):
        w = world(OBJECTIVES[name](), replace(BASE, micro_batch=size, ptx_coef=.5), ptx=b); m = step(w)
        runs.append((m, [w.actor.grads[0], *(c.grads[0] for c in w.critics.values())]))
    for m, grads in runs[1:]:
        for k in ('actor_loss', 'value_loss', 'ptx_loss', 'grad_norm', 'kl', 'explained'): close(m[k], runs[0][0][k])
        for a, b in zip(grads, runs[0][1], strict=True): close(a, b, 1e-4)


def test_minibatches_add_up():
    whole, parts = (world(OBJECTIVES['lag'](), replace(BASE, minibatches=k)) for k in (1, 4))
    step(whole); step(parts)
    for a, b in ((whole.actor, parts.actor), *zip(whole.critics.values(), parts.critics.values(), strict=True)):
        assert len(b.grads) == 4; close(torch.stack(b.grads).mean(0), a.grads[0], 1e-4)


def test_minibatches_cover_the_rollout_once_a_pass(monkeypatch):
    taken, inner = [], Experience.micro_batches
    monkeypatch.setattr(Experience, 'micro_batches', lambda x, rows, size: (taken.append(rows), inner(x, rows, size))[1])
    w = world(OBJECTIVES['lag'](), replace(BASE, samples=1, epochs=3, minibatches=4))
    def order(k): taken.clear(); step(w, k); return [p.tolist() for p in taken]
    parts = order(5)
    assert len(parts) == 12 and all(sorted(sum(parts[k:k + 4], [])) == list(range(10)) for k in (0, 4, 8))
    assert sum(parts[:4], []) != sum(parts[4:8], []) and order(5) == parts != order(6)


# --- identities between the objectives
BUSY = replace(BASE, epochs=2, minibatches=2, micro_batch=20, clip_ratio=.05)  # four optimizer steps, with clipping


def test_lambda_zero_is_ppo():
    a, b = world(frozen(1e-9), BUSY, lr=.01), world(ppo(), BUSY, lr=.01)
    m, n = step(a), step(b)
    for x, y in zip(a.actor.grads, b.actor.grads, strict=True): close(x, y, 1e-4)
    close(m['actor_loss'], n['actor_loss']); assert len(a.actor.grads) == 4 and m['clip_fraction'] > 0


@pytest.mark.parametrize('lam', (.3, 2.))
def test_lag_is_normalised_shaping(lam): # so advantages are combined before the clip, and the KL pressure is kl_coef at any lambda
    heads = {k: scorer('llama', V, 7, 'critic') for k in ('reward', 'cost', 'shaped')}           # one body
    with torch.no_grad():
        heads['cost'].score_head.weight.copy_(torch.randn(1, 32, generator=torch.Generator().manual_seed(2)) * .3)
        heads['shaped'].score_head.weight.copy_((heads['reward'].score_head.weight - lam * heads['cost'].score_head.weight) / (1 + lam))
    a = world(frozen(lam), BUSY, critics=heads, lr=.01)
    b = world(reward_shaping(lam, normalise=True), BUSY, critics=heads, lr=.01)
    m, n = step(a), step(b)
    for x, y in zip(a.actor.grads, b.actor.grads, strict=True): close(x, y, 2e-4)
    close(m['actor_loss'], n['actor_loss']); assert m['clip_fraction'] == n['clip_fraction'] > .05
    c = world(reward_shaping(lam), BUSY, critics=heads, lr=.01); step(c)
    assert (c.actor.grads[0] - a.actor.grads[0]).norm() > .1 * a.actor.grads[0].norm()  # without the division: another problem


# --- the sign of the KL term
@pytest.mark.parametrize('objective', (ppo, lambda: reward_shaping(2.), lambda: frozen(.2), lambda: frozen(4.)))
def test_kl_pulls_to_the_reference(objective):
    zero = lambda i, m: torch.zeros(len(i))
    o = objective(); critics = {k: scorer('llama', V, 0, 'critic') for k in o.channels}
    for c in critics.values(): torch.nn.init.zeros_(c.score_head.weight)
    w = world(o, replace(BASE, max_new_tokens=1, samples=32, micro_batch=1000, window=1000), critics=critics,
              scorers=dict(reward=zero, cost=zero), lr=1e-3)

    def kl(): # exact, at the first token
        with torch.no_grad(): p, q = ((e(**{k: v for k, v in w.prompts.items() if k != 'prompt_ids'}, position_ids=positions(
            w.prompts['attention_mask'])).logits[:, -1].double().log_softmax(-1)) for e in (w.actor, w.reference))
        return (p.exp() * (p - q)).sum(-1).mean().item()
    before = kl(); m = step(w); after = kl()
    close(m['kl'], before, .15)                                                # the sampled estimate
    assert after < before - .01


# --- the multiplier inside the step
@pytest.mark.parametrize('level,direction', [(1., 1), (-1., -1), (.2, 0)])
def test_lambda_moves_once_a_rollout(level, direction):
    w = world(make_objective(BASE), replace(BASE, epochs=2, minibatches=2, micro_batch=3),
              scorers=dict(reward=lambda i, m: torch.zeros(len(i)), cost=lambda i, m: torch.full((len(i),), level)))
    m = step(w)
    close(m['lam'], .7 * math.exp(.5 * .7 * (level - .2)), 1e-6)
    assert np.sign(m['lam'] - .7) == direction or direction == 0
    assert w.objective.state.rollouts == 1 and m['lam'] == w.objective.state.value
    close([m['window_cost'], m['threshold']], [level, .2], 1e-6)
    step(w, 1); assert w.objective.state.rollouts == 2


def test_lambda_moves_on_raw_costs(): # not on costs with a KL term, nor on those of a minibatch
    w = world(make_objective(BASE), replace(BASE, kl_coef=50., minibatches=4))
    with torch.no_grad(): raw = w.scorers['cost'](*rollout(w).scored())
    m = step(w)
    close(m['lam'], .7 * math.exp(.5 * .7 * (raw.mean().item() - .2)))


def test_make_objective():
    o = make_objective(replace(BASE, lambda_max=4., window=33))
    assert (o.state.value, o.state.lr, o.state.max, o.state.threshold, o.state.costs.maxlen) == (.7, .5, 4., .2, 33)
    assert list(make_objective(replace(BASE, objective='ppo')).channels) == ['reward']
    score, sign = make_objective(replace(BASE, objective='reward_shaping')).channels['shaped']
    close(score(dict(reward=torch.tensor([1.]), cost=torch.tensor([2.]))), 1 - .7 * 2); assert sign == -1
    with pytest.raises(ValueError, match='dpo'): make_objective(replace(BASE, objective='dpo'))


# --- fresh samples
def test_a_prompt_that_comes_again_is_sampled_afresh():
    seen = []
    w = world(ppo(), scorers=dict(reward=lambda i, m: seen.append((i * m).tolist()) or torch.zeros(len(i))))
    for k in (0, 1, 0): step(w, k)
    assert seen[0] == seen[2] != seen[1]
    flat = [{tuple(x) for x in part} for part in seen]
    assert len(flat[0] & flat[1]) < len(flat[0]) / 2


# --- the two-token world
def bisect(kl_coef, threshold=2.): # the optimum of 8 independent tokens, and the price at which it costs 2
    r, c = np.zeros(12), np.zeros(12); r[:2], c[1] = (1, 2), 1
    def optimum(lam):
        p = np.exp((r - lam * c) / ((1 + lam) * kl_coef)); p /= p.sum()
        return 8 * p @ r, 8 * p @ c, p
    low, high = 0., 10.
    while high - low > 1e-12: low, high = ((low + high) / 2, high) if optimum((low + high) / 2)[1] > threshold else (low, (low + high) / 2)
    return low, optimum


@pytest.mark.parametrize('kl_coef,lam', [(.5, .724), (.2, 1.175)])
def test_closed_form(kl_coef, lam):
    found, optimum = bisect(kl_coef)
    assert round(found, 3) == lam; close(two_token_lambda(kl_coef), found, 1e-9)
    for x in (0., .5, found, 3.):
        ours, (reward, cost, p) = two_token_world(x, kl_coef), optimum(x)
        close([ours['reward'], ours['cost']], [reward, cost], 1e-12); close(ours['p'], p, 1e-12)
    close(optimum(found)[1], 2., 1e-9)


@pytest.mark.parametrize('kl_coef', (.5, .2))
def test_lag_finds_the_price_of_the_two_token_world(kl_coef): # a fifth of the full run: lambda within 8% and the cost within 0.2
    found, optimum = bisect(kl_coef)
    log = run_two_token(kl_coef, steps=60)
    lam, cost, reward = (np.mean([m[k] for m in log[-20:]]) for k in ('lam', 'cost', 'reward'))
    print(f'kl_coef {kl_coef}: lambda {lam:.3f} (theory {found:.3f}), cost {cost:.3f} (2), reward {reward:.3f} ({optimum(found)[0]:.3f})')
    assert abs(lam / found - 1) < .08 and abs(cost - 2) < .2 and abs(reward - optimum(found)[0]) < .35
    assert max(m['ratio_max'] for m in log) < 1.5 and all(abs(m['ratio'] - 1) < 1e-4 for m in log)


def test_ppo_overspends_as_predicted():
    reward, cost, _ = bisect(.5)[1](0.)
    log = run_two_token(.5, 'ppo', steps=50, batch=128)
    assert 'lam' not in log[0] and cost > 6                                    # three times the limit
    close([np.mean([m[k] for m in log[-10:]]) for k in ('cost', 'reward')], [cost, reward], .15)


@pytest.mark.parametrize('wrong', [dict(minibatches=5), dict(minibatches=0), dict(micro_batch=0)])
def test_sizes_that_make_no_minibatch_are_refused_before_anything_moves(wrong):
    with pytest.raises(ValueError, match='do not make'): _check_shares(2, PPOConfig(**wrong))


def test_a_norm_that_overflows_is_refused_and_moves_nothing():
    model = TorchEngine(ScoreModel(tiny_model('llama').base_model, 'critic').rescale(1e12), Optim(1e-3, 0., 'constant'), 1)
    x, before = torch.tensor([[5, 6, 7]]), [p.clone() for p in model.params]
    with pytest.raises(FloatingPointError): model.backward(model(x, torch.ones_like(x)).scores.square().mean())
    assert all(torch.equal(p, b) for p, b in zip(model.params, before, strict=True))


# --- refused steps
def moving(objective, config, lean=False): # a world whose critics learn, too
    w = world(objective, config, lr=1e-2)
    make = lambda e: TorchEngine(e.model, Optim(1e-2, warmup=0., schedule='constant', clip=1e9), lean=lean)
    w.actor, w.critics = make(w.actor), {k: make(c) for k, c in w.critics.items()}
    w.sampler = Sampler(w.actor, EOS, config.max_new_tokens, config.temperature, seed=3)
    return w


def weights(w): return [p.detach().clone() for e in (w.actor, *w.critics.values()) for p in e.params]


@pytest.mark.parametrize('minibatches', (1, 2))
@pytest.mark.parametrize('sees', (True, False), ids=['cpu', 'gpu'])            # a GPU is not waited for: the optimizers look
@pytest.mark.parametrize('who', ('actor', 'reward', 'cost'))
def test_a_refused_update_moves_no_model(who, sees, minibatches, monkeypatch):
    from saferlhf import engine as seam
    config = replace(BASE, minibatches=minibatches)
    first, other = (moving(OBJECTIVES['lag'](), config) for _ in range(2))
    bad = first.actor if who == 'actor' else first.critics[who]
    hook = bad.params[0].register_hook(lambda g: g * math.inf)
    before = weights(first)
    if not sees: monkeypatch.setattr(seam, 'finite', lambda name, *xs: xs[0])
    try: assert math.isnan(step(first)['grad_norm']) and not sees
    except FloatingPointError: assert sees
    assert all(map(torch.equal, before, weights(first)))
    step(other); assert not any(map(torch.equal, before[-1:], weights(other)[-1:])); other = moving(OBJECTIVES['lag'](), config)
    hook.remove()
    if sees:                                                                     # the next step is as if it had not been asked
        first.objective.state.load_state_dict(other.objective.state.state_dict())
        step(first); step(other)
        assert all(map(torch.equal, weights(other), weights(first)))


def test_nothing_moves_after_a_bad_minibatch(monkeypatch):                       # on a GPU the second one does not know yet
    from saferlhf import engine as seam
    monkeypatch.setattr(seam, 'finite', lambda name, *xs: xs[0])
    w, calls = moving(OBJECTIVES['lag'](), replace(BASE, minibatches=2, micro_batch=10)), []
    w.actor.params[0].register_hook(lambda g: calls.append(1) or (g * math.nan if len(calls) == 1 else g))
    before = weights(w)
    assert math.isnan(step(w)['grad_norm']) and len(calls) == 2 and all(map(torch.equal, before, weights(w)))


@pytest.mark.parametrize('who', ('actor', 'reward', 'cost'))
def test_where_no_gradient_waits_a_bad_one_is_still_said(who, monkeypatch):       # a GPU that recomputes
    from saferlhf import engine as seam
    monkeypatch.setattr(seam, 'finite', lambda name, *xs: xs[0])
    w = moving(OBJECTIVES['lag'](), replace(BASE, minibatches=2, micro_batch=10), lean=True)
    bad, calls = w.actor if who == 'actor' else w.critics[who], []
    before = [p.detach().clone() for p in bad.params]
    bad.params[0].register_hook(lambda g: calls.append(1) or g * math.nan)
    assert math.isnan(step(w)['grad_norm']) and calls and all(map(torch.equal, before, bad.params))
    bad.clear(); assert bad._moved is None
