"The map names equations, traps, tests, code, notebooks and figures: all of them must exist, and none may be missing."
import ast
import functools
import importlib
import json
import re

from project import ROOT, cells, modules, notebooks, source

MAP = ROOT/'nbs/00_map.ipynb'
ROWS = [line for c in cells(MAP) if c['cell_type'] == 'markdown' for line in c['source'].splitlines() if line.startswith('| ')]
NAMES = [name for row in ROWS for name in re.findall('`([^`]+)`', row)]


def first_cells(): return [row.split('|')[1].strip() for row in ROWS]


def test_nothing_is_missing():
    equations = [c for c in first_cells() if re.fullmatch(r"E\d+'?", c)]
    assert equations == ['E1', 'E2', 'E3', "E3'", *(f'E{i}' for i in range(4, 17))]
    assert [int(c) for c in first_cells() if c.isdigit()] == list(range(1, 31))
    for row in ROWS:
        head = row.split('|')[1].strip()
        if head.isdigit() or re.fullmatch(r"E\d+'?", head): assert '::test_' in row, f'no test holds {head}'


def test_tests_exist():
    named = [n for n in NAMES if '::' in n]
    assert len(named) > 60
    for name in named:
        file, function = name.split('::')
        tree = ast.parse(next((ROOT/'tests').rglob(f'{file}.py')).read_text())
        assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, name


def test_code_exists():
    named = [n for n in NAMES if re.fullmatch(r'[a-z]+(\.\w+)+', n)]
    assert len(named) > 50
    for name in named:
        module = max((m for m in modules() if name.startswith(f'{m}.')), key=len, default='')
        path = name.removeprefix(module).lstrip('.').split('.')
        assert module, name
        loaded = importlib.import_module(f'saferlhf.{module}')
        fields = getattr(getattr(loaded, path[0]), '__dataclass_fields__', {})
        assert path[-1] in fields or functools.reduce(getattr, path, loaded) is not None, name


def test_notebooks_and_figures_exist():
    paths = {str(p.relative_to(ROOT/'nbs').with_suffix('')) for p in notebooks()}
    known = paths | {p.split('/')[-1] for p in paths}
    named = {n for n in NAMES if re.fullmatch(r'\d\d_\w+|(paper|templates)/\w+', n)}
    assert len(named) > 8 and named <= known, named - known
    assert {p.stem for p in notebooks('apps')} <= named
    drawn = {n for p in notebooks('paper') for c in cells(p) for n in re.findall(r"\bresults\.save\(.*?, '(\w+)', NOTEBOOK", c['source'])}
    figures = {n.removeprefix('figures/') for n in NAMES if n.startswith('figures/')}
    assert len(figures) > 8 and figures <= drawn, figures - drawn
    index = ROOT/'figures/index.json'
    if index.exists():
        made = json.loads((ROOT/'figures/gpu/index.json').read_text()) | json.loads(index.read_text())     # some need what only gpu has
        assert figures <= set(made), f'not drawn yet: {figures - set(made)}'
        for name in figures:
            notebook = made[name]['notebook'].removeprefix('nbs/').removesuffix('.ipynb')
            assert any((ROOT/'figures'/p/f'{name}.png').exists() for p in ('', 'gpu'))
            assert any(f'`figures/{name}`' in row and f'`{notebook}`' in row for row in ROWS)


def test_every_docstring_points_into_the_map():
    listed = {c for c in first_cells() if c.startswith('E')}
    for module in modules():
        tree = ast.parse(source(module).read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (doc := ast.get_docstring(node)):
                assert set(re.findall(r'\bE\d+\b', doc)) <= listed, (module, node.name, doc)
