"The installed package works outside the checkout: data, models, templates and the command."
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from project import ROOT, notebooks

SAY = '''
import json, saferlhf
from saferlhf.data import data_path, shipped
from saferlhf.apps.commands import main
from saferlhf.reproduction.pipeline import papers_home
from saferlhf.record.run import results_home, runs_home, templates_home
try: results = str(results_home())
except FileNotFoundError as e: results = f'error: {e}'
print(json.dumps(dict(package=saferlhf.__file__, data=str(data_path()), templates=str(templates_home()), papers=str(papers_home()),
                      runs=str(runs_home()), results=results, rows=len(shipped('eval_prompts')))))
main(['list', '--profile', 'smoke'])'''


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "What a wheel would put into site-packages."
    folder = tmp_path_factory.mktemp('installed'); tree, lib = folder/'tree', folder/'lib'
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE'):
        tree.mkdir(exist_ok=True); shutil.copy(ROOT/name, tree)
    skip = shutil.ignore_patterns('__pycache__', '_modidx.py')
    for name in ('saferlhf', 'nbs', 'data'): shutil.copytree(ROOT/name, tree/name, ignore=skip)
    (tree/'data/results/cpu').mkdir(parents=True, exist_ok=True); (tree/'data/results/cpu/old.csv').write_text('a\n')
    run = subprocess.run([sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', lib], cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return lib


def ask(lib, folder, home=None):
    "What the installed package says from another folder."
    env = {k: v for k, v in os.environ.items() if not k.startswith('SAFERLHF_')} | {'PYTHONPATH': str(lib)}
    if home: env['SAFERLHF_HOME'] = str(home)
    run = subprocess.run([sys.executable, '-c', SAY], cwd=folder, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    facts, *stages = run.stdout.splitlines()
    return json.loads(facts), stages


def test_it_works_outside_the_checkout(installed, tmp_path):
    said, stages = ask(installed, tmp_path)
    inside = installed.resolve()/'saferlhf'
    assert Path(said['package']).resolve() == inside/'__init__.py' and said['rows'] > 2000 and stages[0].startswith('base_lm')
    places = [Path(said[k]).resolve() for k in ('data', 'templates', 'papers', 'runs')]
    assert places == [inside/'_data', inside/'_templates', inside/'_paper', tmp_path.resolve()/'runs']
    assert 'SAFERLHF_HOME' in said['results'] and not (inside/'_data/results').exists()
    (tmp_path/'home').mkdir()
    said, _ = ask(installed, tmp_path, home=tmp_path/'home')
    assert said['results'] == str(tmp_path/'home/data/results') and Path(said['data']).resolve() == inside/'_data'


def test_it_says_that_it_is_typed(installed):
    assert (installed/'saferlhf/py.typed').exists() and 'saferlhf/py.typed' in (ROOT/'MANIFEST.in').read_text()


def test_it_ships_what_the_checkout_has(installed):
    for folder, name in {'templates': '_templates', 'paper': '_paper'}.items():
        assert {p.name for p in notebooks(folder)} == {p.name for p in (installed/'saferlhf'/name).glob('*.ipynb')}
    shipped = {str(p.relative_to(ROOT/'data')) for p in (ROOT/'data').rglob('*') if p.is_file() and 'results' not in p.parts}
    data = installed/'saferlhf/_data'
    built = {str(p.relative_to(data)): p.stat().st_size for p in data.rglob('*') if p.is_file()}
    instruments = sum(n for k, n in built.items() if k.startswith('models/gold-smollm2'))
    assert set(built) == shipped and sum(built.values()) - instruments < 25e6, 'data and models are 25 MB together at most'
    assert instruments < 12e6, 'the adapters that judge are 12 MB together at most'


def test_one_place_for_the_metadata():
    cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini')
    text = (ROOT/'pyproject.toml').read_text()
    assert 'dynamic = ["version", "description", "dependencies", "optional-dependencies"]' in text
    assert not re.search(r'^version\s*=', text, re.M)
    assert all(re.search('[<>=]', r) for r in cfg['DEFAULT']['requirements'].split()), 'every requirement has a bound'


def test_no_file_names_a_place_of_one_machine():
    "Cards, tables, sources and indexes are written by runs, which know where they ran."
    files = [p for f in ('data', 'figures') for p in (ROOT/f).rglob('*') if p.suffix in ('.md', '.json', '.csv', '.jsonl')]
    assert files
    for path in files:
        found = re.search(r'(?<![\w.:/])/(?:home|Users|root|work|tmp|private|var/folders)/[\w.-]+', path.read_text())
        assert not found, f'{path.relative_to(ROOT)}: {found[0]}'
