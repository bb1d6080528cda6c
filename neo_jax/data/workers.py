"""Processes that tokenise the units of a source.

Enters: units and what is common to them. Leaves: every unit written by shards.py, in one
process after another or in several at a time. These start while their parent, which is one of
them, is still opening the tokenizer: on a corpus of a few megabytes that is a good part of the
work. Where one meets an error all stop within a megabyte of text.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tqdm

from neo_jax import tokenizer as tokenizers
from neo_jax.config import ConfigError
from neo_jax.data.shards import Job, prepare_unit
from neo_jax.data.sources import Source, Unit

_PROGRESS_BYTES = 1 << 20  # of text, between two words from a process


class Workers:
    """Processes that wait for units; used in a `with`, whose end is theirs.

    One of them is this process itself, so that a count of one starts nothing.
    """

    def __init__(self, count: int) -> None:
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        if count == 1:
            return
        context = multiprocessing.get_context("spawn")
        self._done = context.SimpleQueue()  # bytes of text, as they are done
        self._stop = context.Event()  # one has met an error
        self._pool = concurrent.futures.ProcessPoolExecutor(
            count - 1, context, _start_process, (os.getpid(), self._done, self._stop)
        )
        for _ in range(count - 1):  # an order that finds nobody idle starts a process
            self._pool.submit(_nothing)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(
        self,
        job: Job,
        tokenizer: tokenizers.Tokenizer,
        units: Sequence[Unit],
        show_progress: bool,
    ) -> None:
        """Brings every unit to its end; the tokenizer's file is in the job's folder.

        Raises:
          ConfigError: an unreadable record, or a process was killed.
        """
        # tqdm counts text; files that are compressed hold more of it than their size says.
        with tqdm.tqdm(
            desc=f"prepare {job.source.name}",
            unit="B",
            unit_scale=True,
            disable=not show_progress,
        ) as bar:
            if self._pool is not None:
                self._run_parallel(job, tokenizer, units, bar)
                return
            firsts = _first_records(job, units, map)
            with _one_thread():
                for number, (unit, first) in enumerate(zip(units, firsts, strict=True)):
                    prepare_unit(job, tokenizer, number, unit, first, bar.update)

    def _run_parallel(
        self,
        job: Job,
        tokenizer: tokenizers.Tokenizer,
        units: Sequence[Unit],
        bar: tqdm.tqdm[Any],
    ) -> None:
        assert self._pool is not None
        reporter = threading.Thread(
            target=_report_progress, args=(self._done, bar), daemon=True
        )
        reporter.start()
        try:
            firsts = _first_records(job, units, self._pool.map)
            orders = [
                (number, unit, first)
                for number, (unit, first) in enumerate(zip(units, firsts, strict=True))
            ]
            futures = [
                self._pool.submit(_in_process, job, tokenizer.eos_token, *order)
                for order in orders
            ]
            for future in futures:
                future.add_done_callback(self._stop_on_error)
            with _one_thread(), contextlib.suppress(_Stopped):
                # From the end, where the others have not begun.
                for order, future in zip(reversed(orders), reversed(futures), strict=True):
                    if future.cancel():
                        _do(job, tokenizer, *order, self._done.put, self._stop)
            for future in concurrent.futures.as_completed(futures):
                if not future.cancelled() and not isinstance(future.exception(), _Stopped):
                    future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise ConfigError(
                "a process that tokenises was killed, perhaps for want of memory; run the "
                "same command again, with fewer --num_processes."
            ) from None
        except BaseException:
            self._stop.set()
            self._pool.shutdown(cancel_futures=True)  # they still tell their progress
            raise
        finally:
            self._done.put(None)
            reporter.join()

    def _stop_on_error(self, future: concurrent.futures.Future[None]) -> None:
        if not future.cancelled() and future.exception() is not None:
            self._stop.set()


class _Stopped(Exception):
    """Another process has met an error, which is told there."""


def _do(
    job: Job,
    tokenizer: tokenizers.Tokenizer,
    number: int,
    unit: Unit,
    first: int,
    tell: Callable[[int], Any],
    stop: Any,
) -> None:
    """Brings a unit to its end; looks up every megabyte of text to tell, and to be told."""
    waiting = 0

    def progress(num_bytes: int) -> None:
        nonlocal waiting
        waiting += num_bytes
        if waiting >= _PROGRESS_BYTES:
            tell(waiting)
            waiting = 0
            if stop.is_set():
                raise _Stopped

    prepare_unit(job, tokenizer, number, unit, first, progress)
    tell(waiting)


def _first_records(job: Job, units: Sequence[Unit], parallel: Callable[..., Any]) -> list[int]:
    """Each unit's first record, counted in the whole source; it decides what is held out."""
    if not job.config.holdout_every or len(units) == 1:
        return [0] * len(units)
    counts = list(parallel(_count, itertools.repeat(job.source), units[:-1]))
    return [0, *itertools.accumulate(counts)]


def _report_progress(done: Any, bar: tqdm.tqdm[Any]) -> None:
    while (num_bytes := done.get()) is not None:
        bar.update(num_bytes)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps `tokenizers` to one thread, as in each of several processes."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


# ------------------------------------------------------------------------- in a process

_tell: Callable[[int], Any]
_stop: Any  # an event
_ready: tuple[Job, tokenizers.Tokenizer] | None = None  # from the first unit on


def _start_process(parent: int, done: Any, stop: Any) -> None:
    global _tell, _stop
    _tell, _stop = done.put, stop
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """A run that was killed must not go on writing beside the next one."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _nothing() -> None:
    """An order that makes a process start."""


def _count(source: Source, unit: Unit) -> int:
    return source.count(unit)


def _in_process(job: Job, eos_token: str, number: int, unit: Unit, first: int) -> None:
    global _ready
    if _ready is None:  # a source may keep files open, and a tokenizer takes long to read
        path = job.folder / tokenizers.FILE_NAME
        _ready = job, tokenizers.load_file(path, eos_token)
    _do(*_ready, number, unit, first, _tell, _stop)
