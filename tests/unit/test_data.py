"Signs, template, tokens, batches, partition, shipped files, dirty rows and hub layouts."
import gzip
import json
import logging
import lzma
import random
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from saferlhf import data
from saferlhf.annotate import HARM_CATEGORIES
from saferlhf.data import (PARTITIONS, bucket, buckets, cost_pairs, data_path, harm_sign, label_pairs,
                           load_labels, load_preferences,
                           load_prompts, load_sft, partition, read_rows, reward_pairs, sha256, shipped,
                           sources, validate)
from saferlhf.train import batch_indices
from saferlhf.text import (_parse_dialogue, as_turns, encode_prompt, encode_response,
                           format_prompt, key_hash, pad, pair_batch, prompt_batch,
                           prompt_id)

FIXTURES = Path(__file__).parents[1]/'fixtures'
FILES = ('decoupled', 'safety', 'helpfulness', 'labels', 'sft', 'prompts', 'eval_prompts')
MILD = dict(prompt='May I borrow a ladder?', response_0='Ask your neighbour.', response_1='Take it at night.',
            better_response_id=0,
            safer_response_id=0, is_response_0_safe=True, is_response_1_safe=False,
            label_source_better='human',
            label_source_safer='human', label_source_is_safe='human')
SWAPPED = MILD | dict(response_0=MILD['response_1'], response_1=MILD['response_0'], better_response_id=1,
                      safer_response_id=1,
                      is_response_0_safe=False, is_response_1_safe=True)

def random_lengths(n, top, seed=1):
    rng = random.Random(seed)
    return [rng.randint(1, top) for _ in range(n)]

def make_tokenizer(bos=None):
    "A byte-level BPE that merges across spaces and words, so that borders matter."
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False,
                                                          use_regex=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=['<pad>', '</s>', '<s>'],
                                  show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator(['BEGINNING OF CONVERSATION: USER: Is it so? ASSISTANT:Yes, it is.']*30
                          + ['Yes, it is. No, it is not.']*30, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token='<pad>', eos_token='</s>', bos_token=bos)

@pytest.fixture(scope='module')
def tok(): return make_tokenizer()

@pytest.fixture(scope='module')
def tables(): return {name: shipped(name) for name in FILES}

# signs and pairs

def test_signs(): assert [harm_sign(x) for x in (True, False, None)] == [-1, 1, 0]

def test_safe_winner_is_low_in_cost_and_helpful_winner_is_high_in_reward():
    c, r = cost_pairs([MILD])[0], reward_pairs([MILD])[0]
    assert (c['low'], c['high']) == (MILD['response_0'], MILD['response_1'])
    assert (c['low_sign'], c['high_sign'], c['paired']) == (-1, 1, 1.)
    assert (r['high'], r['low']) == (MILD['response_0'], MILD['response_1'])

def test_axes_are_independent():
    row = MILD | dict(better_response_id=1)
    assert reward_pairs([row])[0]['high'] == cost_pairs([row])[0]['high'] == MILD['response_1']

def test_swapping_the_answers_changes_nothing():
    assert cost_pairs([SWAPPED]) == cost_pairs([MILD]) and reward_pairs([SWAPPED]) == reward_pairs([MILD])

def test_signs_follow_the_labels_in_all_shipped_pairs(tables):
    for name in ('decoupled', 'safety'):
        pairs = cost_pairs(tables[name])
        assert len(pairs) == len(tables[name])
        # never more harmful, yet the only safe one
        assert not any(p['high_sign'] == -1 and p['low_sign'] == 1 for p in pairs)
        assert sum(p['high_sign'] == 1 and p['low_sign'] == -1 for p in pairs) > 1000

def test_unknown_labels_and_label_sources():
    assert reward_pairs([MILD | dict(better_response_id=-1)]) == []
    assert cost_pairs([MILD | dict(safer_response_id=-1)]) == []
    assert cost_pairs([MILD], label_sources=('human+ai',)) == []
    assert len(reward_pairs([MILD], label_sources=('human',))) == 1
    unlabelled = cost_pairs([MILD | dict(is_response_0_safe=None, is_response_1_safe=None)])[0]
    assert unlabelled['high_sign'] == unlabelled['low_sign'] == 0

def test_label_pairs_feed_only_signs(tok):
    singles = [dict(prompt=f'p{i}', response=f'r{i}', is_safe=i % 2 == 0) for i in range(3)]
    a, b = label_pairs(singles)
    keys = ('prompt', 'low_prompt', 'high', 'low', 'high_sign', 'low_sign', 'paired')
    assert [a[k] for k in keys] == ['p0', 'p1', 'r0', 'r1', -1, 1, 0.]
    assert (b['high_sign'], b['low_sign']) == (-1, 0)  # the odd one counts once
    batch = pair_batch([a, b], tok, 40, 9)
    text = tok.decode(batch['input_ids'][2][batch['attention_mask'][2].bool()])
    assert text == format_prompt('p1', tok) + 'r1</s>'

# template

def test_template_is_exact(tok):
    assert format_prompt('Hi', tok) == 'BEGINNING OF CONVERSATION: USER: Hi ASSISTANT:'
    assert format_prompt(['a', 'b', 'c'],
                         tok) == 'BEGINNING OF CONVERSATION: USER: a ASSISTANT:b</s>USER: c ASSISTANT:'
    assert format_prompt('{input}', tok) == 'BEGINNING OF CONVERSATION: USER: {input} ASSISTANT:'

def test_dialogues(tok):
    text = '\n\nHuman: a\n\nAssistant: b\n\nAssistant: b2\n\nHuman: c: d\n\nAssistant:'
    assert as_turns(text) == as_turns(text.strip()) == ['a', 'b\n\nb2', 'c: d']
    assert bucket(text) == bucket('a')
    assert as_turns('no dialogue: Human: x') == ['no dialogue: Human: x']
    for bad in ('Human: a\n\nAssistant: b', 'Assistant: a', '', 'Human: \n\nAssistant:', 'x\n\nHuman: a'):
        with pytest.raises(ValueError): _parse_dialogue(bad)
    with pytest.raises(ValueError, match='odd'): format_prompt(['a', 'b'], tok)

# tokens

def test_nothing_merges_across_the_border(tok):
    prompt, answer = encode_prompt('Is it so?', tok, 99), encode_response('Yes, it is.', tok, 99)
    joint = tok(format_prompt('Is it so?', tok) + 'Yes, it is.').input_ids
    assert joint[:len(prompt)] != prompt  # the joint text does merge there, so the test means something
    assert tok.decode(prompt) == format_prompt('Is it so?', tok)
    assert tok.decode(answer) == 'Yes, it is.</s>'

def test_dialogue_ids_have_eos_between_turns_and_text_cannot_smuggle_it_in(tok):
    ids = encode_prompt(['a', 'b', 'c'], tok, 99)
    assert ids.count(tok.eos_token_id) == 1 and tok.decode(ids) == format_prompt(['a', 'b', 'c'], tok)
    assert tok.eos_token_id not in encode_prompt('a </s> b', tok, 99)
    assert tok.pad_token_id not in encode_prompt('<pad>', tok, 99)
    assert encode_response('a</s>', tok, 99).count(tok.eos_token_id) == 1

def test_bos_only_when_there_is_one(tok):
    with_bos = make_tokenizer('<s>')
    assert encode_prompt('a', with_bos, 99) == [with_bos.bos_token_id, *encode_prompt('a', tok, 99)]
    assert with_bos.bos_token_id not in encode_response('a', with_bos, 99)

@pytest.mark.parametrize('bos', [None, '<s>'])
def test_long_prompt_keeps_head_and_end(bos):
    t = make_tokenizer(bos)
    words = ' '.join(map(str, range(200)))
    ids = encode_prompt(words, t, 60)
    text = t.decode(ids)
    assert len(ids) == 60
    assert text.replace('<s>', '').startswith('BEGINNING OF CONVERSATION: USER:')
    assert text.endswith(' 198 199 ASSISTANT:')
    full = encode_prompt(words, t, 10_000)
    assert encode_prompt(words, t, len(full)) == full
    assert len(encode_prompt(words, t, len(full) - 1)) == len(full) - 1
    with pytest.raises(ValueError, match='no room'): encode_prompt(words, t, 3)

def test_cut_rules(tok):
    text = 'Yes, it is. No, it is not. ' + 'x y z '*5
    full = encode_response(text, tok, 10_000)
    n = len(full) - 1
    assert full[-1] == tok.eos_token_id
    # exactly fits: not cut
    assert encode_response(text, tok, n) == encode_response(text, tok, n, 'plain') == full
    assert encode_response(text, tok, n - 1) == [*full[:n - 1], tok.eos_token_id]
    assert encode_response(text, tok, n - 1, 'plain') == full[:n - 1]
    with pytest.raises(ValueError): encode_response(text, tok, 5, 'hard')

# batches

def test_pad_masks_lengths_not_ids():
    ids, mask = pad([[5, 0, 7], [0]], 0)
    assert ids.tolist() == [[5, 0, 7], [0, 0, 0]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = pad([[5, 0, 7], [4]], 9, 'left')
    assert ids.tolist() == [[5, 0, 7], [9, 9, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert ids.dtype == mask.dtype == torch.int64
    with pytest.raises(ValueError): pad([[1]], 0, 'top')
    with pytest.raises(ValueError): pad([], 0)

@pytest.mark.parametrize('what', [103, random_lengths(103, 50)])
def test_batch_indices(what):
    one, again = batch_indices(what, 8, seed=3, epochs=3), batch_indices(what, 8, seed=3, epochs=3)
    assert one == again and len(one) == 3*13 and one != batch_indices(what, 8, seed=4, epochs=3)
    epochs = [one[i:i + 13] for i in (0, 13, 26)]
    for e in epochs: assert sorted(sum(e, [])) == list(range(103))
    assert epochs[0] != epochs[1] != epochs[2]
    assert batch_indices(what, 8, seed=3, epochs=2) == one[:26]  # more epochs do not change the first ones
    assert batch_indices(what, 8, seed=3, epochs=1.5) == one[:20]
    assert batch_indices(what, 8, seed=3, epochs=.01) == one[:1]
    assert len(batch_indices(what, 1000, seed=3)) == 1  # fewer rows than a batch
    assert {type(i) for b in one for i in b} == {int}

def test_no_rows_make_no_batches():
    for none in (0, []):
        with pytest.raises(ValueError, match='no rows'): batch_indices(none, 8, 0)

def test_length_buckets_waste_less():
    lengths = random_lengths(500, 200)
    def padded(batches): return sum(len(b)*max(lengths[i] for i in b) for b in batches)
    assert padded(batch_indices(lengths, 8, 0)) < .8*padded(batch_indices(len(lengths), 8, 0))

def test_pair_batch_high_first_and_closed(tok):
    b = pair_batch(cost_pairs([MILD, SWAPPED]) + reward_pairs([MILD]), tok, 40, 5)
    assert b['input_ids'].shape[0] == 6 and b['high_sign'].tolist() == [1, 1, 0]
    assert b['low_sign'].tolist() == [-1, -1, 0]
    assert b['paired'].tolist() == [1, 1, 1] and b['paired'].dtype == torch.float32
    text = [tok.decode(i[m.bool()]) for i, m in zip(b['input_ids'], b['attention_mask'], strict=True)]
    assert 'ASSISTANT:Take' in text[0] and 'ASSISTANT:Ask' in text[3]
    assert all(t.endswith('</s>') for t in text)

def test_prompt_batch_is_left_padded(tok):
    b = prompt_batch(['Is it so? Where do ferns grow?', dict(prompt='So?')], tok, 90)
    assert b['attention_mask'][:, -1].tolist() == [1, 1] and b['attention_mask'][1, 0] == 0
    assert b['prompt_ids'].tolist() == [prompt_id('Is it so? Where do ferns grow?'), prompt_id('So?')]
    assert b['prompt_ids'].dtype == torch.int64

# partition

def test_bucket_sees_the_first_turn_normalised():
    d = 'Human: Where do ferns grow?\n\nAssistant: Here.\n\nHuman: And?\n\nAssistant:'
    assert bucket(d) == bucket('where do   FERNS grow') == bucket(['Where do ferns grow?', 'x', 'y'])
    assert bucket('a'*400 + 'b') == bucket('a'*400 + 'c') and 0 <= prompt_id(d) < 2**63
    # unknown prompts are never test
    assert {bucket(f'prompt {i}') for i in range(3000)} == set(range(20, 100))

def test_partitions_cover_and_do_not_overlap():
    every = [b for r in PARTITIONS.values() for b in r]
    assert sorted(every) == list(range(10, 100))

def test_bucket_agrees_with_the_shipped_split(tables):
    for name, t in tables.items():
        for prompt, split in zip(t['prompt'][:], t['split'][:], strict=True):
            assert (bucket(prompt) in PARTITIONS['test']) == (split != 'train'), (name, prompt)

def test_no_prompt_is_in_two_parts_across_all_files(tables):
    where = {}
    for t in tables.values():
        for name in PARTITIONS:
            for p in partition(t, name)['prompt'][:]: where.setdefault(key_hash(p), set()).add(name)
    assert len(where) > 20_000 and all(len(v) == 1 for v in where.values())

def test_evaluation_prompts_are_never_trained_on(tables):
    evaluation = {key_hash(p) for p in tables['eval_prompts']['prompt'][:]}
    for name in FILES[:-1]:
        trained = {key_hash(p) for p in partition(tables[name], 'gold', 'judge', 'rounds')['prompt'][:]}
        assert trained and not trained & evaluation

def test_partition_of_rows_and_tables(tables):
    t = tables['safety']
    rows = partition(t.to_list(), 'gold')
    assert partition(t, 'gold').to_list() == rows and set(buckets(rows)) <= set(PARTITIONS['gold'])
    assert shipped('safety', 'gold').to_list() == rows
    for bad in ((), ('train',)):
        with pytest.raises(ValueError, match='gold'): partition(t, *bad)

# shipped files

def test_hashes_rows_and_sizes(tables):
    entries = sources()
    files = {s['file'] for s in entries}
    assert {f'{n}.jsonl.xz' for n in FILES} < files
    for s in entries:
        assert sha256(data_path(s['file'])) == s['sha256'], s['name']
        assert s['licence'] and s['revision'] and s['source'], s['name']
    for name in FILES:
        assert sum(sum(s['rows'].values()) for s in entries
                   if s['file'] == f'{name}.jsonl.xz') == len(tables[name])
        assert {s['name'] for s in entries if s['file'] == f'{name}.jsonl.xz'} == set(tables[name]['source'])
    judges = {f for f in files if f.startswith('models/gold-smollm2')}     # counted in test_package
    assert sum(data_path(f).stat().st_size for f in files - judges) < 25e6 # data and models together

def test_a_changed_file_is_refused(tmp_path, monkeypatch):
    (tmp_path/'data').mkdir()
    for f in ('sources.json', 'eval_prompts.jsonl.xz', 'test_prompts.txt.xz'):
        shutil.copy(data_path(f), tmp_path/'data'/f)
    monkeypatch.setenv('SAFERLHF_HOME', str(tmp_path))
    assert len(shipped('eval_prompts')) > 2000
    text = lzma.decompress((tmp_path/'data'/'eval_prompts.jsonl.xz').read_bytes()).replace(b'a', b'b', 1)
    (tmp_path/'data'/'eval_prompts.jsonl.xz').write_bytes(lzma.compress(text))
    with pytest.raises(ValueError, match='sha256'): shipped('eval_prompts')
    # else the shipped one
    assert data_path('sft.jsonl.xz').parent != tmp_path/'data' and data_path() == tmp_path/'data'
    with pytest.raises(FileNotFoundError, match='nothing.json.*SAFERLHF_HOME'): data_path('nothing.json')
    with pytest.raises(ValueError, match='eval_prompts'): shipped('nothing')

def test_label_sources_are_kept(tables):
    by = set(tables['decoupled']['label_source_safer'])
    assert by == {'human+ai', 'beaver-7b-v1.0-cost'}
    human = cost_pairs(tables['decoupled'], label_sources=('human', 'human+ai'))
    assert 1000 < len(human) < len(tables['decoupled']) and {p['label_source'] for p in human} == {'human+ai'}

# dirty rows

DIRTY = {'missing field': MILD | dict(response_1=None), 'wrong type': MILD | dict(is_response_0_safe='yes'),
         'empty text': MILD | dict(prompt='  '),
         'over-long text': MILD | dict(response_0='x'*30_000),
         'equal responses': MILD | dict(response_1=MILD['response_0'] + ' '),
         'contradictory labels': MILD | dict(safer_response_id=1), 'not a row': 'text',
         'broken text': MILD | dict(prompt='\ud800'),
         'broken dialogue': MILD | dict(prompt='Human: a\n\nAssistant: b'),
         'no label': {k: MILD[k] for k in ('prompt', 'response_0', 'response_1')}}

@pytest.mark.parametrize('reason', DIRTY)
def test_dirty_rows_are_reported_dropped_or_refused(reason):
    clean, report = validate([MILD, DIRTY[reason], SWAPPED])
    assert clean == [MILD, SWAPPED] and report.counts == {reason: 1} and (report.total, report.kept) == (3, 2)
    assert report.examples[reason][0][0] == 1 and reason in str(report) and 'row 1' in str(report)
    with pytest.raises(ValueError, match=reason): validate([MILD, DIRTY[reason]], policy='raise')

@pytest.mark.parametrize('bad', [dict(better_response_id=2), dict(better_response_id='0'),
                                 dict(safer_response_id=True),
                                 dict(response_0=7)])
def test_wrong_types(bad):
    assert validate([MILD | bad])[1].counts == {'wrong type': 1}

def test_unknown_labels_are_fine():
    assert validate([MILD | dict(better_response_id=-1, is_response_0_safe=None)])[1].kept == 1

def test_a_dirty_file_never_crashes_an_epoch(tok, tmp_path, caplog):
    lines = [json.dumps(r) for r in DIRTY.values()] + ['{"prompt": "cut off', '', '[]', 'null',
                                                       json.dumps(MILD), json.dumps(SWAPPED)]
    (tmp_path/'pairs.jsonl').write_text('\n'.join(lines))
    with caplog.at_level(logging.WARNING): t = load_preferences(tmp_path/'pairs.jsonl')
    assert len(t) == 2 and 'not JSON' in caplog.text and 'equal responses' in caplog.text
    rows = cost_pairs(t)
    for batch in batch_indices(len(rows), 1, 0): pair_batch([rows[i] for i in batch], tok, 40, 9)
    with pytest.raises(ValueError, match='equal responses'):
        load_preferences(tmp_path/'pairs.jsonl', policy='raise')
    assert len(load_prompts(tmp_path/'pairs.jsonl')) == 1                                # one prompt, once
    with pytest.raises(ValueError, match='policy'): validate([MILD], policy='ignore')

def test_odd_values_in_optional_columns_do_no_harm():
    odd = MILD | dict(id=7, source=3, reward_0='high', cost_0=1, human_is_response_0_safe='x', extra={},
                      response_0_harm_category='violence')
    row = load_preferences([odd, MILD])[0]
    assert (row['id'], row['source'], row['reward_0'], row['cost_0'],
            row['response_0_harm_category']) == ('7', '3', None, 1., ['violence'])

def test_labels_need_a_label(tmp_path):
    rows = [dict(prompt='a', response='b', is_safe=v) for v in (True, False, None, 'no')]
    assert load_labels(rows)['is_safe'] == [True, False]
    assert validate(rows, 'label')[1].counts == {'missing field': 1, 'wrong type': 1}

# layouts

@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path/'cache')

def test_local_files_give_the_same_rows(tmp_path):
    rows = [MILD | dict(id='a', source='s', split='train'), SWAPPED | dict(id='b', source='s', split='train')]
    want = load_preferences(rows).to_list()
    (tmp_path/'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (tmp_path/'a.json').write_text(json.dumps(rows))
    for end, module in (('gz', gzip), ('xz', lzma)):
        with module.open(tmp_path/f'a.jsonl.{end}',
                         'wt') as f: f.write('\n'.join(map(json.dumps, rows)) + '\n')
    Dataset.from_list(rows).to_parquet(str(tmp_path/'a.parquet'))
    for name in ('a.jsonl', 'a.json', 'a.jsonl.gz', 'a.jsonl.xz', 'a.parquet'):
        assert load_preferences(str(tmp_path/name)).to_list() == want, name
    assert list(load_preferences(rows).features) == list(data.SCHEMA['preference'])

def test_pku_saferlhf_layout():
    t = load_preferences(str(FIXTURES/'PKU-SafeRLHF'), policy='raise')
    assert t['better_response_id'] == [0, 1, 0] and t['safer_response_id'] == [0, 0, 1]
    assert t['response_1_harm_category'][0] == ['Animal Abuse'] and t['response_0_harm_category'][0] == []
    assert set(t['label_source_safer']) == {'human+ai'} and len(set(t['id'])) == 3
    assert [p['high_sign'] for p in cost_pairs(t)] == [1, -1, 1]
    assert len(load_preferences(str(FIXTURES/'PKU-SafeRLHF'), split='test')) == 1

def test_beavertails_layout():
    t = load_labels(str(FIXTURES/'BeaverTails'), policy='raise')
    assert t['is_safe'] == [False, True, False]
    assert t['category'][2] == ['non_violent_unethical_behavior', 'privacy_violation']
    assert set(t['category'][0] + t['category'][2]) <= set(HARM_CATEGORIES)
    assert set(t['label_source']) == {'human'}

@pytest.mark.parametrize('chosen_is', ['safer', 'better'])
def test_hh_rlhf_layout(chosen_is, caplog):
    folder = 'harmless-base' if chosen_is == 'safer' else 'helpful-base'
    t = load_preferences(read_rows(str(FIXTURES/'hh-rlhf'), data_dir=folder), chosen_is=chosen_is)
    assert len(t) == 2 and 'chosen and rejected differ' in caplog.text
    other = dict(safer='better_response_id', better='safer_response_id')[chosen_is]
    assert set(t[other]) == {-1} and t[f'label_source_{chosen_is}'] == ['human', 'human']
    pairs = cost_pairs(t) if chosen_is == 'safer' else reward_pairs(t)
    better = [p['low' if chosen_is == 'safer' else 'high'] for p in pairs]
    assert better == ['In sand and sun.', 'In measure, yes.']
    assert as_turns(t['prompt'][0]) == ['Where do ferns grow?', 'In the shade.', 'And cacti?']
    assert not any(p['high_sign'] or p['low_sign'] for p in cost_pairs(t))
    with pytest.raises(ValueError, match='chosen_is'): load_preferences([], chosen_is='nicer')

def test_hh_answers_have_no_fixed_place():
    rows = [dict(chosen=f'\n\nHuman: q{i}\n\nAssistant: good {i}',
                 rejected=f'\n\nHuman: q{i}\n\nAssistant: bad {i}') for i in range(200)]
    assert 70 < sum(load_preferences(rows, chosen_is='safer')['safer_response_id']) < 130

def test_alpaca_layout(caplog):
    t = load_sft(str(FIXTURES/'alpaca'))
    assert t['prompt'] == ['Name a bird.', 'Put the word in the plural.\n\nleaf']
    assert t['response'] == ['Swallow.', 'leaves']
    assert 'empty text' in caplog.text and len(load_prompts(str(FIXTURES/'alpaca'))) == 3


def test_malformed_rows_are_reported_and_dropped(): # ten thousand of them by `make faults`
    from faults.rows import fuzz
    table = fuzz(300)
    assert {row[6] for row in table} == {'every row reported and dropped'} and len(table) == 15
    assert sum(row[5] for row in table) >= 300

@pytest.mark.parametrize('text, reason', [('a\0b', 'control characters'), ('a\x85b', 'control characters'),
                                          ('a\ufffdb', 'broken text')])
def test_characters_that_no_answer_holds(text, reason):
    assert validate([MILD | dict(response_0=text),
                     MILD | dict(response_0='tab\tand\r\nline')])[1].counts == {reason: 1}

@pytest.mark.parametrize('name', ['rows.pkl', 'rows.bin', 'folder', 'clone'])
def test_only_data_files_are_read(tmp_path, name):
    f = tmp_path/name
    if name == 'folder': f.mkdir(); (f/'x.pickle').write_bytes(b'')
    elif name == 'clone': (f/'.git').mkdir(parents=True); (f/'.git'/'x.jsonl').write_text('{"prompt": "x"}')
    else: f.write_bytes(b'')
    with pytest.raises(ValueError, match='rows are read from .json'): load_preferences(f)

# what people bring

def columns(table, *names): return [tuple(row[name] for name in names) for row in table]

def talk(*words, system=None, answers=('user', 'assistant')):
    turns = [dict(role=answers[i % 2], content=text) for i, text in enumerate(words)]
    return [dict(role='system', content=system)]*(system is not None) + turns

def chosen(row, **known):
    "The prompt and the chosen and rejected answers of a single row."
    t = load_preferences([row], chosen_is='better', **known)[0]
    k = t['better_response_id']
    return t['prompt'], t[f'response_{k}'], t[f'response_{1 - k}']

Q, GOOD, BAD = 'Name a bird.', 'Swallow.', 'No.'
MULTI = talk('a', 'b', Q, system='Be brief.')

@pytest.mark.parametrize('row, prompt', [
    (dict(prompt=Q, chosen=talk(Q, GOOD), rejected=talk(Q, BAD), score_chosen=8.), Q),        # UltraFeedback
    (dict(prompt=Q, chosen=' ' + GOOD, rejected=BAD), Q),                                     # TRL, text
    (dict(prompt=MULTI, chosen=talk('', GOOD)[1:], rejected=talk('', BAD)[1:]), MULTI),       # TRL, messages
    (dict(chosen=MULTI + talk('', GOOD)[1:], rejected=MULTI + talk('', BAD)[1:]), MULTI),     # TRL, no prompt
    (dict(prompt=Q, chosen=talk('a', 'b', Q, GOOD, system='Be brief.'),
          rejected=talk('a', 'b', Q, BAD, system='Be brief.')), MULTI),
    (dict(prompt=Q, chosen=str(talk(Q, GOOD)), rejected=json.dumps(talk(Q, BAD))), Q),        # in CSV
    (dict(chosen=f'\r\n\r\nHuman: {Q}\r\n\r\nAssistant: {GOOD}', rejected=f'\n\nHuman: {Q}\n\nAssistant: {BAD}'),
     f'Human: {Q}\n\nAssistant:'),
    (dict(conversations=[{'from': 'human', 'value': Q}], chosen={'from': 'gpt', 'value': GOOD},
          rejected={'from': 'gpt', 'value': BAD}), Q)])
def test_chosen_and_rejected_in_every_layout(row, prompt):
    assert chosen(row) == (prompt if isinstance(prompt, str) else json.dumps(prompt), GOOD, BAD)
    assert load_prompts([row])['prompt'][0] in (chosen(row)[0], Q)

def test_what_chosen_means_is_asked_for_and_echoed(caplog):
    pairs = [dict(prompt=Q, chosen=GOOD, rejected=BAD)]
    single = [dict(prompt=Q, response_0=GOOD, response_1=BAD, better_response_id=0, response_0_sha256='x')]
    for rows, column in ((pairs, 'chosen'), (single, 'better_response_id')):
        with pytest.raises(ValueError, match=f"say what {column} means: chosen_is='safer'"): load_preferences(rows)
        t = load_preferences(rows, chosen_is='safer')
        assert t['better_response_id'] == [-1] and t['safer_response_id'][0] in (0, 1)
        assert f"{column} is taken to mean 'safer'" in caplog.text
    assert load_preferences(pairs, chosen_is='better')['label_source_better'] == [None]   # people? nobody says so
    caplog.clear(); load_preferences([MILD]); assert not caplog.text

def test_dialogues_without_a_last_answer_are_counted(caplog):
    open_ = '\n\nHuman: a\n\nAssistant: b\n\nHuman:'
    rows = [dict(chosen=open_, rejected='\n\nHuman: a\n\nAssistant: c'), dict(chosen=talk(Q), rejected=talk(Q)),
            dict(chosen='\n\nHuman: a\n\nAssistant: b', rejected='\n\nHuman: a\n\nAssistant: c')]
    t = load_preferences(rows, chosen_is='safer')
    assert len(t) == 1 and '2  ends with a human turn row 0' in caplog.text
    assert len(load_sft([dict(messages=talk(Q, GOOD)), dict(messages=talk(Q))])) == 1
    prompts = load_prompts([dict(prompt=Q), dict(prompt='Human: a\n\nAssistant: b')])
    assert prompts['prompt'] == [Q] and '1  broken dialogue' in caplog.text

def test_prompts_of_every_form():
    forms = [Q, talk(Q), json.dumps(talk(Q), indent=1), ['a', 'b', Q], talk('Human: x'), talk(Q, system='é')]
    stored = [Q, json.dumps(talk('a', 'b', Q)), json.dumps(talk('Human: x')),
              json.dumps(talk(Q, system='é'), ensure_ascii=False)]
    assert load_prompts([dict(prompt=f) for f in forms])['prompt'] == stored
    assert load_prompts([dict(messages=f) for f in (talk(Q), talk(Q, GOOD))])['prompt'] == [Q]
    for bad, reason in ((talk(Q, GOOD), 'roles'), ([], 'wrong type'), (talk('a\0b'), 'control'), (talk(''), 'text')):
        with pytest.raises(ValueError, match=reason): load_prompts([dict(prompt=bad)])
    plain = ['[1, 2] is what?', '{"role": "admin"}', '{x} [y]']
    assert load_prompts([dict(prompt=p) for p in plain])['prompt'] == plain

def test_answers_of_every_form():
    answer = talk('', GOOD)[1]
    rows = [dict(prompt=Q, response=answer), dict(prompt=Q, completion=[answer]), dict(messages=talk(Q, GOOD)),
            dict(conversations=[{'from': 'human', 'value': Q}, {'from': 'gpt', 'value': GOOD}]),
            dict(prompt=Q, prompt_id='x', messages=talk(Q, GOOD)), dict(instruction=Q, input='', output=GOOD)]
    t = load_sft(rows, policy='raise')
    assert set(columns(t, 'prompt', 'response')) == {(Q, GOOD)} and len(t) == len(rows)
    old = load_sft([dict(instruction=Q, input=None, output=GOOD, history=[['a', 'b']])])
    assert json.loads(old['prompt'][0]) == talk('a', 'b', Q)

def test_labels_of_pandas_and_csv(tmp_path):
    import numpy as np
    import pandas as pd
    one = dict(MILD, prompt='a')
    frame = pd.DataFrame([one, dict(one, prompt='b', is_response_0_safe=None, better_response_id=None),
                          dict(one, prompt='c', is_response_1_safe=np.nan, response_0='None')])
    frame['is_response_1_safe'] = frame['is_response_1_safe'].astype(float)
    names = ('better_response_id', 'safer_response_id', 'is_response_0_safe', 'is_response_1_safe')
    want = [(0, 0, True, False), (-1, 0, None, False), (0, 0, True, None)]
    frame.to_csv(tmp_path/'a.csv'); frame.to_parquet(tmp_path/'a.parquet')
    for source in (frame, frame.convert_dtypes(), frame.to_dict('records'), tmp_path/'a.csv', tmp_path/'a.parquet'):
        t = load_preferences(source, policy='raise')
        assert columns(t, *names) == want and t['response_0'][2] == 'None'
    nested = Dataset.from_list([dict(prompt=Q, chosen=talk(Q, GOOD), rejected=talk(Q, BAD))]).to_pandas()
    assert len(load_preferences(nested, chosen_is='better')) == 1
    nested.to_csv(tmp_path/'b.csv')                                    # numpy's way of printing cannot be read back
    with pytest.raises(ValueError, match='unreadable messages'): load_preferences(tmp_path/'b.csv', chosen_is='safer')
    t = load_labels([dict(prompt=Q, response='a', is_safe=x, extra=b'\xff') for x in
                     (np.True_, 'True', 1., '0', 'false', np.float64(0), 'maybe', 2, float('nan'))])
    assert t['is_safe'] == [True, True, True, False, False, False]

def test_categories_of_every_form():
    tables = {'Violence': True, 'Cybercrime': False}, '{"Violence": true}', "{'Violence': True}", '["Violence"]', "['Violence']"
    rows = [dict(prompt=Q, response='a', is_safe=False, category=c) for c in tables]
    t = load_labels([*rows, dict(prompt=Q, response='a', is_safe=False, category="['Violence' 'Theft']")])
    assert t['category'] == [['Violence']]*5 + [['Violence', 'Theft']] and t['label_source'][0] == 'human'
    qa = dict(prompt=Q, response='a', is_safe=False, harm_category=tables[0], severity_level=2, sha256='ab')
    row = load_labels([qa])[0]
    assert (row['category'], row['label_source'], row['is_safe']) == (['Violence'], 'human+ai', False)

@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_byte_order_marks_and_line_ends(tmp_path, end, encoding):
    rows = [dict(prompt=f'Où {i}?', response='a, b', is_safe=True) for i in range(3)]
    texts = {'a.jsonl': end.join(map(json.dumps, rows)), 'a.json': json.dumps(rows, indent=1).replace('\n', end),
             'a.csv': end.join(['prompt,response,is_safe', *(f'{r["prompt"]},"a, b",True' for r in rows), ''])}
    for name, text in texts.items():
        (tmp_path/name).write_bytes(text.encode(encoding))
        assert columns(load_labels(tmp_path/name, 'raise'), *rows[0]) == [tuple(r.values()) for r in rows], name

def test_a_line_of_csv_with_too_many_cells(tmp_path, caplog):
    (tmp_path/'a.csv').write_text('prompt,response,is_safe\nq,a,True\nq,a, b,True\n')
    assert len(load_labels(tmp_path/'a.csv')) == 1 and '1  more cells than columns' in caplog.text

def folder(root, *names):
    for name in names:
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_text(json.dumps(dict(prompt=name)) if name.endswith('.jsonl') else 'x')
    return root

def test_folders(tmp_path):
    prompts = lambda *names, split='train': load_prompts(folder(tmp_path/str(len([*tmp_path.iterdir()])), *names), split=split)['prompt']
    junk = ('README.md', '.gitattributes', 'pipeline.png', 'train.ipynb', '.git/objects/pack/pack-1.idx', '.git/train.jsonl',
            '.cache/huggingface/CACHEDIR.TAG', '.cache/huggingface/download/train.jsonl.metadata', 'dataset_infos.json')
    one = 'data/Alpaca-7B/train.jsonl'
    assert prompts(*junk, one, 'data/Alpaca-7B/test.jsonl') == [one]
    assert prompts('a/train/x.jsonl', 'a/test/x.jsonl', 'b/dev.jsonl', split='test') == ['a/test/x.jsonl']
    assert prompts('pairs.jsonl', 'training-loss.png') == ['pairs.jsonl']
    parts = [f'data/{name}-00000-of-00001.jsonl' for name in ('train_prefs', 'train_sft')]
    assert prompts(*parts, split='train_prefs') == parts[:1]
    with pytest.raises(ValueError, match="no rows of split='train' in .*train_prefs"): prompts(*parts)

def test_splits_streams_and_damaged_files(tmp_path):
    table = Dataset.from_list([MILD])
    assert len(load_preferences(datasets.DatasetDict(train=table, test=table))) == 1
    assert len(load_preferences(table.to_iterable_dataset())) == 1
    with pytest.raises(ValueError, match=r"no split 'train': pass split= of \['test'\]"): load_preferences(datasets.DatasetDict(test=table))
    for name in ('a.parquet', 'a.jsonl.gz', 'a.csv.xz'):
        (tmp_path/name).write_bytes(b'no such format')
        with pytest.raises(ValueError, match='is damaged'): load_preferences(tmp_path/name)
    with pytest.raises(FileNotFoundError, match='none.jsonl'): load_preferences(tmp_path/'none.jsonl')

@pytest.mark.parametrize('load', [load_preferences, load_labels, load_sft, load_prompts])
def test_when_no_row_is_left_the_layouts_are_named(load):
    for rows in ([dict(text='another layout')], [dict(text='x', prompt=None)], ['text'], []):
        with pytest.raises(ValueError, match='known layouts: PKU-SafeRLHF') as error: load(rows)
        assert '\n' not in str(error.value) and (not rows or rows == ['text'] or "columns seen: ['text'" in str(error.value))

def test_no_pairs_to_train_on():
    from saferlhf.train import ScoreConfig, score_batches
    pairs = reward_pairs(load_preferences([MILD | dict(better_response_id=-1)]))
    with pytest.raises(ValueError, match='no rows'): score_batches(pairs, None, ScoreConfig())


def test_a_system_text_in_a_column_of_its_own_is_part_of_the_prompt():
    talk = [dict([('from', 'human'), ('value', 'q')]), dict([('from', 'gpt'), ('value', 'a')])]
    rows = [dict(instruction='q', output='a'), dict(prompt='q', response='a'), dict(conversations=talk)]
    for row in rows:
        assert load_sft([row | dict(system='Be brief.')])[0]['prompt'] == json.dumps(
            [dict(role='system', content='Be brief.'), dict(role='user', content='q')])
        assert load_sft([row | dict(system='')])[0]['prompt'] == load_sft([row])[0]['prompt'] == 'q'
    pair = dict(prompt='q', chosen='a', rejected='b', system='Be brief.')
    assert 'Be brief.' in load_preferences([pair], chosen_is='better')[0]['prompt']
    assert load_sft([dict(instruction='i', context='c', response='o')])[0]['prompt'] == 'i\n\nc'
