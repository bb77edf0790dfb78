"The shape of the project: who imports whom, what a notebook may hold, and the names that scripts rely on."
import ast
import functools
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from configparser import ConfigParser

import pytest
from drift import drifted
from project import PACKAGE, ROOT, WINGS, cells, exported, imports, modules, notebooks, source, tree, wing

ORDER = list(modules())
LIBRARY = [m for m in ORDER if source(m).exists()]
PURE = ('losses', 'advantages', 'objectives')
ONLY_IN = {'deepspeed': {'hardware.zero'}, 'papermill': {'record.execute'}, 'matplotlib': {'reproduction.figures'}}
PROVIDED = {'triton': 'torch', 'PIL': 'matplotlib', 'sklearn': 'scikit-learn', 'huggingface_hub': 'transformers',
            'jupyter_client': 'ipykernel', 'jupyter_core': 'ipykernel', 'jinja2': 'torch', 'traitlets': 'nbconvert',
            'bleach': 'nbconvert'}
# imported when called; without them it says which extra to install
EXTRAS = {'apps.report': 'notebooks', 'record.execute': 'notebooks', 'hardware.zero': 'deepspeed'}
BLOCKED = ('nbdev fastcore execnb papermill jupyter_client jupyter_core jupyterlab ipykernel IPython '
           'nbformat nbclient nbconvert deepspeed accelerate').split()
NO_POSIX = 'sched_getaffinity', 'fork', 'forkpty', 'O_DIRECTORY'        # and no fcntl: as on other systems


def test_every_module_has_a_notebook_and_the_other_way_round():
    assert {str(p.relative_to(PACKAGE).with_suffix('')).replace('/', '.') for p in exported()} == set(ORDER)
    wanted = 'text data models losses advantages objectives engine rollout train ppo world annotate evaluate judges offline'.split()
    assert [m for m in ORDER if wing(m) == 'method'] == wanted, 'the contract: these names stay flat'
    for module, path in modules().items(): assert path.parent.name == wing(module), module


@pytest.mark.parametrize('module', LIBRARY)
def test_layers(module):
    "Imports go down only: from wing to wing, and within one from later notebooks to earlier ones."
    found = imports(module)
    for own in (i[1:] for i in found if i.startswith('.')):
        assert ORDER.index(own) < ORDER.index(module), f'{module} imports {own}, which comes later'
    for name, allowed in ONLY_IN.items(): assert name not in found or module in allowed, f'{module} imports {name}'
    assert not found & {'nbdev', 'fastcore', 'execnb', 'IPython', 'nbformat'}, module
    if module in PURE: assert {i for i in found if i.lstrip('.') not in sys.stdlib_module_names} <= {'torch'}, module


def test_the_order_is_checked_on_every_kind_of_import(monkeypatch):
    lines = 'from saferlhf.a import x', 'import saferlhf.b', 'from . import c', 'from .d import y', 'import torch.nn', 'import saferlhf'
    text = 'def f():\n    ' + '\n    '.join(lines)
    monkeypatch.setattr('project.tree', lambda module: ast.parse(text))
    assert imports('any') == {'.a', '.b', '.c', '.d', 'torch', 'saferlhf'}
    deeper = ('from ..a import x', 'from .own import y', 'from saferlhf.record import files', 'from .. import b',
              'import saferlhf.apps.plan as p')
    monkeypatch.setattr('project.tree', lambda module: ast.parse('\n'.join(deeper)))
    assert imports('hardware.any') == {'.a', '.hardware.own', '.record.files', '.b', '.apps.plan'}


def test_what_is_imported_is_required():
    cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini', encoding='utf-8')
    def named(key): return {re.split('[<>=]', r)[0] for r in cfg['DEFAULT'][key].split()}
    for module in LIBRARY:
        others = {i for i in imports(module) if not i.startswith('.') and i not in sys.stdlib_module_names and i != 'saferlhf'}
        extra = named(f'{EXTRAS[module]}_requirements') if module in EXTRAS else set()
        assert {PROVIDED.get(i, i) for i in others} <= named('requirements') | extra, module


def test_scripts_need_no_notebook_tools_and_no_posix(tmp_path):
    "Everything imports; what needs an extra names it; locks, and stages side by side, do without what only Linux has."
    code = f'''import sys, importlib, os, warnings
for name in {BLOCKED!r}: sys.modules[name] = None
for name in {NO_POSIX!r}: delattr(os, name)
sys.modules['fcntl'] = None; warnings.simplefilter('ignore')
for m in {LIBRARY!r}: importlib.import_module('saferlhf.' + m)
from saferlhf.record import execute, files
from saferlhf.reproduction.pipeline import _side_by_side
_side_by_side([], 'smoke', 2, 0)
with files.lock('held'), files.turn('held/table.csv'):
    try: files.lock('held').__enter__()
    except RuntimeError as e: assert 'another run holds held' in str(e) and str(os.getpid()) in str(e), e
with files.lock('held'): pass
assert execute.cores() == os.cpu_count()
from saferlhf.hardware.zero import deepspeed
for needs in (lambda: execute.execute('sft', 'out.ipynb'), deepspeed):
    try: needs()
    except RuntimeError as e: print(e)
print(sorted(m for m in sys.modules if m.startswith('saferlhf.')))'''
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, encoding='utf-8', cwd=tmp_path,
                         env=os.environ | {'PYTHONPATH': str(ROOT), 'SAFERLHF_HOME': str(ROOT)})
    assert run.returncode == 0, run.stderr[-1500:]
    notebooks, ranks, loaded = run.stdout.splitlines()
    assert "pip install 'saferlhf[notebooks]'" in notebooks and "pip install 'saferlhf[deepspeed]'" in ranks
    assert set(ast.literal_eval(loaded)) == {f'saferlhf.{m}' for m in (*LIBRARY, *WINGS) if m != 'method'}


def text_calls(text):
    "Lines where a file or a pipe is read or written as text in whatever encoding the machine has."
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call): continue
        name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
        given = {k.arg: getattr(k.value, 'value', '') for k in node.keywords}
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) in ('os', 'Run', 'Record', 'Image'): continue
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and re.fullmatch('[rwax][bt+]*', str(a.value))]
        as_text = name == 'open' and not any('b' in m for m in [*modes, str(given.get('mode', ''))])
        if name == 'open' and ast.unparse(node.func).split('.')[0] in ('gzip', 'bz2', 'lzma'): as_text = any('t' in m for m in modes)
        if (as_text or name in ('read_text', 'write_text') or given.get('text')) and 'encoding' not in given: yield node.lineno


def test_text_is_utf8_whatever_the_locale():
    code = {f'{p.relative_to(ROOT)}': p.read_text(encoding='utf-8') for p in (*map(source, LIBRARY), *(ROOT/'tools').glob('*.py'))}
    for p in notebooks('templates', 'paper', 'tutorials', '.'):
        lines = '\n'.join(c['source'] for c in cells(p) if c['cell_type'] == 'code')
        code[p.name] = '\n'.join(line for line in lines.splitlines() if not line.startswith(('%', '!', '#|')))
    assert {name: lines for name, text in code.items() if (lines := list(text_calls(text)))} == {}
    bad, good = "open(p); p.read_text(); lzma.open(p, 'rt')", "open(p, 'rb'); p.read_text(encoding='utf-8'); lzma.open(p)"
    assert [*text_calls(bad)] == [1, 1, 1] and not [*text_calls(good)]


def test_nothing_is_checked_by_assert():
    "`python -O` leaves asserts out."
    code = {m: tree(m) for m in LIBRARY}
    lines = {p.stem: [c['source'] for c in cells(p) if c['cell_type'] == 'code'] for p in notebooks('templates', 'tutorials')}
    code |= {name: ast.parse('\n'.join(found)) for name, found in lines.items()}
    assert not [name for name, t in code.items() for n in ast.walk(t) if isinstance(n, ast.Assert)], 'raise an error instead'

# size and words

@pytest.mark.parametrize('module', LIBRARY)
def test_a_module_is_one_concept(module):
    lines = len(source(module).read_text().splitlines())
    assert lines <= 350, f'{module} has {lines} lines: split it by concept'


def public(module):
    "Exported functions, classes and their public methods."
    for node in tree(module).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'): continue
        yield node.name, node
        if isinstance(node, ast.ClassDef):
            for f in node.body:
                if isinstance(f, ast.FunctionDef) and not f.name.startswith('_'): yield f'{node.name}.{f.name}', f


def undocumented(module, node):
    "Parameters, or the fields of a dataclass, that stand on a line without a comment."
    lines = source(module).read_text().splitlines()
    if isinstance(node, ast.FunctionDef):
        a = node.args
        rows = [(x.arg, x) for x in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg] if x and x.arg not in ('self', 'cls')]
    elif any('dataclass' in ast.unparse(d) for d in node.decorator_list):
        rows = [(f.target.id, f) for f in node.body if isinstance(f, ast.AnnAssign) and not f.target.id.startswith('_')]
    else: return []
    return [name for name, x in rows if '#' not in ''.join(lines[x.lineno - 1:x.end_lineno])]


def described_elsewhere(node, inherited):
    "Whether a callable's parameters are those of a base class, or of what its docstring points to."
    own = ast.get_docstring(node)
    return bool(re.search('(see|As in) `', own)) if own else inherited


@pytest.mark.parametrize('module', LIBRARY)
def test_exported_callables_say_what_they_take(module):
    loaded = importlib.import_module(f'saferlhf.{module}')
    doc = {name: inspect.getdoc(functools.reduce(getattr, name.split('.'), loaded)) for name, _ in public(module)}    # inherited ones too
    bare = [name for name, node in public(module) if not (ast.get_docstring(node) or '.' in name and doc[name])]
    assert not bare, f'{module}: no docstring: {bare}'
    gaps = {name: undocumented(module, node) for name, node in public(module) if not described_elsewhere(node, '.' in name)}
    gaps = {name: parameters for name, parameters in gaps.items() if parameters}
    assert not gaps, f'{module}: parameters without a comment: {gaps}'

# notebooks

@pytest.mark.parametrize('path', notebooks(), ids=lambda p: p.stem)
def test_a_notebook_is_fit_to_read(path):
    sources = [c['source'] for c in cells(path)]
    assert next(s for s in sources if not s.startswith('#| default_exp')).startswith('# '), 'begin with a title cell'
    assert sum(map(len, sources)) <= 60_000, 'more than 60 KB of source: split it'
    assert path.stat().st_size <= 200_000, 'more than 200 KB with outputs: smaller plots, or split it'
    for i, c in enumerate(cells(path)):
        for o in c.get('outputs', []):
            assert o['output_type'] != 'error', f'cell {i} ended in an error'
            assert o.get('name') != 'stderr', f'cell {i} holds warnings or progress bars: clear that output'
            texts = json.dumps({k: v for k, v in (o.get('data') or {'text': o.get('text')}).items() if not k.startswith('image/png')})
            found = re.search(r'(?<![\w.])/(?:home|Users|root|work|tmp|private|var/folders)/[\w.-]+', texts)
            assert not found, f'cell {i} shows a path of one machine: {found[0]}'


@pytest.mark.parametrize('path', notebooks('templates', 'paper', 'tutorials'), ids=lambda p: p.stem)
def test_one_cell_is_tagged_parameters(path):
    tagged = [c for c in cells(path) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1 and tagged[0]['cell_type'] == 'code'


def test_templates_are_left_alone_by_nbdev_test():
    for folder in ('templates', 'paper', 'tutorials'): assert (ROOT/'nbs'/folder/'.notest').exists() and notebooks(folder)
    # without this line nbdev-clean deletes the tag, and papermill then runs the defaults, silently
    assert 'allowed_cell_metadata_keys = ["tags"]' in (ROOT/'pyproject.toml').read_text()


def small_project(folder):
    "A project of one notebook, exported."
    (folder/'nbs/method').mkdir(parents=True); (folder/'saferlhf').mkdir()
    wanted = 'settings.ini', 'pyproject.toml', 'saferlhf/__init__.py', 'saferlhf/advantages.py', 'nbs/method/05_advantages.ipynb'
    for name in wanted: (folder/name).write_text((ROOT/name).read_text())


def test_drift_is_found(tmp_path):
    small_project(tmp_path)
    assert drifted(tmp_path) == []
    module, notebook = tmp_path/'saferlhf/advantages.py', tmp_path/'nbs/method/05_advantages.ipynb'
    before = module.read_text(); module.write_text(before.replace('lam=0.95', 'lam=0.9')); assert module.read_text() != before
    (tmp_path/'saferlhf/gone.py').write_text('# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/99_gone.ipynb.\n')
    nb = json.loads(notebook.read_text()); nb['cells'][1]['metadata']['collapsed'] = True
    notebook.write_text(json.dumps(nb, indent=1) + '\n')
    assert drifted(tmp_path) == ['nbs/method/05_advantages.ipynb', 'saferlhf/advantages.py', 'saferlhf/gone.py']
