"What a run starts with: every field has a source, both ends are what was run, and a full memory says what helps."
import math
import re
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from project import ROOT

from saferlhf.apps import defaults as module
from saferlhf.apps.defaults import Default, defaults, described, less_memory, spread_for, savings
from saferlhf.apps.plan import count, fit
from saferlhf.apps.settings import settable, settings_of
from saferlhf.hardware.ranks import Spread
from saferlhf.models import tiny_model
from saferlhf.reproduction.paper import LLAMA_7B, of

SMOLLM2 = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
               num_key_value_heads=3, tie_word_embeddings=True)
LENGTHS = np.arange(100), np.arange(60)
COMMANDS = 'sft', 'reward', 'cost', 'align'
values = lambda found: {k: d.value for k, d in found.items()}


def ask(command, shape=SMOLLM2, rows=20_000, tokens=LENGTHS, gb=80., gpu=True): return defaults(command, shape, rows, tokens, gb, gpu)


@pytest.mark.parametrize('command', COMMANDS)
def test_every_field_has_a_value_a_source_and_a_reason(command):
    for gpu in (True, False):
        found = ask(command, gpu=gpu)
        assert list(found) == list(settable(command)) == list(described(command))
        for name, d in found.items():
            assert d.source in ('measured', 'paper', 'guess', 'data', 'memory', 'choice') and d.why, name
            assert '\n' not in d.why and type(d.value) is type(settable(command)[name].default), name
        settings_of(command, {}, values(found))
    known = {k: d for k, d in described(command).items() if d.value is not None}
    assert known == {k: d for k, d in ask(command).items() if k in known}      # what a page of help says is what is done


def test_both_ends_are_what_was_run():
    small = values(ask('align')) | {f'{c}.lr': ask(c)['lr'].value for c in ('sft', 'cost')}
    measured = dict(actor_lr=4e-5, critic_lr=2e-5, kl_coef=.05, minibatches=2, lambda_init=1., lambda_lr=.1, window=256, ptx_coef=.1,
                    prompts=128, steps=80, clip_ratio=.2) | {'sft.lr': 5e-5, 'cost.lr': 6e-5}
    assert small.items() >= measured.items()
    assert {ask('align')[k].source for k in measured if '.' not in k} == {'measured'}
    large, paper = ask('align', LLAMA_7B, gb=1000.), of('policy', 1)
    for name in ('kl_coef', 'ptx_coef', 'clip_ratio', 'clip_value', 'lambda_init', 'lambda_lr', 'lambda_max', 'window', 'minibatches',
                 'prompts'):
        assert large[name].value == paper[name] and large[name].source == 'paper', name
    assert (large['actor_lr'].value, large['critic_lr'].value) == (1e-5, 5e-6)
    for command, batch in (('sft', 256), ('reward', 128), ('cost', 128)):
        found = ask(command, LLAMA_7B)
        assert (found['lr'].value, found['batch_size'].value, found['lr'].source) == (2e-5, batch, 'paper')
    assert large['steps'].source == 'guess', 'no run with 7B took 80 steps'


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('gpu', [True, False])
def test_between_the_ends_numbers_move_one_way_and_are_called_guesses(command, gpu):
    sizes = [5e7, 1.35e8, 4e8, 1.1e9, 3e9, float(count(LLAMA_7B)), 2e10]
    found = [module._sized(command, n, gpu) for n in sizes]
    for name in found[0]:
        d = np.diff([f[name].value for f in found])
        assert (d >= 0).all() or (d <= 0).all(), name
        if found[1][name].value == found[5][name].value: continue
        assert [f[name].source for f in found] == ['guess', 'measured', 'guess', 'guess', 'guess', 'paper', 'guess'], name
    assert found[0] != found[-1]
    assert module._sized(command, 1.7e8, gpu) == found[1], 'what is called measured is the number that was run'


def test_half_the_way_in_log_size_is_the_geometric_mean():
    middle = math.sqrt(135e6 * count(LLAMA_7B))
    ends = {(4e-5, 1e-5): 2e-5, (0., 1.): .5, (64, 1024): 256}
    assert {k: module._between(*k, middle) for k in ends} == ends


def test_budgets_hold_95_in_100_and_batches_leave_twenty_steps():
    few = ask('sft', rows=160)
    assert (few['max_prompt_tokens'].value, few['max_new_tokens'].value) == (96, 64)         # 94.05 and 56.05, up to 16s
    assert few['batch_size'] == Default(16, 'rows', 'data', few['batch_size'].why)           # 160 rows twice, 20 steps of 16
    assert ask('sft', rows=319)['batch_size'].value == 16 and ask('sft', rows=320)['batch_size'].value == 32
    assert ask('reward', rows=3)['batch_size'].value == 1
    policy = values(ask('align', rows=200, tokens=(LENGTHS[0], [])))
    assert policy['prompts'] == 32 and policy['steps'] == 25 and policy['max_new_tokens'] == 128
    assert policy['prompts'] * policy['steps'] <= 4 * 200 and ask('align', rows=10)['steps'].value == 20
    assert ask('sft', tokens=([3000] * 9, [1]))['max_prompt_tokens'].value == 512
    few = values(ask('sft', SMOLLM2 | dict(max_position_embeddings=128)))
    assert (few['max_prompt_tokens'], few['max_new_tokens']) == (64, 63), 'as many as the model has positions'
    assert ask('sft', rows=100_000)['rows'].value == 100_000                                 # none is left out in silence


def test_a_cpu_gets_shorter_budgets_and_fewer_prompts_and_says_so():
    long = [300] * 50, [300] * 50
    found = ask('align', tokens=long, gb=12., gpu=False)
    assert values(found).items() >= dict(max_prompt_tokens=96, max_new_tokens=64, prompts=32, steps=16).items()
    assert 'on a CPU at most 96' in found['max_prompt_tokens'].why and 'two cores' in found['prompts'].why
    assert 'two cores' in found['actor_lr'].why and found['actor_lr'].value == 5e-5


def test_rates_of_adapters_are_called_measured_where_they_were():
    "Ten times those of all weights: at 135M on a GPU, score models and policies of ranks 4, 8 and 16; a guess elsewhere."
    def rate(command, rank, shape=SMOLLM2, gpu=True):
        whole, found = (defaults(command, shape, 20_000, LENGTHS, 800., gpu, rank=r) for r in (0, rank))
        name = 'actor_lr' if command == 'align' else 'lr'
        assert found[name].value == 10 * whole[name].value and found[name].why.startswith('10 times that of all weights')
        return found[name]
    files = pd.read_csv(ROOT/'data/results/bench/ranks.csv')
    kl = files[(files.what == 'kl') & ~files.rates.str.startswith('[0.0018')].groupby(['rank', 'seed']).value.mean().unstack()
    for rank in (4, 8, 16):
        found = [rate(c, rank) for c in ('align', 'reward', 'cost')]
        assert {d.source for d in found} == {'measured'}
        assert f'{(kl.loc[rank] / kl.loc[0]).mean():.0%} of their KL' in found[0].why
    assert set(module._MOVED) == set(kl.index) - {0}
    for elsewhere in (rate('align', 32), rate('sft', 16), rate('align', 16, LLAMA_7B), rate('align', 16, gpu=False)):
        assert elsewhere.source == 'guess' and 'ranks 4, 8, 16, on a GPU' in elsewhere.why


def test_micro_batches_are_the_largest_that_fit():
    memory = 12., 16., 80.
    sizes = [ask('align', gb=gb)['micro_batch'] for gb in memory]
    assert 4 <= sizes[0].value < sizes[1].value < sizes[2].value == 64 and {d.source for d in sizes} == {'memory'}
    config = settings_of('align', {}, values(ask('align')))
    for d, gb in zip(sizes, memory, strict=True):
        enough = lambda k, gb=gb: (w := fit(SMOLLM2, replace(config, micro_batch=k), 1, gb, 0., 0, False))['fits'] and not w['recompute']
        assert enough(d.value) and (d.value == 64 or not enough(2 * d.value))
    assert 'nothing fits in 24 GB' in ask('align', LLAMA_7B, gb=24.)['micro_batch'].why
    other = tiny_model('gpt2', 61, 0).config
    assert 'do not know this family' in ask('align', other)['micro_batch'].why and ask('sft', other)['lr'].source == 'guess'


def test_a_stage_is_spread_as_asked_for_and_else_as_memory_allows():
    config = settings_of('cost', {}, values(ask('cost', LLAMA_7B)))
    made = spread_for('cost', config, LLAMA_7B, Spread(), 200.)
    assert made.recompute or made.micro_batch < config.batch_size
    assert fit(LLAMA_7B, config, 1, 200., 0., 0, micro_batch=made.micro_batch)['fits']
    assert spread_for('cost', config, LLAMA_7B, Spread(micro_batch=3, recompute=True), 200.).micro_batch == 3
    assert spread_for('cost', config, SMOLLM2, Spread(), 1000.) == Spread(micro_batch=64)
    small = settings_of('cost', {}, values(ask('cost')))
    assert spread_for('cost', small, SMOLLM2, Spread(), 80.) == Spread()


def test_less_rows_in_a_pass_need_less_memory_in_the_plan_of_score_models_too():
    config = replace(settings_of('cost', {}, values(ask('cost'))), batch_size=128)
    gpu = [fit(SMOLLM2, config, 1, 1., 1., zero=0, advise=False, micro_batch=k)['gpu'] for k in (0, 128, 32, 8)]
    assert gpu[0] == gpu[1] > gpu[2] > gpu[3]


def test_a_full_memory_says_what_helps_and_how_much(tmp_path):
    import json
    config = settings_of('align', {}, values(ask('align')))
    said = savings(SMOLLM2, config)
    assert f'micro_batch={config.micro_batch // 4} instead of {config.micro_batch} needs ' in said and 'recompute needs' in said
    numbers = [float(part.split(' GB')[0].split()[-1]) for part in said.split(', ')]
    assert numbers == sorted(numbers) and numbers[-2] < numbers[-1] and said.endswith(f'as it was, about {numbers[-1]} GB')
    assert 'zero=3' not in savings(LLAMA_7B, replace(config, lora_rank=8), gpus=8)        # adapters share a whole body
    assert 'zero=3' in savings(LLAMA_7B, config, gpus=8) and 'recompute' not in savings(SMOLLM2, config, recompute=True)
    (tmp_path/'model').mkdir(); (tmp_path/'model/config.json').write_text(json.dumps(SMOLLM2), encoding='utf-8')
    class Run: manifest = dict(parent_folders=dict(sft=str(tmp_path)), stage='policy')
    for Run.config in (config, asdict(config)): assert less_memory(Run) == said
    (tmp_path/'model/config.json').write_text('{}', encoding='utf-8'); assert less_memory(Run) == ''
    Run.manifest = dict(parent_folders={}, stage='policy'); assert less_memory(Run) == ''


@pytest.mark.parametrize('wrong, said', [(dict(command='chat'), "not 'chat'"), (dict(command='sft', rows=0), 'sft has no rows')])
def test_wrong_requests_end_in_one_line(wrong, said):
    with pytest.raises(ValueError, match=said): ask(**wrong)


def test_several_answers_to_a_prompt_are_planned_for():
    "The window holds a whole rollout, and a step without critics needs less memory."
    def found(**asked): return defaults('align', SMOLLM2, 20_000, LENGTHS, 80., True, asked=asked)
    plain, four, relative = found(), found(samples=4), found(samples=4, estimator='leave_one_out')
    assert four['window'].value == 4 * four['prompts'].value > plain['window'].value and four['samples'].source == 'asked for'
    used = lambda d: (-d['micro_batch'].value, float(re.search(r'about ([\d.]+) of', d['micro_batch'].why)[1]))
    assert used(relative) < used(four)
    new = 'transform', 'controller', 'delta', 'estimator', 'pid_kp', 'pid_kd'
    assert not [k for k in new if 'configuration of the paper' in described('align')[k].why]
