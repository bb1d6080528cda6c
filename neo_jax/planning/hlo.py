"""Reads a compiled program: the text of its HLO, with the compiler's own cost notes.

Enters: `compiled.as_text()` of a TPU program. Leaves: computations as lists of instructions
in the order in which they are scheduled, with shapes, bytes, FLOPs, trip counts and groups
of collectives. Nothing here knows a chip or a second; predict.py does.

The text is XLA's debugging form. What it says of a TPU is not documented, so everything that
is read is asked for by name and missing notes are None, never guessed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping

_BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "f8e4m3b11fnuz": 1,
    "token": 0,
    "s2": 0.25,
    "u2": 0.25,
}
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^{}]*\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array: element type, sizes, and whether it lies in HBM (and not on the chip)."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.size * _BYTES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      arrays: what it gives; several where it gives a tuple.
      operands: names of instructions of the same computation.
      text: attributes, as they stand.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    is_root: bool

    @property
    def bytes(self) -> float:
        """Of all that it gives, wherever it lies."""
        return sum(array.bytes for array in self.arrays)

    @functools.cached_property
    def backend(self) -> Mapping[str, object]:
        """The compiler's notes; empty where there are none."""
        at = self.text.find("backend_config=")
        if at < 0:
            return {}
        start = at + len("backend_config=")
        if self.text[start : start + 1] != "{":
            return {}
        try:
            return dict(json.JSONDecoder().raw_decode(self.text, start)[0])
        except json.JSONDecodeError:
            return {}

    def attribute(self, key: str) -> str | None:
        """The word after `key=`, as in `body=%region_1`; None where it is not said."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.text)
        return found and found[1]

    @property
    def cycles(self) -> float | None:
        """What the compiler expects this to take, in cycles of its clock."""
        notes = [self.backend, self.backend.get("window_config") or {}]
        for note in notes:
            if isinstance(note, dict) and note.get("estimated_cycles") is not None:
                return float(note["estimated_cycles"])
        return None

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from; empty if it is not said."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in scheduled order."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    @functools.cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        found: dict[str, list[Instruction]] = {i.name: [] for i in self.instructions}
        for instruction in self.instructions:
            for operand in set(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return {name: tuple(users) for name, users in found.items()}

    @functools.cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """By number."""
        numbered = [
            (int(re.match(r"\d+", i.text)[0]), i)  # type: ignore[index]
            for i in self.instructions
            if i.opcode == "parameter"
        ]
        return tuple(i for _, i in sorted(numbered, key=lambda pair: pair[0]))


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations by name, and the entry's."""

    computations: Mapping[str, Computation]
    entry: Computation

    def trip_count(self, loop: Instruction) -> int | None:
        """How often a while loop runs: as the compiler notes it, or as its condition says.

        A loop of JAX's `scan` counts from 0 by 1 while its counter is less than a constant.
        None where the condition is another.
        """
        note = loop.backend.get("known_trip_count")
        if isinstance(note, dict) and "n" in note:
            return int(note["n"])
        condition = self.computations[loop.attribute("condition") or ""]
        test = condition.root
        bound = condition.by_name.get(test.operands[-1]) if test.operands else None
        if test.opcode != "compare" or "direction=LT" not in test.text or bound is None:
            return None
        number = re.match(r"(\d+),", bound.text)
        return int(number[1]) if bound.opcode == "constant" and number else None


# -------------------------------------------------------------------------------- reading


def parse(text: str) -> Program:
    """Reads a module.

    Raises:
      ValueError: there is no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = name = ""
    lines: list[str] = []
    for line in text.splitlines():
        if not name:
            found = re.match(r"(ENTRY\s+)?%?([\w.\-]+) \(.*\{$", line.rstrip())
            if found:
                name, lines = found[2], []
                entry = name if found[1] else entry
        elif line.rstrip() == "}":
            computations[name] = Computation(name, tuple(map(_instruction, lines)))
            name = ""
        elif re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line):
            lines.append(line.strip())
        elif lines:  # the notes of a kernel go on for several lines
            lines[-1] += line.strip()
    if entry not in computations:
        raise ValueError("the text holds no entry computation of an HLO module.")
    return Program(computations, computations[entry])


def _instruction(line: str) -> Instruction:
    is_root = line.startswith("ROOT ")
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    if rest.startswith("("):
        end = _closing(rest, 0) + 1
    else:
        end = rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _ = rest.split("(", 1)
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : close]
    attributes = rest[close + 1 :].lstrip(", ")
    operands: tuple[str, ...] = ()
    if opcode in ("parameter", "constant"):
        attributes = f"{inside}, {attributes}"
    else:
        operands = tuple(_operand_names(inside))
    return Instruction(
        name.lstrip("%"), opcode.strip(), _arrays(shape), operands, attributes, is_root
    )


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        if text[at] == "(":
            depth += 1
        elif text[at] == ")":
            depth -= 1
            if not depth:
                return at
    raise ValueError(f"a parenthesis of {text[:80]!r} is never closed.")


def _operand_names(inside: str) -> Iterator[str]:
    """`bf16[8,2]{1,0} %a, (f32[], s32[]) %b` → a, b; also without shapes or without %."""
    depth, start = 0, 0
    parts = []
    for at, letter in enumerate(inside):
        if letter in "({[":
            depth += 1
        elif letter in ")}]":
            depth -= 1
        elif letter == "," and not depth:
            parts.append(inside[start:at])
            start = at + 1
    parts.append(inside[start:])
    for part in parts:
        words = re.sub(r"/\*.*?\*/", "", part).split()
        if words:
            yield words[-1].lstrip("%")


def _arrays(shape: str) -> tuple[Array, ...]:
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        # S(n) names a memory space: 0 is HBM, and is not written.
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Array(dtype, sizes, space is None or space[1] == "0"))
    return tuple(found)
