import os
import subprocess
import sys

import pytest

import jaxformers
from jaxformers.cli import main

COMMANDS = ('train', 'sample', 'eval', 'report', 'list')

PARSE_HELP = """
import sys
from jaxformers.cli import main
try:
  main(sys.argv[1:])
finally:
  heavy = {'jax', 'numpy', 'flax', 'jaxformers.train'} & set(sys.modules)
  print('heavy:', sorted(heavy), file=sys.stderr)
"""


def run_python(*arguments, **options):
  return subprocess.run(
    [sys.executable, *arguments], capture_output=True, text=True, **options
  )


def refused(capsys, *words):
  """Returns the message of a command line that is refused with status 2."""
  try:
    status = main(words)
  except SystemExit as stop:
    status = stop.code
  assert status == 2
  out, err = capsys.readouterr()
  assert out == ''
  assert err.startswith('jaxformers: error: ')
  assert 'Traceback' not in err
  return err


@pytest.mark.parametrize(
  'words',
  [['--help'], *([command, '--help'] for command in COMMANDS), ['trin']],
)
def test_help_and_misspelling_load_nothing_heavy(words):
  done = run_python('-c', PARSE_HELP, *words)
  assert done.returncode == (2 if words == ['trin'] else 0)
  assert done.stderr.endswith('heavy: []\n')


@pytest.mark.parametrize('command', COMMANDS)
def test_help_of_a_command_has_examples(command, capsys):
  with pytest.raises(SystemExit) as stop:
    main([command, '--help'])
  assert stop.value.code == 0
  out = capsys.readouterr().out
  assert f'examples:\n  jaxformers {command}' in out


def test_help_lists_commands_and_exit_statuses(capsys):
  with pytest.raises(SystemExit):
    main(['--help'])
  out = capsys.readouterr().out
  for words in (*COMMANDS, 'exit status:', '1  the run failed', '2  bad input'):
    assert words in out


def test_every_default_is_told(capsys):
  with pytest.raises(SystemExit):
    main(['sample', '--help'])
  out = capsys.readouterr().out
  for words in ('latest)', '256)', '1.0)', '0)', 'all)'):
    assert f'default: {words}' in ' '.join(out.split())


def test_no_command_prints_the_help_and_is_bad_input(capsys):
  assert main([]) == 2
  assert 'first steps:' in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
  with pytest.raises(SystemExit):
    main(['--version'])
  assert capsys.readouterr().out == f'jaxformers {jaxformers.__version__}\n'


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['trian', 'x.py'], "unknown command 'trian'; did you mean 'train'?"),
    (['zzz'], "unknown command 'zzz'; expected one of train, sample, eval"),
    (['--tracback', 'list'], "'--tracback'; did you mean '--traceback'?"),
    (
      ['train', 'x.py', '--workdr=y'],
      "unknown option '--workdr'; did you mean '--workdir'?",
    ),
    (
      ['sample', 'runs/lm', '--promt', 'x'],
      "unknown option '--promt'; did you mean '--prompt'?",
    ),
    (['sample', 'runs/lm'], 'arguments are required: --prompt'),
    (['list', 'corpra'], "cannot list 'corpra'; did you mean 'corpora'?"),
    (['train'], 'arguments are required: FILE'),
    (['train', 'a.py', 'b.py'], 'unrecognized arguments: b.py'),
    (
      ['sample', 'r', '--prompt', 'x', '--tokens', '0'],
      "--tokens: expected a whole number of at least 1, got '0'",
    ),
    (
      ['sample', 'r', '--prompt', 'x', '--temperature=nan'],
      "--temperature: expected a number of at least 0, got 'nan'",
    ),
    (
      ['sample', 'r', '--prompt', 'x', '--top-p', '1.5'],
      "--top-p: expected a number in (0, 1], got '1.5'",
    ),
    (
      ['eval', 'r', '--checkpoint', 'newest'],
      "expected latest, best or the number of a step, got 'newest'",
    ),
  ],
)
def test_a_wrong_command_line_is_explained(capsys, words, message):
  assert message in refused(capsys, *words)


def test_a_value_may_look_like_a_misspelt_option(monkeypatch):
  received = []
  monkeypatch.setattr('jaxformers.cli.sample.run', received.append)
  assert main(['sample', 'r', '--prompt', '-- and so on', '--prompt=--x']) == 0
  assert received[0].prompts == ['-- and so on', '--x']


@pytest.mark.parametrize(
  'words', [['--traceback', 'list'], ['list', '--traceback']]
)
def test_the_traceback_can_be_asked_for_anywhere(monkeypatch, capsys, words):
  def fail(arguments):
    raise ValueError('too little text.')

  monkeypatch.setattr('jaxformers.cli.list.run', fail)
  assert main(words) == 2
  err = capsys.readouterr().err
  assert 'Traceback' in err
  assert err.endswith('jaxformers: error: too little text.\n')


def test_the_environment_can_ask_for_the_traceback(monkeypatch, capsys):
  def fail(arguments):
    raise FileNotFoundError('no such text.')

  monkeypatch.setenv('JAXFORMERS_TRACEBACK', '1')
  monkeypatch.setattr('jaxformers.cli.list.run', fail)
  assert main(['list']) == 2
  assert 'Traceback' in capsys.readouterr().err


@pytest.mark.parametrize(
  'error', [ValueError, FileNotFoundError, ImportError, PermissionError]
)
def test_a_users_error_is_one_message(monkeypatch, capsys, error):
  def fail(arguments):
    raise error('this and that.')

  monkeypatch.setattr('jaxformers.cli.list.run', fail)
  monkeypatch.delenv('JAXFORMERS_TRACEBACK', raising=False)
  assert 'this and that.' in refused(capsys, 'list')


def test_a_bug_keeps_its_traceback(monkeypatch):
  def fail(arguments):
    raise KeyError('bug')

  monkeypatch.setattr('jaxformers.cli.list.run', fail)
  with pytest.raises(KeyError, match='bug'):
    main(['list'])


def test_a_failed_run_has_status_1(monkeypatch, capsys):
  from jaxformers.train.errors import RunFailed

  def fail(arguments):
    raise RunFailed('step 7: loss is nan.')

  monkeypatch.setattr('jaxformers.cli.list.run', fail)
  assert main(['list']) == 1
  assert 'jaxformers: error: step 7: loss is nan.' in capsys.readouterr().err


def test_ctrl_c_is_quiet(monkeypatch, capsys):
  def interrupt(arguments):
    raise KeyboardInterrupt

  monkeypatch.setattr('jaxformers.cli.list.run', interrupt)
  assert main(['list']) == 130
  assert capsys.readouterr().err == ''


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
  folder = tmp_path / 'experiments'
  folder.mkdir()
  for i in range(2000):  # More than a pipe holds.
    (folder / f'e{i:04}.py').write_text(
      f'"""{"x" * 80}"""\ndef experiment(): 0'
    )
  command = f'{sys.executable} -m jaxformers list experiments | head -n 1'
  done = subprocess.run(
    command, shell=True, cwd=tmp_path, capture_output=True, text=True
  )
  assert done.stdout == 'experiments:\n'
  assert done.stderr == ''


def test_a_reader_that_has_gone_is_no_error_for_short_output(tmp_path):
  reading, writing = os.pipe()
  os.close(reading)
  with os.fdopen(writing, 'wb') as out:
    done = subprocess.run(
      [sys.executable, '-m', 'jaxformers', 'list'],
      cwd=tmp_path,
      env=os.environ | {'PYTHONUNBUFFERED': ''},
      stdout=out,
      stderr=subprocess.PIPE,
      text=True,
    )
  assert done.returncode == 0
  assert done.stderr == ''


def test_the_package_runs_as_a_module():
  done = run_python('-m', 'jaxformers', '--version')
  assert done.returncode == 0
  assert done.stdout == f'jaxformers {jaxformers.__version__}\n'
  done = run_python('-m', 'jaxformers', 'zzz')
  assert done.returncode == 2
