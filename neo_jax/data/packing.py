"""From a token stream to rows of `seq_len` tokens.

Enters: a `TokenStore`. Leaves: `Rows`, which says for each row which pieces of the stream
it holds, so that every token is a target in exactly one place; and `fill`, which reads
rows into arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from neo_jax.data.tokens import TokenStore

Piece = tuple[int, int]  # first token and number of tokens, in the stream
Batch = dict[str, np.ndarray]


@runtime_checkable
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


class DocumentRows:
    """Each document starts a row; a longer one takes as many rows as it needs."""

    def __init__(self, store: TokenStore, seq_len: int) -> None:
        self._ends = store.document_ends()
        self._seq_len = seq_len
        lengths = np.diff(self._ends, prepend=0)
        self._first_rows = np.cumsum([0, *(-(-lengths // seq_len))])
        self.num_rows = int(self._first_rows[-1])

    def pieces(self, row: int) -> Sequence[Piece]:
        """See `Rows`."""
        document = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        start = int(self._ends[document - 1]) if document else 0
        start += (row - int(self._first_rows[document])) * self._seq_len
        return [(start, min(self._seq_len, int(self._ends[document]) - start))]


class BestFitRows:
    """Whole documents, put where they leave the least room.

    A document longer than a row gives full rows and a remainder. Documents and remainders
    go, longest first, each into the row with the least room that still holds it. Source:
    Ding et al. 2024, "Fewer Truncations Improve Language Modeling", algorithm 1.
    """

    def __init__(self, store: TokenStore, seq_len: int) -> None:
        ends = np.asarray(store.document_ends())
        lengths = np.diff(ends, prepend=0)
        rest = lengths % seq_len
        full_starts = _full_rows(ends - lengths, lengths // seq_len, seq_len)
        held = np.flatnonzero(rest)
        bins = _best_fit(rest[held], seq_len)
        self._starts = np.concatenate([full_starts, (ends - rest)[held]])
        self._lengths = np.concatenate([np.full(len(full_starts), seq_len), rest[held]])
        rows = np.concatenate([np.arange(len(full_starts)), bins + len(full_starts)])
        order = np.lexsort((self._starts, rows))
        self._starts, self._lengths = self._starts[order], self._lengths[order]
        self.num_rows = len(np.unique(rows))
        self._bounds = np.searchsorted(rows[order], np.arange(self.num_rows + 1))

    def pieces(self, row: int) -> Sequence[Piece]:
        """See `Rows`."""
        cut = slice(self._bounds[row], self._bounds[row + 1])
        return list(zip(self._starts[cut].tolist(), self._lengths[cut].tolist(), strict=True))


def _full_rows(starts: np.ndarray, counts: np.ndarray, seq_len: int) -> np.ndarray:
    """First tokens of the full rows that long documents give."""
    document = np.repeat(np.arange(len(starts)), counts)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    return starts[document] + nth * seq_len


def _best_fit(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """The bin of each piece; bins hold `seq_len`, and are numbered from 0."""
    bins = np.empty(len(lengths), np.int64)
    by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    rooms = 0  # bit r is set where a bin has room for r tokens
    count = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = seq_len, count
            count += 1
        bins[index] = chosen
        if room > length:
            by_room[room - length].append(chosen)
            rooms |= 1 << (room - length)
    return bins


def make_rows(store: TokenStore, packing: str, seq_len: int) -> Rows:
    """Rows of a stream, as `data.packing` says: "concat", "best_fit" or "none"."""
    kinds: dict[str, Callable[[TokenStore, int], Rows]] = {
        "concat": ConcatRows,
        "best_fit": BestFitRows,
        "none": DocumentRows,
    }
    return kinds[packing](store, seq_len)


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
    ids, masks = store.read(ranges)
    tokens = iter(ids)
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
    first = np.flatnonzero(begins)
    lengths = np.diff(first, append=length)
    batch["segment_ids"][b, :length] = np.repeat(np.arange(1, len(first) + 1), lengths)
    batch["positions"][b, :length] = np.arange(length) - np.repeat(first, lengths)
