"""From a model and three files to a policy that answers: `saferlhf example example` writes files to try it with.
They ask for harmful things, and some of their answers give them."""
from pathlib import Path

from saferlhf.apps.align import align
from saferlhf.apps.chat import chat
from saferlhf.apps.stages import cost, reward, sft


def five_calls(model, files, training=None, alignment=None):
    start = sft(model, Path(files)/'answers.jsonl', training)                      # learns to answer
    helps = reward(start, Path(files)/'preferences.jsonl', training)               # which answer helps more
    harms = cost(start, Path(files)/'preferences.jsonl', training)                 # which one is harmful
    policy = align(start, helps, harms, Path(files)/'prompts.jsonl', 0., alignment) # reward, mean cost at most 0
    chat(policy, beside=start)                                                     # each answer with both numbers


if __name__ == '__main__':                          # 200 rows are few: without force, weak score models are refused
    five_calls('smollm2', 'example', alignment=dict(force=True))
