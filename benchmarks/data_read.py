"""How fast one core reads prepared data: `python benchmarks/data_read.py`.

Writes random tokens as a prepared data set, then reads shuffled batches of 2048-token
sequences through the functions that training uses, in one process on one core, and prints
tokens per second for each packing. A v5e chip that trains GPT-Neo 125M at 50 % of its peak
needs about 100 thousand of them.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time

import numpy as np

from neo_jax import tokenizer as tokenizers
from neo_jax.config import DataConfig
from neo_jax.data import pipeline, sources, store
from neo_jax.data.tokens import EncodedDocument

SEQ_LEN = 2048
BATCH_SIZE = 64


def main() -> None:
    """Prints one JSON line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--million_tokens", type=int, default=64, help="size of the data set")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each reading")
    parser.add_argument("--readings", type=int, default=3)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(pathlib.Path(folder), arguments.million_tokens * 10**6)
        for packing, isolate in (("concat", False), ("concat", True), ("best_fit", True)):
            speeds = [
                read(folder, packing, isolate, arguments.seconds)
                for _ in range(arguments.readings)
            ]
            line = {
                "packing": packing,
                "isolate_documents": isolate,
                "million_tokens_per_second": round(statistics.median(speeds) / 1e6, 1),
                "all": [round(speed / 1e6, 1) for speed in speeds],
            }
            print(json.dumps(line), flush=True)


def write_tokens(folder: pathlib.Path, num_tokens: int) -> None:
    """A prepared directory of random documents, as `prepare` would leave it."""
    tokenizer = tokenizers.load("gpt2")
    rng = np.random.default_rng(0)
    shards, ends, total = [], [], 0
    while total < num_tokens:
        writer = store.ShardWriter(folder / f"train-{len(shards):05d}", tokenizer.vocab_size)
        while sum(writer.lengths) < min(num_tokens // 4, 1 << 24):
            ids = rng.integers(0, 50256, int(rng.lognormal(6.5, 1.2)) + 2).astype(np.uint16)
            ids[-1] = tokenizer.eos_id
            writer.add(EncodedDocument(0, ids, None, 4 * len(ids), "random", 0))
        ends += writer.lengths
        shards.append(writer.finish())
        total = sum(ends)
    np.save(folder / "train.ends.npy", np.cumsum(ends, dtype=np.int64))
    part = {"tokens": total, "documents": len(ends), "bytes": 4 * total, "shards": shards}
    manifest = {
        "format": sources.MANIFEST_FORMAT,
        "tokenizer": "gpt2",
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "dtype": "uint16",
        "settings": {"holdout_every": 0, "holdout_offset": 0},
        "splits": {"train": part},
    }
    (folder / sources.MANIFEST).write_text(json.dumps(manifest))


def read(folder: str, packing: str, isolate: bool, seconds: float) -> float:
    """Tokens per second, the epoch's order shuffled."""
    config = DataConfig(
        source=folder,
        holdout_every=0,
        seq_len=SEQ_LEN,
        batch_size=BATCH_SIZE,
        packing=packing,
        isolate_documents=isolate,
    )
    batches = pipeline.build(config, tokenizers.load("gpt2"), seed=0, split="train")
    next(batches)
    tokens, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        tokens += next(batches)["inputs"].size
    batches.close()
    return tokens / elapsed


if __name__ == "__main__":
    main()
