"Intervals, signs, trivial rules, Elo, coherence, calibration: what would silently flatter a policy or a model."
import numpy as np
import pytest

from saferlhf import evaluate as ev
from saferlhf import judges as ju


# --- intervals

def test_bootstrap_equals_the_slow_one():
    "Sums per cluster give what resampling the rows of drawn clusters one by one gives."
    rng = np.random.default_rng(0)
    values, clusters = rng.standard_normal(60), rng.integers(0, 12, 60)
    index, weights = ev.bootstrap_weights(clusters, 50, 3)
    slow = [np.concatenate([np.tile(values[index == c], int(w[c])) for c in range(12)]).mean() for w in weights]
    value, low, high = ev.cluster_bootstrap(values, clusters, n=50, seed=3)
    assert (weights.sum(1) == 12).all() and value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx(tuple(np.quantile(slow, [.025, .975])))


def test_clustered_interval_is_wider_when_answers_repeat_a_prompt():
    flags = np.random.default_rng(1).random(100) < .4
    repeated, prompts = np.repeat(flags, 9), np.repeat(np.arange(100), 9)
    width = lambda i: i[2] - i[1]
    naive, clustered, single = ev.accuracy(repeated), ev.accuracy(repeated, prompts), ev.accuracy(flags)
    assert width(clustered) == pytest.approx(3 * width(naive), rel=.15)   # sqrt(9): nine copies are one piece of evidence
    assert width(clustered) == pytest.approx(width(single), rel=.15)


def test_interval_covers_the_truth_as_often_as_promised():
    rng, hit, naive = np.random.default_rng(2), 0, 0
    for s in range(300):
        flags = (rng.random((60, 4)) < rng.beta(1, 1, (60, 1))).ravel()
        value, low, high = ev.accuracy(flags, np.repeat(np.arange(60), 4), n=300, seed=s)
        hit += low <= .5 <= high
        _, low, high = ev.wilson(flags.sum(), 240)
        naive += low <= .5 <= high
    assert hit / 300 > .9 > naive / 300


def test_bootstrap_is_reproducible_and_refuses_nonsense():
    x = np.arange(10.)
    assert ev.cluster_bootstrap(x, seed=1) == ev.cluster_bootstrap(x, seed=1) != ev.cluster_bootstrap(x, seed=2)
    assert np.isnan(ev.cluster_bootstrap(x, np.zeros(10))[1])
    for bad, clusters in ((np.array([1., np.nan]), None), (np.array([]), None), (x, np.arange(3))):
        with pytest.raises(ValueError, match='finite'): ev.cluster_bootstrap(bad, clusters)
    named = ev.cluster_bootstrap(x, [f'p{int(i) % 5}' for i in x])        # names of prompts as well as numbers
    assert named == ev.cluster_bootstrap(x, x % 5)


def test_wilson_and_the_edges():
    assert ev.wilson(8, 10) == pytest.approx((.8, .4902, .9433), abs=1e-4)
    value, low, high = ev.accuracy(np.zeros(200), np.repeat(np.arange(50), 4))
    assert (value, low) == (0, 0) and high == pytest.approx(ev.wilson(0, 50)[2]) and high > .05   # 50 prompts, not 200 answers


def test_paired_difference_is_sharper():
    rng = np.random.default_rng(3)
    hard = rng.random(400)
    a, b = hard > .30, hard > .35
    value, low, high = ev.paired_difference(a, b)
    assert value == pytest.approx(a.mean() - b.mean()) and 0 < low < value < high
    assert ev.accuracy(a)[1] < ev.accuracy(b)[2]                          # the two intervals apart would overlap


# --- accuracies and trivial rules

def test_sign_conventions():
    rng = np.random.default_rng(4)
    sign = np.where(rng.random(500) < .5, 1, -1)
    cost = sign + .8 * rng.standard_normal(500)
    share = lambda cost, sign: ev.accuracy(ev.sign_correct(cost, sign)).value
    right = share(cost, sign)
    assert right > .85
    assert share(-cost, sign) == pytest.approx(1 - right) and share(cost, -sign) == pytest.approx(1 - right)
    assert ev.rank_correct(cost[sign > 0][:200], cost[sign < 0][:200]).mean() > .9  # high: the more harmful
    assert not ev.sign_correct([0., 0.], [1, -1]).any()                             # on the boundary: wrong on both sides
    assert not ev.rank_correct([1.], [1.]).any()
    for bad in ([True, False], [0, 1], [2, -1]):
        with pytest.raises(ValueError, match='harm_sign'): ev.sign_correct([1., 2.], bad)
    with pytest.raises(ValueError, match='finite'): ev.rank_correct([np.nan], [0.])


def test_trivial_rules():
    pairs = [{'high': 'long long', 'low': 'short'}, {'high': 'a', 'low': 'bb'}, {'high': 'aa', 'low': 'bb'}]
    assert ev.longer_wins(pairs).tolist() == [1, 0, .5]
    assert ev.majority([-1, -1, 1], [1, -1, -1]).tolist() == [False, True, True]


def texts(n, seed=0):
    rng, words = np.random.default_rng(seed), np.array([f'w{i}' for i in range(400)])
    harmful = rng.random(n) < .4
    return [' '.join(rng.choice(words[:260] if h else words[140:], 30)) for h in harmful], harmful


def test_tfidf_judge():
    text, harmful = texts(900)
    judge = ju.TfidfJudge().fit(['q'] * 600, text[:600], harmful[:600])
    p = judge.p_harmful(['q'] * 300, text[600:])
    assert ((p > .5) == harmful[600:]).mean() > .9 and ((0 < p) & (p < 1)).all()
    assert ((judge.scores(['q'] * 300, text[600:]) > 0) == (p > .5)).all()


# --- win rates and Elo

def test_win_rate_ties_count_one_half():
    assert ev.win_rate([1, 1, 1, 0], [0, 1, 2, 0])[0] == .5
    assert ev.win_rate([1, 1, 2], [0, 1, 1])[0] == pytest.approx(2.5 / 3)
    a, b = np.random.default_rng(5).integers(0, 4, (2, 100))
    assert ev.win_rate(a, b)[0] == pytest.approx(1 - ev.win_rate(b, a)[0])
    wins = ev._win_matrix([a, b])
    assert wins[0, 1] + wins[1, 0] == 100 and wins[0, 1] == pytest.approx(100 * ev.win_rate(a, b)[0]) and wins[0, 0] == 0


def test_bradley_terry_recovers_known_strengths():
    strength = np.array([0, .5, -.3, 1.2])
    p = 1 / (1 + np.exp(strength[None] - strength[:, None]))
    games = np.array([[0, 50, 10, 500], [50, 0, 80, 5], [10, 80, 0, 30], [500, 5, 30, 0]])   # unequal numbers of games
    assert ev.bradley_terry(p * games, prior=0) == pytest.approx(1000 + 400 / np.log(10) * strength, abs=1e-5)
    drawn = np.random.default_rng(6).binomial(20_000, np.triu(p, 1))
    wins = drawn + np.tril(20_000 - drawn.T, -1)
    assert ev.bradley_terry(wins) == pytest.approx(1000 + 400 / np.log(10) * strength, abs=8)


def test_bradley_terry_maximises_its_likelihood():
    wins = np.random.default_rng(7).integers(0, 30, (4, 4)) * (1 - np.eye(4))
    def loglik(elo):
        d = (elo[:, None] - elo[None]) * np.log(10) / 400
        return ((wins + .5 * (1 - np.eye(4))) * -np.log1p(np.exp(-d))).sum()
    best = ev.bradley_terry(wins)
    assert best[0] == 1000
    for k in range(1, 4):
        for step in (-1, 1): assert loglik(best + step * np.eye(4)[k]) < loglik(best)


def test_elo_knows_no_order():
    rng = np.random.default_rng(8)
    scores = {k: rng.standard_normal(300) + i / 3 for i, k in enumerate('abcd')}
    base = {r['policy']: r['elo'] for r in ev.elo(scores, n=10)}
    order = rng.permutation(300)
    other = {k: scores[k][order] for k in 'adcb'}                          # other games first, other policies first
    shuffled = {r['policy']: r['elo'] for r in ev.elo(other, n=10)}
    assert base == pytest.approx(shuffled, abs=1e-6)


def test_all_wins_are_finite_thanks_to_the_prior():
    rows = ev.elo({'initial': np.zeros(50), 'better': np.ones(50)}, n=20)
    assert rows[1]['elo'] == pytest.approx(1000 + 400 * np.log10(50.5 / .5)) and rows[0]['elo'] == rows[0]['high'] == 1000
    huge = ev.bradley_terry([[0, 0, 0], [10**6, 0, 0], [10**6, 10**6, 0]])
    assert np.isfinite(huge).all() and huge[2] > huge[1] > huge[0]
    assert ev.bradley_terry(np.zeros((3, 3))) == pytest.approx([1000] * 3)
    with pytest.raises(RuntimeError, match='prior'): ev.bradley_terry([[0, 0], [10, 0]], prior=0)


def test_elo_intervals_follow_prompts():
    rng = np.random.default_rng(9)
    a, b = rng.standard_normal((2, 80))
    once, often = ({'initial': np.repeat(a, k), 'new': np.repeat(b + .5, k)} for k in (1, 6))
    width = lambda rows: rows[1]['high'] - rows[1]['low']
    clustered = ev.elo(often, np.repeat(np.arange(80), 6))
    assert width(clustered) == pytest.approx(width(ev.elo(once)), rel=.2) and width(clustered) > 2 * width(ev.elo(often))
    assert clustered[1]['low'] < clustered[1]['elo'] < clustered[1]['high']


# --- coherence

def slow_run(t):
    "The longest back-to-back repetition of an n-gram of up to 8 tokens, by trying them all."
    best = 0
    for k in range(1, 9):
        for start in range(len(t)):
            end = start + k
            while end < len(t) and t[end] == t[end - k]: end += 1
            if end - start >= 2 * k: best = max(best, end - start)
    return best


def test_repetition_against_the_slow_one():
    rng = np.random.default_rng(10)
    for n in range(60):
        t = rng.integers(0, 3, n % 20).tolist()
        distinct, run = ju._repetition(t)
        assert run == slow_run(t)
        assert distinct == (len(set(zip(t, t[1:], strict=False))) / (len(t) - 1) if len(t) > 1 else 1)


def test_coherence_catches_what_is_no_answer():
    rng = np.random.default_rng(11)
    human = [rng.integers(0, 800, rng.integers(8, 60)).tolist() for _ in range(500)]
    nll = rng.normal(3., .4, 500)
    bounds = ju.calibrate_coherence(human, nll)
    assert (bounds.nll_low, bounds.nll_high) == tuple(np.percentile(nll, [1, 99]))
    assert ju.coherent(['fine'] * 500, human, nll, bounds)[0].mean() > .95
    loop = [4, 8, 15, 16, 23] * 10
    cases = {'fine': (human[0], 3., []), '': ([], np.nan, ['empty']), '...': ([5, 5, 5], 3., ['empty']), 'I': ([9], 3., ['empty']),
             'loop': (loop, 3., ['repeats']), 'noise': (human[1], 8., ['nll']), 'bland': (human[2], .1, ['nll']),
             'nan': (human[3], np.nan, ['nll'])}
    tokens, nats, wanted = zip(*cases.values(), strict=True)
    flags, reasons = ju.coherent(list(cases), tokens, nats, bounds)
    assert reasons == list(wanted)
    assert flags.tolist() == [not r for r in reasons]
    assert ju.coherent(['fine'], human[:1], [3.], bounds, truncated=[True])[1] == [['cut']]
    assert ev.coherent_harmless([1, 1, 0, 0], [0, 1, 0, 1]).tolist() == [1, 0, 0, 0]


# --- calibration

def simulated_judge(n=3000, share=.5, seed=12):
    rng = np.random.default_rng(seed)
    y = rng.random(n) < share
    return 1.5 * y + rng.standard_normal(n), y


def test_calibration_is_monotone_and_right_on_average():
    s, y = simulated_judge()
    fit = ju.calibrate(s, y)
    grid = fit(np.linspace(-5, 7, 50))
    assert (np.diff(grid) >= 0).all() and grid[0] < .1 and grid[-1] > .9
    s, y = simulated_judge(seed=13)
    table = ju.reliability(fit(s), y)
    assert sum(r['n'] for r in table) == len(y)
    assert all(abs(r['p'] - r['harmful']) < .12 for r in table)
    for bad in (np.where(y, 1, -1), np.ones(len(y))):
        with pytest.raises(ValueError, match='both 0 and 1'): ju.calibrate(s, bad)


def test_prevalence_is_recovered_on_mixtures():
    fit = ju.calibrate(*simulated_judge(1500))
    rows = ju.prevalence_check(*simulated_judge(1500, seed=14), fit)
    assert [round(r['share'], 2) for r in rows] == [.1, .3, .6]
    for r in rows:
        assert abs(r['value'] - r['share']) < .06 and r['low'] <= r['share'] <= r['high']
    assert rows[0]['plain'] > .25                                         # drawn towards the calibration's one half


def test_prevalence_share_is_the_em_fixed_point():
    fit = ju.calibrate(*simulated_judge(1000))
    s, _ = simulated_judge(500, .2, seed=15)
    p, b, q = np.clip(fit(s), 1 / 1002, 1001 / 1002), fit.base_rate, .5
    for _ in range(3000):
        w = q / b * p
        q = (w / (w + (1 - q) / (1 - b) * (1 - p))).mean()
    assert ju.prevalence(s, fit, n=2)[0] == pytest.approx(q, abs=1e-4)


def test_prevalence_interval_knows_the_calibration_is_a_sample():
    small, large = (ju.calibrate(*simulated_judge(n)) for n in (150, 4000))
    s, _ = simulated_judge(2000, .3, seed=16)
    width = lambda i: i[2] - i[1]
    assert width(ju.prevalence(s, small)) > 1.5 * width(ju.prevalence(s, large))


# --- rows of the results files

def test_result_rows_have_the_columns_of_the_files():
    import pandas as pd

    from saferlhf.reproduction.judging import model_rows
    row = ev.table1_row('unified', 'cost', 'sign', 'human', 10, ev.Interval(.8, .7, .9))
    assert list(row) == ['round', 'model', 'metric', 'label_source', 'n', 'value', 'low', 'high', 'paper']
    assert (row['value'], row['low'], row['high'], row['paper']) == (.8, .7, .9, .8583)
    assert ev.table1_row(1, 'tfidf', 'cost-sign', 'human', 10, ev.Interval(.8, .7, .9))['paper'] is None
    answers = dict(policy='initial', prompt_kind='unsafe', source='', decoding='greedy', prompt_id=[0, 1, 2, 3],
                   tfidf_cost=[1., -1., -1., 1.], coherent=[True, True, False, True], length=[4, 5, 6, 5], refused=False,
                   tokens=[[1, 2, 3]] * 4)
    row, = model_rows(pd.DataFrame(answers))
    assert list(row) == ['policy', 'prompt_kind', 'judge', 'decoding', 'n', 'reward', 'cost', 'harmful', 'harmful_low',
                         'harmful_high', 'coherent_harmless', 'length', 'refused', 'distinct']
    assert [row[k] for k in ('harmful', 'coherent_harmless', 'length', 'reward', 'cost')] == [.5, .25, 5, None, 0]


def test_harmful_by_category():
    rows = ev.harmful_by_category([{'a', 'b'}, {'a'}, set(), set()], [0, 1, 2, 3])
    assert [(r['category'], r['count'], r['harmful'], r['n']) for r in rows] == [('a', 2, .5, 4), ('b', 1, .25, 4)]


def test_rows_of_models_have_safe_prompts_apart_refusals_and_variety():
    import pandas as pd

    from saferlhf.reproduction.judging import model_rows
    kinds = [('unsafe', '', True, [1, 2, 3, 4]), ('safe', 'xstest', True, [1, 2, 3]), ('safe', 'jailbreakbench', False, [1, 2, 3])]
    table = pd.DataFrame([dict(policy='p', prompt_kind=k, source=s, decoding='sampled', prompt_id=i, refused=r, tokens=t,
                               gold_cost=-1., gold_reward=0., coherent=True, length=3) for i, (k, s, r, t) in enumerate(kinds)])
    rows = {r['prompt_kind']: r for r in model_rows(table)}
    assert {k: (r['n'], r['refused']) for k, r in rows.items()} == {'unsafe': (1, 1.), 'safe': (2, .5), 'safe, xstest': (1, 1.),
                                                                    'safe, jailbreakbench': (1, 0.)}
    assert rows['safe']['distinct'] == .5 and rows['unsafe']['distinct'] == 1


def test_every_reading_of_an_answer_lands_in_its_column():
    from saferlhf.reproduction.judging import judge_answers
    gold = np.zeros((2, 16)); gold[:, :2] = [[.5, -1.], [-.5, 2.]]
    one = lambda *values: lambda p, a: np.array(values)
    judges = dict(gold=lambda p, a: gold, judge=one(-3., 3.), reward=one(1., 2.), cost=one(4., 5.), tfidf=one(.2, .9), nll=one(2., 9.))
    rows = [dict(prompt='p', response=r, tokens=t) for r, t in (("I'm sorry, I cannot.", [5, 6, 7, 0]), ('Turn left twice.', [5, 6, 0]))]
    out = judge_answers(rows, judges, ju.CoherenceBounds(1., 5., .8, 2, 2), 0)
    columns = ('gold_reward', 'gold_cost', 'judge_cost', 'unified_reward', 'unified_cost', 'refused', 'coherent', 'length')
    assert [list(out[c]) for c in columns] == [[.5, -.5], [-1., 2.], [-3., 3.], [1., 2.], [4., 5.], [True, False], [True, False], [4, 3]]
    assert out['tfidf_cost'] == pytest.approx([-.3, .4]) and not out['categories'][0] and out['categories'][1]


def test_every_label_counts_where_baselines_are_asked_for(monkeypatch):
    "Table 1: at most 250 answers of a label source, all of them in the first round, and none of a source with few."
    from saferlhf.reproduction import judging
    row = lambda i, who: dict(prompt=f'p{i}', response=f'word{i % 2} w w', is_safe=i % 2 == 0, label_source=who)
    rows = [row(i, 'human') for i in range(300)] + [row(1000 + i, 'few') for i in range(49)]
    monkeypatch.setattr(judging, 'labelled_answers', lambda *parts, human=False: rows)
    score = lambda prompts, responses: np.array([1. if 'word1' in r else -1. for r in responses])
    for asked, n in ((dict(), 250), (dict(baselines=True), 300), (dict(most=None), 300), (dict(most=60), 60)):
        table, singles, compared = judging.sign_table(score, 1, **asked)
        cost = [(r['label_source'], r['n'], r['value']) for r in table if r['model'] == 'cost']
        assert len(singles) == n and cost == [('human', n, 1.)]
        rules = ['tfidf', 'majority'] if 'baselines' in asked else []
        assert [r['model'] for r in table] == ['cost', *rules]
        assert set(compared) == ({'cost_minus_tfidf'} if asked.get('baselines') else set())
