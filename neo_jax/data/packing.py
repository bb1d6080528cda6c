"""From a token stream to rows of `seq_len` tokens.

Enters: a `TokenStore`. Leaves: `Rows`, which says for each row which pieces of the stream
it holds, so that every token is a target in exactly one place; and `fill`, which reads
rows into arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from neo_jax.data.tokens import TokenStore

Piece = tuple[int, int]  # first token and number of tokens, in the stream
Batch = dict[str, np.ndarray]


class Rows(Protocol):
    """A division of the stream into rows."""

    num_rows: int

    def pieces(self, row: int) -> Sequence[Piece]:
        """The pieces of the stream that stand in `row`, from left to right."""


class ConcatRows:
    """All documents as one text, cut every `seq_len` tokens; the last row may be short."""

    def __init__(self, store: TokenStore, seq_len: int) -> None:
        self._num_tokens = store.num_tokens
        self._seq_len = seq_len
        self.num_rows = -(-store.num_tokens // seq_len)

    def pieces(self, row: int) -> Sequence[Piece]:
        """See `Rows`."""
        start = row * self._seq_len
        return [(start, min(self._seq_len, self._num_tokens - start))]


def make_rows(store: TokenStore, packing: str, seq_len: int) -> Rows:
    """Rows of a stream, as `data.packing` says."""
    assert packing == "concat"
    return ConcatRows(store, seq_len)


def empty_batch(num_rows: int, seq_len: int, isolate: bool, eos_id: int) -> Batch:
    """A batch of padding: eos everywhere, weight 0, segment 0."""
    shape = (num_rows, seq_len)
    batch = {
        "inputs": np.full(shape, eos_id, np.int32),
        "targets": np.full(shape, eos_id, np.int32),
        "weights": np.zeros(shape, np.float32),
    }
    if isolate:
        batch["segment_ids"] = np.zeros(shape, np.int32)
        batch["positions"] = np.zeros(shape, np.int32)
    return batch


def fill(
    batch: Batch, where: Sequence[int], store: TokenStore, rows: Sequence[Sequence[Piece]]
) -> None:
    """Writes rows of pieces into the rows `where` of a batch of padding.

    A piece's targets are its tokens, and its inputs the tokens one place earlier. A segment
    starts at each piece and wherever the input is eos, which stands for "a document starts".
    """
    ranges = [(start - 1, start + length) for pieces in rows for start, length in pieces]
    tokens = iter(store.read(ranges))
    masks = store.trainable(ranges)
    learned = None if masks is None else iter(masks)
    for b, pieces in zip(where, rows, strict=True):
        offset = 0
        starts = []
        for _, length in pieces:
            piece = next(tokens)
            stop = offset + length
            batch["inputs"][b, offset:stop] = piece[:-1]
            batch["targets"][b, offset:stop] = piece[1:]
            batch["weights"][b, offset:stop] = 1.0 if learned is None else next(learned)[1:]
            starts.append(offset)
            offset = stop
        if "segment_ids" in batch:
            _isolate(batch, b, starts, offset, store.eos_id)


def _isolate(batch: Batch, b: int, starts: list[int], length: int, eos_id: int) -> None:
    """Numbers the segments of row `b` from 1, and positions from 0 within each."""
    begins = batch["inputs"][b, :length] == eos_id
    begins[starts] = True
    index = np.arange(length, dtype=np.int32)
    batch["segment_ids"][b, :length] = np.cumsum(begins)
    batch["positions"][b, :length] = index - np.maximum.accumulate(np.where(begins, index, 0))
