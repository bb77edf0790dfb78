"The annotation protocol: noise that belongs to the item, agreement as wanted, rows that validate, red-team prompts held out."
import inspect

import numpy as np
import pytest
from scipy.special import ndtr

from saferlhf import annotate as an
from saferlhf.data import cost_pairs, reward_pairs, validate

N = 400


def world(prompts, responses):
    "Scores that can be read from the text: help, harm, and 14 logits that follow from it."
    h = np.array([[float(x) for x in r.split()] for r in responses])
    return np.c_[h, np.full((len(h), 14), -1.) + 3 * (np.arange(14) == 3)[None] * (h[:, 1:] > 0.5)]


@pytest.fixture(scope='module')
def pairs():
    x = np.random.default_rng(0).multivariate_normal([0, 0], [[1, .4], [.4, 1]], (2, N))
    text = [[f'{h:.4f} {c:.4f}' for h, c in side] for side in x]
    return [f'prompt {i}' for i in range(N)], *text


def gold(**settings):
    return an.GoldAnnotator(world, **({'noise_help': 1., 'noise_harm': 1.} | settings))


def test_agreement_closed_form_against_simulation():
    d, sd = np.random.default_rng(1).normal(0.3, 1.2, 500), 0.9
    e = np.random.default_rng(2).normal(0, sd, (2, 400, 500))
    found = ((d + e[0] > 0) == (d + e[1] > 0)).mean()
    assert abs(found - an._expected_agreement(d, sd)) < 0.004
    p = ndtr(d / sd)
    assert an._expected_agreement(d, sd) == pytest.approx((p**2 + (1 - p)**2).mean())
    assert an._expected_agreement([1., 0.], 0) == 0.75   # no noise: certain, and a coin for a tie


@pytest.mark.parametrize('target', [*an.PAPER_AGREEMENT.values(), 0.51, 0.97])
@pytest.mark.parametrize('scale', [1e-3, 1., 50.])
def test_noise_reaches_the_target_in_any_unit(target, scale):
    d = scale * np.random.default_rng(3).standard_normal(1000)
    sd = an.noise_for_agreement(d, target)
    assert an._expected_agreement(d, sd) == pytest.approx(target, abs=1e-6)
    assert sd == pytest.approx(scale * an.noise_for_agreement(d / scale, target), rel=1e-6)


@pytest.mark.parametrize('differences, target', [([1., 2.], 0.5), ([1., 2.], 1.), ([0., 0., 1.], 0.7), ([1.], 0.3)])
def test_unreachable_agreement_is_an_error(differences, target):
    with pytest.raises(ValueError, match='out of reach'): an.noise_for_agreement(differences, target)


def test_gold_annotators_agree_as_often_as_calibrated(pairs):
    prompts, a, b = pairs
    d = world(prompts, b) - world(prompts, a)
    for column, dimension in enumerate(('helpfulness', 'harmlessness')):
        sd = an.noise_for_agreement(d[:, column], an.PAPER_AGREEMENT[dimension])
        votes = [gold(noise_help=sd, noise_harm=sd, annotator=k).rank(prompts, a, b, dimension) for k in range(30)]
        assert an._agreement_share(votes) == pytest.approx(an.PAPER_AGREEMENT[dimension], abs=0.012)


def test_annotation_does_not_depend_on_the_batch(pairs):
    prompts, a, b = pairs
    whole = an.two_stage(prompts, a, b, gold())
    order, parts = np.random.default_rng(4).permutation(N), {}
    judge = gold()
    for chunk in np.array_split(order, 7):
        for i, row in zip(chunk, an.two_stage(*([x[j] for j in chunk] for x in (prompts, a, b)), judge), strict=True): parts[i] = row
    assert [parts[i] for i in range(N)] == whole


def test_swapping_the_answers_swaps_the_choice(pairs):
    prompts, a, b = pairs
    for dimension in ('helpfulness', 'harmlessness'):
        assert (gold().rank(prompts, a, b, dimension) == 1 - gold().rank(prompts, b, a, dimension)).all()
    one, two = an.two_stage(prompts, a, b, gold()), an.two_stage(prompts, b, a, gold())
    assert all(x['id'] == y['id'] and x['safer_response_id'] == 1 - y['safer_response_id'] for x, y in zip(one, two, strict=True))


def test_noises_are_independent(pairs):
    "Another seed, annotator or question: noise without correlation."
    ids = [str(i) for i in range(4000)]
    names = [(0, 0, 'helpfulness'), (0, 0, 'harmlessness'), (0, 1, 'helpfulness'), (1, 0, 'helpfulness')]
    corr = np.corrcoef([an._item_uniform(n, ids) for n in names])
    assert np.abs(corr - np.eye(4)).max() < 0.06
    prompts, a, b = pairs
    assert (gold(annotator=1).rank(prompts, a, b, 'helpfulness') != gold().rank(prompts, a, b, 'helpfulness')).mean() > .15


def test_signs_of_the_rankings_without_noise(pairs):
    prompts, a, b = pairs
    d = world(prompts, b) - world(prompts, a)
    judge = gold(noise_help=0, noise_harm=0)
    assert (judge.rank(prompts, a, b, 'helpfulness') == (d[:, 0] > 0)).all()
    assert (judge.rank(prompts, a, b, 'harmlessness') == (d[:, 1] < 0)).all()      # safer = less harm


def test_labels(pairs):
    prompts, a, _ = pairs
    harm = world(prompts, a)[:, 1]
    labels = gold().label(prompts, a)
    assert [bool(s) for s in labels] == (harm > 0).tolist()
    for x, s in zip(harm, labels, strict=True):
        if x > 0.5: assert s == {an.HARM_CATEGORIES[3]}                # the one positive logit
        elif x > 0: assert s == set(an.HARM_CATEGORIES)                # all logits equal and negative: the largest, here all of them


def test_each_answer_is_scored_once(pairs):
    prompts, a, b = pairs
    calls = []
    judge = an.GoldAnnotator(lambda p, r: calls.extend(r) or world(p, r))
    an.two_stage(prompts, a, b, judge)
    an.two_stage(prompts, b, a, judge)
    assert sorted(calls) == sorted(a + b)


def test_rows_validate_and_feed_the_losses(pairs):
    prompts, a, b = pairs
    rows = an.two_stage(prompts, a, b, gold(noise_harm=3.), source='round-1')
    clean, report = validate(rows, policy='raise')
    assert len(clean) == N and not report.counts
    assert len({r['id'] for r in rows}) == N
    assert {r[f'label_source_{k}'] for r in rows for k in ('better', 'safer', 'is_safe')} == {'gold'}
    assert len(reward_pairs(rows, ['gold'])) == N
    for row, pair in zip(rows, cost_pairs(rows), strict=True):
        assert pair['high'] == row[f'response_{1 - row["safer_response_id"]}']
        assert pair['high_sign'] >= pair['low_sign']              # the consistency rule: never a safe one above a harmful one


def test_the_rule_is_needed_and_applied_to_every_annotator(pairs):
    "A ranking that always points at the harmful answer is overruled on mixed pairs, and only there."
    prompts, a, b = pairs
    class Wrong:
        name = 'wrong'
        label = staticmethod(gold().label)
        def rank(self, prompts, a, b, dimension): return world(prompts, b)[:, 1] > world(prompts, a)[:, 1]
    for r in an.two_stage(prompts, a, b, Wrong()):
        harm = [world(0, [r[f'response_{i}']])[0, 1] for i in (0, 1)]
        mixed = (harm[0] > 0) != (harm[1] > 0)
        assert r['safer_response_id'] == int(np.argmin(harm) if mixed else np.argmax(harm))


def test_an_annotator_outside_the_protocol_is_refused():
    class Bad:
        name = 'bad'
        def __init__(self, label, rank): self.label, self.rank = (lambda p, r: label), (lambda p, a, b, d: rank)
    cases = ([{'rudeness'}], [0], 'unknown categories'), ([], [0], 'one set'), ([set()], [-1], '0 or 1'), ([set()], [0, 1], '0 or 1')
    for label, rank, match in cases:
        with pytest.raises(ValueError, match=match): an.two_stage(['p'], ['a'], ['b'], Bad(label, rank))
    with pytest.raises(ValueError): an.two_stage(['p', 'q'], ['a'], ['b'], gold())
    with pytest.raises(ValueError, match='finite'): an.GoldAnnotator(lambda p, r: np.full((len(p), 16), np.nan)).label(['p'], ['a'])
    with pytest.raises(ValueError, match='shape'): an.GoldAnnotator(lambda p, r: np.zeros((len(p), 2))).label(['p'], ['a'])


def test_gold_annotator_follows_the_protocol():
    for name in ('label', 'rank'):
        wanted, found = (list(inspect.signature(getattr(c, name)).parameters) for c in (an.Annotator, an.GoldAnnotator))
        assert wanted == found


def test_agreement_of_one_and_of_two_dimensions():
    "Decoupled as calibrated; one dimension gains without conflicts, falls with conflicts, and with the spread of weights."
    h, c = np.random.default_rng(5).multivariate_normal([0, 0], [[1, .4], [.4, 1]], 1500).T
    noise = an.noise_for_agreement(h, .69), an.noise_for_agreement(c, .6653)
    rows = an.annotation_rows(h, c, *noise, spreads=(0., .3), conflict_shares=(None, 0., .5, 1.), annotators=25)
    assert set(rows[0]) == {'protocol', 'weight_spread', 'conflict_share', 'agreement', 'alpha', 'n'}
    cell = {(r['protocol'], r['weight_spread'] if r['protocol'] == 'single-dimension' else None, k // 4): r for k, r in enumerate(rows)}
    assert cell['helpfulness', None, 0]['agreement'] == pytest.approx(.69, abs=.012)
    assert cell['harmlessness', None, 0]['agreement'] == pytest.approx(.6653, abs=.012)
    single = np.array([[cell['single-dimension', s, k]['agreement'] for k in (1, 2, 3)] for s in (0., .3)])
    assert (np.diff(single, axis=1) < -.02).all() and (single[1] < single[0]).all()
    assert single[0, 0] > cell['helpfulness', None, 0]['agreement']
    assert [cell['single-dimension', 0., k]['conflict_share'] for k in (1, 2, 3)] == [0., .5, 1.]


def test_alpha_is_the_library_s():
    votes = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 0]])
    assert an._nominal_alpha(votes) == pytest.approx(1 - (2 * 2 / 10) / (2 * 4 * 6 / (10 * 9)))   # observed over expected disagreement
    assert an._nominal_alpha([[1, 1], [1, 1]]) != an._nominal_alpha([[1, 1], [1, 1]])              # NaN: nothing to tell apart


def test_red_team_holdout():
    rng = np.random.default_rng(6)
    ids, harmful = [int(x) for x in rng.permutation(10**6)[:3000]], rng.random((3000, 3)) < .2
    harvest, holdout = an.red_team(ids, harmful, seed=1)
    assert not set(harvest) & set(holdout)
    assert set(harvest) | set(holdout) == set(np.flatnonzero(harmful.any(1)))
    assert len(holdout) == max(100, -(-len(harmful.any(1).nonzero()[0]) // 10))
    order = rng.permutation(3000)                                                        # another order of the pool, the same prompts
    again = an.red_team([ids[i] for i in order], harmful[order], seed=1)
    assert {ids[i] for i in holdout} == {ids[order[i]] for i in again[1]}
    assert set(an.red_team(ids, harmful, seed=2)[1]) != set(holdout)
    few = an.red_team(ids[:300], harmful[:300], holdout_min=20)
    assert len(few[1]) == 20


def test_red_team_errors():
    with pytest.raises(ValueError, match='enlarge the pool'): an.red_team(range(100), np.ones((100, 2), bool))
    with pytest.raises(ValueError, match='repeat'): an.red_team([1, 1], np.ones((2, 2), bool), holdout_min=1)
    with pytest.raises(ValueError, match='must be'): an.red_team([1, 2], np.ones(2, bool), holdout_min=1)


def test_kinds():
    row = lambda a, b: {'is_response_0_safe': a, 'is_response_1_safe': b}
    rows = [row(True, True), row(True, False), row(False, True), row(False, False), row(None, True), row(True, True)]
    assert an.pair_kinds(rows, [1, 1, 1, 1, 1, 0]) == [
        'dual-safe', 'mixed-safe', 'mixed-safe', 'dual-unsafe', 'unlabelled', 'safety-unrelated']
    assert an.prompt_kinds([0, 1, 1, 1], [[1, 0], [0, 0], [0, 1], [0, 0]], [0, 0, 0, 1]) == [
        'safety-unrelated', 'safety-related-solved', 'safety-related-unsolved', 'red-team']
