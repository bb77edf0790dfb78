"The smoke pipeline, the longest file, first (the Makefile keeps xdist from sorting anew); the size of the package in the end."
import os
import signal
import sys

import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')       # small tensors: threads of two libraries in one another's way cost minutes


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: 'test_smoke' not in item.nodeid)


@pytest.fixture(autouse=True)
def modules_of_one_test(tmp_path_factory):
    "A module that a test writes is gone with it: two tests may write a `mine.py`."
    yield
    own = str(tmp_path_factory.getbasetemp())
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, '__file__', None)).startswith(own): del sys.modules[name]
    sys.path[:] = [p for p in sys.path if not p.startswith(own)]


@pytest.fixture(autouse=True)
def signals_of_one_test(request):
    "What a test, or a fixture of a whole module, leaves to hear Ctrl-C would swallow that of the next one."
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler: return
    request.node.warn(pytest.PytestWarning(f'{request.node.nodeid} left a handler of SIGINT'))


def pytest_terminal_summary(terminalreporter):
    from project import PACKAGE, exported
    sizes = {str(p.relative_to(PACKAGE).with_suffix('')): len(p.read_text().splitlines()) for p in exported()}
    longest = max(sizes, key=sizes.get)
    total = f'{sum(sizes.values())} lines in {len(sizes)} modules'
    terminalreporter.write_line(f'exported: {total}, the longest is {longest} with {sizes[longest]}')
