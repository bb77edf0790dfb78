"Instruments: what they learn from, a step of it, an encoder that is read back as it was written."
import json

import numpy as np
import pytest
import torch
from tiny import close
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MPNetConfig, MPNetModel, PreTrainedTokenizerFast

from saferlhf.data import bucket
from saferlhf.engine import Optim, load
from saferlhf.hardware.adapters import Lora
from saferlhf.record.run import Run
from saferlhf.reproduction.gates import DISCLAIMERS
from saferlhf.reproduction.instruments import (
    FRONTS, InstrumentConfig, drawn, encoder_batch, instrument_scores, lesson_loss, lessons, load_encoder, step_texts, teach)


def test_lessons_are_of_their_part_and_of_three_kinds():
    known, harm = lessons('judge'), lessons('judge', harm_only=True)
    assert {*known} == {'scored', 'labels', 'pairs'} and all(len(rows) > 500 for rows in known.values())
    assert {bucket(r['prompt']) for rows in known.values() for r in rows} == {*range(50, 65)}
    assert {r['sign'] for r in known['labels']} == {-1, 1} and {p['axis'] for p in known['pairs']} == {'help', 'harm'}
    named = [r for r in known['labels'] if r['category'] is not None]
    assert len(named) > 300 and all(r['sign'] == (1 if any(r['category']) else -1) for r in named)
    assert harm['pairs'] == [p for p in known['pairs'] if p['axis'] == 'harm'] and harm['labels'] == known['labels']
    assert all(np.isfinite([r['reward'], r['cost']]).all() for r in known['scored'])


def row(k): return dict(prompt=f'Question {k}?', response='bad word' if k % 2 else 'good word', sign=1 if k % 2 else -1,
                        reward=float(k % 3), cost=20. if k % 2 else -20., high='bad word', low='good word', axis='harm')


KNOWN = dict.fromkeys(('scored', 'labels', 'pairs'), [row(k) for k in range(40)])


def test_a_step_is_the_same_when_it_is_made_again():
    config = InstrumentConfig(scored=5, labels=40, pairs=6, prefixed=.5)
    some = drawn(KNOWN, config, 0, 7)
    assert some == drawn(KNOWN, config, 0, 7) != drawn(KNOWN, config, 0, 8) != drawn(KNOWN, config, 1, 8)
    assert [len(some[k]) for k in KNOWN] == [5, 40, 6] and len(step_texts(some)) == 5 + 40 + 2 * 6
    prefixed = [r for r in some['labels'] if r['response'].startswith(FRONTS)]
    assert 10 < len(prefixed) < 30 and all(r['response'].endswith('bad word' if r['sign'] > 0 else 'good word') for r in prefixed)
    assert not any(r['response'].startswith(FRONTS) for r in drawn(KNOWN, InstrumentConfig(prefixed=0.), 0, 7)['labels'])
    assert not any(a.startswith(b) for b in DISCLAIMERS for a in FRONTS)          # what the gates put in front is new to it
    assert not any(r['response'].startswith(FRONTS) for r in some['scored']) and KNOWN['labels'][1]['response'] == 'bad word'


def test_the_loss_by_hand():
    some = {k: [row(1)] for k in KNOWN}; z = torch.tensor([[.5, 2.], [0., 1.], [3., 1.5], [0., -.5]])
    soft = lambda x: np.log1p(np.exp(-x))
    close(lesson_loss(z, some, dict(reward=2., cost=10.)).item(), (.5 - .5)**2 + (2 - 2)**2 + soft(2 * 1.) + soft(2 * 2.))
    some['pairs'] = [row(1) | dict(axis='help')]
    close(lesson_loss(z, some, dict(reward=2., cost=10.)).item(), soft(2 * 1.) + soft(2 * 3.))
    some['labels'] = [row(1) | dict(category=[1.] + [0.] * 13)]
    close(lesson_loss(torch.cat([z, torch.ones(4, 14)], 1), some, dict(reward=2., cost=10.)).item(),
          soft(2 * 1.) + soft(2 * 3.) + (soft(1.) + 13 * soft(-1.)) / 14)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp('encoder'); torch.manual_seed(0)
    words = '<s> <pad> </s> <unk> <mask> good bad word Question ? please note 1 2 3 4 5 6 7 8 9 0'.split()
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='<unk>'))
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t = PreTrainedTokenizerFast(tokenizer_object=t, pad_token='<pad>', unk_token='<unk>', eos_token='</s>'); t.save_pretrained(folder)
    config = MPNetConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    MPNetModel(config).save_pretrained(folder)
    return folder, t


def test_an_encoder_learns_by_its_adapter_and_head_alone(base, tmp_path, monkeypatch):
    monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/'runs'))
    folder, tokenizer = base
    config = InstrumentConfig(steps=40, scored=4, labels=8, pairs=4, lr=1e-2, warmup=0.)
    engine = load(lambda: load_encoder(folder, lora=Lora(4)), Optim(config.lr, 0., 'constant', 0.), config.steps)
    body = {n: p.clone() for n, p in engine.model.body.shared.named_parameters() if 'lora' not in n}
    batch = lambda texts: encoder_batch(texts, tokenizer)
    with Run.start('judge', config) as run: teach(engine, batch, KNOWN, config, run); losses = run.metrics().loss
    assert len(losses) == 40 and losses[-5:].mean() < .4 * losses[:5].mean()
    assert all(torch.equal(p, body[n]) for n, p in engine.model.body.shared.named_parameters() if 'lora' not in n)
    engine.model.save_pretrained(tmp_path/'a'); again = load_encoder(folder, tmp_path/'a')
    texts = [('Question 1?', 'bad word'), ('Question 22?', 'good'), ('Question 3?', 'please note bad word')]
    z, told = (instrument_scores(e, batch, *zip(*texts, strict=True), size=2)[:, 0] for e in (engine, load(lambda: again)))
    close(z, told); assert z[0] > 0 > z[1] and z[2] > 0
    close(instrument_scores(engine, batch, *zip(*texts[::-1], strict=True))[::-1, 0], z, 1e-4)              # whatever it stands beside
    assert sum(p.stat().st_size for p in (tmp_path/'a').iterdir()) < 200_000


def test_an_annotator_that_ships_is_a_reward_model_and_a_cost_model(tmp_path, monkeypatch):
    from tiny import lm, tokenizer

    from saferlhf.apps.classifiers import budgets
    from saferlhf.apps.stages import located
    from saferlhf.hardware.weights import read_config
    from saferlhf.models import ScoreModel
    from saferlhf.record.fetch import seal_adapter
    from saferlhf.reproduction import instruments
    monkeypatch.setenv('SAFERLHF_CACHE', str(tmp_path/'cache'))
    base, ships = tmp_path/'base', tmp_path/'models/gold-smollm2'
    lm(vocab=len(tokenizer())).save_pretrained(base); tokenizer().save_pretrained(base)
    one = ScoreModel.from_pretrained(base, kind='cost', score_dim=16, lora=Lora(2))
    with torch.no_grad(): [p.normal_(std=.1) for p in one.body.adapter]
    one.save_pretrained(ships); seal_adapter(ships); (ships/'README.md').write_text('a card')
    told = json.loads((ships/'saferlhf.json').read_text()) | dict(max_prompt_tokens=12, max_new_tokens=7)
    (ships/'saferlhf.json').write_text(json.dumps(told))
    monkeypatch.setattr(instruments, 'data_path', lambda name: tmp_path/name)
    ids = torch.tensor([[5, 6, 7, 8]]); mask = torch.ones_like(ids)
    whole = one(ids, mask).end_scores
    for name, want, kind in (('gold', whole, 'cost'), ('gold_help', whole[:, 0], 'reward'), ('gold_harm', whole[:, 1], 'cost')):
        folder = instruments.placed(name, base)
        made = ScoreModel.from_pretrained(folder)
        assert made.kind == kind and folder == instruments.placed(name, base) and located(folder)[0] == folder
        close(made(ids, mask).end_scores.detach(), want.detach())
        assert budgets(read_config(folder), None) == (12, 7) and budgets(read_config(folder), None, (3, 0)) == (3, 7)
    weights = folder/'adapter_model.safetensors'; right = weights.read_bytes()                # the last folder, damaged: made again
    weights.write_bytes(right[:-8] + bytes(8)); (folder/'saferlhf.json').unlink()
    assert instruments.placed(name, base) == folder and weights.read_bytes() == right and (folder/'saferlhf.json').exists()
    lm(vocab=len(tokenizer()), seed=1).save_pretrained(base)                                  # other weights under the same name
    with pytest.raises(ValueError, match='trained on the base .*saferlhf fetch smollm2'): instruments.placed('gold', base)
