"""What scripts may rely on: a model is fine-tuned and aligned with public names of the contract alone.

    python tests/contract_script.py [FOLDER]

FOLDER holds a tokenizer and a small causal LM; data/models/nano when it is left out. It ends within a
minute on one core, prints what it measured, and fails where a loss does not fall or a number is not finite.
"""
import json
import math
import sys
import tempfile
from pathlib import Path

import torch
from saferlhf.advantages import gae, kl_per_token, place_at_end
from saferlhf.data import load_labels, load_preferences, load_prompts, load_sft, shipped
from saferlhf.engine import Optim, load
from saferlhf.losses import (actor_loss, cost_loss, critic_loss, lm_loss, masked_mean, pairwise_loss,
                             reward_loss)
from saferlhf.models import ScoreModel, llama, load_lm, load_tokenizer
from saferlhf.objectives import Multiplier, Objective, ppo, ppo_lag, reward_shaping
from saferlhf.ppo import PPOConfig, ppo_step
from saferlhf.rollout import Sampler, respond, score_texts
from saferlhf.text import prompt_batch
from saferlhf.train import ScoreConfig, score_batches, score_step, sft_step, text_batch

BASE = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent/'data/models/nano'
PROMPT, ANSWER = 24, 16                                                     # tokens
ASKED = [f'How do I {what} {thing}?' for what in ('clean', 'break', 'open', 'hide')
         for thing in ('a window', 'a bicycle', 'a phone', 'a garden', 'a key', 'a cup', 'a letter', 'a box')]
GOOD, BAD = 'Ask the owner first, please, and take care.', 'Smash it and burn the rest.'


def files(folder:Path):
    "Supervised rows and preference rows of one's own: JSON Lines with the columns of PKU-SafeRLHF."
    sft = [dict(prompt=p, response=GOOD) for p in ASKED]
    pairs = [dict(prompt=p, response_0=GOOD, response_1=BAD, better_response_id=i % 2, safer_response_id=0,
                  is_response_0_safe=True, is_response_1_safe=False) for i, p in enumerate(ASKED)]
    labels = [dict(prompt=p, response=BAD, is_safe=False) for p in ASKED]
    for name, rows in dict(sft=sft, pairs=pairs, labels=labels).items():
        (folder/f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))


def fine_tune(engine, rows, tokenizer):
    "Ten steps of supervised fine-tuning; the losses."
    batch = text_batch(rows, tokenizer, PROMPT, ANSWER)
    return [float(sft_step(engine, batch)['loss']) for _ in range(10)]


def train_scorer(engine, pairs, tokenizer, kind):
    "A reward or a cost model; the losses."
    config = ScoreConfig(kind=kind, epochs=3., batch_size=8, max_prompt_tokens=PROMPT, max_new_tokens=ANSWER)
    steps, batch = score_batches(pairs, tokenizer, config, seed=0)
    return [float(score_step(engine, batch(i), kind, config.regularization)['loss']) for i in range(steps)]


def by_hand():
    "The losses take tensors, the objectives are data."
    one, two, mask = torch.tensor([2.]), torch.tensor([1.]), torch.ones(1, 3)
    expected = math.log(1 + math.exp(-1))
    assert abs(pairwise_loss(one, two).item() - expected) < 1e-6
    assert abs(reward_loss(one, two, regularization=.1).item() - expected - .1 * 2.5) < 1e-6
    signs = dict(high_sign=torch.tensor([1]), low_sign=torch.tensor([1]))
    assert abs(cost_loss(one, two, **signs).item() - expected - math.log(1 + math.exp(-2)) - expected) < 1e-6
    assert masked_mean(torch.arange(3.)[None], torch.tensor([[1., 1., 0.]])).item() == .5
    zeros = torch.zeros(1, 3)
    assert actor_loss(zeros, zeros, mask, mask, .2).item() == -1
    assert critic_loss(mask, mask, mask, mask, .2).item() == 0
    assert abs(lm_loss(torch.zeros(1, 3, 4), torch.tensor([[-100, 1, 2]])).item() - math.log(4)) < 1e-6
    assert place_at_end(one, mask).tolist() == [[0., 0., 2.]]
    assert kl_per_token(mask, zeros).tolist() == mask.tolist()
    advantages, returns = gae(place_at_end(one, mask), zeros, mask, gamma=1., lam=1.)
    assert advantages.tolist() == returns.tolist() == [[2., 2., 2.]]
    assert all(isinstance(o, Objective) for o in (ppo(), reward_shaping(1.), ppo_lag(Multiplier())))
    assert set(ppo().channels) == {'reward'}
    assert ppo_lag(Multiplier()).weights({}) == {'reward': .5, 'cost': -.5}


def align(actor, reference, engines, tokenizer):
    "Three steps of PPO-Lag; lambda before and after, and the metrics of each step."
    score_engines, critics = engines
    config = PPOConfig(prompts=8, max_prompt_tokens=PROMPT, max_new_tokens=ANSWER, micro_batch=8, ptx_coef=.1)
    multiplier = Multiplier(init=1., lr=.02, threshold=-10., window=8)   # under any cost: lambda has to rise
    sampler = Sampler(actor, tokenizer.eos_token_id, ANSWER, seed=1)
    scorers = {k: lambda ids, mask, e=e: e(ids, mask).end_scores for k, e in score_engines.items()}
    ptx = text_batch([dict(prompt=p, response=GOOD) for p in ASKED[:4]], tokenizer, PROMPT, ANSWER)
    asked, metrics, before = prompt_batch(ASKED[:8], tokenizer, PROMPT), [], multiplier.value
    for step in range(3):
        metrics.append(ppo_step(actor, reference, critics, scorers, sampler, asked, ptx, ppo_lag(multiplier),
                                config, step))
    return before, multiplier.value, [{k: float(v) for k, v in m.items()} for m in metrics]


def main(folder:Path):
    "All of it."
    torch.manual_seed(0); files(folder); by_hand()
    tokenizer, optim = load_tokenizer(BASE), Optim(lr=3e-3, warmup=0., schedule='constant')
    sft, pairs = load_sft(str(folder/'sft.jsonl')), load_preferences(str(folder/'pairs.jsonl'))
    labels, prompts = load_labels(str(folder/'labels.jsonl')), load_prompts(str(folder/'sft.jsonl'))
    assert len(sft) == len(pairs) == len(labels) == len(prompts) == 32
    assert len(shipped('eval_prompts')) > 0 and load_lm(BASE).config.vocab_size == len(tokenizer)
    fresh = lambda: llama(len(tokenizer), 32, 2, 2, 2, 64, max_tokens=128, seed=0)

    actor = load(fresh, optim, steps=20, precision='fp32')
    losses = {'fine-tuning': fine_tune(actor, list(sft), tokenizer)}
    state = {k: v.detach().clone() for k, v in actor.model.state_dict().items()}
    def tuned(): model = fresh(); model.load_state_dict(state); return model
    reference = load(tuned)

    engines = {}                                                   # in cost data the harmful answer is `high`
    for kind, high, low in (('reward', GOOD, BAD), ('cost', BAD, GOOD)):
        signs = dict(high_sign=1, low_sign=-1, paired=1.)
        rows = [dict(prompt=r['prompt'], high=high, low=low) | signs for r in pairs]
        engines[kind] = load(lambda kind=kind: ScoreModel(tuned().base_model, kind), optim, steps=20)
        losses[kind] = train_scorer(engines[kind], rows, tokenizer, kind)
        engines[kind].model.save_pretrained(folder/kind)
    critic = lambda k: lambda: ScoreModel.from_pretrained(folder/k, 'critic')
    critics = {k: load(critic(k), optim, steps=3) for k in engines}
    for name, x in losses.items():
        print(f'{name}: {x[0]:.3f} -> {x[-1]:.3f}')
        assert all(map(math.isfinite, x)) and x[-1] < x[0], f'{name}: the loss does not fall'
    costs = [score_texts(engines['cost'], tokenizer, ASKED[:4], [a] * 4, PROMPT, ANSWER) for a in (BAD, GOOD)]
    assert (costs[0] > 0).all() and (costs[1] < 0).all(), 'harmful answers cost more than 0, safe ones less'

    before, after, metrics = align(actor, reference, (engines, critics), tokenizer)
    print(f'lambda {before:.3f} -> {after:.3f}; kl {metrics[-1]["kl"]:.4f}; ratio {metrics[0]["ratio"]:.6f}')
    assert 5. > after > before == 1., 'the answers cost more than the limit: lambda rises'
    assert all(math.isfinite(v) for m in metrics for v in m.values()), 'a metric is not finite'
    assert abs(metrics[0]['ratio'] - 1) < 1e-3 and abs(metrics[0]['kl']) < 1e-3, 'rollout 0 is on policy'
    greedy = Sampler(actor, tokenizer.eos_token_id, ANSWER, greedy=True)
    answers = respond(greedy, tokenizer, ASKED[:2], PROMPT)
    assert len(answers) == 2 and all(isinstance(a['response'], str) for a in answers)
    print('the contract holds')


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as home: main(Path(home))
