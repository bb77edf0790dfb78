"Figures, tables and words: drawn from minimal frames, honest about what is missing, the same bytes every time."
import json
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest

from saferlhf.reproduction import beyond, diagnostics, figures, tables

ROOT = Path(__file__).resolve().parents[2]
POLICIES = ['initial', 'round-1', 'reward-only']


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')


def frames():
    "The smallest frame each figure can be asked to draw: policies and rounds are missing in all of them."
    rng = np.random.default_rng(0)
    models = [dict(policy=p, prompt_kind='unsafe', judge=j, decoding='sampled', harmful=.4, harmful_low=.3, harmful_high=.5,
                   coherent_harmless=.5) for p in POLICIES for j in ('gold', 'somebody')]
    return {
        'rounds': pd.DataFrame([(1, 'red-team', 'prompt', 3), (1, 'dual-safe', 'pair', 4), (1, 'new kind', 'pair', 4)],
                               columns=['round', 'kind', 'what', 'count']),
        'scores': pd.DataFrame(dict(round=1, reward=rng.normal(size=20), cost=rng.normal(size=20), harm_sign=np.tile([-1, 1], 10))),
        'answers': pd.DataFrame(dict(policy='initial', reward=[.1, .2, .4, .3], cost=[-1., 1., 1., 2.])),
        'elo': pd.DataFrame([(p, a, 'gold', 1000., 990., 1010.) for p in POLICIES for a in ('helpfulness', 'harmlessness')],
                            columns=['policy', 'axis', 'judge', 'elo', 'low', 'high']),
        'models': pd.DataFrame(models),
        'lagrange': pd.DataFrame(dict(round='1', step=range(5), lam=[1, 2, 3, 2, 1.], cost=.1, window_cost=.1, reward=.2, kl=.3,
                                      threshold=0.)),
        'annotation': pd.DataFrame([('single-dimension', .1, .2, .6, .2), ('helpfulness', np.nan, .2, .69, .4)],
                                   columns=['protocol', 'weight_spread', 'conflict_share', 'agreement', 'alpha']),
        'calibration': pd.DataFrame(dict(judge='judge', predicted=[.1, .9], observed=[.2, .8], n=[5, 6])),
        'times': pd.DataFrame(dict(stage=['sft', 'sft', 'policy'], seconds=[30, 30, 60])),
        'two_token_world': pd.DataFrame([dict(kl_coef=.5, objective='ppo', seed=0, lambda_theory=np.nan, lambda_found=np.nan,
                                              cost_theory=6., cost_found=6.1, reward_theory=13., reward_found=13.)]),
    }


def with_last(models):
    "The same with a round 3."
    return pd.concat([models, models[models.policy == 'round-1'].assign(policy='round-3')])


DRAW = {'rounds': diagnostics.prompts_and_pairs, 'scores': diagnostics.scores_by_label, 'answers': figures.reward_cost_grid,
        'elo': figures.elo, 'models': figures.harmful_ratio, 'lagrange': diagnostics.lagrange, 'annotation': diagnostics.agreement,
        'calibration': diagnostics.calibration, 'times': diagnostics.stage_times, 'two_token_world': diagnostics.two_token_world}


def texts(fig):
    "Every piece of text in a figure."
    return [t.get_text() for t in fig.findobj(matplotlib.text.Text)]


def labelled(ax, axes, which):
    "Whether an axis has a label, its own or that of a panel that shares it."
    shared = getattr(ax, f'get_shared_{which}_axes')()
    return any(getattr(a, f'get_{which}label')() for a in axes if a is ax or shared.joined(a, ax))


@pytest.mark.parametrize('name', DRAW)
def test_minimal_frames_draw_with_labelled_axes(name):
    fig = DRAW[name](frames()[name])
    fig.canvas.draw()
    assert isinstance(fig, figures.Figure) and fig.axes
    for ax in fig.axes: assert labelled(ax, fig.axes, 'x') and labelled(ax, fig.axes, 'y'), ax


def test_the_diagram_and_the_toy_draw():
    pipeline = texts(figures.pipeline_diagram())
    assert any('λ' in t for t in pipeline) and 'Safe RLHF' in pipeline
    points = pd.DataFrame(dict(x=[0., 1, 0, 1], y=[0., 0, 2, 2], harm_sign=[-1, -1, 1, 1]))
    fits = pd.DataFrame([('cost: off', 0., 1., 1.), ('cost: right', 0., 1., -1.)], columns=['name', 'w_x', 'w_y', 'b'])
    shown = texts(diagnostics.two_axes(points, fits))
    assert any('= 0: 50 %' in t for t in shown) and any('= 0: 0 %' in t for t in shown)


def test_numbers_in_the_figures_are_those_of_the_frame():
    f = frames()
    assert 'cost > 0: 75 %' in texts(figures.reward_cost_grid(f['answers']))
    assert 'peak 3.00' in texts(diagnostics.lagrange(f['lagrange']))
    assert '2.0 minutes in 2 stages' in texts(diagnostics.stage_times(f['times']))
    monotone = f['lagrange'].assign(lam=[1., 2, 3, 4, 5])
    assert not any('peak' in t for t in texts(diagnostics.lagrange(monotone)))       # the last step is no interior peak
    high = [c for c in figures.harmful_ratio(f['models']).axes[0].lines if len(c.get_ydata()) == 2 and c.get_linestyle() == '-']
    np.testing.assert_allclose(high[0].get_ydata(), [40, 40])                         # in per cent; reward only is not on the path


def test_missing_things_are_said_and_the_paper_is_shown():
    f = frames()
    assert sum('not run' in t for t in texts(figures.reward_cost_grid(f['answers']))) == 3
    assert any('not run' in t for t in texts(figures.harmful_ratio(f['models'], 'red-team')))
    assert any('not run: prevalence' in t for t in texts(diagnostics.calibration(f['calibration'])))
    ratio = texts(figures.harmful_ratio(f['models']))
    whole = texts(figures.harmful_ratio(with_last(f['models'])))
    assert any('somebody' in t for t in ratio) and any('53.08 % and 2.45 %' in t for t in whole)
    safe = figures.harmful_ratio(f['models'].assign(prompt_kind='safe'), 'safe')
    assert any('53.08' in t for t in ratio) and not any('53.08' in t for t in texts(safe))     # the paper's number is of unsafe prompts
    assert any('+245 helpfulness, +268 harmlessness' in t for t in texts(figures.elo(f['elo'])))
    assert all(any(v in t for t in texts(diagnostics.agreement(f['annotation']))) for v in ('69.00', '66.53', '61.65'))
    one_axis = f['elo'][f['elo'].axis == 'helpfulness']
    assert any('not run' in t for t in texts(figures.elo(one_axis)))


def over_seeds_frames():
    "What the figures of `beyond` read: several seeds, rounds and policies missing."
    curve = [dict(round=r, seed=s, step=i, lam=1/(i + 1), cost=-.1*i, window_cost=-.1*i, threshold=0., harmful=.5 - .02*i, reward=.1, kl=i,
                  kl_weight=.1, cost_slope=.5) for r in ('1', '3') for s in (0, 1) for i in range(8)]
    models = [dict(policy=p, judge=j, prompt_kind=k, decoding=d, seed=s, harmful=.4 + .1*s, harmful_low=.3, harmful_high=.5,
                   coherent_harmless=.3, reward=s, cost=.1, length=50 + s, refused=.1, distinct=.8)
              for p in POLICIES for j in ('gold', 'judge') for k in ('unsafe', 'safe') for d in ('sampled', 'greedy') for s in (0, 1, 2)]
    return {
        'curves': pd.DataFrame(curve), 'models': pd.DataFrame(models),
        'zero': pd.DataFrame(dict(model='cost-1', label_source='gold', cost=[-1., 1.], observed=[.2, .6], low=[.1, .5], high=[.3, .7])),
        'kinds': pd.DataFrame(dict(category=['a_b,c', 'd'], policy='initial', seed=0, harmful=[.2, .1])),
        'probes': pd.DataFrame([dict(arm=a, round='1', seed=s, step=i, kl=i, proxy_reward=i, proxy_cost=-i,
                                     gold_reward=min(i, 2) - .5*(i > 2), gold_cost=-i/2)
                                for a in ('ppo-lag', 'shaped-1') for s in (0, 1) for i in range(4)])}


def beyond_figures(f):
    gold, zero = f['models'][f['models'].judge == 'gold'], f['zero']
    sampled, unsafe = gold[gold.decoding == 'sampled'], gold[gold.prompt_kind == 'unsafe']
    arms = pd.DataFrame(dict(arm=['ppo-lag', 'ppo-lag'], decoding='sampled', seed=[0, 1], distinct=[.8, .7]))
    asked = f['models'].query('prompt_kind == "unsafe" and decoding == "sampled"')
    strict = asked[asked.policy.str.startswith('round')].assign(arm=lambda d: d.policy.str.replace('round', 'strict'))
    return dict(seeds=beyond.seeds(asked), zero=beyond.cost_zero(zero), stricter=beyond.stricter(asked, strict),
                violation=beyond.violation(f['curves'], f['curves'].assign(arm='threshold-0')), multiplier=beyond.multiplier(f['curves']),
                over_refusal=beyond.over_refusal(sampled), form=beyond.form(unsafe, arms), kinds=beyond.harm_kinds(f['kinds']),
                gap=beyond.over_optimisation(f['probes']), lagrange=diagnostics.lagrange(f['curves'].query('seed == 0'), f['curves']))


def test_figures_over_seeds_draw_with_labelled_axes():
    for name, fig in beyond_figures(over_seeds_frames()).items():
        fig.canvas.draw()
        for ax in fig.axes: assert labelled(ax, fig.axes, 'x') and labelled(ax, fig.axes, 'y'), (name, ax)


def test_spread_over_seeds_is_that_of_the_frame():
    f = over_seeds_frames(); figs = beyond_figures(f)
    mean, low, high = beyond.over_seeds([.4, .5, .6])
    assert (mean, round(high - mean, 4)) == (.5, round(4.30265*.1/3**.5, 4)) and np.isclose(mean - low, high - mean)
    t = beyond.seeds_table(f['models'], ['policy', 'judge', 'prompt_kind', 'decoding'], ['harmful'])
    assert len(t) == 3*2*2*2 and (t.seeds == 3).all() and np.allclose(t.harmful, .5) and np.allclose(t.harmful_high, high)
    lines = [c.get_segments()[0][:, 1] for c in figs['seeds'].axes[0].collections if len(c.get_segments())]
    drawn = [y for y in lines if np.allclose(y, [100*low, 100*high])]
    assert len(drawn) == len(POLICIES)                                          # in per cent, one for each policy
    assert any('threshold sweep' in t for t in texts(beyond.violation(f['curves'])))


def test_what_beyond_computes():
    f = over_seeds_frames(); zero, own = f['zero'], f['probes'].query('arm == "ppo-lag"')
    assert np.isclose(beyond.zero_crossing(zero), .5) and np.isnan(beyond.zero_crossing(zero.assign(observed=.1)))
    assert beyond.zero_crossing(zero.assign(cost=[-2., 0.])) == -.5
    reward, cost = beyond.proxy_gap(own), beyond.proxy_gap(own, 'cost')
    assert (reward['proxy'], reward['gold'], reward['turned'], reward['seeds']) == (3., 1.5, 2, 2)      # both seeds fall back from 2 to 1.5
    assert (cost['proxy'], cost['gold'], cost['turned'], cost['kept']) == (3., 1.5, 0, .5)             # a lower cost is a gain
    ends = beyond.tails(f['curves'])
    assert len(ends) == 4 and np.allclose(ends.cost, -.65) and np.allclose(ends.harmful, .37)            # steps 6 and 7 of 0 to 7


def test_stages_stand_in_the_order_of_a_run():
    names = 'cost-1 shaped-1 evaluate policy-1 base_lm collect-2 reward-0 collect-1 reward-1 sft policy-2-no-red'.split()
    assert sorted(names, key=diagnostics.stage_order) == ['base_lm', 'sft', 'collect-1', 'reward-1', 'cost-1', 'policy-1', 'collect-2',
                                                          'reward-0', 'evaluate', 'policy-2-no-red', 'shaped-1']


def test_end_labels_do_not_overlap():
    _, axes = figures.panels(1, 1, (3, 3)); ax = axes[0, 0]; ax.set_ylim(0, 1)
    figures.end_labels(ax, [(.5, t, 'k') for t in 'abc'], gap=.1)
    y = sorted(t.get_position()[1] for t in ax.texts)
    assert min(np.diff(y)) > .099 and abs(np.mean(y) - .5) < 1e-6


def test_save_is_deterministic_and_indexed(tmp_path):
    csv = tmp_path / 'data' / 'elo.csv'; csv.parent.mkdir(); f = frames(); f['elo'].to_csv(csv, index=False)
    for i, folder in enumerate(('a', 'a', 'b')):
        assert figures.save(DRAW['elo'](f['elo']), 'elo', 'nbs/paper/rounds.ipynb', [csv], ['r2', 'r1'], tmp_path / folder) == 'elo.png'
        index = json.loads((tmp_path / folder / 'index.json').read_text())
        if i == 0:                                                 # a mark that only a figure that changed would lose
            index['elo']['commit'] = 'earlier'; (tmp_path / folder / 'index.json').write_text(json.dumps(index))
    for kind in ('png', 'pdf'):
        data = (tmp_path / 'a' / f'elo.{kind}').read_bytes()
        assert data == (tmp_path / 'b' / f'elo.{kind}').read_bytes() and b'Matplotlib' not in data and b'CreationDate' not in data
    entry = json.loads((tmp_path / 'a' / 'index.json').read_text())['elo']
    assert entry['commit'] == 'earlier' and entry['run_ids'] == ['r1', 'r2'] and list(entry['results']) == ['data/elo.csv']
    figures.save(DRAW['elo'](f['elo']), 'elo', 'nbs/paper/rounds.ipynb', [csv], ['r1'], tmp_path / 'figures/gpu')
    assert list(json.loads((tmp_path / 'figures/gpu/index.json').read_text())['elo']['results']) == ['data/elo.csv']      # a profile's own
    figures.save(DRAW['elo'](f['elo'].assign(elo=1001.)), 'elo', 'nbs/paper/rounds.ipynb', [csv], ['r1'], tmp_path / 'a')
    assert json.loads((tmp_path / 'a' / 'index.json').read_text())['elo']['commit'] != 'earlier'


def test_table1_shows_the_paper_and_what_was_not_run():
    empty = tables.table1(None)
    assert empty[empty.whose == 'paper'].iloc[:, 2:].to_numpy().tolist() == [
        ['78.13', '75.73', '77.32', '73.95'], ['74.47', '76.07', '74.17', '70.44'], ['95.62', '84.54', '85.88', '85.83']]
    assert (empty[empty.whose != 'paper'].iloc[:, 2:] == 'not run').all().all()
    rows = [(2, 'cost', 'sign', 'human', .8, .7, .9), (2, 'tfidf', 'cost-sign', 'human', .75, .7, .8),
            (2, 'tfidf', 'reward-rank', 'human', .6, .5, .7), (2, 'cost', 'sign', 'gold', .9, .85, .95)]
    t = tables.table1(pd.DataFrame(rows, columns=['round', 'model', 'metric', 'label_source', 'value', 'low', 'high']))
    t['what'] = t['accuracy, %'].replace('', None).ffill()
    def cell(what, whose): return t.loc[t.what.str.startswith(what) & t.whose.str.startswith(whose), 'round 2'].item()
    assert cell("cost model's sign", 'ours, human') == '80.0 [70.0, 90.0]'
    assert cell("cost model's sign", 'ours, gold') == '90.0 [85.0, 95.0]'
    assert cell("cost model's sign", 'TF-IDF').startswith('75.0') and cell('reward model', 'TF-IDF').startswith('60.0')
    assert (t['round 1'][t.whose != 'paper'] == 'not run').all()


def test_words_follow_the_numbers():
    assert 'lower' in tables.against_paper(.6, .5, .7, .8) and 'outside' in tables.against_paper(.6, .5, .7, .8)
    assert 'higher' in tables.against_paper(.9, .7, .95, .8) and 'inside' in tables.against_paper(.9, .7, .95, .8)
    assert tables.against_paper(None, None, None, .8) == 'not run (paper: 80.00 %)'


def test_results_filter_the_seed_and_name_the_command(tmp_path, capsys):
    (tmp_path / 'cpu').mkdir(); (tmp_path / 'cpu' / 'times.csv').write_text('stage,seconds,seed,run_id\nsft,1,0,a\nsft,2,1,b\n')
    (tmp_path / 'world.csv').write_text('seed,x\n0,1\n1,2\n')
    r = tables.Results('cpu', 1, str(tmp_path), str(tmp_path / 'out'))
    assert r.read('times').seconds.tolist() == [2] and len(r.read('world')) == 2       # a shared file shows every seed
    assert r.read('models') is None and 'make reproduce PROFILE=cpu' in capsys.readouterr().out
    assert r.every('times').seconds.tolist() == [1, 2] and r.every('models') is None and not capsys.readouterr().out
    r.save(diagnostics.stage_times(r.every('times')), 'all', 'nb', 'times', every=True)
    assert json.loads((tmp_path / 'out' / 'index.json').read_text())['all']['run_ids'] == ['a', 'b']
    r.save(diagnostics.stage_times(r.read('times')), 'times', 'nb', 'times')
    assert json.loads((tmp_path / 'out' / 'index.json').read_text())['times']['run_ids'] == ['b']


def test_config_table_reads_the_dataclass():
    @dataclass
    class Config:
        lr: float = field(default=1e-3, metadata={'paper': 1e-5})
        steps: int = 10
    lines = tables.config_table(Config, {'cpu': {'steps': 5}, 'paper': Config(lr=1e-5)}).split('\n')
    assert lines[2:] == ['| `lr` | 0.001 | · | 1e-05 | 1e-05 |', '| `steps` | 10 | 5 | · |  |']
    with pytest.raises(ValueError, match='stpes'): tables.config_table(Config, {'cpu': {'stpes': 5}})


def test_samples_show_only_the_mild_ones():
    responses = ['<i>fine</i> ' * 50, 'nasty']
    df = pd.DataFrame(dict(policy='initial', prompt=['p1', 'p2'], response=responses, harmful=[0, 1], mild=[True, False]))
    text = tables.samples_markdown(df, chars=30)
    df.loc[0, 'response'] = 'people commit crimes'
    assert 'crimes' not in tables.samples_markdown(df) and 'not shown' in tables.samples_markdown(df)
    assert 'nasty' not in text and 'p2' not in text and '<i>' not in text and '…' in text and 'Warning' in text


@pytest.mark.parametrize('path', sorted((ROOT / 'nbs' / 'paper').glob('*.ipynb')), ids=lambda p: p.stem)
def test_paper_notebooks_have_parameters_and_type_no_paths(path):
    nb = nbformat.read(path, 4)
    tagged = [c for c in nb.cells if 'parameters' in c.metadata.get('tags', [])]
    profile = 'gpu' if path.stem == 'hypotheses' else 'cpu'       # the questions were asked of that profile
    assert len(tagged) == 1 and f"profile = '{profile}'" in tagged[0].source and 'seed = 0' in tagged[0].source
    text = ''.join(c.source for c in nb.cells)
    assert nb.cells[0].source.startswith('# ') and ('results.save(' not in text or f"'nbs/paper/{path.name}'" in text)
