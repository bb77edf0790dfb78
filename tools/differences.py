"""How published results differ from those of another commit, as a Markdown table.

    python tools/differences.py results-v1 cpu

Rows are what two files of the profile say at both commits: the answers of each policy (models.csv, sampled answers
to unsafe prompts) and the score models on held-out labels (table1.csv, by people). Nothing is averaged over seeds.
"""
import argparse
import io
import subprocess
from pathlib import Path

import pandas as pd
from saferlhf.record.escape import markdown_text, read_csv

ROOT = Path(__file__).resolve().parent.parent


def table(text:str, name:str, seed:int) -> pd.Series:
    "What a file says of one seed: (what, of whom) -> value."
    d = read_csv(io.StringIO(text)).query('seed == @seed')
    if name == 'models':
        d = d[(d.prompt_kind == 'unsafe') & (d.decoding == 'sampled')]
        d = d[d.judge.isin(['gold', 'judge', 'tfidf'])]
        d = d.melt(['policy', 'judge'], ['harmful', 'reward', 'refused', 'length'], 'what')
        d = d[(d.what == 'harmful') | (d.judge == 'gold')]          # the others do not depend on the judge
        rows = {(f'{r.what}, by {r.judge}', r.policy): r.value for r in d.itertuples()}
    else:
        d = d[(d.label_source == 'human') & d.model.isin(['reward', 'cost']) & (d['round'] == 'unified')]
        rows = {(f'{r.model} model, {r.metric}, people', f'round {r.round}'): r.value for r in d.itertuples()}
    return pd.Series(rows).dropna()


def main(commit:str, profile:str, seed:int) -> str:
    lines = ['| what | of | before | now |', '| --- | --- | --- | --- |']
    for name in ('models', 'table1'):
        path = f'data/results/{profile}/{name}.csv'
        show = ['git', '-C', str(ROOT), 'show', f'{commit}:{path}']
        old = table(subprocess.run(show, capture_output=True, check=True, encoding='utf-8').stdout, name, seed)
        new = table((ROOT/path).read_text(encoding='utf-8'), name, seed)
        for key in new.index.union(old.index, sort=False):
            before, now = (f'{x[key]:.3g}' if key in x else '' for x in (old, new))
            lines.append(f'| {markdown_text(key[0])} | {markdown_text(key[1])} | {before} | {now} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('commit', help='whose results stand under "before"'); p.add_argument('profile')
    p.add_argument('--seed', type=int, default=0)
    a = p.parse_args(); print(main(a.commit, a.profile, a.seed))
