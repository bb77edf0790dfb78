"The benchmarks run in miniature, and the committed figures are whole, over no floor, and what the page says."
import pandas as pd
import pytest
from bench import COLUMNS, chosen, efficiency
from project import ROOT

from saferlhf.record.execute import execute, warm_kernel

RESULTS = ROOT/'data/results/bench'
GPU = 'NVIDIA H200'


@pytest.fixture(scope='module')
def km():
    with warm_kernel() as kernel: yield kernel


@pytest.mark.parametrize('name', ('sampler', 'ppo_step', 'training', 'cpu', 'adapters'))
def test_a_benchmark_runs_in_miniature(name, tmp_path, km):
    small = dict(overrides=dict(batch=4, prompt_tokens=8, new_tokens=8)) if name == 'cpu' else {}
    execute(ROOT/f'nbs/bench/{name}.ipynb', tmp_path/'out.ipynb', small | dict(results_dir=str(tmp_path)), progress=False, km=km)
    t = pd.read_csv(tmp_path/f'{name}.csv')
    assert list(t.columns) == COLUMNS and t.run_id.nunique() == 1 and t.device.str.startswith('CPU').all()
    assert t.ours[t.unit != 'GB'].notna().all() and (t.ours[t.unit.isin(['tokens/s', 's'])] > 0).all()
    if name != 'cpu':                                                          # the same measurements as on a GPU
        committed = pd.read_csv(RESULTS/f'{name}.csv')
        kinds = lambda t: {w for w in t.what if 'look every' not in w}
        assert kinds(t) == kinds(committed[committed.device.str.startswith('NVIDIA')])


def test_scale_runs_in_miniature_and_goes_on(tmp_path, capsys, km):
    from scale import COLUMNS, measure
    told = dict(results_dir=str(tmp_path), overrides=dict(zeros=[3], steps=1, run_id='mini'))
    execute(ROOT/'nbs/bench/scale.ipynb', tmp_path/'out.ipynb', told, progress=False, km=km)
    t = pd.read_csv(tmp_path/'scale.csv')
    assert list(t.columns) == COLUMNS and t.gpus.tolist() == [1, 2] and set(t.run_id) == {'mini'} and set(t.offload) == {'none'}
    assert (t[['step_s', 'rollout_s', 'update_s', 'tokens_per_s']] > 0).all(axis=None) and (t.step_s > t.rollout_s + t.update_s).all()
    assert t.allreduce_gbs.notna().tolist() == [False, True] and efficiency(t).efficiency[0] == 1
    for more, model in ((dict(lora_rank=2), 'tiny, rank 2'), (dict(what='score model'), 'tiny, cost model')):
        told['overrides'] = dict(zeros=[1], gpus=[2], steps=1, run_id='mini') | more
        execute(ROOT/'nbs/bench/scale.ipynb', tmp_path/'out.ipynb', told, progress=False, km=km)
        row = pd.read_csv(tmp_path/'scale.csv').iloc[-1]
        assert row.model == model and row.step_s > 0 and row.predicted_gb > 0 and (row.rollout_s > 0) == ('lora_rank' in more)
    spread = dict(gpus=2, zero=3)                                              # what stands there under this name is not measured again
    assert measure(dict(size='tiny', prompts_per_gpu=4, spread=spread), str(tmp_path), 'mini') is None
    assert 'measured before' in capsys.readouterr().out


def test_sizes_are_checked():
    assert chosen(dict(size='1.1B'), size='tiny', pairs=2) == dict(size='1.1B', pairs=2)
    with pytest.raises(ValueError, match=r"\['sise'\] cannot be overridden"): chosen(dict(sise='1.1B'), size='tiny')


@pytest.mark.parametrize('name', ('sampler', 'ppo_step', 'training', 'cpu', 'adapters'))
def test_committed_figures_are_whole(name):
    t = pd.read_csv(RESULTS/f'{name}.csv')
    assert list(t.columns) == COLUMNS and not t.duplicated(['what', 'batch', 'device', 'model']).any()
    rate = t.unit.str.endswith('/s') | (t.unit == '1')
    t, ratio = t[t.baseline.notna() & (t.baseline != 0)], (t.ours / t.baseline).where(rate, t.baseline / t.ours)
    assert ((t.ratio / ratio[t.index] - 1).abs() < 1e-3).all()
    floor = t[t.floor.notna()]
    assert ((floor.ours < floor.floor) == rate[floor.index]).all()              # nobody is faster than the floor


def test_committed_figures_hold_what_was_promised():
    sampler, step, training, cpu = (pd.read_csv(RESULTS/f'{n}.csv') for n in ('sampler', 'ppo_step', 'training', 'cpu'))
    def at(t, what, batch, model='1.1B'):
        return t[(t.what == what) & (t.batch == batch) & (t.device.eq(GPU) & t.model.eq(model) | t.device.str.startswith('CPU'))].iloc[0]
    for batch, least in ((16, 12_000), (128, 55_000), (512, 90_000)): assert at(sampler, 'decode', batch).ours >= least
    for queue, least in ((512, 1.6), (2048, 1.9)): assert at(sampler, 'slots', queue).ratio >= least
    for batch, most in ((16, 1.5), (64, 4.)):
        row = at(step, 'step, activations kept', batch)
        assert row.ours <= min(most, 3 * row.floor)
    assert at(step, 'peak memory, activations kept', 16).ours <= 90 and at(step, 'peak memory, activations recomputed', 16).ours <= 58
    assert at(training, 'share of the matrix rate: cost model, full lengths', 32).ours >= .45
    assert at(sampler, 'log-probability, fp32, largest difference', 16).ours < 1e-4
    assert at(sampler, 'log-probability, bf16, mean difference', 16).ours < 1e-2
    assert at(cpu, 'answers, fastest beside generate in fp32', 32).ratio >= 3
    assert (RESULTS/'gpu_tests.txt').read_text().endswith('all ok\n')
