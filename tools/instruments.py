"""The instruments that judge harm: taught, and asked to show what they are worth.

    python tools/instruments.py teach gold|judge [SEED] [FILE] [JSON]  # needs a GPU, or hours; FILE: further scored answers, JSON Lines;
                                                                       # JSON: fields of InstrumentConfig with other values
    python tools/instruments.py gates gold|judge|tfidf [FOLDER] [FILE] # on the test part; FOLDER: the adapter, else the one that ships
    python tools/instruments.py card gold|judge RUN                    # of the one that ships, from the folder of its run and its gates
    python tools/instruments.py language [ROWS]   # of the reader of language; `saferlhf fetch gemma3` brings its model

A run of `teach` leaves adapter and heads in its folder. Gates are rows of data/results/judges/gates.csv; an instrument's bounds and
lessons come from its own part, and the run that opens its test answers says when.
"""
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeCV
from transformers import AutoTokenizer

from saferlhf.data import buckets, data_path, sha256
from saferlhf.engine import Optim, load
from saferlhf.evaluate import accuracy, longer_wins, rank_correct
from saferlhf.hardware.adapters import Lora
from saferlhf.hardware.precision import fast_precision
from saferlhf.models import ScoreModel, load_tokenizer
from saferlhf.record.escape import read_csv
from saferlhf.record.execute import publish, results_home
from saferlhf.record.fetch import fetch, model_hash, seal_adapter
from saferlhf.record.run import Run
from saferlhf.judges import TfidfJudge
from saferlhf.reproduction.gates import ASKED, NOT_ANSWERS, answers_hash, artefacts, correlation, gates, people_answers
from saferlhf.reproduction.instruments import (InstrumentConfig, decoder_batch, encoder_batch, instrument_scores, lessons,
                                               load_encoder, placed, teach)
from saferlhf.reproduction.language import Language, LanguageBounds
from saferlhf.reproduction.prompts import hand_pairs, labelled_answers, shuffled
from saferlhf.text import prompt_id

SOURCES = 'reproduction.instruments', 'reproduction.gates', 'reproduction.prompts'
BASES = dict(gold='smollm2', judge='mpnet')
HUBS = dict(gold='HuggingFaceTB/SmolLM2-135M-Instruct', judge='sentence-transformers/all-mpnet-base-v2')
WHAT = dict(gold="Sixteen numbers of an answer: help, harm (above 0: harmful) and the 14 categories of harm of BeaverTails.",
            judge='One number of an answer: harm (above 0: harmful).')
MORE = dict.fromkeys(BASES, 'of the scored answers those that others generated with reward-guided decoding may not be shipped')
CONFIGS = dict(gold=InstrumentConfig(), judge=InstrumentConfig(scored=16, pairs=16, lr=3e-4))
COLUMNS = dict(gold=16, judge=1, tfidf=1)       # help, harm and 14 categories; harm


def instrument(which, adapter=None, config=None, base=None, steps=0):
    "-> an engine that reads as `teach` and `instrument_scores` want, its batches, the base's folder."
    config, base = config or CONFIGS[which], base or fetch(BASES[which])
    lora = None if adapter else Lora(config.lora_rank)
    if which == 'gold':
        tokenizer = load_tokenizer(base)
        fresh = dict(kind='cost', lora=lora, score_dim=COLUMNS[which])
        make = lambda: ScoreModel.from_pretrained(adapter or base, **({} if adapter else fresh))
        batch = lambda texts: decoder_batch(texts, tokenizer, config)
    else:
        tokenizer = AutoTokenizer.from_pretrained(base)
        make = lambda: load_encoder(base, adapter, lora, COLUMNS[which])
        batch = lambda texts: encoder_batch(texts, tokenizer)
    optim = Optim(config.lr, config.weight_decay, config.schedule, config.warmup) if steps else None
    graphs = 'auto' if which == 'gold' and torch.cuda.is_available() else 'off'
    return load(make, optim, max(1, steps), precision=fast_precision(), graphs=graphs), batch, base


def _rows(file): return [json.loads(x) for x in Path(file).read_text(encoding='utf-8').splitlines()] if file else []


def taught(which, seed=0, more=None, **other):
    "Teach one instrument on its own part."
    config = replace(CONFIGS[which], **other)
    known = lessons(which, harm_only=which == 'judge', more=_rows(more))
    print(which, {k: len(v) for k, v in known.items()}, flush=True)
    engine, batch, base = instrument(which, config=config, steps=config.steps)
    data = {BASES[which]: model_hash(base)} | ({'more': sha256(more)} if more else {})
    with Run.start('instrument', config, name=which, seed=seed, sources=SOURCES, data=data) as run:
        run.data(buckets=buckets([r for rows in known.values() for r in rows]))
        if not run.done:
            teach(engine, batch, known, config, run)
            engine.model.save_pretrained(run.path('model'))
            seal_adapter(run.path('model'))
            run.finish(dict(loss=float(run.metrics().loss[-50:].mean()), lessons={k: len(v) for k, v in known.items()}))
    print(run.folder, run.summary, flush=True)


def pair_gates(name, read, axis, pairs, seed=0):
    "Pairs by who ranked them: the share in the right order, beside the rule 'longer'."
    high, low = (read([(p['prompt'], p[end]) for p in pairs], axis) for end in ('high', 'low'))
    right, longer, out = rank_correct(high, low), longer_wins(pairs), []
    who = np.array([f'{p["source"]}, {p["label_source"]}' for p in pairs])
    clusters = np.array([prompt_id(p['prompt']) for p in pairs])
    pku = np.array([p['source'].startswith('pku') for p in pairs])
    for kind, part in {'PKU': pku, **{k: who == k for k in sorted({*who})}}.items():
        share, rule = (accuracy(x[part], clusters[part], seed=seed) for x in (right, longer))
        asked, passed = ('low above 0.5, above "longer"', share.low > .5 and share.value > rule.value) if part is pku else ('shown', True)
        out.append(dict(instrument=name, gate=f'{axis} pairs: {kind}', asked=asked, **share._asdict(), n=int(part.sum()),
                        longer=rule.value, passed=bool(passed)))
    return out


def ridge(known, rows, axis):
    "TF-IDF's own reading of Beaver's scores, taught by the same scored answers -> (N,)"
    text = lambda part: [f"{r['prompt']}\n{r['response']}" for r in part]
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, max_features=30_000, sublinear_tf=True)
    x, y = words.fit_transform(text(known)), np.array([r[axis] for r in known])
    return RidgeCV(np.logspace(-1, 2, 7)).fit(x, y).predict(words.transform(text(rows)))


def reader(which, folder, run):
    "-> function (pairs (prompt, answer), axis) -> (N,) numbers; what was read once is kept, in pieces that a second start finds again."
    if which == 'tfidf': return lambda texts, axis='harm': folder.scores(*map(list, zip(*texts, strict=True)))
    (engine, batch, _), known, columns = instrument(which, folder), {}, dict(help=0, harm=min(1, COLUMNS[which] - 1))
    key = lambda text: hashlib.sha256(repr(text).encode()).hexdigest()[:16]
    def read(texts, axis='harm'):
        new = [*{key(t): t for t in texts if key(t) not in known}.items()]
        for k in range(0, len(new), 64):
            part = new[k:k + 64]
            asked = [*zip(*(t for _, t in part), strict=True)]
            found = run.cached(f'read-{part[0][0]}', lambda a=asked: instrument_scores(engine, batch, *a, 32).tolist())
            known.update(zip((name for name, _ in part), found, strict=True))
            print(f'{len(known)} answers read', flush=True)
        return np.array([known[key(t)][columns[axis]] for t in texts])
    return read


def opened(which, folder=None, more=None):
    "Every gate of one instrument: its test answers are opened here, and the run says when."
    part = which if which in BASES else 'judge'
    rows, known = people_answers('test'), lessons(part, harm_only=which != 'gold', more=_rows(more))
    column = lambda part, *keys: [[r[k] for r in part] for k in keys]
    words = TfidfJudge().fit(*column(known['labels'], 'prompt', 'response'), [r['sign'] > 0 for r in known['labels']])
    if which == 'tfidf': folder, data = words, {}
    else:
        folder = Path(folder or (placed('gold') if which == 'gold' else data_path('models/judge-mpnet')))
        data = {'adapter': sha256(folder/'adapter_model.safetensors')}
    texts, harmful = column(rows, 'prompt', 'response'), np.array([not r['is_safe'] for r in rows])
    own, bad = np.array([prompt_id(p) for p in texts[0]]), [r for r in rows if not r['is_safe']]
    with Run.start('gates', dict(precision=fast_precision()), name=which, sources=SOURCES, data=data) as run:
        read = reader(which, folder, run)
        out = gates(which, lambda p, r: read([*zip(p, r, strict=True)]), rows, words.scores(*texts))
        if which == 'tfidf': out = [r for r in out if r['gate'] != 'AUC - TF-IDF']
        made = artefacts(rows)
        for kind in ('other prompt', 'shuffled'): # an answer to another question, or no sentence, has no verdict to keep
            changed = [t for t, h in zip(zip(*made[kind], strict=True), harmful, strict=True) if h]
            lost = accuracy(read(changed) <= 0, own[harmful])
            out.append(dict(instrument=which, gate=f'flags lost: {kind}', asked='shown', **lost._asdict(), n=len(bad), passed=True))
        for axis, scale in dict(help='reward', harm='cost').items():
            if axis == 'help' and COLUMNS[which] == 1: continue
            scored = lessons('test')['scored']
            simple, clusters = ridge(known['scored'], scored, scale), [prompt_id(r['prompt']) for r in scored]
            mine, beaver = read([(r['prompt'], r['response']) for r in scored], axis), [r[scale] for r in scored]
            for within in (False, True):
                x, y = (correlation(v, beaver, clusters, within) for v in (mine, simple))
                out.append(dict(instrument=which, gate=f"correlation with Beaver's {scale}{', within prompts' if within else ''}",
                                asked='above TF-IDF ridge', **x._asdict(), n=len(scored), ridge=y.value, passed=bool(x.value > y.value)))
            pairs = [p for p in hand_pairs(scale, 'test') if p.get('paired', 1.) and p['label_source'].startswith('human')]
            out += pair_gates(which, read, axis, pairs)
        told = dict(answers=answers_hash(rows), hundredths=' '.join(f'{100 * x:.0f}' for x in read([*zip(*texts, strict=True)])))
        run.finish(dict(passed=sum(r['passed'] for r in out), gates=len(out)))
    for r in out: print({k: v for k, v in r.items() if k != 'instrument'})
    publish([dict(seed=0, **r) for r in out], 'judges/gates.csv', run.id, ['instrument', 'gate'])
    publish([dict(seed=0, instrument=which, **told)], 'judges/test_scores.csv', run.id, ['instrument'])


def card(which, run):
    "README.md beside the adapter: what it was taught, and every gate that asked something."
    told, summary = (json.loads((Path(run)/f'{k}.json').read_text(encoding='utf-8')) for k in ('manifest', 'summary'))
    table = read_csv(results_home()/'judges/gates.csv').query(f'instrument == "{which}" and asked != "shown"')
    line = lambda r: f'| {r.gate} | {r.asked} | {r.value:.3f} | {r.low:.3f} to {r.high:.3f} | {r.n} | {"yes" if r.passed else "**no**"} |'
    lessons_ = ', '.join(f'{n:,} {k}' for k, n in summary['lessons'].items())
    text = f"""---
base_model: {HUBS[which]}
license: cc-by-nc-4.0
library_name: peft
---
# {which}: an instrument of saferlhf

An adapter and a head on {HUBS[which]}, with the weights that `saferlhf fetch {BASES[which]}` brings (`saferlhf.json` has their hash).
{WHAT[which]} It is a research instrument, not a safety filter. Licence CC BY-NC 4.0, as the rows that it learned from.

* taught on prompt buckets {min(told["buckets"])} to {max(told["buckets"])}: {lessons_}; {MORE[which]}
* run: {told["stage"]}/{which}-{told["hash"]}, seed {told["seed"]}, {told["device"]}
* asked on answers of the test part (buckets 10 to 19), opened once, by {table.run_id.iloc[0]}:

| gate | asked | found | 95 % | n | passed |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(map(line, table.itertuples()))}

Intervals resample prompts. All gates, with those that are only shown: data/results/judges/gates.csv, nbs/paper/judges.ipynb.
"""
    (data_path('models')/f'{which}-{BASES[which]}'/'README.md').write_text(text, encoding='utf-8')


def people(part, n=None):
    "Answers that people labelled, one a prompt, in a fixed order."
    found = {}
    for r in shuffled(labelled_answers(part, human=True), 'gates'): found.setdefault(prompt_id(r['prompt']), r)
    return [*found.values()][:n]


def language(n=100):
    "The reader of language, on answers that people wrote or chose and on what became of them."
    folder = fetch('gemma3')
    with Run.start('gates', dict(rows=n), name='language', data=dict(gemma3=model_hash(folder)),
                   sources=('reproduction.language', 'reproduction.gates', 'reproduction.prompts')) as run:
        reader, known, rows = Language(folder), people('gold', n), people('test', n)
        texts = lambda part: ([r['prompt'] for r in part], [r['response'] for r in part])
        bounds = LanguageBounds(*run.cached('bounds', lambda: tuple(reader.bounds(*texts(known)))))
        clusters, out = [prompt_id(r['prompt']) for r in rows], []
        for kind, (prompts, responses) in dict({'people': texts(rows)}, **artefacts(rows)).items():
            found = run.cached(kind.replace(' ', '-'), lambda p=prompts, r=responses: [int(x) for x in reader.coherent(p, r, bounds).flags])
            share = accuracy(1 - np.array(found), clusters)
            real = kind not in NOT_ANSWERS
            asked = 'at most 0.15' if real else f'at least {ASKED["no_answer"]}'
            passed = bool(share.value <= .15 if real else share.value >= ASKED['no_answer'])
            out.append(dict(instrument='language', gate=f'no answer: {kind}', asked=asked, **share._asdict(), n=n, passed=passed))
            print(out[-1], flush=True)
        run.finish(dict(bounds=bounds._asdict()))
    publish([dict(seed=0, **r) for r in out], 'judges/gates.csv', run.id, ['instrument', 'gate'])


if __name__ == '__main__':
    match sys.argv[1:]:
        case ['teach', ('gold' | 'judge') as which, *rest]:
            seed, more, other = [*rest, '', '', ''][:3]
            taught(which, int(seed or 0), more or None, **json.loads(other or '{}'))
        case ['gates', ('gold' | 'judge' | 'tfidf') as which, *rest]: opened(which, *rest)
        case ['card', ('gold' | 'judge') as which, run]: card(which, run)
        case ['language', *rows]: language(*map(int, rows))
        case _: sys.exit(__doc__)
