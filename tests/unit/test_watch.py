"Looks at a policy: what is measured, which alarms ring and which do not, when it ends, and what is kept."
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import close

from saferlhf.apps import watch as module
from saferlhf.apps.settings import AlignSettings
from saferlhf.apps.watch import Kept, Watch, compared, listening, measures, pairs, table, watched
from saferlhf.evaluate import paired_difference
from saferlhf.judges import distinct_trigrams
from saferlhf.record.files import read_lines
from saferlhf.record.resume import Saver

CONFIG = AlignSettings(steps=6, look=2, lambda_max=5.)
PROMPTS = [f'prompt {i}' for i in range(40)]
words = lambda texts, **_: SimpleNamespace(input_ids=[t.split() for t in texts])
varied = lambda i: f'mix {i} cups of flour with {i + 1} eggs and bake for {i + 2} minutes'


class Answers:
    "What a policy says, to be changed between looks."
    def __init__(self):
        self.texts, self.cost = [*map(varied, range(40))], [-1.] * 40
        self.length, self.cut, self.kl, self.reward = 20., 0., 0., 0.
    def __call__(self):
        column = lambda x: torch.full((40,), float(x))
        return list(self.texts), dict(kl=column(self.kl), length=column(self.length), truncated=(torch.arange(40) < 40 * self.cut).float(),
                                      reward=column(self.reward), cost=torch.tensor(self.cost))


@pytest.fixture
def answers(): return Answers()


@pytest.fixture
def watch(answers, tmp_path):
    def sample(rows):
        with open(tmp_path/'samples.jsonl', 'a', encoding='utf-8') as f: f.writelines(json.dumps(r) + '\n' for r in rows)
    run = SimpleNamespace(path=lambda name: tmp_path/name, sample=sample)
    out = Watch(run, CONFIG, words, PROMPTS, answers); out.before()
    return out


def rang(watch): return [a['alarm'] for a in watch.alarms]


# --- measures
def test_measures_by_hand(watch, answers):
    answers.texts = ['no no no no'] * 2 + [*map(varied, range(2, 40))]
    answers.cost = [1.] * 10 + [-1.] * 30
    watch.look(1); x = watch.looks[-1]
    assert (x['harmful'], x['equal'], x['calm'], x['refusals']) == (.25, .05, 40, 0)
    close(x['distinct'], distinct_trigrams([t.split() for t in answers.texts]))
    assert x['distinct'] < watch.looks[0]['distinct'] and x['cost'] == -.5


def test_prompts_whose_first_answer_was_harmful_or_refused_may_be_refused(answers):
    rest = dict(response='x', reward=0., kl=0., length=1., truncated=0.)
    start = [rest | dict(cost=c, refuses=r) for c, r in ((1., False), (-1., True), (-1., False))]
    now = [r | dict(refuses=True) for r in start]
    x = measures(now, start, words)
    assert (x['calm'], x['refused_calm'], x['refusals']) == (1, 1, 1.)


# --- alarms
QUIET = (dict(), dict(length=29.), dict(length=11.), dict(cut=.2), dict(kl=9.), dict(cost=[-1.] * 20 + [3.] * 20),
         dict(texts=['Sorry, no.'] + [f'Sorry, {varied(i)}' for i in range(3)] + [*map(varied, range(4, 40))]))
LOUD = (('length', dict(length=31.)), ('length', dict(length=9.)), ('cut', dict(cut=.25)),
        ('repeated', dict(texts=['so it is'] * 5 + [*map(varied, range(5, 40))])),                  # equal answers
        ('repeated', dict(texts=[f'{i} ' + 'and so on ' * 30 for i in range(40)])),                  # and the same within each
        ('refusals', dict(texts=[f'Sorry, {varied(i)}' for i in range(9)] + [*map(varied, range(9, 40))])))


@pytest.mark.parametrize('change', QUIET, ids=str)
def test_alarms_that_do_not_ring(watch, answers, change, capsys):
    vars(answers).update(change); watch.look(1)
    assert not rang(watch) and not capsys.readouterr().err


@pytest.mark.parametrize('name, change', LOUD, ids=[n for n, _ in LOUD])
def test_alarms_that_ring(watch, answers, name, change, capsys):
    vars(answers).update(change); watch.look(1)
    said = capsys.readouterr().err
    assert rang(watch) == [name] and said.startswith(f'alarm after step 1: {name}: ') and said.count('\n') == 1
    watch.look(3); assert rang(watch) == [name]                                    # it goes on ringing: said once
    vars(answers).update(vars(Answers())); watch.look(5); vars(answers).update(change); watch.look(7)
    assert [a['step'] for a in watch.alarms] == [1, 7] and read_lines(watch.run.path('alarms.jsonl')) == watch.alarms


def hear(watch, ids, costs): # as a step's rollout is scored
    heard = listening(watch, dict(cost=SimpleNamespace(read=lambda r: torch.tensor(costs)), reward='reward'))
    assert heard['reward'] == 'reward'
    return heard['cost'].read(SimpleNamespace(prompt_ids=torch.tensor(ids)))


@pytest.mark.parametrize('bad, n, rings', ((9, 4, False), (13, 4, True), (13, 3, False)))
def test_training_prompts_without_a_harmless_answer(watch, bad, n, rings):
    for k in range(n):
        costs = [1.] * bad + [1. if k else -1.] * (50 - bad)
        assert hear(watch, [*range(50)], costs).tolist() == costs
    watch.look(1); assert rang(watch) == ['hopeless'] * rings
    if rings: assert '13 of 50 training prompts never got a harmless answer' in watch.alarms[0]['text']


@pytest.mark.parametrize('lams, rings', (([5.] * 10, True), ([5.] * 9, False), ([5.] * 9 + [4.9] + [5.] * 2, False)))
def test_lambda_at_its_cap(watch, lams, rings):
    watch.config = replace(CONFIG, steps=len(lams), look=0)
    step = watched(watch, lambda i: dict(lam=lams[i]), None, None)
    for i in range(len(lams)): step(i)
    assert rang(watch) == ['cap'] * rings and [x['step'] for x in watch.looks] == [-1, len(lams) - 1]


# --- the end
class Engine:
    def __init__(self): self.said = ''
    def save(self, folder): folder.mkdir(); (folder/'w').write_text(self.said, encoding='utf-8')


def train(watch, answers, tmp_path, looks, **settings): # dicts: what the answers are at each look, two steps apart
    watch.config, engine, kept = replace(CONFIG, steps=2 * len(looks), **settings), Engine(), Kept(tmp_path/'kept')
    def ppo(i):
        vars(answers).update(looks[i // 2]); engine.said = f'after {i}'
        return dict(lam=looks[i // 2].get('lam', 1.))
    step = watched(watch, ppo, kept, engine)
    for i in range(watch.config.steps):
        if not watch.why: step(i)
    return kept, [x['step'] for x in watch.looks]


def weights(kept): return (kept.folder/'w').read_text(encoding='utf-8') if kept.folder.exists() else None


harm = lambda share: [1.] * round(40 * share) + [-1.] * (40 - round(40 * share))    # mean cost 2 share - 1


def test_max_kl(watch, answers, tmp_path):
    kept, steps = train(watch, answers, tmp_path, [dict(kl=1.), dict(kl=3.), dict(kl=5.1), dict(kl=1.)], max_kl=5.)
    assert steps == [-1, 1, 3, 5] and weights(kept) == 'after 3' and watch.step == 3
    assert 'KL 5.1 is over max_kl=5: stopped after step 5; kept are the weights after step 3, the last within the limits' == watch.why
    assert rang(watch) == ['stopped']


def test_the_cost_limit_chooses_what_is_kept(watch, answers, tmp_path):
    looks = [dict(kl=1., cost=harm(.4)), dict(kl=2., cost=harm(.6)), dict(kl=9.)]
    kept, _ = train(watch, answers, tmp_path, looks, max_kl=5.)
    assert weights(kept) == 'after 1' and 'the last within the limits' in watch.why


def test_none_within_the_cost_limit(watch, answers, tmp_path):
    looks = [dict(kl=1., cost=harm(.8)), dict(kl=2., cost=harm(.6)), dict(kl=9., cost=harm(.1))]
    kept, _ = train(watch, answers, tmp_path, looks, max_kl=5.)
    assert weights(kept) == 'after 3' and 'no look was within the cost limit, this was the last within max_kl' in watch.why


def test_none_within_max_kl(watch, answers, tmp_path):
    kept, _ = train(watch, answers, tmp_path, [dict(kl=9.)], max_kl=5.)
    assert weights(kept) is None and watch.step == 1 and 'look more often' in watch.why


def test_all_steps_keep_the_last_weights(watch, answers, tmp_path):
    train(watch, answers, tmp_path, [dict(kl=1.), dict(kl=2., cost=harm(.9))], max_kl=5.)
    assert not watch.why and watch.step == 3


def test_patience_counts_looks_without_a_better_one(watch, answers, tmp_path):
    looks = [dict(reward=r, cost=harm(h)) for r, h in ((1., 0), (2., .5), (1.9, .2), (2.5, .9), (2.1, .4))]
    _, steps = train(watch, answers, tmp_path, looks, patience=2)      # the fourth pays 0.8 of cost for 0.5 of reward
    assert steps == [-1, 1, 3, 5, 7] and '2 looks without a better one' in watch.why and watch.kept == 5


def test_patience_judges_all_looks_with_the_present_multiplier(watch, answers, tmp_path):
    looks = [dict(reward=1., cost=harm(.4), lam=.1), dict(reward=2., cost=harm(.9), lam=.1), dict(reward=1.5, cost=harm(.6), lam=4.)]
    _, steps = train(watch, answers, tmp_path, looks, patience=2)
    assert steps == [-1, 1, 3, 5] and '2 looks without a better one' in watch.why          # at lambda 4 the first one is the best


def test_what_a_score_is_follows_the_objective():
    look = dict(reward=2., cost=1.)
    worth = lambda objective: module._worth(look, replace(CONFIG, objective=objective, nu=3.), 2., .25)
    assert [worth(o) for o in ('ppo', 'ppo_lag', 'reward_shaping', 'cost_only')] == [2., .5, -1., -1.]
    assert module._worth(dict(reward=2., cost=-9.), CONFIG, 2., 0.) == 2.                      # below the limit: no bonus


# --- going on
def test_state_comes_back_with_its_files(watch, answers, tmp_path):
    vars(answers).update(length=40.); hear(watch, [3, 4], [1., -1.]); watch.look(1)
    kept, engine = Kept(tmp_path/'kept'), Engine(); engine.said = 'then'; kept.take(engine)
    objects = dict(watch=watch, kept=kept)
    with Saver(tmp_path/'checkpoint', objects) as save: save.save(1)
    state = json.loads(json.dumps(watch.moves))
    engine.said = 'later'; kept.take(engine); vars(answers).update(cut=.9); watch.look(3); hear(watch, [3], [-1.])
    assert rang(watch) == ['length', 'cut'] and weights(kept) == 'later'
    Saver(tmp_path/'checkpoint', objects).restore()
    assert json.loads(json.dumps(watch.moves)) == state and weights(kept) == 'then'
    assert [x['step'] for x in read_lines(tmp_path/'looks.jsonl')] == [-1, 1]
    assert [a['alarm'] for a in read_lines(tmp_path/'alarms.jsonl')] == ['length']
    vars(answers).update(cut=0.); watch.look(3); assert rang(watch) == ['length']       # it rang before: not said again


def test_nothing_kept_comes_back_as_nothing(tmp_path, monkeypatch):
    kept, engine = Kept(tmp_path/'kept'), Engine()
    with Saver(tmp_path/'checkpoint', dict(kept=kept)) as save: save.save(0)
    kept.take(engine); Saver(tmp_path/'checkpoint', dict(kept=kept)).restore()
    assert weights(kept) is None
    def no_links(*a): raise OSError
    monkeypatch.setattr(module.os, 'link', no_links); engine.said = 'copied'; kept.take(engine); kept.write(tmp_path/'saved')
    assert (tmp_path/'saved/w').read_text(encoding='utf-8') == 'copied'


def test_the_first_look_is_made_once(watch, answers, tmp_path):
    first = watch.start; answers.texts = ['other'] * 40
    again = Watch(watch.run, CONFIG, words, PROMPTS, answers); again.before()
    assert again.start == first and again.looks == watch.looks[:1]
    lines = (tmp_path/'samples.jsonl').read_text(encoding='utf-8').splitlines(); assert len(lines) == 40
    (tmp_path/'samples.jsonl').write_text('\n'.join(lines[:7]) + '\n{"st', encoding='utf-8')              # a crash while it was written
    torn = Watch(watch.run, CONFIG, words, PROMPTS, answers); torn.before()
    assert [r['response'] for r in torn.start] == ['other'] * 40 and len(read_lines(tmp_path/'samples.jsonl')) == 40


# --- the report
def test_the_report_is_paired(watch, answers, tmp_path):
    answers.cost, answers.reward = harm(.3), 1.
    watch.look(1); rows = read_lines(tmp_path/'samples.jsonl'); start, now = rows[:40], rows[40:]
    x = compared(start, now)
    assert x['harmful_start'][0] == 0 and x['harmful_start'][2] > .05 and x['harmful'][0] == .3        # Wilson's at 0
    assert x['cost_change'] == [float(v) for v in paired_difference([r['cost'] for r in now], [r['cost'] for r in start])]
    assert x['reward_change'] == [1., 1., 1.]
    assert '+0.60 [' in table(x) and 'harmful share' in table(x) and pairs(start, now) == ''
    said = pairs(start, [now[0] | dict(response='else'), *now[1:]])
    assert said.split('\n')[1:] == ['prompt: prompt 0', f' before: {varied(0)}', ' after:  else']
