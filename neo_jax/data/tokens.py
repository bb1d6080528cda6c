"""Documents as one stream of tokens.

Enters: records of text and a tokenizer. Leaves: a `TokenStore`, the tokens of all
documents one after another, each document ended by the end-of-text id (eos):

    d0 d0 d0 eos d1 d1 eos d2 … eos

Every token of it is a training target exactly once an epoch; the input that predicts a
token is the one before it, and eos for the first.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from neo_jax.data.sources import DataError, Document, Record, Unreadable
from neo_jax.tokenizer import Tokenizer

_BATCH_BYTES = 1 << 20  # text that is handed to the tokenizer at a time


class TokenStore(Protocol):
    """The token stream of one split of one source, read at any place.

    Attributes:
      num_tokens: length of the stream, the eos of every document included.
      num_bytes: UTF-8 bytes of the documents' text.
      eos_id: the token that ends every document.
      fingerprint: changes whenever a token does.
    """

    num_tokens: int
    num_documents: int
    num_bytes: int
    eos_id: int
    fingerprint: str

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Tokens [start, stop) for each range; index -1 is an eos before the first."""

    def trainable(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray] | None:
        """Whether each token is to be learned, or None where all are."""

    def document_ends(self) -> np.ndarray:
        """For each document the index after its eos, ascending; int64 [documents]."""


def token_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The smallest unsigned type that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


@dataclasses.dataclass(frozen=True)
class EncodedDocument:
    """A document's tokens, its eos included."""

    ids: np.ndarray  # token_dtype [tokens]
    trainable: np.ndarray | None  # bool [tokens]; None: all of them
    num_bytes: int  # UTF-8 bytes of the text
    group: str


def encode(
    records: Iterable[Record], tokenizer: Tokenizer, on_error: str = "raise"
) -> Iterator[EncodedDocument | Unreadable]:
    """Tokenises documents in order, many at a time; leaves out those without a token.

    Raises:
      DataError: an unreadable record, unless `on_error` is "skip", which yields it.
    """
    pending: list[Record] = []
    size = 0
    for record in records:
        if isinstance(record, Unreadable) and on_error == "raise":
            raise DataError(f"{record.where}: {record.reason}.")
        pending.append(record)
        size += len(record.text) if isinstance(record, Document) else 0
        if size >= _BATCH_BYTES:
            yield from _encode_batch(pending, tokenizer)
            pending, size = [], 0
    yield from _encode_batch(pending, tokenizer)


def _encode_batch(
    records: list[Record], tokenizer: Tokenizer
) -> Iterator[EncodedDocument | Unreadable]:
    texts = [text for r in records if isinstance(r, Document) for text, _ in r.parts]
    encoded = iter(tokenizer.encode_batch(texts))
    dtype = token_dtype(tokenizer.vocab_size)
    for record in records:
        if isinstance(record, Unreadable):
            yield record
            continue
        ids: list[int] = []
        trainable: list[bool] = []
        for _, learn in record.parts:
            part = next(encoded)
            ids += part
            trainable += [learn] * len(part)
        if ids:
            yield EncodedDocument(
                np.asarray([*ids, tokenizer.eos_id], dtype),
                None if all(trainable) else np.asarray([*trainable, True]),
                sum(len(text.encode()) for text, _ in record.parts),
                record.group,
            )


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

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """See `TokenStore`."""
        return [self._ids[start + 1 : stop + 1] for start, stop in ranges]

    def trainable(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray] | None:
        """See `TokenStore`."""
        if self._trainable is None:
            return None
        return [self._trainable[start + 1 : stop + 1] for start, stop in ranges]

    def document_ends(self) -> np.ndarray:
        """See `TokenStore`."""
        return self._ends
