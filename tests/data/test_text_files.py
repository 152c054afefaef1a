import pathlib

import pytest

from jaxformers.data import TextFiles


def test_files_of_a_directory_are_sorted_and_recursive(tmp_path):
  (tmp_path / 'b').mkdir()
  (tmp_path / 'c.txt').write_bytes(b'third')
  (tmp_path / 'a.txt').write_bytes(b'first')
  (tmp_path / 'b' / 'z.txt').write_bytes(b'second')
  (tmp_path / 'a.md').write_bytes(b'no text')
  corpus = TextFiles(str(tmp_path)).load()
  assert [(d.name, d.text) for d in corpus.train] == [
    ('a.txt', b'first'),
    ('b/z.txt', b'second'),
  ]
  assert [(d.name, d.text) for d in corpus.heldout] == [('c.txt', b'third')]
  assert corpus.name == tmp_path.name


def test_a_single_file_gives_its_end(tmp_path):
  lines = b''.join(b'line %d\n' % i for i in range(10))
  (tmp_path / 'a.txt').write_bytes(lines)
  corpus = TextFiles(str(tmp_path / 'a.txt'), heldout_fraction=0.2).load()
  assert corpus.heldout[0].text == b'line 8\nline 9\n'
  assert corpus.train[0].text + corpus.heldout[0].text == lines


def test_a_directory_of_one_file_is_split_like_the_file(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'1\n2\n3\n4\n')
  (tmp_path / 'empty.txt').touch()
  corpus = TextFiles(str(tmp_path)).load()
  assert corpus.heldout[0].text == b'4\n'


def test_invalid_utf8_passes_through(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'caf\xe9\n\xff\xfe\n')
  corpus = TextFiles(str(tmp_path / 'a.txt')).load()
  assert corpus.train[0].text + corpus.heldout[0].text == b'caf\xe9\n\xff\xfe\n'


def test_a_missing_path_names_the_nearest(tmp_path):
  (tmp_path / 'novel.txt').touch()
  with pytest.raises(FileNotFoundError, match=r'did you mean .*novel\.txt\?'):
    TextFiles(str(tmp_path / 'novle.txt')).load()


def test_a_missing_path_without_neighbours_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'novel\.txt does not exist\.$'):
    TextFiles(str(tmp_path / 'novel.txt')).load()


def test_a_missing_directory_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='nor does the directory .*gone'):
    TextFiles(str(tmp_path / 'gone' / 'novel.txt')).load()


def test_no_match_names_the_pattern(tmp_path):
  (tmp_path / 'a.md').write_bytes(b'x')
  with pytest.raises(FileNotFoundError, match=r"no file .*'\*\.txt'"):
    TextFiles(str(tmp_path)).load()


def test_an_empty_file_is_refused(tmp_path):
  (tmp_path / 'a.txt').touch()
  with pytest.raises(ValueError, match=r'no text in .*a\.txt: it is empty'):
    TextFiles(str(tmp_path / 'a.txt')).load()


def test_empty_files_are_refused(tmp_path):
  (tmp_path / 'a.txt').touch()
  (tmp_path / 'b.txt').touch()
  with pytest.raises(ValueError, match='each of its 2 files is empty'):
    TextFiles(str(tmp_path)).load()


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
  (tmp_path / 'a.txt').write_bytes(b'x')

  def refuse(self):
    raise PermissionError(13, 'Permission denied', str(self))

  monkeypatch.setattr(pathlib.Path, 'read_bytes', refuse)
  with pytest.raises(PermissionError, match=r'read .*a\.txt; .*chmod'):
    TextFiles(str(tmp_path)).load()


@pytest.mark.parametrize('fraction', [0.0, 1.0, -0.1, 5.0])
def test_a_fraction_outside_of_0_and_1_is_refused(tmp_path, fraction):
  with pytest.raises(ValueError, match=rf'inside \(0, 1\), got {fraction}'):
    TextFiles(str(tmp_path), heldout_fraction=fraction).load()
