"One rank and two, plain torch and DeepSpeed at every ZeRO stage: the same losses, lambda, metrics and weights; and a rank that breaks."
import json
import os
import time
from pathlib import Path

import pytest
import ranked_stages as stages
from project import ROOT
from tiny import close

import saferlhf
from saferlhf.models import ScoreModel, load_lm
from saferlhf.record.launch import _failure, _ranks_command, launch
from saferlhf.hardware.ranks import Spread

CASES = [f'{zero}{offload}' for _, zero, offload in stages.CASES]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    stages.models(folder)
    return folder


@pytest.fixture(scope='module')
def plain(folder): return stages.stages(folder)                                   # torch, one rank, this process


@pytest.fixture(scope='module')
def processes(): # they import what this one imports
    where = os.pathsep.join(map(str, (Path(saferlhf.__file__).parents[1], ROOT/'tests', ROOT/'tests/ranks')))
    with pytest.MonkeyPatch.context() as m:
        m.setenv('PYTHONPATH', where); m.setenv('OMP_NUM_THREADS', '1')
        yield


@pytest.fixture(scope='module')
def ranked(folder, plain, processes): # one job of two ranks for everything
    launch(stages.everything, 2, [str(folder)])
    return {case: [json.loads((folder/f'{r}-{case}.json').read_text()) for r in (0, 1)] for case in CASES}


def test_the_rows_are_hard_ones(plain):
    for lengths in plain['ppo']['lengths']: assert len(set(lengths)) > 3
    assert any(1 in lengths for lengths in plain['ppo']['lengths'])                # an answer that is EOS alone
    assert not stages.rows(7)['mask'][1].any()                                     # and a supervised row without a token


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('stage', ('ppo', 'sft', 'score'))
def test_two_ranks_are_one(plain, ranked, stage, case):
    one, two = plain[stage], [r[stage] for r in ranked[case]]
    assert two[0]['log'] == two[1]['log']                                          # every number, before any mean over ranks
    for a, b in zip(one['log'], two[0]['log'], strict=True):
        assert set(a) == set(b)
        close(list(b.values()), list(a.values()), 1e-5)
    close(two[0]['actor'], one['actor'], 1e-5)
    assert abs(one['log'][0]['grad_norm']) > stages.OPTIM.clip                     # clipping is by the norm over all ranks


@pytest.mark.parametrize('case', CASES)
def test_ranks_answer_their_share_and_agree_on_lambda(plain, ranked, case):
    two = [r['ppo'] for r in ranked[case]]
    share = len(plain['ppo']['tokens'][0]) // 2
    for step, lengths in enumerate(plain['ppo']['lengths']):
        assert [n for r in two for n in r['lengths'][step]] == lengths and len(two[1]['lengths'][step]) == share
        answers = [a[:n] for r in two for a, n in zip(r['tokens'][step], r['lengths'][step], strict=True)]
        assert answers == [a[:n] for a, n in zip(plain['ppo']['tokens'][step], lengths, strict=True)]
    assert two[0]['lam'] == two[1]['lam']
    close(two[0]['lam']['costs'], plain['ppo']['lam']['costs'], 1e-5)              # the window is in prompt order
    close(two[0]['lam']['log_lam'], plain['ppo']['lam']['log_lam'], 1e-5)
    close(two[0]['critic'], plain['ppo']['critic'], 1e-5)


def test_a_model_is_never_whole_on_a_rank_and_the_next_one_may_be(ranked):
    for r in ranked['3']:
        assert not any(r['partitioned']['lm'] + r['partitioned']['score']) and all(r['partitioned']['after'])


def test_a_layer_is_one_piece_under_zero_3(ranked):
    layers = stages.lm(vocab=stages.VOCAB).config.num_hidden_layers
    assert [ranked[case][0]['ppo']['pieces'] for case in ('2', '3', '3all')] == [0, layers, layers]
    assert ranked['3'][0]['gpt2']['pieces'] == layers


def test_other_families_end_where_they_end(ranked): # no decoder of ours: with the hooks of ZeRO-3 on, ranks would wait for ever
    a, b = (r['gpt2'] for r in ranked['3'])
    assert a['log'] == b['log'] and a['lengths'] != b['lengths']


@pytest.mark.parametrize('zero', range(4))
def test_saved_models_are_ordinary(folder, plain, ranked, zero):
    both = (f'saved-deepspeed-{zero}', load_lm, 'actor'), (f'critic-deepspeed-{zero}', ScoreModel.from_pretrained, 'critic')
    for name, load, kind in both:
        model = load(folder/name)
        assert (folder/name/'model.safetensors').exists()
        close([float(p.detach().double().abs().sum()) for p in model.parameters()], plain['ppo'][kind], 1e-5)


def test_a_rank_that_breaks_ends_the_run(tmp_path, processes):
    start = time.time()
    with pytest.raises(RuntimeError) as e: launch(stages.breaks, 2, [str(tmp_path)])
    said = str(e.value)
    assert said.splitlines()[0] == '2 ranks stopped; rank 1 first: ValueError: rank one broke' and time.time() - start < 60
    for r in (0, 1):                                                               # nobody is left, the one that waited neither
        with pytest.raises(ProcessLookupError): os.kill(int((tmp_path/f'pid-{r}').read_text()), 0)


def test_the_command_of_several_nodes(monkeypatch, tmp_path):
    target = ['-m', 'saferlhf.reproduction.training', 'policy', '/runs/policy/x']
    monkeypatch.delenv('SLURM_JOB_ID', raising=False)
    with pytest.raises(ValueError, match='hostfile'): _ranks_command(target, Spread.of(dict(gpus=8, nodes=2)))
    spread = Spread.of(dict(gpus=8, nodes=2, hostfile=str(tmp_path/'hosts')))
    with pytest.raises(FileNotFoundError, match='no hostfile'): _ranks_command(target, spread)      # DeepSpeed would run on one node
    (tmp_path/'hosts').touch(); line = _ranks_command(target, spread)
    told = ['--num_nodes', '2', '--num_gpus', '8', '--no_python', '--no_local_rank']
    assert line[1:5] == ['--hostfile', spread.hostfile, '--master_port', '29500'] and line[5:11] == told and line[12:] == target
    assert line[0].endswith('deepspeed')
    monkeypatch.setenv('SLURM_JOB_ID', '7'); monkeypatch.setenv('SLURM_JOB_NODELIST', 'a[1-2]')
    monkeypatch.setattr('saferlhf.record.launch._first_node', lambda: 'a1')
    line = ' '.join(_ranks_command(target, Spread.of(dict(gpus=8, nodes=2))))
    assert line.startswith('srun --nodes=2 --ntasks-per-node=1') and '--nproc-per-node=8' in line and '--rdzv-endpoint=a1:29500' in line


def test_a_machine_that_breaks_ends_the_others(monkeypatch):
    "DeepSpeed's launcher waits for the other machines when one is gone; it is told to end them, once."
    said = ['nodeb: Traceback (most recent call last):', 'nodeb: ValueError: the rows of nodeb are bad',
            'nodeb: [ERROR] [launch.py:259:sigkill_handler] x exits with return code = 1', 'pdsh@a: nodeb: ssh exited with exit code 1']
    waits = "trap 'echo ended; exit 3' TERM; printf '%s\\n' \"$@\"; for i in $(seq 600); do sleep .1; done"
    monkeypatch.setattr('saferlhf.record.launch._ranks_command', lambda *a: ['bash', '-c', waits, 'bash', *said])
    start = time.time()
    with pytest.raises(RuntimeError) as e: launch(['-m', 'x'], Spread.of(dict(nodes=2, hostfile='hosts')))
    assert str(e.value).splitlines()[0] == '2 ranks stopped; one on nodeb first: ValueError: the rows of nodeb are bad'
    assert str(e.value).count('ended') == 1 and time.time() - start < 20


def test_the_first_machine_to_report_is_the_cause():
    block = 'Root Cause (first observed failure):\n[0]:\n  rank      : {} (local_rank: 0)\n  {}\n{}\n'
    ended = 'x.SignalException: Process 7 got signal: 15\n'
    said = block.format(1, 'ValueError: bad rows', '=' * 60) + ended + block.format(0, 'RuntimeError: later', '=' * 60)
    assert _failure(said, 2, 1).splitlines()[0] == '2 ranks stopped; rank 1 first: ValueError: bad rows'
    assert 'no error was reported' in _failure(block.format(0, '', ''), 2, -9)


def test_rows_must_divide(monkeypatch):
    from saferlhf import ppo
    monkeypatch.setattr(ppo, 'ranks', lambda: 3)
    with pytest.raises(ValueError, match='do not divide among 3 ranks'): ppo._check_shares(16, stages.CONFIG)
    ppo._check_shares(48, stages.CONFIG)


def test_a_spread_says_what_it_cannot_do():
    for told, why in ((dict(gpus=0), 'at least one rank'), (dict(zero=4), 'stages 0 to 3'), (dict(engine='jax'), "not 'jax'"),
                      (dict(micro_batch=-1), 'rows'), (dict(engine='torch', zero=1), "need engine='deepspeed'"),
                      (dict(zero=3, offload={'actor': 'disk'}), 'one of'), (dict(zero=3, offload={'actor': 'weights'}), "'all'")):
        with pytest.raises(ValueError, match=why): Spread.of(told)
    with pytest.raises(ValueError, match='no role'): Spread().load('critic')
    assert Spread.of(dict(nodes=2, gpus=4)).ranks == 8


def test_the_command_line_asks_for_a_spread(monkeypatch, capsys):
    from saferlhf.apps import commands
    asked = []
    monkeypatch.setenv('SAFERLHF_SPREAD', '')                                      # put back afterwards
    def record(a):
        "What the stages would be asked for."
        asked.append(Spread.wanted())
    monkeypatch.setitem(commands._COMMANDS, 'dry-run', (record, commands._COMMANDS['dry-run'][1]))
    call = lambda *told: commands.main(['dry-run', '--profile', 'smoke', *told])
    assert call(*'--gpus 2 --zero 3 --offload reference=weights actor=all --recompute'.split()) == 0
    s, = asked
    assert (s.gpus, s.zero, s.engine, s.offload, s.recompute) == (2, 3, 'deepspeed', {'reference': 'weights', 'actor': 'all'}, True)
    for told, why in ((['--offload', 'reference'], 'ROLE=WHAT'), (['--zero', '2', '--offload', 'cost=weights'], 'needs zero=3')):
        assert call(*told) == 1 and why in capsys.readouterr().err
    assert Spread.wanted() == Spread()                                             # a later call starts anew
    call(); assert asked[-1] == Spread()
    assert call('--graphs', 'off') == 0 and asked[-1] == Spread(graphs='off')
