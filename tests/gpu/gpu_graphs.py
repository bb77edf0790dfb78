"Recorded passes against passes as they come, on a GPU: states, gradients, steps, sizes, order, memory. Prints what it measured."
import gc
import torch
from saferlhf.engine import Optim, TorchEngine
from saferlhf.hardware.adapters import Body, Lora, role_of
from saferlhf.hardware.graphs import recorded_bytes, size_of
from saferlhf.hardware.packing import layout
from saferlhf.hardware.precision import prepare
from saferlhf.models import TINY, ScoreModel, llama, tiny_model, token_logps
from saferlhf.objectives import Multiplier, ppo_lag
from saferlhf.ppo import PPOConfig, ppo_step
from saferlhf.rollout import Sampler
from saferlhf.train import score_step, sft_step

V, T = 61, 24
OPTIM = Optim(lr=1e-3, warmup=0., schedule='constant')


def loud(model):
    with torch.no_grad():
        for p in model.parameters(): p.mul_(4. if p.ndim > 1 else 1.)           # flat distributions would hide mistakes
    return model


def lm(arch='llama'): return loud(tiny_model(arch, V))


def tied(): return loud(llama(V, 64, 3, 4, 2, 96))


def batch(B, seed, longest=60): # prompts padded on the left, answers on the right
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.randint(1, n + 1, (B,), generator=g) for n in (longest - T, T))
    at = torch.arange(longest)
    mask = ((at >= longest - T - left[:, None]) & (at < longest - T + right[:, None])).long()
    ids = torch.randint(2, V, (B, longest), generator=g) * mask - 100 * (1 - mask)        # padding may be anything
    return dict(input_ids=ids, attention_mask=mask, mask=mask[:, -T:])


def logps(e, b): return token_logps(e, b['input_ids'].cuda(), b['attention_mask'].cuda(), T)


def difference(a, b): return ((a.double() - b.double()).norm() / b.double().norm()).item()


def gradient(e): return torch.cat([m.grad.flatten() for m in e.masters if m.grad is not None])


BATCHES = [batch(9, 0), batch(64, 1), batch(9, 2), batch(30, 3), batch(200, 4), batch(64, 5)]   # small, large, small again


def learn(make, precision, graphs=False, compile=False):
    "What a model shows on its way: log-probabilities before, gradients of two passes, log-probabilities after some steps."
    e, seen = TorchEngine(prepare(make(), compile), OPTIM, 9, precision, graphs=graphs), []
    for b in BATCHES[:4]:
        with torch.no_grad(): seen.append(logps(e, b)[b['mask'].bool()])
    for k, b in enumerate(BATCHES):
        for part in (b, BATCHES[k - 1]): e.backward(-(logps(e, part) * part['mask'].cuda()).sum() / 1000)
        if k in (0, 4): seen.append(gradient(e))
        e.step()
    with torch.no_grad(): seen.append(logps(e, BATCHES[4]))
    assert graphs == (hasattr(e.model.base_model, 'recorded') and len(e.model.base_model.recorded.made) >= 2)
    return seen


def check(name, make, compile=False):
    truth, narrow = learn(make, 'fp32'), learn(make, 'bf16')
    wide, fast = (learn(make, p, True, compile) for p in ('fp32', 'bf16'))
    worst = max(map(difference, wide, truth))
    noise = [(difference(f, t), difference(n, t)) for f, n, t in zip(fast, narrow, truth, strict=True)]
    print(f'{name}: 32 bits {worst:.1e}; 16 bits, plain 16 bits:', *[f'{a:.1e} {b:.1e},' for a, b in noise])
    assert worst < (1e-4 if compile else 1e-5) and all(a < 1.6 * b + 1e-4 for a, b in noise), name


check('llama, tied', tied)
for arch in TINY:
    if arch == 'gemma2': continue                                               # soft caps: not packed
    check(arch, lambda arch=arch: lm(arch))
check('llama, compiled', tied, compile=True)
check('qwen3, compiled', lambda: lm('qwen3'), compile=True)

# steps

def scorer(kind):
    m = ScoreModel(lm().base_model, kind)
    torch.nn.init.normal_(m.score_head.weight, std=.3, generator=torch.Generator().manual_seed(0))
    return m


def steps(precision, graphs):
    lang, cost = (TorchEngine(m, OPTIM, 9, precision, graphs=graphs) for m in (tied(), scorer('cost')))
    out = []
    for k, b in enumerate(BATCHES):
        n = len(b['mask']) // 2
        pairs = {k: v[:2 * n] for k, v in b.items()} | dict(high_sign=torch.ones(n), low_sign=-torch.ones(n), paired=torch.ones(n))
        out += [*sft_step(lang, b, micro_batch=k % 2 * 7).values(), *score_step(cost, pairs, 'cost', .01).values()]
    return torch.stack([torch.as_tensor(x).float().cpu() for x in out])


plain, recorded, narrow, fast = (steps(p, g) for p in ('fp32', 'bf16') for g in (False, True))
print(f'sft_step, score_step: 32 bits {difference(recorded, plain):.1e}; 16 bits {difference(fast, plain):.1e}, '
      f'plain 16 bits {difference(narrow, plain):.1e}')
assert difference(recorded, plain) < 1e-5 and difference(fast, plain) < 1.6 * difference(narrow, plain) + 1e-3


def policy(precision, graphs, n=3):
    "Metrics of some steps of PPO-Lag; one critic recorded, frozen models too."
    how = dict(precision=precision, graphs=graphs)
    optim = Optim(lr=1e-5, warmup=0., schedule='constant')
    actor, reference = TorchEngine(tied(), optim, **how), TorchEngine(tied(), **how)
    scorers = {k: TorchEngine(scorer(k), **how) for k in ('reward', 'cost')}
    critics = {k: TorchEngine(scorer('critic'), optim, **how) for k in scorers}
    judge = {k: lambda i, m, e=e: e(i, m).end_scores for k, e in scorers.items()}
    sampler, objective = Sampler(actor, 1, T), ppo_lag(Multiplier(window=37))
    config = PPOConfig(prompts=37, max_new_tokens=T, micro_batch=16, minibatches=2)
    out = []
    for k in range(n):
        b = batch(37, k)
        asked = dict(input_ids=b['input_ids'][:, :-T], attention_mask=b['attention_mask'][:, :-T], prompt_ids=torch.arange(37))
        rows = batch(9, k)
        out += [*ppo_step(actor, reference, critics, judge, sampler, asked, rows, objective, config, k).values()]
    assert all(hasattr(e.model.base_model, 'recorded') == graphs for e in (actor, reference))
    return torch.stack([torch.as_tensor(x).float().cpu() for x in out])


plain, recorded = (policy('fp32', g) for g in (False, True))
print(f'ppo_step: 32 bits {difference(recorded, plain):.1e}, largest {((recorded - plain).abs() / (plain.abs() + 1e-3)).max():.1e}')
assert difference(recorded, plain) < 1e-4
narrow, fast = (policy('bf16', g, 1) for g in (False, True))
print(f'ppo_step, 16 bits: {difference(fast, plain[:len(fast)]):.1e}, plain {difference(narrow, plain[:len(fast)]):.1e}')

# adapters: roles on one body, each with recordings of its own

def roles(precision, graphs, compile=False):
    "Two trained roles and two frozen ones by turns: scores, log-probabilities, norms of gradients."
    torch.manual_seed(0)
    body = Body(prepare(tied(), compile))
    made = [role_of(body, None, Lora(4), headless=k > 1) for k in range(4)]
    for r in made: torch.nn.init.normal_(r.adapter[1], std=.1)
    models = made[0], made[1], ScoreModel(made[2], 'critic'), ScoreModel(made[3], 'cost')
    engines = [TorchEngine(m, OPTIM if k % 2 == 0 else None, 9, precision, graphs=graphs) for k, m in enumerate(models)]
    actor, reference, critic, cost = engines
    out = []
    for b in BATCHES[:4]:
        ids, mask = b['input_ids'].cuda(), b['attention_mask'].cuda()
        with torch.no_grad(): out += [logps(reference, b).sum(), cost(ids, mask).end_scores.sum()]
        actor.backward(-(logps(actor, b) * b['mask'].cuda()).sum() / 100); out.append(actor.norm())
        critic.backward((critic(ids, mask).end_scores - 1).square().mean()); out.append(critic.norm())
        actor.step(); critic.step()
    assert all(hasattr(r, 'recorded') == graphs for r in made)
    return torch.stack([torch.as_tensor(x).float().cpu() for x in out])


plain, recorded, narrow, fast = (roles(p, g) for p in ('fp32', 'bf16') for g in (False, True))
print(f'roles: 32 bits {difference(recorded, plain):.1e}; 16 bits {difference(fast, plain):.1e}, plain {difference(narrow, plain):.1e}')
assert difference(recorded, plain) < 1e-5 and difference(fast, plain) < 1.6 * difference(narrow, plain) + 1e-3

fast = roles('bf16', True, compile=True)                                      # rank 4: nothing is compiled while a pass is recorded
print(f'roles, compiled: 16 bits {difference(fast, plain):.1e}')
assert difference(fast, plain) < 1.6 * difference(narrow, plain) + 1e-3

# order, and gradients that somebody else has put elsewhere

e = TorchEngine(tied(), OPTIM, 9, 'bf16', graphs=True)
first, second = (logps(e, b).sum() for b in BATCHES[:2])
e.backward(second)
try: e.backward(first)
except RuntimeError as x: assert "graphs='off'" in str(x); print('refused:', x)
else: raise AssertionError('a late backward pass was let through')
loss = logps(e, BATCHES[0]).sum()
with torch.no_grad(): logps(e, BATCHES[1])
try: e.backward(loss)
except RuntimeError: pass
else: raise AssertionError('a pass of another recording in between was let through')
e.clear(); e.backward(logps(e, BATCHES[0]).sum()); want = gradient(e).clone()
for m in e.masters: m.grad = torch.zeros_like(m)
e.backward(logps(e, BATCHES[0]).sum()); assert difference(gradient(e), want) < 1e-6
for m in e.masters: m.grad = None
for b in (BATCHES[0], BATCHES[1]):                                            # an older loss stays alive while another size is recorded
    loss = logps(e, b).sum(); e.backward(loss)
sizes = {size_of(layout(b['attention_mask'])) for b in BATCHES}
assert len(sizes) >= 3, sizes

# memory

held = recorded_bytes()
assert held > 0
del e, first, second, loss; gc.collect(); torch.cuda.empty_cache()
print(f'recordings held {held / 1e6:.0f} MB; with their models gone {recorded_bytes() / 1e6:.0f} MB')
assert recorded_bytes() < held
print('all ok')
