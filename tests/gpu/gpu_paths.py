"Every fast path against the slow obvious one on a GPU: graphs and slots, packed and compiled passes, waits. Prints what it measured."
import copy
import warnings
import torch
from saferlhf.engine import Optim, TorchEngine, load
from saferlhf.models import ScoreModel, token_logps
from saferlhf.objectives import Multiplier, ppo_lag
from saferlhf.hardware.precision import prepare
from saferlhf.ppo import PPOConfig, ppo_step
from saferlhf.rollout import Sampler
from transformers import AutoConfig, AutoModelForCausalLM

EOS, T, V = 1, 24, 61                                                            # a vocabulary that is a multiple of nothing
SIZES = dict(vocab_size=V, hidden_size=128, intermediate_size=200, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             head_dim=32)
BOTH = dict(layer_types=['sliding_attention', 'full_attention', 'sliding_attention'])
MORE = dict(qwen3={}, olmo2={}, smollm3=dict(no_rope_layer_interval=2), gemma2=dict(attn_logit_softcapping=2., query_pre_attn_scalar=40),
            gemma3_text=BOTH | dict(query_pre_attn_scalar=40), phi3=dict(hidden_size=384, head_dim=96,  # not a power of two, as of the mini
            rope_parameters=dict(rope_type='default', rope_theta=1e4, partial_rotary_factor=.5)))


def model(arch='llama', dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    sizes = dict(max_position_embeddings=256, pad_token_id=0) | SIZES | MORE.get(arch, {})
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **sizes)).cuda().eval()
    with torch.no_grad():
        for p in lm.parameters(): p.mul_(4. if p.ndim > 1 else 1.)              # flat distributions would hide mistakes
    return lm.to(dtype)


def batch(B=37, S=11, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = torch.randint(1, S + 1, (B,), generator=g)
    mask = (torch.arange(S) >= S - n[:, None]).long()
    return dict(input_ids=torch.randint(2, V, (B, S), generator=g) * mask, attention_mask=mask, prompt_ids=torch.arange(B) * 7919)


@torch.no_grad()
def alone(lm, r): # log-probabilities, every row by itself, without padding, cache or packing
    out = torch.zeros_like(r.logp)
    for i in range(len(out)):
        prompt, n = r.prompts[i][r.prompt_mask[i].bool()], int(r.lengths[i])
        z = lm(input_ids=torch.cat([prompt, r.responses[i, :n]])[None], use_cache=False).logits[0, len(prompt) - 1:-1]
        out[i, :n] = z.float().log_softmax(-1).gather(-1, r.responses[i, :n, None])[:, 0]
    return out


def difference(a, b): return ((a.double() - b.double()).norm() / b.double().norm()).item()


for arch in ('llama', 'mistral', 'qwen2', 'gemma', *MORE):
    lm, b = model(arch), batch()
    plain = Sampler(lm, EOS, T, seed=3); plain._fast = plain._plain
    want = plain.generate(b, 3)
    for slots in (None, 40, 16, 1):
        fast = Sampler(lm, EOS, T, seed=3, slots=slots)
        few = {k: v[:4] for k, v in b.items()} if slots == 1 else b
        for _ in range(2): got = fast.generate(few, 3)                          # the second time all steps are replayed
        n, answers = len(got.mask), lambda r: [x[:k].tolist() for x, k in zip(r.responses, r.lengths, strict=True)]
        same = sum(x == y for x, y in zip(answers(got), answers(want), strict=False))
        worst, lengths = (got.logp - alone(lm, got)).abs().max().item(), f'{got.lengths.min()} to {got.lengths.max()}'
        print(f'{arch}, slots {slots}: {same} of {n} answers equal, lengths {lengths}, largest error {worst:.1e} nats')
        assert same >= n - 1 and worst < 1e-4 and fast._graphs
        assert slots == 1 or (got.lengths.min() <= 3 and got.lengths.max() == T)
    narrow = copy.deepcopy(lm).bfloat16()
    for slots in (None, 16):                                                    # few slots are filled in again by recorded passes
        sampler = Sampler(narrow, EOS, T, seed=3, slots=slots)
        first, r, again = (sampler.generate(b, 3) for _ in range(3))
        mask = r.mask.bool()
        truth = alone(lm, r)[mask]
        d = difference(r.policy_logp[mask], truth), difference(alone(narrow, r)[mask], truth)
        recorded = [k for k, graph in sampler._decoder.recorded.items() if graph]
        print(f'{arch}, slots {slots}: sampled in 16 bits {d[0]:.1e}, alone {d[1]:.1e}; recorded {recorded}')
        assert d[0] < 1.5 * d[1] + 1e-3 and torch.equal(r.responses, again.responses) and torch.equal(r.logp, again.logp)
        assert bool(recorded) == (slots == 16 and arch != 'gemma2')

for arch in ('llama', 'qwen2', 'gpt2'):
    if arch == 'gpt2':
        torch.manual_seed(0)
        exact = AutoModelForCausalLM.from_config(AutoConfig.for_model('gpt2', vocab_size=V, n_embd=128, n_layer=3, n_head=4)).cuda().eval()
    else: exact = model(arch)
    r = Sampler(exact, EOS, T, seed=1).generate(batch())
    mask = r.mask.bool()
    truth = alone(exact, r)[mask]
    packed = token_logps(exact, r.ids, r.attention_mask, r.mask.shape[1])[mask]
    narrow = copy.deepcopy(exact).bfloat16()
    slow, fast = alone(narrow, r)[mask], token_logps(narrow, r.ids, r.attention_mask, r.mask.shape[1])[mask]
    d = difference(packed, truth), difference(fast, truth), difference(slow, truth)
    print(f'{arch}: packed, 32 bits {d[0]:.1e}; 16 bits {d[1]:.1e}, alone {d[2]:.1e}')
    assert d[0] < 1e-5 and d[1] < 1.5 * d[2] + 1e-3

r = Sampler(model(), EOS, T, seed=1).generate(batch())
def gradient(precision, **how):
    e = TorchEngine(prepare(model(), **how), Optim(), precision=precision)
    for part in (torch.arange(20), torch.arange(20, 37)):
        p = r.take(part); e.backward(-(token_logps(e, p.ids, p.attention_mask, p.mask.shape[1]) * p.mask).sum())
    return torch.cat([m.grad.flatten() for m in e.masters if m.grad is not None])
truth, narrow = gradient('fp32'), gradient('bf16')
for how in (dict(recompute=True), dict(compile=True), dict(compile=True, recompute=True)):
    wide, fast = gradient('fp32', **how), gradient('bf16', **how)
    d = difference(wide, truth), difference(fast, truth), difference(narrow, truth)
    print(f'gradient, {how}: 32 bits {d[0]:.1e}; 16 bits {d[1]:.1e}, plain 16 bits {d[2]:.1e}')
    assert d[0] < 1e-4 and d[1] < 1.5 * d[2]

how = dict(precision='bf16')
actor, reference = load(model, Optim(lr=1e-4), **how), load(model, **how)
scorers = {k: load(lambda k=k: ScoreModel(model().base_model, k), **how) for k in ('reward', 'cost')}
critics = {k: load(lambda: ScoreModel(model().base_model, 'critic'), Optim(lr=1e-4), **how) for k in ('reward', 'cost')}
sampler, objective = Sampler(actor, EOS, T), ppo_lag(Multiplier(window=37))
config = PPOConfig(prompts=37, max_new_tokens=T, micro_batch=16)
ptx = dict(input_ids=torch.randint(2, V, (8, 20)), attention_mask=torch.ones(8, 20).long(), mask=torch.ones(8, 10).long())
judge = {n: lambda i, m, e=e: e(i, m).end_scores for n, e in scorers.items()}
def step(k): return ppo_step(actor, reference, critics, judge, sampler, batch(), ptx, objective, config, k)
step(0)
rollout = Sampler.generate
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter('always')
    def quiet(self, *a, **kw): # a rollout looks at its slots; what comes after it is counted
        torch.cuda.set_sync_debug_mode('default'); out = rollout(self, *a, **kw); torch.cuda.set_sync_debug_mode('warn'); return out
    sampler.generate = quiet.__get__(sampler)
    m = step(1)
    torch.cuda.set_sync_debug_mode('default')
waits = [w for w in seen if 'synchroniz' in str(w.message) and 'prototype' not in str(w.message)]
where = [f'{w.filename.split("/")[-1]}:{w.lineno}' for w in waits]
print(f'a step waits for the device {len(waits)} times after its rollout: {where}')
assert len(waits) <= 1 and all(torch.as_tensor(x).isfinite() for x in m.values())
print('all ok')
