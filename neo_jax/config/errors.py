"""Mistakes in a config, and the checks that several sections share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A mistake in a config or on the command line; its message is one line."""


def require_positive(section: Any, name: str, keys: str) -> None:
    """Refuses a section of which one of the `keys`, parted by spaces, is not above 0."""
    for key in keys.split():
        if getattr(section, key) <= 0:
            raise ConfigError(f"{name}.{key}={getattr(section, key)} must be positive.")


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`, did you mean '…'?` with the nearest valid name; empty where none is near."""
    near = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""
