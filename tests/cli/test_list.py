import json

import pytest

from jaxformers.cli import list as listing
from jaxformers.cli import main
from jaxformers.data import CORPORA


def make_run(folder, lines):
  folder.mkdir(parents=True)
  (folder / 'experiment.json').write_text('{}')
  text = ''.join(f'{json.dumps(line)}\n' for line in lines)
  (folder / 'metrics.jsonl').write_text(text + '{"step": 99, "spl')


@pytest.fixture
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return tmp_path


def test_runs_show_their_last_numbers(here, capsys):
  lines = [
    {'step': 1, 'split': 'train', 'loss': 5.5},
    {'step': 2, 'split': 'heldout', 'loss': 1.0, 'bits_per_byte': 2.3456},
    {'step': 12, 'split': 'train', 'loss': 4.25},
  ]
  make_run(here / 'runs' / 'a', lines)
  make_run(here / 'runs' / 'group' / 'b', [])
  (here / 'runs' / 'no-run').mkdir()
  assert main(['list', 'runs']) == 0
  assert capsys.readouterr().out == (
    'runs:\n'
    '  runs/a        step 12  loss 4.250  held-out bits/byte 2.346\n'
    '  runs/group/b  step -   loss -      held-out bits/byte -\n'
  )


def test_a_run_without_metrics_is_listed(here):
  make_run(here / 'runs' / 'a', [])
  (here / 'runs' / 'a' / 'metrics.jsonl').unlink()
  [row] = listing.run_rows(here / 'runs')
  assert row[1:] == ('step -', 'loss -', 'held-out bits/byte -')


def test_experiments_show_their_claim_and_are_not_run(here, capsys):
  folder = here / 'experiments' / 'deep'
  folder.mkdir(parents=True)
  (folder / 'a.py').write_text(
    '"""Claims this.\n\nAnd more."""\nraise SystemExit\ndef experiment(): ...\n'
  )
  (folder / 'b.py').write_text('def experiment(): ...\n')
  (folder / 'broken.py').write_text('def experiment(:\n')
  (folder / 'helper.py').write_text('"""Has no experiment."""\n')
  assert main(['list', 'experiments']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[:3] == [
    'experiments:',
    '  experiments/deep/a.py       Claims this.',
    '  experiments/deep/b.py       (no docstring)',
  ]
  assert lines[3].startswith('  experiments/deep/broken.py  (cannot be parsed:')
  assert len(lines) == 4


def test_studies_show_the_verdict_of_their_result(here, capsys):
  folder = here / 'experiments'
  (folder / 'results').mkdir(parents=True)
  for name in 'ab':
    (folder / f'{name}.py').write_text('"""Claims it."""\ndef study(): ...\n')
  verdict = {'verdict': 'not reproduced'}
  (folder / 'results' / 'a.json').write_text(json.dumps(verdict))
  assert main(['list', 'studies']) == 0
  assert capsys.readouterr().out == (
    'studies:\n'
    '  experiments/a.py  not reproduced  Claims it.\n'
    '  experiments/b.py  -               Claims it.\n'
  )
  assert listing.experiment_rows(folder) == []


def test_without_a_word_runs_experiments_and_studies_are_listed(here, capsys):
  assert main(['list']) == 0
  out = capsys.readouterr().out
  assert out.startswith(
    'runs:\n  (none)\nexperiments:\n  (none)\nstudies:\n  (none)\nalso: '
  )


def test_corpora_show_description_and_licence(capsys):
  assert main(['list', 'corpora']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 1 + len(CORPORA)
  [kjv] = [line for line in lines if line.startswith('  kjv ')]
  assert CORPORA['kjv'].description in kjv
  assert kjv.endswith(CORPORA['kjv'].licence)


def test_parts_are_grouped_by_package_with_their_first_line(capsys):
  assert main(['list', 'parts']) == 0
  out = capsys.readouterr().out
  mixers = out.split('jaxformers.nn.mixers:\n')[1]
  first = mixers.splitlines()[0].split(maxsplit=1)
  assert first[0] == 'Attention'
  assert first[1].startswith('Multi-head attention')
