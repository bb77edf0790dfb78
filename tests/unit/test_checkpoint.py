"A checkpoint is whole or absent, whatever happens while it is written, and a damaged one is never loaded."
import os
import signal
import subprocess
import sys
import pytest
import torch
from safetensors.torch import load_file, save_file
from saferlhf.record.files import (_damage, atomic_write, cut_lines, inside, lock, newest, read_lines,
                                   save_checkpoint)


def put(content): return lambda path: path.write_bytes(content)


def save(folder, step, keep=2):
    weights = {'w': torch.full((8,), float(step))}
    state = f'{{"step": {step}}}'.encode()
    files = {'w.safetensors': lambda path: save_file(weights, path), 'state.json': put(state)}
    return save_checkpoint(folder, step, files, keep)


def test_roundtrip_and_keep(tmp_path):
    for step in (1, 2, 3): last = save(tmp_path, step, keep=2)
    assert newest(tmp_path) == last
    assert sorted(p.name for p in tmp_path.iterdir()) == ['step-00000002', 'step-00000003']
    assert torch.equal(load_file(last/'w.safetensors')['w'], torch.full((8,), 3.))
    with pytest.raises(ValueError, match='could not be resumed'): save(tmp_path, 4, keep=0)
    assert newest(tmp_path) == last
    assert newest(tmp_path/'missing') is None


@pytest.mark.parametrize('harm', ['flip', 'truncate', 'missing', 'extra', 'manifest', 'step'])
def test_damaged_is_reported_and_skipped(tmp_path, harm):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    f = bad/'w.safetensors'; b = f.read_bytes()
    if harm == 'flip': f.write_bytes(b[:-3] + bytes([b[-3] ^ 4]) + b[-2:])
    if harm == 'truncate': f.write_bytes(b[:-1])
    if harm == 'missing': f.unlink()
    if harm == 'extra': (bad/'model.bin').write_bytes(b'?')
    if harm == 'manifest': (bad/'manifest.json').write_text('{"step": 2, "fil')
    if harm == 'step':
        (bad/'manifest.json').write_text((bad/'manifest.json').read_text().replace('"step": 2', '"step": 3'))
    said = []
    assert newest(tmp_path, said.append) == good and len(said) == 1 and str(bad) in said[0]
    assert _damage(bad) in said[0]
    name = {'extra': 'model.bin', 'manifest': 'unreadable', 'step': 'another step'}.get(harm, 'w.safetensors')
    assert name in said[0] and bool(_damage(bad, hashes=False)) == (harm != 'flip')


def test_going_back_behind_a_damaged_one_keeps_the_new_one(tmp_path):
    save(tmp_path, 20); f = save(tmp_path, 30)/'state.json'; f.write_bytes(f.read_bytes().replace(b'3', b'4'))
    assert newest(tmp_path, lambda why: None).name == 'step-00000020'
    # sizes alone would call step 30 the newest
    new = save(tmp_path, 25, keep=1)
    assert newest(tmp_path) == new and [p.name for p in tmp_path.iterdir()] == [new.name]


def test_saving_a_step_again(tmp_path):
    first, second = save(tmp_path, 5), save_checkpoint(tmp_path, 5, {'a': put(b'again')})
    assert first != second and newest(tmp_path) == second and _damage(first) == ''


def test_error_or_kill_during_a_save(tmp_path):
    good = save(tmp_path, 1)
    def full(path): path.write_bytes(b'half'); raise OSError('No space left on device')
    with pytest.raises(OSError): save_checkpoint(tmp_path, 2, {'a': put(b'whole'), 'b': full})
    assert [p.name for p in tmp_path.iterdir()] == [good.name]
    code = f'''import os, signal; from saferlhf.record.files import save_checkpoint
def die(path): path.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)
save_checkpoint({str(tmp_path)!r}, 2, {{'a': lambda path: path.write_bytes(b'whole'), 'b': die}})'''
    assert subprocess.run([sys.executable, '-c', code]).returncode == -signal.SIGKILL
    assert newest(tmp_path) == good and len(list(tmp_path.iterdir())) == 2       # what it left behind ...
    save(tmp_path, 3, keep=2)
    # ... goes with the next save
    assert sorted(p.name for p in tmp_path.iterdir()) == ['step-00000001', 'step-00000003']


def test_rename_comes_last_and_after_the_flush(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, 'fsync', lambda fd: calls.append('flush'))
    rename = os.rename; monkeypatch.setattr(os, 'rename', lambda a, b: (calls.append('rename'), rename(a, b)))
    save(tmp_path, 1)
    # two files, the manifest, the folder
    assert calls == ['flush']*4 + ['rename', 'flush']


def test_atomic_write(tmp_path):
    f = tmp_path/'f'; atomic_write(f, 'é'); assert f.read_bytes() == 'é'.encode()
    with pytest.raises(UnicodeEncodeError): atomic_write(f, '\udc80')
    assert f.read_text() == 'é' and list(tmp_path.iterdir()) == [f]


@pytest.mark.parametrize('name', ['../x', 'a/../../x', '/x', '', '.', 'a\nb', 'a\0'])
def test_names_stay_inside(tmp_path, name):
    with pytest.raises(ValueError, match='leads out'): inside(tmp_path, name)
    with pytest.raises(ValueError, match='leads out'): save_checkpoint(tmp_path/'c', 1, {name: put(b'')})
    assert newest(tmp_path/'c') is None


def test_names_stay_inside_through_links(tmp_path):
    (tmp_path/'in').mkdir(); (tmp_path/'in/link').symlink_to(tmp_path)
    with pytest.raises(ValueError, match='leads out'): inside(tmp_path/'in', 'link/x')
    assert inside(tmp_path, 'in/x') == tmp_path/'in/x'


def test_lock_refuses_another_process(tmp_path):
    code = f'''from saferlhf.record.files import lock
with lock({str(tmp_path)!r}): print("held", flush=True); input()'''
    other = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             text=True)
    try:
        assert other.stdout.readline() == 'held\n'
        with pytest.raises(RuntimeError, match=f'another run holds .*process {other.pid} '), lock(tmp_path):
            pass
    finally: other.kill(); other.wait()
    with lock(tmp_path): pass                                                   # killed: nothing to clean up


def test_stages_of_one_reproduction_wait_for_one_another(tmp_path, monkeypatch):
    code = f'''import time
from saferlhf.record.files import lock
with lock({str(tmp_path)!r}): print("held", flush=True); time.sleep(1); print("let go", flush=True)'''
    monkeypatch.setenv('SAFERLHF_SIBLINGS', 'reproduce 7')
    other = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == 'held\n'
        monkeypatch.setenv('SAFERLHF_SIBLINGS', 'reproduce 8')
        with pytest.raises(RuntimeError, match='another run holds'), lock(tmp_path): pass
        monkeypatch.setenv('SAFERLHF_SIBLINGS', 'reproduce 7')
        with lock(tmp_path): assert other.stdout.readline() == 'let go\n'
    finally: other.kill(); other.wait()


def test_lines_are_cut_to_a_step(tmp_path):
    f = tmp_path/'m.jsonl'; f.write_text('{"step": 1}\n{"note": 1}\n{"step": 2}\n{"ste')
    assert len(read_lines(f)) == 3
    cut_lines(f, 1); assert read_lines(f) == [{'step': 1}, {'note': 1}]
    cut_lines(tmp_path/'none', 1); assert not (tmp_path/'none').exists()
    # a table that a stage reads must be there
    with pytest.raises(FileNotFoundError): read_lines(tmp_path/'none')
    f.write_text('{"ste\n{"step": 2}\n')
    with pytest.raises(ValueError): read_lines(f)
    # no last newline
    f.write_bytes(b'{"step": 1}\r\n{"text": "\xc3\xa9"}')
    assert read_lines(f) == [{'step': 1}, {'text': 'é'}]
    # half a letter
    f.write_bytes(b'{"step": 1}\n{"text": "\xc3'); assert read_lines(f) == [{'step': 1}]
    f.write_bytes(b'{"text": "\xff"}\n{"step": 1}\n')
    with pytest.raises(ValueError): read_lines(f)
