"""Batches of examples: rows that belong together with their labels, and are no stream of text.

Enters: arrays with one row an example. Leaves: a `Pipeline` over them, with the same promises
as for text: a batch is a pure function of seed, position and batch size; every example comes
once an epoch, in a new order each time; hosts and resumption change nothing.

Token arrays are filled up to the longest example. A batch is cut to the longest of its own,
rounded up, so that few lengths are compiled and little is computed for nothing; least where
rows of like length come together (`data.length_group`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from neo_jax.config import ConfigError, DataConfig
from neo_jax.data.packing import Batch
from neo_jax.data.pipeline import Pipeline, Totals, shuffled

_GROUPS_SORTED = 32  # that many groups' rows are sorted by length together


@dataclasses.dataclass(frozen=True)
class ExampleBatches:
    """The function from a position to a batch of examples.

    Attributes:
      arrays: by name, the first dimension is the examples. Those in `tokens` are [examples,
        …, seq] and are cut to the batch's longest row, as `lengths` tells.
      lengths: tokens of each example, of the longest where it has several rows.
      tokens: names of arrays whose last dimension is `seq`.
      multiple: lengths of batches are multiples of this, but for the longest of all.
      seed: of the order.
      batch_size: examples of a batch, all hosts together.
      host_rows: this host's rows of each batch.
      num_bytes: UTF-8 bytes of the text, to be told.
      endless: epoch after epoch; else once, in order, the last batch filled up with rows
        whose `weights` are 0.
      length_group: this many rows that follow one another have about one length, where the
        data is endless; 0 mixes all lengths.
    """

    arrays: Mapping[str, np.ndarray]
    lengths: np.ndarray
    tokens: Sequence[str]
    multiple: int
    seed: int
    batch_size: int
    host_rows: tuple[int, int]
    num_bytes: int = 0
    endless: bool = True
    length_group: int = 0
    tokens_per_batch: None = None

    @property
    def num_sequences(self) -> int:
        """Examples of one epoch."""
        return len(self.lengths)

    @property
    def totals(self) -> Totals:
        """See `Totals`."""
        return Totals(int(self.lengths.sum()), len(self.lengths), self.num_bytes)

    def at(self, position: int) -> Batch:
        """This host's rows of the batch that starts at example `position`."""
        count = self.num_sequences
        places = np.arange(position, position + self.batch_size)
        if self.endless:
            rows = np.asarray([self._row(*divmod(place, count)) for place in places.tolist()])
        else:
            rows = np.minimum(places, count - 1)
        seq = self._seq(int(self.lengths[rows].max()))
        first, last = self.host_rows
        own = rows[first:last]
        batch = {
            name: array[own][..., :seq] if name in self.tokens else array[own]
            for name, array in self.arrays.items()
        }
        beyond = places[first:last] >= count
        if not self.endless and beyond.any():
            batch["weights"] = batch["weights"].copy()
            batch["weights"][beyond] = 0
        return batch

    def _row(self, epoch: int, place: int) -> int:
        """The example at a place of an epoch."""
        count, group = self.num_sequences, self.length_group
        if not group:
            return shuffled(place, count, self.seed, 0, epoch)
        # Groups are counted from the first epoch on, so that batches meet whole ones in every
        # epoch, though an epoch's rows are seldom a number of groups.
        head = min(-epoch * count % group, count)
        span = group * _GROUPS_SORTED
        first = head + (place - head) // span * span if place >= head else 0
        last = min(first + span, count) if place >= head else head
        return int(self._sorted(epoch, first, last)[place - first])

    @functools.cached_property
    def _sorted(self) -> Callable[[int, int, int], np.ndarray]:
        """Examples at places `first` … `last` of an epoch: groups by length, in any order."""
        count, group = self.num_sequences, self.length_group

        @functools.lru_cache(maxsize=4)
        def examples(epoch: int, first: int, last: int) -> np.ndarray:
            rows = np.asarray(
                [shuffled(place, count, self.seed, 0, epoch) for place in range(first, last)]
            )
            # Not quite by length, or few examples would meet the same ones in every epoch.
            noise = np.random.default_rng([self.seed, epoch, first]).uniform(
                0.9, 1.1, len(rows)
            )
            rows = rows[np.argsort(self.lengths[rows] * noise, kind="stable")]
            whole = len(rows) // group
            order = np.asarray(
                [
                    shuffled(number, whole, self.seed, 1 + first, epoch)
                    for number in range(whole)
                ],
                np.int64,
            )
            groups = rows[: whole * group].reshape(whole, group)[order]
            return np.concatenate([groups.reshape(-1), rows[whole * group :]])

        return examples

    def __getstate__(self) -> dict[str, Any]:
        """Without what was sorted: workers sort their own."""
        return {name: value for name, value in self.__dict__.items() if name != "_sorted"}

    def _seq(self, longest: int) -> int:
        """Tokens that the rows of a batch get, by its longest."""
        whole = max((self.arrays[name].shape[-1] for name in self.tokens), default=0)
        return min(whole, -(-max(longest, 1) // self.multiple) * self.multiple)


def pipeline(batches: ExampleBatches, config: DataConfig) -> Pipeline:
    """An iterator over batches of examples that resumes as one over text does.

    Raises:
      ConfigError: there are no examples, or a batch does not divide over the hosts.
    """
    if not batches.num_sequences:
        raise ConfigError("there are no examples to learn from.")
    spec = {"examples": fingerprint(batches)}
    if batches.length_group:
        spec["length_group"] = str(batches.length_group)
    return Pipeline(batches, config, spec, 0)


def fingerprint(batches: ExampleBatches) -> str:
    """What tells these examples from others: a digest of all arrays."""
    digest = hashlib.sha256()
    for name in sorted(batches.arrays):
        array = np.ascontiguousarray(batches.arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def share(batch_size: int, index: int, count: int) -> tuple[int, int]:
    """The rows of each batch that part `index` of `count` loads.

    Raises:
      ConfigError: the batch does not divide.
    """
    if batch_size % count:
        raise ConfigError(f"data.batch_size={batch_size} does not divide over {count} hosts.")
    each = batch_size // count
    return index * each, (index + 1) * each
