"""Plans of rows as files: made once, and mapped by every process that reads rows.

Enters: the arrays of a plan, one entry a document. Leaves: the same arrays, of which the large
ones lie in files, so that neither the next start nor another process makes or holds them anew.
"""

from __future__ import annotations

import logging
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from neo_jax import caches

_LOG = logging.getLogger(__name__)
_WORTH_A_FILE = 64 << 20  # bytes of a plan; smaller ones are made again


class Plan:
    """Arrays as attributes. To another process go the names of files, not what they hold."""

    def hold(self, **arrays: np.ndarray) -> None:
        """Makes each array an attribute of its name."""
        for name, array in arrays.items():
            file = getattr(array, "filename", None)  # of np.load's memmap
            self._mapped[name] = None if file is None else os.fspath(file)
            # A plain view: each look into a memmap takes several times as long.
            setattr(self, name, np.asarray(array))

    @property
    def _mapped(self) -> dict[str, str | None]:
        """The file of each array; None: it lies in memory."""
        return self.__dict__.setdefault("_files", {})

    def __getstate__(self) -> dict[str, Any]:
        in_files = {name for name, file in self._mapped.items() if file is not None}
        return {name: v for name, v in self.__dict__.items() if name not in in_files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        files = {name: file for name, file in self._mapped.items() if file is not None}
        self.hold(**{name: np.load(file, mmap_mode="r") for name, file in files.items()})


def kept(key: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What `make` gives; where that is large, out of files of this user's cache.

    Args:
      key: tells the plan from all others; a file name.
      make: makes the plan's arrays.
    """
    folder = caches.plans() / key
    if not folder.is_dir():
        arrays = make()
        size = sum(array.nbytes for array in arrays.values())
        if size < _WORTH_A_FILE:
            return arrays
        try:
            _write(folder, arrays)
        except OSError as error:
            _LOG.warning(
                "%s: a plan of %d bytes stays in memory, in each process.", error, size
            )
            return arrays
        _LOG.info("plan of rows kept in %s (%d bytes)", folder, size)
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


def _write(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """All arrays aside, and then at once; another process may be doing the same."""
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(aside / f"{name}.npy", array)
        aside.rename(folder)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        if not folder.is_dir():
            raise
