"The smoke pipeline, the longest file, first (the Makefile keeps xdist from sorting anew); the size of the package in the end."
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')       # small tensors: threads of two libraries in one another's way cost minutes


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: 'test_smoke' not in item.nodeid)


def pytest_terminal_summary(terminalreporter):
    from project import PACKAGE, exported
    sizes = {str(p.relative_to(PACKAGE).with_suffix('')): len(p.read_text().splitlines()) for p in exported()}
    longest = max(sizes, key=sizes.get)
    total = f'{sum(sizes.values())} lines in {len(sizes)} modules'
    terminalreporter.write_line(f'exported: {total}, the longest is {longest} with {sizes[longest]}')
