"""From named sources to an endless iterator of batches that resumes at any step.

Enters: the data settings, a tokenizer, a seed and a position. Leaves: numpy batches

    inputs      int32   [batch, seq]   tokens
    targets     int32   [batch, seq]   the token that follows each input
    weights     float32 [batch, seq]   1 where the target counts, 0 on padding and prompts
    segment_ids int32   [batch, seq]   1, 2, … for each document; 0 is padding   } only with
    positions   int32   [batch, seq]   counted from 0 in each segment            } isolation

A training batch is a pure function of seed, position, batch size and data spec: the
position counts sequences since the start of training, all hosts together, and any
position is reached at once. Workers and hosts change who computes a batch, not what is
in it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags
from grain.experimental import index_shuffle

from neo_jax import tokenizer as tokenizers
from neo_jax.config import ConfigError, DataConfig
from neo_jax.data import corpus, packing
from neo_jax.data.corpus import Split, load_tokenizer
from neo_jax.data.mixture import Mixture
from neo_jax.data.packing import Batch
from neo_jax.data.tokens import TokenStore

__all__ = ["Batch", "Batches", "Pipeline", "Split", "build", "load_tokenizer"]

_LOG = logging.getLogger(__name__)
_SHUFFLE_ROUNDS = 4  # of grain's block cipher; fewer leave visible structure
_ENDLESS = 1 << 48  # batches; no run reaches it


def build(
    config: DataConfig,
    tokenizer: tokenizers.Tokenizer,
    *,
    seed: int,
    split: Split,
    position: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Pipeline:
    """Opens the sources and returns this host's share of the batches.

    Args:
      config: the data settings.
      tokenizer: what `load_tokenizer` returned, or its copy from the workdir.
      seed: of the order of the training sequences.
      split: "train" is endless; "eval" gives the held-out text once, in order.
      position: sequences that were consumed before, all hosts together.
      process_index: which host this is.
      process_count: how many hosts share each batch.

    Raises:
      ConfigError: no such source, no text in it, less than one sequence of it, or a batch
        that does not divide over the hosts.
    """
    if config.batch_size % process_count:
        raise ConfigError(
            f"data.batch_size={config.batch_size} does not divide over {process_count} hosts."
        )
    parts = []
    for name in corpus.source_names(config, split):
        tokens_of = corpus.open_store(name, config, tokenizer, split)
        _require_text(name, tokens_of, config, split)
        rows = packing.make_rows(tokens_of, config.packing, config.seq_len)
        parts.append(_Part(name, tokens_of, rows))
    per_host = config.batch_size // process_count
    batches = Batches(
        parts=tuple(parts),
        mixture=_mixture(config, _first_changes(config)),
        seed=seed,
        shuffle=config.shuffle and split == "train",
        endless=split == "train",
        seq_len=config.seq_len,
        isolate=config.isolate_documents,
        batch_size=config.batch_size,
        host_rows=(process_index * per_host, (process_index + 1) * per_host),
    )
    return Pipeline(batches, config, _spec(config, tokenizer, parts), position)


@dataclasses.dataclass(frozen=True)
class _Part:
    """One source, divided into rows."""

    name: str
    store: TokenStore
    rows: packing.Rows


@dataclasses.dataclass(frozen=True)
class Batches:
    """The function from a position to a batch; picklable, so that workers hold it too."""

    parts: tuple[_Part, ...]
    mixture: Mixture
    seed: int
    shuffle: bool
    endless: bool
    seq_len: int
    isolate: bool
    batch_size: int  # sequences, all hosts together
    host_rows: tuple[int, int]  # this host's rows of each batch

    @property
    def num_sequences(self) -> int:
        """Rows of one epoch over all sources."""
        return sum(part.rows.num_rows for part in self.parts)

    @property
    def tokens_per_batch(self) -> int:
        """Positions of a batch, all hosts together."""
        return self.batch_size * self.seq_len

    @property
    def totals(self) -> Totals:
        """Of all sources."""
        stores = [part.store for part in self.parts]
        return Totals(
            num_tokens=sum(store.num_tokens for store in stores),
            num_documents=sum(store.num_documents for store in stores),
            num_bytes=sum(store.num_bytes for store in stores),
        )

    def at(self, position: int) -> Batch:
        """This host's rows of the batch that starts at sequence `position`."""
        first, last = self.host_rows
        batch = packing.empty_batch(
            last - first, self.seq_len, self.isolate, self.parts[0].store.eos_id
        )
        chosen: dict[int, list[tuple[int, int]]] = {}
        for b in range(last - first):
            place = self._place(position + first + b)
            if place is not None:
                source, row = place
                chosen.setdefault(source, []).append((b, row))
        for index, pairs in chosen.items():
            part = self.parts[index]
            pieces = [part.rows.pieces(row) for _, row in pairs]
            packing.fill(batch, [b for b, _ in pairs], part.store, pieces)
        return batch

    def _place(self, position: int) -> tuple[int, int] | None:
        """Source and row of a sequence; None after the end of the held-out text."""
        if not self.endless:
            for index, part in enumerate(self.parts):
                if position < part.rows.num_rows:
                    return index, position
                position -= part.rows.num_rows
            return None
        source, taken = self.mixture.place(position)
        count = self.parts[source].rows.num_rows
        epoch, row = divmod(taken, count)
        if self.shuffle:
            row = shuffled(row, count, self.seed, source, epoch)
        return source, row


@functools.lru_cache(maxsize=1024)
def _epoch_seed(seed: int, source: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, source, epoch]).generate_state(1)[0])


def shuffled(index: int, count: int, seed: int, source: int, epoch: int) -> int:
    """Where `index` lies in the epoch's permutation of 0 … count-1, which needs no memory."""
    if count == 1:
        return 0
    key = _epoch_seed(seed, source, epoch)
    return index_shuffle(index, max_index=count - 1, seed=key, rounds=_SHUFFLE_ROUNDS)


@runtime_checkable
class BatchFunction(Protocol):
    """A pure function from a position to a batch; picklable. `Batches` is one, for text.

    Attributes:
      seed: of the order.
      batch_size: rows of a batch, all hosts together.
      endless: whether the data is gone through again and again.
      num_sequences: rows of one epoch.
      tokens_per_batch: where all batches have as many; else None.
      totals: what one epoch holds.
    """

    @property
    def seed(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def endless(self) -> bool: ...
    @property
    def num_sequences(self) -> int: ...
    @property
    def tokens_per_batch(self) -> int | None: ...
    @property
    def totals(self) -> Totals: ...

    def at(self, position: int) -> Batch:
        """This host's rows of the batch that starts at sequence `position`."""


class Totals(NamedTuple):
    """What one epoch holds."""

    num_tokens: int
    num_documents: int
    num_bytes: int


class _BatchSource:
    """Batches from a position on, as grain reads a source: by index."""

    def __init__(self, batches: BatchFunction, position: int) -> None:
        self._batches = batches
        self._position = position

    def __len__(self) -> int:
        if self._batches.endless:
            return _ENDLESS
        left = max(self._batches.num_sequences - self._position, 0)
        return -(-left // self._batches.batch_size)

    def __getitem__(self, index: int) -> Batch:
        return self._batches.at(self._position + index * self._batches.batch_size)


class Pipeline:
    """An iterator over batches that knows its position.

    Attributes:
      step: batches drawn since the start of training.
      num_sequences: rows of one epoch, over all sources.
      num_tokens: targets of one epoch, the eos of every document included.
      num_documents: documents of one epoch.
      num_bytes: UTF-8 bytes of the documents' text.
    """

    def __init__(
        self, batches: BatchFunction, config: DataConfig, spec: dict[str, Any], position: int
    ) -> None:
        self._batches = batches
        self._config = config
        self._spec = spec
        self._position = position
        self.step = position // config.batch_size
        self._jumps: list[dict[str, Any]] = []
        self._running: list[grain.DatasetIterator] = []  # one, or none before the first batch
        # At exit grain's own clean-up would come after the modules it needs are gone.
        weakref.finalize(self, _stop, self._running)
        self.num_sequences = batches.num_sequences
        self.num_tokens, self.num_documents, self.num_bytes = batches.totals

    def __iter__(self) -> Pipeline:
        return self

    def __next__(self) -> Batch:
        if not self._running:
            self._running.append(self._start())
        batch = next(self._running[0])
        if (
            self._config.num_workers
        ):  # out of the workers' shared memory, which grain takes back
            batch = {key: np.array(array) for key, array in batch.items()}
        self._position += self._batches.batch_size
        self.step += 1
        return batch

    def close(self) -> None:
        """Ends the workers and threads; the next batch would start them again."""
        _stop(self._running)

    def tokens_until(self, step: int) -> dict[str, int]:
        """`tokens` of the first steps; nothing where batches differ in length."""
        each = self._batches.tokens_per_batch
        return {} if each is None else {"tokens": step * each}

    @property
    def position(self) -> int:
        """Sequences consumed since the start of training, all hosts together."""
        return self._position

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON: seed, position, step, jumps, spec.

        Also where the mixture changed so far, which step alone does not tell: the batch
        size may have been another one then.
        """
        return {
            "seed": self._batches.seed,
            "position": self._position,
            "step": self.step,
            "jumps": list(self._jumps),
            "changed_at": self._changed_at(),
            "spec": self._spec,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken; the batch size may be another one.

        Raises:
          ConfigError: the seed or the data spec is not the one of the state, and
            `data.allow_spec_change` is off.
        """
        was = {"seed": state["seed"], **state["spec"]}
        now = {"seed": self._batches.seed, **self._spec}
        changes = [
            f"{key} {was.get(key)!r} → {now.get(key)!r}"
            for key in sorted(was.keys() | now.keys())
            if was.get(key) != now.get(key)
        ]
        if changes and not self._config.allow_spec_change:
            raise ConfigError(
                f"the data changed since the checkpoint: {'; '.join(changes)}; undo it, or "
                f"set data.allow_spec_change=True to go on with the new data."
            )
        self.close()
        self._jumps = list(state["jumps"])
        self._position = int(state["position"])
        self.step = int(state.get("step", self._position // self._config.batch_size))
        self._place_changes([] if changes else state.get("changed_at", []))
        if changes:
            _LOG.warning("data changed at sequence %d: %s", self._position, "; ".join(changes))
            self._jump(self._position, "changed: " + "; ".join(changes))

    def skip(self, sequences: int, reason: str = "skipped") -> None:
        """Leaves out the next `sequences` sequences, all hosts together, and notes it.

        Raises:
          ValueError: `sequences` is negative.
        """
        if sequences < 0:
            raise ValueError(f"skip({sequences}): the number must not be negative.")
        self.close()
        changed_at = self._changed_at()
        self._jump(self._position + sequences, reason)
        self._place_changes(changed_at)

    def jumps(self) -> list[dict[str, Any]]:
        """Where the stream did not go on from the next sequence: `from`, `to`, `reason`."""
        return [dict(jump) for jump in self._jumps]

    def _jump(self, to: int, reason: str) -> None:
        self._jumps.append({"from": self._position, "to": to, "reason": reason})
        self._position = to

    def _changed_at(self) -> list[int]:
        """Positions at which the mixture's weights changed so far."""
        if not isinstance(self._batches, Batches):
            return []
        return [at for at in self._batches.mixture.changes if at <= self._position]

    def _place_changes(self, changed_at: Sequence[int]) -> None:
        """Puts changes that are counted in steps where these will be, from here on."""
        steps = self._config.mixture_changes
        if self._config.mixture_changes_in == "sequences" or not steps:
            return
        assert isinstance(self._batches, Batches)
        past = [at for at in changed_at if at <= self._position]
        future = [
            max(self._position + (step - self.step) * self._config.batch_size, 0)
            for step in steps[len(past) :]
        ]
        mixture = _mixture(self._config, [*past, *future])
        self._batches = dataclasses.replace(self._batches, mixture=mixture)

    def epochs(self) -> dict[str, float]:
        """For each source of text, how many times it was seen so far."""
        assert isinstance(self._batches, Batches)
        counts = self._batches.mixture.counts(self._position)
        return {
            part.name: count / part.rows.num_rows
            for part, count in zip(self._batches.parts, counts, strict=True)
        }

    def document_lengths(self) -> dict[str, np.ndarray]:
        """For each source of text, tokens of each document with its eos; int64 [documents]."""
        assert isinstance(self._batches, Batches)
        return {
            part.name: np.diff(part.store.document_ends(), prepend=0)
            for part in self._batches.parts
        }

    def _start(self) -> grain.DatasetIterator:
        dataset = grain.MapDataset.source(_BatchSource(self._batches, self._position))
        # One thread assembles the next batches while this one computes.
        stream = dataset.to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        )
        if self._config.num_workers:
            if not flags.FLAGS.is_parsed():  # grain's workers read flags, also in a notebook
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self._config.num_workers, per_worker_buffer_size=2
                )
            )
        return iter(stream)


def _stop(running: list[grain.DatasetIterator]) -> None:
    while running:
        running.pop().close()


# ------------------------------------------------------------------------------- in detail


def _mixture(config: DataConfig, changes: Sequence[int]) -> Mixture:
    if not config.mixture:
        return Mixture([[1.0]], ())
    columns = zip(*(entry[1:] for entry in config.mixture), strict=True)
    weights = [[float(weight) for weight in column] for column in columns]
    return Mixture(weights, changes)


def _first_changes(config: DataConfig) -> list[int]:
    """Positions at which the mixture changes, if the batch size never does."""
    unit = config.batch_size if config.mixture_changes_in == "steps" else 1
    return [change * unit for change in config.mixture_changes]


def _require_text(name: str, stream: TokenStore, config: DataConfig, split: Split) -> None:
    if not stream.num_documents:
        if split == "eval" and config.eval_source is None:
            raise ConfigError(
                f"data source {name!r} has no document {config.holdout_offset} to hold out; "
                f"lower data.holdout_offset, or name a data.eval_source."
            )
        raise ConfigError(f"data source {name!r} holds no text.")
    too_short = config.packing == "concat" and stream.num_tokens < config.seq_len
    if split == "train" and too_short:
        raise ConfigError(
            f"data source {name!r} holds {stream.num_tokens} tokens, and one sequence needs "
            f"{config.seq_len}; lower data.seq_len or give more text."
        )


def _spec(
    config: DataConfig, tokenizer: tokenizers.Tokenizer, parts: Sequence[_Part]
) -> dict[str, Any]:
    """What decides the stream of sequences besides seed and position; not the batch size."""
    return {
        "data": [part.store.fingerprint[:16] for part in parts],  # a folder may move
        "weights": [list(entry[1:]) for entry in config.mixture],
        "mixture_changes": [
            f"step {change}" if config.mixture_changes_in == "steps" else change
            for change in config.mixture_changes
        ],
        "tokenizer": tokenizer.fingerprint[:16],
        "seq_len": config.seq_len,
        "packing": config.packing,
        "isolate_documents": config.isolate_documents,
        "shuffle": config.shuffle,
    }
