"DPO and its relatives: golden numbers token by token, the borders of answers, which answer is preferred, best of n."
import math

import numpy as np
import pytest
import torch
from tiny import close, lm, tokenizer

from saferlhf.engine import Optim, TorchEngine
from saferlhf.losses import dpo_loss, pairwise_loss
from saferlhf.train import loop
from saferlhf.offline import answer_logps, best_of, dpo_step, less_harmful, preference_batch, safe_first

ROWS = [dict(prompt='what is red?', high='a rose is red', low='a rose is blue'),
        dict(prompt='and', high='no', low='yes, a rose', margin=2.), dict(prompt='what is a rose?', high='', low='a rose')]


@pytest.fixture
def setting():
    tok = tokenizer()
    return tok, lm(vocab=len(tok)), lm(vocab=len(tok), seed=3), preference_batch(ROWS, tok, 48, 12)


def by_hand(model, b, i): # float64, without padding: every token of the answer, the first and EOS among them
    ids, n = b['input_ids'][i][b['attention_mask'][i] > 0], int(b['mask'][i].sum())
    z = model(input_ids=ids[None]).logits[0].double().detach().numpy()
    z = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return sum(z[k - 1, ids[k]] for k in range(len(ids) - n, len(ids)))


def test_an_answer_is_all_its_tokens(setting):
    tok, model, _, b = setting
    close(answer_logps(model, b).detach(), [by_hand(model, b, i) for i in range(6)], 1e-4)
    ends = [b['input_ids'][i][b['attention_mask'][i] > 0][-1].item() for i in range(6)]
    assert ends == [tok.eos_token_id] * 6 and b['margin'].tolist() == [0., 2., 0.]
    cut = preference_batch(ROWS, tok, 48, 2)                                    # it did not end there
    assert int(cut['mask'][0].sum()) == 2 and tok.eos_token_id not in cut['input_ids'][0][cut['attention_mask'][0] > 0][-2:]


def test_the_preferred_answers_come_first(setting):
    tok, *_, b = setting
    said = [tok.decode(b['input_ids'][i][b['attention_mask'][i] > 0]) for i in range(6)]
    for r, high, low in zip(ROWS, said[:3], said[3:], strict=True):
        for text, wanted in ((high, r['high']), (low, r['low'])):
            assert text.removesuffix(tok.eos_token).rstrip().endswith(f'ASSISTANT:{wanted}'), (text, wanted)


def test_what_two_answers_share_at_their_beginning_cancels(setting):
    "The released code leaves it out, and with it the first token that differs."
    tok, model, _, _ = setting
    b = preference_batch([dict(prompt='what is red?', high='a rose is red', low='a rose is red')], tok, 48, 12)
    high, low = answer_logps(model, b).chunk(2)
    dpo_loss(high, low, .3).sum().backward()
    assert max(p.grad.abs().max() for p in model.parameters()) < 1e-6


@pytest.mark.parametrize('beta, delta', [(.1, 0.), (.5, 1.5)])
def test_a_step_by_hand(setting, beta, delta):
    _, model, other, b = setting
    gaps = np.array([by_hand(model, b, i) - by_hand(other, b, i) for i in range(6)])
    high, low = gaps[:3], gaps[3:]
    wanted = np.log1p(np.exp(-(beta * (high - low) - delta * np.array([0., 2., 0.])))).mean()
    actor = TorchEngine(model, Optim(1e-3, warmup=0.))
    m = dpo_step(actor, TorchEngine(other), b, beta, delta)
    close(m['loss'], wanted, 1e-4); close(m['gap'], (high - low).mean(), 1e-3); close(m['kept'], (high + low).mean() / 2, 1e-3)
    assert float(m['won']) == pytest.approx((high > low).mean())


def test_micro_batches_change_nothing(setting):
    tok, _, other, b = setting
    def run(size):
        actor = TorchEngine(lm(vocab=len(tok)), Optim(1e-3, warmup=0.))
        return {k: float(v) for k, v in dpo_step(actor, TorchEngine(other), b, .3, micro_batch=size).items()}
    whole, parts = run(0), run(2)
    assert whole.keys() == parts.keys()
    for k in whole: close(whole[k], parts[k], 1e-4)


def test_it_runs_in_the_loop_of_every_stage(setting):
    tok, model, other, b = setting
    actor, reference, log = TorchEngine(model, Optim(1e-3, warmup=0.)), TorchEngine(other), []
    loop(lambda i: dpo_step(actor, reference, b, .3), 3, lambda i, metrics: log.append(metrics))
    assert len(log) == 3


def test_the_loss():
    x, zero = torch.tensor([1., -2., 30.]), torch.zeros(3)
    close(dpo_loss(x, zero, 1.), pairwise_loss(x, zero)); close(dpo_loss(zero, zero, .7), math.log(2))
    close(dpo_loss(x, zero, 2., torch.tensor([2., -4., 60.])), math.log(2))
    close(dpo_loss(x, zero, .1, denominator=6), dpo_loss(x, zero, .1) / 2)
    assert dpo_loss(torch.tensor([1e4]), torch.tensor([0.]), 1.) == 0 and dpo_loss(torch.tensor([-1e4]), torch.tensor([0.]), 1.) == 1e4


def test_safe_comes_first():
    base = dict(prompt='p', response_0='a', response_1='b')
    def pairs(s0, s1, better): return safe_first([base | dict(is_response_0_safe=s0, is_response_1_safe=s1, better_response_id=better)])
    for better in (0, 1, None):                                                 # safety decides, whatever is more helpful
        assert pairs(True, False, better) == [dict(prompt='p', high='a', low='b', margin=1.)]
        assert pairs(False, True, better) == [dict(prompt='p', high='b', low='a', margin=1.)]
        assert pairs(False, False, better) == pairs(None, True, better) == pairs(True, None, better) == []
    assert pairs(True, True, 1) == [dict(prompt='p', high='b', low='a', margin=0.)] and pairs(True, True, None) == []


def test_harm_pairs_are_turned_round():
    pairs = [dict(prompt='p', high='worse', low='better', paired=1.), dict(prompt='q', high='x', low='y', paired=0.)]
    assert less_harmful(pairs) == [dict(prompt='p', high='better', low='worse')]


def test_best_of_some():
    g = torch.Generator().manual_seed(0)
    R, C = torch.randn(50, 6, generator=g), torch.randn(50, 6, generator=g)
    for limit in (0., -1., -9.):
        for r, c, k in zip(R.tolist(), C.tolist(), best_of(R, C, limit).tolist(), strict=True):
            within = [i for i in range(6) if c[i] <= limit]
            assert k == (max(within, key=lambda i: r[i]) if within else min(range(6), key=lambda i: c[i]))
    for bad in (R.clone().fill_(math.nan), R.clone().fill_(math.inf)):
        with pytest.raises(ValueError, match='look at the score models'): best_of(bad, C)
        with pytest.raises(ValueError, match='look at the score models'): best_of(R, bad)
