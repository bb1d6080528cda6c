"""Where a benchmark's rows lie in a folder, and what they hold.

Enters: a folder (or one file) and the words by which a task's files are known. Leaves: the
files, and their rows. Names differ from mirror to mirror (`piqa.validation.jsonl`,
`piqa/plain_text/validation/data-00000-of-00001.arrow`), so that a file counts where all
words stand in its path below the folder, letters and digits alone compared.
"""

from __future__ import annotations

import csv
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from neo_jax.config import ConfigError
from neo_jax.data import readers
from neo_jax.data.records import Unreadable

Words = tuple[str, ...]

# Files beside the data that describe it.
_NOT_DATA = ("config.json", "dataset_dict.json", "dataset_info.json", "state.json")


def find(folder: pathlib.Path, name: str, wanted: Sequence[Words]) -> list[pathlib.Path]:
    """The files of a task, by the first set of words that finds any.

    Args:
      folder: searched with all folders below it; or the file itself.
      name: of the task, for the message.
      wanted: sets of words, the best first.

    Raises:
      ConfigError: nothing is there; names what was looked for.
    """
    folder = folder.expanduser()
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise ConfigError(f"--data {folder}: there is no such file or folder.")
    files = {
        path: re.sub(r"[^a-z0-9]", "", str(path.relative_to(folder)).lower())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and _is_data(path)
    }
    for words in wanted:
        found = [path for path, key in files.items() if all(word in key for word in words)]
        if found:
            # Parts of one data set lie side by side; other folders hold other copies.
            return [path for path in found if path.parent == found[0].parent]
    tried = "; ".join(" + ".join(words) for words in wanted)
    raise ConfigError(
        f"task {name!r}: none of {len(files)} data files under {folder} has these words in "
        f"its path: {tried}."
    )


def rows(paths: Sequence[pathlib.Path]) -> list[dict[str, Any]]:
    """The rows of files.

    Of the formats in data/readers.py, of CSV, and of one JSON object over many lines; a line
    of plain text is a row.

    Raises:
      ConfigError: a file or a row cannot be read.
    """
    found: list[dict[str, Any]] = []
    for path in paths:
        if path.suffix == ".csv":
            found += csv.DictReader(lines(path))
            continue
        if (whole := _whole_object(path)) is not None:
            found.append(whole)
            continue
        if readers.file_format(path.name) == "text":
            found += [{"text": line} for line in lines(path) if line.strip()]
            continue
        for row in readers.rows(readers.Span(str(path)), "file"):
            if isinstance(row, Unreadable):
                raise ConfigError(f"{row.where}: {row.reason}.")
            value = row.value
            found.append({"text": value} if isinstance(value, str) else dict(value))
    return found


def _is_data(path: pathlib.Path) -> bool:
    known = path.suffix == ".csv" or readers.file_format(path.name) is not None
    return known and path.name not in _NOT_DATA


def _whole_object(path: pathlib.Path) -> dict[str, Any] | None:
    """What a file holds that is one JSON object over many lines; None of other files."""
    if path.suffix != ".json":
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # one object a line, perhaps; whoever reads those tells what is wrong
    return value if isinstance(value, dict) else None


def lines(path: pathlib.Path) -> list[str]:
    """A text file's lines, without what ends them."""
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
