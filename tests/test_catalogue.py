"""The catalogue is complete, current, and what it shows runs."""

import importlib.util
import pathlib
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]


def load():
  path = ROOT / 'scripts' / 'build_catalogue.py'
  spec = importlib.util.spec_from_file_location('build_catalogue', path)
  module = sys.modules.setdefault(
    spec.name, importlib.util.module_from_spec(spec)
  )
  spec.loader.exec_module(module)
  return module


CATALOGUE = load()
TECHNIQUES = CATALOGUE.techniques()
FIRST = list({t.family: t for t in reversed(TECHNIQUES)}.values())


def test_all_parts_and_studies_exist():
  results = {p.stem for p in CATALOGUE.RESULTS.glob('*.json')} - {'lm'}
  for technique in TECHNIQUES:
    assert technique.parts, technique.name
    unknown = {*technique.parts} - CATALOGUE.public_names().keys()
    assert not unknown, f'{technique.name} has {unknown}, which is not public'
    assert {*technique.studies} <= results, technique.name
  assert results == {s for t in TECHNIQUES for s in t.studies}


def test_every_name_from_a_publication_is_in_one_technique():
  parts = [name for technique in TECHNIQUES for name in technique.parts]
  assert len(parts) == len(set(parts))
  published = {n for n in CATALOGUE.public_names() if CATALOGUE.source_of(n)}
  missing = published - {*parts}
  assert not missing, f'docs/techniques.toml lacks {sorted(missing)}'


def test_the_page_is_what_the_script_makes_of_the_code():
  assert CATALOGUE.PAGE.read_text() == CATALOGUE.catalogue_page(), (
    'run `python scripts/build_catalogue.py` and commit docs/catalogue.md'
  )
  assert CATALOGUE.README.read_text() == CATALOGUE.readme(), (
    'run `python scripts/build_catalogue.py` and commit README.md'
  )


def test_rows_are_found_inside_mixers_and_factories():
  rows = CATALOGUE.conformance_rows()
  assert rows['RGLRU'] == ['rg_lru', 'recurrent_block']
  assert rows['ExponentiatedGradient'] == ['exponentiated_adam_signed']
  assert rows['GradDrop'] == ['tasks_by_GradDrop']
  assert rows['Averaged'] == ['averaged_momentum']
  assert 'VarianceScaling' not in rows  # a default names nothing


@pytest.mark.parametrize('technique', TECHNIQUES, ids=lambda t: t.name)
def test_a_snippet_goes_through(technique):
  """Traced: compiling what other tests compile would take minutes."""
  jax.eval_shape(lambda: run(technique))


@pytest.mark.parametrize('technique', FIRST, ids=lambda t: t.name)
def test_the_first_snippet_of_a_family_runs(technique):
  run(technique)


def run(technique):
  exec(CATALOGUE.snippet(technique), {'__name__': 'snippet'})
