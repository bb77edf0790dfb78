"""data/results/runs.csv: a row for every run that a committed result names.

    python tools/runs.py [RUNS ...] [--note TEXT] [--check]

RUNS are folders of run folders (`runs/`), whose manifests know most. What no manifest tells is taken from executed notebooks, from columns of the
results and from the history of the repository; what none of them tells is 'not recorded', and `found` says where each fact comes from. Rows and facts
that are there already are kept, so the file outlives the run folders.
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
FACTS = 'commit', 'published', 'seed', 'parents', 'command', 'device', 'versions', 'replaces'
COLUMNS = ['run_id', *FACTS, 'found']
RUN = re.compile(r'(?<![\w-])([a-z][a-z_-]*/[A-Za-z][\w.-]*-[0-9a-f]{12}|bench-[a-z_]+-\d{8}(?:-[a-z0-9]+)?)(?![\w-])')
PLACES = 'data/results/**/*.ipynb', 'data/results/**/*.txt', 'data/models/*/README.md', 'figures/**/index.json'
TAGS = {'515758e760e2299c4450f3bf0de70d5750a6ced5': 'results-v1'}              # commits that results are compared with
TEMPLATES = {'reward': 'score_model', 'cost': 'score_model', 'judge': 'score_model',
             'reward-only': 'policy', 'cost-only': 'policy', 'shaped': 'policy'}  # stage -> its template, where names differ


def tables(root:Path) -> dict[Path, pd.DataFrame]:
    "The committed results with a column `run_id`, as text; runs.csv itself left out."
    out = {p: pd.read_csv(p, dtype=str, keep_default_na=False) for p in sorted(root.glob('data/results/**/*.csv')) if p.name != 'runs.csv'}
    return {p: t for p, t in out.items() if 'run_id' in t}


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


def from_manifests(runs:Path, note:str='') -> dict[str, dict]:
    "Run id -> what the manifest of each finished run tells, without paths of the machine."
    out = {}
    for done in sorted(Path(runs).resolve().glob('*/*/DONE')):
        m = json.loads((done.parent/'manifest.json').read_text())
        homes = {str(Path(p).parents[1]) for p in [done.parent/'_', *m['parent_folders'].values()] if p} | {str(Path(runs).resolve())}
        homes = {h for h in homes if h.startswith('/')}
        command = m['command']
        for home in sorted(homes, key=len, reverse=True): command = command.replace(home, 'runs')
        facts = dict(commit=m.get('commit') and m['commit'] + (' with changes' if m.get('dirty') else ''), seed=str(m['seed']),
                     parents=as_parents(m['parent_folders']), command=command, device=m.get('device'),
                     versions=', '.join(f'{k} {v}' for k, v in (m.get('versions') or {}).items() if v))
        source = 'manifest' + (f' of {note}' if note else '')
        out[f"{m['stage']}/{done.parent.name}"] = {k: (v, source) for k, v in facts.items() if v}
    return out


def from_notebooks(root:Path=ROOT) -> dict[str, dict]:
    "Run id -> seed, parents and command as the parameters of a committed executed notebook have them."
    out = {}
    for path in sorted(root.glob('data/results/**/*.ipynb')):
        cells = json.loads(path.read_text())['cells']
        told = [c for c in cells if 'injected-parameters' in c['metadata'].get('tags', [])]
        if not told: continue
        lines = ast.parse(''.join(told[0]['source'])).body
        told = {a.targets[0].id: ast.literal_eval(a.value) for a in lines}
        text = '\n'.join(''.join(o.get('text', '')) for c in cells for o in c.get('outputs', []))
        source = f'executed notebook {path.relative_to(root)}'
        if (start := re.search(r'^(\S+/\S+) · seed (\d+) ·', text, re.M)):
            i, stage = start[1], start[1].split('/')[0]
            facts = dict(seed=start[2], parents=as_parents(told.get('parents', {})), command=f'execute({TEMPLATES.get(stage, stage)!r}, {told})')
        elif (i := told.get('overrides', {}).get('run_id')):
            facts = dict(parents='none', command=f"execute('nbs/bench/{i.split('-')[1]}.ipynb', {told})")
        else: continue
        known = out.setdefault(i, {})
        for k, v in facts.items(): known[k] = (f'{known[k][0]}; {v}', f'{known[k][1]}, {path.name}') if k == 'command' and k in known else (v, source)
    for path in sorted(root.glob('data/results/bench/*.ipynb')):                   # a benchmark that named its run by itself
        table = path.with_suffix('.csv')
        if not table.exists(): continue
        cells = json.loads(path.read_text())['cells']
        told = [''.join(c['source']) for c in cells if 'injected-parameters' in c['metadata'].get('tags', [])]
        told = {a.targets[0].id: ast.literal_eval(a.value) for a in ast.parse(told[0]).body} if told else {}
        for i in pd.read_csv(table).run_id.unique():
            source = f'executed notebook {path.relative_to(root)}'
            out.setdefault(i, {}).update(parents=('none', source), command=(f"execute('nbs/bench/{path.name}', {told})", source))
    return out


def from_results(root:Path=ROOT) -> dict[str, dict]:
    "Run id -> device, versions and seed where columns of the results name them."
    out = {}
    for path, table in tables(root).items():
        seeds = 'seed' in table and path.parent.name != 'reliability'              # there, a seed is that of the fault
        for cell, rows in table.groupby('run_id'):
            for i in in_cell(cell):
                known, source = out.setdefault(i, {}), f'results file {path.relative_to(root)}'
                for k in ('device', 'versions'):
                    if k in rows and len(v := rows[k].unique()) == 1: known.setdefault(k, (v[0], source))
                if seeds: known.setdefault('seeds', {}).update(dict.fromkeys(rows.seed.unique(), source))
    for known in out.values():
        seeds = known.pop('seeds', {})
        if len(seeds) == 1: known['seed'] = next(iter(seeds.items()))
    return out


def git(*arguments:str, root:Path=ROOT) -> str:
    "What git prints; '' where it cannot."
    done = subprocess.run(['git', '-C', root, *arguments], capture_output=True, text=True, errors='replace')
    return done.stdout if done.returncode == 0 else ''


def from_history(root:Path=ROOT) -> dict[str, dict]:
    "Run id -> the first commit whose results, figures or model cards hold it."
    out, commit = {}, ''
    log = git('log', '--reverse', '-m', '--topo-order', '-p', '--unified=0', '--format=%x00%H', '--', 'data/results', 'figures/**/index.json',
              'figures/index.json', 'data/models/*/README.md', root=root)
    for line in log.splitlines():
        if line.startswith('\0'): commit = line[1:]
        elif line.startswith('+'):
            for i in RUN.findall(line): out.setdefault(i, {'published': (commit, 'first commit that holds the id')})
    return out


def merge(old:pd.DataFrame, ids, *sources:dict) -> pd.DataFrame:
    "The old rows, and one for every id; a fact that is there stays, one that is not is taken from the first source that knows it."
    rows = {r.run_id: r._asdict() for r in old.itertuples(index=False)}
    for i in sorted(set(ids)):
        row = rows.setdefault(i, {'run_id': i, 'found': ''} | dict.fromkeys(FACTS, NONE) | {'replaces': ''})
        where = dict(part.split(': ', 1) for part in row['found'].split('; ') if ': ' in part)
        for source in sources:
            for k, (value, said) in source.get(i, {}).items():
                if row[k] not in ('', NONE): continue
                row[k] = value; where[said] = ', '.join(filter(None, [where.get(said), k]))
        row['found'] = '; '.join(f'{k}: {v}' for k, v in where.items())
    return pd.DataFrame(sorted(rows.values(), key=lambda r: r['run_id']), columns=COLUMNS)


def read(path:Path) -> pd.DataFrame:
    "runs.csv as text, or an empty table."
    return pd.read_csv(path, dtype=str, keep_default_na=False) if path.exists() else pd.DataFrame(columns=COLUMNS)


def parent_ids(cell:str) -> list[str]:
    "The ids of a cell of the column `parents`."
    return [] if cell in (NONE, 'none') else [p.split('=', 1)[1] for p in cell.split()]


def problems(table:pd.DataFrame, root:Path=ROOT) -> list[str]:
    "What is wrong with runs.csv beside the committed results: unknown ids, empty cells, parents that are no ids."
    known, out = set(table.run_id), []
    out += [f'{i}, of {min(files)}, has no row: run tools/runs.py' for i, files in sorted(named(root).items()) if i not in known]
    out += [f'{i} stands twice' for i in table.run_id[table.run_id.duplicated()]]
    for r in table.itertuples():
        out += [f'{r.run_id}: {k} is empty' for k in FACTS if not getattr(r, k) and k != 'replaces']
        if r.commit != NONE and not re.fullmatch(r'[0-9a-f]{40}( with changes)?( \([\w-]+\))?', r.commit): out.append(f'{r.run_id}: {r.commit} is no commit')
        out += [f'{r.run_id}: parent {p} has no row' for p in parent_ids(r.parents) if p not in known]
        if r.replaces and r.replaces not in known: out.append(f'{r.run_id}: it replaces {r.replaces}, which has no row')
    return out


def update(runs=(), root:Path=ROOT, note:str='') -> pd.DataFrame:
    "Write data/results/runs.csv anew from what is there and from run folders; ids of parents get rows too."
    path = root/'data/results/runs.csv'
    manifests = {}
    for folder in runs: manifests |= from_manifests(folder, note)
    sources = manifests, from_notebooks(root), from_results(root), from_history(root)
    ids = set(named(root))
    while True:
        table = merge(read(path), ids, *sources)
        table['commit'] = [f'{c} ({TAGS[c]})' if c in TAGS else c for c in table.commit]
        more = {p for cell in table.parents for p in parent_ids(cell)} - set(table.run_id)
        if not more: break
        ids |= more
    table.to_csv(path, index=False, lineterminator='\n')
    return table


def main(arguments=None):
    "The command."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', nargs='*', type=Path, help='folders of run folders')
    p.add_argument('--note', default='', help="whose manifests these are, for the column `found`")
    p.add_argument('--check', action='store_true', help='write nothing, say what is wrong')
    a = p.parse_args(arguments)
    table = read(ROOT/'data/results/runs.csv') if a.check else update(a.runs, ROOT, a.note)
    wrong = problems(table)
    print(*wrong, f'{len(table)} runs, {sum(table.commit != NONE)} with the commit that computed them', sep='\n')
    sys.exit(bool(wrong))


if __name__ == '__main__': main()
