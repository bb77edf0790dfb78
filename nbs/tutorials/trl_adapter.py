"""TRL's losses, as `saferlhf conformance` sees them; copy it and change it for a trainer of your own.

    pip install trl
    saferlhf conformance trl_adapter:Trl         # in this folder
"""
import tempfile

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl.trainer.utils import selective_log_softmax

from saferlhf.models import tiny_model, train_tokenizer


def _made(trainer, config, model, rows, **more):
    "A trainer of TRL on a CPU, which will not train."
    tokenizer = train_tokenizer(['a b c d'] * 9, 270)
    told = config(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to='none', **more.pop('told'))
    return trainer(model=model, args=told, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **more)


class Trl:
    def token_logps(self, logits, ids): return selective_log_softmax(logits[:, :-1], ids[:, 1:])

    def dpo(self, policy, reference, rows, beta):
        texts = [dict(prompt='a', chosen='b', rejected='c')] * 2
        t = _made(DPOTrainer, DPOConfig, policy, texts, ref_model=reference, told=dict(beta=beta))
        batch = t.data_collator([dict(prompt_ids=p, chosen_ids=w, rejected_ids=l) for p, w, l in rows])
        return t.compute_loss(t.model, batch)

    def actor_loss(self, logp, old_logp, reward_advantage, cost_advantage, lam, mask, clip):
        told = dict(beta=0., epsilon=clip, loss_type='grpo', per_device_train_batch_size=2, num_generations=2)
        t = _made(GRPOTrainer, GRPOConfig, tiny_model(vocab_size=270), [dict(prompt='a')] * 2, told=told,
                  reward_funcs=lambda completions, **_: [0.] * len(completions))
        t._get_per_token_logps_and_entropies = lambda *a, **k: (logp, torch.zeros_like(logp), None)
        t.current_gradient_accumulation_steps = 1
        both = (reward_advantage - lam * cost_advantage) / (1 + lam)
        inputs = dict(prompt_ids=mask[:, :1], prompt_mask=mask[:, :1], completion_ids=mask, completion_mask=mask,
                      advantages=both, old_per_token_logps=old_logp)
        return t.compute_loss(t.model, inputs)
