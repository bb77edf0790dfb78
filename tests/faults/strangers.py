"Folders of models and texts that strangers wrote: what was read, run or asked for. Rows for data/results/reliability."
import csv
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
from pathlib import Path

INDEX = 'model.safetensors.index.json'
OPENED = []


class Ran: # what a pickle does when it is read
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


def change(path, **values): path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def shard(folder, name):
    from safetensors import safe_open
    (folder/'model.safetensors').rename(folder/'shard.safetensors')
    with safe_open(folder/'shard.safetensors', 'pt') as f: change(folder/INDEX, metadata={}, weight_map=dict.fromkeys(f.keys(), name))


def link(path):
    (outside := path.parent.parent/f'outside-{path.name}').write_bytes(path.read_bytes()); path.unlink(); path.symlink_to(outside)


FOLDERS = { # what was done to a whole model and an adapter on it -> which of the two, function of the folder
    **{f'the index names {x}': ('model', lambda m, x=x: shard(m, x.format(m.parent))) for x in (
        'shard.bin', '../outside.safetensors', '{}/outside.safetensors', '..', 'gone.safetensors')},
    'the index is a list': ('model', lambda m: (shard(m, 'x'), (m/INDEX).write_text('[]'))),
    'the index is cut off': ('model', lambda m: (shard(m, 'x'), (m/INDEX).write_text('{"weight_map": {"a'))),
    'only pytorch_model.bin': ('model', lambda m: (m/'model.safetensors').unlink()),
    'config.json names adapter_model.bin': ('model', lambda m: change(m/'config.json', transformers_weights='adapter_model.bin')),
    'config.json names code': ('model', lambda m: change(m/'config.json', attn_implementation='somebody/attention')),
    **{f'{x} is a link out': ('model', lambda m, x=x: link(m/x)) for x in ('model.safetensors', 'config.json', 'tokenizer.json')},
    'tokenizer_config.json names a file outside': ('model', lambda m: change(m/'tokenizer_config.json', vocab_file='../vocab.json')),
    'tokenizer.json is a pipe': ('model', lambda m: ((m/'tokenizer.json').unlink(), os.mkfifo(m/'tokenizer.json'))),
    'only adapter_model.bin': ('adapter', lambda m: (m/'adapter_model.safetensors').unlink()),
    'adapter_model.safetensors is a link out': ('adapter', lambda m: link(m/'adapter_model.safetensors')),
    'the adapter names itself as its base': ('adapter', lambda m: (change(m/'adapter_config.json', base_model_name_or_path=str(m)),
                                                                   shutil.copy(m.parent/'model/config.json', m))),
    "the base's index names a pickle": ('adapter', lambda m: shard(m.parent/'model', 'shard.bin'))}
ADAPTED = 'load_lm', 'score', 'located'                     # who reads an adapter; and who has to see some faults
READ = {'only pytorch_model.bin': ('load_lm', 'score', 'hash'), "the base's index names a pickle": ('load_lm', 'score')}
PICKLES = 'pytorch_model.bin', 'adapter_model.bin', 'shard.bin'


def weights(table):
    "Each folder is refused in one line by each reader; no pickle runs, and Python opens neither one nor anything outside."
    import torch
    from saferlhf.apps.stages import located
    from saferlhf.hardware.adapters import Lora
    from saferlhf.models import ScoreModel, load_lm, load_tokenizer, tiny_model, train_tokenizer
    from saferlhf.record.fetch import model_hash
    sys.addaudithook(lambda event, a: OPENED.append(str(a[0])) if event == 'open' or event.startswith(('pickle', 'torch')) else None)
    def whole(home):
        t = train_tokenizer(['a b c'] * 9, 262); torch.manual_seed(0)
        tiny_model(vocab_size=len(t)).save_pretrained(home/'model'); t.save_pretrained(home/'model')
        load_lm(home/'model', lora=Lora(rank=2)).save_pretrained(home/'adapter')
        for folder in ('model', 'adapter'):
            for name in PICKLES: (home/folder/name).write_bytes(pickle.dumps(Ran(home/'ran')))
        shutil.copy(home/'model/model.safetensors', home/'outside.safetensors')
    readers = dict(load_lm=load_lm, score=ScoreModel.from_pretrained, tokenizer=load_tokenizer, hash=model_hash, located=located)
    for seed, (what, (which, harm)) in enumerate(FOLDERS.items()):
        with tempfile.TemporaryDirectory() as d:
            whole(home := Path(d)); harm(home/which); refused, why = [], []
            asked = [k for k in readers if k in (READ.get(what) or ADAPTED if which == 'adapter' else READ.get(what, readers))]
            for name in asked:
                OPENED.clear()
                try: readers[name](home/which)
                except (ValueError, FileNotFoundError) as e: refused.append(name); why += [str(e)] * (len(str(e).splitlines()) > 1)
                bad = [p for p in OPENED if Path(p).name in (*PICKLES, 'vocab.json') or 'outside' in Path(p).name]
                if bad: why.append(f'{name} opened {bad[0]}')
            if (home/'ran').exists(): why.append('a pickle ran')
            good = refused == asked and not why
            outcome = 'refused in one line, nothing opened' if good else f'FAILED: refused by {refused} of {asked}, {why}'
            table.add(what, 'data', which, seed, 'before reading', len(asked), outcome, 0, '')


def formula(cell): return bool(re.match(r'[\s"]*[=+\-@\t\r]', cell)) and not re.fullmatch(r'[+-]?[\d.]+(e[+-]?\d+)?|[+-]inf', cell)


def pages(table):
    "Pages, cards and tables of the texts of tests/hostile.py, in a browser where there is one, and read as a spreadsheet would."
    from hostile import Server, nasty
    before = {k: os.environ.get(k) for k in ('SAFERLHF_HOME', 'SAFERLHF_RUNS')}
    with tempfile.TemporaryDirectory() as d, Server() as server:
        os.environ.update(SAFERLHF_HOME=d, SAFERLHF_RUNS=f'{d}/runs'); (Path(d)/'data/results/cpu').mkdir(parents=True)
        in_a_browser(table, Path(d), nasty(server.url), server)
        in_a_spreadsheet(table, Path(d), nasty(server.url)); joined(table, Path(d)/'data/results')
    for k, v in before.items(): os.environ.pop(k, None) if v is None else os.environ.update({k: v})


def in_a_browser(table, home, texts, server):
    from hostile import Live, browser, card, page, rendered, shown
    document = lambda body, head='': f'<!doctype html><html><head>{head}</head><body>{body}</body></html>'
    policy = re.compile('<meta http-equiv[^>]*>'); whole = page(home, texts)
    alone = ''.join(f'<div>{rendered(x)}</div>' for x in texts if 'refresh' not in x and '<base' not in x)
    made = {'report': whole, 'report without its policy': policy.sub('', whole), 'card': document(rendered(card(home, texts)[1])),
            'tables and samples of notebooks': document(''.join(map(rendered, shown(texts)))),
            'not escaped, under the policy': document(alone, policy.search(whole)[0]), 'not escaped': document(alone)}
    for seed, (what, body) in enumerate(made.items()):
        found = [] if what.startswith('not escaped') else Live(body.split('</head>')[-1]).found
        asked = server.seen(body) if browser() else None
        said = f'{len(asked)} requests' if asked else 'nothing ran, nothing was asked for'
        if asked is None: said = 'no browser: read by a parser'
        if what == 'not escaped': outcome = f'live, as it should be: {said}' if asked or asked is None else 'FAILED: nothing is live'
        else: outcome = f'FAILED: {said}, {found}' if asked or found else said
        table.add(f'texts of strangers: {what}', 'data', 'browser' if browser() else 'parser', seed, '', len(texts), outcome, 0, '')


def in_a_spreadsheet(table, home, texts):
    import pandas as pd

    from saferlhf.record.escape import csv_text, printable, read_csv
    from saferlhf.record.execute import publish
    from saferlhf.reproduction.results import join
    rows = [dict(seed=0, policy=f'p{k}', prompt=x, response=x, harmful=True, mild=True) for k, x in enumerate(texts)]
    path = publish(rows, 'again/samples.csv', 'evaluate/a', ['policy']); first = path.read_bytes()
    with open(path, encoding='utf-8', newline='') as f: left = [c for r in csv.reader(f) for c in r if formula(c)]
    publish(rows, 'again/samples.csv', 'evaluate/a', ['policy']); join(path.parent, 'cpu')
    same = first == path.read_bytes() == (home/'data/results/cpu/samples.csv').read_bytes()
    outcome = 'no formula, the same bytes' if same and not left else f'FAILED: same {same}, formulas {left}'
    table.add('texts of strangers: published twice, joined', 'data', 'table', 0, '', len(texts), outcome, 0, '')
    t = pd.DataFrame({'name': texts, '=1+1': texts}); (home/'t.csv').write_text(csv_text(t), encoding='utf-8', newline='')
    outcome = 'exactly the same' if read_csv(home/'t.csv', keep_default_na=False).to_dict() == t.to_dict() else 'FAILED: differs'
    table.add('texts of strangers: written, read back', 'data', 'table', 1, '', len(texts), outcome, 0, '')
    steers = [x for x in texts if re.search(r'[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]', printable(x))]
    outcome = f'FAILED: {steers}' if steers else 'no control characters'
    table.add('texts of strangers: printed', 'data', 'terminal', 2, '', len(texts), outcome, 0, '')


def joined(table, results):
    "Cells of another machine that do not belong where they are."
    from saferlhf.reproduction.results import join
    path, target = results/'again/samples.csv', results/'cpu/samples.csv'; before = target.read_bytes()
    cells = [('policy', '=1+1'), ('harmful', 'maybe'), ('seed', '-1'), ('run_id', 'x'), ('prompt', '@a'), ('mild', '<b>')]
    for seed, (column, cell) in enumerate(cells):
        row = dict(policy='a', prompt='b', response='c', harmful='True', mild='True', seed='0', run_id='evaluate/a') | {column: cell}
        path.write_text(','.join(row) + '\n' + ','.join(row.values()) + '\n')
        try: join(path.parent, 'cpu'); told = 'joined'
        except ValueError as e: told = str(e)
        good = f'{path}, line 2, column {column}' in told and target.read_bytes() == before
        outcome = 'refused; file, line and column named' if good else f'FAILED: {told}'
        table.add(f'join: {column} is {cell}', 'data', 'table', seed, '', 1, outcome, 0, '')
