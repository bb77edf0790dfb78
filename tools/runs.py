"""data/results/runs.csv: a row for every run that a committed result names.

    python tools/runs.py [RUNS ...] [--note TEXT] [--check]

RUNS are folders of run folders (`runs/`), whose manifests say what is known of a run; what no manifest says
is 'not recorded' and can be filled in by hand. Rows and facts that are there already are kept, so the file
outlives the run folders. A benchmark has no manifest: its device and versions are columns of its results.
Columns: `commit` computed the run, as its manifest says; `published` first held its id; with the code of
`same_code` the same settings, data and parents give the same id again; `replaces` names an earlier run;
`found` says where each fact comes from.
"""
import argparse
import json
import re
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from saferlhf.record.escape import csv_text, read_csv  # noqa: E402
from saferlhf.record.files import whole_table  # noqa: E402

NONE = 'not recorded'
FACTS = 'commit', 'published', 'same_code', 'seed', 'parents', 'command', 'device', 'versions', 'replaces'
OPTIONAL = 'same_code', 'replaces'                                     # empty where there is nothing to say
COLUMNS = ['run_id', *FACTS, 'found']
RUN = re.compile(r'(?<![\w-])([a-z][a-z_-]*/[A-Za-z][\w.-]*-[0-9a-f]{12}'
                 r'|bench-[a-z_]+-\d{8}(?:-[a-z0-9]+)?)(?![\w-])')
PLACES = ('data/results/**/*.ipynb', 'data/results/**/*.txt', 'data/models/*/README.md',
          'figures/**/index.json')


def read(path:Path) -> pd.DataFrame:
    "A table as text; an empty runs.csv where there is none."
    if not path.exists(): return pd.DataFrame(columns=COLUMNS)
    return read_csv(whole_table(path), dtype=str, keep_default_na=False)


def tables(root:Path) -> dict[Path, pd.DataFrame]:
    "The committed results with a column `run_id`, as text; runs.csv itself left out."
    found = {p: read(p) for p in sorted(root.glob('data/results/**/*.csv')) if p.name != 'runs.csv'}
    return {p: t for p, t in found.items() if 'run_id' in t}


def named(root:Path=ROOT) -> dict[str, set[str]]:
    "Run id -> the committed files that name it; a cell of a table may hold several ids."
    found = {path: ' '.join(table.run_id.unique()).replace(';', ' ').replace(',', ' ').split()
             for path, table in tables(root).items()}
    found |= {path: RUN.findall(path.read_text(encoding='utf-8')) for pattern in PLACES for path in root.glob(pattern)}
    out = {}
    for path, ids in found.items():
        for i in ids: out.setdefault(i, set()).add(str(path.relative_to(root)))
    return out


def parent_ids(cell:str) -> list[str]:
    "The ids of a cell of the column `parents`."
    return [] if cell in (NONE, 'none') else [p.split('=', 1)[1] for p in cell.split()]


def from_manifests(runs:Path, note:str='') -> dict[str, dict]:
    "Run id -> fact -> (value, its source), from manifests of finished runs, without paths of the machine."
    runs, out, source = Path(runs).resolve(), {}, f'manifest of {note}' if note else 'manifest'
    for done in sorted(runs.glob('*/*/DONE')):
        m = json.loads((done.parent/'manifest.json').read_bytes())
        parents, command = {role: runs/p for role, p in m['parent_folders'].items()}, m['command']
        homes = {str(runs), *(str(p.parents[1]) for p in parents.values())}
        for home in sorted(homes, key=len, reverse=True): command = command.replace(home, 'runs')
        facts = dict(commit=m.get('commit') and m['commit'][:12] + ' with changes' * bool(m.get('dirty')),
                     seed=str(m['seed']),
                     parents=' '.join(f'{r}={"/".join(p.parts[-2:])}' for r, p in parents.items()) or 'none',
                     command=command, device=m.get('device'),
                     versions=', '.join(f'{k} {v}' for k, v in m.get('versions', {}).items() if v))
        out[f'{m["stage"]}/{done.parent.name}'] = {k: (v, source) for k, v in facts.items() if v}
    return out


def merge(old:pd.DataFrame, ids, manifests:dict) -> pd.DataFrame:
    "The old rows, and one for every id; what is not known yet is taken from the manifests."
    rows = {r['run_id']: r for r in old.to_dict('records')}
    for i in sorted(set(ids)):
        empty = dict.fromkeys(FACTS, NONE) | dict.fromkeys(OPTIONAL, '') | {'run_id': i, 'found': ''}
        row, new = rows.setdefault(i, empty), {}
        for k, (value, source) in manifests.get(i, {}).items():
            if row[k] in ('', NONE): row[k] = value; new.setdefault(source, []).append(k)
        found = [row['found'], *(f'{source}: {", ".join(facts)}' for source, facts in new.items())]
        row['found'] = '; '.join(filter(None, found))
    return pd.DataFrame(sorted(rows.values(), key=lambda r: r['run_id']), columns=COLUMNS)


def problems(table:pd.DataFrame, root:Path=ROOT) -> list[str]:
    "What is wrong with runs.csv beside the results: unknown ids, empty cells, parents that are no ids."
    known, commit = set(table.run_id), re.compile(NONE + r'|[0-9a-f]{12}( with changes)?( \([\w-]+\))?')
    out = [f'{i}, of {min(files)}, has no row: run tools/runs.py'
           for i, files in sorted(named(root).items()) if i not in known]
    out += [f'{i} stands twice' for i in table.run_id[table.run_id.duplicated()]]
    for r in table.itertuples():
        wrong = [f'{k} is empty' for k in FACTS if not getattr(r, k) and k not in OPTIONAL]
        wrong += [f'{r.commit} is no commit'] * (not commit.fullmatch(r.commit))
        wrong += [f'parent {p} has no row' for p in parent_ids(r.parents) if p not in known]
        wrong += [f'it replaces {r.replaces}, which has no row'] * (r.replaces not in known | {''})
        out += [f'{r.run_id}: {w}' for w in wrong]
    return out


def update(runs=(), root:Path=ROOT, note:str='') -> pd.DataFrame:
    "Write runs.csv anew from what is there and from run folders; parents get rows too."
    manifests = {i: facts for folder in runs for i, facts in from_manifests(folder, note).items()}
    path, ids = root/'data/results/runs.csv', set(named(root))
    table = read(path)
    while ids:
        table = merge(table, ids, manifests)
        ids = {p for cell in table.parents for p in parent_ids(cell)} - set(table.run_id)
    path.write_text(csv_text(table), encoding='utf-8')
    return table


def main():
    "The command."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', nargs='*', type=Path, help='folders of run folders')
    p.add_argument('--note', default='', help='whose manifests these are, for the column `found`')
    p.add_argument('--check', action='store_true', help='write nothing, say what is wrong')
    a = p.parse_args()
    table = read(ROOT/'data/results/runs.csv') if a.check else update(a.runs, ROOT, a.note)
    wrong = problems(table)
    print(*wrong, sep='\n')
    print(f'{len(table)} runs, {sum(table.commit != NONE)} with the commit that computed them')
    sys.exit(bool(wrong))


if __name__ == '__main__': main()
