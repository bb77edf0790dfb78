"Plain torch and DeepSpeed take the same steps; schedule, weight decay, clipping, frozen models and exact resume."
import copy
import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import pytest
import torch
from saferlhf.engine import Optim, TorchEngine, adamw, load, reduce_mean, schedule
from saferlhf.models import TINY, ScoreModel, load_lm, tiny_model, token_logps
from saferlhf.hardware.adapters import Lora
from saferlhf.hardware.precision import fast_precision, prepare
from saferlhf.hardware.ranks import gather
from saferlhf.hardware.zero import _config
from tiny import close, lm, prompt_rows, scorer

OPTIM = Optim(lr=3e-3, weight_decay=.1, warmup=.3, clip=.05)                   # clipping is active: the norms are larger


# --- two implementations, one run
def trajectory(path, engine, zero=0, steps=6): # losses and norms of a policy with two micro-batches a step, and scores of a frozen model
    policy = load(lambda: load_lm(path / 'lm'), OPTIM, steps, engine=engine, zero=zero)
    frozen = load(lambda: ScoreModel.from_pretrained(path / 'score'), engine=engine, zero=zero)
    out = dict(loss=[], norm=[], score=[], rate=[])
    for _ in range(steps):
        for last in (False, True):
            b = prompt_rows(5, seed=last, longest=6 + 3 * last)                # rows of unequal length, one of them a single token
            loss = -(token_logps(policy, b['input_ids'], b['attention_mask'], 3) * b['attention_mask'][:, -3:]).mean()
            policy.backward(loss / 2, last)
            out['loss'].append(loss.item())
            with torch.no_grad(): out['score'] += frozen(b['input_ids'], b['attention_mask']).end_scores.tolist()
        out['rate'].append((policy.optimizer if engine == 'torch' else policy.engine.optimizer).param_groups[0]['lr'])
        out['norm'].append(float(policy.step()))
    with policy.dense_weights() as model: out['weights'] = [p.double().sum().item() for p in model.parameters()]
    return out


def all_stages(path): # in a process of its own: ZeRO-3 changes how models are made in the whole process
    import logging
    from saferlhf.hardware.zero import deepspeed
    deepspeed(); logging.disable(logging.WARNING)
    more = dict(resumed=resumed, refused=refused, narrow=narrow)
    out = {zero: trajectory(path, 'deepspeed', zero) | {k: f(path, zero) for k, f in more.items()} for zero in range(4)}
    for zero in range(3): out[zero]['adapters'] = adapters(path, 'deepspeed', zero)
    return out


def adapters(path, engine, zero=0): # losses and norms of two roles on one body
    bodies, out, b = {}, [], prompt_rows(5, seed=0)
    torch.manual_seed(0)
    how = dict(lora=Lora(4), bodies=bodies)
    policy = load(lambda: load_lm(path/'lm', **how), OPTIM, 4, engine=engine, zero=zero)
    critic = load(lambda: ScoreModel.from_pretrained(path/'lm', 'critic', **how), OPTIM, 4, engine=engine, zero=zero)
    for _ in range(4):
        s = critic(b['input_ids'], b['attention_mask']).end_scores
        for e, loss in ((policy, -token_logps(policy, b['input_ids'], b['attention_mask'], 3).mean()), (critic, (s - 1).square().mean())):
            e.backward(loss); out += [loss.item(), float(e.step())]
    return out


def narrow(path, zero): # losses in 16 bits, of a policy and a score model
    out, b = [], prompt_rows(5, seed=0)
    policy = load(lambda: load_lm(path/'lm'), OPTIM, 3, engine='deepspeed', zero=zero, precision='bf16')
    critic = load(lambda: ScoreModel.from_pretrained(path/'score'), OPTIM, 3, engine='deepspeed', zero=zero, precision='bf16')
    for _ in range(3):
        s = critic(b['input_ids'], b['attention_mask']).end_scores
        for e, loss in ((policy, -token_logps(policy, b['input_ids'], b['attention_mask'], 3).mean()), (critic, (s - 1).square().mean())):
            e.backward(loss); e.step(); out.append(loss.item())
    return out + [float(s.dtype == torch.float32)]


def step(engine, i, value=None): # one step of a policy; its loss or its gradient times a value
    b = prompt_rows(seed=i)
    loss = -token_logps(engine, b['input_ids'], b['attention_mask'], 3).mean()
    if value and value[0] == 'gradient': next(p for p in engine.model.parameters()).register_hook(lambda g: g * value[1])
    engine.backward(loss * value[1] if value and value[0] == 'loss' else loss)
    return loss.item(), float(engine.step())


def weights(engine):
    with engine.dense_weights() as model: return [p.detach().clone() for p in model.parameters()]


def resumed(path, zero): # whether three steps, a save and three steps are six steps
    from saferlhf.record.resume import Saver
    make = lambda: load(lambda: load_lm(path / 'lm'), OPTIM, 6, engine='deepspeed', zero=zero)
    def run(folder, start, end):
        engine = make()
        with Saver(folder, {'model': engine}, steps=3) as save:
            assert save.restore() == start
            out = []
            for i in range(start, end): out.append(step(engine, i)); save(i, i == 5)
        return out, weights(engine)
    (whole, w), (first, _), (rest, v) = run(path / f'a{zero}', 0, 6), run(path / f'b{zero}', 0, 3), run(path / f'b{zero}', 3, 6)
    return whole == first + rest and all(map(torch.equal, v, w))


def refused(path, zero): # whether a loss or gradient that is NaN is refused with all weights as they were, and the next step forgets it
    out, make = [], lambda: load(lambda: load_lm(path / 'lm'), OPTIM, 6, engine='deepspeed', zero=zero)
    other = make(); step(other, 0); step(other, 1)
    for value in (('loss', math.nan), ('gradient', math.nan), ('gradient', math.inf), ('gradient', 1e25)):        # its square overflows
        engine = make()
        step(engine, 0); before = weights(engine)
        try: step(engine, 1, value); out.append('not refused')
        except FloatingPointError as e: out.append(f'a {value[0]} is' in str(e) and all(map(torch.equal, before, weights(engine))))
        for p in engine.model.parameters(): p._backward_hooks = None
        step(engine, 1); out[-1] = out[-1] and all(map(torch.equal, weights(other), weights(engine)))
    return out


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp('models')
    lm().save_pretrained(path / 'lm'); scorer('gpt2').save_pretrained(path / 'score')
    return path


@pytest.fixture(scope='module')
def stages(path):
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool: return pool.submit(all_stages, path).result()


@pytest.fixture(scope='module')
def plain(path): return trajectory(path, 'torch')


@pytest.mark.parametrize('zero', range(4))
def test_deepspeed_equals_torch(stages, plain, zero):
    for name in ('loss', 'norm', 'score', 'rate'): close(stages[zero][name], plain[name], 1e-5)
    close(stages[zero]['weights'], plain['weights'], 1e-4)
    assert plain['loss'][0] - plain['loss'][-2] > .1 and min(plain['norm']) > OPTIM.clip # it learns, and clipping matters


@pytest.mark.parametrize('zero', range(3))
def test_adapters_are_the_same_on_deepspeed(stages, path, zero):
    want = adapters(path, 'torch')
    close(stages[zero]['adapters'], want, 1e-5)
    assert want[0] - want[12] > .1


@pytest.mark.parametrize('zero', range(4))
def test_deepspeed_resumes_bit_for_bit_and_refuses_bad_numbers(stages, zero):
    assert stages[zero]['resumed'] and stages[zero]['refused'] == [True] * 4


@pytest.mark.parametrize('zero', range(4))
def test_sixteen_bits_are_the_same_at_every_stage(stages, zero): # DeepSpeed's first step at stage 0 was a second one
    close(stages[zero]['narrow'], stages[1]['narrow'], 2e-3)
    assert stages[zero]['narrow'][-1] == 1. and stages[zero]['narrow'][0] - stages[zero]['narrow'][4] > .01


def test_unknown_engine():
    with pytest.raises(ValueError, match='deepspeed'): load(tiny_model, engine='jax')


def test_zero_config():
    config = _config(OPTIM, 2, 'bf16')
    assert config['zero_optimization']['stage'] == 2 and config['bf16']['enabled'] and config['gradient_clipping'] == .05
    assert _config(None)['gradient_clipping'] == 0
    both = _config(OPTIM, 3, offload='all')['zero_optimization']
    assert both['offload_optimizer']['device'] == both['offload_param']['device'] == 'cpu'
    assert set(_config(OPTIM, 1, offload='optimizer')['zero_optimization']) == {'stage', 'offload_optimizer'}
    assert set(_config(None, 3, offload='weights')['zero_optimization']) == {'stage', 'offload_param'}
    assert [_config(None, z)['zero_optimization']['stage'] for z in range(4)] == [0, 0, 0, 3]   # frozen: nothing to shard but weights


# --- the rate
def test_schedule_by_hand():
    f = schedule(Optim(warmup=.25), 8)
    close([f(k) for k in range(8)], [.5, 1, 1, *(.5 * (1 + math.cos(math.pi * k / 6)) for k in range(1, 6))], 1e-12)
    assert f(8) == f(100) == 0
    close([schedule(Optim(warmup=.25, schedule='constant'), 8)(k) for k in (0, 1, 7, 50)], [.5, 1, 1, 1], 1e-12)
    assert schedule(Optim(warmup=0.), 4)(0) == 1 and schedule(Optim(warmup=.03), 10)(0) == 1     # one warm-up step is already the peak
    with pytest.raises(ValueError, match='linear'): schedule(Optim(schedule='linear'), 4)


def test_rate_of_each_step(plain):
    close(plain['rate'], [OPTIM.lr * schedule(OPTIM, 6)(k) for k in range(6)], 1e-12)


# --- weight decay
@pytest.mark.parametrize('arch', ('llama', 'gpt2', 'opt'))
def test_decay_on_matrices_only(arch):
    model = ScoreModel(tiny_model(arch).base_model, bias=True)
    decay = {id(p): g['weight_decay'] for g in adamw(list(model.parameters()), Optim(weight_decay=.1)).param_groups for p in g['params']}
    assert len(decay) == sum(1 for _ in model.parameters())
    for name, p in model.named_parameters(): assert decay[id(p)] == (.1 if p.ndim == 2 else 0), name


def test_decay_shrinks_matrices_by_hand():
    engine = TorchEngine(tiny_model(), Optim(lr=.1, weight_decay=.5, warmup=0.))
    before = [p.detach().clone() for p in engine.model.parameters()]
    for p in engine.model.parameters(): p.grad = torch.zeros_like(p)
    engine.step()
    for p, q in zip(engine.model.parameters(), before, strict=True): close(p.detach(), q * (1 - .1 * .5 if q.ndim == 2 else 1), 1e-7)


# --- clipping
def test_norm_is_that_before_clipping():
    engine = TorchEngine(lm(), OPTIM)
    b = prompt_rows()
    engine.backward(-token_logps(engine, b['input_ids'], b['attention_mask'], 3).mean())
    norm = torch.stack([p.grad.norm() for p in engine.model.parameters()]).norm().item()
    close(engine.step(), norm)
    moments = [s['exp_avg'].norm() for s in engine.optimizer.state.values()]
    close(torch.stack(moments).norm(), (1 - OPTIM.beta1) * OPTIM.clip)         # what Adam saw was clipped
    assert norm > 2 * OPTIM.clip and all(p.grad is None for p in engine.model.parameters())


# --- frozen engines, modes, precision
def test_frozen():
    engine = load(lambda: scorer().train())
    out = engine(**{k: v for k, v in prompt_rows().items() if k != 'prompt_ids'})
    assert not out.end_scores.requires_grad and not any(p.requires_grad for p in engine.model.parameters())
    assert not hasattr(engine, 'optimizer') and not engine.model.training


def test_dropout_is_off_while_learning():
    model = lm('gpt2'); model.train()
    engine = TorchEngine(model, OPTIM)
    assert not any(m.training for m in engine.model.modules()) and all(p.requires_grad for p in engine.model.parameters())


def test_bf16_computes_in_16_bits_and_stores_32():
    engine = TorchEngine(lm(), Optim(), precision='bf16')
    b = prompt_rows()
    z = engine(input_ids=b['input_ids'], attention_mask=b['attention_mask']).logits
    logp = token_logps(engine, b['input_ids'], b['attention_mask'], 3)
    assert z.dtype == torch.bfloat16 and logp.dtype == torch.float32
    engine.backward(-logp.mean(), last=False)
    assert all(p.dtype == torch.bfloat16 and p.grad is None for p in engine.params)                 # widened and freed at once
    once = [m.grad.clone() for m in engine.masters]
    assert all(m.dtype == g.dtype == torch.float32 for m, g in zip(engine.masters, once, strict=True))
    engine.backward(-token_logps(engine, b['input_ids'], b['attention_mask'], 3).mean())
    for m, g in zip(engine.masters, once, strict=True): assert torch.equal(m.grad, 2 * g)
    before = [m.clone() for m in engine.masters]
    engine.step()
    for p, m, old in zip(engine.params, engine.masters, before, strict=True):
        assert torch.equal(p, m.bfloat16()) and (not (m != old).any() or (m - m.bfloat16().float()).abs().max() > 0)


def test_score_heads_stay_in_32_bits():
    engine = TorchEngine(scorer(), Optim(), precision='bf16')
    assert engine.model.score_head.weight.dtype == torch.float32
    assert {p.dtype for p in engine.model.body.parameters()} == {torch.bfloat16}
    names = [n for n, _ in engine.model.named_parameters()]
    assert [n for n, p, m in zip(names, engine.params, engine.masters, strict=True) if p is m] == ['score_head.weight']
    assert set(engine.state()['masters']) == set(names) - {'score_head.weight'}


@pytest.mark.parametrize('arch', TINY)
def test_recomputation_changes_nothing(arch):
    def grads(recompute):
        e, b = TorchEngine(prepare(lm(arch), recompute=recompute), OPTIM), prompt_rows()
        e.backward(-token_logps(e, b['input_ids'], b['attention_mask'], 3).mean())
        return [p.grad for p in e.params if p.grad is not None]
    for a, b in zip(grads(False), grads(True), strict=True): assert torch.equal(a, b)
    def kept(recompute): # numbers that autograd keeps for the backward pass
        e, b, sizes = TorchEngine(prepare(lm(arch), recompute=recompute), OPTIM), prompt_rows(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            token_logps(e, b['input_ids'], b['attention_mask'], 3)
        return sum(sizes)
    assert kept(True) < kept(False) / 2


@pytest.mark.parametrize('precision', ('fp32', 'bf16'))
def test_the_optimizer_leaves_weights_alone_when_the_norm_is_not_finite(precision): # what a GPU relies on, where nobody waits to ask
    e, b = TorchEngine(lm(), Optim(lr=.1, warmup=0., schedule='constant'), precision=precision), prompt_rows()
    for bad in (math.nan, math.inf, 1.):
        before = [p.clone() for p in e.params]
        e.backward(-token_logps(e, b['input_ids'], b['attention_mask'], 3).mean())
        e.masters[0].grad[0, 0] *= bad
        norm = e.step()
        same = all(torch.equal(x, y) for x, y in zip(before, e.params, strict=True))
        assert same == (bad != 1.) and norm.isfinite() == (bad == 1.)


def test_a_clip_of_zero_is_refused():
    with pytest.raises(ValueError, match='remove every gradient'): Optim(clip=0.)


def test_precision_is_checked():
    with pytest.raises(ValueError, match="'fp16'"): TorchEngine(lm(), OPTIM, precision='fp16')
    assert fast_precision() == fast_precision() and fast_precision() in ('fp32', 'bf16')


# --- resume
def test_restore_continues_bit_for_bit(tmp_path):
    def step(engine, k):
        b = prompt_rows(seed=k)
        loss = -token_logps(engine, b['input_ids'], b['attention_mask'], 3).mean()
        engine.backward(loss); return loss.item(), engine.step().item(), engine.scheduler.get_last_lr()
    whole = TorchEngine(lm(), OPTIM, 8)
    for k in range(4): step(whole, k)
    torch.save(whole.state(), tmp_path / 'state.pt')
    snapshot = copy.deepcopy(whole.state())
    rest = [step(whole, k) for k in range(4, 8)]
    for state in (torch.load(tmp_path / 'state.pt'), snapshot):
        again = TorchEngine(lm(seed=1), OPTIM, 8); again.restore(state)
        assert [step(again, k) for k in range(4, 8)] == rest
        assert all(torch.equal(p, q) for p, q in zip(again.model.parameters(), whole.model.parameters(), strict=True))


# --- reductions, on one rank
def test_reductions_of_one_rank():
    assert reduce_mean(dict(a=1.5, b=torch.tensor(2.), c=torch.tensor(3)), weight=7.) == dict(a=1.5, b=2., c=3.)
    x = torch.arange(6.).view(3, 2)
    assert torch.equal(gather(x), x)


def test_a_refused_step_leaves_no_gradient_behind(): # else the next one would be wrong, or refused as well
    engine = TorchEngine(tiny_model(), Optim(1e-3, warmup=0.))
    ids = torch.tensor([[5, 9, 3, 4]])
    loss = lambda: -token_logps(engine, ids, torch.ones_like(ids), 3).mean()
    engine.backward(loss(), last=False)
    with pytest.raises(FloatingPointError): engine.backward(loss() * float('nan'))
    assert all(m.grad is None for m in engine.masters)


@pytest.mark.parametrize('precision', ('fp32', 'bf16'))
def test_an_engine_without_waiting_gradients_takes_the_same_steps(precision): # what `recompute` asks for on a GPU
    found, ids = [], torch.tensor([[5, 9, 3, 4], [7, 8, 2, 2]])
    for lean in (False, True):
        e = TorchEngine(tiny_model(), Optim(1e-2, warmup=0.), precision=precision, lean=lean)
        norms = []
        for _ in range(3):
            for last in (False, True): e.backward(-token_logps(e, ids, torch.ones_like(ids), 3).mean(), last)
            assert lean == all(m.grad is None for m in e.masters)
            norms.append(e.step())
        found.append([*norms, *e.masters])
    assert all(map(torch.equal, *found))
