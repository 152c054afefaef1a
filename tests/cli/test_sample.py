import io

import pytest

from jaxformers.cli import main
from jaxformers.cli import sample
from jaxformers.train import MeshShape


class FakeRun:
  def __init__(self, pieces):
    self.pieces = pieces

  def sample(self, **options):
    self.options = options
    yield from self.pieces


@pytest.fixture
def opened(monkeypatch):
  """Returns what `open_run` receives and the run that it gives."""
  fake = FakeRun([(0, b' was '), (0, 'light\u00e9'.encode())])

  def open_run(workdir, *, checkpoint, classes, mesh):
    fake.mesh = mesh
    fake.opened = str(workdir), checkpoint, classes
    return fake

  monkeypatch.setattr('jaxformers.train.run.open_run', open_run)
  return fake


class Flushed(io.BytesIO):
  """Notes what can be seen after each flush."""

  def __init__(self):
    super().__init__()
    self.seen = []

  def flush(self):
    if self.seen[-1:] != [self.getvalue()]:
      self.seen.append(self.getvalue())


def test_one_prompt_is_followed_by_its_text(opened, capsysbinary):
  assert main(['sample', 'runs/a', '--prompt', 'There']) == 0
  out = capsysbinary.readouterr().out
  assert out == 'There was light\u00e9\n'.encode()


def test_options_reach_the_run(opened):
  words = '--tokens 7 --temperature 0.5 --top-k 3 --top-p 0.9 --seed 4'.split()
  words += [
    '--checkpoint',
    '120',
    '--stop',
    '\n',
    '--mesh',
    'fsdp=4,tensor=2',
    '--prompt',
    'a',
    '--prompt=b',
  ]
  assert main(['sample', 'runs/a', *words]) == 0
  assert opened.opened[:2] == ('runs/a', 120)
  assert 'LanguageModel' in opened.opened[2]
  assert opened.mesh == MeshShape(data=1, fsdp=4, tensor=2)
  assert opened.options == {
    'prompts': ['a', 'b'],
    'tokens': 7,
    'temperature': 0.5,
    'top_k': 3,
    'top_p': 0.9,
    'stop': '\n',
    'seed': 4,
  }


def test_defaults_are_latest_checkpoint_and_plain_sampling(opened):
  assert main(['sample', 'runs/a', '--prompt', 'a']) == 0
  assert opened.opened[1] == 'latest'
  assert opened.mesh is None
  options = opened.options
  assert (options['temperature'], options['seed']) == (1.0, 0)
  assert options['top_k'] is options['top_p'] is options['stop'] is None


def test_pieces_are_shown_as_they_come_even_within_a_character():
  out = Flushed()
  sample.print_stream('A', [b'b', b'\xc3', b'\xa9'], out)
  expected = ['A', 'Ab', 'Ab\u00e9', 'Ab\u00e9\n']
  assert out.seen == [text.encode() for text in expected]


def test_bytes_that_are_no_text_are_replaced():
  out = io.BytesIO()
  sample.print_stream('', [b'a\xffb', b'\xc3'], out)
  assert out.getvalue().decode() == 'a\ufffdb\ufffd\n'


def test_several_texts_are_printed_one_after_the_other():
  out = io.BytesIO()
  pieces = [(1, b'2'), (0, b'1'), (1, b'\xc3'), (0, b'!'), (1, b'\xa9')]
  sample.print_all(['a', 'b'], pieces, out)
  assert out.getvalue().decode() == (
    "--- 1 of 2: 'a'\na1!\n--- 2 of 2: 'b'\nb2\u00e9\n"
  )


def test_classes_of_ones_own_come_from_the_code_file(opened, tmp_path):
  code = tmp_path / 'mine.py'
  code.write_text(
    'import dataclasses\n'
    '@dataclasses.dataclass(frozen=True)\n'
    'class Mine:\n  x: int = 0\n'
  )
  words = ['--code', str(code)]
  assert main(['sample', 'runs/a', '--prompt', 'a', *words]) == 0
  assert opened.opened[2]['Mine'].__name__ == 'Mine'


def test_a_missing_run_is_named(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert main(['sample', 'runs/lm', '--prompt', 'a']) == 2
  err = capsys.readouterr().err
  assert 'there is no run runs/lm; there are no runs in runs' in err
