"""`prepare` killed at random moments: `python benchmarks/data_kill.py --source sotu`.

Prepares a source once in peace. Then, in another folder, starts the same command again and
again and ends it, with every process it started, by SIGKILL: each time up to half a second
after a random number of shards was complete, so that the moments spread over the whole work
however fast the machine is. A last run goes to the end, and the checksums of all files of both
folders are compared. Prints one JSON line a round; ends with an error where a file differs.
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
        subprocess.run([*line, "--output", str(whole)], check=True, capture_output=True)
        expected = checksums(whole)
        shards = len(list(whole.glob("train-*")))
        for number in range(arguments.rounds):
            again = pathlib.Path(folder) / f"again-{number}"
            command = [*line, "--output", str(again)]
            kills = []
            for wanted in sorted(rng.integers(0, shards, arguments.kills).tolist()):
                if killed(command, again, wanted, float(rng.uniform(0, 0.5))):
                    kills.append(len(list(again.glob("part-*.json"))))
            subprocess.run(command, check=True, capture_output=True)
            found = checksums(again)
            assert found == expected, sorted(set(found.items()) ^ set(expected.items()))
            report = {"killed_with_shards_done": kills, "shards": shards}
            print(json.dumps({**report, "files": len(found), "identical": True}), flush=True)


def killed(command: list[str], folder: pathlib.Path, shards: int, seconds: float) -> bool:
    """Whether the command was killed, some time after so many shards were complete."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while len(list(folder.glob("part-*.json"))) < shards and process.poll() is None:
        time.sleep(0.005)
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
