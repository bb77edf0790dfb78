"README.md is its notebook, and what it promises is there."
import re

from project import ROOT, cells
from readme import INDEX, readme

TEXT = (ROOT/'README.md').read_text()


def test_readme_is_the_notebook(): assert readme() == TEXT, 'run: make docs'


def test_links_and_commands_exist():
    for target in re.findall(r'\]\((?!https?:)([^)#]+)\)', TEXT): assert (ROOT/target).exists(), target
    makefile = (ROOT/'Makefile').read_text()
    for target in re.findall(r'\bmake (\w+)\b(?=`|  )', TEXT): assert re.search(rf'^{target}:', makefile, re.M), target
    assert all(word in TEXT for word in ('make reproduce', 'make test', 'Warning', 'Apache-2.0', 'LICENSES.md', 'arxiv.org/abs/2310.12773'))


def test_no_result_is_typed_by_hand():
    "Per cents stand in computed cells only; 95% is the level of the intervals."
    for cell in cells(INDEX):
        if cell['cell_type'] == 'markdown': assert not re.search(r'\d\s*%', cell['source'].replace('95%', '')), cell['source']


def test_the_names_in_contributing_exist():
    "A name in backticks is one of the package, of a notebook, of a test or of the Makefile."
    found = re.findall(r'`([A-Za-z_]\w+)`', (ROOT/'CONTRIBUTING.md').read_text())
    files = [*ROOT.glob('saferlhf/**/*.py'), *ROOT.glob('tools/*.py'), ROOT/'Makefile', ROOT/'settings.ini']
    words = {word for p in files for word in re.findall(r'\w+', p.read_text())} | {p.stem for p in ROOT.glob('nbs/*/*.ipynb')}
    words |= {'parameters', 'replaces'} | {p.name for p in ROOT.glob('nbs/*')}
    assert len(found) > 15 and not [name for name in found if name not in words and name != 'DeprecationWarning']
