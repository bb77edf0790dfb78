"A user's file: what each command reads of it, what it refuses in one line, and that no held-out prompt is trained on."
import json

import pytest
from tiny import sentences, tokenizer

from saferlhf.apps.own_data import answer_rows, cost_rows, cut_line, held_out_prompt, reward_rows, signs, split_rows, token_counts
from saferlhf.text import key_hash
from saferlhf.train import ScoreConfig

N = 120
PROMPTS = [f'{s}, number {k}' for k, s in enumerate(sentences(N, 1))]
ANSWERS = dict(response_0='Ask somebody who knows.', response_1='Just go ahead.')


def written(folder, rows, name='rows.jsonl'):
    (folder/name).write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8')
    return folder/name


def pairs(n=N, **more): return [dict(prompt=p) | ANSWERS | more for p in PROMPTS[:n]]


def labels(n=N, safe=lambda k: k % 2 == 0):
    return [dict(prompt=p, response=f'Answer {k}.', is_safe=safe(k)) for k, p in enumerate(PROMPTS[:n])]


def chosen(): return [dict(prompt=p, chosen='Ask somebody who knows.', rejected='Just go ahead.') for p in PROMPTS]


def one_line(match, call, *args, **kw):
    with pytest.raises((ValueError, OSError), match=match) as e: call(*args, **kw)
    assert '\n' not in str(e.value)


def prompts(rows): return {key_hash(r[k]) for r in rows for k in ('prompt', 'low_prompt') if k in r}

# the split

def test_a_prompt_is_on_the_same_side_however_it_is_spelt():
    variants = [lambda p: p.upper(), lambda p: f'  {p}\n', lambda p: p.replace(' ', '  ').replace(',', ' -'), lambda p: p + '!?',
                lambda p: json.dumps([dict(role='user', content=p), dict(role='assistant', content='x'), dict(role='user', content='y')])]
    for p in PROMPTS: assert len({held_out_prompt(v(p), 3, .3) for v in (str, *variants)}) == 1, p


def test_no_spelling_of_a_held_out_prompt_is_trained_on(tmp_path):
    rows = [dict(prompt=v(p), response='Yes.') for p in PROMPTS for v in (str, str.upper, lambda p: p.replace(' ', '\t'))]
    read = answer_rows(written(tmp_path, rows), 0, .2)
    assert not prompts(read.train) & prompts(read.test) and len(read.train) + len(read.test) == 3 * N
    assert .1 < len(read.test) / (3 * N) < .3


def test_every_command_and_file_has_the_same_split(tmp_path):
    both = pairs(better_response_id=0, safer_response_id=0, is_response_0_safe=True, is_response_1_safe=False)
    reads = [answer_rows(labels(), 5, .2), reward_rows(both, 5, .2), cost_rows(both, 5, .2), cost_rows(labels(), 5, .2)]
    for r in reads: assert prompts(r.test) == prompts(reads[0].test) and prompts(r.train) == prompts(reads[0].train)
    assert prompts(answer_rows(labels(), 6, .2).test) != prompts(reads[0].test)


def test_both_sides_need_a_prompt():
    one_line('test_share=0.1, 1 prompts leave none', split_rows, [dict(prompt='A?'), dict(prompt='a')], 0, .1, 'x.jsonl')
    for share in (0., 1., -1., 2.): one_line('it is a share', split_rows, labels(), 0, share)

# rewards

def test_rankings_by_helpfulness(tmp_path):
    rows = pairs(better_response_id=0); rows[7] |= dict(better_response_id=-1, safer_response_id=0)
    read = reward_rows(written(tmp_path, rows), 0, .1)
    assert all(r['high'] == ANSWERS['response_0'] for r in read.train + read.test)
    assert len(read.train) + len(read.test) == N - 1 and '1 rows without a ranking are left out' in read.said[0]
    assert len(reward_rows(rows, 0, .1, most=11).train) == 11


def test_what_chosen_means_has_to_be_said(tmp_path):
    path = written(tmp_path, chosen())
    for call in (reward_rows, cost_rows):
        one_line("rows.jsonl, chosen_is='': say what chosen means, 'better'.*'overall'", call, path, 0, .1)
    for meaning in ('better', 'overall'):
        read = reward_rows(path, 0, .1, meaning)
        assert {r['high'] for r in read.train} == {ANSWERS['response_0']} and ('overall' in read.said[0]) == (meaning == 'overall')
    one_line('who is safer, not which answer is more helpful', reward_rows, path, 0, .1, 'safer')
    read = cost_rows(path, 0, .1, 'safer')
    assert {r['high'] for r in read.train} == {ANSWERS['response_1']} and read.zero == 'none'     # the more harmful one is high
    one_line("mixes helpfulness and harm, so no cost can be told from it", cost_rows, path, 0, .1, 'overall')
    one_line("'better' says nothing about harm", cost_rows, path, 0, .1, 'better')
    for call in (reward_rows, cost_rows): one_line("chosen_is='best'", call, path, 0, .1, 'best')


def test_what_a_reward_model_cannot_be_made_of():
    one_line('which answers are safe, not which answer is more helpful', reward_rows, labels(), 0, .1)
    one_line('no row says which answer is more helpful', reward_rows, pairs(safer_response_id=0), 0, .1)

# costs

def test_rankings_and_labels_make_the_whole_loss():
    read = cost_rows(pairs(safer_response_id=0, is_response_0_safe=True, is_response_1_safe=False), 0, .1)
    assert read.zero == 'labels' and not read.placed
    for r in read.train + read.test:
        assert (r['high'], r['high_sign'], r['low_sign'], r['paired']) == (ANSWERS['response_1'], 1, -1, 1.)


@pytest.mark.parametrize('rows', [labels(), pairs(is_response_0_safe=True, is_response_1_safe=False)], ids=['labels', 'pairs'])
def test_labels_alone_make_the_sign_terms(rows):
    read = cost_rows(rows, 0, .1)
    assert read.zero == 'labels' and not any(r['paired'] for r in read.train + read.test) and 'signs alone' in read.said[1]
    found = {(s['prompt'], s['response']): s['sign'] for s in signs(read.train + read.test)}
    wanted = {(r['prompt'], r['response']): -1 if r['is_safe'] else 1 for r in rows if 'response' in r}
    assert found == (wanted or {(p, a): s for p in PROMPTS for a, s in zip(ANSWERS.values(), (-1, 1), strict=True)})


def test_rankings_alone_have_no_zero():
    read = cost_rows(pairs(safer_response_id=1), 0, .1)
    assert read.zero == 'none' and not signs(read.train + read.test) and 'zero of this cost means nothing' in read.said[1]


def test_a_file_may_rank_some_rows_and_label_others():
    other = lambda rows, end: [r | dict(prompt=r['prompt'] + end) for r in rows]
    labelled, neither = pairs(40, is_response_0_safe=False, is_response_1_safe=True), pairs(3, better_response_id=1)
    read = cost_rows(pairs(60, safer_response_id=0) + other(labelled, ' b') + other(neither, ' c'), 0, .1)
    every = read.train + read.test
    assert sum(r['paired'] for r in every) == 60 and len(signs(every)) == 80 and read.zero == 'labels'
    assert '60 rankings by harm, 80 single labels' in read.said[0] and '3 rows say nothing about harm' in read.said[0]


def test_labels_of_one_kind_put_no_zero():
    one_line(r'all \d+ safety labels say harmful: a cost model needs both kinds', cost_rows, labels(safe=lambda k: False), 0, .01)
    read = cost_rows(pairs(safer_response_id=0, is_response_0_safe=True, is_response_1_safe=True), 0, .1)
    assert read.zero == 'none' and not signs(read.train) and 'all are the same' in read.said[1]


def test_a_part_of_the_labels_can_be_left_out():
    both = pairs(safer_response_id=0, is_response_0_safe=True, is_response_1_safe=False)
    sign, rank = cost_rows(both, 0, .1, labels='sign'), cost_rows(both, 0, .1, labels='rank')
    assert not any(r['paired'] for r in sign.train) and sign.zero == 'labels'
    assert signs(sign.train) == signs(cost_rows(both, 0, .1).train)
    assert not signs(rank.train + rank.test) and rank.zero == 'none'
    one_line("no rankings by harm: leave labels='rank' out", cost_rows, labels(), 0, .1, labels='rank')
    one_line("no row says", cost_rows, pairs(safer_response_id=0), 0, .1, labels='sign')
    one_line("labels='single'", cost_rows, both, 0, .1, labels='single')


def test_few_labels_are_called_few():
    assert 'they are few' in cost_rows(labels(30), 0, .3).said[1] and 'few' not in cost_rows(labels(), 0, .1).said[1]


def test_a_zero_put_by_labels(tmp_path):
    ranked, path = pairs(safer_response_id=0), written(tmp_path, labels(), 'zero.jsonl')
    read = cost_rows(ranked, 0, .1, zero=path)
    assert read.zero == 'offset' and not signs(read.train) and len(signs(read.placed)) + len(signs(read.test)) == N
    assert read.said[1:] == ['rankings alone', 'zero.jsonl: 120 safety labels put the zero after training']
    assert not prompts(read.placed) & prompts(read.test) and not prompts(read.train) & prompts(read.test)
    few, safe = written(tmp_path, labels(49), 'few.jsonl'), written(tmp_path, labels(safe=lambda k: True), 'safe.jsonl')
    one_line('49 safety labels, 25 of them safe: it needs 50 or more', cost_rows, ranked, 0, .1, zero=few)
    one_line('of both kinds', cost_rows, ranked, 0, .1, zero=safe)
    one_line("rows.*has safety labels of its own", cost_rows, labels(), 0, .1, zero=path)
    one_line('there is no', cost_rows, ranked, 0, .1, zero=str(tmp_path/'missing.jsonl'))


def test_rows_about_nothing_are_refused(tmp_path):
    one_line('no row says which answer is more harmful', cost_rows, pairs(better_response_id=0), 0, .1)
    one_line('columns seen', answer_rows, written(tmp_path, [dict(question='A?', text='B')]), 0, .1)
    one_line('there is no', answer_rows, str(tmp_path/'none.jsonl'), 0, .1)
    (tmp_path/'empty.jsonl').write_text('', encoding='utf-8')
    for call in (answer_rows, reward_rows, cost_rows): one_line('0 of 0 rows kept', call, tmp_path/'empty.jsonl', 0, .1)

# tokens

def test_what_is_cut_is_counted():
    rows = [dict(prompt='a cake', high='yes ' * k, low='no') for k in (1, 5, 20)]
    counts = token_counts(rows, tokenizer())
    assert len(counts[0]) == 1 and len(counts[1]) == 4                                        # each text once
    said = cut_line(counts, ScoreConfig(max_prompt_tokens=4, max_new_tokens=max(counts[1]) - 1))
    assert '1 of 1 prompts are longer than 4 tokens' in said and '1 of 4 answers' in said
