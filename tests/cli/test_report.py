"""One page says what the files say, needs no other file, and runs nothing."""

import dataclasses
from html.parser import HTMLParser
import json
import math
import pathlib
import re

import pytest

from jaxformers.cli import main
from jaxformers.models import LanguageModel
from jaxformers.nn import Block
from jaxformers.nn import FeedForward
from jaxformers.nn import Stack
from jaxformers.nn.mixers import Attention
from jaxformers.train import Experiment
from jaxformers.train import NGram
from jaxformers.train import record as records
from jaxformers.train.metrics import MetricsLog
from jaxformers.train.run_directory import RunDirectory

ROOT = pathlib.Path(__file__).parents[2]
EXPERIMENT = Experiment(
  model=LanguageModel(256, 8, Stack(Block(Attention(2), FeedForward(16)), 2)),
  steps=4,
  baseline=NGram(context=2),
)
LOSSES = 5.5, 4.25, 3.125, 2.0625
ENDLESS = {'meta', 'input', 'img', 'wbr'}


class Page(HTMLParser):
  """A page taken apart; every element must end where HTML says it does."""

  def __init__(self, path):
    super().__init__()
    self.open, self.elements, self.texts = [], [], []
    self.feed(path.read_text('utf-8'))
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))
    if tag not in ENDLESS:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] != 'style':
      self.texts.append(data.strip())

  def values(self, attribute):
    return [a[attribute] for _, a in self.elements if attribute in a]

  def labels(self):
    return [a['aria-label'] for tag, a in self.elements if tag == 'svg']

  @property
  def text(self):
    return ' '.join(filter(None, self.texts))


def write_run(path, experiment=EXPERIMENT, losses=LOSSES, heldout=True):
  """Writes a run directory as training does, without training."""
  directory = RunDirectory(path)
  directory.prepare(records.to_record(experiment), device='a fast device')
  with MetricsLog(directory.metrics, directory.events, first_step=1) as log:
    for step, loss in enumerate(losses, start=1):
      values = {'loss': loss, 'learning_rate': step / 8, 'targets': 16.0}
      log.write(step, 'train', values)
      speed = {'steps_per_second': 0.5, 'tokens_per_second': 1000.0 + step}
      log.write_timing(step, speed)
    if heldout:
      bits = {'loss': 2.5, 'bits_per_byte': 3.6067}
      log.write(len(losses), 'heldout', bits)
  return directory


def report(*words):
  assert main(['report', *map(str, words)]) == 0


def refused(capsys, *words):
  assert main(['report', *map(str, words)]) == 2
  out, err = capsys.readouterr()
  assert out == ''
  return err


@pytest.fixture
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.fixture
def run(here):
  directory = write_run(here / 'runs' / 'a')
  directory.sample.write_bytes(b'And <b>he</b> said & "no"\x00\xff\x1b[0m\n')
  directory.baselines.write_text('{"order-2 n-gram": 1.5}')
  (directory.checkpoints / '4').mkdir(parents=True)
  return directory


def test_the_page_of_a_run_shows_what_its_files_hold(run, capsys):
  report('runs/a')
  assert capsys.readouterr().out == 'report: runs/a/report.html\n'
  page = Page(run.path / 'report.html')
  for words in (
    'Run a',
    'finished after 4 steps',
    'held-out bits per byte 3.607 at step 4',
    'order-2 n-gram, bits per byte 1.5',
    'training loss 2.062',
    'tokens per second 1,002 (median)',
    'time in steps about 8.0 seconds',
    'step training held-out 1 5.5 2 4.25 3 3.125 4 2.0625 2.5',
    "prompt 'And ', tokens 400",
    'LanguageModel vocab_size = 256 width = 8',
    'device a fast device',
    'python 3.',
  ):
    assert words in page.text
  assert [label.split('.')[0] for label in page.labels()] == [
    'bits_per_byte',
    'loss',
    'learning_rate',
    'tokens_per_second',
  ]
  assert 'training: 5.5 at first, 2.062 at last' in page.labels()[1]
  assert 'order-2 n-gram: 1.5' in page.labels()[0]


def test_a_page_needs_nothing_from_outside_and_runs_nothing(run):
  report('runs/a')
  text = (run.path / 'report.html').read_text('utf-8')
  page = Page(run.path / 'report.html')
  assert not {'script', 'link', 'iframe', 'img'} & {t for t, _ in page.elements}
  assert '://' not in text
  assert page.values('src') == []
  names = page.values('id')
  assert len(names) == len(set(names))
  targets = page.values('href') + re.findall(r'url\(([^)]*)\)', text)
  assert targets
  for target in targets:
    assert target[0] == '#'
    assert target[1:] in names
  policy = [a for t, a in page.elements if 'http-equiv' in a]
  assert policy[0]['content'].startswith("default-src 'none';")


def test_samples_are_shown_as_they_are(run):
  report('runs/a')
  text = (run.path / 'report.html').read_text('utf-8')
  shown = 'And &lt;b&gt;he&lt;/b&gt; said &amp; &quot;no&quot;␀�␛[0m\n'
  assert f'<pre dir="auto">{shown}</pre>' in text


def test_colours_follow_light_and_dark(run):
  report('runs/a')
  text = (run.path / 'report.html').read_text('utf-8')
  style, body = text.split('</style>')
  assert 'color-scheme: light dark' in style
  for name in set(re.findall(r'var\(--(\w+)\)', body)):
    assert f'--{name}: light-dark(#' in style
  pictures = ' '.join(re.findall(r'<svg.*?</svg>', body, flags=re.DOTALL))
  assert not re.findall(r'[:"]\s*#[0-9a-f]{6}', pictures)


def test_settings_that_are_defaults_are_marked(run):
  report('runs/a')
  page = Page(run.path / 'report.html')
  text = (run.path / 'report.html').read_text('utf-8')
  assert '<li>num_heads = 2</li>' in text
  assert '<li class="default">batch_size = 32</li>' in text
  assert 'only what differs from the defaults' in page.text


def test_several_runs_share_their_curves_and_show_what_differs(run, here):
  model = EXPERIMENT.model.clone(width=16)
  changed = dataclasses.replace(EXPERIMENT, model=model, seed=7)
  write_run(here / 'runs' / 'b', changed, losses=(9.5, 8.5))
  report('runs/a', 'runs/b')
  page = Page(here / 'report.html')
  assert 'Runs a, b' in page.text
  assert 'state finished after 4 steps at step 2 of 4' in page.text
  assert 'setting a b model. width 8 16 seed 0 7' in page.text
  assert 'step a, training a, held-out b, training b, held-out 1' in page.text
  [loss] = [x for x in page.labels() if x.startswith('loss.')]
  assert 'a, training: 5.5' in loss
  assert 'b, training: 9.5' in loss
  assert page.text.count('No text: it is drawn when a run has finished.') == 1


def test_a_run_keeps_its_colour_where_it_is_alone(run, here):
  write_run(here / 'runs' / 'b')
  (run.path / 'timing.jsonl').unlink()
  report('runs/a', 'runs/b')
  text = (here / 'report.html').read_text('utf-8')
  [drawn] = re.findall(r'<svg[^>]*"tokens_per.*?</svg>', text, re.DOTALL)
  assert 'var(--c1)' in drawn
  assert 'var(--c0)' not in drawn


def test_runs_of_one_name_are_told_apart_by_their_paths(run, here):
  write_run(here / 'other' / 'a')
  report('runs/a', 'other/a')
  text = Page(here / 'report.html').text
  assert 'Runs runs/a, other/a' in text
  assert 'Nothing in their configurations.' in text


def test_numbers_that_are_not_finite_are_named_and_not_drawn(here):
  path = here / 'runs' / 'a'
  write_run(path, losses=(5.5, math.inf, math.nan), heldout=False)
  report('runs/a')
  page = Page(path / 'report.html')
  assert 'at step 3 of 4, where a number was not finite' in page.text
  assert 'held-out not evaluated yet' in page.text
  assert 'training: 2 values were not finite, first at step 2.' in page.text
  assert 'step training 1 5.5 2 inf 3 nan' in page.text
  assert 'nan' not in ' '.join(page.values('d')).lower()


def test_a_run_that_has_not_begun_has_a_page(here):
  directory = RunDirectory(here / 'runs' / 'a')
  directory.prepare(records.to_record(EXPERIMENT), device='cpu')
  report('runs/a')
  page = Page(directory.path / 'report.html')
  assert 'state not begun' in page.text
  assert 'Nothing has been measured yet.' in page.text


def test_long_runs_show_some_numbers_and_a_noisy_curve_smoothed(here):
  losses = [2 + (-1) ** step / 4 for step in range(500)]
  write_run(here / 'runs' / 'a', losses=losses)
  report('runs/a')
  page = Page(here / 'runs' / 'a' / 'report.html')
  assert '40 of 500 steps' in page.text
  assert 'training: 2.25 at first, 1.75 at last' in page.labels()[1]


def test_the_page_of_a_study_shows_its_verdict_and_numbers(here, monkeypatch):
  monkeypatch.chdir(ROOT)
  result = ROOT / 'experiments' / 'results' / 'entropy_versus_length.json'
  out = here / 'study.html'
  report(result, '--output', out)
  page, found = Page(out), json.loads(result.read_text())
  assert '://' not in out.read_text('utf-8')
  assert f'verdict {found["verdict"]}' in page.text
  for words in (found['claim'], found['source'], found['device']):
    assert words in page.text
  for judged in found['judgements']:
    seen = (
      f'{judged["seen"]:.4g} {judged["relation"]} {judged["bound"]:g} holds'
    )
    assert f'{judged["statement"]} {seen}' in page.text
  for value in found['measurements']['log n']['change, sigma = 3']:
    assert f'{value:.4g}' in page.text
  [label] = page.labels()
  assert label.startswith(found['claim'])
  assert page.values('d')


def test_without_its_file_a_study_has_the_figure_beside_it(here):
  name = 'selective_copying.json'
  result = here / name
  result.write_text((ROOT / 'experiments' / 'results' / name).read_text())
  report(result)
  page = Page(here / 'selective_copying.html')
  assert 'No figure: the file of the study draws it; name it by' in page.text
  result.with_suffix('.png').write_bytes(b'picture')
  report(result)
  page = Page(here / 'selective_copying.html')
  assert page.values('src') == ['data:image/png;base64,cGljdHVyZQ==']


def test_an_older_page_is_replaced_and_nothing_else(run, here, capsys):
  report('runs/a')
  first = (run.path / 'report.html').read_bytes()
  report('runs/a', '--output', here / 'page.html')
  report('runs/a', '--output', here / 'page.html')
  assert (here / 'page.html').read_bytes() == first
  capsys.readouterr()
  for path in ('mine.html', 'runs/a/report.html'):
    (here / path).write_text('mine')
    err = refused(capsys, 'runs/a', '--output', here / path)
    assert f'{path} exists and is not a page of this command' in err
    assert (here / path).read_text() == 'mine'
  assert 'exists and is not a page' in refused(capsys, 'runs/a')
  err = refused(capsys, 'runs/a', '--output', 'no/page.html')
  assert 'cannot write no/page.html (No such file or directory)' in err


def test_a_wrong_path_names_what_was_probably_meant(run, here, capsys):
  (here / 'results').mkdir()
  (here / 'results' / 'halves.json').write_text('{"claim": 1}')
  for path, words in {
    'runs/aa': 'there is no file or directory runs/aa; did you mean runs/a?',
    'runs': 'runs is neither a run nor a study; in runs there are a.',
    'runs/a/metrics.jsonl': 'is a part of a run; did you mean runs/a?',
    'results/halfs.json': 'did you mean results/halves.json?',
    'results/halves.json': 'expected the JSON that `jaxformers reproduce`',
    'none/such': 'expected the directory of a run, such as runs/lm',
  }.items():
    assert words in refused(capsys, path)
  assert 'is given twice' in refused(capsys, 'runs/a', 'runs/../runs/a')
  err = refused(capsys, 'runs/a', 'results/halves.json')
  assert 'cannot put runs and studies on one page' in err


def test_a_study_that_was_not_finished_is_refused(here, capsys):
  (here / 'halves').mkdir()
  (here / 'halves' / 'study.json').write_text('{}')
  err = refused(capsys, 'halves')
  assert 'holds a study without a result (halves.json)' in err
  content = {'study': {'class': 'Halves'}, 'claim': 'c'}
  (here / 'halves' / 'halves.json').write_text(json.dumps(content))
  err = refused(capsys, 'halves')
  assert "halves.json is damaged (KeyError('seeds'))" in err


def test_damaged_metrics_are_refused(run, capsys):
  run.metrics.write_text('{"step": 1, "split": "train", "loss": 1}\nx\n')
  assert 'line 2: expected a line of metrics' in refused(capsys, 'runs/a')
