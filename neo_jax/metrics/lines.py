"""`metrics.jsonl`: one line of numbers after another.

Enters: numbers, or a workdir. Leaves: text that JSON allows, whole files, and the lines again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` in order; none if there is no file.

    A line that a killed run left half-written is passed over.
    """
    path = metrics_file(pathlib.Path(workdir))
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def metrics_file(workdir: pathlib.Path) -> pathlib.Path:
    """Where the lines are."""
    return workdir / "metrics.jsonl"


def json_line(line: Mapping[str, Any]) -> str:
    """One line of the file."""
    return json.dumps(line, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """What JSON can hold: Python scalars, None for NaN and infinity, nested."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, str):
        return value
    value = np.asarray(value).item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace(path: pathlib.Path, data: bytes) -> None:
    """Writes a whole file aside and renames it: readers see the old or the new."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_bytes(data)
    os.replace(aside, path)
