"What several tests need to know about the project: its folders, notebooks, modules and their order."
import ast
import json
from functools import lru_cache
from pathlib import Path

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
    return sorted(p for p in found if '.ipynb_checkpoints' not in p.parts and not p.name.startswith(('.', '_')))


@lru_cache
def cells(path:Path) -> list[dict]:
    "A notebook's cells, their source as one text."
    return [c | {'source': ''.join(c['source'])} for c in json.loads(path.read_text())['cells']]


def modules() -> dict[str, Path]:
    "Module -> the notebook that exports it, from the lowest to the highest: the order is that of the notebooks' names."
    out = {}
    for path in notebooks('.'):
        for c in cells(path):
            for line in c['source'].splitlines():
                if line.startswith('#| default_exp '): out[line.split()[2]] = path
    return out


@lru_cache
def tree(module:str) -> ast.Module:
    "A module's syntax."
    return ast.parse((PACKAGE/f'{module}.py').read_text())


def imports(module:str) -> set[str]:
    "Every module that one imports, anywhere in its text: 'torch', 'datasets', and its own kind as '.data'."
    out = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names = [a.name.split('.') for a in node.names]
            out |= {f'.{n[1]}' if n[0] == 'saferlhf' and n[1:] else n[0] for n in names}
        elif isinstance(node, ast.ImportFrom):
            own = node.level or (node.module or '').split('.')[0] == 'saferlhf'
            name = (node.module or '').removeprefix('saferlhf').lstrip('.').split('.')[0]
            if not own: out.add(node.module.split('.')[0])
            elif name: out.add(f'.{name}')
            else: out |= {f'.{a.name}' for a in node.names}
    return out
