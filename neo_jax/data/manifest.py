"""The manifest of a prepared directory: made out of the notes of its shards, and checked.

Enters: a folder in which every unit is done. Leaves: manifest.json and the index of each
split; the notes are gone.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from neo_jax import tokenizer as tokenizers
from neo_jax.config import ConfigError
from neo_jax.data import accounting, output_folder, sources, store
from neo_jax.data.shards import SPLITS
from neo_jax.data.tokens import token_dtype


def finish(
    folder: pathlib.Path, settings: dict[str, Any], tokenizer: tokenizers.Tokenizer
) -> dict[str, Any]:
    """Makes the manifest out of the notes, and removes them."""
    paths = sorted(folder.glob("part-*.json"))
    notes = [json.loads(path.read_text()) for path in paths]
    arrays = [_read_arrays(path.with_suffix(".npz")) for path in paths]
    tally = accounting.Tally()
    for note in notes:
        tally.merge(note)
    found = {split: _finish_split(folder, split, notes, arrays) for split in SPLITS}
    splits = {split: part for split, part in found.items() if part is not None}
    report = accounting.report(tally.content(), np.concatenate([a["digests"] for a in arrays]))
    if "train" not in splits:
        output_folder.remove_all(folder)
        if not report["records"] and (wanted := sources.subsets(settings["source"])):
            raise ConfigError(
                f"data source {settings['source']!r}: no record's meta.pile_set_name is "
                f"{' or '.join(map(repr, sorted(wanted)))}."
            )
        raise ConfigError(
            f"data source {settings['source']!r} gave no document to train on; of "
            f"{report['records']} records were {accounting.describe(report['left_out'])}, and "
            f"{report['documents']} held out."
        )
    manifest = {
        "format": sources.MANIFEST_FORMAT,
        "tokenizer": settings["tokenizer"],
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "dtype": np.dtype(token_dtype(tokenizer.vocab_size)).name,
        "settings": settings,
        "splits": splits,
        "report": report,
    }
    output_folder.write_json(folder / sources.MANIFEST, manifest)
    output_folder.remove_notes(folder)
    return manifest


def _finish_split(
    folder: pathlib.Path,
    split: str,
    notes: Sequence[dict[str, Any]],
    arrays: Sequence[dict[str, np.ndarray]],
) -> dict[str, Any] | None:
    """Writes a split's index; returns its part of the manifest, None where it is empty."""
    pairs = [(n["shards"][split], a) for n, a in zip(notes, arrays, strict=True) if split in a]
    if not pairs:
        return None
    shards = [shard for shard, _ in pairs]
    lengths = np.concatenate([a[split] for _, a in pairs])
    ends = np.cumsum(lengths, dtype=np.int64)
    index = [_write_index(folder / f"{split}.ends.npy", ends)]
    names = sorted({name for shard in shards for name in shard["groups"]})
    if len(names) > 1:
        # A part numbers the groups that it met; here they get the split's own numbers.
        groups = [
            np.searchsorted(names, sorted(shard["groups"]))[a[f"{split}_groups"]]
            for shard, a in pairs
        ]
        codes = np.concatenate(groups).astype(np.uint16)
        index.append(_write_index(folder / f"{split}.groups.npy", codes))
    totals = {key: sum(s[key] for s in shards) for key in ("documents", "tokens", "bytes")}
    return {**totals, "shards": shards, "index": index}


def _read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:  # closed again: a large corpus has thousands of parts
        return dict(file)


def _write_index(path: pathlib.Path, numbers: np.ndarray) -> dict[str, Any]:
    """Writes one number for each document; returns the file's line of the manifest."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(aside, "wb") as file:
        np.save(file, numbers)
    aside.replace(path)
    return {
        "file": path.name,
        "file_bytes": path.stat().st_size,
        "sha256": _sha256(path),
    }


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads every shard of a prepared directory and compares its checksum.

    Returns:
      The manifest.

    Raises:
      ConfigError: a file is missing or not what it was.
    """
    path = pathlib.Path(folder)
    manifest = store.read_manifest(path)
    for part in manifest["splits"].values():
        store.require_files(str(path), part)
        for entry in store.files_of(part):
            if _sha256(path / entry["file"]) != entry["sha256"]:
                raise ConfigError(f"{path / entry['file']} is damaged: its checksum differs.")
    return manifest
