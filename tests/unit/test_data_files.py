"What people bring as files: read as it is meant, or refused with one line that says what to do."
import json
import os
import logging
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from saferlhf.data import load_labels, load_preferences, load_prompts, load_sft, read_rows

Q, GOOD, BAD = 'Name a bird.', 'A swallow.', 'No.'
PAIRS = [dict(prompt=f'{Q} {i}', chosen=f'{GOOD} {i}', rejected=f'{BAD} {i}') for i in range(3)]
NATIVE = dict(prompt=Q, response_0=GOOD, response_1=BAD, better_response_id=0, safer_response_id=0)
TALK = [dict(role='user', content=Q), dict(role='assistant', content=GOOD)]
POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:' + b'0' * 64 + b'\nsize 12345\n'


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch): monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path/'cache')


def refused(call, said, kind=ValueError):
    with pytest.raises(kind, match=said) as e: call()
    assert '\n' not in str(e.value) and len(str(e.value)) < 500, str(e.value)
    return str(e.value)


def put(folder, **files): # name, '__' for a slash -> rows, bytes or text
    for name, what in files.items():
        path = folder/name.replace('__', '/').replace('_json', '.json').replace('_csv', '.csv').replace('_parquet', '.parquet')
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(what, list) and path.suffix == '.parquet': Dataset.from_list(what).to_parquet(str(path))
        elif isinstance(what, list): path.write_text('\n'.join(map(json.dumps, what)), encoding='utf-8')
        else: path.write_bytes(what if isinstance(what, bytes) else what.encode())
    return folder


def rows(*names): return [dict(prompt=name) for name in names]


# --- a table in JSON

FRAME = pd.DataFrame(PAIRS)
TABLES = {orient: FRAME.to_json(orient=orient) for orient in ('columns', 'index', 'split', 'table', 'records')} | {
    'list': json.dumps(FRAME.to_dict('list')), 'tight': json.dumps(FRAME.to_dict('tight')), 'pretty': FRAME.to_json(indent=2),
    'other index': FRAME.set_index(pd.Index([7, 3, 5])).to_json(), 'lines': FRAME.to_json(orient='records', lines=True)}


@pytest.mark.parametrize('orient', TABLES)
@pytest.mark.parametrize('name', ['a.json', 'a.jsonl'])
def test_a_table_as_pandas_writes_it(tmp_path, orient, name):
    (tmp_path/name).write_text(TABLES[orient], encoding='utf-8')
    assert read_rows(tmp_path/name) == PAIRS and len(load_preferences(tmp_path/name, 'raise', chosen_is='better')) == 3


def test_one_row_in_one_file_stays_a_row(tmp_path):
    one = [dict(messages=TALK), dict(messages=TALK, tools=[]), dict(prompt=Q, response=GOOD), dict(prompt=TALK[:1], completion=TALK[1:]),
           dict(conversations=[{'from': 'human', 'value': Q}, {'from': 'gpt', 'value': GOOD}])]
    for row in one:
        for indent in (None, 1):
            (tmp_path/'a.json').write_text(json.dumps(row, indent=indent))
            assert columns(load_sft(tmp_path/'a.json', 'raise'), 'prompt', 'response') == [(Q, GOOD)]
    (tmp_path/'a.json').write_text(json.dumps(dict(prompt=TALK[0], chosen=TALK[1], rejected=dict(role='assistant', content=BAD))))
    assert len(load_preferences(tmp_path/'a.json', 'raise', chosen_is='better')) == 1


AMBIGUOUS = {
    'values': (FRAME.to_json(orient='values'), "orient='values'"), 'turns': ({'prompt': ['a', 'b', 'c']}, 'one row'),
    'named index': ({'prompt': {'x': 'a', 'y': 'b'}, 'chosen': {'x': 'c', 'y': 'd'}}, "orient='columns' or 'index'"),
    'lengths': ({'prompt': ['a', 'b'], 'response': ['c']}, "orient='list'"),
    'messages': ({'prompt': ['a'], 'chosen': TALK[1:]}, "orient='list'"),
    'rows under a key': ({'train': PAIRS, 'test': PAIRS}, r"stand under \['train', 'test'\]"),
    'two columns': ({'columns': ['prompt', 'prompt'], 'data': [['a', 'b']]}, "two columns are named 'prompt'"),
    'short': ({'columns': ['prompt', 'chosen'], 'data': [['a']]}, 'is damaged')}


@pytest.mark.parametrize('what', AMBIGUOUS)
def test_what_may_be_a_table_or_a_row_is_refused(tmp_path, what):
    found, said = AMBIGUOUS[what]
    (tmp_path/'a.json').write_text(found if isinstance(found, str) else json.dumps(found))
    assert 'a.json' in refused(lambda: load_prompts(tmp_path/'a.json'), said)


def test_columns_in_memory():
    for source in (FRAME.to_dict('list'), FRAME.to_dict(), {k: np.array(v) for k, v in FRAME.to_dict('list').items()}):
        assert read_rows(source) == PAIRS
    refused(lambda: load_sft(dict(prompt=Q, response=GOOD)), 'a single row goes into a list')
    refused(lambda: read_rows(dict(test=FRAME)), r"no split 'train': pass split= of \['test'\]")


def columns(table, *names): return [tuple(row[name] for name in names) for row in table]


# --- folders

SIBLINGS = {
    'sub-folders': dict(helpful__train_jsonl=rows('a'), harmless__train_jsonl=rows('b')),
    'sizes': {'30k_train_jsonl': rows('a'), '330k_train_jsonl': rows('b')},
    'stages': dict(train_jsonl=rows('a'), train_sft_jsonl=rows('b')),
    'formats': dict(x_jsonl=rows('a'), x_parquet=rows('a')), 'copies': dict(train_jsonl=rows('a'), copy__train_csv='prompt\na\n'),
    'shards in two formats': {'train-00000-of-00001_jsonl': rows('a'), 'train-00000-of-00001_parquet': rows('a')},
    'numbered': {'train_jsonl': rows('a'), 'train-00000_jsonl': rows('b')},
    'a log': dict(pairs_jsonl=rows('a'), trainer_log_jsonl=rows('b')),
    'a log of training': {'pairs_jsonl': rows('a'), 'training-log_jsonl': rows('b')}}


@pytest.mark.parametrize('what', SIBLINGS)
def test_siblings_are_not_added_up(tmp_path, what):
    put(tmp_path, **SIBLINGS[what])
    said = refused(lambda: load_prompts(tmp_path), 'may be versions or copies .* pass one file or sub-folder of')
    for f in (p for p in tmp_path.rglob('*') if p.is_file()):
        assert str(f.relative_to(tmp_path)) in said and len(load_prompts(f)) == 1


def test_what_is_read_of_a_folder_is_said(tmp_path, caplog):
    def read(name, split='train', **files): caplog.clear(); return load_prompts(put(tmp_path/name, **files), split=split)['prompt']
    shards = {f'train-0000{i}-of-00002_jsonl': rows(f'a{i}') for i in range(2)} | {'train_sft-00000-of-00001_jsonl': rows('s')}
    assert read('shards', **shards) == ['a0', 'a1']
    assert 'read 1 rows of train-00000-of-00002.jsonl, 1 rows of train-00001-of-00002.jsonl' in caplog.text
    assert read('shards', 'train_sft') == ['s'] and read('stage', 'train_sft', train_jsonl=rows('a'), train_sft_jsonl=rows('b')) == ['b']
    junk = dict(README_json='{}', dataset_infos_json='{"default": {"splits": {}}}', log_jsonl=[dict(loss=1.)])
    assert read('junk', data__train_jsonl=rows('a'), **junk) == ['a']
    assert 'read 1 rows of data/train.jsonl; not read: log.jsonl' in caplog.text and 'README' not in caplog.text
    (tmp_path/'shards/train-00001-of-00002.jsonl').unlink()
    refused(lambda: load_prompts(tmp_path/'shards'), '1 of 2 shards of train')


CONFIG = '---\nlicense: mit\nconfigs:\n{}---\n# A data set\n'
def config(name, *files, default=False): # (split, pattern)
    listed = ''.join(f'  - split: {split}\n    path: "{pattern}"\n' for split, pattern in files)
    return f'- config_name: {name}\n' + '  default: true\n' * default + f'  data_files:\n{listed}'


@pytest.mark.parametrize('others', ['', config('b', ('train', 'b/*')), config('b', ('train', 'b/*')) + config('c', ('train', 'c/*'))])
def test_a_readme_names_the_files(tmp_path, caplog, others):
    put(tmp_path, a__one_jsonl=rows('1'), a__two_jsonl=rows('2'), b__train_jsonl=rows('b'), held_jsonl=rows('t'))
    own = config('a' if others else 'x', ('train', 'a/*.jsonl'), ('test', 'held.jsonl'), default=bool(others))
    (tmp_path/'README.md').write_text(CONFIG.format(others + own))
    assert load_prompts(tmp_path)['prompt'] == ['1', '2'] and 'read 1 rows of a/one.jsonl, 1 rows of a/two.jsonl' in caplog.text
    assert load_prompts(tmp_path, split='test')['prompt'] == ['t']
    assert "['train', 'test']" in refused(lambda: load_prompts(tmp_path, split='dev'), "no 'dev' in")
    assert load_prompts(tmp_path/'b')['prompt'] == ['b']


README = {'several': (config('a', ('train', 'a/*')) + config('b', ('train', 'b/*')), r"\['a', 'b'\] and no default: pass one file"),
          'no file': (config('a', ('train', 'none/*')), 'README.md'), 'away': (config('a', ('train', '../*.jsonl')), 'outside this folder'),
          'a url': (config('a', ('train', 'https://example.org/x.jsonl')), 'outside this folder'), 'no name': ('- a: 1\n', 'config_name'),
          'no YAML': ('- [\n', 'README.md'), 'formats': (config('a', ('train', 'a/*')), 'versions or copies')}


@pytest.mark.parametrize('what', README)
def test_a_readme_that_does_not_decide_is_refused(tmp_path, what):
    put(tmp_path/'d', a__x_jsonl=rows('a'), a__x_parquet=rows('a'), b__x_jsonl=rows('b'))
    put(tmp_path, outside_jsonl=rows('o'))
    (tmp_path/'d/README.md').write_text(CONFIG.format(README[what][0]))
    refused(lambda: load_prompts(tmp_path/'d'), README[what][1])


def test_a_readme_without_files_decides_nothing(tmp_path):
    put(tmp_path, data__train_jsonl=rows('a'))
    (tmp_path/'README.md').write_text('---\n[\n---\nconfigs are elsewhere')
    assert load_prompts(tmp_path)['prompt'] == ['a']
    (tmp_path/'README.md').write_text('---\nconfigs:\n- config_name: x\n  data_dir: data\n---\n')
    assert load_prompts(tmp_path)['prompt'] == ['a']


def test_what_datasets_saved(tmp_path):
    table = Dataset.from_list(PAIRS)
    table.save_to_disk(tmp_path/'one'); DatasetDict(train=table, test=table.select([2])).save_to_disk(tmp_path/'two')
    assert read_rows(tmp_path/'one') == read_rows(tmp_path/'two') == PAIRS and read_rows(tmp_path/'two', 'test') == PAIRS[2:]
    refused(lambda: read_rows(tmp_path/'two', 'dev'), r"no split 'dev': pass split= of \['train', 'test'\]")
    for bad, said in ((b'', 'is damaged'), (POINTER, 'run git lfs pull')):
        next((tmp_path/'one').glob('*.arrow')).write_bytes(bad); refused(lambda: read_rows(tmp_path/'one'), said)


# --- files and frames

def test_git_lfs_pointers(tmp_path):
    for name in ('a.jsonl', 'a.json', 'a.csv', 'a.parquet', 'a.jsonl.gz', 'a.csv.xz'):
        (tmp_path/name).write_bytes(POINTER)
        refused(lambda name=name: load_prompts(tmp_path/name), f'{name} is a git-lfs pointer: run git lfs pull')


def test_csv(tmp_path, caplog):
    import csv
    before = csv.field_size_limit()
    (tmp_path/'a.csv').write_text(f'prompt,response\nq,a\nr,{"x" * 200_000}\n')
    assert len(read_rows(tmp_path/'a.csv')) == 2 and csv.field_size_limit() == before
    assert len(load_sft(tmp_path/'a.csv')) == 1 and 'over-long text' in caplog.text
    (tmp_path/'a.csv').write_text('prompt,response\nq,"a\nr,b\ns,c\n')                     # would swallow what follows
    refused(lambda: load_sft(tmp_path/'a.csv'), 'is damaged: unexpected end')
    (tmp_path/'a.csv').write_text(',prompt,response,\n0,q,a,\n')
    assert len(load_sft(tmp_path/'a.csv', 'raise')) == 1


def test_two_columns_of_one_name(tmp_path):
    frame = pd.DataFrame([['q', 'a', 'b']], columns=['prompt', 'response', 'response'])
    frame.to_csv(tmp_path/'a.csv', index=False)
    pq.write_table(pa.table([['q'], ['a'], ['b']], names=[*frame.columns]), tmp_path/'a.parquet')
    for source in (frame, tmp_path/'a.csv', tmp_path/'a.parquet'):
        refused(lambda source=source: load_sft(source), "two columns are named 'response': rename or drop one")


@pytest.mark.parametrize('load', [load_preferences, load_labels, load_sft, load_prompts])
def test_what_is_no_source(tmp_path, load):
    for bad in (3, None, 2.5, b'rows.jsonl', object): refused(lambda bad=bad: load(bad), 'pass a file, a folder', TypeError)
    for bad in ('', '  '): refused(lambda bad=bad: load(bad), 'empty text')
    os.mkfifo(tmp_path/'pipe.jsonl')                                    # `--data <(zcat rows.gz)`: it would wait for ever
    refused(lambda: load(tmp_path/'pipe.jsonl'), 'pipe.jsonl is no ordinary file: write its rows to one')
    missing = ('none', 'none.jsonl', 'a/none.jsonl', './none', '/none', '~/none/x', 'a/b/c', tmp_path/'none', Path('none'), 'a b/c')
    for bad in missing: refused(lambda bad=bad: load(bad), 'there is no .*pass a file, a folder', FileNotFoundError)


def test_a_subfolder_or_a_name_of_the_hub_that_is_not_there(tmp_path, monkeypatch):
    refused(lambda: read_rows(put(tmp_path, train_jsonl=rows('a')), data_dir='none'), 'there is no .*none', FileNotFoundError)
    for error, kind in ((ValueError, ValueError), (ConnectionError, FileNotFoundError), (RuntimeError, FileNotFoundError)):
        def fails(name, error=error, **_): raise error('Config name is missing.\nPlease pick one')
        monkeypatch.setattr('saferlhf.hardware.rows.load_dataset', fails)
        refused(lambda: load_prompts('owner/name'), 'owner/name is no file or folder here.*Please pick one', kind)


# --- the prompt is whole

def system(text, *turns): return json.dumps([dict(role='system', content=text), *turns])


def test_a_system_text_stands_in_one_of_two_columns():
    history = [dict(instruction='and?', input='a fish', history=[['q', 'a']], output='b')]
    sharegpt = [dict(conversations=[{'from': 'human', 'value': Q}, {'from': 'gpt', 'value': GOOD}])]
    for column in ('system', 'system_prompt'):
        for row in (*sharegpt, dict(prompt=Q, response=GOOD), dict(instruction=Q, output=GOOD), dict(messages=TALK)):
            assert load_sft([row | {column: 'Be brief.'}], 'raise')['prompt'] == [system('Be brief.', TALK[0])]
        assert json.loads(load_sft([history[0] | {column: 'Be brief.'}])['prompt'][0]) == [
            dict(role=r, content=c) for r, c in (('system', 'Be brief.'), ('user', 'q'), ('assistant', 'a'), ('user', 'and?\n\na fish'))]
        pair = load_preferences([PAIRS[0] | {column: 'Be brief.'}], chosen_is='better')
        assert json.loads(pair['prompt'][0])[0]['content'] == 'Be brief.'
        own = dict(messages=[dict(role='system', content='Be brief.'), *TALK])
        assert load_sft([own | {column: 'Be brief.'}])['prompt'] == [system('Be brief.', TALK[0])]
        refused(lambda own=own, column=column: load_sft([own | {column: 'Be long.'}], 'raise'), 'two system texts')
        refused(lambda column=column: load_sft([dict(prompt=Q, response=GOOD) | {column: 7}], 'raise'), 'wrong type')
    refused(lambda: load_sft([dict(prompt=Q, response=GOOD, system='a', system_prompt='b')], 'raise'), 'two system texts')


def test_history_belongs_to_a_prompt_of_any_name():
    turns = [dict(role='user', content='q'), dict(role='assistant', content='a'), dict(role='user', content=Q)]
    for past in ([['q', 'a']], '[["q", "a"]]', (('q', 'a'),)):
        for row in (dict(prompt=Q, response=GOOD), dict(instruction=Q, input='', output=GOOD)):
            assert json.loads(load_sft([row | dict(history=past)], 'raise')['prompt'][0]) == turns
    for past in ('once', [['q']], ['q', 'a'], 3):
        refused(lambda past=past: load_sft([dict(prompt=Q, response=GOOD, history=past)], 'raise'), 'unreadable history')
    assert load_sft([dict(instruction=Q, output=GOOD, input='b', context='c')])['prompt'] == [f'{Q}\n\nb\n\nc']


@pytest.mark.parametrize('column', ['system_message', 'systemPrompt', 'sys', 'prompt_system', 'persona', 'context', 'input', 'instruction'])
def test_a_column_that_reads_like_a_prompt_and_is_not_used_is_said(column, caplog):
    plain = [dict(prompt=f'{Q} {i}', response=GOOD) for i in range(3)]
    assert len(load_sft([plain[0], plain[1] | {column: 'Be brief.'}, plain[2] | {column: 'Be brief.'}])) == 3
    assert f"column '{column}' is not used, though it reads like part of a prompt (2 rows)" in caplog.text
    caplog.clear(); load_preferences([PAIRS[0] | dict(messages=[dict(role='system', content='Be brief.'), *TALK])], chosen_is='better')
    assert 'the system text of the messages is not used (1 rows)' in caplog.text
    caplog.clear(); load_sft([plain[0] | {column: None, 'source': 's', 'ecosystem': 'x'}]); assert not caplog.text


def test_answers_that_repeat_the_prompt(caplog):
    texts = [dict(prompt=f'{Q} {i} ', chosen=f'{Q} {i} {GOOD}', rejected=f'{Q} {i}\n{BAD}') for i in range(2)]
    t = load_preferences(texts, 'raise', chosen_is='better')
    assert {r[f'response_{r["better_response_id"]}'] for r in t} == {GOOD} and caplog.text.count('(2 rows)') == 1
    assert 'the prompt is cut from the beginning of both answers (2 rows)' in caplog.text
    kept = (dict(prompt=Q, chosen=f'{Q} {GOOD}', rejected=BAD), dict(prompt='The', chosen='There.', rejected='Then.'),
            dict(prompt='Hello', chosen='Hello', rejected='Hello you'))
    for row in kept:
        caplog.clear(); r = load_preferences([row], chosen_is='better')[0]
        assert {r['response_0'], r['response_1']} == {row['chosen'], row['rejected']} and 'is cut' not in caplog.text


def test_chosen_is_where_nothing_is_chosen(caplog):
    for value in ('safer', 'better'): refused(lambda value=value: load_preferences([NATIVE], chosen_is=value), 'does nothing.*leave it out')
    with caplog.at_level(logging.WARNING): assert len(load_preferences([NATIVE, PAIRS[0]], chosen_is='better')) == 2
    assert "chosen is taken to mean 'better'" in caplog.text
