"Nothing altered, nothing stale, nothing of another run: runs, ledgers, checkpoints and tables name what is wrong with them."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from saferlhf.apps import commands
from saferlhf.apps.export import export
from saferlhf.apps.stages import located
from saferlhf.record.execute import execute, publish
from saferlhf.record.files import lock, newest, read_json, save_checkpoint, whole_table
from saferlhf.record.resume import Saver
from saferlhf.record.run import Record, Run
from saferlhf.reproduction import ledger, pipeline, results
from saferlhf.reproduction.graph import configure, find, reads, stage_of
from saferlhf.reproduction.ledger import entries, folder_of, run_stage
from saferlhf.reproduction.tables import Results
from saferlhf.reproduction.verify import verify


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/'runs')); monkeypatch.setenv('SAFERLHF_HOME', str(tmp_path))
    for name in ('SAFERLHF_NOTE', 'SAFERLHF_COMMAND', 'SAFERLHF_SIBLINGS'): monkeypatch.delenv(name, raising=False)
    (tmp_path/'data/results').mkdir(parents=True)
    return tmp_path


def made(stage='sft', config=None, parents=None, loss=2., **k):
    "A small finished run with weights, metrics and rows."
    run = Run.start(stage, config or {}, parents, **k)
    if run.done: return run
    (run.folder/'model').mkdir(exist_ok=True)
    (run.folder/'model/model.safetensors').write_bytes(b'weights %f' % loss)
    (run.folder/'model/config.json').write_text(json.dumps(dict(hidden=8, _name_or_path=str(run.folder))))
    (run.folder/'model/README.md').write_text(f'made in {run.folder}')
    (run.folder/'preferences.jsonl').write_text('{"better": 0}\n')
    for step in range(2): run.log(step, {'loss': loss})
    run.finish({'loss': loss})
    return run


ALTER = {'model/model.safetensors': lambda p: p.write_bytes(p.read_bytes()[::-1]), 'preferences.jsonl': lambda p: p.write_text(''),
         'metrics.jsonl': lambda p: p.write_text(p.read_text()[:-9]), 'summary.json': lambda p: p.write_text('{"loss": 1.0}'),
         'config.json': lambda p: p.write_text('{"lr": 1}'), 'files.json': Path.unlink,
         'manifest.json': lambda p: p.write_text(p.read_text().replace('"seed": 0', '"seed": 1')),
         'model/config.json': Path.unlink, 'model/more.safetensors': lambda p: p.write_bytes(b'1')}


@pytest.mark.parametrize('name', ALTER)
def test_an_altered_parent_is_refused_by_name(home, name, capsys):
    run = made(); ALTER[name](run.folder/name)
    command = run.manifest['command']
    readers = (Record, located, lambda f: Run.start('reward', {}, {'sft': f}), lambda f: Run.start('sft', {}),
               lambda f: export(f, home/'out'), lambda f: export(f/'model', home/'out'))
    for read in readers:
        with pytest.raises(ValueError) as e: read(run.folder)
        assert name in str(e.value) and str(run.folder) in str(e.value) and command in str(e.value) and '\n' not in str(e.value)
    capsys.readouterr(); assert commands.main(['verify']) == 1
    said = capsys.readouterr()
    assert str(run.folder) in said.out and name in said.out and '1 faults' in said.err
    shutil.rmtree(run.folder); assert made().folder == run.folder and commands.main(['verify']) == 0         # what it says to do


def test_what_is_beside_a_run_alters_nothing():
    run = made()
    for name in ('notebook.ipynb', 'annotated.jsonl', '.DS_Store', 'model/.cache/x'):
        (run.folder/name).parent.mkdir(exist_ok=True); (run.folder/name).write_text('1')
    assert Record(run.folder).summary == {'loss': 2.} and verify([run.id])[0] == []


def test_a_child_is_named_by_what_its_parents_hold(tmp_path, monkeypatch):
    "The same run made twice has the same children, wherever it lies; one with other weights has others."
    child = lambda run: Run.start('reward', {}, {'sft': run.folder}).id
    first = made(); one = child(first)
    again = {}
    for k, loss in enumerate((2., 3.)):
        monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/f'runs{k}')); other = made(loss=loss)
        assert other.id == first.id and read_json(other.folder/'files.json')['files'] != read_json(first.folder/'files.json')['files']
        again[loss] = other.content, child(other)
    assert again[2.] == (first.content, one) and again[3.][0] != first.content and again[3.][1] != one


def test_a_parent_that_was_made_again_is_not_that_of_an_old_child(capsys):
    run = made(); child = made('reward', parents={'sft': run.folder})
    shutil.rmtree(run.folder); made(loss=3.)
    assert commands.main(['verify', child.id]) == 1 and 'is not the one any more that it was made from' in capsys.readouterr().out
    shutil.rmtree(run.folder)
    assert commands.main(['verify']) == 1 and 'is gone' in capsys.readouterr().out


def test_a_cut_line_of_a_finished_run_is_an_error():
    run = made(); path = run.folder/'metrics.jsonl'; path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match='line 2 of .*metrics.jsonl is damaged'): Record(run.folder, check=False).metrics()


@pytest.mark.parametrize('finish', [True, False])
def test_a_link_in_place_of_a_run_is_refused(finish):
    run = Run.start('sft', {})
    if finish: run.finish({})
    run.close(); run.folder.rename(moved := run.folder.with_name('moved')); run.folder.symlink_to(moved)
    reads = [lambda: Run.start('sft', {}), lambda: Record(run.folder)]
    if finish: reads += [lambda: Run.start('cost', {}, {'sft': run.folder}), lambda: located(run.folder)]
    for read in reads:
        with pytest.raises(ValueError, match='is a symbolic link where the folder of a run belongs: remove the link'): read()
    assert any('symbolic link' in f for f in verify()[0])


# checkpoints

def test_a_checkpoint_of_another_run_is_refused():
    state = dict(best={'x': 1})
    def stopped(lr):
        run = Run.start('sft', dict(lr=lr))
        with run.saver(state) as save: save(0, True)
        run.cached('answers', lambda: [lr]); run.close()
        return run
    one, two = stopped(1e-3), stopped(2e-3)
    for name in ('.', 'answers'):
        here, there = two.folder/'checkpoint'/name, one.folder/'checkpoint'/name
        kept = here/'step-00000000'; kept.rename(here/'kept'); shutil.copytree(there/'step-00000000', kept)
        again = two.saver(state).restore if name == '.' else lambda: two.cached('answers', dict)
        for read in (lambda here=here: newest(here), again):
            with pytest.raises(ValueError) as e: read()
            assert one.id in str(e.value) and two.id in str(e.value) and 'delete it and run' in str(e.value) and '\n' not in str(e.value)
        if name == '.':
            with pytest.raises(ValueError, match='is a checkpoint of'): Run.start('sft', dict(lr=2e-3))
            assert any('is a checkpoint of' in f for f in verify()[0])
        shutil.rmtree(kept); (here/'kept').rename(kept)
    again = Run.start('sft', dict(lr=2e-3))
    with again.saver(state) as save: assert save.restore() == 1 and again.cached('answers', dict) == [2e-3]


def test_a_checkpoint_outside_a_run_needs_no_name(tmp_path):
    with Saver(tmp_path/'c', dict(best={'x': 1})) as save: save(0, True); assert save.restore() == 1
    assert read_json(save_checkpoint(tmp_path/'d', 1, {'a': Path.touch})/'manifest.json')['run'] == ''


# the ledger

def stage(name, seed=0, profile='smoke', key='k', **loss):
    "A stage's run without its notebook, in the ledger."
    s = find(name, profile); seed = seed if s.seed is None else s.seed
    parents = {role: folder_of(p, profile, k) for role, (p, k) in reads(s, seed).items()}
    kind = stage_of(s.template, s.overrides)
    config = configure(kind, profile, s.overrides, s.round)[0]
    run = made(kind, config, parents, seed=seed, profile=profile, name=f'{profile}-{s.round}', **loss)
    ledger._note(profile, seed, name, dict(folder=run.id, key=key, overrides={}))
    return run


@pytest.fixture
def noted(monkeypatch):
    "Runs that note their round, as the templates do."
    finish = Run.finish
    def with_round(run, summary):
        if not run.done: run.note(round=ROUND[0])
        finish(run, summary)
    monkeypatch.setattr(Run, 'finish', with_round)


ROUND = [None]


def chain(*names):
    for name in names: ROUND[0] = find(name, 'smoke').round; stage(name)


COMMON = 'base_lm', 'gold', 'sft', 'collect-1', 'reward-1', 'cost-1', 'policy-1'


def test_the_ledger_points_to_runs_of_its_stages(noted, capsys):
    chain(*COMMON, 'reward-only', 'collect-2')
    assert verify()[0] == [] and folder_of('policy-1', 'smoke', 0).parent.name == 'policy'
    path, book = ledger._ledger_file('smoke', 0), entries('smoke', 0)
    cases = (('policy-1', 'reward-only', 'its stage is reward-only, not policy'), ('collect-1', 'collect-2', 'its round is 2, not 1'),
             ('cost-1', 'reward-1', 'its stage is reward, not cost'))
    for name, other, said in cases:
        path.write_text(json.dumps(book | {name: book[other]}))
        child = {'policy-1': 'collect-2', 'collect-1': 'policy-1', 'cost-1': 'policy-1'}[name]
        for read in (lambda name=name: folder_of(name, 'smoke', 0), lambda child=child: run_stage(find(child, 'smoke'), 'smoke', 0)):
            with pytest.raises(ValueError) as e: read()
            assert str(path) in str(e.value) and said in str(e.value) and f'saferlhf run {name} --profile smoke --seed 0' in str(e.value)
        assert any(said in f for f in verify()[0])
    ROUND[0] = 1; other = made('policy', dict(lr=9.), seed=0, profile='smoke')
    path.write_text(json.dumps(book | {'policy-1': dict(folder=other.id, key='k')}))
    with pytest.raises(ValueError, match='policy/smoke-.* is no run of policy-1'): folder_of('policy-1', 'smoke', 0)
    path.write_text(json.dumps(book | {'policy-1': dict(folder=made('policy', seed=3, profile='smoke').id, key='k')}))
    with pytest.raises(ValueError, match='its seed is 3, not 0'): folder_of('policy-1', 'smoke', 0)
    path.write_text(json.dumps(book | {'policy-1': book['policy-1'] | dict(stage='threshold-m1')}))
    with pytest.raises(ValueError, match='entry for policy-1 is wrong, it is the entry of threshold-m1'): folder_of('policy-1', 'smoke', 0)


@pytest.mark.parametrize('text', ['', '[]', '{"sft": []}', '{"sft": {"folder": 3, "key": "k"}}', '<<<<<<< HEAD\n{}', 'null'])
def test_a_damaged_ledger_is_named(home, text, capsys):
    (home/'runs').mkdir(); (path := ledger._ledger_file('smoke', 0)).write_text(text)
    for read in (lambda: folder_of('sft', 'smoke', 0), lambda: run_stage(find('base_lm', 'smoke'), 'smoke', 0)):
        with pytest.raises(ValueError, match='is damaged .*: delete it') as e: read()
        assert str(path) in str(e.value) and '\n' not in str(e.value)
    assert commands.main(['verify']) == 1 and str(path) in capsys.readouterr().out


def test_a_copied_or_moved_runs_folder_works(home, noted, monkeypatch, capsys):
    chain(*COMMON)
    shutil.copytree(home/'runs/policy', home/'elsewhere/policy'); far = next((home/'elsewhere/policy').iterdir())
    child = made('mine', parents={'policy': far})
    for move in (shutil.copytree, shutil.move):
        new = home/f'there-{move.__name__}/runs'; new.parent.mkdir(); move(str(home/'runs'), str(new))
        monkeypatch.setenv('SAFERLHF_RUNS', str(new))
        folder = folder_of('policy-1', 'smoke', 0); assert folder.is_relative_to(new)
        parents = Record(folder).manifest['parent_folders'].values()
        assert {*map(Path, parents)} == {folder_of(p, 'smoke', 0) for p in find('policy-1', 'smoke').parents.values()}
        assert Record(new/child.id).manifest['parent_folders'] == dict(policy=str(far))                         # outside: as it was
        assert commands.main(['verify']) == commands.main(['status']) == 0 and 'done' in capsys.readouterr().out
        chain('reward-only')                                                                                   # a next stage
    raw = [p for f in new.glob('*/*/manifest.json') for p in json.loads(f.read_text())['parent_folders'].values()]
    raw += [e['folder'] for e in json.loads((new/'ledger-smoke-0.json').read_text()).values()]
    assert [p for p in raw if Path(p).is_absolute()] == [str(far)]


def test_a_stage_whose_notebook_leaves_no_run_is_refused(monkeypatch):
    unfinished = Run.start('base_lm', {}, name='half'); unfinished.close()
    for gave in (None, unfinished.folder):
        monkeypatch.setattr(ledger, 'execute', lambda *a, gave=gave: gave)
        with pytest.raises(RuntimeError, match='base_lm: its notebook ended without a finished run, see .*base_lm.ipynb'):
            run_stage(find('base_lm', 'smoke'), 'smoke', 0)
        assert entries('smoke', 0) == {}


def test_each_process_has_a_note_of_its_own(home, monkeypatch):
    "A second start beside the same notebook, and what a killed one left, change nothing."
    seen = []
    def run_it(path, out, parameters, progress, kernel):
        note = Path(seen[-1]['SAFERLHF_NOTE']); assert note.parent == out.parent and str(os.getpid()) in note.name
        Path(f'{out}.run').write_text('["/other", true]'); (out.parent/f'.{out.name}.1.run').unlink(missing_ok=True)
        with pytest.raises(RuntimeError, match='another run holds'): execute(home/'t.ipynb', out, {}, km=1)
        note.write_text(json.dumps([str(home/'mine'), True])); return []
    monkeypatch.setattr('saferlhf.record.execute._check_parameters', lambda *a: None)
    monkeypatch.setattr('saferlhf.record.execute._freshen', lambda km, env: seen.append(env))
    monkeypatch.setattr('saferlhf.record.execute._pass_through', run_it)
    left = home/'.o.ipynb.1.run'; left.write_text('["/killed", false]')
    assert execute(home/'t.ipynb', home/'o.ipynb', {}, km=1) == home/'mine' and not left.exists()
    assert not list(home.glob('.o.ipynb.*.run')) and len(seen) == 1


def test_a_second_command_is_refused_before_anything(home, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, 'warm_kernel', lambda: pytest.fail('a kernel was started'))
    monkeypatch.setattr(pipeline, 'run_stage', lambda *a, **k: pytest.fail('a stage was run'))
    monkeypatch.setattr(pipeline, 'publish_all', lambda *a, **k: pytest.fail('it was published'))
    with lock(home/'runs', 'reproduce-smoke-0'):
        before = {p: p.stat().st_mtime_ns for p in home.rglob('*')}
        for argv in (['reproduce'], ['reproduce', '--jobs', '2'], ['run', 'sft']):
            assert commands.main([*argv, '--profile', 'smoke']) == 1
            said = capsys.readouterr(); assert said.err.count('\n') == 1 and 'another run holds' in said.err and not said.out
        assert {p: p.stat().st_mtime_ns for p in home.rglob('*')} == before


# publishing

@pytest.fixture
def tables(monkeypatch):
    "A reproduction of seven stages, whose tables are their losses."
    monkeypatch.setattr(results, 'graph', lambda profile: [find(n, profile) for n in COMMON])
    rows = lambda runs: [('times', r, [dict(stage=n, seconds=r.summary['loss'])]) for n, r in runs.items()] + [
        ('samples', r, [dict(policy=n, text='x')]) for n, r in runs.items()]
    monkeypatch.setattr(results, '_model_tables', rows); monkeypatch.setattr(results, '_evaluation_tables', lambda runs: [])
    monkeypatch.setattr(results, '_round_tables', lambda runs, seed: [])


def test_what_is_published_belongs_together(home, noted, tables, capsys):
    chain(*COMMON[:-1])
    with pytest.raises(FileNotFoundError, match='policy-1 has not been run .*: saferlhf run policy-1'): results.publish_all('smoke', 0)
    assert not list((home/'data/results').rglob('*.csv'))
    chain('policy-1')
    earlier = [dict(seed=s, policy='earlier', text='y') for s in (0, 1)]
    publish(earlier, home/'data/results/smoke/samples.csv', 'sft/old-0123456789ab', ['policy'])
    results.publish_all('smoke', 0)
    table = pd.read_csv(home/'data/results/smoke/samples.csv')
    assert table[table.seed == 0].policy.tolist() == sorted(COMMON) and table[table.seed == 1].policy.tolist() == ['earlier']
    run = Record(folder_of('sft', 'smoke', 0)); before = (home/'data/results/smoke/times.csv').read_bytes()
    shutil.rmtree(run.folder); ROUND[0] = None; stage('sft', loss=3.)                            # made again, with another end
    with pytest.raises(ValueError, match=f'collect-1, .* was not made from {run.id}, its sft by now: saferlhf run collect-1'):
        results.publish_all('smoke', 0)
    assert (home/'data/results/smoke/times.csv').read_bytes() == before
    results.publish_all('smoke', 0, part=True)
    assert 'not published: collect-1' in capsys.readouterr().out
    times = pd.read_csv(home/'data/results/smoke/times.csv').set_index('stage').seconds
    assert times['sft'] == 3. and times['collect-1'] == 2.
    (run.folder/'summary.json').write_text('{"loss": 4.0}')
    with pytest.raises(ValueError, match='summary.json was changed'): results.publish_all('smoke', 0)


def test_half_published_tables_are_not_drawn(home, noted, tables, monkeypatch, capsys):
    chain(*COMMON)
    put, calls = results._put, []
    def broken(*a):
        calls.append(a)
        if len(calls) == 3: raise KeyboardInterrupt
        put(*a)
    with monkeypatch.context() as m:
        m.setattr(results, '_put', broken)
        with pytest.raises(KeyboardInterrupt): results.publish_all('smoke', 0)
    monkeypatch.setattr(pipeline, 'execute', lambda *a, **k: pytest.fail('it was drawn'))
    with pytest.raises(RuntimeError, match='were not published to the end .*: run the command that published'): pipeline.draw('smoke', 0)
    assert any('not published to the end' in f for f in verify()[0])
    results.publish_all('smoke', 0)
    with pytest.raises(pytest.fail.Exception): pipeline.draw('smoke', 0)
    assert verify()[0] == []


TABLES = {b'': 'it is empty', b'seed,a,run_id\n<<<<<<< HEAD\n0,1,x\n': 'line 2 is left over from a merge',
          b'seed,a,run_id\n0,1\n': 'line 2: 2 cells, not 3', b'seed,a,run_id\n=======\n0,1,x\n': 'left over', b'\xff\xfe': 'is damaged'}


@pytest.mark.parametrize('content', TABLES)
def test_a_damaged_table_is_named(home, content, capsys):
    path = home/'data/results/smoke/t.csv'; path.parent.mkdir(); path.write_bytes(content)
    for read in (lambda: whole_table(path), lambda: publish([dict(seed=0, a=1)], path, 'x', ['a']), lambda: pipeline.draw('smoke', 0),
                 lambda: Results('smoke', 0).read('t')):
        with pytest.raises(ValueError) as e: read()
        assert str(path) in str(e.value) and TABLES[content] in str(e.value) and '\n' not in str(e.value)
    assert path.read_bytes() == content                                                                     # it was left alone
    assert commands.main(['verify']) == 1 and str(path) in capsys.readouterr().out


def test_texts_of_every_kind_fit_into_a_table(home):
    texts = ['a\u2028b', 'a\x0cb\x85', 'a\rb', 'a\nb', '"a",b', '<<<<<<< a', '']
    path = publish([dict(seed=0, k=k, text=t) for k, t in enumerate(texts)], home/'t.csv', 'x', ['k'])
    back = pd.read_csv(whole_table(path), keep_default_na=False)
    assert back.text.tolist() == [t.replace('\r', '\n') for t in texts]


def test_runs_of_tables_are_known(home, capsys):
    run = made(); path = home/'data/results/smoke/t.csv'
    publish([dict(seed=0, a=1)], path, run.id, ['a']); publish([dict(seed=1, a=1)], path, 'sft/far-0123456789ab', ['a'])
    assert commands.main(['verify']) == 1 and 'sft/far-0123456789ab' in capsys.readouterr().out
    (home/'data/results/runs.csv').write_text('run_id,parents\nsft/far-0123456789ab,none\n')
    assert commands.main(['verify']) == 0 and '1 runs' in capsys.readouterr().out
    (home/'data/results/runs.csv').write_text('run_id,parents\nsft/far-0123456789ab,base=base_lm/gone-0123456789ab\n')
    assert commands.main(['verify']) == 1 and 'base_lm/gone' in capsys.readouterr().out


def test_one_bad_manifest_does_not_hide_the_others(home, capsys):
    good = made()
    bad = '', '[]', '{"format": 3}', '{"format": 3, "parent_folders": []}', '{"format": 3, "seed": 0, "stage": 1, "starts": 3}', 'null'
    for k, text in enumerate(bad):
        run = Run.start('cost', {}, seed=k); run.close(); (run.folder/'manifest.json').write_text(text)
    empty = Run.start('judge', {}); empty.close(); (empty.folder/'config.json').write_text('')
    capsys.readouterr(); assert commands.main(['status']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and sum(str(good.id) in x and 'done' in x for x in lines) == 1
    assert sum('damaged' in x for x in lines) >= 6 and commands.main(['verify']) == 1
    assert len(capsys.readouterr().out.splitlines()) >= 6


def test_a_finished_run_without_its_manifest_is_not_begun_again():
    run = made(); (run.folder/'manifest.json').unlink()
    with pytest.raises(FileNotFoundError, match=r'is not a run folder any more: delete it and run its command again'): Run.start('sft', {})
    assert not (run.folder/'manifest.json').exists()


def test_what_a_kill_left_half_written_is_swept_up():
    run = Run.start('sft', {}); run.close(); (left := run.folder/'.manifest.json.7.aside').write_text('{')
    Run.start('sft', {}).close(); assert not left.exists() and (run.folder/'manifest.json').exists()


def test_a_folder_is_let_go_when_its_start_fails():
    run = Run.start('sft', {}); save_checkpoint(run.folder/'checkpoint', 0, {'a': Path.touch}); run.close()
    manifest = run.folder/'checkpoint/step-00000000/manifest.json'
    manifest.write_text(manifest.read_text().replace(run.id, 'sft/other-0123456789ab'))
    with pytest.raises(ValueError, match='is a checkpoint of sft/other'): Run.start('sft', {})
    code = "from saferlhf.record.run import Run; Run.start('sft', {})"
    other = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'is a checkpoint of' in other.stderr and 'another run holds' not in other.stderr


# --- what an adversary found

UNLIKE = {'config.json': ('config.json', lambda p: p.write_text('{"lr": 9}')),
          'seed': ('seed in manifest.json', lambda p: told(p, seed=5)),
          'sources': ('sources in manifest.json', lambda p: told(p, sources={})),
          'rows': ('data/train.jsonl', lambda p: p.write_text('{"a": "EVIL"}\n')),
          'data': ('data of data/train.jsonl in manifest.json', lambda p: told(p, data={'data/train.jsonl': 'ab'})),
          'parent': ('the folder of its base in manifest.json', lambda p: told(p, parent_folders={'base': p.parent.parents[1].name}))}


def told(path, **facts): path.write_text(json.dumps(json.loads(path.read_text()) | facts))


@pytest.mark.parametrize('kind', UNLIKE)
def test_an_unfinished_run_that_was_altered_does_not_go_on(home, kind):
    base, other = made('base_lm'), made('base_lm', seed=1, loss=3.)
    (home/'rows').write_text('{"a": "good"}\n')
    from saferlhf.data import sha256
    how = dict(stage='sft', config={'lr': 1}, parents={'base': base.folder}, data={'data/train.jsonl': sha256(home/'rows')})
    run = Run.start(**how); run.path('data').mkdir(); shutil.copy(home/'rows', run.path('data/train.jsonl'))
    run.data(hashes={'labels.jsonl.xz': 'noted later'}); run.note(round=2); run.close()
    assert Run.start(**how).folder == run.folder; Run.start(**how).close()       # what grows does not count
    said, alter = UNLIKE[kind]
    path = run.folder/(said if '.json' in said and ' ' not in said else 'manifest.json')
    if kind == 'parent': told(path, parent_folders={'base': str(other.folder.relative_to(home/'runs'))})
    else: alter(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match='is not as it was when the run began; delete this folder') as e: Run.start(**how)
    assert f'{run.folder}: {said} is not' in str(e.value) and path.read_bytes() == before
    shutil.rmtree(run.folder); Run.start(**how).close()                          # what it says to do works


def test_a_forged_seal_and_a_missing_DONE_are_seen(home):
    "Weights and their hash are changed together; the content, by which children know their parent, cannot stay."
    run = made(); weights = run.folder/'model/model.safetensors'
    weights.write_bytes(b'other'); from saferlhf.data import sha256
    seal = read_json(run.folder/'files.json'); seal['files']['model/model.safetensors'] = sha256(weights)
    (run.folder/'files.json').write_text(json.dumps(seal))
    (run.folder/'DONE').write_text(f'now {sha256(run.folder/"files.json")}')
    faults, _ = verify(); assert len(faults) == 1 and 'files.json was changed' in faults[0]
    with pytest.raises(ValueError, match='files.json was changed'): Record(run.folder)
    (run.folder/'DONE').unlink()
    faults, _ = verify(); assert len(faults) == 1 and 'DONE was removed' in faults[0] and str(run.folder) in faults[0]
    (run.folder/'DONE').write_bytes(b'\xff\xfe'); assert 'files.json was changed' in verify()[0][0]
    (run.folder/'files.json').write_text('{"files": []}'); (run.folder/'DONE').write_text(sha256(run.folder/'files.json'))
    assert 'files.json was changed' in verify()[0][0]


def test_files_that_are_none_of_ours_do_not_end_verify(home, capsys):
    run = made(); (home/'runs/ledger-cpu-0-backup.json').write_text('{}'); (home/'runs/ledger-cpu-0 (copy).json').write_text('{}')
    (home/'data/results/runs.csv').write_text('run_id\nsft/a\n')
    broken = home/'runs/sft/pipe-1'; broken.mkdir(); os.mkfifo(broken/'manifest.json'); (broken/'config.json').write_text('{}')
    capsys.readouterr(); assert commands.main(['verify']) == 1
    said = capsys.readouterr(); lines = said.out.splitlines()
    assert len(lines) == 4 and sum('is none of a ledger' in x for x in lines) == 2 and '4 faults' in said.err
    assert any('runs.csv: it has no column parents' in x for x in lines) and any('pipe-1' in x and 'no ordinary file' in x for x in lines)
    assert commands.main(['status']) == 0 and 'no ordinary file' in (said := capsys.readouterr().out) and run.folder.name in said


@pytest.mark.parametrize('text, said', [('[1]\n', 'line 1 of .*metrics.jsonl is damaged .no object'),
                                        ('5\n{"step": 0}\n', 'line 1 of .*metrics.jsonl'),
                                        ('[' * 100_000 + '\n', 'line 1 of .*metrics.jsonl')])
def test_strange_metrics_are_named(text, said):
    run = Run.start('sft', {}); run.close(); run.path('metrics.jsonl').write_text(text)
    with pytest.raises(ValueError, match=said) as e: Run.start('sft', {})
    assert len(str(e.value).splitlines()) == 1


def test_names_of_strangers_do_not_steer_the_terminal(home, capsys):
    run = made(); told(run.folder/'manifest.json', seconds='\x1b[31mred\u202e', command='\x1b]0;x\x07rm')
    odd = home/'runs/sft/ni\x1b[31m\u202ece-1'; odd.mkdir(); (odd/'manifest.json').write_text('{}')
    for command in ('status', 'verify'):
        commands.main([command]); out = ''.join(capsys.readouterr())
        assert 'ni[31mce' in out and not {'\x1b', '\x07', '\u202e'} & {*out}, command
