"What a folder of a model may name and link to: looked at before anything is read, everywhere that reads."
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saferlhf.apps.classifiers import _classifier
from saferlhf.apps.commands import main
from saferlhf.apps.stages import located
from saferlhf.hardware.adapters import Lora, base_of
from saferlhf.hardware.folders import vetted
from saferlhf.hardware.weights import read_config, stored
from saferlhf.models import ScoreModel, load_lm, load_tokenizer, tiny_model, train_tokenizer
from saferlhf.record.fetch import model_hash

INDEX = 'model.safetensors.index.json'


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A model with its tokenizer, in one file."
    folder = tmp_path_factory.mktemp('weights')/'whole'
    t = train_tokenizer(['a b c d e f'] * 9, 262)
    tiny_model(vocab_size=len(t)).save_pretrained(folder); t.save_pretrained(folder)
    return folder


@pytest.fixture
def model(whole, tmp_path): return Path(shutil.copytree(whole, tmp_path/'model'))


def change(path, **values): path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


class Ran: # what a pickle does when it is read
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def pickled(path, ran): path.write_bytes(pickle.dumps(Ran(ran)))


def in_shards(folder, name='shard.safetensors'):
    (folder/'model.safetensors').rename(folder/'shard.safetensors')
    change(folder/INDEX, metadata={}, weight_map=dict.fromkeys(load_file(folder/'shard.safetensors'), name))
    return folder


READERS = load_lm, ScoreModel.from_pretrained, stored, load_tokenizer, model_hash, located
NAMES = 'shard.bin', 'shard.pt', '../outside.safetensors', '{}/outside.safetensors', 'sub/x.safetensors', '..', '', 7, None, \
        'a\\b.safetensors', 'C:x.safetensors', 'x\n.safetensors', 'model.safetensors.pkl'


@pytest.mark.parametrize('name', NAMES, ids=repr)
def test_an_index_names_safetensors_of_its_folder_only(model, tmp_path, name):
    shutil.copy(model/'model.safetensors', tmp_path/'outside.safetensors'); ran = tmp_path/'ran'
    in_shards(model, name.format(tmp_path) if isinstance(name, str) else name)
    for ending in ('bin', 'pt'): pickled(model/f'shard.{ending}', ran)
    (model/'sub').mkdir(); shutil.copy(model/'shard.safetensors', model/'sub/x.safetensors')
    for read in READERS:
        with pytest.raises(ValueError, match=r'a shard is a file NAME\.safetensors') as e: read(model)
        assert len(str(e.value).splitlines()) == 1 and str(model) in str(e.value)
    assert not ran.exists()


def test_shards_that_are_there_are_read(model):
    before = load_lm(model).state_dict(); again = load_lm(in_shards(model)).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in before.items()) and located(model)[0] == model


@pytest.mark.parametrize('text', ('[]', '7', 'no JSON', '{}', '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": "x"}'))
def test_an_index_that_is_none(model, text):
    in_shards(model); (model/INDEX).write_text(text)
    for read in READERS:
        with pytest.raises(ValueError, match='is no index'): read(model)


def test_a_missing_shard(model):
    in_shards(model, 'gone.safetensors')
    for read in READERS:
        with pytest.raises(ValueError, match=r'its shard gone\.safetensors is missing'): read(model)


@pytest.mark.parametrize('name', 'model.safetensors config.json tokenizer.json tokenizer_config.json README.md chat_template.jinja'.split())
def test_a_link_out_of_the_folder(model, tmp_path, name):
    (tmp_path/'outside').write_bytes((model/name).read_bytes() if (model/name).exists() else b'')
    (model/name).unlink(missing_ok=True); (model/name).symlink_to('../outside')
    for read in (*READERS, read_config):
        with pytest.raises(ValueError, match=f'{name} is a link out of the folder'): read(model)


def test_links_that_are_no_fault(model, tmp_path):
    "To a folder of a model as a whole, within it, and from the hub's snapshots to its blobs."
    (tmp_path/'link').symlink_to(model); load_lm(tmp_path/'link')
    (model/'model.safetensors').rename(model/'weights'); (model/'model.safetensors').symlink_to('weights'); load_lm(model)
    cache = tmp_path/'models--o--n'; (cache/'snapshots').mkdir(parents=True); (cache/'blobs').mkdir()
    (snapshot := cache/'snapshots/abc').mkdir()
    for p in model.iterdir():
        shutil.copy(p, cache/'blobs'/p.name); (snapshot/p.name).symlink_to(f'../../blobs/{p.name}')
    load_lm(snapshot); load_tokenizer(snapshot); model_hash(snapshot)
    (snapshot/'config.json').unlink(); (snapshot/'config.json').symlink_to(model/'config.json')
    with pytest.raises(ValueError, match='out of the folder'): load_lm(snapshot)


def test_a_pipe_is_not_waited_for(model):
    (model/'tokenizer.json').unlink(); os.mkfifo(model/'tokenizer.json')
    with pytest.raises(ValueError, match='no ordinary file'): load_tokenizer(model)


def test_a_pickle_is_never_read(model, tmp_path):
    ran = tmp_path/'ran'
    for name in ('pytorch_model.bin', 'adapter_model.bin', 'training_args.bin', 'optimizer.pt'): pickled(model/name, ran)
    load_lm(model); load_tokenizer(model); located(model)                   # beside safetensors they are left alone
    (model/'model.safetensors').unlink()
    with pytest.raises(ValueError, match='other formats can hide code'): load_lm(model)
    change(model/'config.json', transformers_weights='adapter_model.bin')
    for read in (load_lm, load_tokenizer):
        with pytest.raises(ValueError, match='names weights'): read(model)
    assert not ran.exists()


def test_a_configuration_names_no_weights_and_no_code(model, tmp_path):
    shutil.copy(model/'model.safetensors', tmp_path/'outside.safetensors')
    for name in ('../outside.safetensors', 'other.safetensors'):
        change(model/'config.json', transformers_weights=name)
        with pytest.raises(ValueError, match='config.json names weights'): load_lm(model)
    change(model/'config.json', transformers_weights=None, attn_implementation='somebody/attention')
    with pytest.raises(ValueError, match='asks for code of its own'): load_lm(model)
    change(model/'config.json', attn_implementation='sdpa', text_config=dict(_attn_implementation='somebody/attention'))
    with pytest.raises(ValueError, match='asks for code of its own'): ScoreModel.from_pretrained(model)


@pytest.mark.parametrize('key', ('tokenizer_file', 'vocab_file', 'merges_file', 'fast_tokenizer_files'))
def test_a_tokenizer_names_files_of_its_folder_only(model, tmp_path, key):
    (tmp_path/'tokenizer.0.1.json').write_bytes((model/'tokenizer.json').read_bytes())
    for name in ('../tokenizer.0.1.json', str(tmp_path/'tokenizer.0.1.json')):
        change(model/'tokenizer_config.json', **{key: [name] if key.endswith('s') else name})
        for read in (load_tokenizer, located, load_lm):
            with pytest.raises(ValueError, match=f'tokenizer_config.json names .* as {key}'):
                read(model) if read is not located else model_hash(read(model)[0])
    change(model/'tokenizer_config.json', **{key: ['tokenizer.json'] if key.endswith('s') else 'tokenizer.json'},
           special_tokens_map_file='/somewhere/special_tokens_map.json')
    load_tokenizer(model)


def test_a_tokenizer_runs_no_code(model, tmp_path):
    ran = tmp_path/'ran'; (model/'tokenization_x.py').write_text(f'open({str(ran)!r}, "w")')
    change(model/'tokenizer_config.json', tokenizer_class='TokenizerX', auto_map=dict(AutoTokenizer=['tokenization_x.TokenizerX', None]))
    try: load_tokenizer(model)
    except ValueError as e: assert 'trust_remote_code' in str(e)
    assert not ran.exists()


def test_a_classifier_is_looked_at_too(model):
    config = read_config(model); config.architectures, config.num_labels = ['LlamaForSequenceClassification'], 1
    _, score = None, _classifier(in_shards(model, 'shard.bin'), config, 'cost', None, (8, 8))[0]
    with pytest.raises(ValueError, match='a shard is a file'): score(['a'], ['b'])


@pytest.fixture
def adapter(model, tmp_path):
    load_lm(model, lora=Lora(rank=2)).save_pretrained(tmp_path/'adapter')
    load_lm(tmp_path/'adapter')
    return tmp_path/'adapter'


def test_an_adapter_is_looked_at_and_so_is_its_base(adapter, model, tmp_path):
    ran, config = tmp_path/'ran', adapter/'adapter_config.json'
    def refused(why, *more):
        for read in (load_lm, base_of, read_config, *more):
            with pytest.raises((ValueError, FileNotFoundError), match=why) as e: read(adapter)
            assert len(str(e.value).splitlines()) == 1
    before = json.loads(config.read_text())
    for k, v in dict(base_model_name_or_path=7, megatron_config=dict(a=1), corda_config=dict(cache_file='/tmp/x')).items():
        change(config, **{k: v}); refused('adapter_config.json'); config.write_text(json.dumps(before))
    change(config, base_model_name_or_path=str(tmp_path)); refused('is not there'); config.write_text(json.dumps(before))
    change(config, base_model_name_or_path=str(adapter)); shutil.copy(model/'config.json', adapter); refused('another adapter')
    (adapter/'config.json').unlink(); config.write_text(json.dumps(before))
    tensors = adapter/'adapter_model.safetensors'; held = tensors.read_bytes()
    tensors.unlink(); pickled(adapter/'adapter_model.bin', ran); refused('it has no adapter_model.safetensors', located)
    (tmp_path/'outside').write_bytes(held); tensors.symlink_to('../outside'); refused('link out of the folder', located)
    tensors.unlink(); tensors.write_bytes(held); load_lm(adapter)
    in_shards(model, '../outside')
    for read in (load_lm, read_config):
        with pytest.raises(ValueError, match='a shard is a file'): read(adapter)
    assert not ran.exists()


def test_the_command_says_so_in_one_line(model, tmp_path, capsys):
    (tmp_path/'rows.jsonl').write_text('\n'.join(json.dumps(dict(prompt=f'p {i}', response='a')) for i in range(40)))
    assert main(['sft', '--model', str(in_shards(model, '../outside.safetensors')), '--data', str(tmp_path/'rows.jsonl')]) == 1
    err = capsys.readouterr().err
    assert 'a shard is a file NAME.safetensors' in err and len(err.splitlines()) == 1
    assert vetted('no/such') == 'no/such'                                   # a name of the hub: nothing is asked for


def test_a_tensor_of_no_shard_is_missing(model):
    in_shards(model); tensors = load_file(model/'shard.safetensors'); tensors.popitem()
    save_file(tensors, model/'shard.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ValueError, match='missing'): load_lm(model)
