"""Runs one stage of nbs/templates in this process, with something that goes wrong on purpose.

    python drive.py TEMPLATE PARAMETERS.json ['{"fault": ..., "at": ..., ...}']

The notebook's cells run one after the other without a kernel, so that a kill is a kill of the stage.
"""
import errno
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import matplotlib
import torch

matplotlib.use('Agg')
from saferlhf.record import files as checkpoint, run as records; from saferlhf import engine  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PHASES = 'write-start write-half flushed before-rename after-rename before-clean'.split()


def kill(*_): os.kill(os.getpid(), signal.SIGKILL)


def after(n, act):
    "A function that counts its calls, and acts in the n-th (from 1)."
    count = 0
    def tick(*arguments):
        nonlocal count
        count += 1
        if count == n: act(*arguments)
    return tick


def wrap(module, name, before=None, behind=None):
    inner = getattr(module, name)
    def outer(*a, **k):
        if before: before(*a)
        out = inner(*a, **k)
        if behind: behind(*a)
        return out
    setattr(module, name, outer)


def halve(path):
    "Leave half of a file, as a write that was cut short does."
    files = [p for p in ([path] if path.is_file() else path.rglob('*')) if p.is_file()]
    if files: os.truncate(f := max(files, key=lambda p: p.stat().st_size), f.stat().st_size // 2)


def in_checkpoint(phase, n, act):
    "Let the n-th checkpoint go wrong in one phase of its writing."
    if phase == 'write-start': wrap(checkpoint, '_write', before=after(n, act))
    if phase == 'write-half':
        wrap(checkpoint, '_write', behind=after(n, lambda path, content: (halve(path), act())))
    if phase == 'flushed': wrap(checkpoint, 'flush', behind=after(n, act))
    if phase in ('before-rename', 'after-rename'):
        def place(): return after(n, act)
        tick, rename = place(), os.rename
        def watched(a, b):
            aside = '.aside-' in str(a)
            if aside and phase == 'before-rename': tick()
            rename(a, b)
            if aside and phase == 'after-rename': tick()
        checkpoint.os = type('os', (), dict(vars(os)) | dict(rename=staticmethod(watched)))
    if phase == 'before-clean': wrap(checkpoint, '_delete_old', before=after(n, act))


def no_room(*_): raise OSError(errno.ENOSPC, 'No space left on device')


def torn_line(run, name, rows):
    "Half a line reaches the disk, then it is full."
    with open(run.folder/name, 'a') as f: f.write(json.dumps(rows[0])[:20])
    no_room()


def poison(what, n, value):
    "The n-th loss, gradient, reward or cost after the first step is not a number."
    bad, begun = float(value), []
    wrap(records.Run, 'log', behind=lambda *_: begun.append(True))
    if what in ('loss', 'gradient'):
        tick = iter(range(1, 10**9))
        inner = engine.TorchEngine.backward
        def backward(self, loss, last=True):
            hit = bool(begun) and next(tick) == n
            if hit and what == 'gradient':
                next(p for p in self.model.parameters() if p.requires_grad).register_hook(lambda g: g * bad)
            return inner(self, loss * bad if hit and what == 'loss' else loss, last)
        engine.TorchEngine.backward = backward
    else:
        tick, inner = iter(range(1, 10**9)), engine.finite
        def finite(name, *xs):
            return inner(name, *(x * bad if name == what and begun and next(tick) == n else x for x in xs))
        engine.finite = finite


def arrange(fault):
    "Prepare what shall go wrong."
    kind, at = fault.get('fault'), fault.get('at', 1)
    if kind == 'kill-in-checkpoint': in_checkpoint(fault['phase'], at, kill)
    if kind == 'disk-full-in-checkpoint': in_checkpoint(fault['phase'], at, no_room)
    if kind == 'disk-full-in-metrics':
        tick = iter(range(1, 10**9)); inner = records.Run._append
        def append(run, name, rows):
            return torn_line(run, name, rows) if next(tick) == at else inner(run, name, rows)
        records.Run._append = append
    if kind == 'kill-after-seconds':    # from the first step, or the first piece, on
        def start(*_): t = threading.Timer(fault['seconds'], kill); t.daemon = True; t.start()
        first = after(1, start); wrap(records.Run, '_append', behind=first)
        wrap(records, 'cached', behind=first)
    if kind == 'signal':
        send = after(at, lambda *_: os.kill(os.getpid(), getattr(signal, fault['name'])))
        wrap(records.Run, '_append', behind=send); wrap(records, 'cached', before=send)
    if kind == 'pause':     # holds the folder until somebody goes on
        wrap(records.Run, '_append', behind=after(at, lambda *_: os.kill(os.getpid(), signal.SIGSTOP)))
    if kind == 'not-finite': poison(fault['what'], at, fault['value'])


def deep(zero):
    "Every engine with an optimizer is DeepSpeed's."
    inner, more = engine.load, dict(engine='deepspeed', zero=zero)
    # stages that can be spread
    os.environ['SAFERLHF_SPREAD'] = json.dumps(more)
    def load(make, optim=None, steps=1, **k): return inner(make, optim, steps, **(more if optim else {}) | k)
    engine.load = load


def execute(template, parameters):
    "The notebook's code, cell by cell, in one namespace."
    scope = {'__name__': '__main__', 'display': lambda *_: None}
    for cell in json.loads((ROOT/'nbs/templates'/f'{template}.ipynb').read_text())['cells']:
        if cell['cell_type'] != 'code': continue
        exec(compile(''.join(cell['source']), template, 'exec'), scope)
        if 'parameters' in cell['metadata'].get('tags', []): scope.update(parameters)
    return scope['run']


if __name__ == '__main__':
    torch.set_num_threads(1)
    template, parameters = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    fault = json.loads((sys.argv + ['{}'])[3])
    if 'zero' in fault: deep(fault['zero'])
    arrange(fault)
    first = []
    begin = lambda *_: first or first.append(time.monotonic())
    for owner, name in ((records.Run, '_append'), (records, 'cached')): wrap(owner, name, behind=begin)
    run = execute(template, parameters)
    took = time.monotonic() - (first or [time.monotonic()])[0]
    print(f'\nfinished {took:.3f} s after the first step or piece')
