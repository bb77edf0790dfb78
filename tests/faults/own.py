"""Commands of one's own, publishing and drawing, killed at a file that is about to be, or has just been, put in its place.

    python own.py make|align|adapters|rounds|judging|publish|draw [NUMBER OF THE FILE, before|after]

`make` leaves the tiny models that the others start from. What an endpoint replies counts as a file, too.
"""
import itertools
import json
import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]
RUNS = Path(os.environ['SAFERLHF_RUNS'])
MODELS = RUNS/'models.json'
SIZES = dict(steps=4, prompts=4, minibatches=1, window=8, max_new_tokens=6, max_prompt_tokens=48, test_share=.3, actor_lr=3e-4, force=True)


def judge(prompts, answers): # more words are better, the letter e is harmful
    return [float(len(a.split())) for a in answers], [a.count('e') - .5 for a in answers]


def speaker(): # a tiny model that has learned to say words
    import torch
    from tiny import sentences, tokenizer
    from saferlhf.models import tiny_model
    from saferlhf.text import encode_prompt, encode_response, pad
    torch.manual_seed(0)
    model, rows = tiny_model('llama', len(tokenizer()), 0), zip(sentences(64, 1), sentences(64, 2), strict=True)
    ids, mask = pad([encode_prompt(p, tokenizer(), 48) + encode_response(a, tokenizer(), 20) for p, a in rows], 0)
    optim = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optim.zero_grad(); loss.backward(); optim.step()
    return model


def make():
    from tiny import finished, scorer, tokenizer
    good = dict(beats_rule=dict(rank=True, sign=True), zero='labels')
    models = dict(policy=finished('sft', speaker(), rows=[dict(prompt='how', response='sure please')] * 2))
    models |= dict(other=finished('sft', speaker(), dict(second=True), name='other'))
    models |= {k: finished(k, scorer(vocab=len(tokenizer()), seed=i, kind=k), good) for i, k in enumerate(('reward', 'cost'), 5)}
    MODELS.write_text(json.dumps({k: str(p.relative_to(RUNS.resolve())) for k, p in models.items()}))


def prompts():
    from tiny import sentences
    return [dict(prompt=p) for p in sorted(set(sentences(40)))]


def models(): return {k: RUNS/p for k, p in json.loads(MODELS.read_text()).items()}


def three(): return [models()[k] for k in ('policy', 'reward', 'cost')]


def align():
    from saferlhf.apps.align import align
    align(*three(), prompts(), 0., SIZES | dict(look=2))


def adapters():
    from saferlhf.apps.align import align
    align(*three(), prompts(), 0., SIZES | dict(look=2, lora_rank=2))


def judging(): # an endpoint, whose replies are kept, and a cost model compare two policies
    from saferlhf.apps.judge import judge as compare
    a, b, cost = (models()[k] for k in ('policy', 'other', 'cost'))
    by = [f'safer={os.environ["ENDPOINT"]}', f'cost={cost}']
    compare(a, b, prompts(), by, dict(rows=24, max_new_tokens=6, batch_size=2), dict(yes=True))


def rounds():
    from saferlhf.apps.rounds import rounds
    rounds(models()['policy'], judge, prompts(), 2, 0., SIZES | dict(steps=2, collect=12, scores=dict(epochs=1, batch_size=8, lr=1e-3)))


def publish():
    from saferlhf.reproduction.results import publish_all
    publish_all('smoke', 0)


def draw():
    from saferlhf.reproduction.pipeline import draw
    draw('smoke', 0)


def count_files(n, when):
    "Kill this process before, or after, the n-th file or folder is put in its place; -> how many there were."
    numbers, count = itertools.count(1), [0]
    def counted(inner):
        def place(*a):
            count[0] = k = next(numbers)                                            # several threads ask an endpoint
            if k == n and when == 'before': os.kill(os.getpid(), signal.SIGKILL)
            made = inner(*a)
            if k == n: os.kill(os.getpid(), signal.SIGKILL)
            return made
        return place
    os.replace, os.rename = counted(os.replace), counted(os.rename)
    from saferlhf.apps.endpoint import Endpoint
    Endpoint._reply = counted(Endpoint._reply)
    return count


if __name__ == '__main__':
    import torch
    torch.set_num_threads(1)
    what, n, when = (sys.argv[1:] + ['0', 'after'])[:3]
    count = count_files(int(n), when)
    globals()[what]()
    print(f'\nfiles {count[0]}')
