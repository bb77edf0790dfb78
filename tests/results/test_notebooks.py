"What a visitor sees: every notebook leads on, and what it shows was made by the cells and the results that are there now."
import base64
import json
import re
import sys
from pathlib import Path

import pytest
from project import ROOT, cells, notebooks

sys.path.insert(0, str(ROOT/'tools'))
import notebooks as tool  # noqa: E402

STORED = json.loads(tool.STORED.read_text()) if tool.STORED.exists() else {}
SLOW = [p for p in sorted(tool.NBS.glob(tool.SLOW)) if str(p.relative_to(tool.NBS)) in STORED or any(c.get('outputs') for c in cells(p))]
SHOWN = [p for folder in tool.RUN for p in notebooks(folder)] + SLOW


def pictures(path):
    "Bytes of the pictures that a notebook stores."
    for c in cells(path):
        for data in (o.get('data', {}) for o in c.get('outputs', [])):
            if 'image/png' in data: yield base64.b64decode(''.join(data['image/png']))
            if 'image/svg+xml' in data: yield ''.join(data['image/svg+xml']).encode()


@pytest.mark.parametrize('path', SHOWN, ids=lambda p: p.stem)
def test_outputs_are_those_of_the_cells_and_results(path):
    assert tool.is_current(path, STORED), f'run: python tools/notebooks.py store {path.stem}'
    for picture in pictures(path):
        assert len(picture) < tool.LARGEST
        assert b'<dc:date>' not in picture, 'a picture with a date in it changes at every run'


def test_a_changed_cell_output_or_result_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, 'NBS', tmp_path); monkeypatch.setattr(tool, 'ROOT', tmp_path)
    (tmp_path/'data/results').mkdir(parents=True); (tmp_path/'data/results/a.csv').write_text('1')
    cell = dict(cell_type='code', id='x', metadata={}, source=['1 + 1'], outputs=[dict(output_type='stream', text='2')])
    path = tmp_path/'one.ipynb'; path.write_text(json.dumps(dict(cells=[cell])))
    stored = {'one.ipynb': tool.made_of(path) | dict(results=tool.results(['a.csv']))}
    assert tool.is_current(path, stored) and not tool.is_current(path, {})
    for changed in (cell | dict(source=['1 + 2']), cell | dict(outputs=[dict(output_type='stream', text='3')]), cell | dict(outputs=[])):
        path.write_text(json.dumps(dict(cells=[changed]))); assert not tool.is_current(path, stored)
    path.write_text(json.dumps(dict(cells=[cell]))); assert tool.is_current(path, stored)
    (tmp_path/'data/results/a.csv').write_text('2'); assert not tool.is_current(path, stored)


def test_paths_of_this_machine_are_not_stored():
    stream = lambda text: dict(output_type='stream', name='stdout', text=text)
    here = stream(f'done: {tool.ROOT}/runs/sft/mine-1 of {Path.home()}/.cache/it')
    assert tool.kept(here) == stream('done: runs/sft/mine-1 of ~/.cache/it')
    assert tool.kept(stream('done: /tmp/runs/sft/mine-1')) is None


def test_the_notebooks_of_the_method_show_pictures_and_stay_small():
    bare = [p.stem for p in notebooks('method') if not any(pictures(p))]
    assert set(bare) <= {'01_text'}, bare
    assert sum(p.stat().st_size for p in notebooks()) < 6_000_000


def test_every_notebook_leads_to_its_neighbours():
    for path, text in tool.links().items():
        assert cells(path)[-1]['source'] == text, f'{path.name}: run python tools/notebooks.py links'
        for target in re.findall(r'\]\(([^)]+)\)', text): assert (path.parent/target).exists(), (path, target)


def test_a_notebook_is_run_and_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, 'NBS', tmp_path)
    read = f"pd.read_csv({str(ROOT/'data/results/two_token_world.csv')!r})\n"
    lines = 'import pandas as pd\n', read, 'import matplotlib.pyplot as plt\n', 'plt.plot([1, 2]);'
    cell = dict(cell_type='code', id='x', metadata={}, source=list(lines), outputs=[], execution_count=None)
    nb = json.loads(notebooks('method')[0].read_text()); path = tmp_path/'one.ipynb'
    path.write_text(json.dumps(nb | dict(cells=[cell])))
    assert tool.run(path) == ['two_token_world.csv']
    output, = cells(path)[0]['outputs']; assert output['output_type'] == 'display_data' and output['data']['image/png']
    assert path.stat().st_size < tool.LARGEST
