"""Kills one of two processes that train together, or tells it to stop; the other must follow.

Command: python benchmarks/faults/lost_process.py [kill_1] [kill_0] [notice_1]
Leaves: for each case how long the other process went on, its exit code and its last line; and
whether both, started again, end with the losses of an unbroken run of two processes. Exit
code 1 where one of these is not as it should be: 69 within 60 seconds after a kill, 75 after
a notice (SIGTERM).
"""

from __future__ import annotations

import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import common

LONGEST = 60.0  # seconds that the other may go on
LOST, PREEMPTED = 69, 75  # its exit codes
SHORT = ("--config.train.num_steps=100",)
# What happens, and to which of the two.
CASES = {
    "kill_1": (signal.SIGKILL, 1),
    "kill_0": (signal.SIGKILL, 0),
    "notice_1": (signal.SIGTERM, 1),
}


def main() -> None:
    """Runs the unbroken pair, and a pair for each case."""
    rng = random.Random(0)
    good = True
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        experiment = common.write_experiment(folder)
        finish(common.start_two(experiment, folder / "unbroken", *SHORT))
        unbroken = common.lines(folder / "unbroken")
        print(f"unbroken: {len(unbroken)} lines", flush=True)
        for case in sys.argv[1:] or CASES:
            number, victim = CASES[case]
            workdir = folder / case
            pair = common.start_two(experiment, workdir, *SHORT)
            wait_for(workdir, rng.randrange(20, 80), pair)
            pair[victim].send_signal(number)
            codes, seconds, told = follow(pair, victim)
            step = max(line["step"] for line in common.lines(workdir))
            print(f"{case} at step {step}: after {seconds:.1f} s the other ended, {codes}:")
            print(f"  {told}", flush=True)
            finish(common.start_two(experiment, workdir, *SHORT))
            same = sort(common.lines(workdir)) == sort(unbroken)
            print(f"  both started again: the curve is {'equal' if same else 'DIFFERENT'}")
            expected = PREEMPTED if number == signal.SIGTERM else LOST
            good &= same and seconds <= LONGEST and codes[1 - victim] == expected
    sys.exit(not good)


def wait_for(workdir: pathlib.Path, count: int, pair: list[subprocess.Popen[str]]) -> None:
    """Returns once so many lines are logged."""
    while len(common.lines(workdir)) < count:
        if any(process.poll() is not None for process in pair):
            sys.exit(f"it ended by itself: {pair[0].communicate()[1]}")
        time.sleep(0.01)


def follow(pair: list[subprocess.Popen[str]], victim: int) -> tuple[list[int], float, str]:
    """Exit codes of both, the seconds until the other ended, and its last line."""
    began = time.monotonic()
    _, told = pair[1 - victim].communicate(timeout=10 * LONGEST)
    seconds = time.monotonic() - began
    pair[victim].communicate()
    ours = [line for line in told.splitlines() if line.startswith("neo_jax: ")]
    codes = [process.returncode for process in pair]
    return codes, seconds, (ours or told.splitlines() or ["nothing"])[-1]


def finish(pair: list[subprocess.Popen[str]]) -> None:
    """Waits for both to end well."""
    for process in pair:
        _, told = process.communicate()
        if process.returncode:
            sys.exit(f"a process failed with {process.returncode}:\n{told}")


def sort(lines: list[dict[str, object]]) -> list[dict[str, object]]:
    """By step and split: an evaluation that was made up for comes later in the file."""
    return sorted(lines, key=lambda line: (line["step"], line["split"]))


if __name__ == "__main__":
    main()
