"The whole reproduction at its smallest size, by the command that users type; nothing in the checkout changes."
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from huggingface_hub import ModelCard
from project import COLUMNS, ROOT, cells, notebooks

from saferlhf.record.fetch import model_hash
from saferlhf.reproduction.graph import graph

STAGES = {s.name: s for s in graph('smoke')}


class Smoke:
    "A folder for runs and one for results; `call` types a command there."
    def __init__(self, folder):
        self.folder, self.runs, self.home = folder, folder/'runs', folder/'home'
        self.home.mkdir(); self.said, self.seconds = '', 0.

    def call(self, *arguments):
        env = os.environ | dict(SAFERLHF_RUNS=str(self.runs), SAFERLHF_HOME=str(self.home))
        start = time.time()
        run = subprocess.run([Path(sys.executable).parent/'saferlhf', *arguments], cwd=self.folder, env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
        self.said, self.seconds = run.stdout, time.time() - start
        return self

    def ran(self):
        "Stages of the last call that were not done before."
        lines = [line.split(']', 1)[1].split() for line in self.said.splitlines() if line.startswith('[')]
        assert {line[0] for line in lines} == set(STAGES)
        return {line[0] for line in lines if line[1:3] != ['done', 'before']}

    def folders(self):
        "Stage -> its run's folder."
        book = json.loads((self.runs/'ledger-smoke-0.json').read_text())
        return {name: self.runs/entry['folder'] for name, entry in book.items()}

    def parents(self, name):
        "Role -> folder of what a stage was made from."
        told = json.loads((self.folders()[name]/'manifest.json').read_text())['parent_folders']
        return {role: str(self.runs/p) for role, p in told.items()}

    def results(self, name): return self.home/'data/results/smoke'/f'{name}.csv'

    def bytes(self): return {p.name: p.read_bytes() for p in self.results('x').parent.glob('*.csv')}


def errors(path):
    "Error outputs of an executed notebook."
    return [o for c in nbformat.read(path, 4).cells for o in c.get('outputs', []) if o['output_type'] == 'error']


def shipped():
    "What a run in another home must leave alone."
    return {p: p.stat().st_mtime_ns for f in ('data', 'figures') for p in (ROOT/f).rglob('*') if p.is_file()}


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    before = shipped()
    out = Smoke(tmp_path_factory.mktemp('smoke')).call('reproduce', '--profile', 'smoke')
    assert out.ran() == set(STAGES) and shipped() == before
    return out


def test_every_stage_is_done_and_keeps_its_record(smoke):
    folders = smoke.folders()
    assert set(folders) == set(STAGES) and len(set(folders.values())) == len(STAGES)
    for name, folder in folders.items():
        for file in ('DONE', 'config.json', 'manifest.json', 'summary.json', 'notebook.ipynb'): assert (folder/file).exists(), (name, file)
        manifest = json.loads((folder/'manifest.json').read_text())
        assert not any(Path(p).is_absolute() for p in manifest['parent_folders'].values())
        assert {*map(Path, smoke.parents(name).values())} == {folders[p] for p in STAGES[name].parents.values()}
        assert not errors(folder/'notebook.ipynb')
    for r in (2, 3): assert f'policy-{r - 1}' in json.loads((folders[f'policy-{r}']/'manifest.json').read_text())['parents']     # a chain


@pytest.mark.parametrize('name', COLUMNS)
def test_results_have_the_columns_and_name_their_runs(smoke, name):
    table = pd.read_csv(smoke.results(name))
    assert len(table) and set(COLUMNS[name].split()) | {'run_id', 'seed'} <= set(table.columns)
    ids = {f'{f.parent.name}/{f.name}' for f in smoke.folders().values()}
    assert set(table.run_id) <= ids and set(table.seed) == {0}


def test_results_hold_every_round_policy_and_judge(smoke):
    read = lambda name: pd.read_csv(smoke.results(name), dtype={'round': str})
    assert set(read('table1')['round']) == {'1', '2', '3', 'unified'}
    assert set(read('models').policy) == {'initial', 'round-1', 'round-2', 'round-3', 'reward-only'}
    assert {'gold', 'unified', 'judge', 'tfidf'} <= set(read('models').judge)
    assert set(read('lagrange')['round']) == set(read('rounds')['round']) == {'1', '2', '3'}
    assert set(read('times').stage) == set(STAGES)


def test_every_model_has_a_card_with_the_numbers_of_its_run(smoke):
    "Base, hashes, unit and sign; each accuracy and its interval as in the run's summary."
    folders, read = smoke.folders(), lambda f, name: json.loads((f/name).read_text())
    kept = {n: f for n, f in folders.items() if (f/'model').exists()}
    assert set(kept) == {n for n in STAGES if STAGES[n].template in ('base_lm', 'gold', 'sft', 'score_model', 'policy')}
    base = model_hash(folders['base_lm']/'model')
    for name, folder in kept.items():
        card, manifest, summary = ModelCard.load(folder/'model/README.md'), read(folder, 'manifest.json'), read(folder, 'summary.json')
        head, text = card.data.to_dict(), card.text
        assert head['license'] == 'cc-by-nc-4.0' and manifest['stage'] in head['tags'] and head['datasets'], name
        assert name == 'base_lm' or base in text and head['saferlhf_base']['sha256'] == base, name
        before = {'reward-only': 'sft', 'policy-1': 'sft', 'policy-2': 'policy-1', 'policy-3': 'policy-2'}.get(name, '')
        assert not before or model_hash(folders[before]/'model') in text, name
        assert manifest['data']['sft.jsonl.xz'] in text and 'USER: {prompt} ASSISTANT:' in text and 'Nothing yet' not in text
        for r in summary.get('table1', ()):
            assert '| {value:.4g} | {low:.4g} to {high:.4g} | {label_source} | {n} |'.format(**r) in text, (name, r)
        score = STAGES[name].template in ('gold', 'score_model')
        assert ('unit: the standard deviation' in text) == score, name
        assert ('> 0 means harmful' in text) == (score and not name.startswith('reward')), name
    first = (folders['cost-1']/'model/README.md').read_text()
    assert 'rule: TF-IDF' in first and 'rule: longer answer' in first and f'{read(folders["judge"], "summary.json")["accuracy"]:.4g}' in (
        folders['judge']/'model/README.md').read_text()


def test_paper_notebooks_ran_on_these_results(smoke):
    figures = json.loads((smoke.home/'figures/smoke/index.json').read_text())
    for path in notebooks('paper'):
        assert not errors(smoke.runs/'notebooks'/f'smoke-0-paper-{path.name}')
        if any('results.save(' in c['source'] for c in cells(path)) and path.stem != 'ablations':   # some have tables only
            assert f'nbs/paper/{path.name}' in {f['notebook'] for f in figures.values()}
    outputs = [o for c in nbformat.read(smoke.runs/'notebooks/smoke-0-paper-ablations.ipynb', 4).cells for o in c.get('outputs', [])]
    assert any('not run: `saferlhf arms`' in str(o) for o in outputs) and 'ablations' not in figures  # `reproduce` runs no arms
    for name in figures: assert all((smoke.home/'figures/smoke'/f'{name}.{end}').exists() for end in ('png', 'pdf'))


def test_a_second_call_makes_only_what_is_lost(smoke):
    before, folders, first = smoke.bytes(), smoke.folders(), smoke.seconds
    stamps = {n: (f/'DONE').stat().st_mtime_ns for n, f in folders.items()}
    (folders['judge']/'DONE').unlink()
    assert smoke.call('reproduce', '--profile', 'smoke').ran() == {'judge'}   # same numbers, same place: its child stands
    assert smoke.folders() == folders and smoke.seconds < first / 2
    assert {n for n, f in folders.items() if (f/'DONE').stat().st_mtime_ns != stamps[n]} == {'judge'}
    drop = lambda files: {n: b for n, b in files.items() if n != 'times.csv'}
    assert drop(smoke.bytes()) == drop(before)


def test_a_changed_stage_changes_its_children(smoke):
    before = smoke.folders()
    smoke.call('run', 'cost-3', '--profile', 'smoke', '--set', 'epochs=0.5')
    after = smoke.folders()
    assert {n for n in after if after[n] != before[n]} == {'cost-3'}
    smoke.call('run', 'policy-3', '--profile', 'smoke')
    assert smoke.folders()['policy-3'] != before['policy-3']


def test_list_and_status(smoke):
    listed = smoke.call('list', '--profile', 'smoke').said
    assert [line.split()[0] for line in listed.splitlines()] == list(STAGES)
    said = smoke.call('status').said
    assert 'unfinished' not in said and all(f'{f.parent.name}/{f.name}' in said for f in smoke.folders().values())


# --- every stage, interrupted: the smoke reproduction above is the run that was left alone

def interrupted(monkeypatch, parents, name, at):
    "A stage's cells in this process: a SIGTERM comes with the at-th line or piece; then the cells once more. What the second start said."
    import contextlib
    import io
    import signal
    from faults.drive import execute
    from saferlhf.record import run as records
    from saferlhf.record.resume import Interrupted
    stage = STAGES[name]
    told = dict(profile='smoke', seed=0, overrides=stage.overrides)
    if stage.template not in ('base_lm', 'two_token'): told['parents'] = parents
    if stage.round is not None: told['round'] = stage.round
    count, append, piece = [0], records.Run._append, records.cached
    def tick():
        count[0] += 1
        if count[0] == at: os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as m:
        m.setattr(records.Run, '_append', lambda run, name, rows: (append(run, name, rows), name == 'metrics.jsonl' and tick()))
        m.setattr(records, 'cached', lambda folder, make, again: piece(folder, lambda: (make(), tick())[0], again))
        with pytest.raises(Interrupted, match='is saved; to go on'): execute(stage.template, told)
    with contextlib.redirect_stdout(io.StringIO()) as said: run = execute(stage.template, told)
    return run.folder, said.getvalue()


@pytest.mark.parametrize('name, at', [('base_lm', 2), ('gold', 4), ('sft', 2), ('reward-1', 1), ('cost-2', 2), ('policy-2', 2),
                                      ('collect-2', 3), ('evaluate', 7), ('two_token', 2)])
def test_an_interrupted_stage_goes_on_bit_for_bit(smoke, monkeypatch, tmp_path, name, at):
    from faults.suite import content
    monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path)); monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('SAFERLHF_HOME', str(smoke.home))
    whole = smoke.folders()[name]
    folder, said = interrupted(monkeypatch, smoke.parents(name), name, at)
    assert folder.name == whole.name and content(folder) == content(whole)
    assert f'goes on after step {at - 1}' in said or said.count('done before the interruption') == at


def test_two_ranks_make_the_same_run(smoke, monkeypatch, tmp_path):
    "The template of a policy, with its models in shards on two ranks: same name, same numbers, read back by the same cells."
    import torch
    from faults.drive import execute
    from saferlhf.hardware.precision import fast_precision
    # in 32 bits on every machine: how far 16 bits round apart depends on the processor
    (tmp_path/'sitecustomize.py').write_text("""import torch
for name in dir(torch.cpu):
    if name.endswith('_supported'): setattr(torch.cpu, name, lambda *a: False)""")
    for name in dir(torch.cpu):
        if name.endswith('_supported'): monkeypatch.setattr(torch.cpu, name, lambda *a: False)
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, [str(tmp_path), os.environ.get('PYTHONPATH')])))
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('SAFERLHF_HOME', str(smoke.home))
    assert fast_precision() == 'fp32'
    parents = smoke.parents('policy-1')
    def made(ranks, spread):
        monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/ranks)); monkeypatch.setenv('SAFERLHF_SPREAD', spread)
        return execute('policy', dict(profile='smoke', seed=0, round=1, parents=parents, overrides=STAGES['policy-1'].overrides))
    whole, run = made('one', ''), made('two', '{"gpus": 2, "zero": 3}')
    assert run.folder.name == whole.folder.name and run.done and run.manifest['spread']['gpus'] == 2
    assert (run.folder/'model/tokenizer.json').exists()
    one, two = (pd.read_json(r.folder/'metrics.jsonl', lines=True).drop(columns='seconds') for r in (whole, run))
    assert list(one.columns) == list(two.columns) and len(one) == len(two)
    far = (one - two).abs() / (1 + one.abs())
    assert far.max(axis=None) < 1e-4, far.max()


def test_a_sample_of_the_fault_suite(smoke, tmp_path):
    "A kill inside a save, and a bit turned in the newest checkpoint: `make faults` has all of them."
    from faults.suite import Lab, Table, damage_one, kill_one
    lab, table = Lab(tmp_path, smoke.runs), Table('sample', tmp_path)
    kill_one(lab, table, 'sft', 'torch', 0, 'write-half')
    damage_one(lab, table, 'sft', 'torch', 'flipped', 0)
    assert [r['outcome'] for r in table.rows] == ['identical', 'reported, identical']
    assert all(r['lost'] == 1 for r in table.rows)


def test_arms_run_and_are_published(smoke):
    "Other limits in one round, and three rounds with stricter ones: `saferlhf arms thresholds strict`, of one seed."
    one = 'from saferlhf.reproduction import graph as graphs; from saferlhf.apps import commands; graphs.SEEDS["strict"] = (0,); '
    command = one + 'raise SystemExit(commands.main(["arms", "thresholds", "strict", "--profile", "smoke", "--jobs", "2"]))'
    env = os.environ | dict(SAFERLHF_RUNS=str(smoke.runs), SAFERLHF_HOME=str(smoke.home))
    run = subprocess.run([sys.executable, '-c', command], cwd=smoke.folder, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    wanted = {'threshold-0.5': .5, 'threshold-m0.15': -3 / 20.1, 'threshold-m0.5': -.5, 'threshold-m1': -1.,
              'strict-1': -.5, 'strict-2': -1., 'strict-3': -1.3}
    arms, curves = (pd.read_csv(smoke.results(n)) for n in ('arms', 'threshold_curves'))
    for table in (arms, curves): assert table.groupby('arm').threshold.unique().map(list).to_dict() == {
        a: [pytest.approx(t, rel=1e-5)] for a, t in wanted.items()}
    assert {'gold', 'judge', 'tfidf'} <= set(arms.judge) and arms[arms.decoding == 'sampled'].refused.notna().all()
    again, first = (curves[curves.arm == a].drop(columns=['arm', 'run_id']).reset_index(drop=True) for a in ('strict-1', 'threshold-m0.5'))
    assert len(first) and again.equals(first)                                               # the same round, run twice
    folders, reads = smoke.folders(), smoke.parents('policy-3-strict')
    assert {k: Path(v) for k, v in reads.items()} == {r: folders[s] for r, s in {
        'gold': 'gold', 'sft': 'sft', 'collect': 'collect-3-strict', 'reward': 'reward-3-strict', 'cost': 'cost-3-strict',
        'policy-2': 'policy-2-strict'}.items()}
