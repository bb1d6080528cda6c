"""The training command, with a word in a file of what it is doing: for who wants to kill it.

Enters: the file, then the arguments of neo_jax.main. The word is one of those that the loop
tells its clock: compile, eval, save, restart; before the loop it is "start", and in between
"step".
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from neo_jax import main
from neo_jax.metrics import Throughput

WIDTH = 8


def watch(path: str) -> None:
    """From now on the clock's words go into the file."""
    number = os.open(path, os.O_WRONLY | os.O_CREAT)
    pause = Throughput.pause

    def say(word: str) -> None:
        os.pwrite(number, word.ljust(WIDTH).encode(), 0)

    @contextlib.contextmanager
    def told(self: Throughput, kind: Any) -> Iterator[None]:
        say(kind)
        with pause(self, kind):
            yield
        say("step")

    say("start")
    Throughput.pause = told  # type: ignore[method-assign]


if __name__ == "__main__":
    watch(sys.argv[1])
    main.main(sys.argv[2:])
