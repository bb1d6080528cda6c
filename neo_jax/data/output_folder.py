"""The folder that `prepare` writes: whether it may, and what an earlier run left there.

Enters: the folder and all settings that decide the bytes. Leaves: the folder locked against a
second run, with the plan of this one in it; or one line that says whose it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from neo_jax import tokenizer as tokenizers
from neo_jax.config import ConfigError
from neo_jax.data import sources, store

_LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Makes the folder, and keeps a second run out of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / _LOCK, "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ConfigError(f"--output {folder}: {error.strerror}.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--output {folder}: another run is writing there.") from None
        try:
            yield
        finally:
            (folder / _LOCK).unlink(missing_ok=True)


def remove_false_start(folder: pathlib.Path) -> None:
    """Empties the folder of a run that ended before its first shard was complete."""
    done = (folder / sources.MANIFEST).exists() or any(folder.glob("part-*.json"))
    if (folder / sources.PLAN).exists() and not done:
        remove_all(folder)


def finished(folder: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run of the same settings that is complete.

    Raises:
      ConfigError: it is of another data set.
    """
    manifest = store.read_manifest(folder)
    _require_same(folder, manifest.get("settings", {}), settings)
    remove_notes(folder)
    return manifest


def start_or_resume(
    folder: pathlib.Path, settings: dict[str, Any], tokenizer: tokenizers.Tokenizer
) -> None:
    """Writes the plan and the tokenizer, or finds those of a run that was killed.

    Raises:
      ConfigError: the folder holds something else.
    """
    plan = folder / sources.PLAN
    if plan.exists():
        try:
            _require_same(folder, json.loads(plan.read_text()), settings)
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{plan} is damaged; remove {folder}.") from None
    else:
        others = [p.name for p in sorted(folder.iterdir()) if not _is_ours(p.name)]
        if others:
            raise ConfigError(
                f"--output {folder} holds other files, {others[0]!r} first; name a new folder."
            )
    for stale in folder.glob("*.tmp"):
        stale.unlink()
    tokenizer.save(folder)
    write_json(plan, settings)


def _is_ours(name: str) -> bool:
    """Whether a run that was killed before it wrote its plan may have left this file."""
    return name in (_LOCK, tokenizers.FILE_NAME) or name.endswith(".tmp")


def _require_same(
    folder: pathlib.Path, theirs: dict[str, Any], settings: dict[str, Any]
) -> None:
    for key, value in settings.items():
        if theirs.get(key) != value:
            raise ConfigError(
                f"--output {folder} holds another data set, made with "
                f"{key}={theirs.get(key)!r} instead of {value!r}; name a new folder."
            )


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes a file aside, and gives it its name when it is complete."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(path)


def remove_notes(folder: pathlib.Path) -> None:
    """Removes what only a run that is not finished needs."""
    for path in [folder / sources.PLAN, *folder.glob("part-*"), *folder.glob("*.tmp")]:
        path.unlink(missing_ok=True)


def remove_all(folder: pathlib.Path) -> None:
    """Removes whatever `prepare` wrote."""
    remove_notes(folder)
    ours = [
        folder / tokenizers.FILE_NAME,
        *folder.glob("*.array_record"),
        *folder.glob("*.npy"),
    ]
    for path in ours:
        path.unlink(missing_ok=True)
