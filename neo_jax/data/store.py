"""Token streams on disk, written once by `prepare` and read at any place.

Enters: encoded documents. Leaves: a directory

    manifest.json         what it is: source, tokenizer, settings, accounting, checksums
    tokenizer.json        the tokenizer that made the ids
    train.ends.npy        int64 [documents]: the index after each document's eos
    train-*.array_record  the stream, in blocks of `BLOCK_TOKENS` tokens
    eval.*                the same for held-out text, if any was held out

A block is the tokens as little-endian uint16 (or uint32 where the vocabulary needs it),
followed in shards of instruction data by one byte a token: 1 where it is to be learned. The
last block of a shard may be short. Nothing is compressed, so that a window of the stream
costs one or two small reads.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from neo_jax.config import ConfigError
from neo_jax.data import sources
from neo_jax.data.tokens import EncodedDocument, Masks, token_dtype
from neo_jax.tokenizer import Tokenizer

BLOCK_TOKENS = 4096
# One record a chunk and no compression: the cheapest random access that the format has.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_NO_MASK = np.zeros(0, bool)
_OPEN_SHARDS = 256  # files kept open at a time


class ShardWriter:
    """Writes one shard aside, and gives it its name when it is complete."""

    def __init__(self, path: pathlib.Path, vocab_size: int) -> None:
        from array_record.python import array_record_module

        self._path = path
        self._aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._writer = array_record_module.ArrayRecordWriter(str(self._aside), _WRITER_OPTIONS)
        self._dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self._pending: list[EncodedDocument] = []
        self._masked = False
        self.lengths: list[int] = []  # tokens of each document
        self.num_bytes = 0

    def add(self, document: EncodedDocument) -> None:
        """Takes one document; a shard is held in memory until it is finished."""
        self._pending.append(document)
        self._masked |= document.trainable is not None
        self.lengths.append(len(document.ids))
        self.num_bytes += document.num_bytes

    def finish(self) -> dict[str, Any]:
        """Writes the file; returns its line of the manifest."""
        ids = np.concatenate([d.ids for d in self._pending] or [np.zeros(0, self._dtype)])
        mask = np.zeros(0, np.uint8)
        if self._masked:
            mask = np.concatenate(
                [
                    np.ones(len(d.ids), np.uint8) if d.trainable is None else d.trainable
                    for d in self._pending
                ]
            ).astype(np.uint8)
        for start in range(0, len(ids), BLOCK_TOKENS):
            block = ids[start : start + BLOCK_TOKENS].astype(self._dtype).tobytes()
            self._writer.write(block + mask[start : start + BLOCK_TOKENS].tobytes())
        self._writer.close()
        data = self._aside.read_bytes()
        self._aside.replace(self._path)
        return {
            "file": self._path.name,
            "tokens": len(ids),
            "documents": len(self.lengths),
            "bytes": self.num_bytes,
            "masked": self._masked,
            "file_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }


class PreparedTokens:
    """A split of a prepared directory, as a `TokenStore`."""

    def __init__(self, folder: pathlib.Path, split: str, tokenizer: Tokenizer) -> None:
        manifest = read_manifest(folder)
        theirs = manifest["tokenizer_fingerprint"]
        if theirs != tokenizer.fingerprint:
            raise ConfigError(
                f"{folder} was prepared with tokenizer {manifest['tokenizer']!r} "
                f"({theirs[:12]}), not with this one ({tokenizer.fingerprint[:12]}); set "
                f"data.tokenizer='{folder}', or prepare the source again."
            )
        if split not in manifest["splits"]:
            raise ConfigError(
                f"{folder} holds no held-out text; set data.eval_source, or prepare it with "
                f"--holdout_every."
            )
        part = manifest["splits"][split]
        self._folder = folder
        self._split = split
        self._shards: list[dict[str, Any]] = part["shards"]
        require_files(folder, self._shards)
        self.eos_id = tokenizer.eos_id
        self.num_tokens = part["tokens"]
        self.num_documents = part["documents"]
        self.num_bytes = part["bytes"]
        content = json.dumps([[s["sha256"], s["tokens"]] for s in self._shards])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()
        self._dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._starts = np.cumsum([0, *(s["tokens"] for s in self._shards)]).tolist()
        self._masked = any(s["masked"] for s in self._shards)
        self._prepare_readers()

    def _prepare_readers(self) -> None:
        self._reader = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._open)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_reader"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare_readers()

    def _open(self, shard: int) -> Any:
        from array_record.python import array_record_module

        path = self._folder / self._shards[shard]["file"]
        return array_record_module.ArrayRecordReader(str(path), _READER_OPTIONS)

    def document_ends(self) -> np.ndarray:
        """See `TokenStore`; read from the disk as it is used."""
        return np.load(self._folder / f"{self._split}.ends.npy", mmap_mode="r")

    def read(self, ranges: Sequence[tuple[int, int]]) -> tuple[list[np.ndarray], Masks]:
        """See `TokenStore`."""
        cuts = [self._cut(start, stop) for start, stop in ranges]
        wanted: dict[int, set[int]] = {}
        for pieces in cuts:
            for shard, first, last in pieces:
                blocks = range(first // BLOCK_TOKENS, (last - 1) // BLOCK_TOKENS + 1)
                wanted.setdefault(shard, set()).update(blocks)
        data = {}
        for shard, numbers in wanted.items():
            order = sorted(numbers)
            records = self._reader(shard).read(order)
            data.update({(shard, n): r for n, r in zip(order, records, strict=True)})
        ids, masks = [], []
        for (start, _), pieces in zip(ranges, cuts, strict=True):
            parts = [self._join(data, *piece) for piece in pieces]
            if start < 0:
                front = np.asarray([self.eos_id], self._dtype), np.ones(1, bool)
                parts.insert(0, front)
            ids.append(_joined([part for part, _ in parts]))
            masks.append(_joined([mask for _, mask in parts]))
        return ids, masks if self._masked else None

    def _cut(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """A range as (shard, first, last) within shards."""
        start = max(start, 0)
        shard = bisect.bisect_right(self._starts, start) - 1
        pieces = []
        while start < stop:
            first, end = self._starts[shard], min(stop, self._starts[shard + 1])
            if start < end:
                pieces.append((shard, start - first, end - first))
            start, shard = end, shard + 1
        return pieces

    def _join(
        self, data: dict[tuple[int, int], bytes], shard: int, first: int, last: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [first, last) of one shard out of its blocks, and their mask."""
        masked = self._shards[shard]["masked"]
        block = first // BLOCK_TOKENS
        if not self._masked and (last - 1) // BLOCK_TOKENS == block:  # by far the most
            record = data[shard, block]
            offset = (first - block * BLOCK_TOKENS) * self._dtype.itemsize
            return np.frombuffer(record, self._dtype, last - first, offset), _NO_MASK
        ids, masks = [], []
        for block in range(first // BLOCK_TOKENS, (last - 1) // BLOCK_TOKENS + 1):
            record = data[shard, block]
            count = len(record) // (self._dtype.itemsize + masked)
            base = block * BLOCK_TOKENS
            cut = slice(max(first - base, 0), last - base)
            ids.append(np.frombuffer(record, self._dtype, count)[cut])
            if masked:
                offset = count * self._dtype.itemsize
                masks.append(np.frombuffer(record, bool, count, offset)[cut])
        if not self._masked:
            return _joined(ids), _NO_MASK
        return _joined(ids), _joined(masks) if masked else np.ones(last - first, bool)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """The manifest of a prepared directory.

    Raises:
      ConfigError: there is none, or it is damaged.
    """
    try:
        return json.loads((folder / sources.MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / sources.MANIFEST} cannot be read: {error}") from None


def require_files(folder: pathlib.Path, shards: Sequence[dict[str, Any]]) -> None:
    """Raises a ConfigError where a shard is missing or of another size."""
    for shard in shards:
        path = folder / shard["file"]
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; prepare the source again.") from None
        if size != shard["file_bytes"]:
            raise ConfigError(
                f"{path} holds {size} bytes, its manifest says {shard['file_bytes']}; "
                f"prepare the source again."
            )
