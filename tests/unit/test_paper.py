"The profile paper: every number explained, every stage built without weights, and a base of one's own."
import re
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace as Node

import pytest
import torch

import saferlhf.reproduction.dryrun as dryrun
from saferlhf.data import shipped
from saferlhf.models import tiny_model
from saferlhf.reproduction.paper import PAPER_CONFIG, PAPER_ROUNDS, compare, optims, own_base, verdict
from saferlhf.apps.pipeline import ROUNDS, config_of, folder_of, graph, main, parents_of
from saferlhf.reproduction.prompts import model_path, policy_prompts
from saferlhf.ppo import PPOConfig
from saferlhf.reproduction.profiles import PROFILES
from saferlhf.train import ScoreConfig

MARKS = r'(web|code|bars only|memory (hi|med|lo|lo-med))(, (code|memory (hi|med|lo)))?(; (sd: seed|accumulation: memory lo))*'


@pytest.fixture(autouse=True, scope='module')
def read_once():
    "Shipped files do not change while these tests run."
    with pytest.MonkeyPatch.context() as m:
        m.setattr('saferlhf.reproduction.prompts.shipped', lru_cache(shipped))
        yield


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/'runs')); monkeypatch.delenv('SAFERLHF_BASE', raising=False)


def configs(profile='paper'): return {s.name: config_of(s, profile) for s in graph(profile)}


def unexplained(c): return {r.where for r in compare(c).itertuples() if r.verdict.startswith('UNEXPLAINED')}

# the table

def test_every_cell_is_equal_or_explained():
    table = compare(configs())
    assert unexplained(configs()) == set() and len(table) == len(PAPER_CONFIG) > 150
    assert all(re.fullmatch('equal|(converted|deviates|unknown): .{5,}', v) for v in table.verdict)
    assert all(re.fullmatch(MARKS, m) for m in table.provenance), set(table.provenance)
    for name in ('Table 2', 'Table 3', 'Table 4'): assert set(table[table.table == name]['round']) == {'1', '2', '3'}


def test_no_cell_lets_another_value_pass():
    for cell in PAPER_CONFIG:
        other = not cell.ours if isinstance(cell.ours, bool) else 'other' if isinstance(cell.ours, str) else cell.ours * 2 + 1
        said = verdict(cell, other)
        assert said.startswith('UNEXPLAINED') or (other == cell.paper and said == 'equal'), cell
        if cell.paper != cell.ours: assert cell.how, f'{cell} deviates without a reason'


def test_a_changed_default_profile_or_template_is_seen(monkeypatch):
    c = configs()
    moved = c | {'policy-2': replace(c['policy-2'], clip_ratio=.2), 'cost-1': replace(c['cost-1'], epochs=1.)}
    assert unexplained(moved) == {'policy-2.clip_ratio', 'cost-1.epochs'}
    monkeypatch.setitem(ROUNDS, 3, ROUNDS[3] | dict(threshold=-.1))
    assert unexplained(configs()) == set()                                      # the paper's rounds are its own
    monkeypatch.setitem(PAPER_ROUNDS, 'policy-3', PAPER_ROUNDS['policy-3'] | dict(threshold=-.1))
    assert unexplained(configs()) == {'policy-3.threshold'}
    monkeypatch.undo()
    monkeypatch.setitem(PROFILES['paper'], 'policy', dict(samples=2, window=1024))
    assert unexplained(configs()) == {f'policy-{r}.temperature' for r in (1, 2, 3)}
    monkeypatch.undo()
    monkeypatch.setattr('saferlhf.reproduction.paper.optims', lambda template, config: [replace(o, warmup=.1) for o in optims(template, config)])
    seen = unexplained(configs())
    assert seen == {c.where for c in PAPER_CONFIG if c.where.endswith('.warmup')} and 'policy-1:critic.warmup' in seen


def test_optimizers_are_those_of_the_template():
    actor, critic = optims('policy', PPOConfig(actor_lr=3e-4, critic_lr=2e-4))
    assert (actor.lr, actor.weight_decay, actor.schedule, critic.lr, critic.schedule) == (3e-4, .01, 'cosine', 2e-4, 'constant')
    model, = optims('score_model', ScoreConfig(weight_decay=.3)); assert model.weight_decay == .3
    with pytest.raises(ValueError, match='makes no Optim'): optims('evaluate', None)

# the dry run

def test_paper_is_built_without_weights(capsys, monkeypatch):
    assert main(['dry-run', '--profile', 'paper', '--seed', '3']) == 0
    lines = capsys.readouterr().out.splitlines()
    told = {line.split()[0]: line for line in lines[:len(graph('paper'))]}
    assert list(told) == [s.name for s in graph('paper')]
    assert '6,738.42 M trained' in told['sft'] and '6,607.35 M trained' in told['cost-3']
    size = '19,953.1 M trained + 19,953.1 M frozen; 21 steps of 262,144 tokens'
    share = '256 prompts x 2, 64 rows a GPU, 16 at a time; 1792 prompts x 3'
    assert f'{size}: {share}' in told['policy-1']
    assert '12 steps of 524,288 tokens' in told['policy-3'] and '1536 prompts x 4' in told['policy-3']
    assert '13,345.8 M trained' in told['reward-only']
    commands = [line for line in lines if line.startswith('saferlhf run')]
    assert [c.split()[2] for c in commands] == list(told) and all('--profile paper --seed 3' in c for c in commands)
    assert any('SAFERLHF_BASE' in line for line in lines) and any(line.startswith('memory: ') for line in lines)
    monkeypatch.setattr(dryrun, 'LLAMA_7B', dryrun.LLAMA_7B | dict(num_hidden_layers=2, num_key_value_heads=5))
    assert main(['dry-run', '--profile', 'paper']) == 1 and 'sft cannot be built' in capsys.readouterr().err


def test_smoke_is_built_and_what_does_not_fit_is_named(capsys, monkeypatch):
    assert main(['dry-run', '--profile', 'smoke']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:len(graph('smoke'))]] == [s.name for s in graph('smoke')]
    c, stages = configs('smoke'), {s.name: s for s in graph('smoke')}
    world = dryrun.World(*dryrun.shape_of('smoke', c), 1, c)
    for name, wrong, why in (('policy-2', dict(window=4), 'window'),
                             ('policy-2', dict(steps=3, prompt_epochs=2), 'no whole number of passes'),
                             ('collect-2', dict(candidates=9000), 'pool holds'), ('policy-3', dict(objective='pqo'), 'objective')):
        config = replace(c[name], **wrong)
        with pytest.raises(RuntimeError, match=f'{name} cannot be built.*{why}'): dryrun.rehearse(stages[name], config, world)
    with pytest.raises(RuntimeError, match='which no stage before it makes'): dryrun.dry_run('smoke', [stages['policy-1']], c)


def test_a_pass_uses_every_weight_and_no_memory():
    config = replace(configs('smoke')['policy-1'], prompts=4)
    shape = tiny_model('llama').config
    models = {k: dryrun.blank(shape) for k in ('actor', 'reference')} | {k: dryrun.blank(shape, k) for k in ('reward', 'cost')}
    models |= {f'{k} critic': dryrun.blank(shape, 'critic') for k in ('reward', 'cost')}
    dryrun.policy_pass(models, config, 4)
    for role, m in models.items():
        trained = role == 'actor' or role.endswith('critic')
        assert all((p.grad is not None) == trained and p.device.type == 'meta' for p in m.parameters()), role


def test_commands_share_out_what_trains():
    said = dryrun.command(Node(name='policy-1', template='policy'), 'paper', 0)
    assert said == 'saferlhf run policy-1 --profile paper --seed 0 --gpus 8 --zero 3 --recompute'
    for node, profile in ((Node(name='collect-1', template='collect'), 'paper'), (Node(name='policy-1', template='policy'), 'gpu')):
        assert '--gpus' not in dryrun.command(node, profile, 0)

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
