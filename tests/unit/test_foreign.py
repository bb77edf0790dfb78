"Models from outside: every family in every stage; whole checkpoints or none; limits; score models of transformers."
import json
import re
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from saferlhf.apps.commands import main
from saferlhf.apps.export import export
from saferlhf.engine import Optim, TorchEngine
from saferlhf.hardware.packing import check_length, layout, packed_forward, packs
from saferlhf.models import (ScoreModel, gather_logps, load_lm, load_tokenizer, save_tokenizer, tiny_model,
                             token_logps, train_tokenizer)
from saferlhf.objectives import Multiplier, ppo_lag
from saferlhf.ppo import PPOConfig, ppo_step
from saferlhf.rollout import Sampler, score_texts
from saferlhf.text import pad
from saferlhf.train import score_step, sft_step
from tiny import FAMILIES, close, lm, loud, prompt_rows, scorer, tokenizer

V, EOS = 61, 1
SIZES = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=128, pad_token_id=0, bos_token_id=None, eos_token_id=EOS)
PADDED = dict(  # families that cannot be packed: recurrent, convolutions, sinks, soft caps, attention of their own with windows
    mamba={}, lfm2=dict(layer_types=['conv', 'full_attention']), recurrent_gemma=dict(lru_width=32, attention_window_size=64, head_dim=8),
    rwkv=dict(attention_hidden_size=32), gpt_oss=dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    vaultgemma=dict(head_dim=8, query_pre_attn_scalar=8),
    gpt_neo=dict(num_layers=2, num_heads=4, attention_types=[[['global', 'local'], 1]], window_size=4), bloom={})


def config_of(family, **sizes): # sizes under the family's own names win
    other = {'max_position_embeddings'} if 'n_positions' in sizes else set()
    return AutoConfig.for_model(family, **({k: v for k, v in SIZES.items() if k not in other} | sizes))


def made(family, **sizes):
    torch.manual_seed(0)
    config = config_of(family, **sizes)
    return loud(AutoModelForCausalLM.from_config(config, attn_implementation='eager').eval(), 5.)


def engine(model): return TorchEngine(model, Optim(1e-3, warmup=0., schedule='constant'))


# --- families
@pytest.mark.parametrize('arch', FAMILIES)
def test_a_family_in_every_stage(arch):
    b, actor = prompt_rows(4, V), engine(lm(arch))
    rows = dict(input_ids=b['input_ids'], attention_mask=b['attention_mask'], mask=b['attention_mask'][:, -3:])
    losses = [float(sft_step(actor, rows)['loss']) for _ in range(4)]
    pairs = {k: b[k] for k in ('input_ids', 'attention_mask')} | dict(
        high_sign=torch.tensor([1, 1]), low_sign=torch.tensor([-1, 0]), paired=torch.ones(2))
    judge = engine(scorer(arch, kind='cost'))
    harm = [float(score_step(judge, pairs, 'cost')['loss']) for _ in range(4)]
    assert losses[-1] < losses[0] and harm[-1] < harm[0]
    score = lambda ids, mask: judge(ids, mask).end_scores
    critics = {k: engine(scorer(arch, kind='critic')) for k in ('reward', 'cost')}
    config = PPOConfig(prompts=4, max_new_tokens=4, ptx_coef=1.)
    m = ppo_step(actor, TorchEngine(lm(arch, seed=1)), critics, dict(reward=score, cost=score), Sampler(actor, EOS, 4), b, rows,
                 ppo_lag(Multiplier(1., .1, 5., 0., 8)), config, 0)
    close(float(m['ratio']), 1); close(float(m['ratio_max']), 0, 1e-3)


@pytest.mark.parametrize('family', PADDED)
@torch.no_grad()
def test_what_cannot_be_packed_goes_padded(family, capsys):
    model = made(family, **PADDED[family])
    prompts, answers = [[5, 9, 30], [7, 8, 11, 40, 41, 60, 6], [9, 3]], [[12, 13, 14, 15, 16, 17, 1], [50, 1], [33, 34, 35, 1]]
    want = [gather_logps(model(input_ids=torch.tensor([p + a]), use_cache=False).logits[0, len(p) - 1:-1], torch.tensor(a))
            for p, a in zip(prompts, answers, strict=True)]
    (left, left_mask), (right, mask) = pad(prompts, V, 'left'), pad(answers, V)               # a pad token without an embedding
    got = token_logps(model, torch.cat([left, right], 1), torch.cat([left_mask, mask], 1), mask.shape[1])
    close(torch.cat([x[m.bool()] for x, m in zip(got, mask, strict=True)]), torch.cat(want), 1e-4)
    assert not packs(model)
    r = Sampler(model, EOS, 6).generate(dict(input_ids=left, attention_mask=left_mask, prompt_ids=torch.arange(3)))
    close(r.logp, token_logps(model, r.ids, r.attention_mask, r.mask.shape[1]) * r.mask, 1e-4)


def test_what_reads_both_ways_is_refused():
    with pytest.raises(ValueError, match='bert cannot be used'): packs(made('bert'))
    both = made('gemma3_text', head_dim=8, use_bidirectional_attention=True)
    with pytest.raises(ValueError, match='gemma3_text cannot be used'): packs(both)
    assert packs(made('mixtral', num_local_experts=2)) and packs(made('cohere'))              # asked, and right


# --- what a model can read
LONG = dict(rope_theta=1e4, factor=4., original_max_position_embeddings=50)
LIMITS = {'positions': ('llama', dict(max_position_embeddings=50)), 'learned': ('gpt2', dict(n_positions=50)),
          'window': ('mistral', dict(sliding_window=50)),
          'one layer': ('gemma3_text', dict(sliding_window=50, layer_types=['sliding_attention', 'full_attention'])),
          'chunks': ('llama4_text', dict(attention_chunk_size=50)), 'other name': ('mpt', dict(max_seq_len=50)),
          'dynamic': ('llama', dict(rope_parameters=dict(rope_type='dynamic') | LONG)),
          'longrope': ('phi3', dict(original_max_position_embeddings=50, rope_parameters=LONG | dict(
              rope_type='longrope', short_factor=[1.] * 4, long_factor=[2.] * 4))),
          'text_config': ('gemma3', dict(text_config=dict(num_hidden_layers=6, sliding_window=50))),
          'tokens that are kept': ('doge', dict(keep_window_size=50)), 'an index': ('deepseek_v32', dict(index_topk=50))}


@pytest.mark.parametrize('name', LIMITS)
def test_limits(name):
    family, sizes = LIMITS[name]
    config = config_of(family, **sizes)
    check_length(config, 50)
    with pytest.raises(ValueError, match='lower max_prompt_tokens'): check_length(config, 51)


@torch.no_grad()
def test_what_is_chosen_by_padding_too_is_limited_in_both_ways():
    model, (ids, mask) = made('doge', head_dim=8, keep_window_size=6), pad([list(range(2, 9)), [5, 9]], 0)
    with pytest.raises(ValueError, match='choice of tokens'): packed_forward(model, ids, layout(mask))
    assert packed_forward(model, ids[:, :6], layout(mask[:, :6])).logits.shape == (1, 8, V)
    with pytest.raises(ValueError, match='choice of tokens'): check_length(config_of('deepseek_v32', index_topk=50), 51, whole=False)


# fields of transformers' causal models that limit what a token sees, or choose it: who sees to it
SEEN_TO = dict(
    limit='sliding_window attention_chunk_size keep_window_size index_topk local_attention',    # `check_length`
    probe='window_size sliding_window_size attention_window_size '      # gpt_neo, inkling, recurrent_gemma: padded, in a mask of their own
          'index_topk_blocks index_block_size index_local_blocks',      # minimax_m3: padded where layers choose blocks
    pieces='chunk_size_feed_forward chunk_size mamba_chunk_size block_size max_inference_chunksize compress_rates',  # of a computation
    bytes='local_attention_window_len',                                 # blt
    reformer='local_attn_chunk_length lsh_attn_chunk_length chunk_size_lm_head')


def test_every_window_of_transformers_is_seen_to():
    found = {}
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = CONFIG_MAPPING[family]
        for name in getattr((config.sub_configs or {}).get('text_config', config), '__dataclass_fields__', ()):
            if re.search('window|chunk|keep_|block_size|index_topk|index_\\w*block|local_attention|attn_chunk|compress_rates', name):
                found.setdefault(name, family)
    other = ('use_sliding_window max_window_layers sliding_window_pattern prefix_dense_sliding_window_pattern chunkwise_kernel '
             'local_attention_probs_dropout_prob lsh_num_chunks_before lsh_num_chunks_after '
             'local_num_chunks_before local_num_chunks_after').split()
    assert set(found) - set(' '.join(SEEN_TO.values()).split()) - {*other} == set(), found


def test_a_window_that_no_layer_uses_is_no_limit():
    check_length(AutoConfig.for_model('qwen2', **SIZES, use_sliding_window=False, sliding_window=4), 50)
    check_length(AutoConfig.for_model('qwen3', **SIZES, use_sliding_window=True, sliding_window=4, layer_types=['full_attention'] * 2), 50)


def test_limits_hold_in_every_stage():
    model, ids = made('gpt2', n_embd=32, n_layer=2, n_head=4, n_positions=6), torch.ones(1, 7, dtype=torch.long)
    mask = torch.ones_like(ids)
    for stage in (lambda: token_logps(model, ids, mask, 2), lambda: ScoreModel(model.base_model)(ids, mask),
                  lambda: sft_step(engine(model), dict(input_ids=ids, attention_mask=mask, mask=mask[:, -2:])),
                  lambda: Sampler(model, EOS, 2).generate(dict(input_ids=ids[:, :5], attention_mask=mask[:, :5], prompt_ids=ids[:, 0]))):
        with pytest.raises(ValueError, match='last position of this model, 6'): stage()


@pytest.mark.parametrize('arch', ('llama', 'gpt2', 'opt'))
def test_tokens_without_an_embedding(arch):
    model, (ids, mask) = lm(arch), pad([[5, 6, 7, 8], [9]], V, 'left')
    batch = dict(input_ids=ids, attention_mask=mask, prompt_ids=torch.arange(2))
    a, b = (Sampler(model, EOS, 4).generate(batch | dict(input_ids=x)) for x in (ids, ids * mask))
    assert torch.equal(a.responses, b.responses) and torch.equal(a.logp, b.logp)              # padding may be anything
    wrong = batch | dict(input_ids=ids.clone().fill_(V), mask=mask)
    for stage in (lambda: Sampler(model, EOS, 4).generate(wrong), lambda: sft_step(engine(model), wrong),
                  lambda: scorer(arch)(wrong['input_ids'], mask)):
        with pytest.raises(ValueError, match=f'token {V} has no embedding in this model of {V}'): stage()
    with pytest.raises(ValueError, match='no answer could end'): Sampler(model, V, 4).generate(batch)


# --- checkpoints
BODY = lambda name: not name.startswith(('lm_head', 'score_head', 'normalizer'))
FAULTS = {  # what is done to the tensors -> what the error says
    'left over: _orig_mod.': lambda s: {f'_orig_mod.{k}' if BODY(k) else k: v for k, v in s.items()},
    'left over: base_model': lambda s: {f'base_model.model.{k}' if BODY(k) else k: v for k, v in s.items()},
    'missing: .*layers.1': lambda s: {k: v for k, v in s.items() if 'layers.1.' not in k},
    'left over: v_head.summary.weight': lambda s: s | {'v_head.summary.weight': torch.zeros(1, 32)},
    'left over: model.layers.2': lambda s: s | {k.replace('layers.1', 'layers.2'): v for k, v in s.items() if 'layers.1.' in k},
    'another shape: .*layers.0.input': lambda s: {k: v[:3] if 'input_layernorm' in k else v for k, v in s.items()},
    'float type: .*q_proj': lambda s: {k: v.to(torch.int8) if 'q_proj' in k else v for k, v in s.items()},
    'not finite: .*1.mlp.down_proj': lambda s: {k: v * float('nan') if '1.mlp.down_proj' in k else v for k, v in s.items()}}


def rewritten(folder, change=dict, **config): # the checkpoint with other tensors and another configuration
    save_file({k: v.contiguous().clone() for k, v in change(load_file(folder/'model.safetensors')).items()}, folder/'model.safetensors',
              metadata={'format': 'pt'})
    (folder/'config.json').write_text(json.dumps(json.loads((folder/'config.json').read_text()) | config))
    return folder


@pytest.mark.parametrize('what', FAULTS)
@pytest.mark.parametrize('read', (load_lm, ScoreModel.from_pretrained))
def test_a_checkpoint_is_whole_or_refused(what, read, tmp_path):
    (lm() if read is load_lm else scorer()).save_pretrained(tmp_path)
    read(tmp_path)
    with pytest.raises(ValueError, match=what) as e: read(rewritten(tmp_path, FAULTS[what]))
    assert '\n' not in str(e.value) and str(tmp_path) in str(e.value)


def test_heads(tmp_path, capsys):
    lm().save_pretrained(tmp_path/'lm'); scorer().save_pretrained(tmp_path/'score')
    with pytest.raises(ValueError, match='is a score model, not a language model'): load_lm(tmp_path/'score')
    for _ in range(2): ScoreModel.from_pretrained(tmp_path/'lm')
    assert capsys.readouterr().out.count('its score head is new and random') == 1             # said once
    headless = rewritten(tmp_path/'lm', lambda s: {k: v for k, v in s.items() if 'lm_head' not in k})
    with pytest.raises(ValueError, match='lm_head.weight'): load_lm(headless)
    for head in (None, torch.zeros(1, 16), torch.full((1, 32), torch.inf)):
        new = {} if head is None else {'score_head.weight': head}
        with pytest.raises(ValueError, match='score_head.weight, its score head, is missing|its head reads 16'):
            ScoreModel.from_pretrained(rewritten(tmp_path/'score', lambda s, new=new: {k: v for k, v in s.items() if BODY(k)} | new))


@pytest.mark.parametrize('read', (load_lm, ScoreModel.from_pretrained))
def test_folders_that_are_no_model_of_text(read, tmp_path):
    def refused(why, **config):
        with pytest.raises(ValueError, match=why) as e: read(rewritten(tmp_path, **config))
        assert '\n' not in str(e.value)
    lm().save_pretrained(tmp_path)
    for why, config in {'is quantized': dict(quantization_config=dict(quant_method='gptq', bits=4)),
                        'code of its own': dict(architectures=['Own'], quantization_config=None,
                                                   auto_map=dict(AutoModelForCausalLM='m.Own')),
                        'weird': dict(auto_map={}, model_type='weird'),
                        'an encoder and a decoder': dict(model_type='t5', is_encoder_decoder=True)}.items(): refused(why, **config)
    (tmp_path/'adapter_config.json').write_text('{}'); refused('its adapter cannot be read')
    with pytest.raises(ValueError, match='there is no folder .*nowhere'): read(tmp_path/'nowhere')


def test_files_that_are_cut_off(tmp_path):
    lm().save_pretrained(tmp_path/'a', max_shard_size='40KB'); lm().save_pretrained(tmp_path/'b')
    sorted((tmp_path/'a').glob('model-*'))[1].unlink()
    with pytest.raises(ValueError, match='model-00002'): load_lm(tmp_path/'a')
    whole = (tmp_path/'b/model.safetensors').read_bytes()
    for n in (0, 50, len(whole) // 2):
        (tmp_path/'b/model.safetensors').write_bytes(whole[:n])
        with pytest.raises(ValueError, match='cannot be read'): load_lm(tmp_path/'b')


def test_older_names_are_no_fault(tmp_path):
    lm('gpt2').save_pretrained(tmp_path)
    more = {'h.0.attn.bias': torch.ones(1, 1, 128, 128, dtype=torch.uint8), 'h.0.attn.masked_bias': torch.tensor(-1e4)}
    again = load_lm(rewritten(tmp_path, lambda s: {k.removeprefix('transformer.'): v for k, v in s.items()} | more))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in lm('gpt2').state_dict().items())


@torch.no_grad()
def test_the_text_model_of_a_checkpoint_with_pictures(tmp_path):
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    whole = made('gemma3', text_config=SIZES | dict(head_dim=8), vision_config=vision, mm_tokens_per_image=4)
    whole.save_pretrained(tmp_path/'whole')
    ids = torch.tensor([[5, 9, 30, 12, 1]])
    text, score = load_lm(tmp_path/'whole'), ScoreModel.from_pretrained(tmp_path/'whole')
    close(text(input_ids=ids).logits, whole(input_ids=ids).logits)
    for x in (text, score): x.save_pretrained(tmp_path/'text'); type(x).from_pretrained(tmp_path/'text')
    assert torch.equal(score.body.embed_tokens.weight, text.model.embed_tokens.weight)


# --- score models of transformers
IDS, MASK = torch.tensor([[5, 9, 30, 12, 1, 0, 0], [7, 8, 9, 44, 4, 5, 1]]), torch.tensor([[1] * 5 + [0] * 2, [1] * 7])


@pytest.mark.parametrize('arch', ('llama', 'gpt2', 'opt'))
@torch.no_grad()
def test_a_classifier_of_one_label_is_a_score_model(arch, tmp_path):
    for pad_id in (0, EOS):                                                     # padding that is EOS: read before it
        config = tiny_model(arch, V).config; config.num_labels, config.pad_token_id = 1, pad_id
        theirs = loud(AutoModelForSequenceClassification.from_config(config).eval()); theirs.save_pretrained(tmp_path)
        ids = torch.where(MASK > 0, IDS, pad_id)
        ours = ScoreModel.from_pretrained(tmp_path, 'cost')
        want = theirs(input_ids=ids, attention_mask=MASK).logits[:, 0]
        close(ours(ids, MASK).end_scores, want)
        ours.save_pretrained(tmp_path/'again'); close(ScoreModel.from_pretrained(tmp_path/'again')(ids, MASK).end_scores, want)
    config.num_labels = 2; AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='classifier of 2 labels'): ScoreModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match='not a language model'): load_lm(tmp_path)


@pytest.mark.parametrize('arch', ('llama', 'qwen2', 'gpt2'))
@torch.no_grad()
def test_export_keeps_the_numbers(arch, tmp_path, capsys):
    t = tokenizer(); same = type(t)(tokenizer_object=t.backend_tokenizer, eos_token='</s>', pad_token='</s>')
    model = scorer(arch, len(t), kind='cost')
    for name, tok in (('own', t), ('eos', same), ('none', None)):
        model.save_pretrained(tmp_path/name/'model')                            # as in the folder of a run
        if tok: tok.save_pretrained(tmp_path/name/'model')
        out = tmp_path/f'{name}-out'
        assert main(['export', str(tmp_path/name), str(out)]) == 0
        theirs = AutoModelForSequenceClassification.from_pretrained(out, num_labels=1).eval()
        ids = torch.where(MASK > 0, IDS, theirs.config.pad_token_id)
        close(theirs(input_ids=ids, attention_mask=MASK).logits[:, 0], model(IDS, MASK).end_scores)
        close(ScoreModel.from_pretrained(out, 'cost')(ids, MASK).end_scores, model(IDS, MASK).end_scores)
        assert theirs.config.pad_token_id != EOS and theirs.config.saferlhf['kind'] == 'cost'
        assert 'above 0: harmful' in (out/'README.md').read_text() and 'above 0: harmful' in theirs.config.saferlhf['meaning']
    assert main(['export', str(tmp_path/'own'), str(out)]) == 1 and 'is there already' in capsys.readouterr().err


def test_what_cannot_be_exported(tmp_path):
    def refused(model, why):
        model.save_pretrained(tmp_path/'m')
        with pytest.raises(ValueError, match=why): export(tmp_path/'m', tmp_path/'out')
    refused(ScoreModel(lm().base_model, bias=True), 'no place for a bias')
    refused(ScoreModel(made('cohere').base_model), 'no sequence classifier of the family cohere')
    refused(scorer(kind='critic'), 'is a critic')
    lm().save_pretrained(tmp_path/'policy'); export(tmp_path/'policy', tmp_path/'out')
    assert torch.equal(load_lm(tmp_path/'out').lm_head.weight, lm().lm_head.weight)


# --- numbers that refuse
def test_entropy_of_impossible_tokens():
    z = torch.tensor([[0., 0., -torch.inf], [-torch.inf] * 3, [0., torch.nan, 1.], [0., torch.inf, 1.]])
    logp, entropy = gather_logps(z, torch.tensor([0, 0, 0, 0]), entropy=True)
    close(entropy[0], np.log(2)); assert not entropy[1:].isfinite().any() and not logp[1:].isfinite().any()


def test_a_constant_score_is_refused():
    model = scorer(); before = model.score_head.weight.clone()
    for x in (np.zeros(9), np.full(9, .1, np.float32), np.array([1., np.nan]), np.array([1., np.inf]), np.ones((9, 2)), np.ones(1)):
        with pytest.raises(ValueError, match='all equal, not finite'): model.standardise(x)
    assert torch.equal(before, model.score_head.weight)
    x = np.array([1., 3., 8.], np.float32)
    assert (model.standardise(x) == x / x.std()).all() and torch.equal(model.score_head.weight, before * (1 / float(x.std())))
    collapsed = scorer('llama', len(tokenizer())); collapsed.score_head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match='not finite'): score_texts(collapsed, tokenizer(), ['is it safe'], ['no'], 64, 8)


def test_a_cost_model_is_not_taken_for_a_reward_model(tmp_path):
    ScoreModel(tiny_model().base_model, 'cost').save_pretrained(tmp_path)
    assert ScoreModel.from_pretrained(tmp_path).kind == 'cost' and ScoreModel.from_pretrained(tmp_path, 'critic').kind == 'critic'
    with pytest.raises(ValueError, match='holds a cost model, not a reward model'): ScoreModel.from_pretrained(tmp_path, 'reward')


def test_what_a_checkpoint_was_generated_with_is_not_kept(tmp_path):
    lm, t = tiny_model(vocab_size=300), train_tokenizer(['a bird'] * 9, 300)
    lm.generation_config.repetition_penalty = 1.3; lm.save_pretrained(tmp_path); save_tokenizer(t, tmp_path)
    kept = json.loads((tmp_path/'generation_config.json').read_text())
    assert 'repetition_penalty' not in kept and (kept['eos_token_id'], kept['pad_token_id']) == (t.eos_token_id, t.pad_token_id)


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    (tmp_path/'tokenizer.json').write_text('{')
    for path in (tmp_path, tmp_path/'nowhere', tmp_path.parent/'empty'):
        with pytest.raises(ValueError) as e: load_tokenizer(path)
        assert '\n' not in str(e.value) and path.name in str(e.value)
