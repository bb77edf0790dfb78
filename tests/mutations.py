"Break the algorithm one line at a time and see which test notices: `python tests/mutations.py [WORD in a mutation's name]`."
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
MUTATIONS = { # name -> (module, what stands there, what is put in its place, test modules)
    'cost loss: sign terms flipped': ('losses', '-F.logsigmoid(sign * score)', '-F.logsigmoid(-sign * score)', 'train losses'),
    'cost loss: order flipped': ('losses', 'order = -F.logsigmoid(high - low)', 'order = -F.logsigmoid(low - high)', 'train losses'),
    'ratio inverted': ('losses', 'log_ratio.exp(), adv', '(-log_ratio).exp(), adv', 'ppo losses'),
    'KL: sign flipped': ('advantages', '+ sign * kl_coef', '- sign * kl_coef', 'ppo advantages'),
    'KL: coefficient dropped': ('advantages', 'sign * kl_coef * kl.masked_fill', 'sign * kl.masked_fill', 'ppo advantages'),
    'KL: policy and reference swapped': ('advantages', 'return logp - ref_logp', 'return ref_logp - logp', 'ppo advantages'),
    'GAE: forwards': ('advantages', 'later = t[:, None] - t ', 'later = t - t[:, None] ', 'ppo advantages'),
    'lambda: update flipped': ('objectives', 'self.log_lam + self.lr', 'self.log_lam - self.lr', 'ppo objectives'),
    'lambda: cost advantage added': ('objectives', "'cost': -lam / (1 + lam)", "'cost': lam / (1 + lam)", 'ppo objectives'),
    'log-probabilities: mask shift': ('models', 'logits_to_keep=at - 1', 'logits_to_keep=at', 'models'),
    'log-probabilities: 16 bits': ('hardware.logprobs', 'torch.promote_types(x.dtype, torch.float32)', 'x.dtype', 'models'),
    'positions: padding counted': ('hardware.packing',
        'mask.cumsum(-1) - 1', 'torch.ones_like(mask).cumsum(-1) - 1', 'models'),
    'score: last slot': ('models', 'return x[torch.arange(len(x), device=x.device), last]', 'return x[:, -1]', 'models'),
    'rollout: no EOS on cut answers': ('hardware.sampler',
        'host(self.truncated)[:, None]', '0 * host(self.truncated)[:, None]', 'rollout'),
    'rollout: random numbers by slot': ('hardware.sampler',
        'uniforms(self.seed, keys[', 'uniforms(self.seed, torch.arange(len(keys))[', 'rollout'),
    'values: those after each token': ('ppo', '.scores[:, -T - 1:-1]', '.scores[:, -T:]', 'ppo'),
    'step: the same samples again': ('ppo', 'first=step * config.samples', 'first=0', 'ppo'),
    'step: micro-batches averaged apart': ('ppo', 'config.clip_ratio, b.n)', 'config.clip_ratio)', 'ppo'),
    'resume: random streams left where they are': ('record.resume', 'set_random_state(read_state(stream))', 'read_state(stream)', 'resume'),
    'resume: one step again': ('record.resume', "return saved['step'] + 1", "return saved['step']", 'resume'),
    'resume: logs not cut': ('record.resume', 'if rank() == 0: self.rewind(', 'if rank() == 0: str(', 'resume'),
    'resume: the schedule begins again': ('engine', 'scheduler=self.scheduler.state_dict())', ')', 'resume'),
    'resume: hashes not compared': ('record.files', "sha256(checkpoint/n) if hashes else ''", "''", 'resume checkpoint'),
    'refusal: gradients not looked at': ('engine',
        "if last and not loss.is_cuda: finite('grad", "if not last: finite('grad", 'resume'),
    'refusal: models step one by one': ('engine', 'e.step(x if x is None else x + fine)', 'e.step()', 'ppo'),
    'refusal: gradients of a refused update stay': ('ppo', 'for e in engines: e.clear()', 'for e in engines: pass', 'ppo'),
    'refusal: DeepSpeed keeps its gradients': ('hardware.zero', 'for k in o.averaged_gradients: o.averaged_gradients[k] = None',
        'pass', 'engine'),
    'packing: one long sequence': ('hardware.packing',
        'torch.arange(int(bounds[-1])) - bounds[row]', 'torch.arange(int(bounds[-1]))', 'models'),
    'packing: padding on the left kept': ('hardware.packing',
        'm.flatten().nonzero()', '(m | m.flip(1)).flatten().nonzero()', 'models'),
    'decoder: old weights': ('hardware.decoder',
        'torch.cat([read(m)', 'buffer.any() or torch.cat([read(m)', 'rollout decoder'),
    'decoder: one table for all layers': ('hardware.decoder', 'return [of[k] for', 'return [of[self.kinds[0]] for', 'decoder'),
    'decoder: positions of longer texts': ('hardware.decoder', '.clamp_max(last)', '.clamp_max(self.tokens)', 'decoder'),
    'decoder: windows not looked at': ('hardware.decoder', 'reasons += ((False, str(e)),)', 'pass', 'decoder'),
    'decoder: norms rounded twice': ('hardware.decoder', 'torch.float32 if gemma or', 'self.dtype if gemma or', 'decoder'),
    'slots: an ended answer goes on': ('hardware.slots',
        'if eos is not None: alive &= token != eos', 'pass', 'rollout'),
    'slots: a late look taken for the next prompt': ('hardware.sampler', 'looks.append(self._look(dict(row), n))',
        'looks.append(self._look(row, n))', 'rollout'),
    'slots: rows mixed up': ('hardware.sampler', '_index(ended.values(), device)',
                             '_index(list(ended.values())[::-1], device)', 'rollout'),
    'kernels: temperature left out': ('hardware.slots',
        '(x if temperature == 1 else x / temperature).exp()', 'x.exp()', 'rollout'),
    'recorded passes: a dummy joins the last row': ('hardware.graphs',
        'torch.arange(1, size.sequences - B + 1)', 'torch.arange(2, size.sequences - B + 2)', 'graphs'),
    'engine: masters not used': ('engine',
        'torch._foreach_copy_(*zip(*self.rounded, strict=True))', 'pass', 'engine'),
    'engine: gradients of parts lost': ('engine',
        'else master.grad.add_(p.grad)', 'else master.grad', 'engine'),
    'ranks: each has a rollout of its own': ('ppo', 'return _gather_ranks(', 'return (', 'ranks'),
    'ranks: mean of the ranks\' means': ('ppo', 'total(torch.stack([x.double() for x in sums.values()]))', 'sums.values()', 'ranks'),
    'ranks: largest of the own rows': ('ppo', 'ratio_max=largest(', 'ratio_max=(', 'ranks'),
    'ranks: loss over the own rows': ('train', "int(batch['mask'].any(1).sum())) / ranks()", "int(batch['mask'].any(1).sum()))", 'ranks'),
    'ranks: an empty part counts': ('train', 'piece = real * loss(', 'piece = loss(', 'ranks'),
    'ranks: scores in another order': ('hardware.ranks',
        'return torch.cat(out)', 'return torch.cat(out[::-1])', 'ranks'),
    'ranks: prompts not shared out': ('ppo', 'sampler.generate(_share(prompts)', 'sampler.generate((prompts)', 'ranks'),
    'engine: the first step is the second': ('hardware.zero',
        'if optim and precision == \'bf16\' and zero == 0:', 'if False:', 'engine'),
    'engine: offload forgotten': ('hardware.zero',
        "if offload in ('weights', 'all'): sharding", "if not offload: sharding", 'engine'),
    'engine: sharded ever after': ('hardware.zero',
        'finally: unset_hf_deepspeed_config()', 'finally: pass', 'ranks'),
    'engine: dropout left on': ('engine',
        'self.model = model.to(self.device).eval()', 'self.model = model.to(self.device)', 'engine'),
}


def first_failure(module, old, new, tests): # -> id of the first test that fails, or None
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(TESTS.parent / 'saferlhf', Path(folder) / 'saferlhf')
        file = Path(folder) / 'saferlhf' / f'{module.replace(".", "/")}.py'
        text = file.read_text()
        if text.count(old) != 1: raise ValueError(f'{old!r} stands {text.count(old)} times in {module}.py: bring the mutation up to date')
        file.write_text(text.replace(old, new))
        paths = [next(TESTS.rglob(f'test_{t}.py')) for t in tests.split()]
        command = [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', f'--rootdir={TESTS.parent}', *map(str, paths)]
        out = subprocess.run(command, cwd=folder, env=os.environ | dict(PYTHONPATH=folder), capture_output=True, text=True).stdout
        found = re.search(r'^FAILED (\S+)', out, re.M)
        if not found and ' passed' not in out: raise RuntimeError(out)
        return found and found[1].split('/')[-1]


if __name__ == '__main__':
    chosen = {k: v for k, v in MUTATIONS.items() if all(w in k for w in sys.argv[1:])}
    missed = []
    for name, mutation in chosen.items():
        test = first_failure(*mutation)
        print(f'| {name} | {test or "NOT NOTICED"} |', flush=True)
        missed += [] if test else [name]
    sys.exit(f'not noticed: {missed}' if missed else 0)
