"""What a run is told from outside, and what it notices of itself: notices to leave, and hangs.

Enters: signals, and the steps as they pass. Leaves: an answer to "is it time to save and go?",
which all processes give at the same step, and the stacks of all threads when a step hangs.
"""

from __future__ import annotations

import collections
import contextlib
import pathlib
import signal
import statistics
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

# Exit codes of the training command besides 0 and a user's 2. EX_TEMPFAIL of sysexits.h,
# "the user is invited to retry": whatever restarts jobs may look for it.
EXIT_PREEMPTED = 75
EXIT_FAILED = 1


class Preempted(Exception):
    """The run ends, since its machine is wanted back; nothing is lost.

    Args:
      step: of the checkpoint made for it; None if no work was under way.
    """

    def __init__(self, step: int | None = None) -> None:
        what = "nothing was under way" if step is None else f"all up to step {step} is saved"
        super().__init__(f"told to stop; {what}")
        self.step = step


class Preemption:
    """Whether this machine is about to be taken away. A context manager.

    The platform says so with SIGTERM. One process takes the signal itself: while there is
    nothing to save it raises `Preempted` at once, and inside `deferred` it is remembered.
    Where several train together, JAX's preemption service takes it on any of them and finds
    a question that all have still before them.
    """

    def __init__(self) -> None:
        self._told = self._deferred = False
        self._asked = 0
        self._before: Any = None

    def __enter__(self) -> Preemption:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if jax.process_count() == 1 and in_main_thread:
            self._before = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, work is under way, and whoever does it asks whether to save it and leave.

        Raises:
          Preempted: the notice came after the last question.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self._told:
            raise Preempted

    def reached(self) -> bool:
        """Whether to save now and leave. All processes ask equally often, for one answer."""
        self._asked += 1
        if jax.process_count() == 1:
            return self._told
        return bool(multihost_utils.reached_preemption_sync_point(self._asked))

    def leave_if_told(self) -> None:
        """Breaks off what may be broken off, such as an evaluation. Counts as a question.

        Raises:
          Preempted: the answer is yes.
        """
        if self.reached():
            raise Preempted

    def _take(self, number: int, frame: types.FrameType | None) -> None:
        del number, frame
        if self._told:
            return
        self._told = True
        if not self._deferred:
            raise Preempted
        print("neo_jax: told to stop; saving first.", file=sys.stderr, flush=True)


class HangWatch:
    """Writes down what every thread is doing when a step takes far too long.

    A context manager; its thread looks once a second. Nothing is ended: a machine that
    recovers goes on, and who looks at the log sees where it stood.

    Args:
      path: takes the stacks.
      say: takes one line.
      clock: seconds that never run backwards.
    """

    FACTOR = 10.0  # times the median step
    _LEAST_SECONDS = 1.0  # shorter delays are the system's own
    _FIRST = 5  # steps before there is a median to speak of

    def __init__(
        self,
        path: pathlib.Path,
        say: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._say, self._clock = path, say, clock
        self._seconds = collections.deque[float](maxlen=101)
        self._step, self._began = 0, None  # type: int, float | None
        self._reported: int | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)

    def __enter__(self) -> HangWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()

    def step(self, step: int) -> None:
        """A step begins; the one before it, if it was watched, has ended."""
        now = self._clock()
        if self._began is not None:
            self._seconds.append(now - self._began)
        self._step, self._began = step, now

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside is allowed to take as long as it takes."""
        self._began = None
        try:
            yield
        finally:
            self._began = None

    def look(self) -> None:
        """Reports the step under way if it is overdue, once."""
        began, step = self._began, self._step
        if began is None or len(self._seconds) < self._FIRST or step == self._reported:
            return
        median = statistics.median(self._seconds.copy())
        seconds = self._clock() - began
        if seconds <= max(self.FACTOR * median, self._LEAST_SECONDS):
            return
        self._reported = step
        line = f"step {step} takes {seconds:.1f} s so far, the median is {median:.3f} s"
        with self._path.open("a") as file:
            file.write(f"{line}\n\n{stacks()}\n")
        self._say(f"{line}; what every thread does is in {self._path}")

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            with contextlib.suppress(OSError):  # a full disk is told by who needs it
                self.look()


def stacks() -> str:
    """What every Python thread of this process is doing, as text."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(number, number)!r}:\n{''.join(traceback.format_stack(frame))}"
        for number, frame in sys._current_frames().items()
    ]
    return "\n".join(parts)
