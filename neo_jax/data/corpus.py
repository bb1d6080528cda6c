"""The documents of one split of the sources that a config names.

Enters: the data settings. Leaves: the tokenizer they ask for, and each source's tokens:
read from the disk where `prepare` wrote them, and else made here, in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

from neo_jax import tokenizer as tokenizers
from neo_jax.config import ConfigError, DataConfig
from neo_jax.data import readers, sources, store, tokens
from neo_jax.data.records import Document, Record
from neo_jax.data.tokens import TokenStore

_LOG = logging.getLogger(__name__)

Split: TypeAlias = Literal["train", "eval"]


def load_tokenizer(config: DataConfig) -> tokenizers.Tokenizer:
    """The tokenizer that `data.tokenizer` names; "bpe:4096" is trained, held-out text unseen.

    Raises:
      ConfigError: unknown name, unreachable files, or nothing to train on.
    """
    kind, _, size = config.tokenizer.partition(":")
    if readers.is_remote(config.tokenizer):
        return tokenizers.load(_local_tokenizer(config.tokenizer))
    if kind != "bpe":
        return tokenizers.load(config.tokenizer)
    if not size.isdigit():
        raise ConfigError(
            f"data.tokenizer={config.tokenizer!r}: write the number of ids, as in 'bpe:4096'."
        )
    names = source_names(config, "train")
    for folder in filter(None, map(sources.prepared_directory, names)):
        return _tokenizer_of(folder, config.tokenizer)
    texts = (
        record.text
        for name in names
        for _, record in split_records(name, config, "train")
        if isinstance(record, Document)
    )
    return tokenizers.train_bpe(texts, int(size))


def _local_tokenizer(location: str) -> str:
    """A local copy of a `tokenizer.json`, or of the one in a remote directory."""
    if not location.endswith(".json"):
        location = f"{location.rstrip('/')}/{tokenizers.FILE_NAME}"
    try:
        return readers.local_copy(location)
    except OSError as error:
        raise ConfigError(f"tokenizer {location}: {error.strerror or error}.") from None


def _tokenizer_of(folder: str, name: str) -> tokenizers.Tokenizer:
    """The tokenizer that was trained when a directory was prepared."""
    prepared_with = store.read_manifest(folder)["tokenizer"]
    if prepared_with != name:
        raise ConfigError(
            f"data.tokenizer={name!r}: {folder} was prepared with {prepared_with!r}; set that."
        )
    return tokenizers.load(_local_tokenizer(folder) if readers.is_remote(folder) else folder)


def source_names(config: DataConfig, split: Split) -> Sequence[str]:
    """The sources that a split is read from."""
    if split == "eval" and config.eval_source is not None:
        return [config.eval_source]
    return [str(entry[0]) for entry in config.mixture] or [config.source]


def split_records(
    name: str, config: DataConfig, split: Split
) -> Iterator[tuple[int, Record | None]]:
    """Records and their indices; without `eval_source` some are held out by their index."""
    source = sources.open_source(name, config)
    sources.require_small(source, config)
    every = 0 if config.eval_source is not None else config.holdout_every
    for index, record in enumerate(sources.all_records(source)):
        held_out = sources.is_held_out(index, every, config.holdout_offset)
        if held_out == (split == "eval" and config.eval_source is None):
            yield index, record


def open_store(
    name: str, config: DataConfig, tokenizer: tokenizers.Tokenizer, split: Split
) -> TokenStore:
    """The tokens of one split of one source.

    Raises:
      ConfigError: no such source, unreadable text, or tokens of another tokenizer.
    """
    folder = sources.prepared_directory(name)
    if folder is not None:
        prepared = _open_prepared(folder, config, tokenizer, split)
        subsets = sources.subsets(name)
        return store.Selection(prepared, subsets) if subsets else prepared
    outcomes = list(tokens.encode(split_records(name, config, split), tokenizer, config))
    documents = [o for o in outcomes if isinstance(o, tokens.EncodedDocument)]
    left_out = [o for o in outcomes if isinstance(o, tokens.LeftOut) and o.kind != "empty"]
    if left_out:
        _LOG.warning(
            "%s: left out %d of %d records, the first: %s",
            name,
            len(left_out),
            len(outcomes),
            left_out[0].reason,
        )
    return tokens.MemoryTokens(documents, tokenizer)


def _open_prepared(
    folder: str, config: DataConfig, tokenizer: tokenizers.Tokenizer, split: Split
) -> store.PreparedTokens:
    """The split that `prepare` wrote; which documents are held out was decided then."""
    settings = store.read_manifest(folder)["settings"]
    theirs = settings["holdout_every"], settings["holdout_offset"]
    if config.eval_source is not None:
        if theirs[0]:
            _LOG.warning("%s: its held-out documents are in neither split", folder)
        split = "train"
    elif theirs != (config.holdout_every, config.holdout_offset) and any(
        every for every in (theirs[0], config.holdout_every)
    ):
        raise ConfigError(
            f"{folder} was prepared with holdout_every={theirs[0]} and holdout_offset="
            f"{theirs[1]}; set data.holdout_every and data.holdout_offset to that, or "
            f"prepare it again."
        )
    return store.PreparedTokens(folder, split, tokenizer)
