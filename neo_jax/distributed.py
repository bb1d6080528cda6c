"""One run over several processes: how they find each other, and how the loss of one is told.

Enters: the environment. Leaves: processes that know of each other, before anything touches a
device; and, where an error means that another process is gone, its name for whoever reads
the log.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pathlib
import re
import signal
import sys
from typing import Any

import jax

from neo_jax.config import ConfigError

# Seconds without a sign of life after which a process counts as lost. Sockets of a process
# that was killed close at once; this is for machines that vanish, and not for those that are
# merely slow.
_HEARTBEAT_SECONDS = 45
# The exit code of a process that lost another one: EX_UNAVAILABLE of sysexits.h.
EXIT_LOST = 69
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# Seconds that processes wait for each other at the end of a run.
_SHUTDOWN_SECONDS = 300

# How the collectives of CPUs (gloo), the coordination service and its barriers tell that
# another process is gone.
_LOST = re.compile(
    r"gloo|connection (closed|reset|refused)|closed by peer|socket closed|broken pipe|"
    r"heartbeat|coordination service|\bbarrier\b|unavailable|deadline.exceeded",
    re.IGNORECASE,
)


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Connects the processes of a run, where it has several; before any other use of JAX.

    Args:
      coordinator: host:port of process 0; "auto" where the cluster tells everything (Cloud
        TPU pods, Slurm, and others that JAX knows); None: as JAX_COORDINATOR_ADDRESS,
        JAX_NUM_PROCESSES and JAX_PROCESS_ID say, and "auto" on a TPU machine.
      num_processes: how many there are.
      process_id: which this is, from 0.

    Raises:
      ConfigError: half of it is said, or the others do not answer.
    """
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise ConfigError(
                "--num_processes and --process_id go with --coordinator HOST:PORT."
            )
        coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS")
        num_processes, process_id = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
        if not coordinator:
            if not _is_tpu_machine():
                return
            coordinator = "auto"
    if coordinator == "auto":
        _initialize(cluster_detection_method=None)
        return
    if num_processes is None or process_id is None:
        raise ConfigError(
            f"--coordinator {coordinator} needs --num_processes and --process_id."
        )
    if not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process_id {process_id} must lie in 0 … --num_processes-1 = "
            f"{num_processes - 1}."
        )
    _initialize(
        coordinator_address=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        cluster_detection_method="deactivate",  # nothing is left to detect
    )


def _initialize(**given: Any) -> None:
    _supervise()
    try:
        jax.distributed.initialize(
            **given,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"--coordinator {given.get('coordinator_address', 'auto')}: the processes of this "
            f"run did not find each other: {reason}"
        ) from None


def _supervise() -> None:
    """Goes on in a child, while this process waits to tell how that ends.

    JAX aborts a process whose coordinator is gone, from a thread of C++ and within
    milliseconds, so that only another process can still say what that means. Signals are
    passed on; the child dies with its parent.
    """
    passed_on = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)
    child = os.fork()  # nothing has started a thread yet
    if child == 0:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    for number in passed_on:
        signal.signal(number, lambda number, _: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGABRT:
        print(
            "neo_jax: JAX ended this process, most likely since another one of this run is "
            "gone (its words are above); start all of them again with the same command, and "
            "they resume from the newest checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        code = EXIT_LOST
    os._exit(code if code >= 0 else 128 - code)


def lost_process(error: BaseException) -> str | None:
    """What an error says of a process that is gone; None if it is about something else."""
    if jax.process_count() == 1:
        return None
    text = _first_line(error)
    return text if _LOST.search(str(error)) else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} must be a number.") from None


def _is_tpu_machine() -> bool:
    """Whether JAX will find TPU chips here; asking it would be the first touch of a device."""
    wanted = os.environ.get("JAX_PLATFORMS", "")
    if wanted and "tpu" not in wanted.split(","):
        return False
    devices = [
        *pathlib.Path("/dev").glob("accel[0-9]*"),
        *pathlib.Path("/dev/vfio").glob("[0-9]*"),
    ]
    return bool(devices) and importlib.util.find_spec("libtpu") is not None
