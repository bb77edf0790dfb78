"What every rank of tests/ranks/test_ranks.py runs: PPO-Lag, fine-tuning and a cost model, two steps each, at every ZeRO stage."
import json
import os
from pathlib import Path

import torch
from tiny import lm, prompt_rows, scorer

from saferlhf.engine import Optim, load
from saferlhf.models import ScoreModel, load_lm
from saferlhf.ppo import PPOConfig, make_objective, ppo_step
from saferlhf.rollout import Sampler
from saferlhf.hardware.ranks import rank
from saferlhf.train import loop, score_step, sft_step

VOCAB, CONFIG = 11, PPOConfig(prompts=8, samples=2, minibatches=2, micro_batch=3, max_new_tokens=9, window=16, ptx_coef=.5, lambda_lr=.3,
                              temperature=1.2, steps=2)
OPTIM = Optim(lr=3e-3, weight_decay=.1, warmup=0., clip=.5)
CASES = [('deepspeed', z, '') for z in range(4)] + [('deepspeed', 1, 'optimizer'), ('deepspeed', 3, 'all')]


def models(folder): # the same files for all
    lm(vocab=VOCAB).save_pretrained(folder/'actor'); lm(vocab=VOCAB, seed=3).save_pretrained(folder/'reference')
    lm('gpt2', vocab=VOCAB).save_pretrained(folder/'gpt2')
    for i, kind in enumerate(('reward', 'cost')): scorer(vocab=VOCAB, seed=5 + i, kind=kind).save_pretrained(folder/kind)


def rows(n, T=6): # supervised rows of unequal length; one says nothing at all, one only EOS
    b = prompt_rows(n, VOCAB, seed=7)
    lengths = torch.tensor([3, 0, T, 1, 2, 5, 4][:n])
    mask = (torch.arange(T) < lengths[:, None]).long()
    ids = torch.randint(2, VOCAB, (n, T), generator=torch.Generator().manual_seed(1)) * mask
    return dict(input_ids=torch.cat([b['input_ids'], ids], 1), attention_mask=torch.cat([b['attention_mask'], mask], 1), mask=mask)


def pairs(n):
    b = prompt_rows(2 * n, VOCAB, seed=9); del b['prompt_ids']
    g = torch.Generator().manual_seed(2)
    signs = [torch.randint(-1, 2, (n,), generator=g).float() for _ in range(2)]
    return b | dict(high_sign=signs[0], low_sign=signs[1], paired=(torch.arange(n) % 3 > 0).float())


def ppo(folder, arch='actor', **how):
    off = lambda role, frozen=False: how | dict(offload='weights' if frozen and how.get('offload') == 'all' else '' if frozen else
                                                how.get('offload', ''))
    actor = load(lambda: load_lm(folder/arch), OPTIM, 4, **off('actor'))
    reference = load(lambda: load_lm(folder/('reference' if arch == 'actor' else arch)), **off('reference', True))
    score = lambda k, kind: lambda: ScoreModel.from_pretrained(folder/k, kind=kind)
    m = {k: load(score(k, k), **off(k, True)) for k in ('reward', 'cost')}
    critics = {k: load(score(k, 'critic'), OPTIM, 4, **off('critic')) for k in m}
    scorers = {k: lambda ids, mask, e=e: e(ids, mask).end_scores for k, e in m.items()}
    sampler, objective, seen = Sampler(actor, 1, CONFIG.max_new_tokens, CONFIG.temperature, seed=1), make_objective(CONFIG), []
    inner = sampler.generate
    def generate(*a, **k):
        out = inner(*a, **k); seen.append((out.lengths.tolist(), out.responses.tolist()))
        return out
    sampler.generate = generate
    log = []
    def step(i):
        asked = prompt_rows(CONFIG.prompts, VOCAB, seed=i)
        m = ppo_step(actor, reference, critics, scorers, sampler, asked, rows(3), objective, CONFIG, i)
        log.append({k: float(x) for k, x in m.items()})                            # this rank's, before the loop's mean
        return m
    loop(step, CONFIG.steps, lambda i, m: None)
    end = f'{how.get("engine", "torch")}-{how.get("zero", 0)}'
    actor.save(folder/f'saved-{end}'); critics['cost'].save(folder/f'critic-{end}')
    lengths, tokens = map(list, zip(*seen, strict=True))
    return dict(log=log, lam=objective.state.state_dict(), lengths=lengths, tokens=tokens, actor=weights(actor),
                critic=weights(critics['cost']), pieces=sum(getattr(m, '_z3_leaf', False) for m in actor.model.modules()))


def supervised(folder, **how):
    engine = load(lambda: load_lm(folder/'actor'), OPTIM, 2, **how)
    return dict(log=[{k: float(x) for k, x in sft_step(engine, rows(7), 3).items()} for _ in range(2)], actor=weights(engine))


def cost_model(folder, **how):
    engine = load(lambda: ScoreModel.from_pretrained(folder/'cost', kind='cost'), OPTIM, 2, **how)
    log = [{k: float(x) for k, x in score_step(engine, pairs(5), 'cost', .01, 2).items()} for _ in range(2)]
    return dict(log=log, actor=weights(engine))


def weights(engine):
    with engine.dense_weights() as model: return [float(p.detach().double().abs().sum()) for p in model.parameters()]


def partitioned(folder): # numbers that a rank holds while a model is made, before an engine has it
    from saferlhf.hardware.zero import _config, _sharded
    held = {}
    with _sharded(_config(None, 3)):
        held['lm'] = [p.numel() for p in load_lm(folder/'actor').parameters()]
        held['score'] = [p.numel() for p in ScoreModel.from_pretrained(folder/'cost').body.parameters()]
    held['after'] = [p.numel() for p in load_lm(folder/'actor').parameters()]      # the next one may be whole
    return held


def stages(folder, **how): return dict(ppo=ppo(folder, **how), sft=supervised(folder, **how), score=cost_model(folder, **how))


def everything(folder):
    "On every rank."
    import logging
    from saferlhf.hardware.zero import deepspeed
    deepspeed(); logging.disable(logging.WARNING); torch.set_num_threads(1)
    folder = Path(folder)
    for engine, zero, offload in CASES:
        out = stages(folder, engine=engine, zero=zero, offload=offload)
        if zero == 3 and not offload: out |= dict(partitioned=partitioned(folder), gpt2=ppo(folder, 'gpt2', engine=engine, zero=zero))
        (folder/f'{rank()}-{zero}{offload}.json').write_text(json.dumps(out))


def breaks(folder): # one rank raises while the other one waits for it
    import torch.distributed as dist
    dist.init_process_group('gloo')
    Path(folder, f'pid-{rank()}').write_text(str(os.getpid()))
    if rank() == 1: raise ValueError('rank one broke')
    dist.barrier()
