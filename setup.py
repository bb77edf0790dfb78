import shutil
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = {'nbs/templates': '_templates', 'nbs/paper': '_paper', 'data': '_data'}     # a wheel works outside a checkout

class WithData(build_py):
    def run(self):
        super().run()
        for source, name in {} if self.editable_mode else SHIPPED.items():
            target = Path(self.build_lib)/'saferlhf'/name
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns('results', '.ipynb_checkpoints', '__pycache__'))

cfg = ConfigParser(delimiters=['=']); cfg.read('settings.ini'); c = cfg['DEFAULT']
setup(version=c['version'], description=c['description'], install_requires=c['requirements'].split(),
      extras_require={n: c[f'{n}_requirements'].split() for n in ('dev', 'fetch')}, cmdclass={'build_py': WithData})
