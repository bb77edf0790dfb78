"Malformed rows, drawn by hypothesis: each must be reported and dropped, none may crash, none may come through."
import json
import logging
import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saferlhf.data import cost_pairs, load_preferences, reward_pairs

GOOD = [dict(prompt=f'How do I {verb} bread?', response_0='With care.', response_1='With an oven.', better_response_id=1,
             safer_response_id=0, is_response_0_safe=True, is_response_1_safe=False) for verb in ('bake', 'store')]
TEXTS, LABELS = ('prompt', 'response_0', 'response_1'), ('better_response_id', 'safer_response_id')
FLAGS = ('is_response_0_safe', 'is_response_1_safe')
KINDS = ('type label missing empty huge control encoding surrogate contradicting equal unlabelled dialogue not-a-row cut nested').split()
words = st.text(st.characters(codec='utf-8', exclude_categories=['Cc', 'Cs', 'Cn', 'Co']), min_size=1, max_size=30).filter(str.strip)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | words
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=5)
controls = st.sampled_from([chr(c) for c in (*range(9), 11, 12, *range(14, 32), *range(127, 160), 0xfffe, 0xffff)])
extra = st.dictionaries(st.sampled_from('id source reward_0 cost_1 split response_0_harm_category other'.split()), values, max_size=2)


@st.composite
def malformed(draw): # (kind, the line's bytes)
    "One line that is no row to train on, and what is wrong with it."
    row = dict(draw(st.sampled_from(GOOD)), **{f: draw(words) for f in TEXTS}) | draw(extra)
    if row['response_0'].strip() == row['response_1'].strip(): row['response_1'] += ' other'
    kind = draw(st.sampled_from(KINDS))
    field = draw(st.sampled_from(TEXTS))
    if kind == 'type': # a list of texts is a dialogue
        row[field] = draw(values.filter(lambda v: not isinstance(v, str) and v is not None and not
                                        (isinstance(v, list) and any(isinstance(turn, str) for turn in v))))
    if kind == 'label':
        field = draw(st.sampled_from(LABELS + FLAGS))
        known = {'', 'nan', 'none', 'null', '<na>', '0', '1', '0.0', '1.0'} | ({'true', 'false'} if field in FLAGS else {'-1', '-1.0'})
        row[field] = draw(values.filter(lambda v: str(v).strip().lower() not in known)) # what pandas and CSV files make of labels
    if kind == 'missing': draw(st.sampled_from([lambda: row.pop(field), lambda: row.update({field: None})]))()
    if kind == 'empty': row[field] = draw(st.text(' \t\n\r\u00a0\u2003', max_size=5))
    if kind == 'huge': row[field] = draw(words) * draw(st.integers(20_001, 30_000))
    if kind == 'control': row[field] = draw(words) + draw(controls) + draw(words)
    if kind == 'surrogate': row[field] = draw(words) + chr(draw(st.integers(0xd800, 0xdfff)))
    if kind == 'contradicting': row |= dict(safer_response_id=(k := draw(st.integers(0, 1)))) | {FLAGS[k]: False, FLAGS[1 - k]: True}
    if kind == 'equal': row['response_1'] = draw(st.sampled_from(['', ' ', '\n'])) + row['response_0'] + draw(st.sampled_from(['', '\t']))
    if kind == 'unlabelled': row |= {k: draw(st.sampled_from([None, -1])) for k in LABELS} | dict.fromkeys(FLAGS)
    if kind == 'dialogue': row['prompt'] = draw(st.sampled_from([h := 'Human: a\n\nAssistant: b', 'Human:', h + '\n\nHuman: ']))
    if kind == 'not-a-row': return kind, json.dumps(draw(values.filter(lambda v: not isinstance(v, dict)))).encode()
    if kind == 'nested': return kind, b'[' * draw(st.integers(5_000, 90_000))
    line = json.dumps(row, ensure_ascii=draw(st.booleans()) or kind == 'surrogate').encode(errors='surrogatepass')
    if kind == 'cut': line = line[:draw(st.integers(1, len(line) - 1))]
    if kind == 'encoding':
        line = json.dumps(row | {field: 'HERE'}).encode().replace(b'HERE', b'a' + bytes([draw(st.integers(0x80, 0xff))]) + b'b')
    return kind, line


def fuzz(n): # rows of the table
    "Each malformed row stands in a file between two good ones, first, in the middle or last; what is left must be the good ones."
    tried, wrong = Counter(), {}
    folder = Path(tempfile.mkdtemp())
    heard = []
    handler = logging.Handler(); handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger('saferlhf'); logger.addHandler(handler); propagate, logger.propagate = logger.propagate, False

    @settings(max_examples=n, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(malformed(), st.integers(0, 2))
    def try_one(bad, place):
        kind, line = bad
        lines = [json.dumps(r).encode() for r in GOOD]; lines.insert(place, line)
        (folder/'rows.jsonl').write_bytes(b'\n'.join(lines)); heard.clear(); tried[kind] += 1
        try:
            table = load_preferences(folder/'rows.jsonl')
            left = [{k: r[k] for k in GOOD[0]} for r in table]
            if left != GOOD: wrong.setdefault(kind, f'FAILED: {len(left)} rows left of {line[:80]!r}')
            elif not heard: wrong.setdefault(kind, f'FAILED: not reported: {line[:80]!r}')
            elif len(reward_pairs(table)) != 2 or len(cost_pairs(table)) != 2: wrong.setdefault(kind, 'FAILED: pairs')
        except Exception as e: wrong.setdefault(kind, f'FAILED: {e!r} on {line[:80]!r}')
    try: try_one()
    finally: logger.removeHandler(handler); logger.propagate = propagate
    good = 'every row reported and dropped'
    return [('malformed row', 'data', 'datasets', 0, kind, k, wrong.get(kind, good), 0, '') for kind, k in sorted(tried.items())]


if __name__ == '__main__':
    for row in fuzz(500): print(*row)
