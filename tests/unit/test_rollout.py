"The sampler against the full forward pass, random numbers that belong to the prompt, and answers scored alike on every path."
import numpy as np
import pytest
import torch
from saferlhf.engine import Optim, TorchEngine
from saferlhf.models import token_logps
from saferlhf.hardware.slots import choose
from saferlhf.rollout import Rollout, Sampler, by_length, perplexities, respond, score_texts
from saferlhf.hardware.sampler import _mix, _nucleus, uniforms
from saferlhf.text import encode_prompt, encode_response, pad, prompt_batch
from tiny import FAMILIES, close, lm, loud, prompt_rows, scorer, sentences, tiny_model, tokenizer

V, EOS, T = 13, 1, 12                                                          # few tokens, so that EOS comes early as well as never
policy = lambda arch='llama', vocab=V: loud(tiny_model(arch, vocab), 4.)


def rolled(arch='llama', **kw): return Sampler(policy(arch), EOS, T, **kw).generate(prompt_rows(6, V), samples=5)


# --- random numbers
def splitmix(x): # the published finaliser, in Python's unbounded integers
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def test_mix():
    x = torch.tensor([0, 1, -1, 2**63 - 1, -2**63, 123456789], dtype=torch.int64)
    assert (_mix(x).numpy().view(np.uint64) == np.array([splitmix(int(v) % 2**64) for v in x], dtype=np.uint64)).all()


def test_uniforms():
    keys, samples = torch.arange(20000), torch.zeros(20000).long()
    u = torch.stack([uniforms(3, keys, samples, t) for t in range(3)] + [uniforms(3, keys, samples + 1, 0), uniforms(4, keys, samples, 0)])
    assert ((0 <= u) & (u < 1)).all() and u.dtype == torch.float64
    close(u.mean(1), .5, .01); close(u.var(1), 1 / 12, .02)
    close(np.corrcoef(u.numpy()), np.eye(5), .03)                              # tokens, samples and seeds share nothing
    close(np.corrcoef(u[0, 1:].numpy(), u[0, :-1].numpy()), np.eye(2), .03)    # nor do neighbouring prompts
    assert torch.equal(uniforms(3, keys[:, None], samples[:, None], torch.arange(3)), u[:3].T)


# --- the distribution
P = np.array([.02, .08, .15, .25, .4, .1, 0.])


def chi_square(counts, p): return float(((counts - p * counts.sum())**2 / (p * counts.sum())).sum())


def test_draws_follow_the_probabilities():
    n = 20000
    u = uniforms(0, torch.arange(n), torch.zeros(n).long(), 0)
    tokens = choose(torch.tensor(P).log().float().expand(n, -1), u)[0]
    counts = np.bincount(tokens, minlength=7)
    assert counts[6] == 0 and chi_square(counts[:6], P[:6]) < 15.1             # 99% point of 5 degrees of freedom
    assert chi_square(counts[:6], P[:6][::-1]) > 1000


def test_draws_by_hand():
    z = torch.tensor([[.25, .5, 0., .25]]).log().expand(6, -1)
    assert choose(z, torch.tensor([0., .2499, .25, .7499, .7501, 1 - 2**-53], dtype=torch.float64))[0].tolist() == [0, 0, 1, 1, 3, 3]


@pytest.mark.parametrize('temperature', (1., 2.))
def test_sampler_follows_the_models_probabilities(temperature):
    model, batch = policy(), {k: v[1:2] for k, v in prompt_rows(2, V).items()}
    r = Sampler(model, EOS, 1, temperature).generate(batch, samples=8000)
    with torch.no_grad(): z = model(input_ids=batch['input_ids']).logits[0, -1].double()
    counts = np.bincount(r.responses[:, 0], minlength=V)
    p, other = (z / temperature).softmax(-1).numpy(), (z / (3 - temperature)).softmax(-1).numpy()
    assert chi_square(counts, p) < 26.2 < 200 < chi_square(counts, other)      # 99% point of 12 degrees of freedom


# --- sampler = full forward
@pytest.mark.parametrize('arch', FAMILIES)
@torch.no_grad()
def test_sampler_equals_full_forward(arch):
    model, batch, n = policy(arch), prompt_rows(6, V), 5
    r = Sampler(model, EOS, T, 1.3, seed=2).generate(batch, samples=n)
    close(r.logp, token_logps(model, r.ids, r.attention_mask, r.mask.shape[1], 1.3) * r.mask, 2e-5)
    lengths, cut = r.lengths, r.truncated
    assert lengths.min() <= 2 and (lengths == T).any() and ((lengths > 1) & (lengths < T)).any() and cut.any() and not cut.all()
    for i in range(len(lengths)):                                              # token by token, without padding or cache
        prompt = batch['input_ids'][i // n][batch['attention_mask'][i // n].bool()].tolist()
        row = r.responses[i, :lengths[i]].tolist()
        z = model(input_ids=torch.tensor([prompt + row])).logits[0, len(prompt) - 1:-1].double() / 1.3
        cdf = z.softmax(-1).cumsum(-1).numpy()
        u = [uniforms(2, batch['prompt_ids'][[i // n]], torch.tensor([i % n]), t).item() for t in range(len(row))]
        assert row == [int((c <= x * c[-1]).sum()) for c, x in zip(cdf, u, strict=True)]
        assert EOS not in row[:-1] and (row[-1] == EOS) == (not cut[i]) and cut[i] == (len(row) == T and row[-1] != EOS)


@pytest.mark.parametrize('arch', FAMILIES)
def test_greedy_equals_generate(arch):
    model, batch = policy(arch), prompt_rows(24, V, seed=1)
    eos = Sampler(model, None, T, greedy=True).generate(batch).responses[:, 2:5].flatten().mode().values.item()  # a token that does come
    r = Sampler(model, eos, T, greedy=True).generate(batch)
    theirs = model.generate(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'], do_sample=False, max_new_tokens=T,
                            eos_token_id=eos, pad_token_id=0)[:, batch['input_ids'].shape[1]:]
    assert theirs.shape == r.mask.shape and torch.equal(theirs * r.mask, r.responses * r.mask)
    assert r.lengths.unique().numel() > 1


def test_masks_come_from_lengths():
    r = rolled()
    for row, n in zip(r.mask.tolist(), r.lengths.tolist(), strict=True): assert row == [1] * n + [0] * (len(row) - n)
    for row, n in zip(r.responses.tolist(), r.lengths.tolist(), strict=True): assert set(row[n:]) <= {EOS}
    assert (r.responses * r.mask == 0).sum() > (r.mask == 0).sum()             # the pad id is sampled like any other, and stays in the mask


def test_without_eos_every_answer_is_full():
    r = Sampler(policy(), None, 5).generate(prompt_rows(4, V), samples=8)
    assert r.mask.all() and r.mask.shape == (32, 5) and r.truncated.all() and (r.responses == EOS).any()
    assert all(torch.equal(a, b) for a, b in zip(r.scored(), (r.ids, r.attention_mask), strict=True))


# --- what a row's random numbers depend on
def rows_of(r): return [(row[:n].tolist(), bool(c)) for row, n, c in zip(r.responses, r.lengths, r.truncated, strict=True)]


@pytest.mark.parametrize('arch', ('llama', 'gpt2'))
def test_answers_do_not_depend_on_the_batch(arch):
    sampler, batch = Sampler(policy(arch), EOS, T, seed=7), prompt_rows(8, V)
    part = lambda index: {k: v[index] for k, v in batch.items()}
    whole = rows_of(sampler.generate(batch))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert rows_of(sampler.generate(part(order))) == [whole[i] for i in order]
    for ranks in (2, 8):                                                       # each rank samples its share, with less padding
        shares = [part(torch.arange(8)[k::ranks]) for k in range(ranks)]
        for k, b in enumerate(shares):
            S = b['attention_mask'].sum(1).max()
            assert rows_of(sampler.generate({n: x[:, -S:] if x.ndim > 1 else x for n, x in b.items()})) == whole[k::ranks]
    torch.manual_seed(99); assert rows_of(sampler.generate(batch)) == whole    # nor on the global generator
    assert rows_of(Sampler(policy(arch), EOS, T, seed=8).generate(batch)) != whole


def test_samples_are_numbered():
    sampler, batch = Sampler(policy(), EOS, T), prompt_rows(3, V)
    four, two, later = (rows_of(sampler.generate(batch, n, first)) for n, first in ((4, 0), (2, 0), (2, 2)))
    for i in range(3): assert four[4 * i:4 * i + 4] == two[2 * i:2 * i + 2] + later[2 * i:2 * i + 2]
    assert two != later
    r = sampler.generate(batch, 4)
    assert torch.equal(r.prompt_ids, batch['prompt_ids'].repeat_interleave(4)) and torch.equal(r.prompts[4], batch['input_ids'][1])


def test_temperature_is_recorded():
    r, model = rolled(temperature=1.7), policy()
    with torch.no_grad(): at = {k: token_logps(model, r.ids, r.attention_mask, r.mask.shape[1], k) * r.mask for k in (1., 1.7)}
    close(r.logp, at[1.7], 2e-5); assert (r.logp - at[1.]).abs().max() > .1


def full(model, r): # log-probabilities of a rollout's tokens, each row alone, without padding or cache
    out = torch.zeros_like(r.logp)
    for i in range(len(out)):
        prompt, n = r.prompts[i][r.prompt_mask[i].bool()], int(r.lengths[i])
        z = model(input_ids=torch.cat([prompt, r.responses[i, :n]])[None]).logits[0, len(prompt) - 1:-1].double().log_softmax(-1)
        out[i, :n] = z.gather(-1, r.responses[i, :n, None])[:, 0]
    return out


@pytest.mark.parametrize('arch', FAMILIES)
@torch.no_grad()
def test_the_policys_own_probabilities_are_recorded(arch):
    for how in (dict(temperature=1.7), dict(top_p=.6), dict(greedy=True), {}):
        r = rolled(arch, **how)
        want = full(policy(arch), r)
        close(r.policy_logp, want, 2e-5)
        differ = (r.logp - r.policy_logp).abs().max() > .1
        assert differ == bool('temperature' in how or 'top_p' in how)


def test_nucleus_by_hand():
    z = torch.tensor([[.1, .5, .3, .1]]).log()
    kept = lambda p: (_nucleus(z, p)[0] > -torch.inf).tolist()
    assert kept(.5) == [False, True, False, False] and kept(.51) == [False, True, True, False]
    assert kept(1.) == [True] * 4 and kept(.85).count(True) == 3
    r = rolled(top_p=.6)
    assert (r.logp >= r.policy_logp - 1e-5).all()                              # what is left out goes to the others
    for bad in (dict(top_p=0.), dict(top_p=1.1), dict(temperature=0.)):
        with pytest.raises(ValueError, match='temperature must be positive'): Sampler(None, EOS, T, **bad)


# --- the fast way equals the plain one
def same(a, b, tol=2e-5):
    assert rows_of(a) == rows_of(b)
    for k in ('prompt_ids', 'prompts', 'prompt_mask', 'responses', 'mask', 'truncated'): assert torch.equal(getattr(a, k), getattr(b, k))
    close(a.logp, b.logp, tol); close(a.policy_logp, b.policy_logp, tol)


@pytest.mark.parametrize('arch', ('llama', 'qwen2', 'qwen3', 'gemma', 'gemma2', 'gemma3_text', 'olmo2', 'phi3'))
@pytest.mark.parametrize('slots', (None, 1, 4, 7))
def test_slots_change_nothing(arch, slots): # lengths from 1 to all, and a vocabulary that is a multiple of nothing
    batch, how = prompt_rows(9, V), dict(temperature=1.2, seed=5)
    fast = Sampler(policy(arch), EOS, T, slots=slots, **how)
    plain = Sampler(policy(arch), EOS, T, **how)
    plain._fast = plain._plain
    a, b = fast.generate(batch, 3), plain.generate(batch, 3)
    same(a, b)
    assert a.lengths.min() == 1 and a.lengths.max() == T and a.lengths.unique().numel() > 3
    assert fast._decoder.slots == (slots or 27) and plain._decoder is None
    one = {k: v[:1] for k, v in batch.items()}
    same(fast.generate(one), plain.generate(one))                              # a smaller batch in the same slots
    limit = Sampler(policy(arch), EOS, 1, slots=slots, **how).generate(batch, 3)
    assert limit.mask.shape == (27, 1) and torch.equal(limit.responses, a.responses[:, :1])


@pytest.mark.parametrize('slots', (1, 4, 7))
def test_looks_that_are_read_late_change_nothing(slots, monkeypatch): # as on a GPU, where the host fills in while the device decodes
    batch, how = prompt_rows(9, V), dict(temperature=1.2, seed=5, slots=slots)
    want = Sampler(policy(), EOS, T, **how).generate(batch, 3)
    monkeypatch.setattr(Sampler, '_late', lambda self, gpu: True)
    same(Sampler(policy(), EOS, T, **how).generate(batch, 3), want)


def test_the_sampler_follows_its_model():
    engine = TorchEngine(policy(), Optim(lr=.05, warmup=0.))
    s, b = Sampler(engine, EOS, T), prompt_rows(6, V)
    s.generate(b); first = s._decoder
    engine.backward(token_logps(engine, b['input_ids'], b['attention_mask'], 3).mean()); engine.step()
    fresh = Sampler(engine, EOS, T).generate(b)
    same(s.generate(b), fresh); assert s._decoder is first                     # new weights in the same buffers
    for p in engine.model.parameters(): p.data = p.data.clone()                # weights that moved
    same(s.generate(b), fresh); assert s._decoder is not first
    s.max_new_tokens = 3
    assert rows_of(s.generate(b)) == rows_of(Sampler(engine, EOS, 3).generate(b))


def test_a_model_without_decoder_says_so():
    with pytest.warns(UserWarning, match='the slower way: the family gpt2'): rolled('gpt2')


def test_a_short_attention_window_is_refused():
    model, b = policy('mistral'), prompt_rows(6, V)
    model.config.sliding_window = 18
    with pytest.raises(ValueError, match='sequences of 19 tokens are longer than the attention window of this model, 18'):
        Sampler(model, EOS, T).generate(b)
    Sampler(model, EOS, T - 1).generate(b)
    model.config.sliding_window = 6
    with pytest.raises(ValueError, match='lower max_prompt_tokens'): token_logps(model, b['input_ids'], b['attention_mask'], 3)


@pytest.mark.parametrize('precision', ('fp32', 'bf16'))
def test_an_engine_samples_with_its_weights(precision):
    engine = TorchEngine(policy(), Optim(), precision=precision)
    r = Sampler(engine, EOS, T).generate(prompt_rows(6, V), samples=5)
    if precision == 'fp32': assert rows_of(r) == rows_of(rolled())
    with torch.no_grad(): logp = token_logps(engine, r.ids, r.attention_mask, r.mask.shape[1]) * r.mask
    close(r.logp, logp, 2e-5 if precision == 'fp32' else .05)
    assert r.logp.dtype == torch.float32 and not r.logp.requires_grad


# --- answers as score models read them
def test_cut_answers_are_scored_with_eos():
    r = rolled()
    ids, mask = r.scored()
    for i in range(len(ids)):
        row, n = ids[i][mask[i].bool()].tolist(), int(r.lengths[i])
        want = r.prompts[i][r.prompt_mask[i].bool()].tolist() + r.responses[i, :n].tolist()
        assert row == want + [EOS] * bool(r.truncated[i]) and row[-1] == EOS
    assert r.truncated.any() and not r.truncated.all()


@pytest.mark.parametrize('arch', ('llama', 'gpt2', 'opt'))
@torch.no_grad()
def test_text_and_rollout_score_alike(arch): # the released code has two different scores for one cut text
    t, model, limit = tokenizer(), scorer(arch, len(tokenizer())), 6
    prompts, texts = ['is it safe ?', 'how to make a cake', 'no'], ['yes', 'ask your doctor first', 'sugar ' * 20]
    seqs = [encode_response(x, t, 10**6)[:limit] for x in texts]               # as the sampler leaves them
    truncated = torch.tensor([s[-1] != EOS for s in seqs])
    (p, pm), (y, ym) = pad([encode_prompt(x, t, 64) for x in prompts], 0, 'left'), pad(seqs, EOS)
    r = Rollout(torch.arange(3), p, pm, y, ym, torch.zeros(3, y.shape[1]), truncated, EOS)
    close(model(*r.scored()).end_scores, score_texts(model, t, prompts, texts, 64, limit))
    assert truncated.tolist()[::2] == [False, True]
    assert abs(model(r.ids, r.attention_mask).end_scores[2] - model(*r.scored()).end_scores[2]) > 1e-3


def test_take():
    r = rolled()
    short = (r.lengths < r.lengths.max()).nonzero()[:, 0]
    for rows in (torch.arange(len(r.mask)), short.flip(0)[:4], torch.tensor([3])):
        part, n = r.take(rows), r.lengths[rows]
        assert part.mask.shape[1] == n.max() and part.prompts.shape[1] == r.prompt_mask[rows].sum(1).max()
        assert torch.equal(part.lengths, n)
        for k in ('truncated', 'prompt_ids'): assert torch.equal(getattr(part, k), getattr(r, k)[rows])
        for j, i in enumerate(rows):
            for a, b in ((part, r), (part.scored, r.scored)):
                (x, xm), (y, ym) = ((o.ids, o.attention_mask) if isinstance(o, Rollout) else o() for o in (a, b))
                assert x[j][xm[j].bool()].tolist() == y[i][ym[i].bool()].tolist()
            assert torch.equal(part.logp[j, :n[j]], r.logp[i, :n[j]])


def test_what_a_gpu_remembers_of_its_masks_changes_nothing(): # there a mask carries the host's copy; here the copies are put on by hand
    plain, r = rolled(), rolled()
    for x in (r.mask, r.prompt_mask, r.truncated): x.host = x.clone()
    rows = torch.tensor([7, 2, 11])
    for a, b in ((r.take(rows), plain.take(rows)), (r, plain)):
        for k in ('prompts', 'prompt_mask', 'responses', 'mask', 'truncated', 'logp'): assert torch.equal(getattr(a, k), getattr(b, k))
        assert torch.equal(a.attention_mask, b.attention_mask) and all(map(torch.equal, a.scored(), b.scored()))
    r.mask.host[0] = 0                                                         # and it is the copy that is read
    assert r.attention_mask[0].sum() == r.prompt_mask[0].sum() < plain.attention_mask[0].sum()


# --- texts in, texts or numbers out
def texts(n=12): return sentences(n, 0), sentences(n, 1)


def test_respond_is_free_of_order_and_batches():
    t, (prompts, _) = tokenizer(), texts()
    prompts[3] = ['is it safe ?', 'no', 'are you sure ?']                      # a dialogue
    sampler = Sampler(lm('llama', len(t)), EOS, 5, seed=1)
    out = respond(sampler, t, prompts, 64, samples=2)
    order = np.random.default_rng(0).permutation(12)
    shuffled = respond(sampler, t, [prompts[i] for i in order], 64, batch_size=5, samples=2)
    strip = lambda rows: [{k: v for k, v in r.items() if k != 'prompt'} for r in rows]
    for k, i in enumerate(order): assert strip(shuffled[2 * k:2 * k + 2]) == strip(out[2 * i:2 * i + 2])
    assert [r['prompt'] for r in out] == [i // 2 for i in range(24)] and len({r['response'] for r in out}) > 12
    r = sampler.generate(prompt_batch(prompts[:1], t, 64), 2)
    assert [x['tokens'] for x in out[:2]] == [row for row, _ in rows_of(r)] and out[0]['response'] == r.texts(t)[0]
    for x in out: assert len(x['tokens']) <= 5 and x['truncated'] == (x['tokens'][-1] != EOS)


def test_by_length():
    seqs = [[0] * n for n in (3, 9, 1, 9, 4, 30)]
    batches = by_length(seqs, 18)
    assert sorted(i for b in batches for i in b) == list(range(6)) and batches[0] == [5]         # too long for the budget: alone
    assert all(len(b) == 1 or max(len(seqs[i]) for i in b) * len(b) <= 18 for b in batches) and len(batches) == 3


@pytest.mark.parametrize('arch', ('llama', 'gpt2'))
@torch.no_grad()
def test_score_texts_is_free_of_order_and_batches(arch):
    t, (prompts, answers) = tokenizer(), texts()
    model = scorer(arch, len(t))
    whole = score_texts(model, t, prompts, answers, 64, 8)
    assert whole.shape == (12,) and whole.std() > .05
    for k in (0, 7):                                                           # by hand: one row, no padding
        ids = torch.tensor([encode_prompt(prompts[k], t, 64) + encode_response(answers[k], t, 8)])
        close(model(ids, torch.ones_like(ids)).end_scores.item(), whole[k])
    order = np.random.default_rng(1).permutation(12)
    again = score_texts(TorchEngine(model), t, [prompts[i] for i in order], [answers[i] for i in order], 64, 8, batch_tokens=120)
    close(again, whole[order])


@torch.no_grad()
def test_perplexities_by_hand_and_in_any_order():
    t, (prompts, answers) = tokenizer(), texts()
    model, tokens = lm('llama', len(t)), [encode_response(a, t, 8, 'plain') for a in answers]
    tokens[5] = []                                                             # nothing was said: nothing is surprising
    whole = perplexities(model, t, prompts, tokens, 64)
    for k in (0, 7):
        head = encode_prompt(prompts[k], t, 64)
        logp = model(input_ids=torch.tensor([head + tokens[k]])).logits[0].double().log_softmax(-1)
        close(-np.mean([logp[len(head) - 1 + j, y].item() for j, y in enumerate(tokens[k])]), whole[k])
    assert whole[5] == 0
    order = np.random.default_rng(2).permutation(12)
    close(perplexities(TorchEngine(model), t, [prompts[i] for i in order], [tokens[i] for i in order], 64, batch_tokens=60), whole[order])
