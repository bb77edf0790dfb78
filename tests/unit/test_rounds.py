"Rounds: each step is a run, a killed one goes on, people's files are checked, and the reference stays the SFT model."
import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny import finished, lm, scorer, sentences, tokenizer

from saferlhf.apps import commands
from saferlhf.apps import rounds as module
from saferlhf.apps.align import align
from saferlhf.apps.rounds import rounds
from saferlhf.apps.scorers import Score
from saferlhf.models import load_lm, tiny_model, train_tokenizer
from saferlhf.record.files import read_lines
from saferlhf.record.run import Record
from saferlhf.text import encode_prompt, encode_response, pad

PROMPTS = [dict(prompt=p) for p in sorted(set(sentences(40)))]
SETTINGS = dict(steps=2, prompts=4, minibatches=1, window=8, max_new_tokens=6, max_prompt_tokens=48, test_share=.3, actor_lr=3e-4,
                collect=12, force=True, scores=dict(epochs=1, batch_size=8, lr=1e-3))
ASKED = []


def judge(prompts, answers): # more words are better, the letter e is harmful
    ASKED.append(len(answers))
    return [float(len(a.split())) for a in answers], [a.count('e') - .5 for a in answers]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/'runs')); monkeypatch.chdir(tmp_path)
    for name in ('SPREAD', 'SAVE_STEPS', 'SAVE_MINUTES', 'COMMAND'): monkeypatch.delenv(f'SAFERLHF_{name}', raising=False)
    return tmp_path


@cache
def speaker(): # a tiny model that has learned to say words: bytes at random are no text that anybody could annotate
    torch.manual_seed(0)
    model, rows = tiny_model('llama', len(tokenizer()), 0), zip(sentences(64, 1), sentences(64, 2), strict=True)
    ids = [encode_prompt(p, tokenizer(), 48) + encode_response(a, tokenizer(), 20) for p, a in rows]
    ids, mask = pad(ids, 0)
    optim = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optim.zero_grad(); loss.backward(); optim.step()
    return model


@pytest.fixture
def start(home): return finished('sft', speaker(), rows=[dict(prompt='how', response='sure please')] * 2)


def go(start, n=2, annotator=judge, **settings): return rounds(start, annotator, PROMPTS, n, 0., SETTINGS | settings)


def scores(): # role -> folder of a finished run
    return {k: finished(k, scorer(vocab=len(tokenizer()), seed=i, kind=k)) for i, k in enumerate(('reward', 'cost'), 5)}


def runs(stage): return sorted(p.parent.name for p in Path(os.environ['SAFERLHF_RUNS']).glob(f'{stage}/*/DONE'))


def everything(): # run -> hash of what decides it; its rows
    out = {}
    for p in Path(os.environ['SAFERLHF_RUNS']).glob('*/*/DONE'):
        rows = [read_lines(f) for f in sorted(p.parent.glob('*.jsonl')) if f.name not in ('metrics.jsonl', 'annotated.jsonl')]
        out[f'{p.parent.parent.name}/{p.parent.name}'] = rows
    return out


# --- two rounds
def test_two_rounds(start, capsys):
    one, two = go(start)
    out = capsys.readouterr().out
    assert [len(runs(k)) for k in ('collect', 'annotate', 'reward', 'cost', 'policy')] == [2] * 5
    roles = {k: Path(v) for k, v in two.manifest['parent_folders'].items()}
    assert roles['sft'] == start.resolve() and roles['actor'] == one.folder and 'actor' not in one.manifest['parent_folders']
    rows = {r: [Record(p.parent) for p in Path('runs/annotate').glob(f'*round-{r}-*/DONE')][0] for r in (1, 2)}
    found = {r: read_lines(x.path('preferences.jsonl')) for r, x in rows.items()}
    assert found[2][-len(found[1]):] == found[1] and len(found[2]) > len(found[1])          # the newest first, all of them
    new = found[2][:-len(found[1])]
    assert {r['source'] for r in new} == {'round-2'} and all(r['label_source_safer'].endswith('judge') for r in new)
    assert all(r['is_response_0_safe'] == (r['response_0'].count('e') == 0) for r in new)
    score = Record(roles['cost'])
    assert score.manifest['parent_folders'] == dict(base=str(start.resolve())) and score.config['epochs'] == 1
    read = read_lines(score.path('data/train.jsonl')) + read_lines(score.path('data/test.jsonl'))
    assert {r['id'] for r in read} == {r['id'] for r in found[2]}                           # of both rounds
    held = {r['prompt'] for r in read_lines(two.path('data/test.jsonl'))}
    assert {r['prompt'] for r in read_lines(score.path('data/test.jsonl'))} <= held
    assert not held & {r['prompt'] for r in read_lines(score.path('data/train.jsonl'))}
    lines = out[out.rindex('held-out prompts, read by'):].splitlines()
    assert [line.split('  ')[0] for line in lines[2:5]] == ['start', 'round 1', 'round 2'] and lines[1].split()[0] == 'harmful'


def test_a_killed_call_goes_on_with_the_same_runs(start, monkeypatch):
    whole = go(start); wanted = everything(); weights = load_lm(whole[-1].path('model')).state_dict()
    monkeypatch.setenv('SAFERLHF_RUNS', str(Path.cwd()/'again'))
    class Killed(Exception): pass
    for stage in ('_annotate', 'cost', 'align'):                    # before this step of the second round
        real, calls = getattr(module, stage), []
        def dies(*a, real=real, calls=calls):
            calls.append(a)
            if len(calls) > 1: raise Killed
            return real(*a)
        monkeypatch.setattr(module, stage, dies)
        with pytest.raises(Killed): go(start)
        monkeypatch.setattr(module, stage, real)
    before = len(ASKED)
    policies = go(start)
    assert everything().items() >= {k: v for k, v in wanted.items() if not k.startswith(('sft/', 'base_lm/'))}.items()
    assert {k.split('/')[0] for k in everything()} == {'collect', 'annotate', 'reward', 'cost', 'policy'}
    assert len(everything()) == 10 and len(ASKED) == before                   # nothing twice, and nobody was asked again
    again = load_lm(policies[-1].path('model')).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in weights.items())


def test_a_round_is_answered_anew_by_the_policy_of_the_round_before(start):
    one, _ = go(start, collect=20, actor_lr=0.)                     # the same weights: only other draws give other answers
    first, second = (read_lines(next(Path('runs/collect').glob(f'*round-{r}-*/to_annotate.jsonl'))) for r in (1, 2))
    folder = next(Path('runs/collect').glob('*round-2-*'))
    assert Record(folder).manifest['parent_folders'] == dict(policy=str(one.folder))
    both = {r['prompt'] for r in first} & {r['prompt'] for r in second}
    answers = lambda rows: {r['prompt']: (r['response_0'], r['response_1']) for r in rows if r['prompt'] in both}
    assert len(both) > 5 and sum(answers(first)[p] == answers(second)[p] for p in both) <= len(both) / 2


# --- the reference
def test_the_actor_goes_on_and_the_reference_stays(start):
    helps, harms = scores().values()
    told = {k: v for k, v in SETTINGS.items() if k not in ('collect', 'scores')}
    one = align(start, helps, harms, PROMPTS, 0., told | dict(actor_lr=3e-2))
    assert align(start, helps, harms, PROMPTS, 0., told | dict(actor_lr=3e-2), start).folder == one.folder   # its own reference
    two, alone = (align(one, helps, harms, PROMPTS, 0., told, x) for x in (start, None))
    looks = {k: read_lines(r.path('samples.jsonl')) for k, r in dict(one=one, two=two, alone=alone).items()}
    first = {k: [r for r in rows if r['step'] == -1] for k, rows in looks.items()}
    last = [r for r in looks['one'] if r['step'] == 1]
    for now in (first['two'], first['alone']): assert [r['response'] for r in now] == [r['response'] for r in last]
    kl = {k: [r['kl'] for r in rows] for k, rows in first.items()}
    assert kl['two'] == pytest.approx([r['kl'] for r in last], abs=1e-4) and max(map(abs, kl['two'])) > 1e-2  # from SFT
    assert max(map(abs, kl['alone'])) < 1e-4                                                              # from itself
    assert f'reads actor: {one.folder.name}' in two.path('model/README.md').read_text(encoding='utf-8')


def test_a_reference_of_another_kind_is_refused(start, home):
    helps, harms = scores().values()
    other = home/'other'; lm(vocab=len(tokenizer())).save_pretrained(other)
    train_tokenizer(['quite another text of other words'] * 3, 290).save_pretrained(other)
    told = {k: v for k, v in SETTINGS.items() if k not in ('collect', 'scores')}
    for reference, said in ((helps, 'is a reward model: give one that answers'), (other, 'has another tokenizer than')):
        with pytest.raises(ValueError, match=said): align(start, helps, harms, PROMPTS, 0., told, reference)


# --- people
def filled(): # what people would make of the waiting file; its folder, the rows
    folder = next(p.parent for p in Path(os.environ['SAFERLHF_RUNS']).glob('collect/*/to_annotate.jsonl'))
    rows = read_lines(folder/'to_annotate.jsonl')
    for i, r in enumerate(rows):
        safe = [i % 3 > 0, i % 2 > 0]
        r.update(better_response_id=i % 2, safer_response_id=1 - safe[0], is_response_0_safe=safe[0], is_response_1_safe=safe[1])
    return folder, rows


def put(folder, rows): (folder/'annotated.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8')


def test_people_annotate_in_files(start, capsys):
    assert go(start, 1, None) == [] and not runs('annotate')
    folder, rows = filled()
    said = capsys.readouterr().out
    assert f'{len(rows)} pairs are to be annotated' in said and str(folder/'to_annotate.jsonl') in said and 'same command' in said
    assert {read_lines(folder/'to_annotate.jsonl')[0][k] for k in module._LABELS} == {None}
    put(folder, [r | dict(response_0='what somebody changed') for r in rows[::-1]])
    record, = go(start, 1, None)
    found = read_lines(next(Path('runs/annotate').glob('*/preferences.jsonl')))
    assert found == [r | dict(source='round-1', label_source_better='human', label_source_safer='human',
                              label_source_is_safe='human') for r in rows]
    first = len(runs('annotate')), len(runs('collect')), len(runs('policy'))
    rows[0]['better_response_id'] = 1 - rows[0]['better_response_id']; put(folder, rows)           # a second thought: made anew
    assert go(start, 1, None)[0].folder != record.folder
    assert (len(runs('annotate')), len(runs('collect')), len(runs('policy'))) == (2, 1, 2) and first == (1, 1, 1)


def test_wrong_files_of_people_are_refused_in_a_line(start):
    go(start, 1, None)
    folder, rows = filled()
    n, first = len(rows), rows[0]
    unsure = dict(is_response_0_safe=False, is_response_1_safe=True, safer_response_id=0)
    for given, said in ((rows[1:], f'1 of {n} pairs are missing, the first is {first["id"]}'), ([*rows, first], '1 ids are there twice'),
                        ([first | dict(id='round-9-0'), *rows[1:]], "the id 'round-9-0' is none of to_annotate.jsonl"),
                        ([3, *rows], 'line 1 of .*annotated.jsonl is damaged .no object'),
                        ([first | dict(safer_response_id=None), *rows[1:]],
                         f'1 of {n} rows are not filled in; {first["id"]}: safer_.* is None: fill in 0 or 1'),
                        ([first | dict(better_response_id=2), *rows[1:]], 'better_response_id is 2: fill in 0 or 1'),
                        ([first | dict(is_response_0_safe='yes'), *rows[1:]], "is_response_0_safe is 'yes': fill in true or false"),
                        ([first | unsure, *rows[1:]], 'the safer answer is called harmful')):
        put(folder, given)
        with pytest.raises(ValueError, match=said) as e: go(start, 1, None)
        assert '\n' not in str(e.value) and not runs('annotate')
    put(folder, rows); (folder/'annotated.jsonl').write_text('{"id": \n{}\n', encoding='utf-8')
    with pytest.raises(ValueError, match='line 1 of .* is damaged'): go(start, 1, None)


# --- other annotators, refusals
def test_two_score_models_annotate_and_are_parents(start, monkeypatch):
    models = scores()
    with pytest.raises(ValueError, match='rounds=0'): go(start, 0, models)
    go(start, 1, None)
    def enough(*a): raise ValueError('enough')
    monkeypatch.setattr(module, 'reward', enough)
    for annotator in (models, models | dict(reward=Score(lambda p, a: [len(x) for x in a], 'reward', 'longer'))):
        with pytest.raises(ValueError, match='enough'): go(start, 1, annotator)                                  # after annotation
    by = [Record(p.parent) for p in Path('runs/annotate').glob('*/DONE')]
    assert len(runs('collect')) == 1 and len(by) == 2                            # the same answers, labelled by others
    parents = sorted(({k: Path(v) for k, v in r.manifest['parent_folders'].items() if k in models} for r in by), key=len)
    assert parents == [dict(cost=models['cost']), models]
    rows = [read_lines(r.path('preferences.jsonl')) for r in by]
    assert [r['response_0'] for r in rows[0]] == [r['response_0'] for r in rows[1]] and rows[0] != rows[1]


@pytest.mark.parametrize('n, annotator, settings, said', (
    (0, judge, {}, 'rounds=0: it is a whole number'), (1, judge, dict(collect=99), 'collect=99: .* 1 to'),
    (1, 'gpt', {}, 'annotates nothing'),
    (1, dict(reward='x'), {}, 'annotates nothing'), (1, judge, dict(colect=3), "no setting 'colect'"), (1, 'no_module.at', {}, 'no module'),
    (1, judge, dict(scores=dict(pears=3)), "no setting 'pears'"), (1, lambda p, a: [1.] * 3, {}, 'rewards and costs')))
def test_what_cannot_be_is_said(start, n, annotator, settings, said):
    with pytest.raises(ValueError, match=said) as e: go(start, n, annotator, **settings)
    assert '\n' not in str(e.value) and not runs('policy')


def test_weak_score_models_are_refused_in_a_round(start):
    with pytest.raises(ValueError, match='force=True goes on'): go(start, 1, force=False)


# --- the command
def test_the_command(start, home, capsys, monkeypatch):
    (home/'prompts.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in PROMPTS), encoding='utf-8')
    (home/'mine.py').write_text('def judge(p, a): return [len(x) for x in a], [x.count("e") - .5 for x in a]\n', encoding='utf-8')
    base = ['align', '--policy', str(start), '--prompts', 'prompts.jsonl']
    sizes = '--steps 2 --prompts-per-step 4 --minibatches 1 --window 8 --max-new-tokens 6 --max-prompt-tokens 48 --test-share .3'.split()
    for wrong, said in (([], 'name --reward, or --rounds N'), (['--rounds', '2', '--cost', 'c'], 'leave yours out'),
                        (['--reward', 'r', '--annotator', 'x.y'], 'are for --rounds N'),
                        (['--reward', 'r', '--collect', '3'], 'are for --rounds N'),
                        (['--rounds', '1', '--annotator', 'reward=r'], 'reward=MODEL cost=MODEL')):
        with pytest.raises(SystemExit) as stopped: commands.main([*base, *wrong])
        assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert commands.main([*base, *sizes, '--rounds', '1', '--collect', '12']) == 0
    out = capsys.readouterr().out
    assert 'are to be annotated' in out and 'next:' not in out and not runs('policy')
    done = [*base, *sizes, '--rounds', '1', '--collect', '12', '--annotator', 'mine.judge', '--force']
    assert commands.main(done) == 0 and len(runs('collect')) == 1
    out = capsys.readouterr().out
    assert 'held-out prompts, read by the score models of round 1' in out and 'saferlhf judge' in out
    record = Record(next(Path('runs/annotate').glob('*')))
    assert record.manifest['command'].startswith('saferlhf align') and '--annotator mine.judge' in record.manifest['command']
