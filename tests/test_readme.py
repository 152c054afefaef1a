"""The README's examples run, and what it names exists."""

import pathlib
import re

import pytest

from jaxformers.cli.parser import build_parser

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / 'README.md').read_text()


def blocks(language):
  return re.findall(rf'```{language}\n(.*?)```', TEXT, re.DOTALL)


@pytest.mark.parametrize('code', blocks('python'), ids=range(3))
def test_python_examples_run(code):
  exec(compile(code, 'README.md', 'exec'), {'__name__': 'readme'})


def test_shell_examples_parse():
  commands = [
    line.replace('\\\n', ' ')
    for block in blocks('sh')
    for line in re.findall(r'^jaxformers (?:.*\\\n)*.*$', block, re.MULTILINE)
  ]
  assert len(commands) == 6
  import shlex

  for command in commands:
    build_parser().parse_args(shlex.split(command)[1:])


def test_make_targets_exist():
  makefile = (ROOT / 'Makefile').read_text()
  for target in re.findall(
    r'^make (\w+)', '\n'.join(blocks('sh')), re.MULTILINE
  ):
    assert f'\n{target}: ' in makefile


def test_links_and_pictures_exist():
  for target in re.findall(r'\]\(([^)]+)\)', TEXT):
    assert target.startswith('https://') or (ROOT / target).exists(), target
