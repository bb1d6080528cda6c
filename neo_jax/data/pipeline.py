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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import grain
import numpy as np
from absl import flags
from grain.experimental import index_shuffle

from neo_jax import tokenizer as tokenizers
from neo_jax.config import ConfigError, DataConfig
from neo_jax.data import packing, sources, tokens
from neo_jax.data.packing import Batch

_LOG = logging.getLogger(__name__)
_SHUFFLE_ROUNDS = 4  # of grain's block cipher; fewer leave visible structure
_ENDLESS = 1 << 48  # batches; no run reaches it

Split = Literal["train", "eval"]


def load_tokenizer(config: DataConfig) -> tokenizers.Tokenizer:
    """The tokenizer that `data.tokenizer` names; "bpe:4096" is trained, held-out text unseen.

    Raises:
      ConfigError: unknown name, unreachable files, or nothing to train on.
    """
    kind, _, size = config.tokenizer.partition(":")
    if kind != "bpe":
        return tokenizers.load(config.tokenizer)
    if not size.isdigit():
        raise ConfigError(
            f"data.tokenizer={config.tokenizer!r}: write the number of ids, as in 'bpe:4096'."
        )
    texts = (
        record.text
        for name in _source_names(config, "train")
        for record in _records(name, config, "train")
        if isinstance(record, sources.Document)
    )
    return tokenizers.train_bpe(texts, int(size))


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
    for name in _source_names(config, split):
        store = _open_store(name, config, tokenizer, split)
        _require_text(name, store, config, split)
        rows = packing.make_rows(store, "concat", config.seq_len)
        parts.append(_Part(name, store, rows))
    per_host = config.batch_size // process_count
    batches = Batches(
        parts=tuple(parts),
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
    store: tokens.TokenStore
    rows: packing.Rows


@dataclasses.dataclass(frozen=True)
class Batches:
    """The function from a position to a batch; picklable, so that workers hold it too."""

    parts: tuple[_Part, ...]
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
        (part,) = self.parts
        epoch, index = divmod(position, part.rows.num_rows)
        if self.shuffle:
            index = _shuffled(index, part.rows.num_rows, self.seed, 0, epoch)
        return 0, index


@functools.lru_cache(maxsize=1024)
def _epoch_seed(seed: int, source: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, source, epoch]).generate_state(1)[0])


def _shuffled(index: int, count: int, seed: int, source: int, epoch: int) -> int:
    """Where `index` lies in the epoch's permutation of 0 … count-1, which needs no memory."""
    if count == 1:
        return 0
    key = _epoch_seed(seed, source, epoch)
    return index_shuffle(index, max_index=count - 1, seed=key, rounds=_SHUFFLE_ROUNDS)


class _BatchSource:
    """`Batches` from a position on, as grain reads a source: by index."""

    def __init__(self, batches: Batches, position: int) -> None:
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
      num_sequences: rows of one epoch, over all sources.
      num_tokens: targets of one epoch, the eos of every document included.
      num_documents: documents of one epoch.
      num_bytes: UTF-8 bytes of the documents' text.
    """

    def __init__(
        self, batches: Batches, config: DataConfig, spec: dict[str, Any], position: int
    ) -> None:
        self._batches = batches
        self._num_workers = config.num_workers
        self._spec = spec
        self._position = position
        self._jumps: list[dict[str, Any]] = []
        self._running: list[grain.DatasetIterator] = []  # one, or none before the first batch
        # At exit grain's own clean-up would come after the modules it needs are gone.
        weakref.finalize(self, _stop, self._running)
        stores = [part.store for part in batches.parts]
        self.num_sequences = batches.num_sequences
        self.num_tokens = sum(store.num_tokens for store in stores)
        self.num_documents = sum(store.num_documents for store in stores)
        self.num_bytes = sum(store.num_bytes for store in stores)

    def __iter__(self) -> Pipeline:
        return self

    def __next__(self) -> Batch:
        if not self._running:
            self._running.append(self._start())
        batch = next(self._running[0])
        if self._num_workers:  # out of the workers' shared memory, which grain takes back
            batch = {key: np.array(array) for key, array in batch.items()}
        self._position += self._batches.batch_size
        return batch

    def close(self) -> None:
        """Ends the workers and threads; the next batch would start them again."""
        _stop(self._running)

    @property
    def position(self) -> int:
        """Sequences consumed since the start of training, all hosts together."""
        return self._position

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON: seed, position, jumps, spec."""
        return {
            "seed": self._batches.seed,
            "position": self._position,
            "jumps": list(self._jumps),
            "spec": self._spec,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken; the batch size may be another one.

        Raises:
          ConfigError: the seed or the data spec is not the one of the state.
        """
        was = {"seed": state["seed"], **state["spec"]}
        now = {"seed": self._batches.seed, **self._spec}
        if was != now:
            changes = [
                f"{key} {was.get(key)!r} → {now.get(key)!r}"
                for key in sorted(was.keys() | now.keys())
                if was.get(key) != now.get(key)
            ]
            raise ConfigError(f"the data changed since the checkpoint: {'; '.join(changes)}.")
        self.close()
        self._jumps = list(state["jumps"])
        self._position = int(state["position"])

    def _start(self) -> grain.DatasetIterator:
        dataset = grain.MapDataset.source(_BatchSource(self._batches, self._position))
        # One thread assembles the next batches while this one computes.
        stream = dataset.to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        )
        if self._num_workers:
            if not flags.FLAGS.is_parsed():  # grain's workers read flags, also in a notebook
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self._num_workers, per_worker_buffer_size=2
                )
            )
        return iter(stream)


def _stop(running: list[grain.DatasetIterator]) -> None:
    while running:
        running.pop().close()


# ------------------------------------------------------------------------------- in detail


def _source_names(config: DataConfig, split: Split) -> Sequence[str]:
    if split == "eval" and config.eval_source is not None:
        return [config.eval_source]
    return [config.source]


def _records(name: str, config: DataConfig, split: Split) -> Iterator[sources.Record]:
    """The records of one split; without `eval_source` some are held out by their index."""
    source = sources.open_source(name, config)
    everything = (record for unit in source.units() for record in source.records(unit))
    if config.eval_source is not None:
        yield from everything
        return
    for index, record in enumerate(everything):
        held_out = index % config.holdout_every == config.holdout_offset
        if held_out == (split == "eval"):
            yield record


def _open_store(
    name: str, config: DataConfig, tokenizer: tokenizers.Tokenizer, split: Split
) -> tokens.TokenStore:
    encoded = tokens.encode(_records(name, config, split), tokenizer)
    documents = [doc for doc in encoded if isinstance(doc, tokens.EncodedDocument)]
    return tokens.MemoryTokens(documents, tokenizer)


def _require_text(
    name: str, store: tokens.TokenStore, config: DataConfig, split: Split
) -> None:
    if not store.num_documents:
        if split == "eval" and config.eval_source is None:
            raise ConfigError(
                f"data.source={name!r} has no document {config.holdout_offset} to hold out; "
                f"lower data.holdout_offset, or name a data.eval_source."
            )
        raise ConfigError(f"data source {name!r} holds no text.")
    if split == "train" and store.num_tokens < config.seq_len:
        raise ConfigError(
            f"data.source={name!r} holds {store.num_tokens} tokens, and one sequence needs "
            f"{config.seq_len}; lower data.seq_len or give more text."
        )


def _spec(
    config: DataConfig, tokenizer: tokenizers.Tokenizer, parts: Sequence[_Part]
) -> dict[str, Any]:
    """What decides the stream of sequences besides seed and position; not the batch size."""
    return {
        "data": [part.store.fingerprint for part in parts],
        "tokenizer": tokenizer.fingerprint,
        "seq_len": config.seq_len,
        "isolate_documents": config.isolate_documents,
        "shuffle": config.shuffle,
    }
