"Texts of strangers in pages, cards, tables and on terminals: nothing of them runs, fetches or steers anything."
import csv
import html
import io
import json
import re
from types import SimpleNamespace

import pandas as pd
import pytest
from hostile import Live, Server, browser, card, frame, nasty, notebook, page, rendered, shown
from hypothesis import given
from hypothesis import strategies as st
from project import ROOT, notebooks

from saferlhf.apps import chat, judge, report
from saferlhf.apps.commands import main
from saferlhf.apps.own_data import source_name
from saferlhf.apps.watch import pairs
from saferlhf.data import load_preferences, load_prompts
from saferlhf.record.escape import (code_block, code_span, csv_text, guarded, is_formula, markdown_text, one_line_of, printable, read_csv,
                                    unguarded)
from saferlhf.record.execute import publish
from saferlhf.reproduction import results
from saferlhf.reproduction.results import join
from saferlhf.reproduction.tables import Results, markdown

TEXTS = nasty()
STEERS = re.compile(r'[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]')


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path/'data/results/cpu').mkdir(parents=True)
    monkeypatch.setenv('SAFERLHF_HOME', str(tmp_path)); monkeypatch.setenv('SAFERLHF_RUNS', str(tmp_path/'runs'))
    return tmp_path


# --- pages

@pytest.mark.parametrize('text', TEXTS, ids=range(len(TEXTS)))
def test_markdown_shows_a_text_and_nothing_else(text):
    t, code = markdown_text(text), code_span(text)
    for made in (t, f'a *{t}* [{t}](#a)', code, f'see {code} there', '\n'.join(code_block(text)), *shown([text])):
        live = Live(rendered(made), ('#',))
        live.found = [x for x in live.found if not x.startswith('a href=http')]          # a bare address may become a link to the web
        assert not live.found and 'img' not in live.tags, (made, live.found)
    bare = text.replace('http://', '')                                                # no address that becomes a link
    words = html.unescape(re.sub(r'<[^>]*>', '', rendered(markdown_text(bare))))
    assert re.sub(r'\W', '', words) == re.sub(r'\W', '', one_line_of(bare)), 'all of it is shown'


def test_a_table_keeps_its_columns():
    made = markdown(frame(TEXTS)); lines = made.splitlines()
    assert len(lines) == 2 + len(TEXTS) and rendered(made).count('<td>') == 3 * len(TEXTS)
    ours = markdown(pd.DataFrame(dict(where=['[table1](table1.ipynb), `x`'], who=['[a](b) `x`'])), ours=('where',)).splitlines()[-1]
    assert ours == r'| [table1](table1.ipynb), `x` | [a]\(b) \`x\` |'


@pytest.mark.parametrize('raw', (False, True))
def test_a_page_holds_nothing_that_runs_or_fetches(tmp_path, home, raw):
    made = page(tmp_path, TEXTS, raw)
    head, body = made.split('</head>')
    live = Live(body); assert not live.found, live.found
    policy, = re.findall(r'Content-Security-Policy" content="([^"]*)"', head)
    assert policy.split('; ')[0] == "default-src 'none'" and 'unsafe' not in policy and 'script' not in policy and 'http' not in policy
    assert Live(head).tags == ['html', 'head', 'meta', 'meta', 'meta', 'meta', 'title', 'style'] and head.count('</style>') == 1
    assert body.count('</main>') == 1 and '&lt;script&gt;' in body


def test_what_a_page_needs_is_kept():
    good = ('<h2>a</h2><p class="x">b <a href="https://a.b/c?d=1&amp;e">c</a> <a href="#one">d</a> <a href="mailto:a@b.c">e</a></p>'
            '<table><tbody><tr><td colspan="2">1</td></tr></tbody></table><img alt="f" src="data:image/png;base64,iVBORw0KGgo=">'
            '<math display="block"><mfrac><mi>a</mi><mn>2</mn></mfrac></math><details><summary>code</summary><pre>x &lt; y</pre></details>')
    made = report._clean(good)
    assert Live(made).tags == Live(good).tags and not Live(made).found and 'x &lt; y' in made
    wanted = 'href="https://a.b/c?d=1&amp;e" href="#one" href="mailto:a@b.c" colspan="2" base64,iVBORw0KGgo= display="block"'
    for x in wanted.split(): assert x in made, x
    for bad in ('javascript:x', ' java\tscript:x', 'data:text/html,x', '//a.b/c', '/a', 'file:///a', 'vbscript:x', 'blob:x', '#a b'):
        assert 'href' not in report._clean(f'<a href="{bad}">a</a>'), bad
    for bad in ('https://a.b/c.png', 'data:image/svg+xml;base64,AAAA', 'data:text/html;base64,AAAA', 'x.png'):
        assert 'src' not in report._clean(f'<img src="{bad}">'), bad


def test_names_of_results_and_profiles_are_text(tmp_path, home, monkeypatch):
    (home/'data/results/cpu/<img src=x onerror=y>.csv').write_text('seed,run_id\n0,<script>a\n')
    made = report._page({'one': notebook(tmp_path/'one.ipynb', ['a'], False)}, 'cpu', report._made_by('cpu'))
    assert '&lt;img src=x onerror=y&gt;' in made and '&lt;script&gt;a' in made and not Live(made.split('</head>')[1]).found


def test_a_card_shows_names_as_text(home):
    head, body = card(home, TEXTS)
    live = Live(rendered(body)); assert not live.found and 'img' not in live.tags, live.found
    assert body.count('\n## ') == 7 and not STEERS.search(body)
    from huggingface_hub import ModelCard
    assert ModelCard(f'{head}\n---\n').data.to_dict()['saferlhf_base'].keys() == {'name', 'sha256', 'license', 'note'}


@pytest.mark.skipif(not browser(), reason='no headless browser here: apt-get install chromium')
def test_a_browser_runs_nothing_and_asks_for_nothing(tmp_path, home):
    with Server() as server:
        texts = nasty(server.url)
        bare = (f'<div>{rendered(x)}</div>' for x in texts if 'refresh' not in x and '<base' not in x)
        alone = f'<!doctype html><html><body>{"".join(bare)}</body></html>'
        assert len(server.seen(alone)) > 10, 'the texts are live where nobody escapes them'
        for raw in (False, True): assert server.seen(page(tmp_path, texts, raw)) == []
        policy, without = (f('<meta http-equiv[^>]*>', page(tmp_path, texts)) for f in (re.findall, lambda a, b: re.sub(a, '', b)))
        assert 'Security' not in without and server.seen(without) == [], 'without the policy, too'
        assert server.seen(alone.replace('<body>', f'{policy[0]}<body>')) == [], 'the policy alone'
        assert server.seen(f'<!doctype html><html><body>{rendered(card(home, texts)[1])}</body></html>') == []


def test_displayed_samples_are_text():
    "What templates show with `display`: pandas escapes; nothing of ours turns that off."
    made = frame(TEXTS)._repr_html_()
    assert not [x for x in Live(re.sub('(?s)<style.*?</style>', '', made)).found if 'style' not in x]
    for path in notebooks(): assert not re.search(r'escape=False|\bHTML\(|%%html|%%javascript|Javascript\(', path.read_text()), path


# --- tables

def dangerous(cell): return bool(re.match(r'[\s"]*[=+\-@\t\r]', cell)) and not re.fullmatch(r'[+-]?[\d.]+(e[+-]?\d+)?|[+-]inf', cell, re.I)


CELLS = [*TEXTS, '', '-', '=', "'", "''=x", "'-5", '-5', '+.5e3', '-inf', 'NaN', '＝1', '\ufeff=1', 'a\rb', 'a\r\nb', ' - a', '"', "'@",
         '-1_0', '- a list', '--x']


@given(st.text(st.sampled_from('\'" =+-@\t\r\n\ufeff＝a1.,')))
def test_a_guarded_cell_comes_back(text):
    assert unguarded(guarded(text)) == text and (guarded(text)[:1] == "'" or not is_formula(text)) and not dangerous(guarded(text))


def test_tables_come_back_exactly(tmp_path):
    table = pd.DataFrame({'name': CELLS, '=1+1': CELLS[::-1], 'cost': [(-1.) ** i * i / 7 for i in range(len(CELLS))]})
    (tmp_path/'t.csv').write_text(csv_text(table), encoding='utf-8', newline='')
    again = read_csv(tmp_path/'t.csv', keep_default_na=False)
    assert again.to_dict() == table.to_dict()
    with open(tmp_path/'t.csv', encoding='utf-8', newline='') as f: raw = list(csv.reader(f))
    assert not [c for row in raw for c in row if dangerous(c)] and len(raw) == 1 + len(CELLS)
    assert csv_text(pd.DataFrame(dict(a=[-1.5, None], b=['x', None]))) == 'a,b\n-1.5,x\n,\n', 'numbers and plain texts as before'
    shipped = ROOT/'data/results/cpu/samples.csv'; pd.testing.assert_frame_equal(read_csv(shipped), pd.read_csv(shipped))


def test_published_cells_are_guarded_once(home):
    rows = [dict(seed=0, policy=f'{k}', prompt=x, response=x, cost=-.5) for k, x in enumerate(CELLS)]
    path = publish(rows, 'cpu/samples.csv', 'evaluate/a', ['policy']); first = path.read_bytes()
    publish(rows, 'cpu/samples.csv', 'evaluate/a', ['policy']); assert path.read_bytes() == first
    with open(path, encoding='utf-8', newline='') as f: raw = list(csv.DictReader(f))
    assert not [c for r in raw for c in r.values() if dangerous(c)] and raw[0]['cost'] == '-0.5'
    told = Results('cpu', 0, str(home/'data/results')).every('samples').set_index('policy').prompt.fillna('')
    assert [told[k] for k in range(len(CELLS)) if CELLS[k] != 'NaN'] == [re.sub('\r\n?', '\n', x) for x in CELLS if x != 'NaN']


def test_tables_of_judges_are_guarded(home, monkeypatch):
    rows = [dict(judge=x, kind='cost', measure='a wins', value=.5, low=.4, high=.6, n=4) for x in TEXTS]
    (home/'judged.csv').write_text(csv_text(pd.DataFrame(rows)), encoding='utf-8', newline='')
    record = SimpleNamespace(path=lambda name: home/name, manifest=dict(parent_folders=dict(a='a', b='b')))
    monkeypatch.setattr(judge, 'Record', lambda folder: SimpleNamespace(manifest=dict(policy=' '.join(TEXTS))))
    said = judge.table(record)
    assert not STEERS.search(said) and len(said.splitlines()) == len(TEXTS) + 3
    paths = [*(ROOT/'saferlhf').rglob('*.py'), *(ROOT/'tools').glob('*.py'), *notebooks('templates', 'paper', 'bench', 'tutorials')]
    writing = {p.name for p in paths if re.search(r'\.to_csv\(|csv\.(Dict)?[wW]riter\(', p.read_text())}
    assert writing == {'escape.py', 'execute.py'}, 'one helper writes tables with texts, and `publish`, whose cells it guards'


# --- join

GOOD = dict(round='1', model='cost', metric='sign', label_source='human', n='40', value='0.5', low='0.4', high='-1e-05', paper='', seed='0',
            run_id='cost/gpu-1-abba8d74c61b')
KINDS = {'not a number': [('n', 'forty'), ('value', '=1+1'), ('low', '1;2'), ('high', '<script>'), ('value', '0x1f'), ('value', '1,5')],
         'not a whole number': [('seed', '-1'), ('seed', '0.5'), ('seed', '')],
         'not the id of a run': [('run_id', x) for x in ('nothing', '=cmd/x', '../x/y', '', 'a/<b>', "a/b'", '-a/b')],
         'formula': [('label_source', '=HYPERLINK("x")'), ('model', '@x'), ('metric', '+x'), ('label_source', ' -x'), ('model', '\tx')],
         'one line': [('label_source', 'a\nb'), ('label_source', 'a\x1b[31m')]}
BAD = [(*x, why) for why, cells in KINDS.items() for x in cells]


def machine(folder, *rows, columns=None):
    folder.mkdir(exist_ok=True); out = io.StringIO()
    w = csv.DictWriter(out, columns or list(rows[0]), lineterminator='\n', quoting=csv.QUOTE_ALL); w.writeheader(); w.writerows(rows)
    (folder/'table1.csv').write_text(out.getvalue(), encoding='utf-8', newline=''); return folder


@pytest.mark.parametrize('column, cell, why', BAD)
def test_a_cell_that_does_not_belong_is_not_joined(home, capsys, column, cell, why):
    again = machine(home/'again', GOOD, GOOD | dict(metric='rank', label_source='a "b"'), GOOD | dict(round='2') | {column: cell})
    publish([dict(seed=0, round=1, cost=1., steps=4)], str(again/'policies.csv'), 'policy/a', ['round'])
    before = {p: p.read_bytes() for p in home.rglob('*.csv')}
    assert main(['join', str(again), '--profile', 'cpu']) == 1
    line = capsys.readouterr().err
    assert f'{again}/table1.csv, line 4, column {column}: ' in line and why in line and len(line.splitlines()) == 1
    assert {p: p.read_bytes() for p in home.rglob('*.csv')} == before, 'nothing was merged'


def test_lines_are_those_of_the_file_and_columns_are_names(home):
    def refused(text, why):
        (home/'again').mkdir(exist_ok=True); (home/'again/samples.csv').write_text(text, encoding='utf-8', newline='')
        with pytest.raises(ValueError) as e: join(home/'again', 'cpu')
        assert why in str(e.value) and str(home/'again/samples.csv') in str(e.value), e.value
    head = 'policy,prompt,response,harmful,mild,seed,run_id\n'
    refused(head + 'a,"one\ntwo\nthree",b,True,True,0,evaluate/x\na,c,d,maybe,True,0,evaluate/x\n',
            "line 5, column harmful: 'maybe' is not a number")
    refused(head + 'a,b,c,True,True,0\n', 'line 2: 6 cells, not 7')
    refused(head.replace('mild', '=x') + 'a,b,c,True,True,0,evaluate/x\n', "line 1: '=x' is no name of a column")
    refused(head.replace('mild', 'policy') + 'a,b,c,True,True,0,evaluate/x\n', "line 1: 'policy' is no name of a column, or is there twice")
    refused(head + 'a,"=1+1",c,True,True,0,evaluate/x\n', "line 2, column prompt: '=1+1' is what a spreadsheet takes for a formula")
    refused(head + 'a,"b,c,True,True,0,evaluate/x\n', 'damaged')


def test_what_was_published_is_joined_as_it_was(home):
    rows = [dict(seed=0, policy=f'p{k}', prompt=x, response=x, harmful=True, mild=False) for k, x in enumerate(CELLS)]
    publish(rows, str(home/'again/samples.csv'), 'evaluate/gpu-a', ['policy'])
    publish([{k: v for k, v in GOOD.items() if k != 'run_id'}], str(home/'again/table1.csv'), GOOD['run_id'], ['round', 'model', 'metric'])
    for _ in range(2): join(home/'again', 'cpu')
    for name in ('samples', 'table1'):
        assert sorted((home/f'data/results/cpu/{name}.csv').read_bytes()) == sorted((home/f'again/{name}.csv').read_bytes())
    for p in ROOT.glob('data/results/[cg]pu/*.csv'):
        if p.stem in results._KEYS: assert len(results._foreign(p, ['seed', 'run_id'])), 'all that ships is fit to be joined'


# --- terminals

def test_a_terminal_is_not_steered(home, capsys):
    for text in TEXTS: assert not STEERS.search(printable(text)) and len(one_line_of(text).splitlines()) == 1
    assert printable('ta\u200cb \u3000c\td\ne', '') == 'ta\u200cb  c d e'
    rows = [dict(prompt=x, response=x, truncated=False) for x in TEXTS]
    speakers = [SimpleNamespace(name=' '.join(TEXTS)), SimpleNamespace(name='b')]
    for row in rows:
        answer = {k: v for k, v in row.items() if k != 'prompt'}
        for as_json in (False, True): chat._write(row['prompt'], [answer, answer], speakers, as_json)
    out = capsys.readouterr().out
    assert not STEERS.search(out)
    told = [json.loads(x) for x in out.splitlines() if x.startswith('{"')]
    assert [x['prompt'] for x in told[::2]] == TEXTS and told[0]['policy'] == speakers[0].name, 'JSON says the same'
    said = pairs([r | dict(response='x') for r in rows], rows, len(rows))
    assert not STEERS.search(said) and said.count('\n') == 4 * len(rows) - 1
    for loads in (load_preferences, load_prompts):                        # a role of a message is anybody's, too
        with pytest.raises(ValueError) as e: loads([dict(prompt=[dict(role=x, content='a')]) for x in reversed(TEXTS)])
        assert not STEERS.search(str(e.value))
    assert not STEERS.search(source_name('/a/\x1b[31mb.jsonl'))
    assert main(['export', str(home/'\x1b[31mred'), 'x']) == 1 and not STEERS.search(capsys.readouterr().err)
