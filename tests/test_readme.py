"""The examples of README and pages run, and what they name exists."""

import json
import pathlib
import re
import shlex

import pytest

from jaxformers.cli.parser import build_parser

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / 'README.md').read_text()
# Snippets of the catalogue are run by its own test.
PAGES = [
  page
  for page in (ROOT / 'docs').rglob('*.md')
  if '```python\n' in page.read_text() and page.name != 'catalogue.md'
]


def blocks(language):
  return re.findall(rf'```{language}\n(.*?)```', TEXT, re.DOTALL)


@pytest.mark.parametrize('code', blocks('python'), ids=range(3))
def test_python_examples_run(code):
  exec(compile(code, 'README.md', 'exec'), {'__name__': 'readme'})


@pytest.mark.parametrize('page', sorted(PAGES), ids=lambda page: page.name)
def test_the_examples_of_a_page_run_one_after_the_other(page):
  code = '\n'.join(
    re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL)
  )
  exec(compile(code, page.name, 'exec'), {'__name__': 'page'})


def test_shell_examples_parse():
  commands = [
    line.replace('\\\n', ' ')
    for block in blocks('sh')
    for line in re.findall(r'^jaxformers (?:.*\\\n)*.*$', block, re.MULTILINE)
  ]
  assert len(commands) == 8
  for command in commands:
    build_parser().parse_args(shlex.split(command, comments=True)[1:])


def test_make_targets_exist():
  makefile = (ROOT / 'Makefile').read_text()
  for target in re.findall(
    r'^make (\w+)', '\n'.join(blocks('sh')), re.MULTILINE
  ):
    assert f'\n{target}: ' in makefile


def anchors(page):
  """Addresses of the headings of a page, as GitHub and the site make them."""
  headings = re.findall(r'^#+ (.*)$', page.read_text(), re.MULTILINE)
  plain = (re.sub(r'[^\w\- ]', '', h.lower()) for h in headings)
  return [heading.strip().replace(' ', '-') for heading in plain]


def test_links_and_pictures_exist():
  for page in (ROOT / 'README.md', *(ROOT / 'docs').rglob('*.md')):
    for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
      file, _, heading = target.partition('#')
      path = page.parent / file if file else page
      assert target.startswith('https://') or path.exists(), target
      if heading and not target.startswith('https://'):
        assert anchors(path).count(heading) == 1, target


def span(values):
  values = sorted(values)
  return f'{values[0]:.1f} to {values[-1]:.1f}'


def test_figures_are_those_of_the_results():
  results = ROOT / 'experiments'
  lm, step, crash, attention, recurrence, selective, states = (
    json.loads((results / path).read_text())
    for path in (
      'results/lm.json',
      'benchmarks/results/train_step.json',
      'benchmarks/results/crash_test.json',
      'benchmarks/results/attention.json',
      'benchmarks/results/recurrence.json',
      'benchmarks/results/selective.json',
      'benchmarks/results/matrix_states.json',
    )
  )
  speeds = [
    [
      attention['float32_2048'][f'{way}_speed_relative_to_{peer}']
      for way in ('forward', 'forward_backward')
    ]
    for peer in ('jax', 'torch')
  ]
  ways = 'forward', 'forward_and_backward'
  spans = [
    ', '.join(span(number(x[way]) for x in entries) for way in ways)
    for entries, number in (
      (recurrence['ladder'], lambda x: x['auto']),
      (recurrence['ladder'], lambda x: x['of_jax'] / x['auto']),
      (recurrence['s5'] + recurrence['lru'], lambda x: x['published']),
      (
        [
          x
          for x in recurrence['s5'] + recurrence['lru']
          if x['shape'][1] <= 4096
        ],
        lambda x: x['torch'],
      ),
    )
  ]
  scans = [
    entry
    for name, by_length in selective.items()
    if name.startswith('recurrence_states')
    for entry in by_length.values()
  ]
  materialised = 'sequential', 'associative'
  faster = [
    [x[key] for x in scans if key in x]
    for key in (f'forward_backward_speed_relative_to_{m}' for m in materialised)
  ]
  memory = max(
    x[f'memory_relative_to_{m}'] for x in scans for m in materialised
  )
  block = selective['mamba_block']
  longer = {k: v['largest_ratio'] for k, v in states['next_token'].items()}
  growth = longer.pop('attention')
  rows = re.findall(r'^\| (.*?) \| (.*?) \|$', TEXT, re.MULTILINE)
  figures = [figure for _, figure in rows]
  for figure in (
    f'{lm["bits_per_byte"]:.2f}',
    f'{lm["baseline_bits_per_byte"]:.2f}',
    f'{step["fraction_of_peak"]:.0%}',
    f'{step["speed_relative_to_flax"]:.2f}',
    f'{step["fraction_outside_xla"]:.1%}',
    f'{step["compile_ratio"]:.2f}',
    '{:.1f}, {:.1f}'.format(*speeds[0]),
    '{:.2f}, {:.2f}'.format(*speeds[1]),
    *spans,
    '{}, {}; {:.1%}'.format(*map(span, faster), memory),
    ', '.join(
      f'{block[f"forward_backward_speed_relative_to_{peer}"]:.1f}'
      for peer in ('published', 'torch')
    ),
    f'{max(longer.values()):.2f}; {growth:.0f}',
    '0, 0, 0',
  ):
    assert figure in figures
  assert f'{lm["minutes"]:.1f} minutes' in TEXT
  assert f'kill -9 at {crash["kills"]} random moments' in TEXT
  assert (crash['lost'], crash['damaged'], crash['identical']) == (0, 0, True)


def test_the_result_of_the_main_job_is_that_of_its_metrics():
  folder = ROOT / 'experiments' / 'results'
  lm = json.loads((folder / 'lm.json').read_text())
  last = json.loads((folder / 'lm_metrics.jsonl').read_text().splitlines()[-1])
  assert last['split'] == 'heldout'
  assert round(last['bits_per_byte'], 3) == lm['bits_per_byte'] < 2.1
