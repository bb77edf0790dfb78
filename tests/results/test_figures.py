"Figures, tables and words: drawn from minimal frames, the same bytes every time; what is missing is said."
import io
import json
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from project import notebook_functions
from PIL import Image

from saferlhf.evaluate import over_seeds
from saferlhf.reproduction import figures, tables

ROOT = Path(__file__).resolve().parents[2]
POLICIES = ['initial', 'round-1', 'reward-only']
rounds, beyond, table1, lagrange, annotation, cost = (
    notebook_functions(f'paper/{name}')
    for name in ('rounds', 'beyond', 'table1', 'lagrange', 'annotation', 'cost'))


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')


def frames():
    "The smallest frame each figure can be asked to draw: policies and rounds are missing in all of them."
    rng = np.random.default_rng(0)
    models = [dict(policy=p, prompt_kind='unsafe', judge=j, decoding='sampled', harmful=.4, harmful_low=.3,
                   harmful_high=.5, coherent_harmless=.5) for p in POLICIES for j in ('gold', 'somebody')]
    return {
        'rounds': pd.DataFrame([(1, 'red-team', 'prompt', 3), (1, 'dual-safe', 'pair', 4),
                                (1, 'new kind', 'pair', 4)],
                               columns=['round', 'kind', 'what', 'count']),
        'scores': pd.DataFrame(dict(round='1', reward=rng.normal(size=20), cost=rng.normal(size=20),
                                    harm_sign=np.tile([-1, 1], 10))),
        'answers': pd.DataFrame([(p, r, c) for p in ('initial', 'round-1', 'round-2', 'round-3')
                                 for r, c in ((.1, -1.), (.2, 1.), (.4, 1.),
                                              (.3, 2. if p == 'initial' else -2.))],
                                columns=['policy', 'reward', 'cost']),
        'elo': pd.DataFrame([(p, a, 'gold', 1000., 990., 1010.) for p in POLICIES
                             for a in ('helpfulness', 'harmlessness')],
                            columns=['policy', 'axis', 'judge', 'elo', 'low', 'high']),
        'models': pd.DataFrame(models),
        'lagrange': pd.DataFrame(dict(round='1', seed=0, step=range(5), lam=[1, 2, 3, 2, 1.], cost=.1,
                                      window_cost=.1, reward=.2, kl=.3, threshold=0.)),
        'annotation': pd.DataFrame([('single-dimension', .1, .2, .6, .2),
                                    ('helpfulness', np.nan, .2, .69, .4)],
                                   columns=['protocol', 'weight_spread', 'conflict_share', 'agreement',
                                            'alpha']),
        'calibration': pd.DataFrame(dict(judge='judge', predicted=[.1, .9], observed=[.2, .8], n=[5, 6])),
        'times': pd.DataFrame(dict(stage=['sft', 'sft', 'policy'], seconds=[30, 30, 60])),
        'two_token_world': pd.DataFrame([dict(kl_coef=.5, objective='ppo', seed=0, lambda_theory=np.nan,
                                              lambda_found=np.nan, cost_theory=6., cost_found=6.1,
                                              reward_theory=13., reward_found=13.)]),
    }


def with_last(models):
    "The same with a round 3."
    return pd.concat([models, models[models.policy == 'round-1'].assign(policy='round-3')])


PREVALENCE = pd.DataFrame(dict(judge='judge', true_share=[.1, .6], recovered=[.2, .5], low=[.1, .4],
                               high=[.3, .6]))
CURVE = pd.DataFrame(dict(kl_coef=[.2, .5], objective='ppo', cost=[7., 6.], reward=[14., 13.]))
DRAW = {'rounds': rounds.prompts_and_pairs, 'scores': table1.scores_by_label,
        'answers': rounds.reward_cost_grid, 'elo': rounds.elo, 'models': rounds.harmful_ratio,
        'lagrange': lagrange.lagrange, 'annotation': annotation.agreement, 'times': cost.stage_times,
        'calibration': lambda df: table1.calibration(df, PREVALENCE),
        'two_token_world': lambda df: lagrange.two_tokens(df, CURVE.assign(**{'lambda': np.nan}))}


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
    pipeline = texts(rounds.pipeline_diagram())
    assert any('λ' in t for t in pipeline) and 'Safe RLHF' in pipeline
    points = pd.DataFrame(dict(x=[0., 1, 0, 1], y=[0., 0, 2, 2], harm_sign=[-1, -1, 1, 1]))
    fits = pd.DataFrame([('cost: off', 0., 1., 1.), ('cost: right', 0., 1., -1.)],
                        columns=['name', 'w_x', 'w_y', 'b'])
    shown = texts(table1.two_axes(points, fits))
    assert any('= 0: 50 %' in t for t in shown) and any('= 0: 0 %' in t for t in shown)


def test_numbers_in_the_figures_are_those_of_the_frame():
    f = frames()
    grid = texts(rounds.reward_cost_grid(f['answers']))
    assert [grid.count(f'cost > 0: {n} %') for n in (75, 50)] == [1, 3]
    assert 'peak 3.00' in texts(lagrange.lagrange(f['lagrange']))
    assert '2.0 minutes in 2 stages' in texts(cost.stage_times(f['times']))
    monotone = f['lagrange'].assign(lam=[1., 2, 3, 4, 5])
    # the last step is no interior peak
    assert not any('peak' in t for t in texts(lagrange.lagrange(monotone)))
    high = [c for c in rounds.harmful_ratio(f['models']).axes[0].lines if len(c.get_ydata()) == 2
            and c.get_linestyle() == '-']
    # in per cent; reward only is not on the path
    np.testing.assert_allclose(high[0].get_ydata(), [40, 40])


def test_the_paper_is_shown_where_it_says_something():
    f = frames()
    ratio = texts(rounds.harmful_ratio(f['models']))
    whole = texts(rounds.harmful_ratio(with_last(f['models'])))
    assert any('somebody' in t for t in ratio) and any('53.08 % and 2.45 %' in t for t in whole)
    safe = rounds.harmful_ratio(f['models'].assign(prompt_kind='safe'), 'safe')
    # the paper's number is of unsafe prompts
    assert any('53.08' in t for t in ratio) and not any('53.08' in t for t in texts(safe))
    assert any('+245 helpfulness, +268 harmlessness' in t for t in texts(rounds.elo(f['elo'])))
    shown = texts(annotation.agreement(f['annotation']))
    assert all(any(f'{100*v:.2f}' in t for t in shown) for v in figures.PAPER['agreement'].values())


def over_seeds_frames():
    "What the figures of `beyond` read: several seeds, rounds and policies missing."
    curve = [dict(round=r, seed=s, step=i, lam=1/(i + 1), cost=-.1*i, window_cost=-.1*i, threshold=0.,
                  harmful=.5 - .02*i, reward=.1, kl=i, kl_weight=.1, cost_slope=.5) for r in ('1', '3')
             for s in (0, 1) for i in range(8)]
    models = [dict(policy=p, judge=j, prompt_kind=k, decoding=d, seed=s, harmful=.4 + .1*s, harmful_low=.3,
                   harmful_high=.5, coherent_harmless=.3, reward=s, cost=.1, length=50 + s, refused=.1,
                   distinct=.8)
              for p in POLICIES for j in ('gold', 'judge') for k in ('unsafe', 'safe')
              for d in ('sampled', 'greedy') for s in (0, 1, 2)]
    return {
        'curves': pd.DataFrame(curve), 'models': pd.DataFrame(models),
        'zero': pd.DataFrame(dict(model='cost-1', label_source='gold', cost=[-1., 1.], observed=[.2, .6],
                                  low=[.1, .5], high=[.3, .7])),
        'kinds': pd.DataFrame(dict(category=['a_b,c', 'd'], policy='initial', seed=0, harmful=[.2, .1])),
        'probes': pd.DataFrame([dict(arm=a, round='1', seed=s, step=i, kl=i, proxy_reward=i, proxy_cost=-i,
                                     gold_reward=min(i, 2) - .5*(i > 2), gold_cost=-i/2)
                                for a in ('ppo-lag', 'shaped-1') for s in (0, 1) for i in range(4)])}


def beyond_figures(f):
    "The figures over seeds, by name."
    gold, zero = f['models'][f['models'].judge == 'gold'], f['zero']
    sampled, unsafe = gold[gold.decoding == 'sampled'], gold[gold.prompt_kind == 'unsafe']
    arms = pd.DataFrame(dict(arm=['ppo-lag', 'ppo-lag'], decoding='sampled', seed=[0, 1], distinct=[.8, .7]))
    asked = f['models'].query('prompt_kind == "unsafe" and decoding == "sampled"')
    strict = asked[asked.policy.str.startswith('round')]
    strict = strict.assign(arm=strict.policy.str.replace('round', 'strict'))
    return dict(seeds=rounds.seeds(asked), zero=beyond.cost_zero(zero),
                stricter=rounds.stricter(asked, strict),
                violation=beyond.violation(f['curves'], f['curves'].assign(arm='threshold-0')),
                multiplier=beyond.multiplier(f['curves']), over_refusal=beyond.over_refusal(sampled),
                form=beyond.form(unsafe, arms), kinds=beyond.harm_kinds(f['kinds']),
                gap=beyond.over_optimisation(f['probes']), lagrange=lagrange.lagrange(f['curves']))


def test_figures_over_seeds_draw_with_labelled_axes():
    for name, fig in beyond_figures(over_seeds_frames()).items():
        fig.canvas.draw()
        for ax in fig.axes: assert labelled(ax, fig.axes, 'x') and labelled(ax, fig.axes, 'y'), (name, ax)


def test_spread_over_seeds_is_that_of_the_frame():
    f = over_seeds_frames(); figs = beyond_figures(f)
    mean, low, high = over_seeds([.4, .5, .6])
    assert (mean, round(high - mean, 4)) == (.5, round(4.30265*.1/3**.5, 4))
    assert np.isclose(mean - low, high - mean)
    t = tables.seeds_table(f['models'], ['policy', 'judge', 'prompt_kind', 'decoding'], ['harmful'])
    assert len(t) == 3*2*2*2 and (t.seeds == 3).all() and np.allclose(t.harmful,
                                                                      .5) and np.allclose(t.harmful_high,
                                                                                          high)
    lines = [y[:, 1] for c in figs['seeds'].axes[0].collections for y in c.get_segments()]
    drawn = [y for y in lines if np.allclose(y, [100*low, 100*high])]
    # in per cent, one for each policy
    assert len(drawn) == len(POLICIES)
    # the sweep's panel
    assert len(beyond.violation(f['curves']).axes) == 2 and len(figs['violation'].axes) == 3


def test_what_beyond_computes():
    f = over_seeds_frames(); zero, own = f['zero'], f['probes'].query('arm == "ppo-lag"')
    assert np.isclose(beyond.zero_crossing(zero),
                      .5) and np.isnan(beyond.zero_crossing(zero.assign(observed=.1)))
    assert beyond.zero_crossing(zero.assign(cost=[-2., 0.])) == -.5
    reward, cost = beyond.proxy_gap(own), beyond.proxy_gap(own, 'cost')
    # both seeds fall back from 2 to 1.5
    assert (reward['proxy'], reward['gold'], reward['turned'], reward['seeds']) == (3., 1.5, 2, 2)
    # a lower cost is a gain
    assert (cost['proxy'], cost['gold'], cost['turned'], cost['kept']) == (3., 1.5, 0, .5)
    ends = beyond.tails(f['curves'])
    # steps 6 and 7 of 0 to 7
    assert len(ends) == 4 and np.allclose(ends.cost, -.65) and np.allclose(ends.harmful, .37)


def test_stages_stand_in_the_order_of_a_run():
    names = ('cost-1 shaped-1 evaluate policy-1 base_lm collect-2 reward-0 collect-1 reward-1 sft '
             'policy-2-no-red').split()
    assert sorted(names, key=tables.stage_order) == ['base_lm', 'sft', 'collect-1', 'reward-1', 'cost-1',
                                                     'policy-1', 'collect-2',
                                                          'reward-0', 'evaluate', 'policy-2-no-red',
                                                     'shaped-1']


def test_end_labels_do_not_overlap():
    _, axes = figures.panels(1, 1, (3, 3)); ax = axes[0, 0]; ax.set_ylim(0, 1)
    figures.end_labels(ax, [(.5, t, 'k') for t in 'abc'], gap=.1)
    y = sorted(t.get_position()[1] for t in ax.texts)
    assert min(np.diff(y)) > .099 and abs(np.mean(y) - .5) < 1e-6


def test_save_is_deterministic_and_indexed(tmp_path):
    csv = tmp_path / 'data' / 'elo.csv'; csv.parent.mkdir(); f = frames(); f['elo'].to_csv(csv, index=False)
    def save(folder, elo=f['elo'], runs=('r2', 'r1')):
        shown = figures.save(DRAW['elo'](elo), 'elo', 'nbs/paper/rounds.ipynb', [csv], list(runs),
                             tmp_path / folder)
        return shown, {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()}
    (shown, first), (again, second), (_, third) = save('a'), save('a'), save('b')
    assert first == second == third and shown == again and set(first) - {'.index.json.lock'} == {'elo.png', 'elo.pdf', 'index.json'}
    for data in (shown.png, *first.values()): assert b'Matplotlib' not in data and b'CreationDate' not in data
    entry = json.loads(first['index.json'])['elo']
    assert entry == dict(notebook='nbs/paper/rounds.ipynb', run_ids=['r1', 'r2'], results=entry['results'])
    of_a_profile = json.loads(save('figures/gpu')[1]['index.json'])['elo']['results']
    assert list(entry['results']) == ['data/elo.csv'] == list(of_a_profile)
    assert save('a', f['elo'].assign(elo=1001.))[1]['elo.png'] != first['elo.png'] and not plt.get_fignums()
    assert repr(shown) == 'elo.png' and shown._repr_png_() == shown.png and len(shown.png) < 40_000
    with Image.open(tmp_path / 'a/elo.png') as full, Image.open(io.BytesIO(shown.png)) as small:
        assert full.width > 2*small.width


def test_table1_shows_the_paper_and_what_was_not_run():
    columns = ['round', 'model', 'metric', 'label_source', 'value', 'low', 'high']
    empty = tables.table1(pd.DataFrame(columns=columns))
    assert empty[empty.whose == 'paper'].iloc[:, 2:].to_numpy().tolist() == [
        ['78.13', '75.73', '77.32', '73.95'], ['74.47', '76.07', '74.17', '70.44'],
        ['95.62', '84.54', '85.88', '85.83']]
    assert (empty[empty.whose != 'paper'].iloc[:, 2:] == 'not run').all().all()
    rows = [(2, 'cost', 'sign', 'human', .8, .7, .9), (2, 'tfidf', 'cost-sign', 'human', .75, .7, .8),
            (2, 'tfidf', 'reward-rank', 'human', .6, .5, .7), (2, 'cost', 'sign', 'gold', .9, .85, .95)]
    t = tables.table1(pd.DataFrame(rows, columns=columns))
    t['what'] = t['accuracy, %'].replace('', None).ffill()
    def cell(what, whose): return t.loc[t.what.str.startswith(what) & t.whose.str.startswith(whose),
                                        'round 2'].item()
    assert cell("cost model's sign", 'ours, human') == '80.0 [70.0, 90.0]'
    assert cell("cost model's sign", 'ours, gold') == '90.0 [85.0, 95.0]'
    assert cell("cost model's sign",
                'TF-IDF').startswith('75.0') and cell('reward model', 'TF-IDF').startswith('60.0')
    assert (t['round 1'][t.whose != 'paper'] == 'not run').all()


def test_words_follow_the_numbers():
    assert tables.interval(.3, .2, .4, 100, 0,
                           '+') == '+30 [+20, +40]' and tables.interval(.3, None, None) == '0.30'
    # runs that share what is measured
    assert tables.interval(.3, .3, .3) == '0.30' and tables.interval(np.nan) == ''
    assert tables.spread([1., np.nan]) == '1.00' and tables.spread([1., 3.], least=3, sign='+') == '+2.00'
    assert tables.percent(.5, None, None) == '50.0' and tables.percent(np.nan) == 'not run'


def test_results_filter_the_seed_and_name_the_command(tmp_path, capsys):
    (tmp_path / 'cpu').mkdir()
    (tmp_path / 'cpu' / 'times.csv').write_text('stage,seconds,seed,run_id\nsft,1,0,a\nsft,2,1,b\n')
    (tmp_path / 'world.csv').write_text('seed,x\n0,1\n1,2\n')
    r = tables.Results('cpu', 1, str(tmp_path), str(tmp_path / 'out'))
    # a shared file shows every seed
    assert r.read('times').seconds.tolist() == [2] and len(r.read('world')) == 2
    with pytest.raises(FileNotFoundError, match='make reproduce PROFILE=cpu .*asked for seed 1'):
        r.read('models')
    with pytest.raises(FileNotFoundError, match='asked for seed 3'):
        tables.Results('cpu', 3, str(tmp_path)).read('times')
    assert r.every('times').seconds.tolist() == [1, 2] and r.every('models') is None
    assert not capsys.readouterr().out
    r.save(cost.stage_times(r.every('times')), 'all', 'nb', 'times', every=True)
    r.save(cost.stage_times(r.read('times')), 'times', 'nb', 'times')
    index = json.loads((tmp_path / 'out' / 'index.json').read_text())
    assert index['all']['run_ids'] == ['a', 'b'] and index['times']['run_ids'] == ['b']


def test_samples_show_only_the_mild_ones():
    responses = ['<i>fine</i> ' * 50, 'nasty']
    df = pd.DataFrame(dict(policy='initial', prompt=['p1', 'p2'], response=responses, harmful=[0, 1],
                           mild=[True, False]))
    text = rounds.samples_markdown(df, chars=30)
    df.loc[0, 'response'] = 'people commit crimes'
    assert 'crimes' not in rounds.samples_markdown(df) and 'not shown' in rounds.samples_markdown(df)
    assert not any(t in text for t in ('nasty', 'p2', '<i>')) and '…' in text and 'Warning' in text


@pytest.mark.parametrize('path', sorted((ROOT / 'nbs' / 'paper').glob('*.ipynb')), ids=lambda p: p.stem)
def test_paper_notebooks_have_parameters_and_type_no_paths(path):
    nb = nbformat.read(path, 4)
    tagged = [c for c in nb.cells if 'parameters' in c.metadata.get('tags', [])]
    profile = 'gpu' if path.stem == 'hypotheses' else 'cpu'       # the questions were asked of that profile
    assert len(tagged) == 1 and all(t in tagged[0].source for t in (f"profile = '{profile}'", 'seed = 0'))
    text = ''.join(c.source for c in nb.cells)
    assert nb.cells[0].source.startswith('# ') and ('results.save(' not in text
                                                    or f"'nbs/paper/{path.name}'" in text)
