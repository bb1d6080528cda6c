"""Data sets of other libraries as sources: TFDS, Hugging Face datasets.

Enters: a directory that one of them prepared, or a hub id. Leaves: a source whose rows the
library reads by their number. Each is imported where it is first needed; reading TFDS's
ArrayRecord files needs no TensorFlow, building one of its own sets does.
"""

from __future__ import annotations

import abc
import importlib.util
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from neo_jax.config import ConfigError, DataConfig
from neo_jax.data.names import tfds_build_command
from neo_jax.data.readers import Span
from neo_jax.data.records import Record, Row, RowError, Unreadable, to_document
from neo_jax.data.units import Unit, number_of_units


class _IndexedSource(abc.ABC):
    """Rows that a library reads by their number; what TFDS and Hugging Face have in common."""

    def __init__(self, name: str, config: DataConfig) -> None:
        self.name = name
        self.num_bytes = 0
        self._config = config

    @abc.abstractmethod
    def _open(self) -> Any:
        """A sequence of mappings from field names to values."""

    def units(self) -> list[Unit]:
        total = len(self._open())
        pieces = number_of_units(self.num_bytes)
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


class TfdsSource(_IndexedSource):
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


def find_tfds(name: str, dataset: str, config: DataConfig) -> pathlib.Path:
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


class HubSource(_IndexedSource):
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
            if not is_saved_to_disk(pathlib.Path(self._location)):
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


def is_saved_to_disk(folder: pathlib.Path) -> bool:
    """Whether Hugging Face's `save_to_disk` wrote this directory."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
