"The committed results, and the figures and the README that are made from them."
import hashlib
import json
import subprocess

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient
from project import COLUMNS, ROOT, notebooks
from readme import INDEX, readme

from saferlhf.runs import execute, warm_kernel

RESULTS, FIGURES = ROOT/'data/results', ROOT/'figures'


def own_results():
    "Whether somebody has run a reproduction here: then the committed pages are those of another run."
    run = subprocess.run(['git', 'status', '--porcelain', 'data/results', 'figures'], cwd=ROOT, capture_output=True, text=True)
    return run.returncode == 0 and bool(run.stdout.strip())


@pytest.mark.parametrize('name', COLUMNS)
def test_committed_results(name):
    table = pd.read_csv(RESULTS/'cpu'/f'{name}.csv')
    assert set(COLUMNS[name].split()) | {'run_id', 'seed'} <= set(table.columns)
    assert len(table) and table[['run_id', 'seed']].notna().all(axis=None) and 0 in set(table.seed)


def test_results_are_small():
    files = [p for p in RESULTS.rglob('*') if p.is_file()]
    assert {p.suffix for p in files if p.parent.name != 'bench'} <= {'.csv', '.json'}
    assert {p.suffix for p in files} <= {'.csv', '.json', '.ipynb', '.txt'} and sum(p.stat().st_size for p in files) < 2e6


def test_one_reproduction_made_them_all():
    "Rows of one seed come from runs of one chain: each file names one run per stage."
    runs = pd.concat([pd.read_csv(RESULTS/'cpu'/f'{n}.csv')[['run_id', 'seed']] for n in COLUMNS])
    known = pd.read_csv(RESULTS/'cpu/times.csv')
    for seed, rows in runs.groupby('seed'):
        assert set(rows.run_id) <= set(known[known.seed == seed].run_id), f'seed {seed}: rows of another run'


def entries(path): return {k: {f: v[f] for f in ('notebook', 'results', 'run_ids')} for k, v in json.loads(path.read_text()).items()}


def test_figures_are_drawn_from_the_committed_results():
    for name, entry in entries(FIGURES/'index.json').items():
        assert all((FIGURES/f'{name}.{end}').exists() for end in ('png', 'pdf')) and (ROOT/entry['notebook']).exists()
        for file, sha in entry['results'].items():
            assert hashlib.sha256((ROOT/file).read_bytes()).hexdigest() == sha, f'{name}: draw it again with saferlhf figures'
    assert {p.stem for p in FIGURES.glob('*.png')} == set(entries(FIGURES/'index.json'))


def test_figures_rebuild(tmp_path, monkeypatch):
    monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/'runs'))
    with warm_kernel() as km:
        for path in notebooks('paper'):
            execute(path, tmp_path/path.name, dict(profile='cpu', seed=0, figures_dir=str(tmp_path/'figures')), progress=False, km=km)
    made, committed = entries(tmp_path/'figures/index.json'), entries(FIGURES/'index.json')
    assert set(made) == set(committed)
    for name, entry in made.items():
        assert entry['run_ids'] == committed[name]['run_ids']
        assert list(entry['results'].values()) == list(committed[name]['results'].values())


def test_readme_shows_the_committed_results(tmp_path):
    if own_results(): return
    notebook = nbformat.read(INDEX, 4)
    NotebookClient(notebook, kernel_name='python3', resources={'metadata': {'path': str(INDEX.parent)}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == 'code': cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
    nbformat.write(notebook, tmp_path/'index.ipynb')
    assert readme(tmp_path/'index.ipynb') == (ROOT/'README.md').read_text(), 'run: make docs'


def test_reliability():
    "What `make faults` has found: every kind of fault was tried as often as was promised, and nothing failed."
    read = lambda name: pd.read_csv(RESULTS/'reliability'/f'{name}.csv', dtype=str, keep_default_na=False)
    tables = {n: read(n) for n in ('kill', 'disk', 'damage', 'numbers', 'kernel', 'lock', 'ranks', 'rows')}
    for name, table in tables.items():
        assert list(table) == 'fault stage engine seed phase step outcome lost run_id'.split(), name
        assert not table.outcome.str.startswith('FAILED').any(), name
    kills = tables['kill']
    assert len(kills) >= 50 and (kills.phase != 'anywhere').sum() >= 15 and set(kills.outcome) == {'identical'}
    assert {'base_lm', 'sft', 'gold', 'reward-1', 'cost-2', 'judge', 'collect-2', 'policy-2', 'evaluate', 'two_token'} == set(kills.stage)
    assert {'torch', 'zero0', 'zero1', 'zero2'} <= set(kills.engine) and set(tables['ranks'].engine) == {f'zero{z}' for z in range(4)}
    assert len(tables['damage']) >= 20 and tables['rows'].step.astype(int).sum() >= 10_000
    assert {f.split()[0] for f in tables['numbers'].fault} == {'loss', 'gradient', 'reward', 'cost'}
