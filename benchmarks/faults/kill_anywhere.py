"""Kills a 200-step run with -9 at random moments; its losses must be those of an unbroken run.

Command: python benchmarks/faults/kill_anywhere.py --kills 20 --seed 0
Leaves: a line per kill (what the run was doing, at which step), and a verdict. The lines of
metrics.jsonl are compared after every kill, and the whole at the end: to the digit, apart from
what a clock says. A run that ends before all kills is compared, and another begins.
Exit code 1 where they differ.
"""

from __future__ import annotations

import argparse
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

import common

# Where the kills go, in turn; the moment inside is random. "writing" is what the thread of a
# checkpoint does while steps go on.
PHASES = ("step", "writing", "eval", "compile", "save")
# The delay after the phase was seen, at most; a phase that ends sooner is missed and told as
# what it became.
_LONGEST = {"step": 0.5, "writing": 0.1, "eval": 0.1, "compile": 1.5, "save": 0.02}


def main() -> None:
    """Runs the whole comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    arguments = parser.parse_args()
    phases, rng = arguments.phases, random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        experiment = common.write_experiment(folder)
        unbroken = run_to_its_end(experiment, folder / "unbroken")
        print(
            f"unbroken: {len(unbroken)} lines, last loss {unbroken[-1]['loss']!r}", flush=True
        )
        number, runs = 0, 1
        while number < arguments.kills:
            killed = folder / f"killed_{runs}"
            where = kill(experiment, killed, phases[number % len(phases)], rng)
            if where is None:
                compare(common.lines(killed), unbroken)
                runs += 1
                continue
            number += 1
            lines = common.lines(killed)
            same = are_part_of(lines, unbroken)
            last = max((line["step"] for line in lines), default=0)
            print(f"kill {number:2}: {where:18} step {last:3}  same: {same}", flush=True)
            if not same:
                sys.exit("the losses differ")
        compare(run_to_its_end(experiment, killed), unbroken)


def compare(whole: list[dict[str, Any]], unbroken: list[dict[str, Any]]) -> None:
    """Tells whether a run's lines are those of the unbroken one; ends where they are not."""
    same = sort(whole) == sort(unbroken)
    print(
        f"the whole curve, {len(whole)} lines: {'equal' if same else 'DIFFERENT'}", flush=True
    )
    if not same:
        sys.exit(1)


def run_to_its_end(experiment: pathlib.Path, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """What the run logged."""
    process = common.start(experiment, workdir)
    _, told = process.communicate()
    if process.returncode:
        sys.exit(f"the run failed:\n{told}")
    return common.lines(workdir)


def kill(
    experiment: pathlib.Path, workdir: pathlib.Path, phase: str, rng: random.Random
) -> str | None:
    """Starts the run, and kills it at a random moment of a phase.

    Returns:
      What it was doing; None where it came to its end before.
    """
    said = experiment.parent / "said"
    said.write_text("")
    # Whoever is to be killed while it compiles must find nothing compiled.
    cache = {"JAX_ENABLE_COMPILATION_CACHE": "false"} if phase == "compile" else {}
    process = common.start(
        experiment,
        workdir,
        prefix=("benchmarks/faults/watched_run.py", str(said)),
        stderr=subprocess.DEVNULL,
        **cache,
    )
    # Steps and saves are met a while after the start, at a place that differs each time.
    first = len(common.lines(workdir)) + rng.randrange(1, 12)
    while process.poll() is None:
        doing = is_doing(said, workdir)
        if doing == phase and (phase == "compile" or len(common.lines(workdir)) >= first):
            break
        time.sleep(0.001)
    time.sleep(rng.random() * _LONGEST[phase])
    process.kill()
    doing = is_doing(said, workdir)
    if process.wait() == 0:
        return None
    if process.returncode != -9:
        sys.exit(f"the run ended by itself, with {process.returncode}")
    return f"{phase} → {doing}" if doing != phase else phase


def is_doing(said: pathlib.Path, workdir: pathlib.Path) -> str:
    """The run's own word; "writing" where a checkpoint is being written beside the steps."""
    word = said.read_text().strip()
    if word == "step" and any((workdir / "checkpoints").glob("*.partial")):
        return "writing"
    return word


def are_part_of(lines: list[dict[str, Any]], whole: list[dict[str, Any]]) -> bool:
    """Whether each line is one of the unbroken run, to the digit."""
    return all(line in whole for line in lines)


def sort(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By step and split: an evaluation that was made up for comes later in the file."""
    return sorted(lines, key=lambda line: (line["step"], line["split"]))


if __name__ == "__main__":
    main()
