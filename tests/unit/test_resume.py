"What is saved comes back bit for bit, on time, on a signal, and only from files that are whole."
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import lm, prompt_rows

import saferlhf.record.resume as resume
from saferlhf.engine import Optim, TorchEngine
from saferlhf.hardware.precision import finite
from saferlhf.hardware.seeds import random_state, seed_all, set_random_state
from saferlhf.models import token_logps
from saferlhf.objectives import Multiplier
from saferlhf.record.files import newest, read_lines
from saferlhf.record.resume import Interrupted, Saver, agree, cached, read_state, stopping, write_state
from saferlhf.record.run import Run
from saferlhf.train import loop


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/'runs'))
    for name in ('STEPS', 'MINUTES'): monkeypatch.delenv(f'SAFERLHF_SAVE_{name}', raising=False)
    return tmp_path


def equal(a, b):
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray | np.generic):
        return type(a) is type(b) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict): return list(a) == list(b) and all(equal(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple): return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b)


texts = st.text(st.characters(exclude_categories=[]), max_size=5)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
arrays = st.sampled_from([torch.arange(3.), torch.tensor(2), torch.ones(2, 2, dtype=torch.bfloat16),
                          torch.zeros(0, 3),
                          np.arange(3, dtype=np.float32), np.float32(.1), np.array([True]),
                          torch.arange(6).view(2, 3).t()])
keys = st.integers() | st.text(max_size=3) | st.none() | st.booleans()
inner = lambda x: st.lists(x, max_size=3) | st.tuples(x, x) | st.dictionaries(keys, x, max_size=3)
nests = st.recursive(plain | arrays, inner, max_leaves=8)


@settings(max_examples=60, deadline=None)
@given(nests)
def test_state_comes_back_as_it_was(state):
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        write_state(folder, state)
        assert equal(read_state(folder), state)


def test_state_is_plain_data(tmp_path):
    for odd in (print, {1, 2}, b'x', object(), np.array(['text'])):
        with pytest.raises(TypeError): write_state(tmp_path, {'odd': odd})
    w = torch.randn(4, 4)
    write_state(tmp_path, {'a': w, 'b': w, 'view': w[1]})
    assert sorted(p.name for p in tmp_path.iterdir()) == ['state.json', 'tensors.safetensors']
    assert (tmp_path/'tensors.safetensors').stat().st_size < 400                # one copy of what is shared


def test_random_streams():
    seed_all(3); draw = lambda: (random.random(), np.random.rand(), torch.rand(1).item())
    state, first = random_state(), draw()
    assert draw() != first
    set_random_state(state); assert draw() == first
    seed_all(3); assert draw() == first


# --- a run with everything that moves: an engine, the multiplier, a dict, the global streams
def train(steps=6, every=1, act=lambda i: None, minutes=5.):
    run = Run.start('policy', {}, sources=())
    seed_all(0)
    engine, multiplier, best = TorchEngine(lm(), Optim(lr=1e-2, warmup=.5), steps), Multiplier(window=16), {}
    def step(i):
        act(i)
        b = prompt_rows(seed=i)
        loss = -token_logps(engine, b['input_ids'], b['attention_mask'], 3).mean() * torch.rand(1).item()
        engine.backward(loss)
        best.update(loss=min(loss.item(), best.get('loss', 9e9)))
        lam = multiplier.step([random.random(), np.random.rand()])
        return dict(loss=loss.detach(), grad_norm=engine.step(), lam=lam, cost=best['loss'])
    try:
        loop(step, steps, run.log,
             save=run.saver(dict(engine=engine, multiplier=multiplier, best=best), every, minutes))
    finally: run.close()
    rows = [{k: v for k, v in r.items() if k != 'seconds'} for r in read_lines(run.folder/'metrics.jsonl')]
    return run, rows, [p.clone() for p in engine.model.parameters()], multiplier.state_dict(), best


def same(a, b): return a[1] == b[1] and all(map(torch.equal, a[2], b[2])) and a[3:] == b[3:]


@pytest.fixture
def whole(monkeypatch, tmp_path):
    with monkeypatch.context() as m:
        m.setenv('SAFERLHF_RUNS', str(tmp_path/'whole'))
        return train()


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
def test_a_signal_saves_and_the_run_goes_on(whole, name, capsys):
    before = signal.getsignal(signal.SIGTERM)                      # a run of another test may still be open here
    with pytest.raises(Interrupted, match=f'{name}: step 2 is saved.*again') as e:
        train(every=0, act=lambda i: i == 2 and os.kill(os.getpid(), getattr(signal, name)))
    assert e.value.code and signal.getsignal(signal.SIGTERM) is before
    resumed = train(every=0)
    assert same(whole, resumed) and len(resumed[1]) == 6
    out = capsys.readouterr().out
    assert 'start 2, the one before was interrupted' in out and 'goes on after step 2: step-00000002' in out
    assert [r['step'] for r in resumed[0].manifest['resumed']] == [3]


def crash(at):
    def act(i):
        if i == at: raise KeyError('a bug')
    return act


def test_logged_steps_after_the_checkpoint_are_made_again(whole):
    # saved after step 2; steps 3 and 4 were logged
    with pytest.raises(KeyError): train(every=3, act=crash(5))
    assert same(whole, train(every=3))


def test_a_damaged_checkpoint_is_skipped(whole, capsys):
    with pytest.raises(KeyError): train(act=crash(4))
    folder = next((resume.Path(os.environ['SAFERLHF_RUNS'])/'policy').iterdir())/'checkpoint'
    assert sorted(p.name for p in folder.iterdir()) == ['step-00000002', 'step-00000003']      # two stay
    f = folder/'step-00000003/state/common/tensors.safetensors'; b = bytearray(f.read_bytes()); b[-1] ^= 1
    f.write_bytes(b)
    assert same(whole, train())
    assert 'skipped the damaged' in (out := capsys.readouterr().out) and 'goes on after step 2' in out


def test_time_decides_too(monkeypatch, tmp_path):
    now, saves = [0.], []
    monkeypatch.setattr(resume.time, 'monotonic', lambda: now[0])
    with Saver(tmp_path/'c', {}, steps=0, minutes=2.) as save:
        save._cost = 10.                                                 # seconds: a fifth of a step
        monkeypatch.setattr(save, 'save', lambda i: (saves.append(i), setattr(save, 'saved', now[0])))
        for i in range(10): now[0] += 50; save(i, i == 9)
    # every third step is more than two minutes after a save
    assert saves == [2, 5, 8, 9]
    monkeypatch.setenv('SAFERLHF_SAVE_STEPS', '7'); monkeypatch.setenv('SAFERLHF_SAVE_MINUTES', '.5')
    run = Run.start('sft', {}); s = run.saver({}); run.close()
    assert (s.steps, s.minutes) == (7, .5)


def test_long_steps_are_saved_one_by_one_where_a_save_is_cheap(monkeypatch, tmp_path):
    "So that no more than the step is lost when a signal interrupts it."
    now, saves = [0.], []
    monkeypatch.setattr(resume.time, 'monotonic', lambda: now[0])
    with Saver(tmp_path/'c', {}, steps=0, minutes=100.) as save:
        whole = save.save
        monkeypatch.setattr(save, 'save', lambda i: (saves.append(i), whole(i)))
        for i in range(9):
            now[0] += 3. if 3 <= i < 6 else 1.
            if i == 4: monkeypatch.setattr(resume, 'save_checkpoint', lambda *a, **k: now.__setitem__(0, now[0] + 1.))     # it costs
            save(i, False)
    assert saves == [3, 4]


def test_what_does_not_fit_is_refused(tmp_path):
    class Other(dict): pass
    with Saver(tmp_path, {'model': Multiplier()}) as save: save.restore(); save(0, True)
    for objects in ({'model': Other()}, {'model': Multiplier(), 'more': {}}, {}):
        with pytest.raises(ValueError, match='use the same engine'): Saver(tmp_path, objects).restore()
    with pytest.raises(ValueError, match='do not fit a window of 1'):
        full = Multiplier(window=3); full.step([1., 2.])
        with Saver(tmp_path/'b', {'model': full}) as save: save(0, True)
        Saver(tmp_path/'b', {'model': Multiplier(window=1)}).restore()


def test_streams_of_ranks(tmp_path):
    with Saver(tmp_path, {'best': {}}) as save: save(0, True)
    found = newest(tmp_path)
    for r in (0, 1): write_state(found/f'state/random-{r}', random_state())
    assert resume._stream(found, 2).name == 'random-0' and resume._stream(found, 1).name == 'random-0'
    torch.rand(1); write_state(found/'state/random-1', random_state())
    with pytest.raises(ValueError, match='different random streams'): resume._stream(found, 2)
    assert agree(True, False) == [True, False]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    with Saver(tmp_path, {'best': {'x': 1}}) as save:
        save(0, True)
        def full(*a): raise OSError(28, 'No space left on device')
        monkeypatch.setattr(resume, 'write_state', full)
        with pytest.raises(OSError, match='step 1 could not be saved.*No space left.*make room, then run'):
            save(1, True)
    assert newest(tmp_path).name == 'step-00000000' and len(list(tmp_path.iterdir())) == 1


# --- numbers that are none
@pytest.mark.parametrize('what', ['loss', 'gradient'])
@pytest.mark.parametrize('value', ['nan', 'inf'])
def test_a_bad_number_is_refused_before_weights_move(tmp_path, what, value):
    engine = TorchEngine(lm(), Optim(lr=1e-2, warmup=0.), 4)
    def step(i):
        b = prompt_rows(seed=i)
        loss = -token_logps(engine, b['input_ids'], b['attention_mask'], 3).mean()
        if i == 2 and what == 'gradient':
            next(engine.model.parameters()).register_hook(lambda g: g * float(value))
        engine.backward(loss * float(value) if i == 2 and what == 'loss' else loss)
        return dict(loss=loss.detach(), grad_norm=engine.step())
    log = []
    save = Saver(tmp_path, {'model': engine}, steps=1)
    with pytest.raises(FloatingPointError, match=f'a {what} is NaN or infinite') as e:
        loop(step, 4, lambda i, m: log.append(i), save=save)
    assert log == [0, 1] and 'step 2 was refused' in e.value.__notes__[0]
    dumped = next(tmp_path.glob('refused/rank-0/step-*'))
    assert json.loads((dumped/'cause.json').read_text())['step'] == 2
    a, b = (read_state(p/'state/common')['objects']['model'] for p in (dumped, newest(tmp_path)))
    assert equal(a, b) and all(map(torch.equal, engine.model.state_dict().values(), b['model'].values()))


def test_finite():
    x = torch.ones(2); assert finite('loss', x, x) is x and finite('gradient') is None
    # a sum that overflows is no bad number
    assert finite('loss', torch.full((2,), 3e38)) is not None
    for bad in ('nan', 'inf', '-inf'):
        with pytest.raises(FloatingPointError, match='a reward is NaN'):
            finite('reward', x, torch.tensor([1., float(bad)]))


# --- work without steps
def test_pieces_are_made_once(tmp_path, capsys):
    calls = []
    make = lambda: calls.append(1) or {'a': [1, 2.5, 'x'], 'n': np.arange(2)}
    first, again = cached(tmp_path/'p', make), cached(tmp_path/'p', make)
    assert equal(first, again) and calls == [1]
    assert 'p: done before the interruption' in capsys.readouterr().out
    f = next((tmp_path/'p').glob('step-*'))/'value/state.json'; f.write_text(f.read_text() + ' ')
    assert equal(cached(tmp_path/'p', make), first) and calls == [1, 1]
    assert 'skipped the damaged' in capsys.readouterr().out
    with pytest.raises(Interrupted, match='q is saved'):
        cached(tmp_path/'q', lambda: os.kill(os.getpid(), signal.SIGTERM) or 3)
    assert cached(tmp_path/'q', lambda: 4) == 3


def test_a_finished_run_keeps_no_checkpoint(tmp_path):
    run, *_ = train()
    again = Run.start('policy', {}, sources=()); assert list((again.folder/'checkpoint').iterdir())
    again.finish({}); assert not (again.folder/'checkpoint').exists()
    # finished: nothing is written
    assert again.cached('more', lambda: 5) == 5


# --- signals
def test_a_second_signal_acts_at_once(monkeypatch):
    now = [0.]; monkeypatch.setattr(resume.time, 'monotonic', lambda: now[0])
    with stopping() as asked:
        # a launcher passing on what the terminal sent
        os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGTERM)
        assert asked == ['SIGINT']
        now[0] = 3.
        with pytest.raises(KeyboardInterrupt): os.kill(os.getpid(), signal.SIGTERM)


LONG = """
import hashlib, sys, time
from saferlhf.record.run import Run
from saferlhf.train import loop
run = Run.start('sft', {})
def c_code(): hashlib.pbkdf2_hmac('sha256', b'x', b'y', 40_000_000)            # one call, without the interpreter's lock
def python():
    for _ in range(4000): time.sleep(.01)
where, what = sys.argv[1], dict(c=c_code, python=python)[sys.argv[2]]
def step(i):
    if i == 2: print('on', flush=True); what()
    return dict(loss=1.)
if where == 'loop': loop(step, 9, run.log, save=run.saver({}, steps=1))
if where == 'piece': run.cached('first', lambda: 1); run.cached('piece', lambda: step(2))
if where == 'between': step(2)
"""


@pytest.mark.parametrize('where, what, signals', [
    ('loop', 'c', ['SIGTERM']), ('loop', 'python', ['SIGINT', 'SIGINT']), ('piece', 'python', ['SIGTERM']), ('between', 'c', ['SIGTERM'])])
def test_a_long_piece_ends_soon(tmp_path, where, what, signals):
    "It is said at once that a signal came; in five seconds the process is gone, and what was complete is there."
    began = time.monotonic()
    p = subprocess.Popen([sys.executable, '-c', LONG, where, what], env=os.environ | dict(SAFERLHF_RUNS=str(tmp_path)), text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while 'on\n' != p.stdout.readline(): assert p.poll() is None
    slow, began = max(1, (time.monotonic() - began) / 5), time.monotonic()             # of this machine: it starts in five seconds
    for k, name in enumerate(signals):
        p.send_signal(getattr(signal, name))
        while f'{name}: stopping' not in (line := p.stderr.readline()): assert line, 'it said nothing'
        assert time.monotonic() - began < 1.5 * slow, 'said late'
        if signals[k + 1:]: time.sleep(.7)
    p.communicate(timeout=60)
    assert p.returncode and time.monotonic() - began < 5 * slow
    pieces, steps = [x.parent.name for x in tmp_path.glob('sft/*/checkpoint/*/step-*')], [*tmp_path.glob('sft/*/checkpoint/step-00000001')]
    assert (pieces, len(steps)) == dict(loop=([], 1), piece=(['first'], 0), between=([], 0))[where]


def test_a_forked_child_stops_alone():
    "What a pool sends to its workers is not taken for a signal to this process."
    code = '''import os, signal, time
from saferlhf.record.resume import stopping
with stopping() as asked:
    child = os.fork()
    if not child: time.sleep(20); os._exit(0)
    time.sleep(.3); os.kill(child, signal.SIGTERM); time.sleep(.3); os.kill(child, signal.SIGKILL); os.wait()
print(asked)'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, '[]\n') and 'stopping within' not in done.stderr


@pytest.mark.parametrize('imports', ['', 'import ipykernel, papermill'])
def test_a_signal_is_heard_while_listeners_change(imports):
    "Whoever starts kernels has imported ipykernel. Whatever the moment, it is said at once that a signal came."
    code = f'''{imports}
import os, signal, time
from saferlhf.record.resume import Interrupted, exit_on_sigterm, stopping
real = signal.set_wakeup_fd
def change(fd, **options):
    before = real(fd, **options)
    left[0] -= 1
    if left[0] == 0 and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        os.write(2, b'sent '); os.kill(os.getpid(), signal.SIGTERM)
    return before
signal.set_wakeup_fd = change
for k in range(1, 6):
    left = [k]; time.sleep(.6)                                                 # or it is taken for the same one
    try:
        with exit_on_sigterm('go on'), stopping(lambda *signal: None): pass
    except Interrupted: pass'''
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60).stderr
    assert said.count('sent ') >= 2 and said == said.count('sent ') * 'sent SIGTERM: stopping within five seconds\n', said


def test_sigterm_between_loops_says_how_to_go_on(tmp_path):
    "The run is closed before Python takes its modules apart: no handler is put back too late."
    code = '''from saferlhf.record.run import Run; import time
run = Run.start('sft', {}); print('on', flush=True); time.sleep(30)'''
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True)
    while 'on\n' != p.stdout.readline(): time.sleep(.01)
    p.terminate(); said = p.communicate(timeout=20)[1]
    assert p.returncode == 1 and 'stopped by SIGTERM' in said and 'again' in said and 'Traceback' not in said


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with resume.exit_on_sigterm('go on'):
        with resume.exit_on_sigterm('another run'), pytest.raises(Interrupted, match='go on'):
            signal.raise_signal(signal.SIGTERM)
        with stopping() as asked: signal.raise_signal(signal.SIGTERM)
        assert asked == ['SIGTERM']
        with pytest.raises(Interrupted, match='go on'): signal.raise_signal(signal.SIGTERM)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


# --- what must not be written down
def test_no_environment_in_a_run_folder(monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'secret-9187'); monkeypatch.setenv('SAFERLHF_SAVE_STEPS', '1')
    run, *_ = train()
    files = [p for p in run.folder.rglob('*') if p.is_file()]
    assert len(files) > 6 and not [p for p in files if b'secret-9187' in p.read_bytes()]


def test_names_of_pieces_stay_in_the_run(tmp_path):
    run = Run.start('sft', {})
    for bad in ('../../x', '/x', 'a\nb'):
        with pytest.raises(ValueError, match='leads out'): run.cached(bad, lambda: 1)
    run.close()
