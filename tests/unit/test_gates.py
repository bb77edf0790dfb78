"Gates of judges: areas and correlations beside scikit-learn and by hand, artefacts, a judge that falls for each of them; language."
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from tiny import close, lm, sentences, tokenizer

from saferlhf.reproduction.gates import DISCLAIMERS, NOT_ANSWERS, _aucs, artefacts, auc, correlation, gates
from saferlhf.reproduction.language import Language, LanguageBounds

G = np.random.default_rng(0)


def test_areas_are_scikit_learns():
    y = G.random(200) < .3; s = np.round(G.normal(size=200) + y, 1)               # with ties
    w = G.integers(0, 4, (5, 200)).astype(float)
    close(_aucs(s, y, w), [roc_auc_score(y, s, sample_weight=x) for x in w])
    clusters = np.repeat(range(50), 4); found = auc(s, y, clusters)
    assert found.low < found.value < found.high and found.value == auc(-s, ~y, clusters).value
    worse = G.normal(size=200); d = auc(s, y, clusters, worse)
    close(d.value, found.value - roc_auc_score(y, worse)); assert d.low > 0
    for bad in (y | True, y & False):
        with pytest.raises(ValueError, match='harmful and harmless'): auc(s, bad, clusters)


def test_correlations():
    p = np.repeat(range(40), 3); topic, own = G.normal(size=40)[p], G.normal(size=120)
    x, y = topic + own, 2 * topic - own
    close(correlation(x, y, p).value, np.corrcoef(x, y)[0, 1])
    inner = lambda v: v - np.repeat(v.reshape(40, 3).mean(1), 3)
    close(correlation(x, y, p, within=True).value, np.corrcoef(inner(x), inner(y))[0, 1]); close(correlation(x, y, p, True).high, -1)
    shuffled = G.permutation(120)
    close(correlation(x[shuffled], y[shuffled], p[shuffled], True).value, correlation(x, y, p, True).value)
    with pytest.raises(ValueError, match='0 answers say something'): correlation(x, y, range(120), within=True)


def rows(n=60):
    words = ['stab', 'bake', 'paint', 'lift']
    start = 'Use the spoon to', 'Use the knife to'
    said = lambda k: f'{start[k % 2]} {words[k % 4]} it, part {k}, ' + 'gently ' * (k % 7)
    return [dict(prompt=f'How do I do thing number {k // 2}?', response=said(k),
                 is_safe=k % 2 == 0, label_source='human' if k < 40 else 'other') for k in range(n)]


def test_artefacts():
    made = artefacts(rows()); assert {*made} == {'disclaimer', *NOT_ANSWERS}
    for name, (prompts, texts) in made.items(): assert len(texts) == 60 and prompts == [r['prompt'] for r in rows()], name
    for r, t in zip(rows(), made['disclaimer'][1], strict=True):
        assert t.endswith(r['response']) and t.removesuffix(r['response']) in DISCLAIMERS
    at = {r['response']: r['prompt'] for r in rows()}
    assert all(at[t] != r['prompt'] for r, t in zip(rows(), made['other prompt'][1], strict=True))
    assert all(sorted(t.split()) == sorted(r['response'].split()) for r, t in zip(rows(), made['shuffled'][1], strict=True))
    assert {*made['empty'][1]} == {''} and artefacts(rows()) == made != artefacts(rows(), 1)
    assert artefacts([dict(prompt='a', response=''), dict(prompt='b', response='x')])['repetition'][1][0].startswith('so so')
    with pytest.raises(ValueError, match='two prompts'): artefacts([dict(prompt='a', response=str(k)) for k in range(4)])


def passed(score, is_language=None, words=None):
    table = gates('x', score, rows(), np.zeros(60) if words is None else words, is_language)
    return {r['gate']: (r['passed'], r['value']) for r in table}


def test_a_good_judge_passes_and_each_weakness_is_seen():
    knife = lambda p, a: np.array([('knife' in x) - .5 for x in a])
    language = lambda p, a: np.array([x.startswith(('Use', *DISCLAIMERS)) and x.count('part') == 1 for x in a])
    good = passed(knife)
    assert all(ok for ok, _ in good.values()) and good['AUC'][1] == 1 and {'accuracy, human', 'accuracy, other'} <= {*good}
    assert not any(k.startswith('no answer') for k in good)
    fooled = passed(lambda p, a: np.array([('knife' in x and not x.startswith(DISCLAIMERS)) - .5 for x in a]))
    assert fooled['flags lost to a disclaimer'] == (False, 1.) and fooled['AUC'][0]
    afraid = passed(lambda p, a: np.array([('knife' in x or x.startswith(DISCLAIMERS)) - .5 for x in a])); assert afraid['AUC'][0]
    counts = passed(lambda p, a: np.array([len(x) - 50. for x in a]))
    assert not counts['rank correlation with length'][0] and counts['rank correlation with length'][1] == 1 and not counts['AUC'][0]
    assert not passed(knife, words=knife(*[[r[k] for r in rows()] for k in ('prompt', 'response')]))['AUC - TF-IDF'][0]
    told = passed(knife, language)
    assert told['no answer: empty'] == (True, 1.) and told['no answer: other prompt'] == (False, 0.)    # this test knows nothing of prompts
    blind = passed(knife, lambda p, a: np.ones(len(a), bool)); assert not any(blind[f'no answer: {k}'][0] for k in NOT_ANSWERS)


@pytest.fixture(scope='module')
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp('reader'); torch.manual_seed(0)
    lm(vocab=len(tokenizer())).save_pretrained(folder); tokenizer().save_pretrained(folder)
    return Language(folder, max_prompt_tokens=64)


def test_bits_per_byte_are_those_of_the_model(reader):
    prompts, answers = sentences(6, 1), sentences(6, 2)
    bits, gap = reader.read(prompts, answers)
    from saferlhf.text import encode_prompt
    for p, a, b, d in zip(prompts, answers, bits, gap, strict=True):
        def count(asked, a=a):
            head, ids = encode_prompt(asked, tokenizer(), 64), tokenizer()(a, add_special_tokens=False)['input_ids']
            with torch.no_grad(): z = reader.model.model(input_ids=torch.tensor([head + ids])).logits[0].double().log_softmax(-1)
            return -sum(float(z[len(head) - 1 + k, t]) for k, t in enumerate(ids)) / np.log(2) / len(a.encode())
        close([b, d], [count(p), count('Go on.') - count(p)], 1e-4)


def test_what_is_no_answer_has_its_reason(reader):
    answers = ['', 'a cake', 'a cake a cake a cake a cake a cake a cake a cake', 'no sugar']
    free = LanguageBounds(1e9, -1e9, .5, 6)
    found = reader.coherent(['how'] * 4, answers, free, [False, True, False, False])
    assert found.reasons == [['empty'], ['cut'], ['repeats'], []] and found.flags.tolist() == [False, False, False, True]
    bits, gap = reader.read(['how'] * 4, answers)
    tight = free._replace(bits=bits[3] - 1e-3, gap=gap[3] + 1e-3)
    assert reader.coherent(['how'], answers[3:], tight).reasons == [['bits', 'off topic']]
    bounds = reader.bounds(sentences(40, 3), sentences(40, 4), beyond=10.)
    b, d = reader.read(sentences(40, 3), sentences(40, 4))
    close([(b > bounds.bits).mean(), (d < bounds.gap).mean()], [.1, .1], .05)


def test_people_answers_leave_out_what_people_contradict(monkeypatch):
    from saferlhf.reproduction import gates
    row = lambda prompt, response, safe: dict(prompt=prompt, response=response, is_safe=safe, label_source='human')
    told = [row('a', 'x', True), row('a', 'x', True), row('a', 'y', True), row('a', 'y', False), row('b', 'x', False)]
    monkeypatch.setattr(gates, 'labelled_answers', lambda *parts, human: told if human and parts == ('test',) else [])
    found = gates.people_answers('test')
    assert found == [told[0], told[4]] and gates.answers_hash(found) != gates.answers_hash(found[::-1])
