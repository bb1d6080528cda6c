"""One stream for all: `python benchmarks/data_stream.py --source TOKENS_DIR [more …]`.

Draws the same stretch of training batches from prepared tokens for 1, 2 and 4 hosts, 0, 1 and
4 workers, and several batch sizes, each from the start, and again from 20 random steps at
which the pipeline is restored from a state of another batch size. Hashes the sequences of each
way and prints one line a way; ends with an error where two differ. Several sources become a
mixture whose weights change on the way, and whose proportions and epochs are checked too.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time

import numpy as np

from neo_jax import tokenizer as tokenizers
from neo_jax.config import DataConfig
from neo_jax.data import pipeline

SEQ_LEN = 2048
HOSTS = (1, 2, 4)
BATCH_SIZES = (8, 16, 32)
SEED = 3


def main() -> None:
    """Prints one line a way of drawing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", nargs="+", required=True, help="prepared directories")
    parser.add_argument("--sequences", type=int, default=1024, help="of the stretch")
    arguments = parser.parse_args()
    config = settings(arguments.source, arguments.sequences)
    tokenizer = pipeline.load_tokenizer(config)
    whole = draw(config, tokenizer, 0, arguments.sequences)
    print(json.dumps({"sequences": len(whole), "sha256": digest(whole)}))
    resume_everywhere(config, tokenizer, whole)
    if config.mixture:
        check_proportions(config, tokenizer, arguments.sequences)
    ways = [(0, hosts, size) for hosts in HOSTS for size in BATCH_SIZES]
    ways += [(1, 1, 16), (1, 2, 32), (1, 4, 8), (4, 1, 8), (4, 2, 16), (4, 4, 32)]
    for workers, hosts, size in ways:
        way = dataclasses.replace(config, batch_size=size, num_workers=workers)
        start = time.perf_counter()
        found = draw(way, tokenizer, 0, arguments.sequences, hosts)
        assert found == whole, (workers, hosts, size)
        line = {"workers": workers, "hosts": hosts, "batch_size": size}
        line |= {"sha256": digest(found), "seconds": seconds_since(start)}
        print(json.dumps(line), flush=True)


def settings(names: list[str], sequences: int) -> DataConfig:
    """One source, or a mixture of all whose weights turn round halfway."""
    config = DataConfig(
        source=names[0],
        holdout_every=0,
        seq_len=SEQ_LEN,
        batch_size=BATCH_SIZES[0],
        isolate_documents=True,
    )
    if len(names) == 1:
        return config
    weights = [float(2**i) for i in range(len(names))]
    mixture = tuple(zip(names, weights, reversed(weights), strict=True))
    return dataclasses.replace(config, mixture=mixture, mixture_changes=(sequences // 2,))


def draw(
    config: DataConfig,
    tokenizer: tokenizers.Tokenizer,
    position: int,
    count: int,
    hosts: int = 1,
    state: dict[str, object] | None = None,
) -> list[bytes]:
    """A hash of each of `count` sequences from `position` on, all hosts together."""
    shares = []
    for host in range(hosts):
        batches = pipeline.build(
            config,
            tokenizer,
            seed=SEED,
            split="train",
            position=position,
            process_index=host,
            process_count=hosts,
        )
        if state is not None:
            batches.restore(state)
        shares.append([next(batches) for _ in range(count // config.batch_size)])
        batches.close()
    hashes = []
    for parts in zip(*shares, strict=True):
        for part in parts:
            for row in range(len(part["inputs"])):
                data = b"".join(part[key][row].tobytes() for key in sorted(part))
                hashes.append(hashlib.sha256(data).digest())
    return hashes


def resume_everywhere(
    config: DataConfig, tokenizer: tokenizers.Tokenizer, whole: list[bytes]
) -> None:
    """Restores at 20 random steps, each time with another batch size than before."""
    rng = np.random.default_rng(0)
    slowest = 0.0
    for step in rng.integers(1, len(whole) // BATCH_SIZES[0] - 8, 20).tolist():
        before = pipeline.build(config, tokenizer, seed=SEED, split="train")
        state = {**before.state(), "position": step * config.batch_size, "step": step}
        size = int(rng.choice(BATCH_SIZES))
        now = dataclasses.replace(config, batch_size=size)
        position, count = step * config.batch_size, 2 * BATCH_SIZES[-1]
        start = time.perf_counter()
        found = draw(now, tokenizer, 0, count, state=json.loads(json.dumps(state)))
        slowest = max(slowest, seconds_since(start))
        expected = whole[position : position + count]
        assert found[: len(expected)] == expected, (step, size)
    print(json.dumps({"resumed_at_steps": 20, "slowest_seconds": slowest}))


def check_proportions(
    config: DataConfig, tokenizer: tokenizers.Tokenizer, sequences: int
) -> None:
    """Counts of sources against their exact shares, and epochs against rows drawn."""
    batches = pipeline.build(config, tokenizer, seed=SEED, split="train")
    worst = 0.0
    first, second = (np.array([e[i] for e in config.mixture], float) for i in (1, 2))
    half = config.mixture_changes[0]
    rows = np.array([part.rows.num_rows for part in batches._batches.parts])
    for drawn in range(0, sequences, config.batch_size):
        exact = min(drawn, half) * first / first.sum()
        exact += max(drawn - half, 0) * second / second.sum()
        counts = np.array(list(batches.epochs().values())) * rows
        worst = max(worst, float(abs(counts - exact).max()))
        next(batches)
    print(json.dumps({"most_off_exact_share": round(worst, 3), "epochs": batches.epochs()}))
    batches.close()


def digest(hashes: list[bytes]) -> str:
    """One hash of all."""
    return hashlib.sha256(b"".join(hashes)).hexdigest()[:16]


def seconds_since(start: float) -> float:
    """Wall time."""
    return round(time.perf_counter() - start, 2)


if __name__ == "__main__":
    main()
