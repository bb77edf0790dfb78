"What several tests need to know about the project: its folders, notebooks, modules and their order."
import ast
import json
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT/'saferlhf'
COLUMNS = {  # what the paper notebooks and readers of data/results rely on; each row also names its run and seed
    'table1': 'round model metric label_source n value low high paper',
    'models': 'policy prompt_kind judge decoding n reward cost harmful harmful_low harmful_high coherent_harmless length',
    'rounds': 'round kind what count', 'lagrange': 'round step lam cost window_cost reward kl threshold',
    'annotation': 'protocol weight_spread conflict_share agreement alpha n', 'times': 'stage seconds'}


def notebooks(*folders:str) -> list[Path]:
    "Notebooks of some folders under nbs/ ('.' is nbs/ itself), in the order of their names; of all without a folder."
    found = [p for f in folders for p in (ROOT/'nbs'/f).glob('*.ipynb')] if folders else (ROOT/'nbs').glob('**/*.ipynb')
    kept = sorted(p for p in found if '.ipynb_checkpoints' not in p.parts and not p.name.startswith(('.', '_')))
    return sorted(kept, key=lambda p: folders.index(str(p.relative_to(ROOT/'nbs').parent))) if folders else kept


@lru_cache
def cells(path:Path) -> list[dict]:
    "A notebook's cells, their source as one text."
    return [c | {'source': ''.join(c['source'])} for c in json.loads(path.read_text())['cells']]


@lru_cache
def notebook_functions(name:str) -> SimpleNamespace:
    "What a notebook ('paper/rounds') defines: its cells that only import, define, or set names in capitals."
    def defines(node):
        if not isinstance(node, ast.Assign): return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef))
        return all(isinstance(t, ast.Name) and t.id.isupper() for t in names(node.targets))
    def names(targets): return [n for t in targets for n in (t.elts if isinstance(t, ast.Tuple) else [t])]
    found = {}
    for c in cells(ROOT/f'nbs/{name}.ipynb'):
        body = ast.parse(c['source']).body if c['cell_type'] == 'code' else []
        body = [n for n in body if not isinstance(n, ast.Expr) or 'filterwarnings' not in ast.unparse(n)]
        if all(map(defines, body)): exec(compile(ast.Module(body, []), name, 'exec'), found)
    return SimpleNamespace(**found)


WINGS = 'hardware', 'method', 'record', 'reproduction', 'apps'      # from the lowest to the highest; method is saferlhf/ itself


@lru_cache
def modules() -> dict[str, Path]:
    "Module ('ppo', 'hardware.packing') -> the notebook that exports it: wing by wing, in the order of the notebooks' names."
    out = {}
    for path in notebooks(*WINGS):
        for c in cells(path):
            for line in c['source'].splitlines():
                if line.startswith('#| default_exp '): out[line.split()[2]] = path
    return out


def wing(module:str) -> str:
    "The wing that a module belongs to."
    return module.split('.')[0] if '.' in module else 'method'


def source(module:str) -> Path:
    "A module's file."
    return PACKAGE/f"{module.replace('.', '/')}.py"


def exported() -> list[Path]:
    "Every file of the package that notebooks export."
    return [p for p in sorted(PACKAGE.rglob('*.py')) if p.stem not in ('__init__', '_modidx')]


@lru_cache
def tree(module:str) -> ast.Module:
    "A module's syntax."
    return ast.parse(source(module).read_text())


def imports(module:str) -> set[str]:
    "Every module that one imports, anywhere in its text: 'torch', 'datasets', and its own kind as '.data', '.hardware.packing'."
    own = lambda name: f'.{name}' if name.split('.')[0] in ('hardware', 'record', 'reproduction', 'apps') else f".{name.split('.')[0]}"
    out, here = set(), ['saferlhf', *module.split('.')[:-1]]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif not isinstance(node, ast.ImportFrom): continue
        else:
            base = '.'.join([*here[:len(here) + 1 - node.level], *filter(None, [node.module])]) if node.level else node.module
            packages = ('saferlhf', *(f'saferlhf.{w}' for w in WINGS))
            names = [f'{base}.{a.name}' for a in node.names] if base in packages else [base]
        out |= {own(n[9:]) if n.startswith('saferlhf.') else n.split('.')[0] for n in names}
    return out
