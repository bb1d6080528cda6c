"""From a token stream to rows of `seq_len` tokens.

Enters: a `TokenStore`. Leaves: `Rows`, which says for each row which pieces of the stream
it holds, so that every token is a target in exactly one place; and `fill`, which reads
rows into arrays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from neo_jax.data.plans import Plan, kept
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


class DocumentRows(Plan):
    """Each document starts a row; a longer one takes as many rows as it needs."""

    _ends: np.ndarray

    def __init__(self, store: TokenStore, seq_len: int) -> None:
        self.hold(_ends=store.document_ends())
        self._seq_len = seq_len
        lengths = np.diff(self._ends, prepend=0)
        self._first_rows = np.cumsum(np.append(0, -(-lengths // seq_len)))
        self.num_rows = int(self._first_rows[-1])

    def pieces(self, row: int) -> Sequence[Piece]:
        """See `Rows`."""
        document = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        start = int(self._ends[document - 1]) if document else 0
        start += (row - int(self._first_rows[document])) * self._seq_len
        return [(start, min(self._seq_len, int(self._ends[document]) - start))]


class BestFitRows(Plan):
    """Whole documents, put where they leave the least room.

    A document longer than a row gives full rows and a remainder. Documents and remainders
    go, longest first, each into the row with the least room that still holds it. Source:
    Ding et al. 2024, "Fewer Truncations Improve Language Modeling", algorithm 1.
    """

    _ends: np.ndarray  # the index after each document
    _full_before: np.ndarray  # full rows up to each document
    _documents: np.ndarray  # those of row 0 after the full ones, of row 1, …
    _rests: np.ndarray  # what each has beyond its full rows
    _bounds: np.ndarray  # the place in `_documents` after each row

    def __init__(self, store: TokenStore, seq_len: int) -> None:
        self._seq_len = seq_len
        ends = store.document_ends()
        self.hold(_ends=ends)
        # Not the store's fingerprint: what matters here is where documents end.
        key = hashlib.sha256(np.ascontiguousarray(ends).data).hexdigest()[:24]
        self.hold(**kept(f"best-fit-{seq_len}-{key}", lambda: _plan(self._ends, seq_len)))
        self._num_full = int(self._full_before[-1])
        self.num_rows = self._num_full + len(self._bounds)

    def pieces(self, row: int) -> Sequence[Piece]:
        """See `Rows`."""
        if row < self._num_full:
            document = int(np.searchsorted(self._full_before, row, side="right"))
            before = int(self._full_before[document - 1]) if document else 0
            start = int(self._ends[document - 1]) if document else 0
            return [(start + (row - before) * self._seq_len, self._seq_len)]
        held = row - self._num_full
        cut = slice(int(self._bounds[held - 1]) if held else 0, int(self._bounds[held]))
        lengths = self._rests[cut].astype(np.int64)
        starts = self._ends[self._documents[cut]] - lengths
        return list(zip(starts.tolist(), lengths.tolist(), strict=True))


def _plan(ends: np.ndarray, seq_len: int) -> dict[str, np.ndarray]:
    """The arrays of `BestFitRows`, by their names."""
    lengths = np.diff(ends, prepend=0)
    full_before = np.cumsum(lengths // seq_len)
    lengths %= seq_len
    held = np.flatnonzero(lengths).astype(np.uint32)
    rests = lengths[held].astype(np.min_scalar_type(seq_len))
    del lengths
    bins = _best_fit(rests, seq_len)
    # Documents of bin 0, of bin 1, …, those of one bin in the stream's order.
    order = np.argsort(bins, kind="stable")
    return {
        "_full_before": full_before,
        "_documents": held[order],
        "_rests": rests[order],
        "_bounds": np.cumsum(np.bincount(bins), dtype=np.uint32),
    }


def _best_fit(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """The bin of each piece; bins hold `seq_len`, and are numbered from 0; uint32.

    Pieces of one length are placed together. A bin that takes one is then the one with the
    least room, so it takes as many as it holds before the next bin has its turn: a few
    array operations for each length and room, however many pieces there are.
    """
    bins = np.empty(len(lengths), np.uint32)
    if not len(lengths):
        return bins
    # Numbers of 16 bits are sorted by radix, in linear time.
    order = np.argsort((seq_len - lengths).astype(lengths.dtype), kind="stable")
    counts = np.bincount(lengths, minlength=seq_len + 1)
    by_room: list[list[np.ndarray]] = [[] for _ in range(seq_len + 1)]
    rooms = 0  # bit r is set where bins have room for r tokens
    opened = done = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        wanted = order[done : done + counts[length]]
        done += counts[length]
        while len(wanted):
            fitting = rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else seq_len
            each = room // length
            number = -(-len(wanted) // each)
            if fitting:
                chosen = _take(by_room[room], number)
                rooms ^= 0 if by_room[room] else 1 << room
            else:
                chosen = np.arange(opened, opened + number, dtype=np.uint32)
                opened += number
            placed = min(len(wanted), each * len(chosen))
            bins[wanted[:placed]] = np.repeat(chosen, each)[:placed]
            wanted = wanted[placed:]
            last = placed - each * (len(chosen) - 1)  # pieces that the last bin took
            for some, taken in ((chosen[:-1], each), (chosen[-1:], last)):
                left = room - taken * length
                if left and len(some):
                    by_room[left].append(some)
                    rooms |= 1 << left
    return bins


def _take(stack: list[np.ndarray], number: int) -> np.ndarray:
    """Removes `number` bins from a stack of arrays of them, or all where there are fewer."""
    taken = []
    while stack and number:
        some = stack.pop()
        if len(some) > number:
            stack.append(some[number:])
            some = some[:number]
        taken.append(some)
        number -= len(some)
    return np.concatenate(taken)


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
