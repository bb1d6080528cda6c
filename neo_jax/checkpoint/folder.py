"""The folder of a run's checkpoints: which there are, which are good, which to keep.

Enters: `WORKDIR/checkpoints`. Leaves: steps, what `meta.json` says of each, and verdicts.
Nothing here reads an array.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from neo_jax.checkpoint import digests
from neo_jax.config import CheckpointConfig, ConfigError

PARTIAL, REFUSED, DELETED = ".partial", ".refused", ".deleted"
META = "meta.json"


class CheckpointError(ConfigError):
    """A checkpoint that cannot be written, or none that can be read; one line."""


@dataclasses.dataclass(frozen=True)
class Folder:
    """The checkpoints of one workdir.

    A rename makes a checkpoint visible, and a rename hides it before it is deleted, so that
    a process may be killed between any two lines.
    """

    path: pathlib.Path

    @classmethod
    def of(cls, workdir: pathlib.Path) -> Folder:
        """The folder of a workdir, or `workdir` itself where it is that folder."""
        workdir = pathlib.Path(workdir)
        is_inner = workdir.name == "checkpoints" and not (workdir / "checkpoints").is_dir()
        return cls((workdir if is_inner else workdir / "checkpoints").resolve())

    def steps(self) -> list[int]:
        """Of finished checkpoints, verified or not; oldest first."""
        if not self.path.is_dir():
            return []
        return sorted(int(path.name) for path in self.path.iterdir() if path.name.isdecimal())

    def at(self, step: int) -> pathlib.Path:
        """Where the checkpoint of a step is."""
        return self.path / str(step)

    def partial(self, step: int) -> pathlib.Path:
        """Where the checkpoint of a step is while it is being written."""
        return self.path / f"{step}{PARTIAL}"

    def leftovers(self, *endings: str) -> list[pathlib.Path]:
        """Folders that end in one of `endings`."""
        if not self.path.is_dir():
            return []
        return sorted(path for path in self.path.iterdir() if path.suffix in endings)

    def meta(self, step: int) -> dict[str, Any]:
        """What was noted beside the arrays; empty where that cannot be read."""
        try:
            read = json.loads((self.at(step) / META).read_text())
        except (OSError, ValueError):
            return {}
        return read if isinstance(read, dict) else {}

    def problem(self, step: int) -> str | None:
        """Why a checkpoint is not to be trusted; None if every file is as it was written."""
        return digests.problem(self.at(step))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process writes or removes checkpoints here.

        A kill ends it, too. Some network file systems know no locks; nothing is locked there.

        Raises:
          CheckpointError: another process is at it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        number = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(number)
            raise CheckpointError(
                f"{self.path} is in use by another process; wait until it has ended, or "
                f"choose another workdir."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EBADF, errno.EINVAL):
                raise
        try:
            yield
        finally:
            os.close(number)

    def finish(self, step: int, meta: Mapping[str, Any]) -> None:
        """Makes a checkpoint visible whose arrays are all written."""
        partial = self.partial(step)
        text = json.dumps({"step": step, **meta}, indent=1) + "\n"
        digests.write_through(partial / META, text.encode())
        digests.write(partial)
        os.rename(partial, self.at(step))
        digests.sync_folder(self.path)

    def refuse(self, step: int) -> None:
        """Puts a checkpoint aside that did not verify."""
        aside = self.path / f"{step}{REFUSED}"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(self.at(step), aside)

    def delete(self, steps: Sequence[int]) -> None:
        """Removes checkpoints."""
        for step in steps:
            os.rename(self.at(step), self.path / f"{step}{DELETED}")
        self.clean(DELETED)

    def clean(self, *endings: str) -> None:
        """Removes what was broken off or refused."""
        for path in self.leftovers(*endings):
            shutil.rmtree(path)

    def superfluous(self, config: CheckpointConfig) -> list[int]:
        """Steps of checkpoints that the config does not ask to keep."""
        steps = self.steps()
        scores = {step: self.meta(step).get("score") for step in steps}
        kept = to_keep(steps, scores, config)
        return [step for step in steps if step not in kept]


def to_keep(
    steps: Sequence[int], scores: Mapping[int, float | None], config: CheckpointConfig
) -> set[int]:
    """The newest, those at multiples of `keep_every`, and the best.

    Args:
      steps: of all checkpoints, oldest first.
      scores: held-out loss of those that were scored.
      config: how many.
    """
    scored = [(score, step) for step in steps if (score := scores.get(step)) is not None]
    best = [step for _, step in sorted(scored)[: config.keep_best]]
    every = [step for step in steps if config.keep_every and step % config.keep_every == 0]
    return {*steps[-config.keep :], *every, *best}


def versions() -> dict[str, str]:
    """Of what wrote a checkpoint, for whoever has to read it years later."""
    found = {"python": platform.python_version()}
    for name in ("neo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
