"For nbs/bench/scale.ipynb: a PPO-Lag step on several ranks, measured: links, parts, memory."
import json
import os
import time
from contextlib import ExitStack
from datetime import date
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist

import saferlhf.ppo as ppo
from bench import CASE, SIZES, device_name, prompts, ptx, six_models, timed, versions, wait
from saferlhf.hardware.zero import deepspeed
from saferlhf.hardware.ranks import Spread, device, largest, rank, ranks
from saferlhf.objectives import Multiplier, ppo_lag
from saferlhf.record.launch import launch, rank_target
from saferlhf.rollout import Sampler

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


def scale_step(
    path:str,  # of the row, as JSON
    case:dict, # size, prompts_per_gpu, prompt_tokens, new_tokens, micro_batch, steps, compile, spread
):
    """Measure on every rank; the first writes. Times are of the slowest rank, memory is of the fullest.
    Every answer is full, so that a step is the same amount of work on every rank."""
    spread, say = Spread.of(case['spread']), print if rank() == 0 else lambda *a, **k: None
    if spread.engine == 'deepspeed' and not dist.is_initialized(): deepspeed().init_distributed(verbose=False)
    links, start = all_reduce_gbs(), time.perf_counter()
    models = six_models(case['size'], spread, case['compile']); wait()
    say(f'models made in {time.perf_counter() - start:.0f} s', flush=True)
    S, T, n = case['prompt_tokens'], case['new_tokens'], case['prompts_per_gpu'] * ranks()
    config = ppo.PPOConfig(prompts=n, max_new_tokens=T, micro_batch=case['micro_batch'], window=n)
    vocab, clock, rows = SIZES[case['size']]['vocab_size'], {}, []
    sampler, objective = Sampler(models[0], None, T, keep=spread.keep_sampler_weights), ppo_lag(Multiplier(window=n))
    batches, gpu = (prompts(n, S, vocab), ptx(n, S, T, vocab)), torch.cuda.is_available()
    with ExitStack() as stack:
        stack.enter_context(timed(sampler, 'generate', 'rollout', clock))
        stack.enter_context(timed(ppo, '_roll_out', 'experience', clock))
        for k in range(case['steps'] + 1):
            if gpu and k == 1: torch.cuda.reset_peak_memory_stats()
            clock.clear(); wait(); start = time.perf_counter()
            metrics = ppo.ppo_step(*models, sampler, *batches, objective, config, k)
            [float(x) for x in metrics.values()]; wait()
            took = time.perf_counter() - start
            rows.append([took, clock['rollout'], took - clock['experience']])
            say('step {}: {:.2f} s, rollout {:.2f}, updates {:.2f}'.format(k, *rows[-1]), flush=True)
    peak = torch.cuda.max_memory_allocated() / 1e9 if gpu else float('nan')
    median = torch.tensor(rows[1:], dtype=torch.float64).median(0).values.tolist()
    step, rollout, update, peak = largest(torch.tensor([*median, peak], device=device())).tolist()
    row = dict(step_s=step, rollout_s=rollout, update_s=update, tokens_per_s=n * (S + T) / step, peak_gb=peak)
    if rank() == 0: Path(path).write_text(json.dumps(row | dict(allreduce_gbs=links, device=device_name())), encoding='utf-8')


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
    key = [spread.ranks, spread.zero, offload, case['size'], case['prompts_per_gpu']]
    run_id = run_id or f'bench-scale-{date.today():%Y%m%d}'
    old = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=COLUMNS)
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
    table[COLUMNS].to_csv(path, index=False, float_format='%.5g')
    return row
