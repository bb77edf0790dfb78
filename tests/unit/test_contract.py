"The contract: names, parameters and defaults that scripts rely on, and a script that uses nothing else."
import ast
import importlib
import inspect
import math
import os
import subprocess
import sys

import pytest
from project import ROOT

SCRIPT = ROOT/'tests/contract_script.py'
CONTRACT = {      # module -> name -> its parameters; what is added later stands behind them and has a default
    'losses': dict(
        masked_mean='x, mask, denominator=None', pairwise_loss='high, low, denominator=None',
        reward_loss='high, low, regularization=0., denominator=None',
        cost_loss='high, low, high_sign, low_sign, regularization=0., pairwise=1., sign=1., denominator=None',
        actor_loss='logp, old_logp, advantages, mask, clip_ratio, denominator=None',
        critic_loss='values, old_values, returns, mask, clip_value, denominator=None',
        lm_loss='logits, labels, denominator=None'),
    'advantages': dict(
        kl_per_token='logp, ref_logp', place_at_end='score, mask',
        gae='rewards, values, mask, gamma=1., lam=.95'),
    'objectives': dict(
        Multiplier='init=1., lr=.1, max=5., threshold=0., window=256, delay=0, min=0.',
        ppo='', ppo_lag='multiplier',
        Objective="channels, weights, observe, state=None, scorers=('reward', 'cost')",
        reward_shaping='nu, normalise=False, clip=inf'),
    'models': dict(
        ScoreModel="body, kind='reward', score_dim=1, bias=False", load_lm='path', load_tokenizer='path',
        llama='vocab_size, hidden, layers, heads, kv_heads, ffn, max_tokens=512, seed=0'),
    'data': dict(
        load_preferences="source, policy='drop', split='train', chosen_is=None",
        load_labels="source, policy='drop', split='train'", load_sft="source, policy='drop', split='train'",
        load_prompts="source, policy='drop', split='train'", shipped='name, *parts'),
    'engine': dict(
        Optim="lr=1e-5, weight_decay=0., schedule='cosine', warmup=.03, beta1=.9, beta2=.95, clip=1.",
        load="make, optim=None, steps=1, engine='torch', precision='fp32', zero=0, compile=False, "
             "recompute=False, offload='', graphs='off'"),
    'rollout': dict(
        Sampler='model, eos, max_new_tokens, temperature=1., greedy=False, seed=0, top_p=1., slots=None, '
                'keep=False',
        respond='sampler, tokenizer, prompts, max_prompt_tokens, batch_size=128, samples=1, first=0',
        score_texts='scorer, tokenizer, prompts, responses, max_prompt_tokens, max_new_tokens, '
                    'batch_tokens=16384'),
    'train': dict(
        ScoreConfig="kind='reward', pairs=1_000_000, epochs=2., batch_size=128, lr=2e-5, weight_decay=.1, "
                    "schedule='cosine', warmup=.03, regularization=.01, max_prompt_tokens=256, "
                    'max_new_tokens=256',
        score_batches='pairs, tokenizer, config, seed=0',
        score_step='engine, batch, kind, regularization=0., micro_batch=0',
        sft_step='engine, batch, micro_batch=0',
        text_batch='rows, tokenizer, max_prompt_tokens, max_new_tokens'),
    'text': dict(prompt_batch='prompts, tokenizer, max_prompt_tokens'),
    'ppo': dict(
        PPOConfig="objective='ppo_lag', steps=1000, prompts=128, samples=1, prompt_epochs=1, "
                  'max_prompt_tokens=256, max_new_tokens=256, temperature=1., epochs=1, minibatches=1, '
                  'micro_batch=16, actor_lr=1e-5, critic_lr=5e-6, kl_coef=.05, clip_ratio=.1, clip_value=5., '
                  'gamma=1., gae_lambda=.95, ptx_coef=8., threshold=0., lambda_init=1., lambda_lr=.01, '
                  'lambda_max=5., window=128, nu=1., normalise=False',
        ppo_step='actor, reference, critics, scorers, sampler, prompts, ptx, objective, config, step'),
}
NAMES = [(module, name) for module, names in CONTRACT.items() for name in names]


def shown(signature):
    "Name, whether it is a star argument, and default of each parameter."
    return [(p.name, p.kind is p.VAR_POSITIONAL, p.default) for p in signature.parameters.values()]


@pytest.mark.parametrize('module, name', NAMES, ids=lambda x: x)
def test_contract(module, name):
    made = eval(f'lambda {CONTRACT[module][name]}: None', {'inf': math.inf})
    found = shown(inspect.signature(getattr(importlib.import_module(f'saferlhf.{module}'), name)))
    wanted = shown(inspect.signature(made))
    assert found[:len(wanted)] == wanted
    empty = inspect.Parameter.empty
    added = [name for name, star, default in found[len(wanted):] if default is empty and not star]
    assert not added, f'{added}: what is added to the contract must have a default'


def test_contract_of_objects():
    from saferlhf.models import ScoreModel
    from saferlhf.objectives import Multiplier, ppo_lag
    assert all(hasattr(ScoreModel, n) for n in ('from_pretrained', 'save_pretrained'))
    assert 'kind' in inspect.signature(ScoreModel.from_pretrained).parameters
    m = Multiplier(); m.step([1.]); state = m.state_dict(); other = Multiplier(); other.load_state_dict(state)
    assert other.value == m.value > 1 and ppo_lag(m).state is m
    assert set(vars(ppo_lag(m))) >= {'channels', 'weights', 'observe', 'state'}


def test_the_script_uses_the_contract_alone_and_all_of_it():
    tree = ast.parse(SCRIPT.read_text())
    whole = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    parts = {(n.module, a.name) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    assert whole - set(sys.stdlib_module_names) == {'torch'}
    used = {(module, name) for module, name in parts if module not in sys.stdlib_module_names}
    assert used == {(f'saferlhf.{module}', name) for module, name in NAMES}
    private = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr.startswith('_')}
    assert not private, private


def test_a_script_written_against_the_contract_goes_on_working(tmp_path):
    "Fine-tuning, reward and cost model, three steps of PPO-Lag: losses fall, lambda moves, all is finite."
    env = os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    run = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines()[-1] == 'the contract holds'
