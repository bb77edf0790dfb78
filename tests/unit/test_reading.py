"Blind reading: what a packet shows, what comes back, agreement and corrected counts by hand."
import json

import numpy as np
import pytest
from tiny import close

from saferlhf.record.files import read_lines
from saferlhf.reproduction.reading import FIELDS, agreement, packets, prediction_powered, read_back, rubric

ONE = [dict(prompt=f'Question {k}?', response=f'Reply number {k}.', is_safe=k % 2 == 0, policy=f'secret-{k % 3}') for k in range(23)]
TWO = [dict(prompt=f'Question {k}?', response_0=f'Left {k}.', response_1=f'Right {k}.', better_response_id=1) for k in range(9)]
GOOD = dict(answers=dict(harmful=True, categories=[2, 14], refusal=False, on_topic=True, speech='sensible', reason='it tells how'),
            pairs=dict(helpful='A', harmless='B', reason='clear'), overall=dict(better='tie', reason='the same'))


def reply(folder, kind, change=lambda row: row):
    for packet in {r['packet'] for r in read_lines(folder/f'{kind}.key.jsonl')}:
        rows = [dict(item=r['item'], **GOOD[kind]) for r in read_lines(folder/f'{kind}.key.jsonl') if r['packet'] == packet]
        (folder/f'{kind}-{packet:02d}.jsonl').write_text(''.join(json.dumps(change(r)) + '\n' for r in rows))


def test_a_packet_shows_texts_and_nothing_else(tmp_path):
    mark = packets('answers', ONE, tmp_path, size=10, twice=.4)
    key, shown = read_lines(tmp_path/'answers.key.jsonl'), [(tmp_path/f'answers-{k:02d}.md').read_text() for k in range(4)]
    assert len(shown) == len([*tmp_path.glob('answers-*.md')]) and len(key) == 23 + 9 and len({r['item'] for r in key}) == len(key)
    assert not any(word in text for text in shown for word in ('secret', 'is_safe', 'policy', mark))
    assert all(text.startswith(rubric('answers')) for text in shown)
    first = ''.join(shown[:3])
    assert all(first.count(f'\n{r["response"]}\n') == 1 for r in ONE), 'each of them once before any is asked again'
    assert {r['number'] for r in key if r['packet'] == 3} <= {r['number'] for r in key if r['packet'] == 0}   # read by another one
    order = [r['number'] for r in key[:23]]
    assert order != sorted(order) and order != [r['number'] for r in read_lines(tmp_path/'answers.key.jsonl')][::-1]
    assert packets('answers', ONE, tmp_path/'again', size=10, twice=.4) == mark != packets('answers', ONE, tmp_path/'other', seed=1)
    with pytest.raises(FileExistsError, match='has packets of answers'): packets('answers', ONE, tmp_path)
    with pytest.raises(ValueError, match="not 'pair'"): packets('pair', TWO, tmp_path/'x')


def test_pairs_are_asked_in_both_orders_and_turned_back(tmp_path):
    mark = packets('pairs', TWO, tmp_path, twice=1.); key = read_lines(tmp_path/'pairs.key.jsonl')
    sides = {}
    for r in key: sides.setdefault(r['number'], []).append(r['swapped'])
    assert all(sorted(s) == [False, True] for s in sides.values())
    text = (tmp_path/'pairs-00.md').read_text()
    for r in key:
        if r['packet']: continue
        block = text.split(f'## item {r["item"]}')[1].split('## item')[0]
        assert (block.index('Left') > block.index('Right')) == r['swapped']
    reply(tmp_path, 'pairs')                                                       # whatever stands on the left is more helpful
    for r in read_back('pairs', tmp_path, mark):
        assert (r['helpful'], r['harmless']) == (('B', 'A') if r['swapped'] else ('A', 'B')) and r['better_response_id'] == 1
    (tmp_path/'pairs.key.jsonl').write_text((tmp_path/'pairs.key.jsonl').read_text().replace('Left 3', 'Left 4'))
    with pytest.raises(ValueError, match='pairs.key.jsonl is not the key'): read_back('pairs', tmp_path, mark)


BAD = [('pairs', dict(helpful='C'), "helpful is 'C', not one of"), ('pairs', dict(reason='1 2 3 4 5 6'), 'one to five words'),
       ('answers', dict(categories=[]), 'categories of a harmful'), ('answers', dict(categories=[15]), 'categories of a harmful'),
       ('answers', dict(harmful=False), 'of others'), ('answers', dict(speech='fine'), "speech is 'fine'"),
       ('answers', dict(categories=[[1]]), 'categories of a harmful'), ('overall', dict(item='nobody'), 'names no item'),
       ('answers', dict(harmful='yes'), "harmful is 'yes'"), ('overall', dict(reason=''), 'one to five words')]


@pytest.mark.parametrize('kind, change, said', BAD)
def test_a_wrong_reply_is_named(tmp_path, kind, change, said):
    mark = packets(kind, ONE if kind == 'answers' else TWO, tmp_path, twice=0)
    reply(tmp_path, kind); assert len(read_back(kind, tmp_path, mark)) == (23 if kind == 'answers' else 9)
    reply(tmp_path, kind, lambda row: row | change)
    with pytest.raises(ValueError, match=f'{kind}-00.jsonl, line 1: .*{said}'): read_back(kind, tmp_path, mark)


def test_what_is_missing_or_twice_is_named(tmp_path):
    mark = packets('overall', TWO, tmp_path, twice=0); reply(tmp_path, 'overall'); path = tmp_path/'overall-00.jsonl'
    lines = path.read_text().splitlines()
    path.write_text('\n'.join(lines[:-1]) + '\n')
    with pytest.raises(ValueError, match=f'has no line for item {json.loads(lines[-1])["item"]}'): read_back('overall', tmp_path, mark)
    path.write_text('\n'.join([*lines, lines[0]]) + '\n')
    with pytest.raises(ValueError, match='line 10: names no item of the packet, or one twice'): read_back('overall', tmp_path, mark)
    path.write_text('\n'.join(lines[:3]) + '\n{"item": ')
    with pytest.raises(ValueError, match='line 4 of .*overall-00.jsonl is damaged'): read_back('overall', tmp_path, mark)
    path.write_text('\n'.join(json.dumps({k: v for k, v in json.loads(x).items() if k != 'better'}) for x in lines) + '\n')
    with pytest.raises(ValueError, match='has no better'): read_back('overall', tmp_path, mark)


def test_every_field_is_asked_for():
    for kind, fields in FIELDS.items():
        text = rubric(kind); example = json.loads(text.strip().splitlines()[-1])
        assert [*example] == ['item', *fields] and all(f'\n{name}: ' in text for name in fields)
    assert '14. violence, aiding and abetting, incitement' in rubric('answers')


def test_agreement_by_hand():
    a, b = ['A', 'A', 'B', 'tie'], ['A', 'B', 'B', 'tie']                       # by chance: 2/4 1/4 + 1/4 2/4 + 1/4 1/4 = 5/16
    found = agreement(a, b)
    close([found.share.value, found.kappa], [.75, (.75 - 5 / 16) / (1 - 5 / 16)]); assert found.n == 4
    same = agreement([True] * 3, [True] * 3); assert same.share.value == 1 and np.isnan(same.kappa) and np.isnan(same.alpha)
    one = agreement([1, 0] * 20, [1] * 40, [0] * 20 + [1] * 20).share
    assert one.low < .5 < one.high or one.low == .5 == one.high                  # two prompts of twenty answers are two, not forty
    for x in ([], [1]):
        with pytest.raises(ValueError, match='give two for each'): agreement(x, [])


def test_a_count_is_corrected_by_what_was_read():
    y = np.array([1, 0, 1, 0.] * 25); f = 1 - y
    found = prediction_powered(f, f, y); close(found.value, .5)                  # a judge that is always wrong: the readings decide
    alone = prediction_powered(np.full(100, .7), np.full(100, .7), y); close(alone.value, .5)
    close(alone.high - alone.low, 2 * 1.959964 * np.sqrt(y.var(ddof=1) / 100), 1e-4)
    sharp = prediction_powered(np.tile(y, 20), y, y); assert sharp.high - sharp.low < (alone.high - alone.low) / 4
    for a in ((f, f[:5], y), (f[:1], f[:1], y[:1])):
        with pytest.raises(ValueError, match='give two or more'): prediction_powered(*a)


def test_the_published_readings_are_whole_and_of_the_test_part():
    "Every item of the packets was read, with the fields that were asked for; the hashes of the keys are older than the readings."
    from saferlhf.data import bucket, data_path
    from saferlhf.reproduction.reading import _fault, by_reading, readings
    told, rows = json.loads(data_path('readings/people.json').read_bytes()), readings()
    assert {*told['keys']} == {*FIELDS} and all(len(sha) == 64 for sha in told['keys'].values()) and told['reader'] and told['how']
    assert told['rubrics'] == {kind: rubric(kind) for kind in FIELDS}, 'what they were told is what is told'
    for kind, n in told['items'].items():
        first, second = by_reading(rows, kind)
        assert len(first) == n and len(second) == (n if kind != 'answers' else n // 5)
        assert all(first[i]['packet'] != second[i]['packet'] for i in second)
    for r in rows: assert _fault(r['kind'], r) is None and 10 <= bucket(r['prompt']) <= 19, r['item']
