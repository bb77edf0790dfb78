"The decoder against transformers' own pass, family by family: every difference is felt, norms round alike, windows, new weights."
from types import SimpleNamespace
import pytest
import torch
from saferlhf.hardware.decoder import Decoder, why_not
from saferlhf.hardware.kernels import add_norm, norm_heads
from saferlhf.hardware.packing import layout
from saferlhf.rollout import Sampler
from tiny import close, loud, prompt_rows
from transformers import AutoConfig, AutoModelForCausalLM

V, EOS, T = 13, 1, 12
SIZES = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=128, pad_token_id=0, bos_token_id=None, eos_token_id=EOS)
BOTH = dict(layer_types=['sliding_attention', 'full_attention'])
YARN = dict(rope_type='yarn', rope_theta=1e4, factor=4., original_max_position_embeddings=32)
LONG = dict(rope_type='longrope', rope_theta=1e4, original_max_position_embeddings=20, factor=4.)
VARIANTS = { # a family, or one of its members -> its family, sizes
    'qwen3': ('qwen3', dict(head_dim=16)), 'olmo2': ('olmo2', {}), 'smollm3': ('smollm3', dict(no_rope_layer_interval=2)),
    'olmo3': ('olmo3', BOTH | dict(rope_parameters=dict(sliding_attention=dict(rope_type='default', rope_theta=1e4), full_attention=YARN))),
    'gemma2': ('gemma2', dict(head_dim=16, attn_logit_softcapping=2., final_logit_softcapping=3., query_pre_attn_scalar=9)),
    'gemma3': ('gemma3_text', BOTH | dict(head_dim=16, query_pre_attn_scalar=9, final_logit_softcapping=3.)), 'phi3': ('phi3', {}),
    'phi4-mini': ('phi3', dict(rope_parameters=dict(rope_type='default', rope_theta=1e4, partial_rotary_factor=.5))),
    'longrope': ('phi3', dict(original_max_position_embeddings=20, rope_parameters=LONG | dict(
        short_factor=[1., 1.5, 2., 3.], long_factor=[4.] * 4))),
    'dynamic': ('llama', dict(max_position_embeddings=20, rope_parameters=dict(rope_type='dynamic', rope_theta=1e4, factor=4.)))}


def made(name, **more): # weights of norms too are random: ones would hide which belongs to what
    family, sizes = VARIANTS[name]
    torch.manual_seed(0)
    model = loud(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | sizes | more))).eval(), 4.)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.5 * torch.randn_like(p) if p.ndim == 1 else 0.)
    return model


@torch.no_grad()
def off(d, model): # the largest error of a logit: three prompts in slots out of order, then a token at a time
    d.refresh()
    ids = torch.randint(2, V, (3, 10), generator=torch.Generator().manual_seed(1))
    n, slots = torch.tensor([4, 1, 6]), torch.tensor([2, 0, 1])
    lay = layout((torch.arange(6) < n[:, None]).long())
    d.prefill(ids[:, :6].flatten()[lay.index], lay, slots)
    wrong, at = 0., torch.empty(3, dtype=torch.int64)
    want = model(input_ids=ids).logits
    assert want.std() > .2
    for t in range(4):
        at[slots] = n + t
        of = slots.argsort()                                                    # slot -> row
        z = d.step(ids[of, at], at)
        wrong = max(wrong, (z - want[of, at]).abs().max().item())
    return wrong


@pytest.mark.parametrize('name', VARIANTS)
def test_logits_are_the_models_own(name):
    model = made(name)
    assert not why_not(model)
    d = Decoder(model, slots=3, tokens=64)
    assert off(d, model) < 1e-5
    with torch.no_grad():
        for p in model.parameters(): p.mul_(1 + .3 * torch.randn_like(p))
    assert off(d, model) < 1e-5                                                 # new weights, in the same buffers


BROKEN = [('gemma2', dict(cap=0.)), ('gemma2', dict(logit_cap=None)), ('gemma3', dict(kinds=['full_attention'] * 2)),
          ('gemma3', dict(scale=.25)), ('gemma3', dict(norm_shift=0.)), ('gemma3', dict(embed_scale=1.)), ('smollm3', dict(kinds=[''] * 2)),
          ('olmo3', dict(kinds=['sliding_attention'] * 2)), ('phi4-mini', dict(order=None)),
          *[(name, {part: None}) for name in ('olmo2', 'gemma2') for part in ('after1', 'after2')], ('qwen3', dict(heads=None)),
          ('olmo2', dict(heads=None)), ('gemma2', dict(before2=None))]


@pytest.mark.parametrize('name, what', BROKEN, ids=str)
def test_every_difference_is_felt(name, what): # else the test above would prove nothing
    model = made(name)
    d = Decoder(model, slots=3, tokens=64)
    for k, x in what.items():
        if k in d.blocks[0]._fields: d.blocks = [b._replace(**{k: x}) for b in d.blocks]
        elif k == 'norm_shift': d.copies = [(buffer, ms, 0., read) for buffer, ms, _, read in d.copies]
        else: assert hasattr(d, k); setattr(d, k, x)
    assert off(d, model) > .01


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('slots', (None, 4))
def test_answers_are_those_of_transformers(name, slots):
    model, batch, how = made(name), prompt_rows(8, V), dict(temperature=1.2, seed=5)
    fast, plain = Sampler(model, EOS, T, slots=slots, **how), Sampler(model, EOS, T, **how)
    plain._fast = plain._plain
    a, b = fast.generate(batch, 3), plain.generate(batch, 3)
    assert fast._decoder and not plain._decoder and a.lengths.unique().numel() > 2
    assert torch.equal(a.responses, b.responses) and torch.equal(a.mask, b.mask)
    close(a.logp, b.logp, 2e-5); close(a.policy_logp, b.policy_logp, 2e-5)


@pytest.mark.parametrize('name', ('qwen3', 'olmo2', 'gemma2', 'gemma3', 'phi3'))
@torch.no_grad()
def test_norms_round_as_the_models_do(name): # bit for bit in 16 bits: before or after the product with the weight
    model = made(name).bfloat16()
    d = Decoder(model, 1, 8); d.refresh()
    x = 3 * torch.randn(50, 32, dtype=torch.bfloat16)
    assert torch.equal(add_norm(x, None, d.norm, d.eps)[1], model.model.norm(x))
    if name in ('qwen3', 'olmo2', 'gemma3'):
        a, D, keys = model.model.layers[0].self_attn, d.keys.shape[-1], 2 * d.keys.shape[-1]
        qkv = torch.randn(50, 8 * D, dtype=torch.bfloat16)
        q, k, v = qkv.split([4 * D, keys, keys], 1)
        want = [norm(x.reshape(50, -1, len(norm.weight))).flatten(1) for norm, x in ((a.q_norm, q), (a.k_norm, k))]
        assert torch.equal(norm_heads(qkv.clone(), *d.blocks[0].heads, keys, d.eps), torch.cat([*want, v], 1))


def test_a_window_is_left_to_the_model(): # Gemma 2 goes padded, with windows of its own: longer sequences are sampled by them
    model, batch = made('gemma2', sliding_window=10), prompt_rows(6, V)
    with pytest.warns(UserWarning, match='slower way: .*19 tokens are longer than the attention window'):
        r = Sampler(model, None, T, seed=1).generate(batch)
    with torch.no_grad():
        for prompt, m, row, logp in zip(r.prompts, r.prompt_mask, r.responses, r.policy_logp, strict=True):
            z = model(input_ids=torch.cat([prompt[m.bool()], row])[None]).logits[0, -T - 1:-1].log_softmax(-1)
            close(z.gather(-1, row[:, None])[:, 0], logp, 2e-5)
    s = Sampler(model, None, 3, seed=1); s.generate(batch)
    assert s._decoder                                                           # short ones go the fast way


def test_why_not():
    def why(**config): return why_not(SimpleNamespace(config=SimpleNamespace(**(dict(model_type='llama', hidden_act='silu') | config))))
    assert not why() and not why(rope_parameters=dict(a=dict(rope_type='yarn'), b=dict(rope_type='default')))
    assert why(model_type='gpt2') == 'the family gpt2 has no decoder here' and why(hidden_act='relu') == 'its activation is relu'
    assert why(rope_parameters=dict(a=dict(rope_type='odd'), b={})) == 'its rotary positions are of another kind (odd)'
