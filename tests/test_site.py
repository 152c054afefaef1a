"""What the site shows is what the code does."""

import fnmatch
import pathlib
import re
import shlex
import sys

import pytest

from jaxformers.cli.parser import build_parser
from jaxformers.cli.program import main
from jaxformers.train.sharding import RULES

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'
sys.path.append(str(DOCS))

import public_names  # noqa: E402

PAGES = sorted(DOCS.glob('*.md'))
FAQ = re.findall(
  r'```python raises\n(.*?)```\n\n```text\n(.*?)\n```',
  (DOCS / 'faq.md').read_text(),
  re.DOTALL,
)


@pytest.mark.parametrize(
  ('code', 'message'), FAQ, ids=[message[:30] for _, message in FAQ]
)
def test_errors_are_those_of_the_page(code, message):
  with pytest.raises(ValueError, match=f'^{re.escape(message)}'):
    exec(compile(code, 'faq.md', 'exec'), {'__name__': 'faq'})


def test_all_errors_of_the_page_have_their_text():
  assert len(FAQ) == (DOCS / 'faq.md').read_text().count('```python') > 10


def test_the_table_of_letters_is_that_of_the_trainer():
  rows = re.findall(
    r'^\| `([A-Z])` \| .* \| `(\w+)` \|$',
    (DOCS / 'concepts.md').read_text(),
    re.MULTILINE,
  )
  assert dict(rows) == RULES


def test_every_public_name_has_its_place_in_the_reference():
  listed = [
    (package, module)
    for page in (DOCS / 'api').glob('*.md')
    for package, modules in public_names.listed(page.read_text()).items()
    for module in modules
  ]
  assert sorted(listed) == sorted(
    (f'jaxformers.{package}', module)
    for package in public_names.PACKAGES
    for module in public_names.public(f'jaxformers.{package}')
  )


def test_every_page_is_in_the_table_of_contents():
  blocks = re.findall(
    r'```\{toctree\}\n(.*?)```', (DOCS / 'index.md').read_text(), re.DOTALL
  )
  entries = [
    line for b in blocks for line in b.splitlines() if line[:1] not in ':'
  ]
  for page in (*PAGES, *(DOCS / 'api').glob('*.md')):
    name = str(page.relative_to(DOCS).with_suffix(''))
    if name != 'index':
      matches = [fnmatch.fnmatch(name, entry) for entry in entries]
      assert sum(matches) == 1, name


def test_commands_parse():
  for page in PAGES:
    for block in re.findall(r'```sh\n(.*?)```', page.read_text(), re.DOTALL):
      for line in block.replace('\\\n', ' ').splitlines():
        if line.startswith('jaxformers '):
          build_parser().parse_args(shlex.split(line, comments=True)[1:])


def test_a_mixer_of_a_page_trains_and_gives_way_to_another(tmp_path, capsys):
  text = (DOCS / 'own_mixer.md').read_text()
  file = tmp_path / 'gated_convolution.py'
  file.write_text(re.search(r'```python\n(.*?)```', text, re.DOTALL)[1])
  (tmp_path / 'text.txt').write_text('In the beginning.\n' * 100)
  small = [
    'steps=2', 'batch_size=8', 'data.length=8', 'model.stack.depth=1',
    'model.width=8', 'preview=None', f'data.path={tmp_path / "text.txt"}',
    'evaluate_batches=1', 'model.stack.block.mixer.taps=3',
  ]  # fmt: skip
  settings = [f'--set={setting}' for setting in small]
  other = '--set=model.stack.block.mixer=S4D(state_size=2)'
  assert main(['train', str(file), '--show', *settings[:-1], other]) == 0
  assert 'mixer: S4D' in capsys.readouterr().out
  workdir = tmp_path / 'own'
  assert main(['train', str(file), '--workdir', str(workdir), *settings]) == 0
  assert (workdir / 'loss.png').exists()
  assert 'bits per byte' in capsys.readouterr().out
