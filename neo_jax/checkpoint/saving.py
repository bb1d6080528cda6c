"""From a training state to a checkpoint, while training goes on.

Enters: a `TrainState`, the data's position, the config. Leaves: a folder of checkpoints in
which each is whole. The loop waits only until the arrays are copied off the devices; a thread
does the rest: orbax's files, `meta.json`, digests, the rename that makes it visible, and the
removal of checkpoints that are no longer wanted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import pathlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from neo_jax.checkpoint import restoring
from neo_jax.checkpoint.folder import DELETED, PARTIAL, CheckpointError, Folder, versions
from neo_jax.config import CheckpointConfig, Config
from neo_jax.state import Params, TrainState

_STEPS_BETWEEN_QUESTIONS = 50


class Checkpointer:
    """The checkpoints of one workdir. A context manager: leaving it ends the writing.

    Args:
      workdir: checkpoints lie in its `checkpoints/`.
      config: when to save, and what to keep.
      clock: seconds that never run backwards; decides when a save is due by time.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        config: CheckpointConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = Folder.of(workdir)
        self._config, self._clock = config, clock
        self._last_saved_at = clock()
        self._orbax = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(),
            # Else a folder that cannot be created is only told after orbax waited for it for
            # ten minutes.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._saving: int | None = None
        self._lock = contextlib.ExitStack()
        if jax.process_index() == 0:
            self._lock.enter_context(self._folder.locked())
            self._folder.clean(PARTIAL, DELETED)  # of a run that was killed

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        # Where a run of several processes fails, the others may be gone: nobody to wait for.
        if kind is not None and jax.process_count() > 1:
            return
        try:
            self.wait()
        except CheckpointError:
            if kind is None:  # else that is what there is to tell
                raise
        finally:
            self._orbax.close()
            self._lock.close()

    def latest_step(self) -> int | None:
        """Steps made at the newest checkpoint; None if there is none."""
        return max(self._folder.steps(), default=None)

    def due(self, step: int) -> bool:
        """Whether to save after this step: by its number, or by the clock of process 0."""
        if step % self._config.every == 0:
            return True
        seconds = self._config.minutes * 60
        # Asking process 0 waits for the devices, so it is not done at every step.
        if not seconds or (jax.process_count() > 1 and step % _STEPS_BETWEEN_QUESTIONS):
            return False
        return bool(restoring.agree(self._clock() - self._last_saved_at >= seconds))

    def save(
        self,
        step: int,
        state: TrainState | Mapping[str, Params],
        data: dict[str, Any],
        config: Config,
        *,
        score: float | None = None,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to write a checkpoint; a step that is there already is left as it is.

        Args:
          step: steps made so far.
          state: whole, or parameters alone; may be donated once this returns.
          data: the pipeline's position, as JSON.
          config: what the run was told.
          score: held-out loss of these parameters, where it was measured.
          seconds: how long the run took so far, by use.

        Raises:
          CheckpointError: this one, or the one before it, cannot be written.
        """
        self.wait()
        if step in self._folder.steps():
            return
        meta = {
            "saved_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "score": score,
            "data": data,
            "config": dataclasses.asdict(config),
            "versions": versions(),
            "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
            "processes": jax.process_count(),
            "seconds": dict(seconds or {}),
        }
        self._last_saved_at = self._clock()
        self._saving = step
        try:
            self._orbax.save(
                self._folder.partial(step) / "state", args=ocp.args.PyTreeSave(state)
            )
        except Exception as error:
            raise self._unwritten(error) from error
        self._thread = threading.Thread(
            target=self._finish, args=(step, meta), name="checkpoint", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Tells of a failed write as soon as it is known, without waiting.

        Raises:
          CheckpointError: the last checkpoint could not be written.
        """
        if self._failure is not None:
            self.wait()

    def wait(self) -> None:
        """Returns once everything saved so far is on disk, for all processes.

        Raises:
          CheckpointError: it could not be written. Earlier checkpoints are as they were.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._failure is not None:
            error, self._failure = self._failure, None
            raise self._unwritten(error) from error
        if jax.process_count() > 1:
            restoring.agree(0)  # nobody goes on before process 0 has renamed

    def newest_good(self) -> int | None:
        """Step of the newest checkpoint that verifies; those that do not are refused by name.

        Raises:
          CheckpointError: there are checkpoints, and none is good.
        """
        return restoring.newest_good(self._folder, put_aside=True)

    def best(self) -> tuple[int, float] | None:
        """Step and score of the checkpoint with the lowest score; None if none was scored."""
        scores = (
            (self._folder.meta(step).get("score"), step) for step in self._folder.steps()
        )
        scored = [(step, score) for score, step in scores if score is not None]
        return min(scored, key=lambda pair: pair[1], default=None)

    def read(self, step: int, wanted: Any) -> Any:
        """Arrays of a checkpoint that was found good; see `restoring.read`."""
        return restoring.read(self._folder, step, wanted)

    def is_params_alone(self, step: int) -> bool:
        """Whether a checkpoint holds parameters and nothing to train on with."""
        return restoring.is_params_alone(self._folder, step)

    def meta(self, step: int) -> dict[str, Any]:
        """What was noted beside the arrays of a checkpoint."""
        return self._folder.meta(step)

    def _finish(self, step: int, meta: Mapping[str, Any]) -> None:
        """What the thread does once orbax has its copy of the arrays."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                self._folder.finish(step, meta)
                self._folder.delete(self._folder.superfluous(self._config))
        except BaseException as error:
            self._failure = error

    def _unwritten(self, error: BaseException) -> CheckpointError:
        """One line of a failed write; what it left behind is removed."""
        step = self._saving
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # then the next start removes it
                self._folder.clean(PARTIAL)
        latest = self.latest_step()
        rest = (
            "there is no earlier checkpoint"
            if latest is None
            else f"the checkpoint of step {latest} is as it was, and the run resumes from it"
        )
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self._folder.path}: "
            f"{_reason(error)}; {rest}."
        )


def save_params(workdir: pathlib.Path, params: Params, config: Config) -> None:
    """Writes parameters alone, as step 0 of a workdir, for `restore_params` to read.

    Raises:
      CheckpointError: they cannot be written.
    """
    with Checkpointer(workdir, config.checkpoint) as saved:
        saved.save(0, {"params": params}, {}, config)


# Said somewhere in what tensorstore raises, which fills pages.
_REASONS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "Permission denied",
    "Read-only file system",
    "Input/output error",
    "Stale file handle",
)


def _reason(error: BaseException) -> str:
    text = f"{error} {error.__cause__ or ''} {error.__context__ or ''}"
    for reason in _REASONS:
        if reason.lower() in text.lower():
            return reason
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
