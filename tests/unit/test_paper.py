"The profile paper: every number explained, true deviations with reasons, a rehearsal, a base of one's own."
import re
from dataclasses import fields, replace

import pytest
import torch

from saferlhf.apps.commands import main
from saferlhf.data import data_path
from saferlhf.models import load_tokenizer, tiny_model
from saferlhf.objectives import Multiplier
from saferlhf.ppo import PPOConfig, actor_optim, critic_optim
from saferlhf.record.config import deviations
from saferlhf.reproduction import graph as graphs, paper, rehearsal
from saferlhf.reproduction.graph import _CLASSES, config_of, configure, graph
from saferlhf.reproduction.ledger import folder_of, parents_of
from saferlhf.reproduction.paper import _PAPER_CONFIG, _REWARD_SD, COST_SD, _verdict, compare, of, own_base
from saferlhf.reproduction.profiles import PROFILES
from saferlhf.reproduction.prompts import model_path, policy_prompts
from saferlhf.train import ScoreConfig, model_optim

MARKS = r'(web|code|bars only|memory (hi|med|lo|lo-med))(, (code|memory (hi|med|lo)))?(; accumulation: memory lo)?'


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/'runs')); monkeypatch.delenv('SAFERLHF_BASE', raising=False)


def configs(profile='paper'): return {s.name: config_of(s, profile) for s in graph(profile)}


def unexplained(c): return {r.where for r in compare(c).itertuples() if r.verdict.startswith('UNEXPLAINED')}

# the table

def test_every_cell_is_equal_or_explained():
    table = compare(configs())
    assert unexplained(configs()) == set() and len(table) == len(_PAPER_CONFIG) > 150
    assert all(re.fullmatch('equal|(converted|deviates|unknown): .{5,}', v) for v in table.verdict)
    assert all(re.fullmatch(MARKS, m) for m in table.provenance), set(table.provenance)
    for name in ('Table 2', 'Table 3', 'Table 4'): assert set(table[table.table == name]['round']) == {'1', '2', '3'}


def test_no_cell_lets_another_value_pass():
    for cell in _PAPER_CONFIG:
        other = 'other' if isinstance(cell.ours, str) else cell.ours * 2 + 1
        said = _verdict(cell, other)
        assert said.startswith('UNEXPLAINED') or (other == cell.paper and said == 'equal'), cell
        if cell.how.startswith('converted') and cell.paper != cell.ours and isinstance(cell.ours, float):
            assert _verdict(cell, cell.paper).startswith('UNEXPLAINED'), f'{cell}: a number without its unit'
        if cell.paper != cell.ours: assert cell.how, f'{cell} deviates without a reason'


def test_a_changed_default_profile_or_optimizer_is_seen(monkeypatch):
    c = configs()
    moved = c | {'policy-2': replace(c['policy-2'], clip_ratio=.2), 'cost-1': replace(c['cost-1'], epochs=1.)}
    assert unexplained(moved) == {'policy-2.clip_ratio', 'cost-1.epochs'}
    monkeypatch.setitem(PROFILES['paper'], 'policy-3', PROFILES['paper']['policy-3'] | dict(threshold=-.1))
    assert unexplained(configs()) == {'policy-3.threshold'}
    monkeypatch.undo()
    for name in ('actor_optim', 'critic_optim', 'model_optim'):
        make = getattr(paper, name)
        monkeypatch.setattr(paper, name, lambda config, make=make: replace(make(config), warmup=.1))
    seen = unexplained(configs())
    assert seen == {c.where for c in _PAPER_CONFIG if c.where.endswith('.warmup')}
    assert 'policy-1:critic.warmup' in seen


def test_optimizers_are_told_by_the_configuration():
    config = PPOConfig(actor_lr=3e-4, critic_lr=2e-4)
    actor, critic = actor_optim(config), critic_optim(config)
    assert (actor.lr, actor.weight_decay, actor.schedule) == (3e-4, .01, 'cosine')
    assert (critic.lr, critic.weight_decay, critic.schedule) == (2e-4, 0., 'constant')
    assert model_optim(ScoreConfig(weight_decay=.3)).weight_decay == .3


@pytest.mark.parametrize('profile', PROFILES)
def test_parents_come_before_children(profile):
    stages = graph(profile)
    for i, s in enumerate(stages):
        made = {*(x.name for x in stages[:i]), *graphs._base(profile).values()}
        assert set(s.parents.values()) <= made, s

# units and deviations

def test_units_are_converted():
    first, second = of('policy', 1), of('policy', 2)
    assert (first['threshold'], second['threshold']) == (0., pytest.approx(-3 / 20.1))
    for value, wanted in ((first['lambda_lr'], .01 * 6.4 * 4), (second['lambda_lr'], .04 * 6.4 * 8),
                          (second['lambda_init'], .5 * 20.1 / 6.4), (first['nu'], 20.1 / 6.4),
                          (first['kl_coef'], .05 / 6.4), (of('reward-only')['kl_coef'], .1 / 6.4),
                          (first['ptx_coef'], 8 / 6.4)):
        assert value == pytest.approx(wanted)
    theirs = Multiplier(.5, lr=.04, max=50., threshold=-3.)
    ours = Multiplier(.5 * COST_SD / _REWARD_SD, lr=.04 * _REWARD_SD, max=150., threshold=-3 / COST_SD)
    for cost in (5., -20., 2., 0.):                              # step for step the same trade
        assert ours.step([cost / COST_SD]) == pytest.approx(theirs.step([cost]) * COST_SD / _REWARD_SD)


def told(profile):
    "Each stage of a profile, arms included, with its configuration and what the paper has."
    for s in graphs._every(profile).values():
        if s.template == 'compare': continue
        yield s, *configure(graphs.stage_of(s.template, s.overrides), profile, s.overrides, s.round)


@pytest.mark.parametrize('profile', PROFILES)
def test_every_deviation_has_its_reason(profile):
    for s, config, theirs in told(profile):
        for field, d in deviations(config, theirs).items(): assert d['reason'], f'{s.name}: {field} {d}'
    known = {*_CLASSES, 'reward-only', *(f'{kind}-{r}' for kind in _CLASSES for r in (1, 2, 3))}
    assert set(PROFILES[profile]) <= known, 'a stage that nobody reads'


def test_only_sizes_are_scale_and_the_profile_paper_has_no_deviation():
    sizes = ('rows pairs documents trials steps prompts samples batch_size batch micro_batch minibatches window epochs prompt_epochs '
             'block vocab hidden layers heads kv_heads ffn max_prompt_tokens max_new_tokens collected related '
             'unrelated candidates holdout unsafe safe last probes').split()
    for cls in set(_CLASSES.values()):
        assert {f.name for f in fields(cls) if f.metadata.get('scale')} <= set(sizes), cls
    own = {s.name: deviations(c, p) for s, c, p in told('paper') if not s.overrides.get('objective')}
    assert all(not own[s.name] for s in graph('paper') if s.name in own)
    hidden = [c for c in _PAPER_CONFIG if c.how.startswith('deviates') and c.table != 'scripts' and c.where]
    fields_of = {c.where.rpartition('.')[2] for c in hidden}
    assert fields_of == {'batch_size', 'schedule', 'weight_decay'}, 'a size, and two of optimizers'


def test_deviations_of_the_profiles_that_are_run():
    found = {(s.name, k): d for s, c, p in told('gpu') for k, d in deviations(c, p).items()}
    rate = found['policy-1', 'lambda_lr']
    assert rate == dict(value=.3, paper=.256, reason='set for the number of rollouts of the profile')
    assert found['policy-2', 'threshold']['value'] == -.5 and ('policy-1', 'threshold') not in found
    assert found['shaped-100', 'nu']['reason'] == 'asked for in this stage'
    assert ('policy-1', 'nu') not in found
    assert found['reward-only', 'objective']['value'] == 'ppo' and ('reward-only', 'lambda_lr') not in found
    assert ('reward-1', 'lr') in found and ('cost-1', 'kind') not in found
    with pytest.raises(ValueError, match="did you mean 'kl_coef'"):
        configure('policy', 'gpu', dict(kl_coeff=.1), 1)

# a rehearsal

def test_a_rehearsal_runs_real_stages_of_the_profile_paper(capsys, monkeypatch):
    "Fine-tuning to the first policy, at the paper's budgets and vocabulary."
    wanted = ('sft', 'collect-1', 'reward-1', 'cost-1', 'policy-1')
    monkeypatch.setattr(rehearsal, 'graph', lambda profile: [s for s in graph(profile) if s.name in wanted])
    assert main(['dry-run', '--profile', 'paper', '--seed', '3']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [x.split()[0] for x in lines if x.endswith(' runs')] == list(wanted)
    commands = [x for x in lines if x.startswith('saferlhf run')]
    assert [c.split()[2] for c in commands] == list(wanted)
    assert all('--profile paper --seed 3' in c for c in commands) and any('SAFERLHF_BASE' in x for x in lines)
    assert any(x.startswith('memory: saferlhf plan paper') for x in lines)


def test_a_rehearsal_names_what_does_not_fit(capsys, monkeypatch):
    def run(stage, profile, seed): asked.append(stage); assert stage.name != 'cost-1', 'no such width'
    asked = []
    monkeypatch.setattr(rehearsal, '_check_amounts', lambda *a: None)
    with pytest.raises(AssertionError): rehearsal.dry_run('paper', run)
    first = {s.name: s.overrides for s in asked}
    assert list(first) == ['sft', 'collect-1', 'reward-1', 'cost-1'] and first['sft']['rows'] == 64
    monkeypatch.undo()
    stage = next(s for s in graph('smoke') if s.name == 'policy-2'); config = config_of(stage, 'smoke')
    pool = [f'prompt {i}' for i in range(90)]
    monkeypatch.setattr('saferlhf.reproduction.prompts.prompt_pool', lambda *a: pool)
    rehearsal._check_amounts(stage, config, None)
    wrongs = (dict(window=4), 'window'), (dict(prompt_epochs=2), 'whole number'), (dict(objective='pqo'), 'objective')
    for wrong, why in wrongs:
        with pytest.raises(ValueError, match=f'policy-2: .*{why}'):
            rehearsal._check_amounts(stage, replace(config, **wrong), None)


@pytest.mark.parametrize('profile', PROFILES)
def test_every_profile_finds_its_prompts(profile): # at full size, by the tokenizer that ships
    tok, stages = load_tokenizer(data_path('models/nano')), graph(profile)
    for stage in stages: rehearsal._check_amounts(stage, config_of(stage, profile), tok)
    stage = next(s for s in stages if s.name == 'collect-2'); config = config_of(stage, profile)
    with pytest.raises(ValueError, match='collect-2: 2000 prompts a round were asked for'):
        rehearsal._check_amounts(stage, replace(config, candidates=2000), tok)


def test_narrow_models_keep_vocabulary_and_ratios(tmp_path):
    from transformers import AutoConfig
    rehearsal._narrow(tmp_path/'base')
    c = AutoConfig.from_pretrained(tmp_path/'base')
    assert (c.vocab_size, c.num_hidden_layers) == (32001, 2)
    assert c.num_attention_heads == c.num_key_value_heads
    assert c.intermediate_size / c.hidden_size == pytest.approx(11008 / 4096, abs=.05)
    third = next(s for s in graph('paper') if s.name == 'policy-3')
    assert rehearsal._fewer(third, 'paper').overrides['steps'] == 4


def test_commands_share_out_what_trains():
    lines = {x.split()[2]: x for x in rehearsal.commands('paper', 0) if x.startswith('saferlhf run')}
    assert list(lines) == [s.name for s in graph('paper')]
    assert lines['policy-1'] == 'saferlhf run policy-1 --profile paper --seed 0 --gpus 8 --zero 3 --recompute'
    assert '--gpus' not in lines['collect-1'] and not any('--gpus' in x for x in rehearsal.commands('gpu', 0))

# the base

def weights(folder, seed=0):
    tiny_model('llama', seed=seed).save_pretrained(folder); (folder/'tokenizer.json').write_text('{}')
    return folder


def test_the_base_is_ones_own(tmp_path, monkeypatch, capsys):
    assert main(['run', 'sft', '--profile', 'paper']) == 1 and 'SAFERLHF_BASE is not set' in capsys.readouterr().err
    (tmp_path/'empty').mkdir(); monkeypatch.setenv('SAFERLHF_BASE', str(tmp_path/'empty'))
    with pytest.raises(FileNotFoundError, match='no config.json or .*safetensors.*hf download'): own_base()
    monkeypatch.setenv('SAFERLHF_BASE', str(weights(tmp_path/'a')))
    run = folder_of('base_lm', 'paper', 0)
    assert own_base() == run and parents_of('sft', 'paper', 0) == {'base': str(run)} and (run/'DONE').exists()
    loaded = type(tiny_model('llama')).from_pretrained(model_path({'base': run}, 'base'))
    assert torch.equal(loaded.lm_head.weight, tiny_model('llama').lm_head.weight)
    monkeypatch.setenv('SAFERLHF_BASE', str(weights(tmp_path/'b'/'a', seed=1))); assert own_base() != run   # others: another name
    assert {s.parents.get('base') for s in graph('cpu')} == {None}


def test_prompts_come_again_in_whole_passes(monkeypatch):
    monkeypatch.setattr('saferlhf.reproduction.prompts.prompt_pool', lambda kind, tokenizer, most: [f'{kind} {i}' for i in range(60)])
    config = PPOConfig(steps=6, prompts=4, prompt_epochs=3)
    asked = policy_prompts(None, config, 1, [])
    passes = [asked[i:i + 8] for i in (0, 8, 16)]
    assert len(asked) == 24 and all(sorted(p) == sorted(passes[0]) and len(set(p)) == 8 for p in passes) and passes[0] != passes[1]
    assert policy_prompts(None, replace(config, steps=2, prompt_epochs=1), 1, []) == passes[0]
    with pytest.raises(ValueError, match='multiple of 3'): policy_prompts(None, replace(config, steps=7), 1, [])
