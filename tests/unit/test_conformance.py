"The suite for trainers: this package passes; a wrong twin for each trap fails there, and says what it found; TRL through an adapter."
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from project import ROOT

from saferlhf.apps.commands import main
from saferlhf.apps.conformance import TRAPS, Ours, conformance, report
from saferlhf.losses import actor_loss, cost_loss, critic_loss
from saferlhf.objectives import Multiplier, reward_shaping

ours = Ours()
positions = lambda x, mask: torch.arange(mask.shape[1]).expand_as(mask)                  # of the column
last_column = lambda x, scores, mask: scores[:, -1]
without_pad = lambda x, ids, eos, pad: (ids != pad).long()
unshifted = lambda x, z, ids: z[:, 1:].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
narrow = lambda x, z, ids: z[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].float()


def one_stream(x, reward, cost, kl, mask, kl_coef):
    r, _ = ours.token_rewards(reward, cost, kl, mask, kl_coef)
    return r, ours.token_rewards(reward, cost, kl, mask, 0.)[1]


def by_micro_batch(x, lam, costs, threshold, lr): # SGD on lambda itself
    return lam + lr * (float(costs.mean()) - threshold)


def upside_down(x, lam, costs, threshold, lr): return ours.multiplier(lam, -costs, -threshold, lr)


def mean_of_nothing(x, lam, costs, threshold, lr): return lam * math.exp(lr * lam * (float(costs.mean()) - threshold))


def clipped_apart(x, logp, old, ar, ac, lam, mask, clip):
    return (actor_loss(logp, old, ar, mask, clip) - lam * actor_loss(logp, old, ac, mask, clip)) / (1 + lam)


def by_token(x, logp, old, ar, ac, lam, mask, clip):
    ratio, a = (logp - old).exp(), (ar - lam * ac) / (1 + lam)
    return -(torch.min(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a) * mask).sum() / mask.sum()


def leaking(x, rewards, values, mask, gamma, lam):
    a, g = ours.gae(rewards, values, torch.ones_like(mask), gamma, lam)
    return a * mask, g * mask


def whitened(x, *a):
    adv, g = ours.gae(*a)
    return (adv - adv.mean()) / adv.std(), g


def whole_square(x, *a): return 2 * critic_loss(*a)
def clip_50(x, reward, cost, nu): return reward_shaping(nu, clip=50.).channels['shaped'][0](dict(reward=reward, cost=cost))
def half_step(x, rl, ptx, coef): return (rl + coef * ptx) / 2


def top_50(x, z, temperature):
    kept = torch.where(z >= z.topk(50).values[:, -1:], z, -torch.inf)
    return (kept / temperature).softmax(-1)


def safest_first(x, high, low, high_sign, low_sign): return cost_loss(low, high, high_sign, low_sign)
def data_sign(x, is_safe): return 1 if is_safe else -1


def off_by_one(x, policy, reference, rows, beta): # the released code's slice: from the first difference on, one too far
    def sliced(model, prompt, answer, first):
        ids = torch.tensor([prompt + answer + [0]])
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        return logp[len(prompt) + first:len(prompt) + len(answer)].sum()
    total = 0.
    for prompt, *answers in rows:
        first = next(k for k, (a, b) in enumerate(zip(*answers, strict=False)) if a != b)
        high, low = (sliced(policy, prompt, y, first) - sliced(reference, prompt, y, first) for y in answers)
        total = total - F.logsigmoid(beta * (high - low))
    return total / len(rows)


def same_order(x, n, epoch, seed): return ours.order(n, 0, seed)
def padded(x, n, epoch, seed): return (ours.order(n, epoch, seed) * 2)[:n + n % 3]
def same_noise(x, seed, rank): return ours.noise(seed, 0)
def rounding(x, s, n): g = s.view(-1, n); return ((g - g.sum(1, keepdim=True) / n) / (g.std(1, keepdim=True) + 1e-12)).flatten()
def scalarised(x, r, c, lam, n): return ours.group_relative((r - lam * c) / (1 + lam), n)


TWINS = { # title of the trap -> function, wrong there; what else it breaks by itself
    'positions come from the mask': ('positions', positions),
    'the score stands at the last token of the mask': ('end_scores', last_column),
    'the mask does not lose EOS where pad is EOS': ('response_mask', without_pad),
    'log-probabilities are shifted once': ('token_logps', unshifted, 'log-probabilities are computed in 32 bits'),
    'the KL term goes into both streams, score at the end': ('token_rewards', one_stream, 'the KL pressure is the same for every lambda'),
    'the KL pressure is the same for every lambda': ('token_rewards', one_stream, 'the KL term goes into both streams, score at the end'),
    'lambda moves in log space': ('multiplier', by_micro_batch, 'no costs and NaN do not move lambda'),
    'lambda rises above the limit': ('multiplier', upside_down, 'lambda moves in log space'),
    'no costs and NaN do not move lambda': ('multiplier', mean_of_nothing),
    'advantages are combined, then clipped': ('actor_loss', clipped_apart),
    'mean per answer, then over answers; an empty one is no NaN': ('actor_loss', by_token),
    'advantages are not whitened': ('gae', whitened, 'values on padding do not leak into GAE'),
    'values on padding do not leak into GAE': ('gae', leaking),
    'half the square, clipped near the old value': ('critic_loss', whole_square),
    'the score clip does not bend shaping': ('shaped', clip_50),
    'PTX is part of the same step, whole': ('total_loss', half_step),
    'no hidden filter, the temperature counts': ('probabilities', top_50),
    'log-probabilities are computed in 32 bits': ('token_logps', narrow),
    'labels of safety become signs of harm': ('harm_sign', data_sign),
    'the more harmful answer scores higher, signs as labels': ('cost_loss', safest_first),
    'the better answer scores higher': ('reward_loss', lambda x, high, low: ours.reward_loss(low, high)),
    'DPO reads the whole answer, first token and EOS': ('dpo', off_by_one),
    'every row once an epoch, in a new order': ('order', same_order),
    'ranks draw other numbers': ('noise', same_noise),
    'equal scores of a group teach nothing': ('group_relative', rounding),
    'channels are standardised, then weighed by lambda': ('lag_relative', scalarised)}


def test_this_package_passes(capsys):
    rows = report('saferlhf.apps.conformance:Ours')
    assert {r['title'] for r in rows if r['state'] != 'ok'} == {'PTX is part of the same step, whole'}
    assert capsys.readouterr().out.endswith('25 ok, 0 FAILED, 1 not tried\n')


def test_every_trap_has_a_twin(): assert [t.title for t in TRAPS] == [*TWINS]


@pytest.mark.parametrize('title', TWINS)
def test_a_wrong_twin_fails_there(title):
    name, wrong, *more = TWINS[title]
    rows = {r['title']: r for r in conformance(type('Twin', (Ours,), {name: wrong})())}
    assert rows[title]['state'] == 'FAILED' and 'ended with' not in rows[title]['found'], rows[title]
    assert {t for t, r in rows.items() if r['state'] == 'FAILED'} == {title, *more}


def test_padded_epochs_are_found():
    row = next(r for r in conformance(type('Twin', (Ours,), dict(order=padded))()) if 'epoch' in r['title'])
    assert row['found'] == 'an epoch has 41 rows, 40 different ones, of 40'


def test_an_adapter_may_have_little_or_be_broken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'my_trainer.py').write_text('''class Little:
    def harm_sign(self, is_safe): return -1 if is_safe else 1
    def shaped(self, reward, cost, nu): raise NotImplementedError
class Broken(Little):
    def order(self, n, epoch, seed): return 1 / 0
class Nothing: pass
made = Little()
''')
    assert main(['conformance', 'my_trainer:Little']) == 0 and '1 ok, 0 FAILED, 25 not tried' in capsys.readouterr().out
    assert main(['conformance', 'my_trainer:made']) == 0 and '1 ok' in capsys.readouterr().out                     # an object, not a class
    assert main(['conformance', 'my_trainer:Broken']) == 1
    told = capsys.readouterr()
    assert 'order ended with ZeroDivisionError' in told.out and told.err == 'saferlhf: 1 of 2 checks failed\n'
    for name, said in (('my_trainer:Nothing', 'none of the functions'), ('my_trainer:Other', 'no function'), ('none:X', 'no module none')):
        assert main(['conformance', name]) == 1 and said in capsys.readouterr().err


def test_trl_through_its_adapter(monkeypatch):
    "Its DPO reads whole answers and its clip comes after combining; log-probabilities of 16-bit logits are computed in 16 bits (TRL 1.16)."
    monkeypatch.syspath_prepend(str(ROOT/'nbs/tutorials'))
    from trl_adapter import Trl
    rows = {r['title']: r['state'] for r in conformance(Trl()) if r['state'] != 'not tried'}
    assert len(rows) == 5 and {t for t, s in rows.items() if s != 'ok'} <= {'log-probabilities are computed in 32 bits'}, rows


def test_the_checks_leave_their_adapter_as_it_was():
    x = Ours(); before = copy.deepcopy(vars(x))
    assert conformance(x) == conformance(x) and vars(x) == before
    assert Multiplier().value == 1.
