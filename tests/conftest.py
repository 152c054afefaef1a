"""Set-up of all tests: CPU only, eight forced devices, nothing left behind."""

import os
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'

import jax

jax.config.update('jax_num_cpu_devices', 8)

# Tokens of corpora and compiled programs are shared by the tests of a process
# and gone with it: many tests run one program again.
_CACHE = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
os.environ['JAXFORMERS_CACHE'] = _CACHE.name
jax.config.update('jax_compilation_cache_dir', os.path.join(_CACHE.name, 'xla'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
