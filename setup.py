from configparser import ConfigParser
from setuptools import setup
cfg = ConfigParser(delimiters=['=']); cfg.read('settings.ini'); c = cfg['DEFAULT']
setup(version=c['version'], description=c['description'], install_requires=c['requirements'].split(),
      extras_require={'dev': c['dev_requirements'].split()})
