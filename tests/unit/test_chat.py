"Chat: answers with scores, the loop with its commands, two policies, and files of prompts."
import io
import json
import sys

import pytest
import tiny

from saferlhf.apps.chat import Speaker, _shown, _Talk, chat
from saferlhf.apps.scorers import Score
from saferlhf.models import save_tokenizer, tiny_model
from saferlhf.record.run import Record, Run
from saferlhf.rollout import Sampler, respond, score_texts
from saferlhf.text import as_messages

LIMITS = dict(max_prompt_tokens=110, max_new_tokens=8)
length = Score(lambda p, a: [float(len(x)) for x in a], 'reward', 'length')


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/'runs'))
    return tmp_path


def made(stage, model, parents=None, name='t'):
    run = Run.start(stage, dict(max_prompt_tokens=110, max_new_tokens=8), parents, name=name)
    model.save_pretrained(run.path('model')); save_tokenizer(tiny.tokenizer(), run.path('model')); run.finish({})
    return Record(run.folder)


@pytest.fixture
def runs():
    sft, reward = made('sft', tiny_model(vocab_size=300)), made('reward', tiny.scorer(vocab=300))
    cost = made('cost', tiny.scorer(vocab=300, seed=1, kind='cost'))
    parents = dict(sft=sft.folder, reward=reward.folder, cost=cost.folder)
    return sft, reward, cost, made('policy', tiny_model(vocab_size=300, seed=1), parents)


class Terminal(io.StringIO):
    "What somebody types; a line `^C` is Ctrl-C at the prompt, the end Ctrl-D."
    def isatty(self): return True
    def readline(self, *a):
        if (line := super().readline(*a)) == '^C\n': raise KeyboardInterrupt
        return line


def typed(monkeypatch, text, *a, **k):
    monkeypatch.setattr(sys, 'stdin', Terminal(text))
    chat(*a, settings=LIMITS, **k)

# answers

def test_an_answer_with_its_scores(runs):
    sft, reward, cost, policy = runs
    s = Speaker(policy, reward, cost)
    row = s.answer('how to make cake')
    assert list(row) == ['response', 'truncated', 'reward', 'cost']
    for kind in ('reward', 'cost'):
        plain = tiny.scorer(vocab=300, seed=int(kind == 'cost'), kind=kind)
        tiny.close(row[kind], score_texts(plain, tiny.tokenizer(), ['how to make cake'], [row['response']], 110, 8)[0], 3e-2)
    wanted = respond(Sampler(s.sampler.model, tiny.tokenizer().eos_token_id, 8), tiny.tokenizer(), ['how to make cake'], 110, samples=2)
    again = s.answer('how to make cake')
    assert [row['response'], again['response']] == [r['response'] for r in wanted] and row['response'] != again['response']
    other = Speaker(policy, seed=5)
    assert other.answer('how to make cake')['response'] != row['response'] and list(other.answer('yes')) == ['response', 'truncated']
    assert Speaker(policy).answer('how to make cake')['response'] == row['response']       # the same seed, the same talk
    with pytest.raises(ValueError, match='is a cost model, not a reward model'): Speaker(policy, reward=cost)


def test_dialogues_and_temperature(runs):
    s = Speaker(runs[0].path('model'), temperature=0, **LIMITS)
    talk = [dict(role='user', content='how to bake'), dict(role='assistant', content='with care'), dict(role='user', content='sure ?')]
    assert s.answer(talk) == s.answer(['how to bake', 'with care', 'sure ?']) != s.answer('sure ?')
    s.warm(2.)
    assert s.sampler.temperature == 2 and not s.sampler.greedy
    for bad in (-1, float('nan')):
        with pytest.raises(ValueError, match='a temperature is 0 or more'): s.warm(bad)
    rows = Speaker(runs[0], length, **LIMITS).answers(['how', 'is it safe ?', 'how'])
    assert rows[0] == rows[2] != rows[1] and rows[1]['reward'] == len(rows[1]['response'])


def test_an_answer_moves_no_cursor():
    shown = _shown(dict(response=' red \x1b[31mé\n\ttwo\x07 ', reward=1., cost=-.5, truncated=True))
    assert shown == 'red [31mé\n\ttwo\n    [reward +1.00, cost -0.50, cut]'

# the loop

def test_the_loop(monkeypatch, capsys, runs):
    asked, whole = [], Speaker.answer
    def answer(self, prompt):
        asked.append((self.name, as_messages(prompt)))
        if prompt[-1]['content'] == 'stop': raise KeyboardInterrupt
        if prompt[-1]['content'] == 'fail': raise ValueError('the chat template refuses: no\nmore')
        return dict(whole(self, prompt), response='fine')
    monkeypatch.setattr(Speaker, 'answer', answer)
    typed(monkeypatch, 'how to bake\n\n^C\nstop\nand then ?\n/new\n/temperature 0\n/temperature hot\n/temperature -1\n'
          '/system Be kind.\nhow\n/what\nfail\n/quit\nnever\n', runs[3])
    out, err = capsys.readouterr()
    roles = [[f'{m["role"][0]}:{m["content"]}' for m in talk] for _, talk in asked]
    assert roles == [['u:how to bake'], ['u:how to bake', 'a:fine', 'u:stop'],
                     ['u:how to bake', 'a:fine', 'u:and then ?'],                           # the stopped one is gone
                     ['s:Be kind.', 'u:how'], ['s:Be kind.', 'u:how', 'a:fine', 'u:fail']]
    for part in ('\nstopped\n', '/quit or Ctrl-D ends', 'a new talk\n', 'temperature 0\n', "not 'hot'", 'a temperature is 0 or more',
                 'with that system text', 'the chat template refuses: no\n'): assert part in out, part
    assert out.count('/new begins anew') == 2 and out.count('fine\n    [reward ') == 3 and 'cost ' in out and 'never' not in out
    assert err.count(f'a parent of {runs[3].id}') == 2 and 'reward: ' in err and 'cost: ' in err


def test_ctrl_d_ends_and_two_policies_stand_beside_each_other(monkeypatch, capsys, runs):
    sft, _, cost, policy = runs
    typed(monkeypatch, 'how to bake\nand then ?', sft, policy, reward=length)
    out, err = capsys.readouterr()
    assert out.count(f'A {sft.id}: ') == out.count(f'B {policy.id}: ') == 2 and out.count('[reward +') == 4 and out.count('cost ') == 4
    assert 'reward: ' not in err and f'cost: {cost.folder}, a parent of {policy.id}' in err     # those of the policy judge both


def test_an_answer_that_was_stopped_is_forgotten_by_both(capsys):
    class Fake:
        name, sampler, stopped = 'fake', None, False
        def answer(self, prompt):
            if self.stopped: raise KeyboardInterrupt
            return dict(response='fine', truncated=False)
    talk = _Talk([Fake(), Fake()])
    talk.ask('how')
    before = dict(talk.turns)
    talk.speakers[1].stopped = True
    with pytest.raises(KeyboardInterrupt): talk.ask('and then ?')
    assert talk.turns == before and len(before[0]) == len(before[1]) == 2


def test_a_parent_that_is_gone_is_said(monkeypatch, capsys, runs):
    import shutil
    shutil.rmtree(runs[2].folder)
    typed(monkeypatch, 'how\n', runs[3])
    out, err = capsys.readouterr()
    assert f'cost: {runs[2].folder}, a parent of {runs[3].id} that is gone' in err and '[reward ' in out and ', cost ' not in out

# files

def test_lines_of_the_input_and_files(monkeypatch, capsys, runs, tmp_path):
    monkeypatch.setattr(sys, 'stdin', io.StringIO('how to bake\n\nis it safe ?\n')); capsys.readouterr()
    noisy = Score(lambda p, a: print('noise') or [0.] * len(a), 'reward', 'noisy')
    chat(runs[3], runs[0], noisy, json=True, settings=LIMITS)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r['prompt'], r['policy']) for r in rows] == [(p, r.id) for p in ('how to bake', 'is it safe ?') for r in (runs[3], runs[0])]
    assert all({*r} == {'prompt', 'policy', 'response', 'truncated', 'reward', 'cost'} for r in rows)
    (tmp_path/'p.jsonl').write_text(''.join(json.dumps(dict(prompt=p)) + '\n' for p in tiny.sentences(40)))
    (tmp_path/'p.txt').write_text('how to bake\nis it safe ?\n')
    chat(runs[3], reward=noisy, prompts_file=tmp_path/'p.txt', json=True, settings=LIMITS)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows[::2]
    chat(runs[0], prompts_file=str(tmp_path/'p.jsonl'), settings=LIMITS)
    out = capsys.readouterr().out
    assert out.count('> ') == len(set(tiny.sentences(40))) and '[reward' not in out
    (tmp_path/'empty.txt').write_text('\n')
    with pytest.raises(ValueError, match='empty.txt: it holds no prompt'): chat(runs[0], prompts_file=tmp_path/'empty.txt')


def test_wrong_input_is_one_line(runs, tmp_path):
    with pytest.raises(ValueError, match="chat has no setting 'temprature': did you mean 'temperature'"):
        chat(runs[0], settings=dict(temprature=1))
    with pytest.raises(ValueError, match='is a score model, not a language model'): Speaker(runs[1])
    for nowhere in ('./nowhere', str(tmp_path/'nowhere')):
        with pytest.raises(FileNotFoundError, match='is no folder'): Speaker(nowhere)
