"""The picture of a loss curve shows what the numbers say."""

import math

from matplotlib.figure import Figure
from matplotlib.image import imread
import numpy as np
import pytest

from jaxformers.train import figure as figures
from jaxformers.train.figure import plot_loss
from jaxformers.train.figure import smooth
from jaxformers.train.metrics import MetricsLog
from jaxformers.train.report import Report
from jaxformers.train.study import Judgement
from jaxformers.train.study import Results

STEPS = 400


@pytest.fixture
def drawn(monkeypatch):
  """The figures that were saved, so that their contents can be looked at."""
  saved = []
  original = Figure.savefig

  def savefig(self, *args, **kwargs):
    saved.append(self)
    original(self, *args, **kwargs)

  monkeypatch.setattr(Figure, 'savefig', savefig)
  return saved


def write_run(folder, heldout=True, bytes_per_token=1.0):
  """Writes 2 + 6 exp(-step / 10) bits per token."""
  path = folder / 'metrics.jsonl'
  with MetricsLog(path, folder / 'events', first_step=1) as log:
    for step in range(1, STEPS + 1):
      bits = 2 + 6 * math.exp(-step / 10)
      log.write(step, 'train', {'loss': bits * math.log(2)})
      if heldout and step % 100 == 0:
        values = {
          'loss': (bits + 0.1) * math.log(2),
          'bits_per_byte': (bits + 0.1) / bytes_per_token,
        }
        log.write(step, 'heldout', values)
  return path


def texts(axes):
  return [text.get_text() for text in axes.texts]


def test_picture_is_a_png_of_1200_by_750_with_both_colours(tmp_path):
  plot_loss(write_run(tmp_path), tmp_path / 'loss.png', title='a run')
  pixels = imread(tmp_path / 'loss.png')
  assert pixels.shape[:2] == (750, 1200)
  for split in ('train', 'heldout'):
    code = figures.COLOURS[split]
    colour = [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    near = np.abs(pixels[..., :3] - colour).max(axis=-1) < 0.02
    assert near.sum() > 100, split


def test_curves_are_in_bits_per_byte(tmp_path, drawn):
  path = write_run(tmp_path, bytes_per_token=4.0)
  plot_loss(path, tmp_path / 'loss.png', title='a run')
  (axes,) = drawn[0].axes
  raw, _, heldout = axes.lines
  assert axes.get_ylabel() == 'bits per byte'
  assert axes.get_xlabel() == 'step'
  np.testing.assert_allclose(raw.get_ydata()[-1], 2 / 4, rtol=1e-6)
  np.testing.assert_allclose(heldout.get_xdata(), [100, 200, 300, 400])
  np.testing.assert_allclose(heldout.get_ydata()[-1], 2.1 / 4, rtol=1e-6)


def test_without_bits_per_byte_curves_are_in_bits_per_token(tmp_path, drawn):
  path = write_run(tmp_path, heldout=False)
  plot_loss(path, tmp_path / 'loss.png', title='a run')
  (axes,) = drawn[0].axes
  assert axes.get_ylabel() == 'bits per token'
  np.testing.assert_allclose(axes.lines[0].get_ydata()[-1], 2, rtol=1e-6)


def test_cross_entropy_is_preferred_to_a_loss_with_penalties(tmp_path, drawn):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(
    '{"step": 1, "split": "train", "loss": 9.0, "cross_entropy": 1.5}\n'
  )
  plot_loss(path, tmp_path / 'loss.png', title='a run')
  assert drawn[0].axes[0].lines[0].get_ydata()[0] == 1.5 / math.log(2)


def test_first_steep_part_does_not_squash_the_rest(tmp_path, drawn):
  path = write_run(tmp_path)
  plot_loss(path, tmp_path / 'l.png', title='', baselines={'n-gram': 2.31})
  low, high = drawn[0].axes[0].get_ylim()
  assert 1.8 < low < 2.0
  assert 2.31 < high < 5.0  # the loss begins at 7.4


def test_baselines_are_dashed_and_named_beside_the_curves(tmp_path, drawn):
  path = write_run(tmp_path)
  plot_loss(path, tmp_path / 'l.png', title='', baselines={'n-gram': 2.31})
  (axes,) = drawn[0].axes
  dashed = [line for line in axes.lines if line.is_dashed()]
  assert [line.get_ydata()[0] for line in dashed] == [2.31]
  assert dashed[0].get_color() == figures.COLOURS['baseline']
  names = ['training\n2.000', 'held-out\n2.100', 'n-gram\n2.310']
  assert texts(axes) == names


def test_labels_do_not_cover_each_other(tmp_path, drawn):
  path = write_run(tmp_path)
  same = {'a': 2.0, 'b': 2.0, 'c': 2.01}
  plot_loss(path, tmp_path / 'l.png', title='', baselines=same)
  (axes,) = drawn[0].axes
  boxes = [text.get_window_extent() for text in axes.texts]
  boxes.sort(key=lambda box: box.y0)
  assert len(boxes) == 5
  for below, above in zip(boxes, boxes[1:], strict=False):
    assert below.y1 <= above.y0 + 1
  whole = drawn[0].bbox
  assert all(box.x1 <= whole.x1 and box.y1 <= whole.y1 for box in boxes)


def test_second_axis_counts_tokens_only_if_asked(tmp_path, drawn):
  path = write_run(tmp_path)
  plot_loss(path, tmp_path / 'l.png', title='', tokens_per_step=512)
  plot_loss(path, tmp_path / 'l.png', title='')
  (second,) = drawn[0].axes[0].child_axes
  assert second.get_xlabel() == 'tokens'
  drawn[0].canvas.draw()
  assert second.get_xlim()[1] == 512 * drawn[0].axes[0].get_xlim()[1]
  assert drawn[1].axes[0].child_axes == []


@pytest.mark.parametrize('steps', [1, 2, 3])
def test_shortest_runs_can_be_drawn(tmp_path, steps):
  path = tmp_path / 'metrics.jsonl'
  with MetricsLog(path, tmp_path / 'events', first_step=1) as log:
    for step in range(1, steps + 1):
      log.write(step, 'train', {'loss': 5.0})
  plot_loss(path, tmp_path / 'loss.png', title='a run')
  assert imread(tmp_path / 'loss.png').shape[:2] == (750, 1200)


def test_losses_that_are_not_finite_are_left_out(tmp_path, drawn):
  path = tmp_path / 'metrics.jsonl'
  with MetricsLog(path, tmp_path / 'events', first_step=1) as log:
    for step, loss in enumerate([3.0, math.nan, math.inf, 2.0], start=1):
      log.write(step, 'train', {'loss': loss})
  plot_loss(path, tmp_path / 'loss.png', title='a run')
  assert list(drawn[0].axes[0].lines[0].get_xdata()) == [1, 4]


def test_nothing_to_draw_is_an_error(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('')
  with pytest.raises(ValueError, match=r'metrics\.jsonl holds no finite loss'):
    plot_loss(path, tmp_path / 'loss.png', title='a run')


def test_smoothing_averages_a_centred_window():
  values = np.array([8.0, 4.0, 1.0, 1.0, 4.0])
  expected = [8.0, 13 / 3, 2.0, 2.0, 2.5]
  np.testing.assert_allclose(smooth(values, 3), expected)


def test_smoothing_keeps_a_straight_line():
  line = np.arange(20.0)
  np.testing.assert_allclose(smooth(line, 5)[:-2], line[:-2])


def test_a_band_is_the_range_over_seeds_around_their_mean():
  axes = Figure().subplots()
  figures.plot_band(axes, [1, 2], [[0.0, 4.0], [2.0, 5.0]], label='a')
  np.testing.assert_array_equal(axes.lines[0].get_ydata(), [1.0, 4.5])
  [band] = axes.collections
  corners = {tuple(point) for point in band.get_paths()[0].vertices}
  assert corners == {(1, 0), (1, 2), (2, 4), (2, 5)}


def test_one_seed_has_no_band():
  axes = Figure().subplots()
  figures.plot_band(axes, [1, 2], [[0.0, 4.0]])
  assert not axes.collections


class Drawn:
  claim = 'Long words ' * 12

  def draw(self, results, figure):
    axes = figure.subplots()
    axes.plot([0, 1], results.values('a', 'x'), label='a rather long label')
    figure.legend(loc='outside right upper')


def test_claim_and_verdict_stand_above_a_study(tmp_path, drawn):
  results = Results((0, 1), {'a': {'x': [1.0, 2.0]}})
  judgements = tuple(Judgement('x', x, '<', 2.0) for x in (1.0, 3.0))
  report = Report(Drawn(), results, judgements, 0.0, {}, 'cpu')
  figures.draw_study(report, tmp_path / 'a.png')
  top, bottom = drawn[0].subfigs
  claim, summary = top.texts
  assert claim.get_text().replace('\n', ' ') == Drawn.claim.strip()
  assert summary.get_text() == (
    'partly reproduced: 1 of 2 criteria hold; 2 seeds'
  )
  boxes = [text.get_window_extent() for text in (claim, summary)]
  [axes], [legend] = bottom.axes, bottom.legends
  boxes.append(axes.get_tightbbox())
  assert boxes[0].y0 > boxes[1].y1
  assert boxes[1].y0 > boxes[2].y1
  assert legend.get_window_extent().x0 >= axes.get_window_extent().x1
  assert legend.get_window_extent().x1 <= drawn[0].bbox.x1
