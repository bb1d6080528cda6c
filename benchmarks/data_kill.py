"""`prepare` killed at random moments: `python benchmarks/data_kill.py --source sotu`.

Prepares a source once in peace. Then, in another folder, starts the same command again and
again and ends it, with every process it started, by SIGKILL after a random time, until a run
comes to its end. Compares the checksums of all files of both folders. Prints one JSON line a
round; ends with an error where a file differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np


def main() -> None:
    """Prints one JSON line a round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="sotu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=6, help="in each round, at most")
    parser.add_argument("--num_processes", type=int, default=2)
    arguments, more = parser.parse_known_args()
    line = [sys.executable, "-m", "neo_jax.prepare", "--source", arguments.source]
    line += ["--shard_mib", "1", "--num_processes", str(arguments.num_processes), *more]
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        whole = pathlib.Path(folder) / "whole"
        start = time.perf_counter()
        subprocess.run([*line, "--output", str(whole)], check=True, capture_output=True)
        seconds = time.perf_counter() - start
        expected = checksums(whole)
        for number in range(arguments.rounds):
            again = pathlib.Path(folder) / f"again-{number}"
            command = [*line, "--output", str(again)]
            moments, left = [], []
            for _ in range(arguments.kills):
                # Soon enough that several kills meet one preparation.
                moments.append(round(float(rng.uniform(0.0, seconds / 2)), 2))
                if not killed(command, moments[-1]):
                    break
                left.append(len(list(again.iterdir())) if again.is_dir() else 0)
            subprocess.run(command, check=True, capture_output=True)
            found = checksums(again)
            assert found == expected, sorted(set(found.items()) ^ set(expected.items()))
            print(
                json.dumps(
                    {
                        "seconds_in_peace": round(seconds, 1),
                        "killed_after_seconds": moments[: len(left)],
                        "files_left_behind": left,
                        "files": len(found),
                        "identical": True,
                    }
                ),
                flush=True,
            )


def killed(command: list[str], seconds: float) -> bool:
    """Whether the command was still running after that time, and was killed."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)
        return False
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def checksums(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


if __name__ == "__main__":
    main()
