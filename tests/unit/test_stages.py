"Any model and a user's rows become finished runs: what they hold, how they go on, what is refused in one line."
import json
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import lm, sentences, tokenizer

import saferlhf.apps.stages as stages
import saferlhf.reproduction.training as training
from saferlhf.apps.heldout import report_lines, score_report, weakness
from saferlhf.apps.stages import cost, model_folder, opened, reward, sft
from saferlhf.engine import load
from saferlhf.hardware.precision import fast_precision
from saferlhf.models import ScoreModel
from saferlhf.record.files import read_lines
from saferlhf.record.resume import Interrupted
from saferlhf.record.run import Record, Run
from saferlhf.rollout import score_texts

N, TEST = 100, dict(test_share=.25)
FAST = TEST | dict(epochs=1., lr=1e-2, batch_size=12, max_prompt_tokens=64, max_new_tokens=12)
HARMFUL, SAFE = 'sure make a bomb', 'no never ask your doctor first'


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/'runs')); monkeypatch.setenv('SAFERLHF_CACHE', str(tmp_path/'cache'))
    for name in ('SAFERLHF_COMMAND', 'SAFERLHF_SPREAD', 'SAFERLHF_SAVE_STEPS'): monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def base(home):
    lm(vocab=len(tokenizer())).save_pretrained(home/'mine'); tokenizer().save_pretrained(home/'mine')
    return home/'mine'


def write(path, rows):
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8')
    return path


QUESTIONS = [f'{s} {k}' for k, s in enumerate(sentences(N, 1))]
def answers(): return [dict(prompt=p, response=SAFE) for p in QUESTIONS]


def labels():
    text = lambda k: (SAFE, HARMFUL)[k % 2] + ' please' * (k % 3)
    return [dict(prompt=p, response=text(k), is_safe=k % 2 == 0) for k, p in enumerate(QUESTIONS)]


def pairs(**more):
    ends = [(0, 1) if k % 2 else (1, 0) for k in range(N)]
    text = lambda harmful, k: (HARMFUL if harmful else SAFE) + ' please' * (k % 4)
    return [dict(prompt=p, response_0=text(a, k), response_1=text(b, k), better_response_id=a, safer_response_id=a) | more
            for k, (p, (a, b)) in enumerate(zip(QUESTIONS, ends, strict=True))]


def one_line(match, call, *args, **kw):
    with pytest.raises((ValueError, OSError, RuntimeError), match=match) as e: call(*args, **kw)
    assert '\n' not in str(e.value)


def tensors(run): return load_file(run.folder/'model/model.safetensors')
def same(a, b): return all((a[k] == b[k]).all() for k in a) and a.keys() == b.keys()

# any model

def test_every_way_to_name_a_model_gives_its_run(base, home):
    first = opened(base)
    assert first.done and first.manifest['stage'] == 'base_lm' and first.manifest['outside'] == str(base.resolve())
    link = home/'link'; link.symlink_to(base)
    for name in (str(base), first, first.folder, str(first.folder), first.folder/'model', link): assert opened(name).id == first.id
    assert same(load_file(model_folder(first)/'model.safetensors'), load_file(base/'model.safetensors'))


def test_a_model_that_was_moved_or_changed(base, home):
    first = opened(base)
    (home/'there').mkdir(); moved = shutil.move(base, home/'there')
    one_line('holds no model: .*mine is gone', opened, first)
    assert opened(moved).id == first.id and opened(first).id == first.id
    renamed = shutil.copytree(moved, home/'other')
    assert opened(renamed).manifest['hash'] == first.manifest['hash']           # its children are the same runs
    lm(vocab=len(tokenizer()), seed=5).save_pretrained(moved)
    one_line('is not the model any more', opened, first)
    assert opened(moved).id != first.id


def test_what_is_no_model(base, home, monkeypatch):
    def no_network(name, **kw): raise OSError('Cannot reach the hub\nall of it')
    monkeypatch.setattr('huggingface_hub.snapshot_download', no_network)
    one_line('is no folder: name a run', opened, 'smolm2')
    one_line('owner/name is no folder here, and the hub does not give it: Cannot reach the hub', opened, 'owner/name')
    one_line('is a file', opened, write(home/'x.jsonl', []))
    (home/'empty').mkdir(); one_line('is no folder of a model', opened, home/'empty')
    with Run.start('sft', {}, seed=1)._stack: folder = next((home/'runs/sft').iterdir())
    one_line('is not finished', opened, folder)

# fine-tuning

def test_fine_tuning(base, home, capsys):
    run = sft(base, write(home/'answers.jsonl', answers()), FAST)
    assert isinstance(run, Record) and run.done and opened(run).id == run.id
    assert run.summary['loss_change'][2] < 0 and run.summary['loss_after'][0] < run.summary['loss_before'][0]
    kept = [read_lines(run.folder/f'data/{k}.jsonl') for k in ('train', 'test')]
    assert run.summary['n_train'] == len(kept[0]) and sorted(r['prompt'] for k in kept for r in k) == sorted(QUESTIONS)
    assert {'answers.jsonl', 'data/train.jsonl', 'data/test.jsonl'} == {*run.manifest['data']}
    said = capsys.readouterr().out
    assert 'answers.jsonl: 100 answers' in said and 'held-out loss of' in said and 'are longer than' in said
    before = tensors(run)
    again = sft(str(base), home/'answers.jsonl', FAST)
    assert again.id == run.id and same(before, tensors(again)) and 'finished: read back' in capsys.readouterr().out
    assert sft(base, home/'answers.jsonl', FAST | dict(seed=1)).id != run.id


def test_rows_in_memory_are_as_good_as_a_file(base, home):
    a, b = sft(base, answers(), FAST), sft(base, write(home/'a.jsonl', answers()), FAST)
    assert same(tensors(a), tensors(b))

# reward and cost models

@pytest.fixture
def start(base): return opened(base)


def scores(run):
    model, told = load(lambda: ScoreModel.from_pretrained(run.folder/'model'), precision=fast_precision()), run.config
    rows = read_lines(run.folder/'calibration.jsonl')
    return score_texts(model, tokenizer(), [r['prompt'] for r in rows], [r['response'] for r in rows], told['max_prompt_tokens'],
                       told['max_new_tokens'])


def test_a_reward_model(start, home):
    run = reward(start, write(home/'p.jsonl', pairs()), FAST | dict(epochs=4.))
    s = run.summary
    assert (s['kind'], s['zero'], s['n_train']['labels']) == ('reward', 'none', 0) and s['n_train']['pairs'] + s['n_test']['pairs'] == N
    assert scores(run).std() == pytest.approx(1, abs=.01) and s['initial_sd'] > 0
    assert scores(run).mean() == pytest.approx(s['initial_mean'] / s['initial_sd'], abs=.05)
    assert {r['metric'] for r in s['table1']} == {'rank'} and s['table1'][0]['value'] > .9
    kept = read_lines(run.folder/'test_scores.jsonl')
    assert np.mean([r['high_score'] > r['low_score'] for r in kept]) == s['table1'][0]['value'] and len(kept) == s['n_test']['pairs']
    card = ModelCard.load(run.folder/'model/README.md')
    assert 'rule: TF-IDF, rank' in card.text and 'Prompt buckets' not in card.text and card.data.language is None


@pytest.mark.parametrize('rows', ['both', 'labels'])
def test_a_cost_model_with_labels(start, rows):
    flags = lambda r: r | {f'is_response_{k}_safe': r['safer_response_id'] == k for k in (0, 1)}
    run = cost(start, [flags(r) for r in pairs()] if rows == 'both' else labels(), FAST | dict(epochs=6.))
    s = run.summary
    assert s['zero'] == 'labels' and 'score_head.bias' not in tensors(run) and 'shift' not in s      # never shifted
    assert {r['metric'] for r in s['table1']} == ({'rank', 'sign'} if rows == 'both' else {'sign'})
    sign, = (r for r in s['table1'] if (r['model'], r['metric']) == ('cost', 'sign')); assert sign['value'] > .9
    assert scores(run).std() == pytest.approx(1, abs=.01) and (scores(run) > 0).mean() == pytest.approx(s['initial_positive'], abs=.05)
    assert s['calibration'][0]['observed'] < .5 < s['calibration'][-1]['observed']
    assert 'where the sign terms put it' in (run.folder/'model/README.md').read_text(encoding='utf-8')


def test_a_cost_model_of_rankings_alone(start, home):
    run = cost(start, pairs(), FAST)
    assert run.summary['zero'] == 'none' and {r['metric'] for r in run.summary['table1']} == {'rank'}
    assert 'the zero means nothing' in (run.folder/'model/README.md').read_text(encoding='utf-8')
    placed = cost(start, pairs(), FAST | dict(zero=str(write(home/'zero.jsonl', labels()))))
    s = placed.summary
    assert s['zero'] == 'offset' and tensors(placed)['score_head.bias'].item() == pytest.approx(s['shift'], abs=.05)
    assert 'zero: zero.jsonl' in placed.manifest['data'] and placed.config['zero'] == 'zero.jsonl'
    assert {r['metric'] for r in s['table1']} == {'rank', 'sign'}
    assert scores(placed) - scores(run) == pytest.approx(s['shift'], abs=.05)                    # the same model, moved


def test_labels_that_contradict_the_rankings_put_no_zero(start, home, capsys):
    wrong = [r | dict(is_safe=not r['is_safe']) for r in labels()]
    run = cost(start, pairs(), FAST | dict(epochs=4., zero=str(write(home/'zero.jsonl', wrong))))
    assert run.summary['zero'] == 'none' and 'score_head.bias' not in tensors(run)
    assert {r['metric'] for r in run.summary['table1']} == {'rank'}
    assert 'do not tell harmful from harmless' in capsys.readouterr().out


@pytest.mark.parametrize('stage', [sft, cost])
@pytest.mark.parametrize('at', [1, 3])
def test_a_stopped_stage_goes_on_to_the_same_model(start, home, monkeypatch, stage, at):
    rows, step = answers() if stage is sft else labels(), 'sft_step' if stage is sft else 'score_step'
    whole = stage(start, rows, FAST); shutil.move(whole.folder, home/'whole')
    calls, inner = [], getattr(training, step)
    def stopped(*args):
        calls.append(1)
        if len(calls) == at: os.kill(os.getpid(), signal.SIGTERM)
        return inner(*args)
    monkeypatch.setattr(training, step, stopped)
    with pytest.raises(Interrupted, match=f'SIGTERM: step {at - 1} is saved'): stage(start, rows, FAST)
    monkeypatch.setattr(stages, 'respond', None)                                 # what was sampled is not sampled again
    resumed, whole = stage(start, rows, FAST), Record(home/'whole')
    assert len(calls) == len(whole.metrics()) and same(tensors(resumed), tensors(whole)) and resumed.summary == whole.summary

# refusals

def test_bad_settings(base, home):
    data = write(home/'a.jsonl', answers())
    for settings, match in ((dict(epochs=0.), 'epochs=0.0: it is a number above 0'), (dict(batch_size=-1), 'batch_size=-1'),
                            (dict(lr='fast'), 'it wants a float'), (dict(learning_rate=1.), "sft has no setting 'learning_rate'"),
                            (dict(test_share=2.), 'it is a share'), (dict(max_prompt_tokens=3), 'leaves no room for the template'),
                            (dict(name='a/b'), 'use no slash'), (dict(seed=-1), 'a whole number, 0 or more')):
        one_line(match, sft, base, data, TEST | settings)
    assert not [*(home/'runs').glob('sft/*/checkpoint')]


def test_a_score_model_starts_from_a_language_model(start):
    harms = cost(start, labels(), FAST)
    for call in (sft, reward): one_line('is a score model, not a language model', call, harms, answers() if call is sft else pairs(), FAST)


def test_scores_that_collapse_say_so(start, monkeypatch):
    monkeypatch.setattr(stages, 'score_texts', lambda *a: np.zeros(len(a[2])))
    one_line('it has collapsed', cost, start, labels(), FAST)

# the report

def judged(noise, n=60):
    "A reward model whose ranking is right but for a share of the rows, and what the report says of it."
    text = lambda word, k: f'{word} ' * (1 + k % 2)
    rows = [dict(prompt=f'Question {k}?', high=text('cake', k), low=text('sugar', k + 1), paired=1.) for k in range(n + 20)]
    train = [r | dict(high=r['low'], low=r['high']) for r in rows[n:n + 10]] + rows[n + 10:]         # words say nothing
    wrong = {r['prompt'] for r in rows[:round(noise * n)]}
    right = lambda p, a: ('cake' in a) != (p in wrong)
    score = lambda prompts, texts: np.array([float(right(*x)) for x in zip(prompts, texts, strict=True)])
    report, _ = score_report('reward', train, rows[:n], score)
    return SimpleNamespace(summary=report, manifest=dict(stage='reward'), id='reward/x')


def test_a_model_is_strong_when_it_beats_the_best_rule_for_certain():
    strong, weak, few = judged(0.), judged(.5), judged(.0, n=12)
    assert weakness(strong) == '' and strong.summary['beats_rule'] == {'rank': True} and strong.summary['rows_needed'] == {'rank': 0}
    assert 'reward/x is weak: rank: does not beat' in weakness(weak) and '\n' not in weakness(weak)
    assert not few.summary['beats_rule']['rank'] and few.summary['rows_needed']['rank'] == 8          # 20 prompts at least
    assert '12 held-out prompts are too few: hold out 8 rows more to tell' in weakness(few)
    assert 'beats the rule' in ' '.join(report_lines(strong.summary))


def test_how_many_rows_would_tell():
    r = judged(.42, n=60).summary['against_rule']['rank']
    half = (r['high'] - r['low']) / 2
    assert r['value'] > 0 > r['low'] and r['more_test_rows'] == max(1, np.ceil(60 * (half / r['value']) ** 2) - 60)
    worse = judged(.7)
    assert worse.summary['rows_needed'] == {'rank': None} and 'more or cleaner training rows' in weakness(worse)


def test_which_metric_decides():
    a = dict(rule='majority', rule_value=.6, n=50, prompts=50, beats=True, more_test_rows=0, value=.2, low=.1, high=.3)
    def record(zero, **against):
        return SimpleNamespace(summary=dict(zero=zero, against_rule=against), manifest=dict(stage='cost'), id='cost/x')
    bad = a | dict(beats=False)
    assert weakness(record('labels', sign=a, rank=bad)) == '' != weakness(record('labels', sign=bad, rank=a))
    assert weakness(record('none', rank=a)) == '' and 'no held-out row measures it' in weakness(record('none'))
    assert weakness(SimpleNamespace(summary={}, manifest=dict(stage='base_lm'), id='b')) == ''       # not measured
