"""Plans of rows as files: made once, and mapped by every process that reads rows.

Enters: the arrays of a plan, one entry a document. Leaves: the same arrays, of which the large
ones lie in files, so that neither the next start nor another process makes or holds them anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from neo_jax import caches

_LOG = logging.getLogger(__name__)
_WORTH_A_FILE = 64 << 20  # bytes of a plan; smaller ones are made again
_MOST_BYTES = 16 << 30  # of all plans; five of The Pile's size
_IN_USE_SECONDS = 3600  # after it was opened, a plan may still be on its way to a worker


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
        _make_room(folder.parent, _MOST_BYTES - size)
        try:
            _write(folder, arrays)
        except OSError as error:
            _LOG.warning(
                "%s: a plan of %d bytes stays in memory, in each process.", error, size
            )
            return arrays
        _LOG.info("plan of rows kept in %s (%d bytes)", folder, size)
    with contextlib.suppress(OSError):  # the folder's time is that of its last use
        os.utime(folder)
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


def _make_room(parent: pathlib.Path, num_bytes: int) -> None:
    """Removes what killed processes left, then the plans that were longest not opened.

    A process that has mapped a plan keeps it, whatever becomes of the file's name.
    """
    now = time.time()
    folders = []
    for folder in parent.glob("*/"):
        with contextlib.suppress(OSError):  # another process may be doing the same
            held = sum(path.stat().st_size for path in folder.iterdir())
            folders.append((folder.stat().st_mtime, folder, held))
    total = sum(held for _, folder, held in folders if folder.suffix != ".tmp")
    for used, folder, held in sorted(folders):
        if used > now - _IN_USE_SECONDS:
            return
        if folder.suffix == ".tmp":
            shutil.rmtree(folder, ignore_errors=True)
        elif total > num_bytes:
            _LOG.info("plan of rows %s, long not used, is removed", folder)
            aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
            with contextlib.suppress(OSError):  # by name at once, so that none sees half
                folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
            total -= held


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
