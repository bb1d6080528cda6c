"""Tokenise a source once.

Enters: a source and the data settings. Leaves: a directory of tokens (see store.py) with a
manifest that says what it is and an account of every record.

Each unit of the source is tokenised by one process (workers.py), a shard at a time
(shards.py). A shard counts as done once its notes are written; a killed process loses at most
the shard it was at, and the next run goes on from there (output_folder.py), to the same
bytes. When all are done the notes become the manifest (manifest.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Any

from neo_jax import tokenizer as tokenizers
from neo_jax.config import ConfigError, DataConfig
from neo_jax.data import corpus, output_folder, sources, store
from neo_jax.data.manifest import finish, verify
from neo_jax.data.shards import Job
from neo_jax.data.sources import Source
from neo_jax.data.workers import Workers

__all__ = ["prepare", "verify"]


def prepare(
    config: DataConfig,
    output: str | os.PathLike[str],
    *,
    num_processes: int,
    shard_bytes: int,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Tokenises `config.source` into the directory `output`, or goes on doing so.

    Args:
      config: the data settings; `source`, `tokenizer`, the hold-out and those that say how
        records are read.
      output: a local directory, new, empty, or left by an earlier run of the same settings.
      num_processes: how many tokenise at a time.
      shard_bytes: UTF-8 bytes of text a shard.
      show_progress: whether to draw a bar on standard error.

    Returns:
      The manifest.

    Raises:
      ConfigError: the output holds something else, the source is missing or has no text, a
        record is unreadable and `config.on_error` is "raise", or a process was killed.
    """
    folder = pathlib.Path(output).expanduser()
    if "://" in os.fspath(output):
        raise ConfigError(f"--output {os.fspath(output)} must be a local directory; copy it.")
    source = sources.open_source(config.source, config)
    with output_folder.locked(folder):
        output_folder.remove_false_start(folder)
        is_done = (folder / sources.MANIFEST).exists()
        units = [] if is_done else source.units()
        with Workers(max(1, min(num_processes, len(units)))) as workers:
            tokenizer = _tokenizer(config, folder)
            settings = _settings(source, config, tokenizer, shard_bytes)
            if is_done:
                return output_folder.finished(folder, settings)
            output_folder.start_or_resume(folder, settings, tokenizer)
            job = Job(source, config, folder, shard_bytes)
            workers.run(job, tokenizer, units, show_progress)
        return finish(folder, settings, tokenizer)


def _tokenizer(config: DataConfig, folder: pathlib.Path) -> tokenizers.Tokenizer:
    """The tokenizer; one that an earlier run trained is not trained again."""
    trained = config.tokenizer.startswith("bpe:") and (folder / tokenizers.FILE_NAME).is_file()
    return tokenizers.load(folder) if trained else corpus.load_tokenizer(config)


def _settings(
    source: Source, config: DataConfig, tokenizer: tokenizers.Tokenizer, shard_bytes: int
) -> dict[str, Any]:
    """All that decides the bytes written."""
    identity = json.dumps(source.identity()).encode()
    return {
        "source": source.name,
        "files": hashlib.sha256(identity).hexdigest(),
        "tokenizer": config.tokenizer,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "holdout_every": config.holdout_every,
        "holdout_offset": config.holdout_offset,
        "record_format": config.record_format,
        "text_field": config.text_field,
        "txt_documents": config.txt_documents,
        "on_error": config.on_error,
        "max_document_bytes": config.max_document_bytes,
        "shard_bytes": shard_bytes,
        "block_tokens": store.BLOCK_TOKENS,
    }
