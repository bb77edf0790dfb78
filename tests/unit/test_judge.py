"Two policies compared: win rates and agreement by hand, both orders, what is kept, what is read again."
import json
import sys

import numpy as np
import pandas as pd
import pytest
import tiny
from sklearn.metrics import cohen_kappa_score
from test_chat import made
from test_scorers import Server, question

from saferlhf.apps import judge as module
from saferlhf.apps.judge import Verdicts, _agreement, _measures, _verdicts, judge, table
from saferlhf.apps.scorers import Score
from saferlhf.evaluate import win_rate
from saferlhf.models import save_tokenizer, tiny_model
from saferlhf.record.files import read_lines
from saferlhf.text import prompt_id

PROMPTS = tiny.sentences(12, 7)
length = Score(lambda p, a: [float(len(x)) for x in a], 'reward', 'length')


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/'runs')); monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    return tmp_path


@pytest.fixture
def policies(): return made('sft', tiny_model(vocab_size=300)), made('policy', tiny_model(vocab_size=300, seed=1))


def numbers(record): return {(r.judge, r.measure): r for r in pd.read_csv(record.path('judged.csv')).itertuples()}

# arithmetic

def test_measures_by_hand():
    ids = [1, 1, 2, 3, 4, 5]
    v = Verdicts('c', 'cost', np.array([-1., 2., 0., 1., np.nan, 1.]), np.array([1., 1., 0., -1., 1., 3.]))
    rows = {r['measure']: r for r in _measures(v, ids)}
    assert v.wins[[0, 1, 2, 3, 5]].tolist() == [1, -1, 0, -1, 1] and np.isnan(v.wins[4])
    assert rows['no judgement']['value'] == 1 / 6 and rows['no judgement']['n'] == 6
    tiny.close([rows[k]['value'] for k in ('a wins', 'ties', 'mean a', 'mean b', 'mean a - b', 'harmful a', 'harmful b', 'harmful a - b')],
               [.5, .2, .6, .8, -.2, .6, .6, 0.])
    assert rows['a wins']['n'] == 5
    kept = [0, 1, 2, 3, 5]
    wanted = win_rate(-v.a[kept], -v.b[kept], np.array(ids)[kept])      # lower costs win; two rows share a prompt
    tiny.close([rows['a wins'][k] for k in ('value', 'low', 'high')], wanted)
    none = Verdicts('n', 'better', np.full(2, np.nan), np.full(2, np.nan))
    assert [r['measure'] for r in _measures(none, [1, 2])] == ['no judgement']


def test_agreement_by_hand():
    x = Verdicts('x', 'cost', np.array([1., -1., 1., 0., 1.]), np.zeros(5))                  # b a b tie b
    y = Verdicts('y', 'safer', np.array([-1., 1., 1., 0., np.nan]), np.array([-1., 1., 0., 0., 0.]))
    rows = {(r['judge'], r['measure']): r for r in _agreement([x, y], range(5))}
    assert rows['x & y', 'agree']['value'] == .75 and rows['x & y', 'agree']['n'] == 4
    tiny.close(rows['x & y', "Cohen's kappa"]['value'], cohen_kappa_score([-1, 1, -1, 0], [-1, 1, 1, 0]))
    n = {-1: 3, 1: 3, 0: 2}                                              # votes on the four pairs that both judged
    expected = sum(n[p] * n[q] for p in n for q in n if p != q) / 7
    tiny.close(rows['all 2 of harmlessness', "Krippendorff's alpha"]['value'], 1 - 2 / expected)
    assert _agreement([x], range(5)) == []


def test_pairs_are_read_in_both_orders_and_singles_shuffled_without_names():
    seen, a, b = [], [f'a{i}' for i in range(40)], [f'b{i}' for i in range(40)]
    def first(prompts, x, y): seen.extend(zip(prompts, x, y, strict=True)); return [1.] * len(x)
    prompts = [f'p{i}' for i in range(40)]
    v = _verdicts(Score(first, 'better', 'first'), prompts, a, b, 0)
    assert sorted(seen) == sorted([*zip(prompts, a, b, strict=True), *zip(prompts, b, a, strict=True)])
    assert (v.a == 1).all() and (v.b == -1).all() and not v.wins.any()
    assert {r['measure']: r['value'] for r in _measures(v, range(40))} == {'a wins': .5, 'ties': 1., 'same in both orders': 0.}
    right = _verdicts(Score(lambda p, x, y: [1. if s[0] == 'b' else -1. for s in x], 'safer', 'b'), prompts, a, b, 0)
    assert (right.wins == -1).all() and _measures(right, range(40))[-1]['value'] == 1.
    single = []
    def score(prompts, x): single.extend(x); return [float(s[1:]) + (s[0] == 'a') / 2 for s in x]
    v = _verdicts(Score(score, 'reward', 's'), prompts, a, b, 0)
    assert (v.a - v.b == .5).all() and sorted(single) == sorted(a + b)
    assert 10 < sum(s[0] == 'a' for s in single[:40]) < 30 and single != sorted(single)
    single.clear(); _verdicts(Score(score, 'reward', 's'), prompts, a, b, 0); again = [*single]
    single.clear(); _verdicts(Score(score, 'reward', 's'), prompts, a, b, 1)
    assert again != single                                              # the order is the seed's

# whole runs

def test_a_comparison(policies, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'own_judge.py').write_text('def longer(p, a, b): return [float(len(x) - len(y)) for x, y in zip(a, b)]\n')
    cost = made('cost', tiny.scorer(vocab=300, seed=1, kind='cost'))
    (tmp_path/'prompts.jsonl').write_text(''.join(json.dumps(dict(prompt=p)) + '\n' for p in PROMPTS))
    by = [cost.folder, 'better=own_judge.longer', length]
    record = judge(*policies, tmp_path/'prompts.jsonl', by, dict(batch_size=4), out=tmp_path/'out')
    shown, found, rows = capsys.readouterr().out, numbers(record), read_lines(record.path('judged.jsonl'))
    assert sorted(r['prompt'] for r in rows) == sorted({*PROMPTS})
    assert all(r['prompt_id'] == str(prompt_id(r['prompt'])) for r in rows)
    long = win_rate([len(r['a']) for r in rows], [len(r['b']) for r in rows], [r['prompt_id'] for r in rows])
    for name in ('length', 'own_judge.longer'):
        tiny.close([getattr(found[name, 'a wins'], k) for k in ('value', 'low', 'high')], long)
        assert f'{name} ' in shown and f'{100 * long.value:.1f} [{100 * long.low:.1f}, {100 * long.high:.1f}]' in shown
    assert found['own_judge.longer & length', 'agree'].value == 1 and found['own_judge.longer', 'same in both orders'].value == 1
    assert (f'{cost.id} & length', 'agree') in found and ('all 2 of helpfulness', "Krippendorff's alpha") in found
    costs = np.array([[r['verdicts'][cost.id][k] for k in 'ab'] for r in rows])
    tiny.close(found[cost.id, 'harmful a'].value, (costs[:, 0] > 0).mean())
    tiny.close(found[cost.id, 'mean a - b'].value, (costs[:, 0] - costs[:, 1]).mean())
    for name in ('judged.jsonl', 'judged.csv'): assert (tmp_path/'out'/name).read_bytes() == record.path(name).read_bytes()
    assert record.summary['n'] == len(rows) and table(record) in shown and f'a: {policies[0].id}\nb: {policies[1].id}\n' in shown
    sys.modules.pop('own_judge')


def test_answers_are_sampled_once_and_judges_that_changed_judge_again(policies, monkeypatch, tmp_path):
    class Counted(module.Speaker):
        made = 0
        def __init__(self, *a): super().__init__(*a); Counted.made += 1
    monkeypatch.setattr(module, 'Speaker', Counted)
    record = judge(*policies, PROMPTS, length)
    judge(*policies, PROMPTS, Score(lambda p, a: [float(x.count('e')) for x in a], 'reward', 'e'))
    judge(policies[1], policies[0], PROMPTS, length)
    assert Counted.made == 2 and judge(*policies, PROMPTS, length).folder == record.folder
    def counting(letter): return Score(lambda p, a: [float(x.count(letter)) for x in a], 'reward', 'letters')
    assert judge(*policies, PROMPTS, counting('a')).folder != judge(*policies, PROMPTS, counting('o')).folder
    assert judge(*policies, PROMPTS, length, dict(seed=1)).folder != record.folder and Counted.made == 4


def test_an_interrupted_comparison_goes_on(policies, monkeypatch):
    calls, fail = [], [True]
    def score(p, a):
        calls.append(len(a))
        if fail: raise RuntimeError('no reply')
        return [float(len(x)) for x in a]
    with pytest.raises(RuntimeError, match='no reply'): judge(*policies, PROMPTS, [length, Score(score, 'cost', 'late')])
    fail.clear()
    counted = []
    monkeypatch.setattr(module, '_verdicts', lambda s, *a: counted.append(s.name) or _verdicts(s, *a))
    first = numbers(judge(*policies, PROMPTS, [length, Score(score, 'cost', 'late')]))
    assert counted == ['length', 'late'] or counted == ['late']
    assert first['length & late', 'agree'].value == first['length', 'ties'].value              # opposite judges


def test_an_endpoint_compares_pairs_and_is_paid_once(policies, capsys):
    with Server(lambda b: 'tie' if len(question(b)) % 3 == 0 else 'A') as s:
        with pytest.raises(ValueError, match='at most 24 calls and 384 tokens .* agree to them'): judge(*policies, PROMPTS, s.address)
        record = judge(*policies, PROMPTS, s.address, judging=dict(yes=True))
        asked = len(s.asked)
        assert 0 < asked <= 24 and numbers(record)['stub-1 at 127.0.0.1', 'a wins'].n == 12
        for body in s.asked:
            for name in (policies[0].id, policies[1].id, 'sft', 'policy'): assert name not in json.dumps(body)
        judge(*policies, PROMPTS, [s.address, length])                   # asked before: free
        assert len(s.asked) == asked


def test_replies_without_judgement_are_counted(policies):
    with Server("I can't compare these.") as s:
        found = numbers(judge(*policies, PROMPTS[:4], s.address, judging=dict(yes=True)))
    assert found['stub-1 at 127.0.0.1', 'no judgement'].value == 1 and len(found) == 1


def test_foreign_models_lists_and_limits(policies, tmp_path):
    tiny_model(vocab_size=300, seed=2).save_pretrained(tmp_path/'m'); save_tokenizer(tiny.tokenizer(), tmp_path/'m')
    (tmp_path/'p.txt').write_text('\n'.join(PROMPTS) + '\n\n')
    limits = dict(rows=5, max_prompt_tokens=100, max_new_tokens=8, temperature=0.)
    rows = [dict(prompt=p) for p in PROMPTS]
    one, two, three = (judge(tmp_path/'m', policies[0], p, length, limits) for p in (tmp_path/'p.txt', PROMPTS[::-1], rows))
    assert one.folder == two.folder == three.folder and one.summary['n'] == 5           # the same prompts, whatever their order
    rows = read_lines(judge(tmp_path/'m', tmp_path/'m', PROMPTS, length, limits).path('judged.jsonl'))
    assert all(r['a'] == r['b'] and r['verdicts']['length']['wins'] == 0 for r in rows)


def test_wrong_input_is_one_line(policies, tmp_path):
    (tmp_path/'none.txt').write_text('\n')
    for a, said in [((*policies, PROMPTS, []), 'no judge is named'),
                    ((*policies, tmp_path/'none.txt', length), 'none.txt: it holds no prompt'),
                    ((*policies, PROMPTS, len), 'len: say what it is'), ((*policies, PROMPTS, './nowhere'), 'is no folder'),
                    ((*policies, PROMPTS, length, dict(row=3)), "no field 'row': did you mean 'rows'"),
                    ((tmp_path/'x', policies[0], PROMPTS, length), 'is no folder')]:
        with pytest.raises((ValueError, FileNotFoundError), match=said) as e: judge(*a)
        assert len(str(e.value).splitlines()) == 1
