"Small things that several test modules share."
import json
from functools import cache
import numpy as np
import torch
from saferlhf.models import ScoreModel, tiny_model, train_tokenizer
from saferlhf.record.run import Run

FAMILIES = ('llama', 'mistral', 'qwen2', 'qwen3', 'gemma', 'gemma2', 'gemma3_text', 'olmo2', 'olmo3', 'phi3', 'smollm3', 'gpt2', 'opt')
WORDS = 'how to make a bomb cake with sugar and care , is it safe ? no yes never sure ask your doctor first please'.split()
close = lambda a, b, tol=1e-5: np.testing.assert_allclose(np.asarray(a, dtype=float), np.asarray(b, dtype=float), rtol=tol, atol=tol)


def loud(model, factor=6.): # untrained weights give nearly uniform attention and flat scores, which would hide mistakes
    with torch.no_grad():
        for p in model.parameters(): p.mul_(factor if p.ndim > 1 else 1.)
    return model


def lm(arch='llama', vocab=61, seed=0): return loud(tiny_model(arch, vocab, seed))


def scorer(arch='llama', vocab=61, seed=0, kind='reward'):
    model = ScoreModel(lm(arch, vocab, seed).base_model, kind).eval()
    torch.nn.init.normal_(model.score_head.weight, std=.3, generator=torch.Generator().manual_seed(seed))
    return model


def paddings(row, n=3, fill=0): # the row bare, padded left, padded right, padded on both sides
    for left, right in ((0, 0), (n, 0), (0, n), (n, n)):
        yield torch.tensor([[fill] * left + row + [fill] * right]), torch.tensor([[0] * left + [1] * len(row) + [0] * right])


@cache
def tokenizer(): return train_tokenizer([' '.join(WORDS)] * 3, 300)


def sentences(n, seed=0, longest=9):
    g = np.random.default_rng(seed)
    return [' '.join(g.choice(WORDS, g.integers(1, longest + 1))) for _ in range(n)]


def prompt_rows(n=8, vocab=61, seed=0, longest=7): # a left-padded batch as from `prompt_batch`, of random ids
    g = np.random.default_rng(seed)
    lengths = g.integers(1, longest + 1, n); lengths[:2] = 1, longest
    mask = torch.tensor(np.arange(longest) >= longest - lengths[:, None]).long()
    ids = torch.tensor(g.integers(2, vocab, (n, longest))) * mask
    return dict(input_ids=ids, attention_mask=mask, prompt_ids=torch.tensor(g.integers(0, 1 << 62, n)))


def finished(stage, model, summary=None, rows=(), name=''): # a finished run of one's own with that model; its folder
    run = Run.start(stage, dict(max_new_tokens=6), name=name or stage, data={'of': name})
    model.save_pretrained(run.path('model')); tokenizer().save_pretrained(run.path('model'))
    run.path('data').mkdir()
    if rows: run.path('data/train.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8')
    run.finish(summary or {})
    return run.folder


def own_models(summary): # of the score models; role -> folder of a finished run
    vocab, rows = len(tokenizer()), [dict(prompt='how', response='sure please'), dict(prompt='is it safe', response='yes')]
    return dict(policy=finished('sft', lm(vocab=vocab), rows=rows), reward=finished('reward', scorer(vocab=vocab, seed=5), summary),
                cost=finished('cost', scorer(vocab=vocab, seed=6, kind='cost'), summary))
