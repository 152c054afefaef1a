"""Set-up of all tests: CPU only, eight forced devices, nothing left behind."""

import atexit
import gc
import os
import shutil
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'

# Tokens of corpora and compiled programs are shared by the tests of a run and
# gone with it: many tests compile one program again. The first process makes the
# folder, the others inherit its name. Programs are cached per worker, because
# JAX may read an entry that another process is still writing.
_CACHE = 'JAXFORMERS_TEST_CACHE'
if _CACHE not in os.environ:
  os.environ[_CACHE] = tempfile.mkdtemp()
  atexit.register(shutil.rmtree, os.environ[_CACHE], ignore_errors=True)
os.environ['JAXFORMERS_CACHE'] = os.path.join(os.environ[_CACHE], 'data')

# Tracing makes millions of objects that live on: to look for cycles among them as
# often as Python does by default takes a tenth of the time.
gc.set_threshold(100_000, 50, 100)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)
_WORKER = os.environ.get('PYTEST_XDIST_WORKER', 'alone')
jax.config.update(
  'jax_compilation_cache_dir', os.path.join(os.environ[_CACHE], _WORKER)
)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
# Most of the time of these tests is compiling, so programs of the tests' own
# process are compiled with few optimisations. The commands, experiments and
# examples that tests start as processes are compiled as a user's are.
jax.config.update('jax_disable_most_optimizations', True)


def pytest_addoption(parser):
  parser.addoption(
    '--thin',
    action='store_true',
    help='run one case of each parametrised test, a different one each time',
  )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
  if config.getoption('--thin'):
    keep_thin(config, items)
  # One worker runs all tests of a file, as they share what is compiled, unless
  # the file says how to split it. Those of experiments are processes of their own.
  for item in items:
    if group_of(item) is None and item.path.parent.name != 'experiments':
      group = f'{item.path.parent.name}_{item.path.stem}'
      item.add_marker(pytest.mark.xdist_group(group))


def pytest_runtest_teardown(item, nextitem):
  # Compiled programs would take gigabytes in the end.
  if nextitem and group_of(item) != group_of(nextitem) and resident() > 2**31:
    jax.clear_caches()
    gc.collect()


def resident():
  """Returns the bytes of memory of this process, 0 where that is not known."""
  try:
    with open('/proc/self/statm') as file:
      return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
  except OSError:
    return 0


def group_of(item):
  mark = item.get_closest_marker('xdist_group')
  return mark and mark.args[0]


def keep_thin(config, items):
  cases = {}
  for item in items:
    cases.setdefault(item.nodeid.split('[')[0], []).append(item)
  # The n-th test of a class takes case n, so that every row of a conformance
  # table meets some properties and every property some row.
  kept = {id(group[n % len(group)]) for n, group in enumerate(cases.values())}
  config.hook.pytest_deselected(
    items=[item for item in items if id(item) not in kept]
  )
  items[:] = [item for item in items if id(item) in kept]
