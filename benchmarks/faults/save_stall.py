"""How long the training loop stands still for a checkpoint, in steps of the same model.

Command: python benchmarks/faults/save_stall.py [--config.section.key=value …]
Leaves: the median step, and the median and longest time that the loop spent in a save. Exit
code 1 where the median save took longer than the median step.
"""

from __future__ import annotations

import contextlib
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from neo_jax import config as config_lib
from neo_jax import host_memory, pretrain
from neo_jax.metrics import Throughput
from neo_jax.watch import HangWatch

SAVE_EVERY = 10  # steps


def main() -> None:
    """Trains the smoke run's model for 60 steps, or another one."""
    config = config_lib.load_experiment(
        "cpu_smoke",
        [
            *("train.num_steps=60", "eval.every=0", "eval.max_batches=1"),
            *("eval.sample_tokens=0", f"checkpoint.every={SAVE_EVERY}"),
            *(argument.removeprefix("--config.") for argument in sys.argv[1:]),
        ],
    )
    host_memory.keep_freed_memory()
    saves, began = record_saves(), record_steps()
    with tempfile.TemporaryDirectory() as workdir:
        pretrain.run(config, pathlib.Path(workdir))
    # A step's time runs to the beginning of the next; those that saved are left out.
    steps = {n: began[n + 1] - began[n] for n in began if n > 1 and n + 1 in began}
    plain = [steps[n] for n in steps if n % SAVE_EVERY]
    step, stall = statistics.median(plain), statistics.median(saves[:-1])
    print(f"a step: median {step:.3f} s of {len(plain)}")
    print(f"a save: median {stall:.3f} s, longest {max(saves[:-1]):.3f} s of {len(saves) - 1}")
    sys.exit(stall >= step)


def record_saves() -> list[float]:
    """Seconds that the loop spends in each save from now on."""
    seconds, pause = [], Throughput.pause

    @contextlib.contextmanager
    def timed(self: Throughput, kind: Any) -> Iterator[None]:
        began = time.perf_counter()
        with pause(self, kind):
            yield
        if kind == "save":
            seconds.append(time.perf_counter() - began)

    Throughput.pause = timed  # type: ignore[method-assign]
    return seconds


def record_steps() -> dict[int, float]:
    """When each step begins from now on."""
    began, step = {}, HangWatch.step

    def timed(self: HangWatch, number: int) -> None:
        began[number] = time.perf_counter()
        step(self, number)

    HangWatch.step = timed  # type: ignore[method-assign]
    return began


if __name__ == "__main__":
    main()
