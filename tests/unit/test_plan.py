"The memory plan: bytes counted in real engines and in autograd, measured peaks, and the choice of what moves to the host."
import gc
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from project import ROOT

from saferlhf.apps import plan
from bench import FULL, SIZES
from saferlhf.engine import Optim, load
from saferlhf.models import ScoreModel, token_logps
from saferlhf.ppo import PPOConfig
from saferlhf.hardware.precision import prepare
from saferlhf.reproduction.paper import LLAMA_7B
from saferlhf.train import ScoreConfig, SFTConfig
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = dict(vocab_size=1000, hidden_size=352, intermediate_size=700, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=4)                                          # every matrix is larger than `plan._SMALL`
PAPER = PPOConfig(prompts=64, samples=1, micro_batch=8)


def lm(shape, **kw): return AutoModelForCausalLM.from_config(AutoConfig.for_model('llama', **shape), **kw).eval()

# states, counted in real engines

def storages():
    "Bytes of every storage that some tensor, or a gradient, uses."
    out = {}
    for o in gc.get_objects():
        if type(o) in (torch.Tensor, torch.nn.Parameter):
            for x in (o, o.grad if o.is_leaf else None):
                if x is not None: out[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return out


def count_states(ways):
    "For each (engine, zero): bytes held after a step, and after the last of two backward passes, on this rank."
    out = []
    for engine, zero in ways:
        gc.collect(); gc.freeze()                                            # what is there already is not looked at
        e = load(lambda: lm(SHAPE), Optim(lr=1e-4, warmup=0.), 10, engine=engine, precision='bf16', zero=zero)
        ids = torch.randint(0, 100, (2, 8), generator=torch.Generator().manual_seed(0))
        held = []
        for _ in range(2):
            for last in (False, True): e.backward(-token_logps(e, ids, torch.ones_like(ids), 4).mean(), last)
            gc.collect(); held.append(sum(storages().values()))
            e.step(); gc.collect(); held.append(sum(storages().values()))
        if hasattr(e, 'engine'): e.engine.destroy()
        out.append(dict(engine=engine, zero=zero, after_step=held[3], after_backward=held[2]))
        del e
    gc.unfreeze()
    return out


def state_bytes(zero, gpus):
    "The plan's side: at rest, and with gradients (at stages 1 and 2 each rank's share is left after the last pass)."
    n = plan.count(SHAPE)
    s = plan._states(n, gpus=gpus, zero=zero, small=plan.count(SHAPE, most=plan._SMALL))
    rest = sum(s['always'].values())
    gradients = sum(s["held"].values())
    return rest, rest + gradients


def test_states_of_the_torch_engine_are_the_counted_ones():
    (found,) = count_states([('torch', 0)])
    rest, busy = state_bytes(None, 1)
    assert found['after_step'] == pytest.approx(rest, rel=.002)
    assert found['after_backward'] == pytest.approx(busy, rel=.002)


RANK = """import json, os, sys; sys.path[:0] = [{tests!r}, {tests!r} + '/unit', {tests!r} + '/../tools']
import logging, warnings; warnings.filterwarnings('ignore'); logging.disable(logging.WARNING)
import torch.distributed as dist
from test_plan import count_states
found = count_states([('deepspeed', z) for z in (0, 1, 2, 3)])
if dist.get_rank() == 0: open({out!r}, 'w').write(json.dumps(found))
dist.barrier(); os._exit(0)"""


def test_states_of_two_deepspeed_ranks_are_the_counted_ones(tmp_path):
    (tmp_path/'rank.py').write_text(RANK.format(tests=str(ROOT/'tests'), out=str(tmp_path/'found.json')))
    run = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', str(tmp_path/'rank.py')],
                         capture_output=True, text=True, timeout=240, env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'))
    assert run.returncode == 0, run.stderr[-3000:]
    for found in json.loads((tmp_path/'found.json').read_text()):
        rest, busy = state_bytes(found['zero'], 2)
        assert found['after_step'] == pytest.approx(rest, rel=.01), found
        assert found['after_backward'] == pytest.approx(busy, rel=.01), found
        bucket = plan._states(plan.count(SHAPE), gpus=2, zero=found['zero'])['always'].get('buckets', 0)
        assert (found['after_step'] - bucket) / (rest - bucket) == pytest.approx(1, rel=.02), found       # beside a bucket of 1 GB

# activations, counted by autograd

def saved_bytes(model, run, recompute=False, compile=False):
    if compile:
        torch._dynamo.reset()
        for x in model.model.layers: x.forward = torch.compile(x.forward, backend='aot_eager_decomp_partition')
    prepare(model, recompute=recompute)
    own, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    def pack(x): seen[x.untyped_storage().data_ptr()] = x; return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): run(model)
    return sum(x.untyped_storage().nbytes() for k, x in seen.items() if k not in own)


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('layers, kv', [(2, 4), (5, 2)])
def test_kept_activations_are_the_counted_ones(recompute, layers, kv):
    shape = dict(vocab_size=300, hidden_size=64, intermediate_size=176, num_hidden_layers=layers, num_attention_heads=4,
                 num_key_value_heads=kv)
    ids = torch.randint(0, 300, (3, 24))
    found = saved_bytes(lm(shape, dtype=torch.bfloat16), lambda m: token_logps(m, ids, torch.ones_like(ids), 16).sum(), recompute)
    assert sum(plan._saved(shape, 72, 48, recompute=recompute, wide=True).values()) == pytest.approx(found, rel=.05)
    if not recompute:                              # with the partitioner of `torch.compile`, without its generated code
        logps = lambda m: token_logps(m, ids, torch.ones_like(ids), 16).sum()
        found = saved_bytes(lm(shape, dtype=torch.bfloat16), logps, compile=True)
        assert sum(plan._saved(shape, 72, 48, compile=True, wide=True).values()) == pytest.approx(found, rel=.05)
    body = ScoreModel(lm(shape).base_model, 'critic'); body.body.to(torch.bfloat16)
    found = saved_bytes(body, lambda m: m(ids, torch.ones_like(ids)).scores.sum(), recompute)
    assert sum(plan._saved(shape, 72, recompute=recompute, wide=True).values()) == pytest.approx(found, rel=.1)

# peaks, as measured

def planned(r):
    "GB, of a step as the benchmark runs it: sizes from there, layers compiled, and recorded where activations are kept."
    s, again = next(s for s in FULL['ppo_step'] if s['size'] == r.model), 'recomputed' in r.what
    assert r.batch in s['batches']
    return plan.predicted_gb(SIZES[r.model], int(r.batch), s['prompt_tokens'], s['new_tokens'], micro_batch=s['micro_batch'] // (1 + again),
                             recompute=again, compile=True, graphs=True)


def test_measured_peaks_are_predicted():
    rows = pd.read_csv(ROOT/'data/results/bench/ppo_step.csv')
    rows = rows[rows.what.str.startswith('peak memory') & rows.ours.notna()]
    assert len(rows) >= 5 and set(rows.model) == {'1.1B', '135M'}
    for r in rows.itertuples():
        assert planned(r) == pytest.approx(r.ours, rel=.1), (r.what, r.model, r.batch)
        assert planned(r) == pytest.approx(r.ours, rel=.02), 'the formulas are better than the target: what has moved?'


def test_more_rows_in_a_rollout_cost_their_cache_and_what_scoring_them_takes():
    rows = pd.read_csv(ROOT/'data/results/bench/ppo_step.csv').query('what == "peak memory, activations kept" and model == "1.1B"')
    rows = rows.set_index('batch').ours
    gb = {b: plan.predicted_gb(SIZES['1.1B'], b, 64, 448, compile=True, graphs=True) for b in (16, 64)}
    left = 5 * 2 * SIZES['1.1B']['hidden_size'] * 16 * (64 + 448) / 1e9        # of the recordings of 16 rows, in five models
    assert gb[64] + left - gb[16] == pytest.approx(rows[64] - rows[16], rel=.05)


def test_recordings_hold_more_than_a_backward_pass():
    "By hand: the embedding's gradient, hidden states of every recording, a layer of more tokens than a backward pass has."
    def part(**kw):
        t = plan._predict(SIZES['1.1B'], replace(config, **kw), graphs=True)
        return t[(t.part == 'recorded layers') & (t.phase == 'rollout')].gpu.item()
    config = replace(PAPER, prompts=16, micro_batch=16, max_prompt_tokens=64, max_new_tokens=448)
    D, F, V, tokens = 2048, 5632, 32000, 16 * 512
    inside, _ = plan._apart(SIZES['1.1B'], tokens, 16 * 448, False)
    ends = 3 * 4 * D * tokens
    assert part() == inside + 2 * V * D + ends + 5 * 2 * D * tokens                       # five models score, three are trained
    assert part(prompts=64) == inside + 2 * V * D + ends + 4 * tokens * (5 * 2 * D + 6 * F + 4 * D)
    assert part(lora_rank=4) == inside + ends + 5 * 2 * D * tokens, 'a frozen embedding has no gradient'


def test_measured_peaks_of_training_are_predicted():
    "Two kinds of training, full and unequal lengths, as the benchmark measured them before layers were recorded."
    rows = pd.read_csv(ROOT/'data/results/bench/training_peaks.csv')
    lengths = torch.randint(64, 513, (32,), generator=torch.Generator().manual_seed(0))          # the benchmark's
    answers = dict(full=448, unequal=round(lengths.float().mean().item()) - 64)
    assert len(rows) == 4
    for r in rows.itertuples():
        kind, case = re.fullmatch(r'peak memory: (cost model|fine-tuning), (full|unequal) lengths, compiled, not recorded', r.what).groups()
        room = dict(max_new_tokens=answers[case])
        config = (ScoreConfig('cost', batch_size=16, max_prompt_tokens=63, **room) if kind == 'cost model' else
                  SFTConfig(batch_size=32, max_prompt_tokens=64, **room))
        predicted = plan._peak(plan._predict(SIZES['1.1B'], config, compile=True))[1]
        assert predicted == pytest.approx(r.ours, rel=.15), (kind, case)


def test_all_weights_are_counted():
    for shape in (*SIZES.values(), LLAMA_7B, SHAPE | dict(tie_word_embeddings=True)):
        with torch.device('meta'): model = lm(shape)
        assert plan.count(shape) == sum(p.numel() for p in model.parameters())


def test_scale_is_predicted_where_it_was_measured():
    rows = pd.read_csv(ROOT/'data/results/bench/scale.csv')
    assert set(zip(rows.gpus, rows.zero, rows.model, strict=True)) >= {(g, z, '1.1B') for g in (1, 2) for z in range(4)} | {(2, 3, '7B')}
    assert set(rows[rows.peak_gb.isna()].run_id) == {'bench-scale-20261127'}      # see nbs/bench/scale.ipynb
    rows = rows.dropna(subset='peak_gb')
    assert {4} < set(rows.gpus) and {'1.1B, rank 16', '1.1B, cost model'} < set(rows.model)
    assert (abs(rows.predicted_gb / rows.peak_gb - 1) < .15).all(), rows[['gpus', 'zero', 'peak_gb', 'predicted_gb']]

# what follows from the formulas

def test_zero_shards_what_it_says():
    n = 1e9
    at = lambda z, part, g, **kw: plan._states(n, gpus=g, zero=z, **kw)['always'].get(part, 0)
    for z in (0, 1, 2, 3):
        assert at(z, 'weights', 8) == (2 * n / 8 if z == 3 else 2 * n)
        assert at(z, 'optimizer', 8) == (12 * n / 8 if z else 12 * n)
        assert at(z, 'weights', 8, trained=False) == at(z, 'weights', 8)
        assert at(z, 'optimizer', 8, trained=False) == 0
    for size, rounded in ((2 ** 29, False), (n, True)):                         # to a power of two on each rank
        away = plan._states(size, gpus=8, zero=3, offload='all')
        assert away['always']['optimizer'] == away['always']['weights'] == 0
        assert (sum(away['host'].values()) > (2 + 12 + 4 + 2) * size / 8) == rounded
        assert rounded or sum(away['host'].values()) == (2 + 12 + 4 + 2) * size / 8
    with pytest.raises(ValueError, match="not 'everything'"): plan._states(n, zero=3, offload='everything')


def test_the_peak_is_that_of_the_fullest_phase_and_not_the_sum():
    t = plan._predict(LLAMA_7B, PAPER, gpus=8, zero=3)
    phase, gpu, host = plan._peak(t)
    updates = {f'{r}: {p}' for r in ('actor', 'critic-reward', 'critic-cost') for p in ('backward', 'step')}
    assert set(t.phase) == {'rollout', 'scoring'} | updates
    assert gpu * 1e9 == pytest.approx(t[t.phase == phase].gpu.sum()) and gpu * 1e9 < t.gpu.sum() / 2 and host == 0
    roles = {'actor', 'reference', 'reward', 'cost', 'critic-reward', 'critic-cost'}
    assert roles <= set(t.role) and set(plan._predict(LLAMA_7B, SFTConfig()).role) == {'model', 'all'}


def test_less_memory_for_fewer_rows_recomputation_and_more_gpus():
    gb = lambda **kw: plan.predicted_gb(LLAMA_7B, **dict(prompts_per_gpu=16, prompt_tokens=256, new_tokens=256, gpus=8, zero=3) | kw)
    whole = gb()
    for leaner in (dict(micro_batch=4), dict(recompute=True), dict(gpus=64), dict(new_tokens=64), dict(prompts_per_gpu=4),
                   dict(offload=dict.fromkeys(('critic-reward', 'critic-cost'), 'optimizer'))):
        assert gb(**leaner) < whole, leaner
    assert gb(zero=2) > whole and gb(dense='kept') > whole


def test_cost_models_are_scored_on_one_token_more_and_language_models_have_logits():
    part = lambda config, name: plan._predict(SIZES['1.1B'], config)[lambda t: (t.part == name) & (t.phase == 'model: backward')].gpu.sum()
    score, text = ScoreConfig('cost', batch_size=16), SFTConfig(batch_size=32)
    assert part(score, 'logits') == 0 < part(text, 'logits')
    longer = replace(score, max_new_tokens=score.max_new_tokens - 1)
    per_token = (part(score, 'activations') - part(longer, 'activations')) / 32
    assert part(score, 'activations') / 32 / per_token == pytest.approx(score.max_prompt_tokens + score.max_new_tokens + 1)


def test_the_simplest_way_that_fits_is_chosen():
    big = plan.fit(SIZES['1.1B'], PAPER, 1, 141, 500)
    assert big['fits'] and (big['zero'], big['offload'], big['recompute']) == (0, {}, False)
    spread = plan.fit(LLAMA_7B, PAPER, 8, 141, 2000)
    assert spread['fits'] and spread['offload'] == {} and spread['zero'] > 0
    tight = plan.fit(LLAMA_7B, replace(PAPER, prompts=8), 1, 48, 2000)
    assert tight['fits'] and tight['zero'] == 3 and {tight['offload'][k] for k in ('actor', 'critic-cost', 'critic-reward')} == {'all'}
    only = plan.fit(LLAMA_7B, PAPER, 8, 141, 2000, zero=2)
    assert only['zero'] == 2
    for f in (big, spread, tight):
        _, gpu, _ = plan._peak(f['table'])
        assert gpu < f['gpu'] < 1.2 * gpu + 2, 'the gaps of the allocator and the context of CUDA come on top'


def test_advice_is_enough_when_followed():
    lost = plan.fit(LLAMA_7B, PAPER, 2, 80, 256)
    assert not lost['fits'] and lost['advice']
    more = next(int(a.split()[0]) for a in lost['advice'] if 'GPUs instead' in a)
    assert plan.fit(LLAMA_7B, PAPER, more, 80, 256)['fits'] and not plan.fit(LLAMA_7B, PAPER, more // 2, 80, 256)['fits']
    hopeless = plan.fit(LLAMA_7B, replace(PAPER, max_new_tokens=2 ** 17), 1, 24, 8)
    assert not hopeless['fits'] and 'no single change' in hopeless['advice'][0]


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ValueError, match='critic'): plan._predict(LLAMA_7B, PAPER, 8, 3, dict(critics='optimizer'))
    with pytest.raises(ValueError, match='kept'): plan._predict(LLAMA_7B, PAPER, dense=True)
    with pytest.raises(ValueError, match='gpt2'): plan._sizes(AutoConfig.for_model('gpt2'))


def test_the_command_prints_a_plan(capsys, monkeypatch):
    from saferlhf.apps.commands import main
    monkeypatch.delenv('SAFERLHF_BASE', raising=False)
    assert main(['plan', 'paper', '--gpus', '8', '--gpu-memory', '80', '--host-memory', '1000']) == 0
    said = capsys.readouterr().out
    assert 'policy-1' in said and 'critic-cost' in said and 'it fits' in said
    assert said.index('policy-1') < said.index('sft'), 'the largest stage first'
    assert main(['plan', 'paper', '--gpus', '3', '--gpu-memory', '80']) == 1 and 'divide' in capsys.readouterr().err


def test_the_assumed_defaults_are_deepspeeds():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    ours = DeepSpeedZeroConfig(stage=3)
    said = [ours.reduce_bucket_size, ours.max_live_parameters, ours.param_persistence_threshold, ours.sub_group_size]
    assert said == [plan._BUCKET, plan._LIVE, plan._SMALL, plan._PORTION]
