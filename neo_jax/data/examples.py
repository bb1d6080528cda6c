"""Batches of examples: rows that belong together with their labels, and are no stream of text.

Enters: arrays with one row an example. Leaves: a `Pipeline` over them, with the same promises
as for text: a batch is a pure function of seed, position and batch size; every example comes
once an epoch, in a new order each time; hosts and resumption change nothing.

Token arrays are filled up to the longest example. A batch is cut to the longest of its own,
rounded up, so that few lengths are compiled and little is computed for nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from neo_jax.config import ConfigError, DataConfig
from neo_jax.data.packing import Batch
from neo_jax.data.pipeline import Pipeline, Totals, shuffled


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
            rows = np.asarray(
                [
                    shuffled(place % count, count, self.seed, 0, place // count)
                    for place in places.tolist()
                ]
            )
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
    return Pipeline(batches, config, {"examples": fingerprint(batches)}, 0)


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
