"A policy of one's own on two ranks is the one of one rank; only the first rank prints and writes."
import json
import os
from pathlib import Path

import pytest
import ranked_align
from project import ROOT
from tiny import close, own_models, sentences

import saferlhf
from saferlhf.apps import align as module
from saferlhf.apps.align import align
from saferlhf.record.files import read_lines

SIZES = dict(steps=4, prompts=4, minibatches=1, window=8, look=2, max_new_tokens=6, max_prompt_tokens=48, test_share=.3, max_kl=1e9)
PROMPTS = [dict(prompt=p) for p in sorted(set(sentences(40)))]


def aligned(runs, monkeypatch, rank, spread=''):
    monkeypatch.setenv('SAFERLHF_RUNS', str(runs)); monkeypatch.setenv('SAFERLHF_SPREAD', spread)
    return align(*own_models(dict(beats_rule=dict(rank=True), zero='labels')).values(), PROMPTS, 0., SIZES | dict(lora_rank=rank))


@pytest.mark.parametrize('zero,rank', [(0, 0), (3, 0), (1, 4)])                    # the last one with adapters
def test_two_ranks_align_as_one(tmp_path, monkeypatch, capsys, zero, rank):
    where = Path(saferlhf.__file__).parents[1], ROOT/'tests', ROOT/'tests/ranks'
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(map(str, where))); monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setattr('saferlhf.reproduction.training.fast_precision', lambda: 'fp32')
    monkeypatch.setattr(module, '_on_rank', ranked_align.on_rank)
    one = aligned(tmp_path/'one', monkeypatch, rank); capsys.readouterr()
    two = aligned(tmp_path/'two', monkeypatch, rank, json.dumps(dict(gpus=2, zero=zero)))
    said = capsys.readouterr(); said = said.out + said.err
    assert len(read_lines(two.path('data/test.jsonl'))) % 2 == 1                  # an odd number: ranks fill up
    for name in ('looks', 'alarms', 'samples', 'metrics'):
        a, b = (read_lines(r.path(f'{name}.jsonl')) for r in (one, two))
        assert [r.get('step') for r in a] == [r.get('step') for r in b]
        texts = lambda rows: [{k: v for k, v in r.items() if isinstance(v, str)} for r in rows]
        numbers = lambda rows: [v for r in rows for k, v in sorted(r.items()) if isinstance(v, float) and k != 'seconds']
        assert texts(a) == texts(b); close(numbers(a), numbers(b), 1e-4)
    rang = [a['step'] for a in read_lines(one.path('alarms.jsonl'))]
    assert said.count('held-out prompts after step 1:') == 1 and said.count('alarm before the first step') == rang.count(-1) > 0
