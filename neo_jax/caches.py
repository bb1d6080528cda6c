"""Where things are kept between runs, on this machine.

Enters: the environment. Leaves: folders, which need not exist.
"""

from __future__ import annotations

import os
import pathlib


def compiled_programs() -> pathlib.Path:
    """Of XLA's programs, unless JAX_COMPILATION_CACHE_DIR names another folder."""
    if named := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return pathlib.Path(named)
    return _ours() / "xla"


def plans() -> pathlib.Path:
    """Of plans of rows, see data/plans.py."""
    return _ours() / "plans"


def _ours() -> pathlib.Path:
    # "or": a variable that is set to nothing counts as not set.
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(home).expanduser() / "neo_jax"
