"Sizes and dummies of recorded passes, on a CPU; the recordings themselves are compared in tests/gpu/gpu_graphs.py."
import gc
from contextlib import contextmanager
import pytest
import torch
from saferlhf.apps import plan
from saferlhf.engine import Optim, load
from saferlhf.hardware.adapters import Body, Lora, role_of
from saferlhf.hardware.graphs import Recorded, Size, fill, size_of, worthwhile
from saferlhf.hardware.packing import layout, recordable, row_inputs
from saferlhf.hardware.precision import capture
from saferlhf.hardware.ranks import Spread
from saferlhf.models import ScoreModel, tiny_model, token_logps
from saferlhf.ppo import PPOConfig
from tiny import FAMILIES, close, lm


def lengths(n, seed=0): # a mask padded on either side, of rows with 1 to 40 tokens
    g = torch.Generator().manual_seed(seed)
    size, first = (torch.randint(lo, 20, (n, 1), generator=g) for lo in (1, 0))
    at = torch.arange(40)
    return ((at >= first) & (at < first + size)).long()


@pytest.mark.parametrize('arch', [f for f in FAMILIES if f != 'gemma2'])
def test_dummies_change_no_hidden_state(arch):
    body, mask = lm(arch).base_model, lengths(7)
    lay = layout(mask)
    ids = torch.randint(2, 61, mask.shape, generator=torch.Generator().manual_seed(1))
    states = lambda lay: body(**row_inputs(body.config, ids.flatten()[lay.index], lay)).last_hidden_state[0]
    for size in (size_of(lay), Size(len(lay.index) + 9, 9, 32)):
        filled = fill(lay, size)
        assert len(filled.index) == len(filled.position) == len(filled.slot) == size.tokens
        close(states(filled)[:len(lay.index)].detach(), states(lay).detach())


def test_sizes_hold_every_batch_and_are_few():
    made = set()
    for k, n in enumerate((1, 3, 40, 200, 201, 512, 700, 1000)):
        lay = layout(lengths(n, k)); size = size_of(lay); made.add(size.tokens)
        filled, N = fill(lay, size), len(lay.index)
        assert N <= size.tokens <= max(1024, 1.125 * N) and size.tokens % 128 == 0 and size.sequences % 16 == 0
        runs = filled.bounds.diff()
        assert len(runs) == size.sequences and filled.bounds[-1] == size.tokens and runs.min() == 0 and runs.max() <= size.longest
        assert runs[:n].tolist() == layout(lengths(n, k)).bounds.diff().tolist() and runs[-1] == 0
        assert len(filled.slot.unique()) == size.tokens and filled.slot.max() < size.sequences * size.longest
        assert set(filled.index.tolist()) == set(lay.index.tolist()), 'padding may hold what is no token'
    assert len({size_of(layout(lengths(500, k))).tokens for k in range(20)}) <= 2


def test_only_what_can_be_recorded_is():
    assert recordable(tiny_model()) and not recordable(tiny_model('gemma2'))     # soft caps
    capped = tiny_model('gemma'); capped.config.final_logit_softcapping = 30.; assert not recordable(capped)
    long = dict(rope_type='longrope', rope_theta=1e4, short_factor=[1.] * 4, long_factor=[2.] * 4, factor=4.,
                original_max_position_embeddings=64)
    scaled = tiny_model('phi3'); scaled.config.rope_parameters = long; assert not recordable(scaled)


def test_nothing_is_recorded_without_a_gpu(monkeypatch):
    e = load(tiny_model, Optim(), 1000, graphs='on')
    if e.device.type == 'cpu':
        assert worthwhile('on', 1000) == (False, False) and not hasattr(e.model.base_model, 'recorded')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert [worthwhile('auto', n) for n in (1, 20, 1000)] == [(False, False), (True, False), (True, True)]
    assert worthwhile('off', 1000) == (False, False) and worthwhile('on', 1) == (True, True)
    for make in (lambda: Spread(graphs='yes'), lambda: worthwhile('yes', 1)):
        with pytest.raises(ValueError, match="graphs is 'auto', 'on' or 'off', not 'yes'"): make()
    assert Spread(graphs='off').load('actor')['graphs'] == 'off'


def test_a_recorded_body_gives_the_head_its_hidden_states():
    "What `packed_forward` does with a recording."
    model, mask = tiny_model(seed=1), lengths(5)
    ids = torch.randint(2, 61, mask.shape)
    want, seen = token_logps(model, ids, mask, 8), []
    body = model.base_model
    def recorded(ids, lay): seen.append(len(ids)); return body(**row_inputs(body.config, ids, lay)).last_hidden_state[0]
    body.recorded = recorded
    close(token_logps(model, ids, mask, 8).detach(), want.detach())
    assert seen == [mask.sum()]


def test_the_plan_knows_what_recordings_hold():
    shape = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                 num_key_value_heads=3, tie_word_embeddings=True)
    config = PPOConfig(prompts=128, max_prompt_tokens=64, max_new_tokens=96, micro_batch=64)
    table, plain = (plan._predict(shape, config, graphs=g) for g in (True, False))
    held = table[table.part == 'recorded layers'].groupby('phase').gpu.sum()
    assert set(held.index) == set(table.phase) and held.min() == held.max() > 0
    assert not plain.part.str.contains('recorded').any()
    waits = table[(table.part == 'gradients') & (table.phase == 'rollout')].groupby('role').gpu.sum()
    assert waits["actor"] == 4 * plan.count(shape) and set(waits.index) == {'actor', 'critic-reward', 'critic-cost'}
    assert 1 <= plan._peak(table)[1] / plan._peak(plain)[1] < 1.3
    for other in (dict(recompute=True), dict(zero=2, gpus=2)):
        assert not plan._predict(shape, config, graphs=True, **other).part.str.contains('recorded').any()


def test_a_recorded_role_goes_through_its_own_adapter(monkeypatch):
    "What a recording runs, without a GPU: weights under other names, the adapter of one role of several."
    body = Body(tiny_model(seed=1))
    roles = [role_of(body, None, Lora(2)) for _ in range(2)]
    for r in roles: torch.nn.init.normal_(r.adapter[1])
    mask = lengths(5); ids = torch.randint(2, 61, mask.shape)
    want = [token_logps(r, ids, mask, 8).detach() for r in roles]
    masters = [p.detach().clone() for p in roles[0].parameters()]
    graph = Recorded(body.model.base_model, zip(roles[0].parameters(), masters, strict=True), roles[0])
    assert len(graph.weights) == len(masters) and all('role0' in name for name in graph.weights)
    lay = layout(mask)
    roles[1].activate()
    h = graph._pass(ids.flatten()[lay.index], lay.position, lay.slot, lay.bounds, lay.longest)
    roles[0].recorded = lambda ids, lay: graph._pass(ids, lay.position, lay.slot, lay.bounds, lay.longest)
    close(token_logps(roles[0], ids, mask, 8).detach(), want[0]); close(token_logps(roles[1], ids, mask, 8).detach(), want[1])
    h.sum().backward()
    assert all(w.grad is not None for w in graph.weights.values()) and all(p.grad is None for p in roles[0].parameters())
    critic = ScoreModel(role_of(body, None, Lora(2), headless=True), 'critic')
    plain, seen = critic(ids, mask).scores.detach(), []
    again = Recorded(body.model.base_model, [], critic.body)
    critic.body.recorded = lambda ids, lay: seen.append(1) or again._pass(ids, lay.position, lay.slot, lay.bounds, lay.longest)
    close(critic(ids, mask).scores.detach(), plain)
    assert seen


def test_nothing_disturbs_a_recording(monkeypatch):
    "An old graph that is collected, or a layer that is compiled, while a stream is recorded makes CUDA drop the recording."
    compiled, seen = [], []

    @contextmanager
    def graph(made, pool=None): seen.append((made, pool, gc.isenabled())); yield
    monkeypatch.setattr(torch.cuda, 'graph', graph)

    def backend(gm, inputs): compiled.append(len(inputs)); return gm
    f = torch.compile(lambda x: x * 2 if x.shape[0] > 5 else x * 3, backend=backend, dynamic=True)
    assert f(torch.ones(8)).sum() == 16 and len(compiled) == 1
    with capture('made', 'room'): assert f(torch.ones(3)).sum() == 9 and f(torch.ones(9)).sum() == 18
    assert len(compiled) == 1 and seen == [('made', 'room', False)] and gc.isenabled()
    with pytest.raises(ZeroDivisionError), capture('made'): raise ZeroDivisionError
    assert gc.isenabled() and f(torch.ones(3)).sum() == 9 and len(compiled) == 2
