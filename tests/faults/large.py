"""Rows by the hundred thousand: what reading them costs, in seconds and memory, each in a process of its own.

    python tests/faults/large.py 1000000 big.jsonl      # mild synthetic preferences, about 1 kB a row
"""
import csv
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

WORDS = ('the a garden bicycle kettle letter morning recipe window river market lesson holiday blanket candle ladder music '
         'gentle quiet bright simple careful warm early often slowly mostly first then water paint mend carry open share learn '
         'measure plan rest listen walk choose keep write begin with from under beside before after and or if because').split()


def preferences(n, size=430):
    "Rows of PKU-SafeRLHF's native layout, the same for every call; two in three prompts occur twice. `size`: characters of an answer."
    g = random.Random(0)
    text = ' '.join(g.choice(WORDS) for _ in range(20_000))
    def words(length):
        start = text.index(' ', g.randrange(len(text) - length - 20)) + 1
        return text[start:start + length].strip()
    for i in range(n):
        a, b = words(size + g.randrange(-80, 80)), words(size + g.randrange(-80, 80))
        safe = g.random() < .6, g.random() < .6
        safer = int(safe[1]) if safe[0] != safe[1] else g.randrange(2)
        yield dict(prompt=f'Question {i * 2 // 3}: how do I {words(60)}?', response_0=f'{a}, {i}.', response_1=f'{b}, {i}!',
                   better_response_id=g.randrange(2), safer_response_id=safer, is_response_0_safe=safe[0], is_response_1_safe=safe[1])


def write(path, n):
    with open(path, 'w', encoding='utf-8') as f: f.writelines(json.dumps(r) + '\n' for r in preferences(n))


# --- the group
ROWS = int(os.environ.get('FAULTS_ROWS', 100_000))
MOST = 3000                                    # MB of memory (resident, at its highest), whatever the number of rows
READ = '''import hashlib, json, resource, sys, time
from saferlhf.data import load_preferences
from saferlhf.hardware.table import rows_of
began, sha = time.time(), hashlib.sha256()
rows = load_preferences(sys.argv[1]); took = time.time() - began
for r in rows_of(rows): sha.update(json.dumps({k: v for k, v in r.items() if k not in ('id', 'source')}).encode())
print(json.dumps([len(rows), took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, sha.hexdigest()]))'''


def layouts(folder, n):
    "The same rows as a file of each kind, written row by row."
    import pyarrow as pa
    import pyarrow.parquet as pq
    paths = {k: folder/f'rows.{k}' for k in ('jsonl', 'json', 'csv', 'parquet', 'jsonl.gz')}
    rows = lambda: preferences(n)
    first = next(rows())
    with open(paths['jsonl'], 'w') as f: f.writelines(json.dumps(r) + '\n' for r in rows())
    with open(paths['json'], 'w') as f:
        for i, r in enumerate(rows()): f.write(('[' if not i else ',\n') + json.dumps(r))
        f.write(']')
    with open(paths['csv'], 'w', newline='') as f: w = csv.DictWriter(f, [*first]); w.writeheader(); w.writerows(rows())
    schema = pa.Table.from_pylist([first]).schema
    with pq.ParquetWriter(paths['parquet'], schema) as w:
        some = []
        for i, r in enumerate(rows()):
            some.append(r)
            if len(some) == 50_000 or i == n - 1: w.write_table(pa.Table.from_pylist(some, schema)); some = []
    with gzip.open(paths['jsonl.gz'], 'wt', compresslevel=1) as f: f.writelines(json.dumps(r) + '\n' for r in rows())
    return paths


def verdict(good, seconds, memory, what):
    return f'{"" if good and memory < MOST else "FAILED: "}{seconds:.0f} s, {memory / 1000:.1f} GB, {what}'


def read_one(table, env, kind, path, same, seed):
    "Reading alone: the same rows from every layout, and a bar meanwhile."
    p = subprocess.run([sys.executable, '-c', READ, path], env=env, capture_output=True, text=True, timeout=3000)
    if p.returncode: return table.add(f'{ROWS} rows', 'load_preferences', 'datasets', seed, kind, 0, f'FAILED: {p.stderr[-300:]}', '', '')
    n, seconds, memory, sha = json.loads(p.stdout)
    good = n == ROWS and same.setdefault('rows', sha) == sha and '100%' in p.stderr
    what = verdict(good, seconds, memory, 'the same rows, progress shown')
    table.add(f'{ROWS} rows', 'load_preferences', 'datasets', seed, kind, n, what, 0, '')


def peak(pid): return int(re.search(r'VmHWM:\s*(\d+)', Path(f'/proc/{pid}/status').read_text())[1]) / 1024


def train_one(lab, table, env, command, path, seed):
    "A command on these rows, to its third training step; then it is stopped."
    runs, log = lab.fresh('large-runs'), lab.folder/'large.log'
    argv = f'{command} --model {ROOT}/data/models/nano --data {path} --batch-size 16 --max-prompt-tokens 32 --max-new-tokens 32'.split()
    code = f'import sys; from saferlhf.apps.commands import main; sys.exit(main({argv!r}))'
    began = time.time()
    env = env | dict(SAFERLHF_RUNS=str(runs))
    with open(log, 'w') as f: p = subprocess.Popen([sys.executable, '-c', code], env=env, stdout=f, stderr=f)
    steps = lambda: sum(x.read_bytes().count(b'\n') for x in runs.glob(f'{command}/*/metrics.jsonl'))
    while p.poll() is None and steps() < 3: time.sleep(.05)
    seconds, memory = time.time() - began, peak(p.pid) if p.poll() is None else 0
    p.send_signal(signal.SIGTERM); p.wait(60)
    said = log.read_text()
    good = steps() >= 3 and 'splitting by prompt' in said and 'again' in said
    table.add(f'{ROWS} rows', f'saferlhf {command}', 'torch', seed, 'third step', ROWS,
              verdict(good, seconds, memory, 'progress shown') + ('' if good else f': {said[-300:]}'), 0, '')


def cases(lab, table):
    env, same, folder = lab.env(lab.fresh('large-runs')), {}, lab.fresh('large')
    folder.mkdir()
    paths = layouts(folder, ROWS)
    for seed, (kind, path) in enumerate(paths.items()): read_one(table, env, kind, path, same, seed)
    for seed, command in enumerate(('reward', 'cost')): train_one(lab, table, env, command, paths['jsonl'], seed)


if __name__ == '__main__': write(sys.argv[2], int(sys.argv[1]))
