"README.md from nbs/index.ipynb: `make docs` runs the notebook first, the test only compares."
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from notebooks import execute
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT/'nbs/index.ipynb'


def readme(path:Path=INDEX) -> str:
    "The committed notebook as markdown: cells tagged `hide-input` show their output only, links start from the project's folder."
    config = Config(TagRemovePreprocessor={'enabled': True, 'remove_input_tags': ['hide-input']})
    notebook = nbformat.read(path, 4)
    notebook.metadata['language_info'] = {'name': 'python'}          # of the code fences; nbdev-clean leaves it out
    text, _ = MarkdownExporter(config=config).from_notebook_node(notebook)
    text = re.sub(r'\]\(\.\./', '](', text)
    return '<!-- made by `make docs` from nbs/index.ipynb: edit that notebook -->\n\n' + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


if __name__ == '__main__':
    tools = Path(sys.executable).parent
    notebook = nbformat.read(INDEX, 4)
    execute(notebook, INDEX.parent)
    for cell in notebook.cells:
        if cell.cell_type == 'code': cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']     # warnings of one machine
    nbformat.write(notebook, INDEX)
    subprocess.run([tools/'nbdev-clean', '--fname', INDEX], check=True)
    (ROOT/'README.md').write_text(readme(), encoding='utf-8')
    print('README.md written from nbs/index.ipynb')
