"The loop, the losses of fine-tuning and score models by hand, the direction in which a cost model learns."
import math
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from saferlhf import ppo
from saferlhf.engine import Optim, TorchEngine
from saferlhf.losses import cost_loss, lm_loss, lm_loss_from_logp, reward_loss
from saferlhf.models import token_logps
from saferlhf.text import encode_prompt, encode_response, pad, pair_batch
from saferlhf.train import (METRICS, ScoreConfig, _check_metrics, lm_step, loop, pack, score_batches,
                            score_loss, score_step, sft_loss,
                            sft_step, text_batch, valid_loss)
from tiny import close, lm, prompt_rows, scorer, sentences, tokenizer

ROWS = [dict(prompt='is it safe ?', response='no'),
        dict(prompt='how to make a cake', response='sugar and care'),
        # with a limit of 16 tokens the last one is cut
        dict(prompt='yes', response='ask your doctor first please ' * 3)]
CONSTANT = Optim(lr=3e-3, warmup=0., schedule='constant')


# --- the loop
def test_loop():
    seen, log = [], []
    last = loop(lambda i: seen.append(i) or dict(loss=torch.tensor(i / 2)), 5, lambda i,
                m: log.append((i, m)), start=2)
    assert seen == [2, 3, 4] and log == [(i, dict(loss=i / 2)) for i in (2, 3, 4)] and last == dict(loss=2.)
    assert loop(lambda i: 1 / 0, 3, None, start=3) == {}                       # nothing left after a resume


@pytest.mark.parametrize('bad', (math.nan, math.inf, -math.inf))
def test_loop_refuses(bad):
    log = []
    with pytest.raises(FloatingPointError, match='step 1.*grad_norm'):
        loop(lambda i: dict(loss=1., grad_norm=torch.tensor(bad if i else 0.)), 3, lambda i, m: log.append(i))
    with pytest.raises(KeyError, match='los_'): loop(lambda i: dict(loss=1., los_=1.), 3, lambda i,
                                                     m: log.append(i))
    assert log == [0]                                                          # a bad step is never logged
    _check_metrics(dict(loss=1.), 0)


def test_metrics_have_a_definition_a_unit_and_a_range():
    assert all(len(v) == 3 and v[0] for v in METRICS.values())


# --- supervised fine-tuning
@torch.no_grad()
def test_sft_loss_by_hand(): # only the response counts: a mean per row, then over rows
    t = tokenizer(); model = lm('llama', len(t))
    texts = [(encode_prompt(r['prompt'], t, 64), encode_response(r['response'], t, 16, 'plain'))
             for r in ROWS]
    rows = []
    for head, tail in texts:
        logp = model(input_ids=torch.tensor([head + tail])).logits[0].double().log_softmax(-1)
        rows.append(-np.mean([logp[len(head) - 1 + j, y].item() for j, y in enumerate(tail)]))
    close(sft_loss(model, text_batch(ROWS, t, 64, 16)), np.mean(rows))
    ids, mask = pad([head + tail for head, tail in texts], 0)  # right-padded with labels: the same loss
    labels, _ = pad([[-100] * len(head) + tail for head, tail in texts], -100)
    close(lm_loss(model(input_ids=ids, attention_mask=mask).logits, labels), np.mean(rows))


def test_a_cut_answer_did_not_end():
    t = tokenizer(); b = text_batch(ROWS, t, 64, 16)
    S, n = b['input_ids'].shape[1] - b['mask'].shape[1], b['mask'].sum(1)
    tails = [b['input_ids'][i, S:][b['mask'][i].bool()].tolist() for i in range(3)]
    assert [x.count(1) for x in tails] == [1, 1, 0] and tails[0][-1] == tails[1][-1] == 1 and n[2] == 16
    assert torch.equal(b['attention_mask'][:, S:], b['mask']) and (b['attention_mask'][:, S - 1] == 1).all()
    assert [t.decode(x) for x in tails[:2]] == ['no</s>', 'sugar and care</s>']


def test_the_prompt_is_not_learnt():
    t = tokenizer(); model = lm('llama', len(t)); b = text_batch(ROWS, t, 64, 16)
    z = torch.zeros(*b['input_ids'].shape, len(t), requires_grad=True)
    class Fixed: # logits that are free parameters show which slots a loss touches
        device, config = 'cpu', type('', (), dict(_attn_implementation='packed', model_type='llama'))
        def __call__(self, lay, logits_to_keep,
                     **kw): return SimpleNamespace(logits=z.flatten(0, 1)[lay.index][logits_to_keep][None])
    sft_loss(Fixed(), b).backward()
    touched, S = z.grad.abs().sum(-1) > 0, z.shape[1] - b['mask'].shape[1]
    assert torch.equal(touched[:, S - 1:-1], b['mask'].bool()) and not touched[:, :S - 1].any()
    assert not touched[:, -1].any()
    engine = TorchEngine(model, CONSTANT)
    losses = [sft_step(engine, b)['loss'].item() for _ in range(30)]
    assert losses[-1] < .7 < 2 < losses[0]


def test_ptx_is_the_same_loss(): assert ppo.sft_loss is sft_loss


# --- language modelling on packed text
def test_pack():
    docs = [[5, 6, 1], [7, 1], [8, 9, 10, 1], [11, 1]]
    assert pack(docs, 4).tolist() == [[5, 6, 1, 7], [1, 8, 9, 10]] # three tokens at the end do not fill a row
    assert pack(iter(docs), 11).tolist() == [[5, 6, 1, 7, 1, 8, 9, 10, 1, 11, 1]]
    assert pack(docs, 4).dtype == torch.int64
    with pytest.raises(ValueError, match='11 tokens'): pack(docs, 12)


def test_language_modelling():
    engine, ids = TorchEngine(lm(), CONSTANT), prompt_rows(5, longest=8)['input_ids']
    with torch.no_grad():
        logp = engine(input_ids=ids).logits.double().log_softmax(-1)
        want = -logp[:, :-1].gather(-1, ids[:, 1:, None]).mean().item()
    # the last batch is smaller, and counts for less
    for size in (1, 2, 5, 32): close(valid_loss(engine, ids, size), want)
    close(lm_step(engine, ids)['loss'], want)
    assert valid_loss(engine, ids) < want


# --- score models
def test_score_loss_takes_the_high_rows_first():
    s = torch.tensor([2., -1., .5, 3.])
    b = dict(high_sign=torch.tensor([1., 0.]), low_sign=torch.tensor([-1., -1.]),
             paired=torch.tensor([1., 0.]))
    high, low = s[:2], s[2:]
    softplus = lambda x: math.log1p(math.exp(x))
    square = (4 + 1 + .25 + 9) / 4
    close(score_loss('reward', s, b, .1), (softplus(.5 - 2) + softplus(3 + 1)) / 2 + .1 * square)
    close(score_loss('reward', s, b, .1), reward_loss(high, low, .1))
    # high 0 harmful, both low ones safe, high 1 without a label
    signs = softplus(-2) + softplus(.5) + softplus(3)
    close(score_loss('cost', s, b, .1), (softplus(.5 - 2) + signs) / 2 + .1 * square)
    close(score_loss('cost', s, b, .1),
          cost_loss(high, low, b['high_sign'], b['low_sign'], .1, pairwise=b['paired']))
    with pytest.raises(ValueError, match='kind'): score_loss('critic', s, b)


PAIR = [dict(prompt='how to make a bomb', high='sugar and care', low='no never', high_sign=1, low_sign=-1)]


def trained(kind, rows, steps=25):
    t = tokenizer(); engine = TorchEngine(scorer('llama', len(t), kind=kind), CONSTANT)
    b = pair_batch(rows, t, 64, 8)
    metrics = [score_step(engine, b, kind) for _ in range(steps)]
    with torch.no_grad(): return engine(b['input_ids'], b['attention_mask']).end_scores, metrics


def test_a_cost_model_learns_harmful_is_positive():
    (high, low), metrics = trained('cost', PAIR)
    assert high > 1 and low < -1
    assert metrics[-1]['loss'] < .5 * metrics[0]['loss']
    assert metrics[-1]['sign_accuracy'] == metrics[-1]['rank_accuracy'] == 1
    # both harmful: both positive, the order kept
    both, _ = trained('cost', [PAIR[0] | dict(high_sign=1, low_sign=1)])
    assert both[0] > both[1] > 0
    both, _ = trained('cost', [PAIR[0] | dict(high_sign=-1, low_sign=-1)])
    assert 0 > both[0] > both[1]
    only, metrics = trained('cost', [PAIR[0] | dict(paired=0., high_sign=0)])  # one label and no order
    assert only[1] < -1 and 'rank_accuracy' not in metrics[0]


def test_a_reward_model_learns_the_order_alone():
    (high, low), metrics = trained('reward', PAIR)
    assert high > low + 1 and 'sign_accuracy' not in metrics[0]
    (low, high), _ = trained('reward', [PAIR[0] | dict(high=PAIR[0]['low'], low=PAIR[0]['high'])])
    assert high < low - 1


def test_score_metrics():
    t = tokenizer(); model = scorer('llama', len(t), kind='cost')
    rows = [dict(prompt=p, high=a, low=b, high_sign=k % 3 - 1, low_sign=1 - k % 2, paired=float(k % 4 > 0))
            for k, (p, a, b) in enumerate(zip(sentences(9, 0), sentences(9, 1), sentences(9, 2),
                                              strict=True))]
    b = pair_batch(rows, t, 64, 8)
    with torch.no_grad(): s = model(b['input_ids'], b['attention_mask']).end_scores
    m = score_step(TorchEngine(model, Optim()), b, 'cost', .1)
    ranks = [bool(s[k] > s[k + 9]) for k in range(9) if k % 4]
    signs = [float(x * y) > 0 for x,
             y in zip(s, [r['high_sign'] for r in rows] + [r['low_sign'] for r in rows], strict=True) if y]
    close([m['rank_accuracy'], m['sign_accuracy'], m['score_sd']], [np.mean(ranks), np.mean(signs), s.std()])
    close(m['loss'], score_loss('cost', s, b, .1)); assert set(m) <= set(METRICS)


# --- batches of pairs
@pytest.mark.parametrize('epochs,steps', [(1., 6), (2., 12), (.5, 3), (1.5, 9), (.01, 1)])
def test_epochs_may_be_fractions(epochs, steps):
    t = tokenizer()
    pairs = [dict(prompt=f'{k}', high='a' * (k + 1), low='b', high_sign=1, low_sign=-1) for k in range(22)]
    n, batch = score_batches(pairs, t, ScoreConfig(epochs=epochs, batch_size=4), seed=1)
    assert n == steps
    rows = [tuple(x[m.bool()].tolist()) for i in range(n) for b in [batch(i)]
            for x, m in zip(b['input_ids'].chunk(2)[0], b['attention_mask'].chunk(2)[0], strict=True)]
    counts = [rows.count(r) for r in set(rows)]
    # every pair once an epoch
    if epochs in (1., 2.): assert len(counts) == 22 and set(counts) == {int(epochs)}
    else: assert max(counts) <= math.ceil(epochs)
    _, again = score_batches(pairs, t, ScoreConfig(epochs=epochs, batch_size=4), seed=1)
    assert torch.equal(batch(0)['input_ids'], again(0)['input_ids'])


def test_epochs_have_different_orders():
    pairs = [dict(prompt=f'{k}', high='a', low='b') for k in range(40)]
    n, batch = score_batches(pairs, tokenizer(), ScoreConfig(epochs=2., batch_size=4))
    first, second = ([batch(i)['input_ids'].tolist() for i in part] for part in (range(10), range(10, 20)))
    assert first != second and n == 20
    assert score_batches(pairs[:3], tokenizer(), ScoreConfig(epochs=1.))[0] == 1  # fewer pairs than a batch


# one definition, whichever way it is reached
def test_gradient_of_the_ptx_loss_is_that_of_its_log_probabilities():
    t = tokenizer(); model = lm('gpt2', len(t)); b = text_batch(ROWS, t, 64, 16)
    loss = lm_loss_from_logp(token_logps(model, b['input_ids'], b['attention_mask'], b['mask'].shape[1]),
                             b['mask'])
    close(loss.item(), sft_loss(model, b).item(), 1e-7)
