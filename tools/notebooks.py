"""What a visitor sees of the notebooks: `links` writes the way from one to the next, `store` runs them and keeps their pictures.

    python tools/notebooks.py links
    python tools/notebooks.py store [PART OF A PATH ...] [--all]

`store` runs every notebook whose cells, or the results that it reads, have changed since (`--all`: every one), and notes in nbs/stored.json
what each output was made of. `store tutorials` trains SmolLM2, whose runs are kept in runs/. tests/results/test_notebooks.py holds both."""
import argparse
import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, STORED = ROOT/'nbs', ROOT/'nbs/stored.json'
CHAINS = ('.', 'method', 'hardware', 'record', 'reproduction', 'apps'), ('templates',), ('paper',), ('bench',), ('tutorials',)
RUN = 'method', 'hardware', 'record', 'reproduction', 'apps', 'paper'       # folders whose notebooks are stored with their pictures
SLOW = 'tutorials/0*.ipynb'                                                 # minutes each: stored when parts of paths are given
LARGEST = 40_000                                                            # bytes of a stored picture
WATCH = '''import json, sys
_opened = set()
def _note(event, arguments):
    if event == 'open' and 'data/results' in str(arguments[0]): _opened.add(str(arguments[0]).split('data/results/')[-1])
sys.addaudithook(_note)'''


def chains() -> list[list[Path]]:
    "Notebooks in reading order, chain by chain."
    of = lambda folder: sorted(p for p in (NBS/folder).glob('*.ipynb') if p.name != 'index.ipynb')
    return [[p for folder in chain for p in of(folder)] for chain in CHAINS]


def links() -> dict[Path, str]:
    "Notebook -> the markdown that leads to the one before, to the index and to the one after."
    def link(here, to): return f'[{to.stem}]({"../" if here.parent != NBS else ""}{to.relative_to(NBS)})'
    out = {}
    for chain in chains():
        for k, here in enumerate(chain):
            before = [f'← {link(here, chain[k - 1])}'] if k else []
            after = [f'{link(here, p)} →' for p in chain[k + 1:k + 2]]
            out[here] = ' · '.join([*before, link(here, NBS/'index.ipynb'), *after])
    return out


def source(cell) -> str: return ''.join(cell['source'])


def sha(text) -> str: return hashlib.sha256(text if isinstance(text, bytes) else text.encode()).hexdigest()[:16]


def write(path, notebook): path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')


def write_links():
    "The last cell of each notebook, tagged `nav`."
    for path, text in links().items():
        notebook = json.loads(path.read_bytes())
        cells = [c for c in notebook['cells'] if 'nav' not in c['metadata'].get('tags', [])]
        cell = dict(cell_type='markdown', id='nav', metadata=dict(tags=['nav']), source=[text])
        if notebook['cells'] != [*cells, cell]: write(path, notebook | dict(cells=[*cells, cell]))


def slim(png:bytes) -> bytes:
    "A picture of few colours in a third of the bytes."
    from PIL import Image
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert('RGB').quantize(256, dither=Image.Dither.NONE).save(out, 'png', optimize=True)
    return out.getvalue()


def kept(output) -> dict | None:
    "An output as it is stored: pictures made small; no warnings, no paths of this machine."
    if output.get('name') == 'stderr': return None
    data = output.get('data', {})
    if png := data.get('image/png'):
        return output | dict(data={'image/png': base64.b64encode(slim(base64.b64decode(png))).decode() + '\n'}, metadata={})
    text = json.dumps(output, ensure_ascii=False).replace(f'{ROOT}/', '').replace(f'{Path.home()}/', '~/')
    output = json.loads(text)
    return None if len(text) > LARGEST or re.search(r'/(home|root|tmp|work|var|private)/|<[\w.]+ object at|Axes\(', text) else output


def made_of(path:Path) -> dict:
    "Hashes of a notebook's code, and of each cell that has an output together with it."
    cells = [c for c in json.loads(path.read_bytes())['cells'] if c['cell_type'] == 'code']
    outputs = {c['id']: sha(source(c) + json.dumps(c['outputs'], sort_keys=True)) for c in cells if c['outputs']}
    return dict(code=sha('\n'.join(map(source, cells))), outputs=outputs)


def results(names) -> dict:
    "Results file -> its hash."
    return {n: sha((ROOT/'data/results'/n).read_bytes()) for n in sorted(names) if (ROOT/'data/results'/n).is_file()}


def is_current(path:Path, stored:dict) -> bool:
    "Whether a notebook's outputs are those of its cells and of the results that it read."
    known = stored.get(str(path.relative_to(NBS)))
    return bool(known) and known == made_of(path) | dict(results=results(known['results']))


def execute(notebook, folder:Path):
    "Run a notebook's cells in a folder, by this interpreter: other kernels may be called python3."
    from jupyter_core.utils import run_sync
    from nbclient import NotebookClient
    from saferlhf.record.execute import own_kernel
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        kernel = own_kernel(home)
        try: NotebookClient(notebook, km=kernel, resources=dict(metadata=dict(path=str(folder)))).execute()
        finally: run_sync(kernel.shutdown_kernel)(now=True)                     # its models would stay in memory


def run(path:Path) -> list[str]:
    "Execute a notebook and store its outputs; the results files that it opened."
    import nbformat
    notebook = nbformat.read(path, 4)
    watched = nbformat.from_dict(notebook)
    new = nbformat.v4.new_code_cell
    watched.cells = [new(WATCH), *watched.cells, new('print(json.dumps(sorted(_opened)))')]
    execute(watched, path.parent)
    saved = json.loads(path.read_bytes())
    for cell, done in zip(saved['cells'], watched.cells[1:-1], strict=True):
        if cell['cell_type'] != 'code': continue
        outputs = json.loads(json.dumps([kept(o) for o in done.outputs]))
        cell['outputs'] = [o | ({'execution_count': None} if 'execution_count' in o else {}) for o in outputs if o]
    write(path, saved)
    return json.loads(watched.cells[-1].outputs[0].text)


def store(parts, every):
    "Run what has changed; clean what was run, so that export and clean find nothing to do."
    stored = json.loads(STORED.read_bytes()) if STORED.exists() else {}
    os.environ |= dict(SAFERLHF_RUNS=str(ROOT/'runs'), DS_ACCELERATOR='cpu')
    for path in [*(p for folder in RUN for p in sorted((NBS/folder).glob('*.ipynb'))), *(sorted(NBS.glob(SLOW)) if parts else [])]:
        name = str(path.relative_to(NBS))
        if parts and not any(p in name for p in parts) or not every and is_current(path, stored): continue
        print(name, flush=True)
        opened = run(path)
        subprocess.run([Path(sys.executable).parent/'nbdev-clean', '--fname', path], check=True)
        stored[name] = made_of(path) | dict(results=results(opened))
        STORED.write_text(json.dumps(stored, indent=1, sort_keys=True) + '\n', encoding='utf-8')   # after each: an interruption loses one


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('what', choices=('links', 'store'))
    p.add_argument('parts', nargs='*', help='parts of paths; none: every notebook')
    p.add_argument('--all', action='store_true', help='also what has not changed')
    a = p.parse_args()
    write_links() if a.what == 'links' else store(a.parts, a.all)
