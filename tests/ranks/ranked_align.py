"What every rank of tests/ranks/test_align_ranks.py runs: 16 bits would round each share of a batch in its own way."
from saferlhf.apps import align
from saferlhf.reproduction import training

_on_rank = align._on_rank


def on_rank(folder):
    training.fast_precision = lambda: 'fp32'
    _on_rank(folder)
