"""What the notebooks of nbs/bench share: measured time beside its floor, random models, results files.

`make bench`, or `python tools/bench.py [NAME [SIZES]]` in the project's folder, runs them; SIZES is JSON."""
import importlib.metadata
import json
import platform
import sys
import time
from datetime import date
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from saferlhf.engine import Optim, load
from saferlhf.hardware.adapters import Body, Lora, role_of
from saferlhf.hardware.graphs import recorded_bytes
from saferlhf.hardware.ranks import Spread, device
from saferlhf.models import ScoreModel
from saferlhf.record.escape import csv_text, read_csv
from saferlhf.record.execute import execute

# time and memory

def wait():
    "Until the device has nothing left to do: a GPU goes on working after a call has returned."
    if torch.cuda.is_available(): torch.cuda.synchronize()


def seconds(
    f,             # function without arguments
    repeats:int=5, # after the first call, which is not counted
)->float:
    "Median time of a call."
    out = []
    for _ in range(repeats + 1):
        wait(); start = time.perf_counter(); f(); wait()
        out.append(time.perf_counter() - start)
    return sorted(out[1:])[repeats // 2]


def peak(
    f, # function without arguments
)->float: # GB (1e9 bytes), what the caller holds included; NaN without a GPU
    "Most memory allocated during a call, and what recordings hold."
    if torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
    f(); wait()
    if not torch.cuda.is_available(): return float('nan')
    return (torch.cuda.max_memory_allocated() + recorded_bytes()) / 1e9


def timed(
    owner, name:str, # of a function or method
    part,            # its key in `clock`, or a function of its arguments that returns one
    clock:dict,      # part -> seconds, added up
):
    "A context in which the time spent in a function is measured."
    inner = getattr(owner, name)
    def outer(*a, **k):
        wait(); start = time.perf_counter(); out = inner(*a, **k); wait()
        key = part(*a) if callable(part) else part
        clock[key] = clock.get(key, 0.) + time.perf_counter() - start
        return out
    return patch.object(owner, name, outer)

# what is measured: models with random weights, which no disk has to hold, and batches without padding

SIZES = {
    'tiny': dict(vocab_size=512, hidden_size=64, intermediate_size=176, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2),
    '135M': dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                 num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True),
    '1.1B': dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                 num_attention_heads=32, num_key_value_heads=4),
    '7B': dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
               num_attention_heads=32, num_key_value_heads=32)}


def random_model(
    size:str,             # a key of `SIZES`
    kind:str='',          # of a score model; '': a language model
    mean:float|None=None, # mean length, tokens, of its answers, which token 1 ends; None: whatever it is
    dtype=torch.bfloat16, # of the weights
):                        # on the device
    "A Llama with random weights."
    shape = dict(max_position_embeddings=2048, tie_word_embeddings=False) | SIZES[size]
    config = AutoConfig.for_model('llama', **shape)
    with torch.device(device()):
        if kind: return ScoreModel(AutoModel.from_config(config, dtype=dtype), kind).eval()
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if mean:
        V, D = lm.lm_head.weight.shape
        with torch.no_grad():
            lm.model.embed_tokens.weight[:, 0] = 1e4
            lm.lm_head.weight.zero_()[1, 0] = torch.log(torch.tensor((V - 1) / (mean - 1))) / D ** .5
    return lm.eval()


STEPS = 1000 # of a run: layers are recorded and compiled as in a stage of so many


def six_models(
    size:str,           # of all
    spread:Spread,      # of each role
    compile:bool=False, # their layers
)->tuple:               # actor, reference, critics, scorers: as `ppo_step` takes them
    "The engines of a PPO step."
    optim = Optim(lr=1e-6, warmup=0., schedule='constant')
    how = lambda role: dict(steps=STEPS, precision='bf16', compile=compile) | spread.load(role)
    actor = load(lambda: random_model(size), optim, **how('actor'))
    reference = load(lambda: random_model(size), **how('reference'))
    scores = {k: load(lambda k=k: random_model(size, k), **how(k)) for k in ('reward', 'cost')}
    critics = {k: load(lambda: random_model(size, 'critic'), optim, **how(f'critic-{k}')) for k in scores}
    scorers = {k: lambda ids, mask, e=e: e(ids, mask).end_scores for k, e in scores.items()}
    return actor, reference, critics, scorers


def six_adapters(
    size:str, lora:Lora, # of the body; of all roles
    spread:Spread,       # of each role
    compile:bool=False,  # the body's layers
)->tuple:                # as from `six_models`
    "The engines of a PPO step, all adapters on one body."
    body, optim = Body(random_model(size)), Optim(lr=1e-6, warmup=0., schedule='constant')
    body.merge_in_place = spread.merge_in_place
    def made(role, kind='', optim=None):
        model = role_of(body, None, lora, headless=bool(kind))
        for p in model.adapter: torch.nn.init.normal_(p, std=1e-3)   # as after training: B is not 0
        how = dict(steps=STEPS, precision='bf16', compile=compile) | spread.load(role)
        return load(lambda: ScoreModel(model, kind) if kind else model, optim, **how)
    actor, reference = made('actor', optim=optim), made('reference')
    scores = {k: made(k, k) for k in ('reward', 'cost')}
    critics = {k: made(f'critic-{k}', 'critic', optim) for k in scores}
    return actor, reference, critics, {k: lambda ids, mask, e=e: e(ids, mask).end_scores for k, e in scores.items()}


def prompts(B:int, S:int, vocab:int)->dict: # B random prompts of S tokens, as from `prompt_batch`
    "Prompts without padding."
    ids = torch.randint(2, vocab, (B, S), generator=torch.Generator().manual_seed(0))
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), prompt_ids=torch.arange(B))


def ptx(B:int, S:int, T:int, vocab:int)->dict: # B rows of S prompt and T response tokens, as from `sft_batch`
    "Text without padding."
    ids = prompts(B, S + T, vocab)['input_ids']
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), mask=torch.ones(B, T, dtype=torch.long))

# the floor

def ceilings()->dict: # copy: bytes/s, read and written; matmul: operations/s
    "What this device can do at most."
    size, n = (1 << 31, 8192) if torch.cuda.is_available() else (1 << 23, 512)
    x = torch.randn(size, device=device(), dtype=torch.bfloat16); y = torch.empty_like(x)
    copy = 2 * x.numel() * 2 / seconds(lambda: y.copy_(x))
    a, b = torch.randn(2, n, n, device=device(), dtype=torch.bfloat16)
    return dict(copy=copy, matmul=5 * 2 * n ** 3 / seconds(lambda: [a @ b for _ in range(5)]))


def matrices(config, head:bool=True)->int: # weights that multiply every token; a score model has no `head`
    "N of a Llama."
    c, D = config, config.hidden_size // config.num_attention_heads
    attention = c.hidden_size * D * 2 * (c.num_attention_heads + c.num_key_value_heads)
    layers = c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)
    return layers + head * c.hidden_size * c.vocab_size


def decode_floor(
    config,        # of the model
    B:int,         # sequences at a time
    S:int, T:int,  # prompt and new tokens
    limits:dict,   # as from `ceilings`
)->float:          # seconds
    "Fewest seconds for prefilling B prompts and T steps."
    N, D = matrices(config), config.hidden_size // config.num_attention_heads
    cached = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * D     # bytes of a token
    step = lambda t: max((2 * N + B * (S + t) * cached) / limits['copy'], 2 * N * B / limits['matmul'])
    return 2 * matrices(config, False) * B * S / limits['matmul'] + sum(step(t) for t in range(T))


def train_floor(N:int, tokens:int, limits:dict, backward:bool=True)->float: # seconds
    "Fewest seconds for a forward pass, and a backward pass with it."
    return (6 if backward else 2) * N * tokens / limits['matmul']

# results: one CSV a notebook, one row a measurement

COLUMNS = 'what batch model baseline ours ratio unit floor device versions run_id'.split()
CASE = 'gpus zero offload model prompts_per_gpu'.split()      # what names a row of scale.csv


def device_name()->str:
    "The GPU's name, or the CPU's number of threads."
    if torch.cuda.is_available(): return torch.cuda.get_device_name()
    return f'CPU, {torch.get_num_threads()} threads'


def versions(*packages:str)->str: # 'torch 2.12.0, transformers 5.17.0, Python 3.12.3'
    "As they stand in the results."
    known = [f'{p} {importlib.metadata.version(p).split("+")[0]}' for p in packages]
    return ', '.join([*known, f'Python {platform.python_version()}'])


def record(
    name:str,    # of the file: sampler, ppo_step, training or cpu
    rows:list,   # dicts with what, batch, model, ours, unit, and perhaps baseline, floor
    folder='data/results/bench', # made if missing
)->pd.DataFrame: # this run's rows
    """Replace the rows of this device and these models in a results file; the others stay.
    `ratio` is how many times better ours is: a rate's ours/baseline, a time's or memory's baseline/ours."""
    path, where, made_with = Path(folder)/f'{name}.csv', device_name(), versions('torch', 'transformers')
    run = f'bench-{name}-{date.today():%Y%m%d}-{abs(hash((where, made_with, time.time()))) % 16 ** 6:06x}'
    new = pd.DataFrame(rows).reindex(columns=COLUMNS).assign(device=where, versions=made_with, run_id=run)
    better = new.ours / new.baseline
    new['ratio'] = better.where(new.unit.str.endswith('/s') | (new.unit == '1'), 1 / better)
    path.parent.mkdir(parents=True, exist_ok=True)
    tables = [old[(old.device != where) | ~old.model.isin(new.model)] for old in ([read_csv(path)] if path.exists() else [])] + [new]
    path.write_text(csv_text(pd.concat([t for t in tables if len(t)], ignore_index=True), float_format='%.5g'), encoding='utf-8')
    return new


def efficiency(
    table:pd.DataFrame, # of scale.csv
)->pd.DataFrame:        # CASE, `each`: tokens per second and GPU, `efficiency`: share of one GPU's
    "Weak scaling: tokens per second and GPU over those of one GPU at the same ZeRO stage."
    t = table.assign(each=table.tokens_per_s / table.gpus)
    alone = t[t.gpus == 1][[*CASE[1:], 'device', 'each']].rename(columns=dict(each='alone'))
    t = t.merge(alone, how='left')
    return t.assign(efficiency=t.each / t.alone)[[*CASE, 'each', 'efficiency']]

# sizes

def chosen(
    overrides:dict, # some of the names below with other values
    **defaults,     # name -> value
)->dict:            # all names
    "A benchmark's sizes; ValueError for a name that it does not have."
    if unknown := set(overrides) - set(defaults):
        raise ValueError(f'{sorted(unknown)} cannot be overridden; choose from {sorted(defaults)}')
    return defaults | overrides


STEP = dict(size='1.1B', prompt_tokens=64, new_tokens=448, generate_tokens=48)
SMALL = dict(size='135M', prompt_tokens=64, new_tokens=96, generate_tokens=48)
FULL = {'sampler': [s | dict(batches=[16, 128, 512], mean=mean, slots=128, queues=[512, 2048]) for s, mean in ((STEP, 128), (SMALL, 32))],
        'ppo_step': [STEP | dict(batches=[16, 64], micro_batch=16),
                     SMALL | dict(batches=[128], micro_batch=64, minibatches=2, ptx_rows=32)],
        'adapters': [dict(size='7B', batch=16, micro_batch=8, prompt_tokens=64, new_tokens=448, rank=16)],
        'training': [dict(size='1.1B', pairs=16, length=512, shortest=64), dict(size='135M', pairs=32, length=160, shortest=32)]}

if __name__ == '__main__':
    "Results go to data/results/bench below the current folder, executed notebooks to runs/bench."
    asked, sizes = [*sys.argv[1:], '', ''][:2]
    gpu = torch.cuda.is_available()
    for name in [asked] if asked else [*FULL, *([] if gpu else ['cpu'])]:
        print(name)
        for overrides in [json.loads(sizes)] if sizes else FULL.get(name, [{}]) if gpu else [{}]:
            out = '-'.join([name, *([overrides['size']] if 'size' in overrides else [])])
            execute(f'nbs/bench/{name}.ipynb', f'runs/bench/{out}.ipynb', dict(overrides=overrides))
