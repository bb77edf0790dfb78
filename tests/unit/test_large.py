"Rows by the million are not held: memory for each row, what is shown meanwhile, and the same rows in memory and on the disk."
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features
from faults.large import preferences
from saferlhf.apps.own_data import answer_rows, as_lines, cost_rows, lines_hash, reward_rows, texts, write_lines
from saferlhf.data import SCHEMA, load_preferences, reward_pairs, validate
from saferlhf.hardware import ranks, table
from saferlhf.hardware.rows import _json_rows, iter_rows, read_rows
from saferlhf.hardware.table import Spool, as_table, rows_of

COST = '''import os, sys, threading, time
from saferlhf.apps.own_data import cost_rows, reward_rows
from saferlhf.data import load_preferences
from saferlhf.hardware import ranks, table
table._IN_MEMORY, ranks._PATIENCE = 1 << 20, 0
own = lambda: int(next(x for x in open('/proc/self/status') if x.startswith('RssAnon')).split()[1])
seen, call = [], dict(load=load_preferences, reward=lambda p: reward_rows(p, 0, .1), cost=lambda p: cost_rows(p, 0, .1))[sys.argv[1]]
def watch():
    while True: seen.append(own()); time.sleep(.01)
threading.Thread(target=watch, daemon=True).start()
for _ in range(4): kept = call(sys.argv[2])  # a short call may hide its peak from the watch
first = max(seen); seen.clear()
kept = call(sys.argv[3])
print(1024 * (max(seen) - first))'''


def file(folder, n, rows=None):
    path = folder/f'{n}.jsonl'
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows or preferences(n)), encoding='utf-8')
    return path


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='memory is read there')
@pytest.mark.parametrize('call', ['load', 'reward', 'cost'])
def test_memory_does_not_grow_with_the_rows(tmp_path, call):
    "A row has about 1,100 bytes, and took 8,000 as a list of dicts. What stays is where it lies and in which order: under 200."
    few, many = file(tmp_path, 2000), file(tmp_path, 32_000)
    done = subprocess.run([sys.executable, '-c', COST, call, few, many], capture_output=True, text=True, timeout=600,
                          env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) / 30_000 < 600, 'bytes a row'                                       # with what the allocators keep
    assert '32000.jsonl: 100%' in done.stderr, 'no progress is shown'
    if call != 'load': assert '32000.jsonl: splitting by prompt' in done.stderr


def test_nothing_is_shown_of_few_rows(tmp_path, capsys):
    load_preferences(file(tmp_path, 50)); assert capsys.readouterr().err == ''


LABELS = [dict(prompt=f'Question {k}?', response=f'Answer {k}', is_safe=k % 3 > 0) for k in range(99)]
def mixed(n=300): return [r | dict(safer_response_id=-1) if k % 4 == 0 else r for k, r in enumerate(preferences(n))]


def test_rows_on_the_disk_are_those_in_memory(tmp_path, monkeypatch):
    "Tables, reports, pairs, their order and the bytes that a run keeps."
    def everything(): return [
        load_preferences(path).to_list(), *((c.train, c.test, c.said, c.zero, as_lines(c.train)) for c in (
            reward_rows(path, 3, .2), cost_rows(path, 3, .2), cost_rows(path, 3, .2, labels='sign'), cost_rows(LABELS, 0, .3),
            cost_rows(path, 3, .2, most=20), answer_rows([dict(prompt=r['prompt'], response='Yes.') for r in mixed()], 1, .2)))]
    path = file(tmp_path, 300, [*mixed(), dict(prompt='', response_0='a', response_1='b'), 'stray'])
    before = everything()
    monkeypatch.setattr(table, '_IN_MEMORY', 1000)
    assert everything() == before


def test_a_table_on_the_disk_is_a_table(tmp_path, monkeypatch):
    rows, features = load_preferences(mixed()).to_list(), Features(SCHEMA['preference'])
    monkeypatch.setattr(table, '_IN_MEMORY', 1000)
    large = as_table(iter(rows), features)
    assert len(table._MAPPED) and large.to_list() == rows == Dataset.from_list(rows, features).to_list() == [*rows_of(large)]
    assert large.select([5, 2])['prompt'][:] == [rows[5]['prompt'], rows[2]['prompt']] and large.filter(lambda r: False).num_rows == 0
    large.save_to_disk(tmp_path/'kept'); assert read_rows(tmp_path/'kept') == rows
    assert validate(large)[0] == rows and reward_pairs(large) == reward_pairs(rows)


def test_a_full_temporary_folder_says_what_to_do(monkeypatch):
    class Full(io.BytesIO):
        def write(self, data): raise OSError(28, 'No space left on device')
        def writelines(self, lines): self.write(b'')
    monkeypatch.setattr(table.tempfile, 'SpooledTemporaryFile', lambda size: Full())
    for call in (lambda: load_preferences(mixed()), lambda: Spool(LABELS)):
        with pytest.raises(OSError, match='no room for the rows in the temporary folder .* set TMPDIR to another one'): call()


def test_a_list_on_the_disk_is_a_list(tmp_path):
    spool = Spool(LABELS); part = spool.pick(np.array([5, 3, 3]))
    assert spool == LABELS and [*part] == [LABELS[5], LABELS[3], LABELS[3]] and part[-1] == LABELS[3] and len(spool[90:]) == 9
    assert spool[:2] + spool[97:] == LABELS[:2] + LABELS[97:] and not Spool() and spool != LABELS[1:]
    with pytest.raises(IndexError): spool[99]
    for rows in (spool, LABELS): write_lines(tmp_path/'a.jsonl', rows); assert Spool.of(tmp_path/'a.jsonl') == LABELS
    assert lines_hash(spool) == lines_hash(LABELS) == table.sha256(tmp_path/'a.jsonl') and texts(spool, 3) == texts(LABELS)[:3]


def test_a_list_in_json_is_read_in_pieces(monkeypatch):
    "Elements that end anywhere in what was read: as Python's own reader has them, or line by line where it refuses."
    import saferlhf.hardware.rows as module
    read = lambda text: [*_json_rows(io.StringIO(text))]
    good = ['[]', ' [ ] ', json.dumps(LABELS), json.dumps(LABELS, indent=2), '[1, 20, {"a": [1, "]"]}]',
            '[{"a": "\\u00e9\\n,"} ,\n {"b": -1.5e3}\n]\n\n']
    for size in (1, 2, 7, 100, 10**6):
        monkeypatch.setattr(module, '_READ', size)
        for text in good: assert read(text) == json.loads(text), (size, text[:50])
        for text in ('[1, 2', '[1 2]', '[1,]', '[1]]', '[1] 2', '[1, 2]\n[3]', '[', '["a'):
            assert len(read(text)) == len(text.split('\n')), (size, text)


def test_any_source_comes_row_by_row(tmp_path):
    path = file(tmp_path, 40)
    rows = iter_rows(path)
    assert next(rows) == read_rows(path)[0] and len([*rows]) == 39
    assert [*iter_rows(Dataset.from_list(LABELS))] == LABELS == [*iter_rows(iter(LABELS))]
    assert ranks.shown(LABELS, 'x').disable is False
