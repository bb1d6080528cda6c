"""How long best-fit packing plans: `python benchmarks/data_best_fit.py`.

Draws lengths of documents at random, about 1,400 tokens on average, plans rows of 2048 tokens,
and prints seconds, the memory that the plan keeps and the most that planning took, and the
part of all rows that holds tokens. A large plan lies in a file, here of a temporary folder:
what a second start takes, and how much goes to a worker, is printed, too.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import pickle
import resource
import tempfile
import time

import numpy as np

from neo_jax.data import packing

SEQ_LEN = 2048


class Lengths:
    """As much of a `TokenStore` as planning asks for."""

    def __init__(self, documents: int, path: pathlib.Path) -> None:
        rng = np.random.default_rng(0)
        ends = np.empty(documents, np.int64)
        for start in range(0, documents, 1 << 22):
            part = ends[start : start + (1 << 22)]
            part[:] = rng.lognormal(6.5, 1.2, len(part)) + 2
        np.save(path, np.cumsum(ends, out=ends))
        self._path = path

    def document_ends(self) -> np.ndarray:
        """The index after each document."""
        return np.load(self._path, mmap_mode="r")


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--million_documents", type=float, default=10)
    documents = int(parser.parse_args().million_documents * 1e6)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        measure(documents, Lengths(documents, pathlib.Path(folder) / "ends.npy"))


def measure(documents: int, store: Lengths) -> None:
    """Prints the line."""
    before = peak()
    start, cpu = time.perf_counter(), time.process_time()
    rows = packing.BestFitRows(store, SEQ_LEN)  # type: ignore[arg-type]
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    start = time.perf_counter()
    again = packing.BestFitRows(store, SEQ_LEN)  # type: ignore[arg-type]
    second = time.perf_counter() - start
    kept = sum(a.nbytes for a in vars(rows).values() if isinstance(a, np.ndarray))
    ends = store.document_ends()
    start = time.perf_counter()
    for row in np.random.default_rng(0).integers(0, rows.num_rows, 10000).tolist():
        rows.pieces(row)
    line = {
        "million_documents": documents / 1e6,
        "million_rows": round(rows.num_rows / 1e6, 2),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "second_start_seconds": round(second, 2),
        "bytes_to_a_worker": len(pickle.dumps(again)),
        "kept_bytes_a_document": round((kept - ends.nbytes) / documents, 1),
        "most_gib": round(peak(), 2),
        "gib_before": round(before, 2),
        "filled": round(int(ends[-1]) / (rows.num_rows * SEQ_LEN), 6),
        "microseconds_a_row": round((time.perf_counter() - start) * 100, 1),
    }
    print(json.dumps(line))


def peak() -> float:
    """The most memory that this process ever held, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
