"""One unit of a source, from records to shards on the disk and notes about them.

Enters: a unit, the tokenizer, and what is common to all units. Leaves: for each shard
`train-*.array_record` (and `eval-*`), with `part-*.npz` and `part-*.json` beside it, which say
what it holds. A shard counts as done once its `part-*.json` is there.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from neo_jax import tokenizer as tokenizers
from neo_jax.config import DataConfig
from neo_jax.data import accounting, sources
from neo_jax.data.output_folder import write_json
from neo_jax.data.sources import Source, Unit
from neo_jax.data.store import ShardWriter
from neo_jax.data.tokens import LeftOut, Outcome, encode

SPLITS = ("train", "eval")


@dataclasses.dataclass(frozen=True)
class Job:
    """What every process needs to know; the same for all units."""

    source: Source
    config: DataConfig
    folder: pathlib.Path
    shard_bytes: int  # UTF-8 bytes of text after which a shard is closed


def prepare_unit(
    job: Job,
    tokenizer: tokenizers.Tokenizer,
    number: int,
    unit: Unit,
    first: int,
    progress: Callable[[int], Any],
) -> None:
    """Writes the shards of one unit that are not there yet.

    Args:
      job: what is common to all units.
      tokenizer: gives the ids.
      number: of the unit.
      unit: what to read.
      first: index of its first record in the whole source.
      progress: is told how many bytes of text were done.
    """
    part, consumed = 0, 0
    while (notes := _notes(job.folder, number, part)) is not None:
        progress(sum(group["bytes"] for group in notes["groups"].values()))
        if notes["last"]:
            return
        part, consumed = part + 1, notes["consumed"]
    records = enumerate(job.source.records(unit), start=first)
    rest = itertools.islice(records, consumed, None)
    outcomes = encode(rest, tokenizer, job.config)
    last = False
    while not last:
        consumed, last = _write_part(
            job, tokenizer, f"{number:05d}-{part:04d}", outcomes, first, progress
        )
        part += 1


def _notes(folder: pathlib.Path, number: int, part: int) -> dict[str, Any] | None:
    path = folder / f"part-{number:05d}-{part:04d}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _write_part(
    job: Job,
    tokenizer: tokenizers.Tokenizer,
    label: str,
    outcomes: Iterator[Outcome],
    first: int,
    progress: Callable[[int], Any],
) -> tuple[int, bool]:
    """Writes the next shard of each split; returns records consumed, and if that was all."""
    config = job.config
    writers: dict[str, ShardWriter] = {}
    tally = accounting.Tally()
    digests: list[int] = []
    consumed, size = 0, 0
    for outcome in outcomes:
        consumed = outcome.index - first + 1
        tally.add(outcome)
        if isinstance(outcome, LeftOut):
            continue
        held_out = sources.is_held_out(
            outcome.index, config.holdout_every, config.holdout_offset
        )
        split = SPLITS[held_out]
        if split not in writers:
            path = job.folder / f"{split}-{label}.array_record"
            writers[split] = ShardWriter(path, tokenizer.vocab_size)
        writers[split].add(outcome)
        digests.append(outcome.digest)
        progress(outcome.num_bytes)
        size += outcome.num_bytes
        if size >= job.shard_bytes:
            break
    last = size < job.shard_bytes
    arrays = {split: np.asarray(w.lengths, np.uint32) for split, w in writers.items()}
    for split, writer in writers.items():
        _, codes = np.unique(writer.groups, return_inverse=True)
        arrays[f"{split}_groups"] = codes.astype(np.uint16)
    _write_arrays(job.folder, label, digests=np.asarray(digests, np.uint64), **arrays)
    shards = {split: writer.finish() for split, writer in writers.items()}
    notes = {"consumed": consumed, "last": last, "shards": shards, **tally.content()}
    write_json(job.folder / f"part-{label}.json", notes)
    return consumed, last


def _write_arrays(folder: pathlib.Path, label: str, **arrays: np.ndarray) -> None:
    path = folder / f"part-{label}.npz"
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(aside, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    aside.replace(path)
