"For nbs/bench/scale.ipynb: a PPO-Lag step on several ranks, measured: links, parts, memory."
import json
import os
import time
from datetime import date
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist

import saferlhf.ppo as ppo
from bench import CASE, SIZES, STEPS, device_name, prompts, ptx, random_model, six_adapters, six_models, timed, versions, wait
from saferlhf.engine import Optim, load
from saferlhf.hardware.adapters import Lora
from saferlhf.hardware.zero import deepspeed
from saferlhf.hardware.ranks import Spread, device, largest, rank, ranks
from saferlhf.objectives import Multiplier, ppo_lag
from saferlhf.record.escape import csv_text, read_csv
from saferlhf.record.launch import launch, rank_target
from saferlhf.rollout import Sampler
from saferlhf.train import score_step

COLUMNS = [*CASE, *'step_s rollout_s update_s tokens_per_s peak_gb predicted_gb allreduce_gbs'.split(),
           'device', 'versions', 'run_id']


def all_reduce_gbs(repeats:int=5)->float: # after two that are not counted; GB/s (1e9), NaN with one rank
    "Bandwidth of an all-reduce in 16 bits: b bytes on w ranks move 2b(w-1)/w bytes into and out of each."
    if ranks() == 1: return float('nan')
    x = torch.zeros((1024 if torch.cuda.is_available() else 4) << 19, dtype=torch.bfloat16, device=device())
    times = []
    for _ in range(repeats + 2):
        dist.barrier(); wait(); start = time.perf_counter()
        dist.all_reduce(x); wait(); times.append(time.perf_counter() - start)
    return 2 * (ranks() - 1) / ranks() * x.numel() * 2 / sorted(times[2:])[repeats // 2] / 1e9


def policy_step(case:dict, spread:Spread): # as for `scale_step` -> function of a step's number -> seconds: rollout, updates
    "Steps of PPO-Lag with six models, or with adapters on one body."
    lora = Lora(case['lora_rank']) if case['lora_rank'] else None
    models = six_adapters(case['size'], lora, spread, case['compile']) if lora else six_models(case['size'], spread, case['compile'])
    S, T, n = case['prompt_tokens'], case['new_tokens'], case['prompts_per_gpu'] * ranks()
    config = ppo.PPOConfig(prompts=n, max_new_tokens=T, micro_batch=case['micro_batch'], window=n)
    vocab, clock = SIZES[case['size']]['vocab_size'], {}
    sampler, objective = Sampler(models[0], None, T, keep=spread.keep_sampler_weights), ppo_lag(Multiplier(window=n))
    batches = prompts(n, S, vocab), ptx(n, S, T, vocab)
    def step(k):
        clock.clear(); start = time.perf_counter()
        with timed(sampler, 'generate', 'rollout', clock), timed(ppo, '_roll_out', 'experience', clock):
            metrics = ppo.ppo_step(*models, sampler, *batches, objective, config, k)
        [float(x) for x in metrics.values()]; wait()
        return clock['rollout'], time.perf_counter() - start - clock['experience']
    return step


def score_model_step(case:dict, spread:Spread): # the same
    "Steps of a cost model's training: `prompts_per_gpu` pairs, two answers each."
    how = dict(steps=STEPS, precision='bf16', compile=case['compile']) | spread.load('model')
    engine = load(lambda: random_model(case['size'], 'cost'), Optim(lr=1e-6, warmup=0., schedule='constant'), **how)
    n, L = case['prompts_per_gpu'] * ranks(), case['prompt_tokens'] + case['new_tokens']
    ids = prompts(2 * n, L, SIZES[case['size']]['vocab_size'])['input_ids']
    pairs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), paired=torch.ones(n),
                 high_sign=torch.ones(n), low_sign=-torch.ones(n))
    def step(k):
        start = time.perf_counter()
        metrics = score_step(engine, pairs, 'cost', micro_batch=case['micro_batch'])
        [float(x) for x in metrics.values()]; wait()
        return 0., time.perf_counter() - start
    return step


def scale_step(
    path:str,  # of the row, as JSON
    case:dict, # what ('policy' or 'score model'), size, lora_rank, prompts_per_gpu, prompt_tokens, new_tokens, micro_batch, steps,
               # compile, spread
):
    """Measure on every rank; the first writes. Times are of the slowest rank, memory is of the fullest.
    Every answer is full, so that a step is the same amount of work on every rank."""
    spread, say = Spread.of(case['spread']), print if rank() == 0 else lambda *a, **k: None
    if spread.engine == 'deepspeed' and not dist.is_initialized(): deepspeed().init_distributed(verbose=False)
    links, start = all_reduce_gbs(), time.perf_counter()
    step = (score_model_step if case['what'] == 'score model' else policy_step)(case, spread); wait()
    say(f'models made in {time.perf_counter() - start:.0f} s', flush=True)
    gpu, rows = torch.cuda.is_available(), []
    for k in range(case['steps'] + 1):
        if gpu and k == 1: torch.cuda.reset_peak_memory_stats()
        wait(); start = time.perf_counter()
        rollout, update = step(k)
        rows.append([time.perf_counter() - start, rollout, update])
        say('step {}: {:.2f} s, rollout {:.2f}, updates {:.2f}'.format(k, *rows[-1]), flush=True)
    peak = torch.cuda.max_memory_allocated() / 1e9 if gpu else float('nan')
    median = torch.tensor(rows[1:], dtype=torch.float64).median(0).values.tolist()
    step, rollout, update, peak = largest(torch.tensor([*median, peak], device=device())).tolist()
    answers = case['prompts_per_gpu'] * ranks() * (1 + (case['what'] == 'score model'))
    tokens = answers * (case['prompt_tokens'] + case['new_tokens'])
    row = dict(step_s=step, rollout_s=rollout, update_s=update, tokens_per_s=tokens / step, peak_gb=peak)
    if rank() == 0: Path(path).write_text(json.dumps(row | dict(allreduce_gbs=links, device=device_name())), encoding='utf-8')


def named(case:dict)->str: # as for `scale_step`
    "What stands in the column `model`."
    more = f', rank {case["lora_rank"]}' if case['lora_rank'] else ', cost model' if case['what'] == 'score model' else ''
    return case['size'] + more


def measure(
    case:dict,                   # as for `scale_step`
    folder:str,                  # of scale.csv
    run_id:str='',               # rows of the same run are not measured again; '': a run of today
    predicted=lambda case: None, # -> GB on each GPU, or None
)->dict|None:                    # the row; None when it was there
    """Measure one case as a job of its own and add its row to scale.csv: a call that was stopped goes on.
    RuntimeError, with the rank's error on top, when it fails: out of memory, for one."""
    spread, path = Spread.of(case['spread']), Path(folder)/'scale.csv'
    offload = ' '.join(f'{role}={what}' for role, what in spread.offload.items()) or 'none'
    case = dict(what='policy', lora_rank=0) | case
    key = [spread.ranks, spread.zero, offload, named(case), case['prompts_per_gpu']]
    run_id = run_id or f'bench-scale-{date.today():%Y%m%d}'
    old = read_csv(path) if path.exists() else pd.DataFrame(columns=COLUMNS)
    same = (old[CASE].astype(str) == [str(k) for k in key]).all(axis=1)
    if (same & (old.run_id == run_id)).any(): print(f'{key}: measured before'); return None
    path.parent.mkdir(parents=True, exist_ok=True)
    out = path.with_suffix('.row.json').resolve(); out.unlink(missing_ok=True)
    os.environ.setdefault('TORCH_CUDA_ARCH_LIST', '9.0')
    os.environ['PYTHONPATH'] = os.pathsep.join([str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')])
    launch(rank_target(scale_step, [str(out), case]), spread)
    row = dict(zip(CASE, key, strict=True)) | json.loads(out.read_bytes()); out.unlink()
    made_with = versions('torch', 'deepspeed', 'transformers')
    row |= dict(predicted_gb=predicted(case), run_id=run_id, versions=made_with)
    kept = old[~(same & (old.device == row['device']))]              # one row a case and device: the last
    table = pd.concat([kept, pd.DataFrame([row])], ignore_index=True) if len(kept) else pd.DataFrame([row])
    path.write_text(csv_text(table[COLUMNS], float_format='%.5g'), encoding='utf-8')
    return row
