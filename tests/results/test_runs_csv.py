"Every run that a committed result names has a row in data/results/runs.csv, which says what is known."
import importlib.util
import json
import shutil

import pandas as pd
import pytest
from project import ROOT

spec = importlib.util.spec_from_file_location('runs_csv', ROOT/'tools/runs.py')
runs = importlib.util.module_from_spec(spec); spec.loader.exec_module(runs)
TABLE = runs.read(ROOT/'data/results/runs.csv')
A, B = 'sft/cpu-000000000001', 'policy/cpu-1-000000000002'


def test_every_committed_run_has_a_row_that_says_what_is_known():
    assert runs.problems(TABLE) == []
    assert list(TABLE) == runs.COLUMNS and len(TABLE) >= 170


def test_ids_are_found_wherever_results_name_them():
    named = runs.named()
    assert len({i.split('/')[0] for i in named}) > 12
    for path in ('data/results/gpu/probes.csv', 'data/results/bench/scale.csv', 'figures/index.json',
                 'data/results/reliability/kill.csv', 'data/results/gpu/notebooks/policy-1.ipynb',
                 'figures/gpu/index.json', 'data/models/gold/README.md'):
        assert any(path in files for files in named.values()), path
    for path in ROOT.glob('data/results/**/*.csv'):
        ids = pd.read_csv(path, dtype=str, keep_default_na=False).get('run_id', pd.Series(dtype=str))
        assert set(' '.join(ids).split()) <= set(TABLE.run_id), path


@pytest.mark.parametrize('path, text', [
    ('data/results/cpu/made_up.csv', 'a,run_id\n1,sft/cpu-feedfeedfeed\n'),
    ('data/results/cpu/two.csv', f'a,run_id\n1,{A} sft/cpu-feedfeedfeed\n'),
    ('figures/index.json', '{"x": {"run_ids": ["sft/cpu-feedfeedfeed"]}}'),
    ('data/results/cpu/notebooks/x.ipynb',
     '{"cells": [{"source": "runs/sft/cpu-feedfeedfeed", "metadata": {}}]}')])
def test_an_unknown_run_is_found(tmp_path, path, text):
    (tmp_path/path).parent.mkdir(parents=True); (tmp_path/path).write_text(text)
    known = runs.merge(runs.read(tmp_path/'none.csv'), [A], {})
    wrong = runs.problems(known, tmp_path)
    assert wrong == [f'sft/cpu-feedfeedfeed, of {path}, has no row: run tools/runs.py']


def test_the_rows_themselves_are_checked(tmp_path):
    bad = runs.merge(runs.read(tmp_path/'none.csv'), [A, B], {})
    parents = f'sft={B} base=sft/cpu-feedfeedfeed'
    bad.loc[bad.run_id == A, ['commit', 'seed', 'parents', 'replaces']] = 'yesterday', '', parents, 'sft/gone'
    wanted = ('seed is empty', 'yesterday is no commit', 'parent sft/cpu-feedfeedfeed has no row',
              'it replaces sft/gone, which has no row')
    assert runs.problems(bad, tmp_path) == [f'{A}: {w}' for w in wanted]


def manifest(root, run_id, **facts):
    "A finished run."
    folder = root/'runs'/run_id; folder.mkdir(parents=True)
    (folder/'DONE').write_text('now')
    base = dict(stage=run_id.split('/')[0], seed=0, commit='c' * 40, dirty=False, device='cpu',
                versions=dict(python='3.12', torch='2.13', deepspeed=None),
                parent_folders={}, command=f"execute('x', dict(parents='{root}/runs/sft'))")
    (folder/'manifest.json').write_text(json.dumps(base | facts))


@pytest.mark.parametrize('relative', [True, False])
def test_rows_come_from_manifests_and_older_ones_stay(tmp_path, relative):
    manifest(tmp_path, A); manifest(tmp_path, B, parent_folders={'sft': A if relative else f'{tmp_path}/runs/{A}'}, dirty=True)
    results = tmp_path/'data/results'; results.mkdir(parents=True)
    (results/'t.csv').write_text(f'run_id,value\n{B},3\n')
    table = runs.update([tmp_path/'runs'], tmp_path).set_index('run_id')
    assert list(table.index) == [B, A], 'a parent that no result names gets a row too'
    assert table.parents.tolist() == [f'sft={A}', 'none']
    assert table.loc[B, 'commit'] == 'c' * 12 + ' with changes'
    said = table.loc[B, ['seed', 'device', 'versions']].tolist()
    assert said == ['0', 'cpu', 'python 3.12, torch 2.13']
    assert table.loc[A, 'command'] == "execute('x', dict(parents='runs/sft'))"
    assert table.loc[A, 'published'] == runs.NONE, 'no manifest knows it'
    before = (results/'runs.csv').read_bytes()
    assert str(tmp_path) not in before.decode()
    shutil.rmtree(tmp_path/'runs'); manifest(tmp_path, B, device='another'); (results/'t.csv').unlink()
    runs.update([tmp_path/'runs'], tmp_path)
    assert (results/'runs.csv').read_bytes() == before, 'rows and facts that are there stay'


def test_a_later_manifest_fills_what_was_not_recorded(tmp_path):
    results = tmp_path/'data/results'; results.mkdir(parents=True)
    (results/'t.csv').write_text(f'run_id,value\n{A},0\n')
    row = runs.update([], tmp_path).iloc[0]
    assert row.seed == row.commit == runs.NONE
    manifest(tmp_path, A, seed=7)
    row = runs.update([tmp_path/'runs'], tmp_path, note='a repetition').iloc[0]
    assert row.seed == '7' and row.commit == 'c' * 12
    assert row.found == 'manifest of a repetition: commit, seed, parents, command, device, versions'


def test_the_results_of_version_1_are_named():
    ours = TABLE[TABLE.commit.str.startswith('515758e')]
    assert set(ours.commit) == {'515758e760e2 (results-v1)'}
    assert '515758e, which is tagged `results-v1`' in (ROOT/'CHANGELOG.md').read_text()
