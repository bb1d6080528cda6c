"""Programs that XLA compiled once are found again by the next process.

Enters: the environment. Leaves: JAX with a cache of compiled programs on the disk.
"""

from __future__ import annotations

import jax

from neo_jax import caches


def use_cache() -> None:
    """Keeps compiled programs in the user's cache, unless JAX_COMPILATION_CACHE_DIR is set."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(caches.compiled_programs()))
