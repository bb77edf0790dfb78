"Two ranks under torchrun: one is killed, and their number changes between a save and the next start."
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
STEPS = 6


def train(folder, zero, stop, fault, seeded=True):
    "Six steps of a policy on this rank's half of the rows; at step `stop` a fault, or the end without one."
    import logging
    import torch
    from saferlhf.engine import Optim, load
    from saferlhf.hardware.zero import deepspeed
    from saferlhf.models import load_lm, token_logps
    from saferlhf.hardware.ranks import rank, ranks
    from saferlhf.hardware.seeds import seed_all
    from saferlhf.record.resume import Saver
    from tiny import prompt_rows
    deepspeed(); logging.disable(logging.WARNING); torch.set_num_threads(1)
    seed_all(0 if seeded else int(os.environ['RANK']))
    optim = Optim(lr=3e-3, weight_decay=.1, warmup=.3, clip=.05)
    engine = load(lambda: load_lm(f'{folder}/../lm'), optim, STEPS, engine='deepspeed', zero=zero)
    with Saver(f'{folder}/checkpoint', {'model': engine}, steps=1) as save:
        for i in range(save.restore(), STEPS):
            b = prompt_rows(8, seed=i); n = 8 // ranks(); rows = slice(rank() * n, rank() * n + n)
            if i == stop and fault == 'kill' and rank() == 1: os.kill(os.getpid(), signal.SIGKILL)
            if i == stop and fault == 'signal' and rank() == 1: os.kill(os.getpid(), signal.SIGTERM)
            engine.backward(-token_logps(engine, b['input_ids'][rows], b['attention_mask'][rows], 3).mean())
            norm = float(engine.step())
            if rank() == 0:
                with open(f'{folder}/norms.jsonl', 'a') as f: f.write(json.dumps([i, norm]) + '\n')
            save(i, i + 1 == STEPS)
            if i == stop and fault == 'leave': return
    with engine.dense_weights() as model:
        weights = [p.detach().double().flatten().tolist() for p in model.parameters()]
    if rank() == 0: Path(f'{folder}/weights.json').write_text(json.dumps(weights))


def start(folder, zero, n, env, stop=-1, fault='', seeded=True):
    "One job of n ranks: whether it ended well, and what it said."
    code = '''import json, sys; from saferlhf.record.launch import launch; from faults.ranked import train
launch(train, int(sys.argv[1]), json.loads(sys.argv[2]))'''
    env = env | {'PYTHONPATH': os.pathsep.join([env['PYTHONPATH'], str(Path(__file__).resolve().parents[1])])}
    Path(folder).mkdir(parents=True, exist_ok=True)
    p = subprocess.run([sys.executable, '-c', code, str(n),
                        json.dumps([str(folder), zero, stop, fault, seeded])], env=env,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
    return p.returncode == 0, p.stdout


def result(folder): return json.loads((folder/'weights.json').read_text())


def gap(a, b): return max(abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def done(folder): return len((folder/'norms.jsonl').read_text().splitlines())


def one(lab, table, fault, zero, before, after, seed):
    "A job of some ranks ends early; one of as many, or of another number, goes on."
    from tiny import lm
    if not (lab.folder/'lm').exists(): lm().save_pretrained(lab.folder/'lm')
    folder, whole = lab.folder/f'ranks-{seed}', lab.folder/f'ranks-whole-{zero}-{before}'
    env = lab.env(lab.folder)
    shutil.rmtree(folder, ignore_errors=True)
    if not whole.exists(): assert (out := start(whole, zero, before, env))[0], out[1][-2000:]
    how = {'rank killed': 'kill', 'SIGTERM to a rank': 'signal'}.get(fault, 'leave')
    seeded = fault != 'streams differ'
    ok, said = start(folder, zero, before, env, 3, how, seeded)
    n = done(folder)
    told = {'rank killed': not ok and 'stopped with exit status' in said,
            'SIGTERM to a rank': 'is saved' in said}.get(fault, ok)
    ok2, said = start(folder, zero, after, env, seeded=seeded)
    went_on = 'goes on after step' in said
    refused = not ok2 and 'with different random streams' in said
    if not seeded: outcome = 'refused with the reason' if refused else 'FAILED: not refused'
    elif not (ok2 and went_on and told):
        outcome = f'FAILED: told {told}, went on {went_on}: {said.strip()[-200:]}'
    elif before == after: outcome = 'identical' if result(folder) == result(whole) else 'FAILED: differs'
    else:
        far = gap(result(folder), result(whole))
        outcome = f'equal to {far:.0e}' if far < 1e-5 else f'FAILED: differs by {far}'
    at = int(said.split('goes on after step ')[1].split(':')[0]) + 1 if went_on else ''
    table.add(fault, 'torchrun', f'zero{zero}', seed, f'{before} to {after} ranks', n, outcome,
              n - at if went_on else '', '')


CASES = [*[('rank killed', z, 2, 2) for z in (0, 1, 2, 3)], ('SIGTERM to a rank', 1, 2, 2),
         ('SIGTERM to a rank', 3, 2, 2),
         *[('ranks changed', z, *n) for z in (0, 1, 2, 3) for n in ((2, 1), (1, 2))],
         ('streams differ', 1, 2, 1)]


def cases(lab, table):
    for seed, case in enumerate(CASES): one(lab, table, *case, seed)
