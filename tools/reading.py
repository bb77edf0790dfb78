"""Packets for readers, and what readers said, as a shipped file. The texts are offensive.

    python tools/reading.py packets FOLDER        # answers and pairs of the test part that people labelled; prints the keys' hashes
    python tools/reading.py join FOLDER READER    # checks the replies, writes data/readings/people.jsonl.xz

Each KIND-00.md of the folder is given to one reader, who has seen none of the others, and whose replies go to KIND-00.jsonl beside it.
The hashes go into data/readings/people.json, which is committed before anybody reads.
"""
import json
import lzma
import sys
from pathlib import Path

from saferlhf.data import shipped
from saferlhf.reproduction.prompts import labelled_answers, shuffled
from saferlhf.reproduction.reading import packets, read_back, rubric

READER = ('a fresh instance for each packet, told: you are a careful annotator for a safety research project; read the whole file '
          'yourself, judge each item by your own reading, write one line of JSON for each; open no other file; do not label with a program')
HOME = Path(__file__).resolve().parents[1]/'data/readings'
SIZES = dict(answers=dict(size=40, twice=.2), pairs=dict(size=49, twice=1.), overall=dict(size=49, twice=1.))


def items(answers=200):
    "Kind of packet -> its items: people's answers, one a prompt; the pairs that people and a model ranked twice, by help and by harm."
    found = {}
    for r in shuffled(labelled_answers('test', human=True), 'reading'): found.setdefault(str(r['prompt']), r)
    pairs = [{k: r[k] for k in ('prompt', 'response_0', 'response_1', 'better_response_id', 'safer_response_id', 'source')}
             for r in shipped('decoupled', 'test').to_list() if r['label_source_better'] == r['label_source_safer'] == 'human+ai']
    return dict(answers=[*found.values()][:answers], pairs=pairs, overall=pairs)


def write(folder):
    hashes = {kind: packets(kind, rows, folder, **SIZES[kind]) for kind, rows in items().items()}
    HOME.mkdir(parents=True, exist_ok=True)
    told = dict(keys=hashes, rubrics={kind: rubric(kind) for kind in hashes}, items={k: len(v) for k, v in items().items()})
    (HOME/'people.json').write_text(json.dumps(told, indent=1) + '\n', encoding='utf-8')
    print(json.dumps(hashes, indent=1))


def join(folder, reader):
    told = json.loads((HOME/'people.json').read_bytes())
    rows = [dict(kind=kind, **row) for kind, mark in told['keys'].items() for row in read_back(kind, folder, mark)]
    with lzma.open(HOME/'people.jsonl.xz', 'wt', encoding='utf-8', preset=9) as f:
        f.writelines(json.dumps(r, ensure_ascii=False) + '\n' for r in rows)
    (HOME/'people.json').write_text(json.dumps(told | dict(reader=reader, how=READER), indent=1) + '\n', encoding='utf-8')
    print(f'{len(rows)} verdicts of {reader}')


if __name__ == '__main__':
    if sys.argv[1:2] not in (['packets'], ['join']): sys.exit(__doc__)
    dict(packets=write, join=join)[sys.argv[1]](*sys.argv[2:])
