"Safe RLHF, literate: see the notebooks in nbs/."
from importlib.metadata import PackageNotFoundError, version

try: __version__ = version('saferlhf')
except PackageNotFoundError: __version__ = '0+source'
