"""data/results/runs.csv: a row for every run that a committed result names.

    python tools/runs.py [RUNS ...] [--note TEXT] [--facts FILE] [--check]

RUNS are folders of run folders (`runs/`), whose manifests know most. What no manifest tells is taken from
executed notebooks, model cards, columns of the results and the history of the repository; what none of them
tells is 'not recorded', and `found` says where each fact comes from. Rows and facts that are there already
are kept, so the file outlives the run folders. Columns: `commit` computed the run, as its manifest says;
`published` first held its id; with the code of `same_code` the same settings, data and parents give the
same id again.
"""
import argparse
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
NONE = 'not recorded'
FACTS = 'commit', 'published', 'same_code', 'seed', 'parents', 'command', 'device', 'versions', 'replaces'
OPTIONAL = 'same_code', 'replaces'                                     # empty where there is nothing to say
COLUMNS = ['run_id', *FACTS, 'found']
RUN = re.compile(r'(?<![\w-])([a-z][a-z_-]*/[A-Za-z][\w.-]*-[0-9a-f]{12}'
                 r'|bench-[a-z_]+-\d{8}(?:-[a-z0-9]+)?)(?![\w-])')
PLACES = ('data/results/**/*.ipynb', 'data/results/**/*.txt', 'data/models/*/README.md',
          'figures/**/index.json')
TAGS = {'515758e760e2299c4450f3bf0de70d5750a6ced5': 'results-v1'}     # commits to compare results with
TEMPLATES = {'reward': 'score_model', 'cost': 'score_model', 'judge': 'score_model',       # where they differ
             'reward-only': 'policy', 'cost-only': 'policy', 'shaped': 'policy'}


def read(path:Path) -> pd.DataFrame:
    "A table as text; an empty runs.csv where there is none."
    if not path.exists(): return pd.DataFrame(columns=COLUMNS)
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def tables(root:Path) -> dict[Path, pd.DataFrame]:
    "The committed results with a column `run_id`, as text; runs.csv itself left out."
    found = {p: read(p) for p in sorted(root.glob('data/results/**/*.csv')) if p.name != 'runs.csv'}
    return {p: t for p, t in found.items() if 'run_id' in t}


def in_cell(cell:str) -> list[str]:
    "The ids of one cell, which may hold several."
    return [i for i in re.split(r'[\s;,]+', cell) if i]


def named(root:Path=ROOT) -> dict[str, set[str]]:
    "Run id -> the committed files that name it."
    out = {}
    def add(i, path): out.setdefault(i, set()).add(str(path.relative_to(root)))
    for path, table in tables(root).items():
        for cell in table.run_id.unique():
            for i in in_cell(cell): add(i, path)
    for pattern in PLACES:
        for path in root.glob(pattern):
            for i in RUN.findall(path.read_text()): add(i, path)
    return out


def as_parents(folders:dict) -> str:
    "Role and id of each parent: 'sft=sft/cpu-0e51... cost=cost/cpu-1-...'; 'none' where there is none."
    return ' '.join(f'{role}={"/".join(Path(p).parts[-2:])}' for role, p in folders.items()) or 'none'


def parent_ids(cell:str) -> list[str]:
    "The ids of a cell of the column `parents`."
    return [] if cell in (NONE, 'none') else [p.split('=', 1)[1] for p in cell.split()]


# sources of facts: run id -> fact -> (value, where it comes from)

def from_manifests(runs:Path, note:str='') -> dict[str, dict]:
    "What the manifest of each finished run tells, without paths of the machine."
    runs, out = Path(runs).resolve(), {}
    for done in sorted(runs.glob('*/*/DONE')):
        m = json.loads((done.parent/'manifest.json').read_text())
        homes = {str(runs)} | {str(Path(p).parents[1]) for p in m['parent_folders'].values()}
        command = m['command']
        for home in sorted(homes, key=len, reverse=True): command = command.replace(home, 'runs')
        commit = m.get('commit') and m['commit'] + ' with changes' * bool(m.get('dirty'))
        facts = dict(commit=commit, seed=str(m['seed']),
                     parents=as_parents(m['parent_folders']), command=command,
                     device=m.get('device'),
                     versions=', '.join(f'{k} {v}' for k, v in m.get('versions', {}).items() if v))
        source = 'manifest' + (f' of {note}' if note else '')
        out[f'{m["stage"]}/{done.parent.name}'] = {k: (v, source) for k, v in facts.items() if v}
    return out


def injected(cells:list) -> dict:
    "The parameters that an executed notebook was given."
    told = [''.join(c['source']) for c in cells if 'injected-parameters' in c['metadata'].get('tags', [])]
    return {a.targets[0].id: ast.literal_eval(a.value) for a in ast.parse(told[0]).body} if told else {}


def from_notebooks(root:Path=ROOT) -> dict[str, dict]:
    "Seed, parents and command as the parameters of committed executed notebooks have them."
    out = {}
    for path in sorted(root.glob('data/results/**/*.ipynb')):
        cells = json.loads(path.read_text())['cells']
        told, source = injected(cells), f'executed notebook {path.relative_to(root)}'
        printed = '\n'.join(''.join(o.get('text', '')) for c in cells for o in c.get('outputs', []))
        if (start := re.search(r'^(\S+/\S+) · seed (\d+) ·', printed, re.M)):
            stage = start[1].split('/')[0]
            facts = dict(seed=start[2], parents=as_parents(told.get('parents', {})),
                         command=f'execute({TEMPLATES.get(stage, stage)!r}, {told})')
            out[start[1]] = {k: (v, source) for k, v in facts.items()}
        elif path.parent.name == 'bench':
            table = path.with_suffix('.csv')
            i = told.get('overrides', {}).get('run_id') or (read(table).run_id[0] if table.exists() else '')
            if not i: continue
            known, command = out.setdefault(i, {}), f"execute('nbs/bench/{i.split('-')[1]}.ipynb', {told})"
            before, where = known.get('command', ('', ''))
            known['parents'] = known.get('parents', ('none', source))
            both = filter(None, (before, command)), filter(None, (where, source))
            known['command'] = '; '.join(both[0]), ', '.join(both[1])
    return out


def from_cards(root:Path=ROOT) -> dict[str, dict]:
    "Commit, device and command of shipped models, from their cards."
    out = {}
    for path in sorted(root.glob('data/models/*/README.md')):
        text, source = path.read_text(), f'model card {path.relative_to(root)}'
        if not (run := re.search(r'^\* run: (\S+), commit (\S+), ([^;\n]+)', text, re.M)): continue
        command = re.search(r'^\* command: (.+)$', text, re.M)
        facts = dict(commit='' if run[2] == 'None' else run[2], device=run[3], command=command and command[1])
        out[run[1]] = {k: (v, source) for k, v in facts.items() if v}
    return out


def from_results(root:Path=ROOT) -> dict[str, dict]:
    "Device, versions and seed where columns of the results name them."
    out = {}
    for path, table in tables(root).items():
        source = f'results file {path.relative_to(root)}'
        seeds = 'seed' in table and path.parent.name != 'reliability'        # whose seeds are those of faults
        for cell, rows in table.groupby('run_id'):
            for i in in_cell(cell):
                known = out.setdefault(i, {})
                for k in ('device', 'versions'):
                    if k in rows and rows[k].nunique() == 1: known.setdefault(k, (rows[k].iloc[0], source))
                if seeds: known.setdefault('seeds', {}).update(dict.fromkeys(rows.seed.unique(), source))
    for known in out.values():
        seeds = known.pop('seeds', {})
        if len(seeds) == 1: known['seed'] = next(iter(seeds.items()))
    return out


def from_history(root:Path=ROOT) -> dict[str, dict]:
    "The first commit whose results, figures or model cards hold an id; nothing without git."
    where = 'data/results', 'figures/index.json', 'figures/*/index.json', 'data/models/*/README.md'
    log = 'log', '--reverse', '--topo-order', '-m', '-p', '--unified=0', '--format=%x00%H', '--', *where
    done = subprocess.run(['git', '-C', root, *log], capture_output=True, text=True, errors='replace')
    out, commit = {}, ''
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        if line.startswith('\0'): commit = line[1:]
        elif line.startswith('+'):
            for i in RUN.findall(line):
                out.setdefault(i, {'published': (commit, 'first commit that holds the id')})
    return out


# the table

def merge(old:pd.DataFrame, ids, *sources:dict) -> pd.DataFrame:
    "The old rows, and one for every id; what is not known yet is taken from the first source."
    rows = {r['run_id']: r for r in old.to_dict('records')}
    for i in sorted(set(ids)):
        empty = dict.fromkeys(FACTS, NONE) | dict.fromkeys(OPTIONAL, '') | {'run_id': i, 'found': ''}
        row = rows.setdefault(i, empty)
        where = dict(part.split(': ', 1) for part in row['found'].split('; ') if part)
        for source in sources:
            for k, (value, said) in source.get(i, {}).items():
                if row[k] not in ('', NONE): continue
                row[k] = value; where[said] = ', '.join(filter(None, [where.get(said), k]))
        row['commit'] += f' ({tag})' if (tag := TAGS.get(row['commit'])) else ''
        row['found'] = '; '.join(f'{k}: {v}' for k, v in where.items())
    return pd.DataFrame(sorted(rows.values(), key=lambda r: r['run_id']), columns=COLUMNS)


def problems(table:pd.DataFrame, root:Path=ROOT) -> list[str]:
    "What is wrong with runs.csv beside the results: unknown ids, empty cells, parents that are no ids."
    known, out = set(table.run_id), []
    unknown = {i: files for i, files in sorted(named(root).items()) if i not in known}
    out += [f'{i}, of {min(files)}, has no row: run tools/runs.py' for i, files in unknown.items()]
    out += [f'{i} stands twice' for i in table.run_id[table.run_id.duplicated()]]
    for r in table.itertuples():
        out += [f'{r.run_id}: {k} is empty' for k in FACTS if not getattr(r, k) and k not in OPTIONAL]
        if r.commit != NONE and not re.fullmatch(r'[0-9a-f]{40}( with changes)?( \([\w-]+\))?', r.commit):
            out.append(f'{r.run_id}: {r.commit} is no commit')
        out += [f'{r.run_id}: parent {p} has no row' for p in parent_ids(r.parents) if p not in known]
        if r.replaces and r.replaces not in known:
            out.append(f'{r.run_id}: it replaces {r.replaces}, which has no row')
    return out


def update(runs=(), root:Path=ROOT, note:str='', facts:dict|None=None) -> pd.DataFrame:
    "Write runs.csv anew from what is there, from run folders and from `facts`; parents get rows too."
    manifests = {}
    for folder in runs: manifests |= from_manifests(folder, note)
    found = (manifests, from_notebooks(root), from_cards(root), facts or {}, from_results(root),
             from_history(root))
    path, ids = root/'data/results/runs.csv', set(named(root))
    while True:
        table = merge(read(path), ids, *found)
        more = {p for cell in table.parents for p in parent_ids(cell)} - ids
        if not more: break
        ids |= more
    table.to_csv(path, index=False, lineterminator='\n')
    return table


def main(arguments=None):
    "The command."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', nargs='*', type=Path, help='folders of run folders')
    p.add_argument('--note', default='', help='whose manifests these are, for the column `found`')
    p.add_argument('--facts', type=Path, help='JSON: run id -> {fact: [value, where it comes from]}')
    p.add_argument('--check', action='store_true', help='write nothing, say what is wrong')
    a = p.parse_args(arguments)
    facts = json.loads(a.facts.read_text()) if a.facts else {}
    table = read(ROOT/'data/results/runs.csv') if a.check else update(a.runs, ROOT, a.note, facts)
    wrong = problems(table)
    print(*wrong, sep='\n')
    print(f'{len(table)} runs, {sum(table.commit != NONE)} with the commit that computed them')
    sys.exit(bool(wrong))


if __name__ == '__main__': main()
