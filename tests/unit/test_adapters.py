"Roles that share a frozen body: the files and numbers of peft, the first steps of full training, engines, resume, what is refused."
import hashlib
import json
import shutil

import peft
import pytest
import torch
from tiny import close, finished, lm, prompt_rows, scorer, sentences, tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from saferlhf.apps.align import align
from saferlhf.apps.export import export
from saferlhf.apps.stages import cost, located, reward, sft
from saferlhf.engine import Optim, Spread, TorchEngine, load
from saferlhf.hardware.adapters import Body, Lora, Role, base_of, merged, role_of
from saferlhf.models import ScoreModel, llama, load_lm, token_logps
from saferlhf.objectives import Multiplier, ppo_lag
from saferlhf.ppo import PPOConfig, ppo_step
from saferlhf.record.fetch import model_hash
from saferlhf.record.files import read_lines
from saferlhf.record.resume import Saver
from saferlhf.reproduction.training import Makers, policy_models
from saferlhf.rollout import Sampler

IDS = torch.tensor([[5, 9, 2, 7, 4, 33, 12]])
MASK = torch.ones_like(IDS)
ARCHS = 'llama', 'gpt2', 'gemma', 'qwen3', 'phi3', 'gemma2'
OPTIM = Optim(lr=.05, warmup=0., schedule='constant')


def logits(model): return model(input_ids=IDS).logits


def trained(engine, steps=3): # of a language model or a score model
    for _ in range(steps):
        m = engine.model
        loss = engine(IDS, MASK).end_scores.mean() if isinstance(m, ScoreModel) else -token_logps(engine, IDS, MASK, 4).mean()
        engine.backward(loss); engine.step()
    return engine


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('adapters')
    for arch in ARCHS: lm(arch).save_pretrained(path/arch)
    return path


# --- the numbers and files of peft
@pytest.mark.parametrize('arch', ARCHS)
def test_roles_of_one_body(folder, tmp_path, arch):
    bodies, whole = {}, load_lm(folder/arch)
    z = logits(whole)
    actor, reference = load_lm(folder/arch, lora=Lora(4), bodies=bodies), load_lm(folder/arch, bodies=bodies)
    judge = ScoreModel.from_pretrained(folder/arch, 'cost', lora=Lora(2), bodies=bodies)
    assert len(bodies) == 1 and torch.equal(logits(actor), z)
    before = {k: v.clone() for k, v in whole.state_dict().items()}
    a, c = trained(load(lambda: actor, OPTIM, 9)), trained(load(lambda: judge, OPTIM, 9))
    za, s = logits(actor), judge(IDS, MASK).end_scores
    assert torch.equal(logits(reference), z) and (za - z).abs().max() > .01
    assert not any('lora' in k for k in before) and len(a.params) == 2 * len(actor.body.layers)
    body = {k.replace('.base_layer', ''): v for k, v in actor.body.model.state_dict().items() if 'lora' not in k}
    assert all(torch.equal(v, body[k]) for k, v in before.items())
    a.save(tmp_path/'actor'); c.save(tmp_path/'cost')
    assert torch.equal(logits(load_lm(tmp_path/'actor')), za)
    again = ScoreModel.from_pretrained(tmp_path/'cost')
    assert torch.equal(again(IDS, MASK).end_scores, s) and again.kind == 'cost'
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder/arch), tmp_path/'actor')
    close(logits(theirs).detach(), za.detach(), 1e-6)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder/arch, num_labels=1, pad_token_id=0)
    theirs = peft.PeftModel.from_pretrained(classifier, tmp_path/'cost')
    close(theirs(input_ids=IDS, attention_mask=MASK).logits[0].detach(), s.detach(), 1e-6)
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path/'actor')).detach(), za.detach(), 1e-6)
    one = merged(load_lm(tmp_path/'actor'))
    assert not isinstance(one, Role) and 'lora' not in ' '.join(one.state_dict())
    close(logits(one).detach(), za.detach())
    one.save_pretrained(tmp_path/'whole'); close(logits(load_lm(tmp_path/'whole')).detach(), za.detach())
    batch = prompt_rows(4)
    x, y = (Sampler(m, 1, 8, seed=3).generate(batch) for m in (a, one))
    assert torch.equal(x.responses, y.responses)
    close(x.logp, y.logp)
    with torch.no_grad(): close(x.logp, token_logps(actor, x.ids, x.attention_mask, x.mask.shape[1]) * x.mask, 2e-5)


def test_an_adapter_of_peft_is_read(folder, tmp_path): # made by somebody else, without configuration and tokenizer of the model
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=['q_proj', 'down_proj'], use_rslora=True, task_type='CAUSAL_LM')
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder/'llama'), config)
    for n, p in theirs.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p, std=.1)
    theirs.save_pretrained(tmp_path/'a')
    assert not (tmp_path/'a/config.json').exists()
    close(logits(load_lm(tmp_path/'a')).detach(), logits(theirs).detach(), 1e-6)


# --- training
def test_the_first_steps_are_those_of_full_training(folder): # A the identity, alpha = rank = width, the same modules
    width, bodies = 32, {}
    names = 'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj'
    optim = Optim(lr=1e-3, warmup=0., schedule='constant', clip=1e9)
    role = load_lm(folder/'llama', lora=Lora(width, width, ','.join(names)), bodies=bodies)
    with torch.no_grad():
        for layer in role.body.layers.values(): layer.lora_A['role0'].weight.copy_(torch.eye(width))
    low, full = TorchEngine(role, optim, 4), TorchEngine(load_lm(folder/'llama'), optim, 4)
    fixed = [m for (n, _), m in zip(full.model.named_parameters(), full.masters, strict=True) if not any(k in n for k in names)]
    for k in range(3):
        losses = []
        for e in (low, full):
            loss = -token_logps(e, IDS, MASK, 4).mean()
            e.backward(loss); losses.append(loss.item())
            for p in fixed: p.grad = None
            for layer in role.body.layers.values(): layer.lora_A['role0'].weight.grad = None
            e.step()
        close(*losses, 1e-6 if k < 2 else 1e-5)
    close(logits(low.model).detach(), logits(full.model).detach(), 1e-4)


def test_the_gradient_of_a_role_that_is_not_active_any_more(folder): # checkpointing runs layers again: with the right adapter
    bodies, how = {}, dict(recompute=True)
    make = lambda: load_lm(folder/'llama', lora=Lora(4), bodies=bodies)
    a, b = (load(make, OPTIM, 9, **how) for _ in range(2))
    trained(a, 1); trained(b, 2)
    def gradient(other):
        loss = -token_logps(a, IDS, MASK, 4).mean()
        if other: logits(other.model)
        a.backward(loss); g = [m.grad.clone() for m in a.masters]; a.clear()
        return g
    alone, after = gradient(None), gradient(b)
    assert all(map(torch.equal, alone, after)) and sum(float(g.abs().sum()) for g in alone) > 0


SIZES = dict(prompts=6, window=6, minibatches=2, micro_batch=2, max_new_tokens=6, max_prompt_tokens=48, actor_lr=.01, critic_lr=.01,
             lora_rank=2)


@pytest.fixture
def stages(tmp_path, monkeypatch): # sft, reward and cost as adapters on one base
    monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/'runs'))
    monkeypatch.setattr('saferlhf.reproduction.training.fast_precision', lambda: 'fp32')
    base = finished('base_lm', lm(vocab=len(tokenizer())))
    rows = [dict(prompt=p, response=r) for p, r in zip(sentences(30), sentences(30, 1), strict=True)]
    pairs = [dict(prompt=p, response_0=x, response_1=y, better_response_id=i % 2, safer_response_id=(i // 2) % 2,
                  is_response_0_safe=i % 3 > 0, is_response_1_safe=i % 4 > 0)
             for i, (p, x, y) in enumerate(zip(sentences(40), sentences(40, 2), sentences(40, 3), strict=True)) if x != y]
    how = dict(epochs=1., batch_size=8, max_prompt_tokens=48, max_new_tokens=6, test_share=.3)
    start = sft(base, rows, how | dict(lora_rank=2, lr=.01))
    return base, dict(policy=start, reward=reward(start, pairs, how), cost=cost(start, pairs, how))


def test_the_five_commands_with_adapters(stages, tmp_path, capsys):
    base, models = stages
    for record in models.values():
        told = json.loads(record.path('model/adapter_config.json').read_text(encoding='utf-8'))
        assert told['target_modules'] == sorted(told['target_modules'])          # the same content in each process
        assert told['r'] == 2 and record.config['lora_rank'] == 2
        told = json.loads(record.path('model/saferlhf.json').read_text(encoding='utf-8'))
        assert told['base_sha256'] == model_hash(base/'model')
        assert not record.path('model/model.safetensors').exists()
        assert 'an adapter of rank 2 on that' in record.path('model/README.md').read_text(encoding='utf-8')
    prompts = [dict(prompt=p) for p in sorted(set(sentences(40)))]
    settings = {k: v for k, v in SIZES.items() if k != 'lora_rank'}
    record = align(*models.values(), prompts, 0., settings | dict(steps=2, look=1, test_share=.3, force=True))
    assert 'that of the adapter which the model has' in capsys.readouterr().out
    rows = read_lines(record.path('metrics.jsonl'))
    assert len(rows) == 2 and rows[0]['grad_norm'] > 0 and abs(rows[0]['ratio'] - 1) < 1e-4
    a, b = (load_lm(models['policy'].path('model')), load_lm(record.path('model')))
    assert base_of(record.path('model')).resolve() == (base/'model').resolve() and not torch.equal(a.adapter[1], b.adapter[1])
    export(record.folder, tmp_path/'policy'); export(models['cost'].folder, tmp_path/'cost')
    z = merged(load_lm(record.path('model')))(input_ids=IDS).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path/'policy')(input_ids=IDS).logits, z)
    ours = ScoreModel.from_pretrained(models['cost'].path('model'))(IDS, MASK).end_scores
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path/'cost')(input_ids=IDS, attention_mask=MASK).logits[0]
    close(theirs.detach(), ours.detach())
    shutil.move(tmp_path/'runs', tmp_path/'elsewhere')                        # a moved folder of runs is still whole
    assert torch.equal(load_lm(tmp_path/'elsewhere'/record.folder.relative_to(tmp_path/'runs')/'model').adapter[1], b.adapter[1])


def six(stages, **how):
    folders = {k.replace('policy', 'sft'): r.path('model') for k, r in stages[1].items()} | dict(actor=stages[1]['policy'].path('model'))
    config, objective = PPOConfig(steps=4, **SIZES | how), ppo_lag(Multiplier(window=6))
    torch.manual_seed(0)
    return config, objective, policy_models(folders, objective, config, Spread())


def steps(made, first, last):
    config, objective, (actor, reference, critics, scorers) = made
    sampler = Sampler(actor, 1, config.max_new_tokens)
    asked = prompt_rows(6) | dict(prompts=sentences(6))
    return [{k: float(v) for k, v in ppo_step(actor, reference, critics, scorers, sampler, asked, None, objective, config, k).items()}
            for k in range(first, last)]


def test_six_roles_on_one_body_and_exact_resume(stages, tmp_path):
    made = six(stages)
    actor, reference, critics, scorers = made[2]
    engines = [actor, reference, *critics.values(), *(s.model for s in scorers.values())]
    bodies = {id(getattr(e.model, 'body', None) if isinstance(e.model, Role) else e.model.body.body) for e in engines}
    assert len(bodies) == 1 and len(actor.model.body.roles) == 6
    frozen = {k: v.clone() for k, v in actor.model.body.model.state_dict().items() if 'lora' not in k}
    adapter = lambda e: (e.model if isinstance(e.model, Role) else e.model.body).adapter[1].detach().clone()
    flags = [p.requires_grad for e in engines
             for p in (e.model if isinstance(e.model, Role) else e.model.body).adapter[:1]]
    assert flags == [True, False, True, True, False, False]                    # an adapter that comes later changes no other
    before = [adapter(e) for e in engines]
    whole = steps(made, 0, 4)
    moved = [not torch.equal(x, adapter(e)) for x, e in zip(before, engines, strict=True)]
    assert moved == [True, False, True, True, False, False]                    # actor, reference, critics, scorers
    assert all(torch.equal(v, actor.model.body.model.state_dict()[k]) for k, v in frozen.items())
    def part(first, last):
        made = six(stages)
        things = {'actor': made[2][0], 'multiplier': made[1].state} | {f'critic-{k}': c for k, c in made[2][2].items()}
        with Saver(tmp_path/'saved', things, steps=2) as save:
            assert save.restore() == first
            out = steps(made, first, last); save(last - 1, True)
        return out
    assert part(0, 2) + part(2, 4) == whole


def test_a_role_that_trains_all_weights(stages):
    _, _, (actor, _, critics, _) = six(stages, lora_whole='actor')
    assert not isinstance(actor.model, Role) and all(isinstance(c.model.body, Role) for c in critics.values())
    with pytest.raises(ValueError, match='actor, critics or both'): six(stages, lora_whole='judge')


# --- what is refused
def test_refusals(folder, tmp_path):
    with pytest.raises(ValueError, match="no layer is named 'qproj'"): load_lm(folder/'llama', lora=Lora(2, targets='qproj'))
    with pytest.raises(ValueError, match='rank is 1 or more'): Lora(0)
    trained(load(lambda: load_lm(folder/'llama', lora=Lora(2)), OPTIM, 9), 1).save(tmp_path/'a')
    with pytest.raises(ValueError, match='adapter of rank 2'): load_lm(tmp_path/'a', lora=Lora(3))
    def told(**changes):
        path = tmp_path/'a/adapter_config.json'
        path.write_text(json.dumps(json.loads(path.read_text(encoding='utf-8')) | changes), encoding='utf-8')
    told(use_dora=True)
    with pytest.raises(ValueError, match='only plain LoRA is read, not use_dora=True'): load_lm(tmp_path/'a')
    told(use_dora=False)
    (tmp_path/'a/saferlhf.json').write_text(json.dumps(dict(base_sha256='0' * 64)), encoding='utf-8')
    with pytest.raises(ValueError, match='was trained on the base 000000000000'): located(tmp_path/'a')
    (tmp_path/'a/saferlhf.json').write_text('[]', encoding='utf-8')
    with pytest.raises(ValueError, match='saferlhf.json is damaged'): located(tmp_path/'a')
    (tmp_path/'a/saferlhf.json').write_text(json.dumps(dict(base_sha256='0' * 64)), encoding='utf-8')
    told(base_model_name_or_path='/nowhere/at/all')
    with pytest.raises(FileNotFoundError, match='/nowhere/at/all, which is not there'): load_lm(tmp_path/'a')
    told(base_model_name_or_path=str(folder/'gpt2'))
    with pytest.raises(ValueError, match='(?i)target|does not fit'): load_lm(tmp_path/'a')
    (tmp_path/'a/adapter_model.safetensors').write_bytes(b'x')
    with pytest.raises(ValueError, match='its adapter cannot be read'): load_lm(tmp_path/'a')


def test_zero_3_is_refused(stages):
    made = Makers(PPOConfig(**SIZES), Spread.of(dict(gpus=2, zero=3)))
    with pytest.raises(ValueError, match='zero=3 shards whole models'): made.lm(stages[0]/'model')()


def test_a_score_model_of_another_body(folder, tmp_path): # its critic is an adapter on the score model's own body
    scorer(kind='cost').save_pretrained(tmp_path/'cost')
    bodies = {}
    judge = ScoreModel.from_pretrained(tmp_path/'cost', 'cost', bodies=bodies)
    critic = ScoreModel.from_pretrained(tmp_path/'cost', 'critic', lora=Lora(2), bodies=bodies)
    assert len(bodies) == 1 and torch.equal(judge(IDS, MASK).scores, critic(IDS, MASK).scores)
    close(judge(IDS, MASK).scores.detach(), ScoreModel.from_pretrained(tmp_path/'cost')(IDS, MASK).scores.detach(), 1e-6)


def test_merging_in_place_gives_the_bits_back(folder):
    bodies = {}
    actor = trained(load(lambda: load_lm(folder/'llama', lora=Lora(4), bodies=bodies), OPTIM, 9))
    other = load_lm(folder/'llama', lora=Lora(2), bodies=bodies)
    body = actor.model.body
    def sha(): return hashlib.sha256(b''.join(v.numpy().tobytes() for v in body.model.state_dict().values())).hexdigest()
    before, batch, z = sha(), prompt_rows(5), logits(other)
    beside = Sampler(actor, 1, 8, seed=3); want = [beside.generate(batch), beside.generate(batch, first=1)]
    first = body.layers['layers.0.self_attn.o_proj'].base_layer.weight.data_ptr()
    assert beside._decoder.blocks[0].o[0].data_ptr() != first
    body.merge_in_place = True
    here = Sampler(actor, 1, 8, seed=3); got = [here.generate(batch), here.generate(batch, first=1)]
    assert here._decoder.blocks[0].o[0].data_ptr() == first
    for a, b in zip(want, got, strict=True): assert torch.equal(a.responses, b.responses) and torch.equal(a.logp, b.logp)
    assert sha() == before and torch.equal(logits(other), z)
    with pytest.raises(KeyboardInterrupt):
        with actor.dense_weights(): assert sha() != before; raise KeyboardInterrupt
    assert sha() == before


def test_lower_layers_run_once_for_all_roles(folder, monkeypatch):
    bodies, seen = {}, []
    roles = [load_lm(folder/'llama', lora=Lora(2, first=1), bodies=bodies) for _ in range(2)]
    body = roles[0].body
    assert set(body.layers) and all(n.startswith('layers.1.') for n in body.layers)
    engines = [trained(load(lambda r=r: r, OPTIM, 9), k) for k, r in enumerate(roles, 1)]
    lower = body.model.base_model.layers[0]
    inner = lower.self_attn.forward
    monkeypatch.setattr(lower.self_attn, 'forward', lambda *a, **k: seen.append(1) or inner(*a, **k))
    def both(ids): return [token_logps(e, ids, MASK, 4).detach() for e in engines]
    first = both(IDS + 1)
    assert len(seen) == 1                                                      # the second role passed on what the first one made
    alone = [token_logps(merged(load_lm_again(r, folder)), IDS + 1, MASK, 4).detach() for r in roles]
    for a, b in zip(first, alone, strict=True): close(a, b)
    assert not torch.equal(*first) and both(IDS + 2)[0].shape == first[0].shape and len(seen) == 2
    e = engines[0]
    e.backward(-token_logps(e, IDS + 1, MASK, 4).mean()); e.step()
    assert len(seen) == 2 and not torch.equal(both(IDS + 1)[0], first[0])
    with pytest.raises(ValueError, match='lora_first=9: this model has 2 layers'): load_lm(folder/'llama', lora=Lora(2, first=9))


def test_a_later_role_with_a_lower_adapter_is_not_passed_over(): # what was remembered for the roles before ends above its adapter
    def made(): return Body(llama(61, 32, 3, 4, 2, 64))
    body, alone = made(), made()
    high = role_of(body, lora=Lora(2, first=2)); token_logps(high, IDS, MASK, 4)
    late, other = role_of(body, lora=Lora(2, first=1)), role_of(alone, lora=Lora(2, first=1))
    for p, q in zip(late.adapter, other.adapter, strict=True): torch.nn.init.normal_(p, std=.5); q.data.copy_(p)
    for _ in range(2): close(*(token_logps(r, IDS, MASK, 4).detach() for r in (late, other)), 1e-6)
    close(token_logps(high, IDS, MASK, 4).detach(), token_logps(made().model, IDS, MASK, 4).detach(), 1e-6)


def load_lm_again(role, folder): # from its files: the adapter knows its layers
    path = folder/f'again-{role.name}'
    role.save_pretrained(path)
    again = load_lm(path)
    assert again.body.first == 1 and torch.equal(again.adapter[1], role.adapter[1])
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder/'llama'), path)
    close(logits(theirs).detach(), logits(again).detach(), 1e-6)
    return again
