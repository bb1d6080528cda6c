"""What a source of text is: records in one fixed order, cut into units.

Enters: nothing; files.py and libraries.py have the sources. Leaves: the interface that they
share, and the sizes of their units.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias, runtime_checkable

from neo_jax.config import ConfigError
from neo_jax.data.readers import Span
from neo_jax.data.records import Record

Unit: TypeAlias = tuple[Span, ...]

_UNITS = 64  # about how many units a source is cut into, between these sizes:
_MIN_BYTES = 1 << 20
_MAX_BYTES = 256 << 20


def bytes_of_a_unit(num_bytes: int) -> int:
    """About how large the units of a source of this size are."""
    return min(max(num_bytes // _UNITS, _MIN_BYTES), _MAX_BYTES)


def number_of_units(num_bytes: int) -> int:
    """About how many units a source of this size has; at least one."""
    return max(min(max(num_bytes // _MIN_BYTES, 1), _UNITS), num_bytes // _MAX_BYTES)


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
