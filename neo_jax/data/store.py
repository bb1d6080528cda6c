"""Token streams on disk, written once by `prepare` and read at any place.

Enters: encoded documents. Leaves: a directory

    manifest.json         what it is: source, tokenizer, settings, accounting, checksums
    tokenizer.json        the tokenizer that made the ids
    train.ends.npy        int64 [documents]: the index after each document's eos
    train.groups.npy      uint16 [documents]: the subset of each, where there are several
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
import itertools
import json
import os
import pathlib
from collections import Counter
from collections.abc import Sequence, Set
from typing import Any

import numpy as np

from neo_jax.config import ConfigError
from neo_jax.data import readers, sources
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
        self.groups: list[str] = []  # what each document is counted under
        self._bytes: Counter[str] = Counter()  # of text, in each group

    def add(self, document: EncodedDocument) -> None:
        """Takes one document; a shard is held in memory until it is finished."""
        self._pending.append(document)
        self._masked |= document.trainable is not None
        self.lengths.append(len(document.ids))
        self.groups.append(document.group)
        self._bytes[document.group] += document.num_bytes

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
            "bytes": self._bytes.total(),
            "groups": dict(sorted(self._bytes.items())),
            "masked": self._masked,
            "file_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }


class PreparedTokens:
    """A split of a prepared directory, local or remote, as a `TokenStore`."""

    def __init__(
        self, folder: str | os.PathLike[str], split: str, tokenizer: Tokenizer
    ) -> None:
        folder = os.fspath(folder)
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
        require_files(folder, part)
        self.group_bytes: Counter[str] = Counter()  # UTF-8 bytes of text in each subset
        for shard in self._shards:
            self.group_bytes.update(shard.get("groups", {}))
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

        path = readers.local_copy(f"{self._folder}/{self._shards[shard]['file']}")
        return array_record_module.ArrayRecordReader(path, _READER_OPTIONS)

    def document_ends(self) -> np.ndarray:
        """See `TokenStore`; read from the disk as it is used."""
        return self._index("ends")

    def document_groups(self) -> np.ndarray:
        """For each document the place of its subset among the sorted `group_bytes`."""
        if len(self.group_bytes) < 2:
            return np.zeros(self.num_documents, np.uint16)
        return self._index("groups")

    def _index(self, kind: str) -> np.ndarray:
        path = readers.local_copy(f"{self._folder}/{self._split}.{kind}.npy")
        return np.load(path, mmap_mode="r")

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


class Selection:
    """The documents of some subsets of a prepared split, as a `TokenStore`."""

    def __init__(self, whole: PreparedTokens, subsets: Set[str]) -> None:
        names = sorted(whole.group_bytes)
        if missing := sorted(subsets - set(names)):
            raise ConfigError(
                f"the prepared tokens hold no subset {missing[0]!r}; there are "
                f"{', '.join(names)}."
            )
        codes = [code for code, name in enumerate(names) if name in subsets]
        documents = np.flatnonzero(np.isin(whole.document_groups(), codes))
        lengths = np.diff(whole.document_ends(), prepend=0)[documents]
        self._whole = whole
        self._starts = whole.document_ends()[documents] - lengths  # in the whole stream
        self._ends = np.cumsum(lengths)  # in this one
        self.eos_id = whole.eos_id
        self.num_tokens = int(lengths.sum())
        self.num_documents = len(documents)
        self.num_bytes = sum(whole.group_bytes[name] for name in subsets)
        content = json.dumps([whole.fingerprint, sorted(subsets)])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def document_ends(self) -> np.ndarray:
        """See `TokenStore`."""
        return self._ends

    def read(self, ranges: Sequence[tuple[int, int]]) -> tuple[list[np.ndarray], Masks]:
        """See `TokenStore`."""
        cuts = [self._cut(start, stop) for start, stop in ranges]
        ids, masks = self._whole.read([piece for pieces in cuts for piece in pieces])
        bounds = np.cumsum([0, *map(len, cuts)]).tolist()
        places = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        joined = [_joined(ids[place]) for place in places]
        return joined, None if masks is None else [_joined(masks[place]) for place in places]

    def _cut(self, start: int, stop: int) -> list[tuple[int, int]]:
        """A range of this stream as ranges of the whole one."""
        pieces = [(-1, 0)] if start < 0 else []
        start = max(start, 0)
        document = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = int(self._ends[document])
            # From a place in this stream to the same token's place in the whole one.
            shift = int(self._starts[document]) - (
                int(self._ends[document - 1]) if document else 0
            )
            pieces.append((start + shift, min(stop, end) + shift))
            start, document = end, document + 1
        return pieces


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a prepared directory.

    Raises:
      ConfigError: there is none, or it is damaged.
    """
    path = f"{os.fspath(folder)}/{sources.MANIFEST}"
    try:
        return json.loads(b"".join(readers.chunks(path)))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def files_of(part: dict[str, Any]) -> list[dict[str, Any]]:
    """The files of one split of a manifest: each with its name, size and checksum."""
    return [*part["shards"], *part.get("index", [])]


def require_files(folder: str, part: dict[str, Any]) -> None:
    """Raises a ConfigError where a file of a split is missing or of another size."""
    try:
        sizes = readers.sizes(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror or error}.") from None
    for entry in files_of(part):
        path, size = f"{folder}/{entry['file']}", sizes.get(entry["file"])
        if size is None:
            raise ConfigError(f"{path} is missing; prepare the source again.")
        if size != entry["file_bytes"]:
            raise ConfigError(
                f"{path} holds {size} bytes, its manifest says {entry['file_bytes']}; "
                f"prepare the source again."
            )
