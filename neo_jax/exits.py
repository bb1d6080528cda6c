"""How the commands that train read their settings, and how they end.

Enters: what is left of a command line; whatever ends a run too early. Leaves: overrides of the
config; one line, and an exit status that tells a user's mistake from a machine's.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Iterator, Sequence

import jax

from neo_jax import distributed
from neo_jax.checkpoint import CheckpointError
from neo_jax.config import ConfigError
from neo_jax.run import DivergedError
from neo_jax.watch import EXIT_FAILED, EXIT_PREEMPTED, Preempted

# What a disk may answer while a run writes to it.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


def overrides(parser: argparse.ArgumentParser, rest: Sequence[str]) -> list[str]:
    """`--config.section.key=value` (or with a space) as `section.key=value`.

    Args:
      parser: ends the command where something else is there.
      rest: what it did not know.
    """
    found = []
    left = list(rest)
    while left:
        flag = left.pop(0)
        if not flag.startswith("--config."):
            parser.error(f"unknown argument {flag!r}; settings are --config.section.key=value")
        if "=" not in flag and left and not left[0].startswith("--"):
            flag += "=" + left.pop(0)
        found.append(flag.removeprefix("--config."))
    return found


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """Whatever ends a run too early is told in one line.

    Raises:
      SystemExit: 2 after a user's mistake; 1 where the run cannot go on (a full disk, a loss
        that diverged); 75 where it was told to stop, and saved; 130 where it was
        interrupted. After 75 and 130 the same command resumes. Where another process of the
        run is gone, this one ends with 69, and the same commands on all of them resume.
    """
    try:
        yield
    except (CheckpointError, DivergedError) as error:
        _leave_if_alone(error)
        print(f"neo_jax: {error}", file=sys.stderr)
        raise SystemExit(EXIT_FAILED) from None
    except ConfigError as error:
        print(f"neo_jax: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Preempted as error:
        print(f"neo_jax: {error}; the same command resumes.", file=sys.stderr)
        raise SystemExit(EXIT_PREEMPTED) from None
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"neo_jax: {error.strerror}{where}; mend that, and the same command resumes.",
            file=sys.stderr,
        )
        raise SystemExit(EXIT_FAILED) from None
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # whichever XLA raises
        _leave_if_alone(error)
        raise
    except KeyboardInterrupt:
        print("neo_jax: interrupted; the same command resumes.", file=sys.stderr)
        raise SystemExit(130) from None


def _leave_if_alone(error: BaseException) -> None:
    """Ends this process if an error means that another one of the run is gone."""
    lost = distributed.lost_process(error)
    if lost is None:
        return
    print(
        f"neo_jax: process {jax.process_index()} of {jax.process_count()} lost another one of "
        f"this run ({lost}); start all of them again with the same command, and they resume "
        f"from the newest checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    # Not sys.exit: on the way out JAX would wait for the one that is gone.
    os._exit(distributed.EXIT_LOST)
