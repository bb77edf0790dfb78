"What strangers may write in prompts, answers and names, and how it is seen whether a page runs or fetches any of it."
import http.server
import json
import re
import shutil
import subprocess
import tempfile
import threading
from html.parser import HTMLParser

import pandas as pd
from project import notebook_functions

# mild texts in the forms of lists of ways to run scripts; {u} is a server that notes what is asked for
MARKUP = r'''
<script>fetch('{u}/1')</script>
<script src="{u}/2.js"></script>
<img src="{u}/3.png">
<img src=x onerror="fetch('{u}/4')">
<svg onload="fetch('{u}/5')"></svg>
<svg><script>fetch('{u}/6')</script></svg>
<iframe src="{u}/7"></iframe>
<iframe srcdoc="<script>parent.fetch('{u}/8')</script>"></iframe>
<link rel="stylesheet" href="{u}/9.css">
<style>@import url({u}/10.css); body { background: url({u}/11.png) }</style>
<p style="background:url({u}/12.png)">a</p>
<meta http-equiv="refresh" content="0;url={u}/13">
<base href="{u}/14/">
<object data="{u}/15"></object><embed src="{u}/16">
<video src="{u}/17" autoplay poster="{u}/18.png"></video><audio src="{u}/19" autoplay></audio>
<body onload="fetch('{u}/20')">
<input autofocus onfocus="fetch('{u}/21')">
<details open ontoggle="fetch('{u}/22')">a</details>
<form action="javascript:fetch('{u}/23')"><button id=run>a</button></form>
<math><mtext><table><mglyph><style><img src=x onerror="fetch('{u}/24')"></style></mglyph></table></mtext></math>
<noscript><p title="</noscript><img src=x onerror=fetch('{u}/25')>"></noscript>
</code></pre></td></table></section></details><img src={u}/26.png>
"><img src={u}/27.png><!--
--><img src={u}/28.png>
]]><img src={u}/29.png>
![a picture]({u}/30.png)
![a picture][r] [r]: {u}/31.png
[a walk](javascript:fetch('{u}/32'))
[a walk](JaVaScRiPt:fetch('{u}/33')) [b](data:text/html,<script>fetch('{u}/34')</script>) [c](vbscript:x)
[a walk](&#106;avascript:fetch('{u}/35')) [b](java&Tab;script:x)
<javascript:fetch('{u}/36')> <a href="javascript:fetch('{u}/37')" id=a>a</a>
`` ` `<img src={u}/38.png>`
\`<img src={u}/40.png>\` \\`<img src={u}/41.png>\\`
$\href{javascript:fetch('{u}/44')}{x}$ $$\text{<img src={u}/45.png>}$$
$\text{<script>fetch('{u}/46')</script>}$
&lt;script&gt;fetch('{u}/47')&lt;/script&gt; &#60;img src={u}/48.png&#62;
<img/src={u}/49.png/onerror=fetch('{u}/50')>
<<img src={u}/51.png>//<
<IMG """><SCRIPT>fetch('{u}/52')</SCRIPT>">
<a href=x ping="{u}/53" autofocus onfocus=fetch('{u}/54')>a</a>
[x]\(javascript:fetch('{u}/55')) \![a]({u}/56.png) \\![a]({u}/57.png)
{{constructor.constructor("fetch('{u}/58')")()}} ${fetch('{u}/59')}
=HYPERLINK("{u}/60","a walk")
@SUM(1+1)*cmd|' /C calc'!A0
+1+1
-2+3
 '"=1+1
'''.strip().split('\n')
LINES = ('```\n<img src={u}/39.png>', 'a | b |\n| --- |\n<img src={u}/42.png>', 'a\n\n<img src={u}/43.png>\n\n    code', '\t=1+1', '\r=1+1',
         '\x1b[31mred\x1b]0;title\x07 \u202eleft\u202c \x9b2J')


def nasty(url='http://127.0.0.1:9'):
    "The texts, with a server in them."
    return [x.replace('{u}', url) for x in (*MARKUP, *LINES)]


LIVE = set('''script iframe object embed link base form input button video audio source svg style frame frameset applet
    noscript template'''.split())
STARTS = set('style srcset srcdoc ping background formaction xlink:href action poster'.split())


class Live(HTMLParser):
    "What in a page would run, or fetch something: a list of what was found."
    def __init__(self, page, scheme=('#', 'https:', 'http:', 'mailto:')):
        super().__init__(); self.found, self.scheme, self.tags = [], scheme, []
        self.feed(page); self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag in LIVE: self.found.append(tag)
        for k, v in attributes:
            v = (v or '').strip().lower()
            if k.startswith('on') or k in STARTS: self.found.append(f'{tag} {k}')
            if k == 'href' and not v.startswith(self.scheme): self.found.append(f'{tag} href={v}')
            if k == 'src' and not v.startswith('data:image/'): self.found.append(f'{tag} src={v}')
            if k == 'http-equiv' and v == 'refresh': self.found.append('refresh')


def browser():
    "A headless browser, or None."
    return next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)


class Server:
    "A page on this machine, and every path that was asked for beside it."
    def __enter__(self):
        outer, self.page, self.asked = self, '', []
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                first = self.path == '/page'
                if not first: outer.asked.append(self.path)
                self.send_response(200 if first else 404); self.send_header('Content-Type', 'text/html; charset=utf-8'); self.end_headers()
                if first: self.wfile.write(outer.page.encode('utf-8', 'replace'))
            do_POST = do_GET
            def log_message(self, *_): pass
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_): self.server.shutdown(); self.server.server_close()

    def seen(self, page):
        "What a browser asks for when it shows the page: paths."
        self.page, self.asked = page, []
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([browser(), '--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', f'--user-data-dir={folder}',
                            '--virtual-time-budget=4000', '--dump-dom', f'{self.url}/page'], capture_output=True, timeout=90, check=True)
        return sorted(x for x in self.asked if x != '/favicon.ico')


# --- what is made of them

def rendered(text):
    "Markdown as a renderer that lets HTML through shows it."
    from nbconvert.filters.markdown_mistune import markdown2html_mistune
    return markdown2html_mistune(text)


def frame(texts):
    "A table of them, in columns, too."
    return pd.DataFrame({'policy': texts, 'label source': texts, '<b>x</b>': texts})


def shown(texts):
    "Outputs of the paper notebooks, as they make them of such rows."
    from saferlhf.reproduction.tables import markdown
    samples = notebook_functions('paper/rounds').samples_markdown
    rows = pd.DataFrame(dict(policy=texts, prompt=texts, response=texts, harmful=False, mild=True))
    return [markdown(frame(texts)), samples(rows, prompts=len(texts), chars=500)]


def notebook(path, texts, raw):
    "An executed notebook that shows the rows; raw: also as older notebooks did, and in every kind of output."
    from nbformat import v4
    def out(kind, text): return v4.new_output('display_data', {kind: text})
    def said(text): return v4.new_output('stream', text=text)
    tables = [out('text/markdown', x) for x in shown(texts)]
    outputs = [*tables, out('text/html', frame(texts).to_html()), said('\n'.join(texts))]
    cells = [v4.new_markdown_cell('# Title'), v4.new_code_cell('1', outputs=outputs)]
    for x in texts if raw else ():
        every = [out(kind, x) for kind in ('text/markdown', 'text/html', 'image/svg+xml', 'application/javascript', 'text/latex')]
        cells += [v4.new_markdown_cell(f'## {x}\n\n{x}'), v4.new_code_cell(x, outputs=[*every, said(x)])]
    path.write_text(json.dumps(v4.new_notebook(cells=cells)))
    return path


def page(folder, texts, raw=True):
    "A report of such a notebook, with such names of runs and files."
    from saferlhf.apps import report
    runs = {f'policy/{k}-{x}': [x] for k, x in enumerate(texts)}
    return report._page({'one': notebook(folder/'one.ipynb', texts, raw)}, '<script>1</script>', runs)


def card(home, texts):
    "Head and body of a card of ours, in a folder of runs, whose every name is a stranger's."
    from saferlhf.data import data_path
    from saferlhf.models import ScoreModel, load_tokenizer
    from saferlhf.record.card import write_card
    from saferlhf.record.run import Run
    every, base, nano = ' '.join(texts), home/'base', data_path('models/nano')
    ScoreModel.from_pretrained(nano, 'cost').save_pretrained(base); load_tokenizer(nano).save_pretrained(base)
    told = dict(saferlhf_base=dict.fromkeys(('name', 'license', 'note'), every), license=every)
    (base/'README.md').write_text(f'---\n{json.dumps(told)}\n---\n')
    run = Run.start('cost', dict(labels=every), data={'data/train.jsonl': 'ab'} | {x: 'ab' for x in texts})
    try:
        ScoreModel.from_pretrained(base, 'cost').save_pretrained(run.path('model'))
        t = load_tokenizer(base); lines = re.sub('[{}]', '', every)
        t.chat_template = t.chat_template.replace('BEGINNING', f'```\n{lines}\n```'); t.save_pretrained(run.path('model'))
        rows = [dict(round=1, label_source=x, model=x, metric=x, n=4, value=.5, low=.4, high=.6) for x in texts]
        return write_card(run, base, dict(table1=rows) | {x: 1. for x in texts}).read_text(encoding='utf-8').split('\n---\n', 1)
    finally: run.close()
