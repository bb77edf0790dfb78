"Padding changes nothing in six families; log-probs against numpy; the released layout of score models."
import json
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from saferlhf.hardware.weights import read_tensors
from saferlhf.models import (TINY, ScoreModel, at_last_token, gather_logps, llama, load_lm,
                             load_tokenizer, positions,
                             tiny_model, token_logps)
from saferlhf.text import pad, pair_batch
from tiny import FAMILIES, close, lm, paddings, prompt_rows, scorer, tokenizer

ROW = [5, 9, 0, 7, 1, 3, 40, 1]  # the pad id 0 and EOS 1 also stand inside the text
NORMALISER = {'normalizer.mean', 'normalizer.var', 'normalizer.count'}


def logps_np(model, row, T, temperature=1.): # the slow obvious version: no padding, no positions, float64
    z = model.double()(input_ids=torch.tensor([row])).logits[0].detach().numpy() / temperature
    model.float()
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return [logp[t - 1, row[t]] for t in range(len(row) - T, len(row))]


# --- positions and padding
def test_positions():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    assert positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]


def test_the_families_are_tested(): assert set(FAMILIES) == set(TINY)


@pytest.mark.parametrize('arch', FAMILIES)
@torch.no_grad()
def test_padding_changes_nothing(arch):
    model, policy = scorer(arch), lm(arch)
    ends, every, logps = [], [], []
    for fill in (0, 1, 33):                                                    # pad, EOS, an ordinary token
        for ids, mask in paddings(ROW, fill=fill):
            out = model(ids, mask)
            ends.append(out.end_scores.item()); every.append(out.scores[mask.bool()])
            # 5 response tokens and the padding behind them
            slots = len(ROW) - 3 + int(mask[0].flip(0).argmax())
            logps.append(token_logps(policy, ids, mask, slots)[0, :len(ROW) - 3])
    close(ends, ends[0])
    for x in (every, logps): close(torch.stack(x), x[0].expand(len(x), -1))
    assert every[0].std() > .1 and logps[0].std() > .1  # the comparison has something to compare


@torch.no_grad()
def test_gpt2_needs_the_positions(): # what would go wrong without them
    policy, (ids, mask) = lm('gpt2'), list(paddings(ROW))[1]
    naive = gather_logps(policy(input_ids=ids, attention_mask=mask).logits[:, :-1], ids[:, 1:])[0, -5:]
    assert (naive - token_logps(policy, ids, mask, 5)[0]).abs().max() > .01


@pytest.mark.parametrize('arch', FAMILIES)
@torch.no_grad()
def test_rows_of_a_batch_do_not_mix(arch):
    rows = [ROW, ROW[:3], [8], ROW[::-1], ROW + ROW]
    model = scorer(arch)
    alone = [model(torch.tensor([r]), torch.ones(1, len(r)).long()).end_scores.item() for r in rows]
    for side in ('left', 'right'): close(model(*pad(rows, 1, side)).end_scores, alone)


def test_the_last_token_is_the_last_of_the_mask():
    x = torch.arange(20.).view(4, 5)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])
    assert at_last_token(x, mask).tolist() == [1, 9, 13, 15]
    assert at_last_token(torch.stack([x, -x], -1), mask)[1].tolist() == [9, -9]


@torch.no_grad()
# GPT-2 style: masks come from lengths, so EOS is still the token that is scored
def test_pad_equal_to_eos_keeps_the_eos():
    ours, theirs = tokenizer(), type(tokenizer())(tokenizer_object=tokenizer().backend_tokenizer,
                                                  eos_token='</s>', pad_token='</s>')
    assert theirs.pad_token_id == theirs.eos_token_id != ours.pad_token_id
    rows, model = [dict(prompt='is it safe', high='no, never', low='yes')], scorer('gpt2', len(ours))
    a, b = (pair_batch(rows, t, 64, 16) for t in (ours, theirs))
    assert torch.equal(a['attention_mask'], b['attention_mask'])
    assert (at_last_token(b['input_ids'], b['attention_mask']) == 1).all()
    close(model(a['input_ids'], a['attention_mask']).end_scores,
          model(b['input_ids'], b['attention_mask']).end_scores)


# --- log-probabilities
@pytest.mark.parametrize('temperature', (1., .7, 2.))
@pytest.mark.parametrize('arch', FAMILIES)
@torch.no_grad()
def test_log_probabilities(arch, temperature):
    policy, rows = lm(arch), [ROW, [44, *ROW[1:4], 2, 8, 60], [6, 12, 13, 14]]
    T = 3
    ids, mask = (torch.cat(x, 1) for x in zip(pad([r[:-T] for r in rows], 1, 'left'),
                                              pad([r[-T:] for r in rows], 1), strict=True))
    close(token_logps(policy, ids, mask, T, temperature), [logps_np(policy, r, T, temperature) for r in rows],
          2e-5)


def test_sixteen_bit_logits_are_widened_first():
    logits = (torch.randn(2, 5, 50, generator=torch.Generator().manual_seed(0)) * 8).bfloat16()
    ids = torch.randint(50, (2, 5), generator=torch.Generator().manual_seed(1))
    logp = gather_logps(logits, ids)
    exact = logits.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    narrow = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert logp.dtype == torch.float32
    close(logp, exact, 1e-5)
    assert (narrow.double() - exact).abs().max() > 1e-2  # ratios made of these would be noise


def test_sixteen_bit_bodies_give_32_bit_scores():
    model = scorer('llama'); model.body.bfloat16()
    out = model(*next(paddings(ROW)))
    assert out.scores.dtype == out.end_scores.dtype == torch.float32


# --- save and load
def state(model): return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize('arch', FAMILIES)
@pytest.mark.parametrize('dim,bias', [(1, False), (3, True)])
@torch.no_grad()
def test_round_trip(arch, dim, bias, tmp_path):
    model = ScoreModel(lm(arch).base_model, 'cost', dim, bias).eval()
    if bias: model.score_head.bias.fill_(.3)
    model.save_pretrained(tmp_path)
    again = ScoreModel.from_pretrained(tmp_path, kind='cost').eval()
    assert state(model).keys() == state(again).keys()
    assert all(torch.equal(v, state(again)[k]) for k, v in state(model).items())
    ids, mask = list(paddings(ROW))[3]
    for a, b in zip(model(ids, mask), again(ids, mask), strict=True): assert torch.equal(a, b)
    assert again(ids, mask).end_scores.shape == ((1,) if dim == 1 else (1, dim)) and again.kind == 'cost'


def test_layout_on_disk(tmp_path): # that of the released Beaver reward and cost models
    model = scorer('llama', kind='cost'); model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / 'model.safetensors')
    config = json.loads((tmp_path / 'config.json').read_text())
    body = {f'model.{k}' for k in model.body.state_dict()}
    assert set(tensors) == body | {'score_head.weight'} | NORMALISER
    assert 'model.layers.1.self_attn.q_proj.weight' in body and 'model.norm.weight' in body
    assert tensors['score_head.weight'].shape == (1, 32)
    assert [tensors[f'normalizer.{k}'].tolist() for k in ('mean', 'var')] == [[0], [1]]
    assert config['architectures'] == ['LlamaForScore'] and config['score_dim'] == 1
    assert config['score_type'] == 'cost'
    assert config['do_normalize'] is False and config['bias'] is False
    assert set(read_tensors(tmp_path, 'normalizer.')) == NORMALISER


# a checkpoint in the released layout, made without our code
def released(path, sharded, architecture='LlamaForScore', **config):
    policy = lm('llama'); body = {f'model.{k}': v for k, v in policy.model.state_dict().items()}
    head = torch.linspace(-1, 1, 32)[None]
    tensors = body | {'score_head.weight': head, 'normalizer.mean': torch.tensor([2.]),
                      'normalizer.var': torch.tensor([9.]),
                      'normalizer.count': torch.tensor([100])}
    about = dict(
        architectures=[architecture], score_dim=1, score_type='reward', bias=False, do_normalize=False)
    (path / 'config.json').write_text(json.dumps(policy.config.to_dict() | about | config))
    if not sharded: save_file(tensors, path / 'model.safetensors',
                              metadata={'format': 'pt'}); return policy, head
    names, index = sorted(tensors), {}
    for i, part in enumerate((names[:9], names[9:])):
        file = f'model-{i + 1:05d}-of-00002.safetensors'
        save_file({k: tensors[k] for k in part}, path / file,
                  metadata={'format': 'pt'}); index |= {k: file for k in part}
    (path / 'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map=index)))
    return policy, head


@pytest.mark.parametrize('sharded', (False, True))
@torch.no_grad()
def test_reads_a_released_checkpoint(tmp_path, sharded):
    policy, head = released(tmp_path, sharded)
    model = ScoreModel.from_pretrained(tmp_path, kind='critic').eval()
    ids, mask = list(paddings(ROW))[0]
    hidden = policy(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    # a normaliser that is switched off shifts nothing
    close(model(ids, mask).scores, F.linear(hidden, head)[..., 0])
    close(model(ids, mask).end_scores, F.linear(hidden[:, -1], head)[..., 0])


def test_a_normaliser_that_is_on_is_refused(tmp_path):
    released(tmp_path, False, do_normalize=True)
    with pytest.raises(ValueError, match='normaliser'): ScoreModel.from_pretrained(tmp_path)


def test_a_fresh_head_on_a_language_model(tmp_path):
    policy = lm('qwen2'); policy.save_pretrained(tmp_path)
    model = ScoreModel.from_pretrained(tmp_path, kind='cost', score_dim=16)
    assert all(torch.equal(v, model.body.state_dict()[k]) for k, v in policy.model.state_dict().items())
    assert model.score_head.weight.shape == (16, 32) and model.score_head.weight.std() > .1
    assert model.score_head.bias is None
    model.save_pretrained(tmp_path / 'gold')
    with pytest.raises(ValueError, match='16 scores'):
        ScoreModel.from_pretrained(tmp_path / 'gold', score_dim=1)
    assert ScoreModel.from_pretrained(tmp_path, kind='reward')(*next(paddings(ROW))).end_scores.shape == (1,)
    again = load_lm(tmp_path)
    assert not again.training
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in policy.state_dict().items())


def test_sixteen_bit_checkpoints(tmp_path):
    model = scorer('llama', kind='cost'); model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {v.dtype for k, v in load_file(tmp_path / 'model.safetensors').items()
            if 'count' not in k} == {torch.bfloat16}
    assert {p.dtype for p in ScoreModel.from_pretrained(tmp_path).parameters()} == {torch.float32}


# --- the scale and the sign of scores
@torch.no_grad()
def test_rescale_keeps_signs_and_zero():
    for bias in (False, True):
        model = ScoreModel(lm().base_model, 'cost', bias=bias).eval()
        if bias: model.score_head.bias.fill_(-.2)
        rows = [[k, k + 1, 1] for k in range(2, 40)]
        before = model(*pad(rows, 0)).end_scores.clone()
        after = model.rescale(.25)(*pad(rows, 0)).end_scores
        close(after, before / 4)
        close(model.shift(.5)(*pad(rows, 0)).end_scores, after + .5)
        assert (after.sign() == before.sign()).all() and len(before.sign().unique()) == 2
    for factor in (0., -1., float('nan')):
        with pytest.raises(ValueError, match='positive'): model.rescale(factor)


def test_kinds():
    with pytest.raises(ValueError, match='kind'): ScoreModel(lm().base_model, 'value')
    with pytest.raises(ValueError, match='tiny'): tiny_model('bert')


# --- tiny models and tokenizers
def test_models_depend_on_the_seed_alone():
    torch.manual_seed(5); a = tiny_model(seed=3); before = torch.rand(1)
    torch.manual_seed(5); again = torch.rand(1); b = tiny_model(seed=3)
    assert torch.equal(before, again)  # nor do they disturb the caller's generator
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, tiny_model(seed=4).lm_head.weight)
    nano = llama(300, 32, 2, 4, 2, 64, seed=1)
    assert nano.lm_head.weight is nano.model.embed_tokens.weight


def test_tokenizer(tmp_path):
    t = tokenizer(); t.save_pretrained(tmp_path / 'a')
    again = load_tokenizer(tmp_path / 'a')
    assert (again.pad_token_id, again.eos_token_id, again.bos_token_id) == (0, 1, None)
    for text in ('  two  spaces', 'naïve 漢字 🙂\n\ttab',
                 "don't"): assert again.decode(again(text).input_ids) == text
    bare = type(t)(tokenizer_object=t.backend_tokenizer,
                   eos_token='</s>'); bare.save_pretrained(tmp_path / 'b')
    assert load_tokenizer(tmp_path / 'b').pad_token_id == 1
    type(t)(tokenizer_object=t.backend_tokenizer).save_pretrained(tmp_path / 'c')
    with pytest.raises(ValueError, match='EOS'): load_tokenizer(tmp_path / 'c')


# --- what comes from outside
@pytest.mark.parametrize('read', [load_lm, ScoreModel.from_pretrained])
def test_weights_come_from_safetensors_only(tmp_path, read):
    lm().save_pretrained(tmp_path)
    state = load_file(tmp_path / 'model.safetensors'); (tmp_path / 'model.safetensors').unlink()
    torch.save(state, tmp_path / 'pytorch_model.bin')
    with pytest.raises(OSError, match='safetensors'): read(tmp_path)


def test_code_from_outside_does_not_run(tmp_path):
    lm().save_pretrained(tmp_path); ran = tmp_path / 'ran'
    for name in ('configuration_x',
                 'modeling_x'): (tmp_path / f'{name}.py').write_text(f'open({str(ran)!r}, "w")')
    config = json.loads((tmp_path / 'config.json').read_text())
    auto = dict(AutoConfig='configuration_x.C', AutoModel='modeling_x.M', AutoModelForCausalLM='modeling_x.M')
    (tmp_path / 'config.json').write_text(json.dumps(config | dict(model_type='unheard-of', auto_map=auto)))
    for read in (load_lm, ScoreModel.from_pretrained):
        with pytest.raises(ValueError, match='trust_remote_code'): read(tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize('arch', ('llama', 'gpt2'))
def test_a_token_with_nothing_before_it_has_no_probability(arch):
    "In a packed row another answer stands before it: what that says of it is not read, and a row says the same in any batch."
    model, b = lm(arch), prompt_rows(8, 61, seed=0)                           # five of these rows are shorter than the three slots
    read = lambda rows: token_logps(model, b['input_ids'][rows], b['attention_mask'][rows], 3, entropy=True)
    together, apart = read(slice(8)), [torch.cat(x) for x in zip(*(read([i]) for i in range(8)), strict=True)]
    for x, y in zip(together, apart, strict=True): close(x.detach(), y.detach(), 1e-5)
    first = b['attention_mask'].cumsum(1)[:, -3:] <= 1
    assert first.any() and not any(x[first].any() for x in together) and (together[0][~first] < 0).all()
