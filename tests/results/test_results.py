"The committed results, and the figures and the README that are made from them."
import hashlib
import json
import os
import re
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
from faults.suite import GROUPS
from notebooks import execute as run_cells
from project import COLUMNS, ROOT, notebooks
from readme import INDEX, readme

from saferlhf.apps.commands import main
from saferlhf.apps.report import _made_by, _page, report
from saferlhf.record.execute import execute, warm_kernel

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
    assert {p.suffix for p in files if p.parent.name not in ('bench', 'notebooks')} <= {'.csv', '.json'}
    assert {p.suffix for p in files} <= {'.csv', '.json', '.ipynb', '.txt'} and sum(p.stat().st_size for p in files) < 2e6


def test_one_reproduction_made_them_all():
    "Rows of one seed come from runs of one chain: each file names one run per stage."
    runs = pd.concat([pd.read_csv(RESULTS/'cpu'/f'{n}.csv')[['run_id', 'seed']] for n in COLUMNS])
    known = pd.read_csv(RESULTS/'cpu/times.csv')
    for seed, rows in runs.groupby('seed'):
        assert set(rows.run_id) <= set(known[known.seed == seed].run_id), f'seed {seed}: rows of another run'


def entries(path): return {k: {f: v[f] for f in ('notebook', 'results', 'run_ids')} for k, v in json.loads(path.read_text()).items()}


@pytest.mark.parametrize('folder, ends', [(FIGURES, ('png', 'pdf')), (FIGURES/'gpu', ('png',))], ids=['cpu', 'gpu'])
def test_figures_are_drawn_from_the_committed_results(folder, ends):
    for name, entry in entries(folder/'index.json').items():
        assert all((folder/f'{name}.{end}').exists() for end in ends) and (ROOT/entry['notebook']).exists()
        for file, sha in entry['results'].items():
            assert hashlib.sha256((ROOT/file).read_bytes()).hexdigest() == sha, f'{name}: draw it again with saferlhf figures'
    assert {p.stem for p in folder.glob('*.png')} == set(entries(folder/'index.json'))
    assert sum(p.stat().st_size for p in folder.glob('*.png')) < 2e6


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    "All paper notebooks on the results of the profile cpu, and those that need what only the profile gpu has: executed, and their figures."
    folder = tmp_path_factory.mktemp('drawn')
    before = os.environ.get('SAFERLHF_RUNS'); os.environ['SAFERLHF_RUNS'] = str(folder/'runs')
    try:
        with warm_kernel() as km:
            for profile, some in {'cpu': None, 'gpu': ('beyond', 'overview', 'rounds')}.items():
                for path in [p for p in notebooks('paper') if some is None or p.stem in some]:
                    told = dict(profile=profile, seed=0, figures_dir=str(folder/profile/'figures'))
                    execute(path, folder/profile/path.name, told, progress=False, km=km)
    finally:
        if before is None: del os.environ['SAFERLHF_RUNS']
        else: os.environ['SAFERLHF_RUNS'] = before
    return folder


@pytest.mark.parametrize('profile, committed', [('cpu', FIGURES), ('gpu', FIGURES/'gpu')])
def test_figures_rebuild(drawn, profile, committed):
    made, committed = entries(drawn/profile/'figures/index.json'), entries(committed/'index.json')
    ran = {f'nbs/paper/{p.name}' for p in (drawn/profile).glob('*.ipynb')}
    assert set(made) == {k for k, v in committed.items() if v['notebook'] in ran}
    for name, entry in made.items():
        assert entry['run_ids'] == committed[name]['run_ids']
        assert list(entry['results'].values()) == list(committed[name]['results'].values())


def said(path):
    "Everything that an executed notebook shows as text."
    outputs = [o for c in nbformat.read(path, 4).cells if c.cell_type == 'code' for o in c.outputs]
    return '\n'.join(o.get('text') or o.get('data', {}).get('text/markdown', '') for o in outputs)


def test_what_has_no_data_says_so(drawn):
    cpu, gpu = (said(drawn/p/'beyond.ipynb') for p in ('cpu', 'gpu'))
    for what in ('the threshold sweep', 'variety by arm', 'a second machine'): assert f'**Not run: {what}.**' in cpu
    for said_by in (cpu, gpu): assert "Refusals, XSTest's safe half" in said_by and 'Variety of the sampled answers' in said_by
    assert 'The limit binds' in gpu and 'The limit binds' not in cpu
    sweep = next(line for line in gpu.splitlines() if line.startswith('**Sweep.**'))
    assert sweep.count('own cost') == 4 and 'ppo-lag, round 3: own models' in gpu and 'strict-3, round 3: own models' in gpu
    cpu_rounds, gpu_rounds = (said(drawn/p/'rounds.ipynb') for p in ('cpu', 'gpu'))
    pairs = {'three rounds with stricter limits': '| round 3, stricter |', 'rounds without red-teaming': 'Intervals are apart'}
    for missing, shown in pairs.items():
        assert f'**Not run: {missing}.**' in cpu_rounds and shown in gpu_rounds and missing not in gpu_rounds
    assert gpu.count('**Verdict.**') >= 8 and 'nan' not in gpu.lower().replace('financial', '')
    table = [line for line in said(drawn/'gpu/overview.ipynb').splitlines() if line.startswith('| ')]
    for item in ('Table 1', 'Table 4', *(f'Fig. {i}' for i in range(1, 6)), 'Fig. 6(b)', 'Fig. 6(c)', 'Elo', 'harmful ratio'):
        assert any(line.startswith(f'| {item} |') for line in table), item
    for line in table: assert 'not run' not in line.split(' | ')[3] or 'not run' in line.split(' | ')[-1], f'no reason: {line}'


def test_report_holds_everything(drawn):
    parts = {p.stem: drawn/'cpu'/p.name for p in notebooks('paper')}
    text = _page(parts, 'cpu', _made_by('cpu'))
    assert len(text) < 8e6 and not re.search('(?:src|href)="(?!data:|#)', text), 'it must stand alone'
    for name in parts: assert f'id="{name}"' in text and f'href="#{name}"' in text
    assert text.count('data:image/png') >= len(entries(FIGURES/'index.json')) and '<details>' in text and '<math' in text
    for run in pd.read_csv(RESULTS/'cpu/times.csv').run_id: assert run in text
    assert not re.search(r'(?<![\w.])/(?:home|root|work|tmp)/', re.sub('data:image/png[^"]*', '', text)), 'a path of one machine'


def test_report_runs_what_is_stale_and_names_what_is_missing(tmp_path, monkeypatch, capsys):
    home, papers = tmp_path/'home', tmp_path/'papers'; (home/'data/results/cpu').mkdir(parents=True); papers.mkdir()
    monkeypatch.setenv('SAFERLHF_HOME', str(home)); monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/'runs'))
    literals = "profile = 'cpu'\nseed = 0\nresults_dir = ''\nfigures_dir = ''"
    v4 = nbformat.v4; told = v4.new_code_cell(literals, metadata=dict(tags=['parameters']))
    cells = [v4.new_markdown_cell('# One'), told, v4.new_code_cell('40 + 2')]
    kernel = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    nbformat.write(v4.new_notebook(cells=cells, metadata=kernel), papers/'one.ipynb')
    with pytest.raises(FileNotFoundError, match='saferlhf reproduce --profile cpu'): report('cpu', 0, papers)
    (home/'data/results/cpu/times.csv').write_text('stage,seconds,seed,run_id\nsft,1,0,sft/a\n')
    out = report('cpu', 0, papers); first = next((tmp_path/'runs/notebooks').glob('*.ipynb')).stat().st_mtime_ns
    assert out == tmp_path/'runs/report-cpu.html' and '42' in out.read_text() and 'sft/a' in out.read_text()
    report('cpu', 0, papers, tmp_path/'elsewhere/r.html')
    assert next((tmp_path/'runs/notebooks').glob('*.ipynb')).stat().st_mtime_ns == first and (tmp_path/'elsewhere/r.html').exists()
    monkeypatch.setitem(sys.modules, 'nbconvert', None)
    assert main(['report', '--profile', 'cpu']) == 1 and 'nbconvert' in capsys.readouterr().err


def test_readme_shows_the_committed_results(tmp_path):
    if own_results(): return
    notebook = nbformat.read(INDEX, 4)
    run_cells(notebook, INDEX.parent)
    for cell in notebook.cells:
        if cell.cell_type == 'code': cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
    nbformat.write(notebook, tmp_path/'index.ipynb')
    assert readme(tmp_path/'index.ipynb') == (ROOT/'README.md').read_text(), 'run: make docs'


def test_reliability():
    "What `make faults` has found: every kind of fault was tried as often as was promised, and nothing failed."
    read = lambda name: pd.read_csv(RESULTS/'reliability'/f'{name}.csv', dtype=str, keep_default_na=False)
    tables = {n: read(n) for n in GROUPS}
    for name, table in tables.items():
        assert list(table) == 'fault stage engine seed phase step outcome lost run_id'.split(), name
        assert not table.outcome.str.startswith('FAILED').any(), name
    kills = tables['kill']
    assert len(kills) >= 50 and (kills.phase != 'anywhere').sum() >= 15 and set(kills.outcome) == {'identical'}
    assert {'base_lm', 'sft', 'gold', 'reward-1', 'cost-2', 'judge', 'collect-2', 'policy-2', 'evaluate', 'two_token'} == set(kills.stage)
    assert {'torch', 'zero0', 'zero1', 'zero2'} <= set(kills.engine) and set(tables['ranks'].engine) == {f'zero{z}' for z in range(4)}
    assert len(tables['damage']) >= 20 and tables['rows'].step.astype(int).sum() >= 10_000
    assert {f.split()[0] for f in tables['numbers'].fault} == {'loss', 'gradient', 'reward', 'cost'}
    promised = dict(twice=4, altered=20, late=30, identity=10, moved=7, large=7, kernel=15, pages=10, weights=15)
    assert all(len(tables[n]) >= least for n, least in promised.items()), {n: len(tables[n]) for n in promised}
