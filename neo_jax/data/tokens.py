"""Documents as one stream of tokens.

Enters: records of text and a tokenizer. Leaves: a `TokenStore`, the tokens of all
documents one after another, each document ended by the end-of-text id (eos):

    d0 d0 d0 eos d1 d1 eos d2 … eos

Every token of it is a training target exactly once an epoch; the input that predicts a
token is the one before it, and eos for the first.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from neo_jax.config import DataConfig
from neo_jax.data.records import Document, Part, Record, Unreadable
from neo_jax.data.sources import DataError
from neo_jax.tokenizer import Tokenizer

_BATCH_CHARACTERS = 1 << 20  # of text that is handed to the tokenizer at a time

Masks: TypeAlias = list[np.ndarray] | None


@runtime_checkable
class TokenStore(Protocol):
    """The token stream of one split of one source, read at any place.

    Attributes:
      num_tokens: length of the stream, the eos of every document included.
      num_documents: documents that hold a token or more.
      num_bytes: UTF-8 bytes of the documents' text.
      eos_id: the token that ends every document.
      fingerprint: changes whenever a token does.
    """

    num_tokens: int
    num_documents: int
    num_bytes: int
    eos_id: int
    fingerprint: str

    def read(self, ranges: Sequence[tuple[int, int]]) -> tuple[list[np.ndarray], Masks]:
        """Tokens [start, stop) for each range; index -1 is an eos before the first.

        Returns:
          The tokens of each range, and for each whether they are to be learned: bool, or
          None where all are.
        """

    def document_ends(self) -> np.ndarray:
        """For each document the index after its eos, ascending; int64 [documents]."""


def token_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The smallest unsigned type that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


@dataclasses.dataclass(frozen=True)
class EncodedDocument:
    """A document's tokens, its eos included."""

    index: int  # of the record in its source
    ids: np.ndarray  # token_dtype [tokens]
    trainable: np.ndarray | None  # bool [tokens]; None: all of them
    num_bytes: int  # UTF-8 bytes of the text
    group: str
    digest: int  # 64 bits of a hash of the text, which tells duplicates


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A record that gave no tokens: "empty", "too_long", "invalid" or "undecodable"."""

    index: int
    kind: str
    reason: str


Outcome: TypeAlias = EncodedDocument | LeftOut


def encode(
    records: Iterable[tuple[int, Record | None]], tokenizer: Tokenizer, config: DataConfig
) -> Iterator[Outcome]:
    """Tokenises records in order, many at a time; each but None gives one outcome.

    Args:
      records: records and their indices in the source.
      tokenizer: gives the ids.
      config: `on_error` and `max_document_bytes` are read.

    Raises:
      DataError: an unreadable record, unless `config.on_error` is "skip".
    """
    pending: list[tuple[int, Record]] = []
    size = 0
    for index, record in records:
        if record is None:
            continue
        pending.append((index, record))
        if isinstance(record, Document):
            size += sum(len(part) for part, _ in record.parts)
        if size >= _BATCH_CHARACTERS:
            yield from _encode_batch(pending, tokenizer, config)
            pending, size = [], 0
    yield from _encode_batch(pending, tokenizer, config)


def _encode_batch(
    records: list[tuple[int, Record]], tokenizer: Tokenizer, config: DataConfig
) -> Iterator[Outcome]:
    checked = [(index, _check(index, record, tokenizer, config)) for index, record in records]
    texts = [
        part
        for _, record in checked
        if isinstance(record, Document)
        for part, _ in record.parts
        if isinstance(part, str)
    ]
    encoded = iter(tokenizer.encode_batch(texts))
    for index, record in checked:
        if isinstance(record, LeftOut):
            yield record
            continue
        parts = [
            (next(encoded) if isinstance(part, str) else part, learn)
            for part, learn in record.parts
        ]
        yield _assemble(index, record, parts, tokenizer)


def _check(
    index: int, record: Record, tokenizer: Tokenizer, config: DataConfig
) -> Document | LeftOut:
    """The document, or why it is left out."""
    if isinstance(record, Unreadable):
        left_out = LeftOut(index, record.kind, f"{record.where}: {record.reason}")
    elif bad := _bad_id(record, tokenizer.vocab_size):
        left_out = LeftOut(index, "invalid", f"record {index} of {record.group}: {bad}")
    elif not any(len(part) for part, _ in record.parts):
        return LeftOut(index, "empty", f"record {index} of {record.group} is empty")
    elif 0 < config.max_document_bytes < len(record.text.encode()):
        return LeftOut(index, "too_long", f"record {index} of {record.group} is too long")
    else:
        return record
    if config.on_error == "raise":
        raise DataError(f"{left_out.reason}; data.on_error='skip' passes over such records.")
    return left_out


def _bad_id(document: Document, vocab_size: int) -> str:
    """What is wrong with token ids that came instead of text; empty if nothing is."""
    for part, _ in document.parts:
        if not isinstance(part, str) and len(part):
            for value in (int(part.min()), int(part.max())):
                if not 0 <= value < vocab_size:
                    return f"token id {value} is not in 0 … {vocab_size - 1}"
    return ""


def _assemble(
    index: int, document: Document, parts: list[tuple[Any, bool]], tokenizer: Tokenizer
) -> EncodedDocument:
    lengths = [len(part) for part, _ in parts]
    ids = np.empty(sum(lengths) + 1, token_dtype(tokenizer.vocab_size))
    ids[-1] = tokenizer.eos_id
    start = 0
    for (part, _), length in zip(parts, lengths, strict=True):
        # An array of numbers is copied in half the time of a list of them.
        ids[start : start + length] = array.array("I", part) if type(part) is list else part
        start += length
    mask = None
    if not all(learn or not length for (_, learn), length in zip(parts, lengths, strict=True)):
        learned = [learn for _, learn in parts]
        mask = np.append(np.repeat(learned, lengths), True)  # the end is always learned
    num_bytes, digest = _measure(document.parts, tokenizer)
    return EncodedDocument(index, ids, mask, num_bytes, document.group, digest)


def _measure(parts: Sequence[Part], tokenizer: Tokenizer) -> tuple[int, int]:
    """Bytes of the text, and a hash of it."""
    hasher = hashlib.blake2b(digest_size=8)
    num_bytes = 0
    for part, _ in parts:
        text = part if isinstance(part, str) else tokenizer.decode(part)
        data = text.encode()
        num_bytes += len(data)
        hasher.update(data)
    return num_bytes, int.from_bytes(hasher.digest(), "little")


class MemoryTokens:
    """A token stream held in memory."""

    def __init__(self, documents: Sequence[EncodedDocument], tokenizer: Tokenizer) -> None:
        dtype = token_dtype(tokenizer.vocab_size)
        self.eos_id = tokenizer.eos_id
        self.num_documents = len(documents)
        self.num_bytes = sum(document.num_bytes for document in documents)
        # The eos in front lets every token be read together with the one before it.
        parts = [np.asarray([self.eos_id], dtype), *(document.ids for document in documents)]
        self._ids = np.concatenate(parts)
        self._ends = np.cumsum([len(d.ids) for d in documents], dtype=np.int64)
        self._trainable: np.ndarray | None = None
        if any(document.trainable is not None for document in documents):
            masks = [
                np.ones(len(d.ids), bool) if d.trainable is None else d.trainable
                for d in documents
            ]
            self._trainable = np.concatenate([np.zeros(1, bool), *masks])
        self.num_tokens = len(self._ids) - 1
        digest = hashlib.sha256(self._ids.tobytes())
        if self._trainable is not None:
            digest.update(self._trainable.tobytes())
        self.fingerprint = digest.hexdigest()

    def read(self, ranges: Sequence[tuple[int, int]]) -> tuple[list[np.ndarray], Masks]:
        """See `TokenStore`."""
        ids = [self._ids[start + 1 : stop + 1] for start, stop in ranges]
        if self._trainable is None:
            return ids, None
        return ids, [self._trainable[start + 1 : stop + 1] for start, stop in ranges]

    def document_ends(self) -> np.ndarray:
        """See `TokenStore`."""
        return self._ends
