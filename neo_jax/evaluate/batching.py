"""From many requests of many lengths to few batches of few shapes.

Enters: requests, each a list of tokens of which the last are scored. Leaves: batches of
rows, padded on the right, with the place of every scored token. Nothing here computes: the
same requests give the same batches on every host.

Three things keep the work small. Rows that begin another row are not computed: causality
makes their scores those of the longer one (the answers of a multiple choice often differ
in the last token alone). Lengths are gathered in few buckets, chosen so that padding and
compiling together cost least. Within a bucket rows are dealt out so that every batch scores
about as many tokens.

Shapes: B rows, T positions, S shards of the batch, Q scored tokens of a shard.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

_LENGTH_STEP = 16  # rows are padded at least to a multiple of this
_MOST_BUCKETS = 6
_MOST_TOKENS_AT_ONCE = 128  # scored tokens of a shard whose logits exist at one time


class Request(NamedTuple):
    """Tokens in order; the last `num_scored` of them are predicted from all before them."""

    tokens: list[int]
    num_scored: int


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows for one pass of the model.

    `places` count positions within a shard's rows, which lie one after another; the
    position before the scored token is meant. `owners` says whose token it is, -1: nobody's,
    and `ranks` the how manieth of its owner's scored tokens.
    """

    inputs: Int[np.ndarray, "rows positions"]
    places: Int[np.ndarray, "shards scored"]
    targets: Int[np.ndarray, "shards scored"]
    owners: Int[np.ndarray, "shards scored"]
    ranks: Int[np.ndarray, "shards scored"]
    block: int  # scored tokens of a shard at one time; divides `scored`


@dataclasses.dataclass
class _Row:
    inputs: list[int]
    owners: list[int]  # requests whose tokens this row scores
    num_scored: int


def plan(
    requests: Sequence[Request],
    *,
    shards: int,
    tokens_per_batch: int,
    tokens_per_program: float,
    longest: int,
    batch_size: int | None = None,
) -> list[Batch]:
    """Batches that together score every token of every request once.

    Args:
      requests: at least two tokens each, of which at least one is not scored.
      shards: parts into which a mesh splits the rows.
      tokens_per_batch: padding included; a batch has at least one row a shard.
      tokens_per_program: how many tokens cost as much as compiling one more shape.
      longest: no row is padded beyond it.
      batch_size: rows of a batch instead of `tokens_per_batch`.
    """
    rows = _rows(requests)
    batches = []
    for length, members in _buckets(rows, tokens_per_program, longest):
        size = batch_size or max(1, tokens_per_batch // length)
        size = -(-size // shards) * shards
        count = -(-len(members) // size)
        # As many rows in each, so that the last is not mostly padding.
        size = -(-math.ceil(len(members) / count) // shards) * shards
        members.sort(key=lambda row: -row.num_scored)
        dealt = [[members[i::count][s::shards] for s in range(shards)] for i in range(count)]
        most = max(sum(row.num_scored for row in part) for parts in dealt for part in parts)
        block = min(_MOST_TOKENS_AT_ONCE, -(-most // 16) * 16)
        capacity = -(-most // block) * block
        batches += [_fill(parts, requests, size, length, capacity, block) for parts in dealt]
    return batches


def _rows(requests: Sequence[Request]) -> list[_Row]:
    """One row for all requests that it can serve."""
    order = sorted(range(len(requests)), key=lambda i: requests[i].tokens[:-1])
    rows: list[_Row] = []
    # From the back: whatever begins another row stands right before it, or before others
    # that it begins.
    for i in reversed(order):
        tokens, num_scored = requests[i]
        inputs = tokens[:-1]
        if rows and rows[-1].inputs[: len(inputs)] == inputs:
            rows[-1].owners.append(i)
            rows[-1].num_scored += num_scored
        else:
            rows.append(_Row(inputs, [i], num_scored))
    return rows


def _buckets(
    rows: Sequence[_Row], tokens_per_program: float, longest: int
) -> Iterator[tuple[int, list[_Row]]]:
    """Padded lengths and their rows, the longest first."""
    padded = [min(-(-len(row.inputs) // _LENGTH_STEP) * _LENGTH_STEP, longest) for row in rows]
    shorter = 0
    chosen = []
    for length in choose_lengths(padded, tokens_per_program, _MOST_BUCKETS):
        members = [row for row, at in zip(rows, padded, strict=True) if shorter < at <= length]
        chosen.append((length, members))
        shorter = length
    yield from reversed(chosen)


def choose_lengths(lengths: Iterable[int], cost: float, most: int) -> list[int]:
    """The lengths to pad to, so that padded tokens + cost × their number is least.

    Args:
      lengths: of all rows.
      cost: of one more length, in tokens.
      most: lengths at most.

    Returns:
      Ascending; the last is the longest of all.
    """
    distinct, counts = np.unique(np.fromiter(lengths, np.int64), return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    # best[k][j]: the first j distinct lengths in k groups, each padded to its last.
    n = len(distinct)
    best = np.full((most + 1, n + 1), np.inf)
    best[0, 0] = 0
    cut = np.zeros((most + 1, n + 1), np.int64)
    for k in range(1, most + 1):
        for j in range(1, n + 1):
            tokens = (below[j] - below[:j]) * distinct[j - 1] + best[k - 1, :j] + cost
            cut[k, j] = int(np.argmin(tokens))
            best[k, j] = tokens[cut[k, j]]
    k, j = int(np.argmin(best[:, n])), n
    chosen = []
    while j:
        chosen.append(int(distinct[j - 1]))
        j, k = int(cut[k, j]), k - 1
    return chosen[::-1]


def _fill(
    parts: Sequence[Sequence[_Row]],
    requests: Sequence[Request],
    size: int,
    length: int,
    capacity: int,
    block: int,
) -> Batch:
    shards = len(parts)
    inputs = np.zeros((shards, size // shards, length), np.int32)
    places, targets, ranks = np.zeros((3, shards, capacity), np.int32)
    owners = np.full((shards, capacity), -1, np.int64)
    for s, part in enumerate(parts):
        at = 0
        for r, row in enumerate(part):
            inputs[s, r, : len(row.inputs)] = row.inputs
            for owner in row.owners:
                tokens, num = requests[owner]
                last = r * length + len(tokens) - 1
                places[s, at : at + num] = np.arange(last - num, last)
                targets[s, at : at + num] = tokens[len(tokens) - num :]
                owners[s, at : at + num] = owner
                ranks[s, at : at + num] = np.arange(num)
                at += num
    return Batch(inputs.reshape(size, length), places, targets, owners, ranks, block)
