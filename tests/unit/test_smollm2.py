"A real pretrained model in miniature: SmolLM2's own tokenizer and a cut of its own weights through every stage on a CPU."
import json
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, pipeline

from saferlhf.engine import Optim, load
from saferlhf.models import ScoreModel, load_lm, load_tokenizer
from saferlhf.objectives import Multiplier, ppo_lag
from saferlhf.ppo import PPOConfig, ppo_step
from saferlhf.record.fetch import fetch, model_hash
from saferlhf.rollout import Sampler, respond, score_texts
from saferlhf.text import encode_response, prompt_batch
from saferlhf.train import ScoreConfig, score_batches, score_step, sft_step, text_batch

PROMPT, ANSWER, STEPS = 64, 12, 20                                                      # tokens, tokens, steps
ASKED = [f'How do I {what} a {thing}?' for what in ('clean', 'break') for thing in ('window', 'phone', 'lock', 'cup')]
GOOD, BAD = 'Ask the owner first.', 'Smash it and run.'
GROUPS, NEURONS = 2, 128              # of 3 groups of attention heads, of 1,536: all embeddings and two such layers are under 60 MB
optim = Optim(lr=1e-3, warmup=0., schedule='constant')
falls = lambda losses, part: all(map(math.isfinite, losses)) and losses[-1] < part * losses[0]


def cut(source, target):
    "The first two layers with some of their heads and neurons, all of the embeddings; the whole tokenizer."
    config, tensors = AutoConfig.from_pretrained(source), load_file(source/'model.safetensors')
    kv = GROUPS * config.head_dim; q = kv * config.num_attention_heads // config.num_key_value_heads
    rows = {'q_proj': q, 'k_proj': kv, 'v_proj': kv, 'gate_proj': NEURONS, 'up_proj': NEURONS}
    columns = {'o_proj': q, 'down_proj': NEURONS}
    kept = {k: v for k, v in tensors.items() if '.layers.' not in k or int(k.split('.')[2]) < 2}
    part = lambda k: k.split('.')[-2]
    target.mkdir(parents=True)
    save_file({k: v[:rows.get(part(k)), :columns.get(part(k))].contiguous() if v.ndim == 2 else v for k, v in kept.items()},
              target/'model.safetensors', metadata={'format': 'pt'})
    config.update(dict(num_hidden_layers=2, num_key_value_heads=GROUPS, num_attention_heads=q // config.head_dim,
                       intermediate_size=NEURONS))
    config.save_pretrained(target)
    for f in source.iterdir():
        if f.name.startswith(('tokenizer', 'chat_template', 'special_tokens', 'vocab', 'merges')): shutil.copy(f, target)


@pytest.fixture(scope='module')
def base():
    try: whole = fetch()
    except RuntimeError as e: pytest.fail(f'SmolLM2 cannot be had here, so nothing of it is tested: {e}')
    cache = os.environ.get('SAFERLHF_CACHE') or os.path.expanduser('~/.cache/saferlhf')
    folder = whole.__class__(cache)/f'smollm2-cut-{model_hash(whole)[:12]}-{GROUPS}-{NEURONS}'
    if not folder.exists():
        aside = folder.with_name(f'.{folder.name}.{os.getpid()}')
        cut(whole, aside); os.rename(aside, folder)
    assert sum(f.stat().st_size for f in folder.glob('*.safetensors')) <= 60e6
    return SimpleNamespace(folder=folder, whole=whole, tokenizer=load_tokenizer(folder))


def sft(base, home):
    engine = load(lambda: load_lm(base.folder), optim, STEPS)
    batch = text_batch([dict(prompt=p, response=GOOD) for p in ASKED], base.tokenizer, PROMPT, ANSWER)
    losses = [float(sft_step(engine, batch)['loss']) for _ in range(STEPS)]
    engine.save(home/'sft'); base.tokenizer.save_pretrained(home/'sft')
    return losses


def score_model(base, home, kind, high, low):
    rows = [dict(prompt=p, high=high, low=low, high_sign=1, low_sign=-1, paired=1.) for p in ASKED]
    config = ScoreConfig(kind=kind, epochs=6., batch_size=8, max_prompt_tokens=PROMPT, max_new_tokens=ANSWER)
    steps, batch = score_batches(rows, base.tokenizer, config)
    engine = load(lambda: ScoreModel.from_pretrained(home/'sft', kind), optim, steps)
    losses = [float(score_step(engine, batch(i), kind, config.regularization)['loss']) for i in range(steps)]
    engine.save(home/kind); base.tokenizer.save_pretrained(home/kind)
    return losses


def align(base, home):
    "Two steps of PPO-Lag under a low limit; what was scored, metrics, and the multiplier before and after."
    tok, seen, small = base.tokenizer, [], Optim(lr=1e-5, warmup=0., schedule='constant')
    config = PPOConfig(prompts=8, max_prompt_tokens=PROMPT, max_new_tokens=ANSWER, micro_batch=8, ptx_coef=.1)
    actor, reference = load(lambda: load_lm(home/'sft'), small, 2), load(lambda: load_lm(home/'sft'))
    models = {k: load(lambda k=k: ScoreModel.from_pretrained(home/k, k)) for k in ('reward', 'cost')}
    critics = {k: load(lambda k=k: ScoreModel.from_pretrained(home/k, 'critic'), small, 2) for k in models}
    def scorer(k):
        def score(ids, mask):
            out = models[k](ids, mask).end_scores
            seen.append((k, ids, mask, out)); return out
        return score
    multiplier = Multiplier(init=1., lr=.002, threshold=-50., window=8)      # far under what any answer costs
    sampler, before = Sampler(actor, tok.eos_token_id, ANSWER, seed=1), actor.model.state_dict()['model.norm.weight'].clone()
    ptx = text_batch([dict(prompt=p, response=GOOD) for p in ASKED[:4]], tok, PROMPT, ANSWER)
    metrics = [ppo_step(actor, reference, critics, {k: scorer(k) for k in models}, sampler, prompt_batch(ASKED, tok, PROMPT), ptx,
                        ppo_lag(multiplier), config, i) for i in range(2)]
    assert not torch.equal(before, actor.model.state_dict()['model.norm.weight']), 'the actor has not moved'
    actor.save(home/'policy'); tok.save_pretrained(home/'policy')
    return SimpleNamespace(seen=seen, models=models, actor=actor, lam=multiplier.value,
                           metrics=[{k: float(v) for k, v in m.items()} for m in metrics])


@pytest.fixture(scope='module')
def trained(base, tmp_path_factory):
    home = tmp_path_factory.mktemp('smollm2'); torch.manual_seed(0)
    losses = dict(sft=sft(base, home), reward=score_model(base, home, 'reward', GOOD, BAD), cost=score_model(base, home, 'cost', BAD, GOOD))
    return SimpleNamespace(home=home, losses=losses, **vars(align(base, home)))


def test_its_tokenizer_is_the_models_own(base):
    tok = base.tokenizer
    assert (tok.bos_token, tok.eos_token, len(tok)) == ('<|im_start|>', '<|im_end|>', 49152) and tok.eos_token_id == 2
    assert tok.convert_ids_to_tokens(tok('List:\n\n12', add_special_tokens=False).input_ids) == ['List', ':', 'ĊĊ', '1', '2']
    shown = tok.apply_chat_template([dict(role='user', content='Hi')], tokenize=False, add_generation_prompt=True)
    assert shown.endswith('<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n')
    for text in ('Ünïcode 日本 12,345 🙂', '<|im_end|> <|im_start|>system'):
        assert tok.decode(encode_response(text, tok, 99)[:-1]) == text and tok.eos_token_id not in encode_response(text, tok, 99)[:-1]


def test_the_weights_are_its_own(base):
    "All 30 layers, in order: ordinary English is likely, and much less so with its words turned round."
    lm, tok = load_lm(base.whole), base.tokenizer
    def loss(text):
        ids = tok(text, return_tensors='pt', add_special_tokens=False).input_ids
        with torch.no_grad(): return float(lm(input_ids=ids, labels=ids).loss)
    words = 'The capital of France is Paris, and the capital of Italy is Rome.'
    assert loss(words) < 2.5 < loss(' '.join(reversed(words.split()))) < 20


@pytest.mark.parametrize('stage', ['sft', 'reward', 'cost'])
def test_losses_are_finite_and_fall(trained, stage): assert falls(trained.losses[stage], .5), trained.losses[stage]


def test_costs_and_rewards_have_the_right_sign(base, trained):
    score = lambda kind, answer: score_texts(trained.models[kind], base.tokenizer, ASKED, [answer] * 8, PROMPT, ANSWER)
    assert (score('cost', BAD) > 0).all() and (score('cost', GOOD) < 0).all() and (score('reward', GOOD) > score('reward', BAD)).all()


def test_two_steps_of_ppo_lag(trained):
    first, second = trained.metrics
    assert all(math.isfinite(v) for m in trained.metrics for v in m.values())
    assert abs(first['ratio'] - 1) < 1e-3 and abs(first['kl']) < 1e-3 and abs(second['kl']) > 0
    assert 1 < trained.lam < 5, 'the answers cost more than the limit: lambda rises'


def test_what_ppo_scored_is_what_its_text_scores(base, trained):
    "Rows whose text gives the same tokens again score the same as texts: most of them, after fine-tuning."
    tok, same = base.tokenizer, {'reward': 0, 'cost': 0}
    for kind, ids, mask, scores in trained.seen:
        for row, real, score in zip(ids.tolist(), mask.bool().tolist(), scores.tolist(), strict=True):
            row = [i for i, m in zip(row, real, strict=True) if m]
            prompt = next(p for p in ASKED if row[:len(head := ids_of(p, tok))] == head)
            answer = row[len(ids_of(prompt, tok)):]
            text = tok.decode(answer, skip_special_tokens=True)
            assert '<|im_end|>' not in text
            if encode_response(text, tok, ANSWER) != answer: continue
            same[kind] += 1
            assert score_texts(trained.models[kind], tok, [prompt], [text], PROMPT, ANSWER)[0] == pytest.approx(score, abs=1e-4)
    assert min(same.values()) >= 8


def ids_of(prompt, tok): # a prompt's own row
    batch = prompt_batch([prompt], tok, PROMPT)
    return batch['input_ids'][0][batch['attention_mask'][0].bool()].tolist()


def test_answers_are_text_and_end_where_the_turn_ends(base, trained):
    greedy = Sampler(trained.actor, base.tokenizer.eos_token_id, ANSWER, greedy=True)
    answers = respond(greedy, base.tokenizer, ASKED, PROMPT)
    assert not any(a['truncated'] for a in answers) and {a['tokens'][-1] for a in answers} == {base.tokenizer.eos_token_id}
    assert {w for a in answers for w in a['response'].split()} <= set(GOOD.split()), answers


def test_transformers_answers_as_the_sampler_does(base, trained):
    "The saved policy in somebody else's hands: the text-generation pipeline, with the chat template that was saved."
    generate = pipeline('text-generation', model=str(trained.home/'policy'), device='cpu')
    asked = [*ASKED[:2], 'What is 12 plus 3?', 'Name a colour.\n\n1. Think first.']
    greedy = Sampler(load(lambda: load_lm(trained.home/'policy')), base.tokenizer.eos_token_id, ANSWER, greedy=True)
    ours = [a['response'] for a in respond(greedy, load_tokenizer(trained.home/'policy'), asked, 96)]
    theirs = [generate([dict(role='user', content=p)], max_new_tokens=ANSWER, do_sample=False)[0]['generated_text'][-1]['content']
              for p in asked]
    assert ours == theirs


def test_the_folder_says_what_it_is(base):
    head = json.loads((base.folder/'config.json').read_text())
    assert (head['num_hidden_layers'], head['eos_token_id']) == (2, 2) and model_hash(base.folder) != model_hash(base.whole)
