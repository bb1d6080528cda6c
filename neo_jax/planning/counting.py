"""Counts what an instruction of a compiled program does: FLOPs, bytes of HBM, groups.

Enters: instructions as hlo.py reads them. Leaves: the least work that they can be done with.
predict.py divides it by what a chip can do; that quotient is a floor, so nothing may be
counted here that a program could spare itself.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from neo_jax.planning.hlo import Computation, Instruction, Program

# Reads that touch only what they give.
_SLICES = ("dynamic-slice", "slice", "gather")
# Names for the same bytes.
_ALIASES = ("bitcast", "get-tuple-element", "tuple", "parameter", "constant", "reshape")


# ---------------------------------------------------------------------------------- FLOPs


def flops(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Of the matrix products in an instruction, and in what it calls."""
    inner = called(program, instruction)
    if inner is not None:
        return sum(flops(program, inner, i) for i in inner.instructions)
    return product_flops(computation, instruction)


def called(program: Program, instruction: Instruction) -> Computation | None:
    """The computation that a fusion, a call or an async start runs."""
    if instruction.opcode in ("fusion", "call", "async-start"):
        name = instruction.attribute("calls") or instruction.attribute("to_apply")
        return program.computations.get(name or "")
    return None


def product_flops(computation: Computation, instruction: Instruction) -> float:
    """Of one dot or convolution: two for each pair that is multiplied and added."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    operands = [computation.by_name[name].arrays[0].dims for name in instruction.operands[:2]]
    outputs = instruction.arrays[0].size
    if instruction.opcode == "dot":
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
        dims = [int(d) for d in found[1].split(",")] if found and found[1] else []
        return 2.0 * outputs * math.prod(operands[0][d] for d in dims)
    return 2.0 * _convolution_pairs(instruction, operands[0], operands[1])


def _convolution_pairs(
    instruction: Instruction, lhs: Sequence[int], rhs: Sequence[int]
) -> float:
    """Multiplications of a convolution, without those with padding or dilation's holes.

    On TPUs every product is a convolution; batch dimensions become spatial ones, whose
    windows are mostly padding.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    if labels is None:
        raise ValueError(f"convolution {instruction.name} has no dim_labels.")
    left, right, out = labels[1], labels[2], labels[3]
    # The kernel's input features are those of one feature group already.
    pairs = float(lhs[left.index("b")]) * rhs[right.index("o")] * rhs[right.index("i")]
    batch_groups = re.search(r"batch_group_count=(\d+)", instruction.text)
    if batch_groups:
        pairs /= int(batch_groups[1])
    window = re.search(r"window=\{([^}]*)\}", instruction.text)
    spec = dict(re.findall(r"(\w+)=([\w\-]+)", window[1])) if window else {}
    for dim in sorted(set(left) - {"b", "f"}):
        at = int(dim)
        pairs *= _valid_positions(
            spec,
            at,
            base=lhs[left.index(dim)],
            kernel=rhs[right.index(dim)],
            outputs=instruction.arrays[0].dims[out.index(dim)],
        )
    return pairs


def _valid_positions(
    spec: dict[str, str], at: int, *, base: int, kernel: int, outputs: int
) -> int:
    """Pairs of output and kernel positions of one spatial dimension that meet an input."""

    def part(key: str, default: int) -> int:
        parts = spec[key].split("x") if key in spec else []
        return int(parts[at]) if at < len(parts) else default

    stride, dilation = part("stride", 1), part("rhs_dilate", 1)
    holes = part("lhs_dilate", 1)
    pads = spec["pad"].split("x") if "pad" in spec else []
    low = int(re.match(r"-?\d+", pads[at])[0]) if at < len(pads) else 0  # type: ignore[index]
    position = (
        np.arange(outputs)[:, None] * stride + np.arange(kernel)[None, :] * dilation - low
    )
    meets = (position >= 0) & (position <= (base - 1) * holes) & (position % holes == 0)
    return int(meets.sum())


# ---------------------------------------------------------------------------------- bytes


def hbm_bytes(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Bytes that must cross between HBM and the chip; arrays kept on the chip cost none."""
    if instruction.opcode in _ALIASES:
        return 0.0
    if instruction.opcode in ("copy-start", "slice-start"):
        # Its tuple holds what it was given, what it makes, and a flag.
        given, made = instruction.arrays[:2]
        return made.bytes * (given.in_hbm + made.in_hbm)
    said = re.search(r'"bytes_accessed":"(\d+)"', instruction.text)
    if said and "output_to_operand_aliasing" in instruction.text:
        # A kernel that writes into what it reads: how much, it alone can say.
        return float(said[1])
    inner = called(program, instruction)
    written = sum(array.bytes for array in instruction.arrays if array.in_hbm)
    read = 0.0
    for number, name in enumerate(instruction.operands):
        operand = computation.by_name.get(name)
        if operand is None or not operand.arrays or not operand.arrays[0].in_hbm:
            continue
        whole = operand.bytes
        if inner is not None and number < len(inner.parameters):
            whole = min(whole, _bytes_read(program, inner, inner.parameters[number]))
        elif instruction.opcode in _SLICES and number == 0:
            whole = min(whole, written)
        read += whole
    if inner is not None:
        written = min(written, _bytes_written(inner))
    elif instruction.opcode == "dynamic-update-slice":
        update = computation.by_name[instruction.operands[1]].bytes
        read, written = min(read, update), min(written, update)
    return read + written


def _bytes_read(program: Program, inner: Computation, parameter: Instruction) -> float:
    """What a fusion reads of one parameter, also by fusions inside it."""
    total = 0.0
    for user in inner.users[parameter.name]:
        deeper = called(program, user)
        if user.opcode in _SLICES and user.operands[0] == parameter.name:
            total += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
            continue  # written in place
        elif user.opcode == "bitcast":
            total += _bytes_read(program, inner, user)
        elif deeper is not None and len(deeper.parameters) == len(user.operands):
            total += sum(
                _bytes_read(program, deeper, given)
                for name, given in zip(user.operands, deeper.parameters, strict=True)
                if name == parameter.name
            )
        else:
            return parameter.bytes
    return min(total, parameter.bytes)


def _bytes_written(inner: Computation) -> float:
    """What a fusion writes: of an update in place, the update."""

    def of(name: str) -> float:
        made = inner.by_name[name]
        if made.opcode == "bitcast":
            return of(made.operands[0])
        if made.opcode == "tuple":
            return sum(map(of, made.operands))
        if made.opcode == "dynamic-update-slice":
            return inner.by_name[made.operands[1]].bytes
        return sum(array.bytes for array in made.arrays if array.in_hbm)

    return of(inner.root.name)


# ------------------------------------------------------------------------------ collectives

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)


def groups(instruction: Instruction) -> list[list[int]]:
    """Groups of devices that exchange something, by their place in the program.

    Empty where all of them do, and pairs for a permutation.
    """
    text = instruction.text
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
    if pairs:
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)", pairs[0])]
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", text)
    if listed:
        return [
            [int(d) for d in group.split(",")]
            for group in re.findall(r"\{([\d,]+)\}", listed[1])
        ]
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", text)
    if mesh:
        return _mesh_groups(mesh[1], mesh[2], mesh[3])
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape = [int(d) for d in iota[1].split(",")]
        reshape = [int(d) for d in iota[2].split(",")]
        ids = np.arange(math.prod(reshape)).reshape(reshape)
        if iota[3]:
            ids = ids.transpose([int(d) for d in iota[3].split(",")])
        return [[int(d) for d in row] for row in ids.reshape(shape)]
    return []


@dataclasses.dataclass(frozen=True)
class Chain:
    """A collective that the compiler runs beside fused products.

    Attributes:
      number: the same for its start, the products that carry it on, and its done.
      role: "start", "carrier" or "done".
    """

    number: str
    role: str


def _mesh_groups(sizes: str, devices: str, axes: str) -> list[list[int]]:
    """Of `'axis_0'=2,'axis_1'=4` and `'axis_1'`: devices that differ along that axis only."""
    names = [name for name, _ in re.findall(r"'([^']+)'=(\d+)", sizes)]
    shape = [int(size) for _, size in re.findall(r"'([^']+)'=(\d+)", sizes)]
    ids = np.arange(math.prod(shape))
    order = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?", devices)
    if order:
        ids = ids.reshape([int(d) for d in order[1].split(",")])
        ids = ids.transpose([int(d) for d in order[2].split(",")]) if order[2] else ids
    ids = ids.reshape(shape)
    along = [names.index(name) for name in re.findall(r"'([^']+)'", axes)]
    across = [dim for dim in range(len(shape)) if dim not in along]
    count = math.prod(shape[dim] for dim in along)
    return [[int(d) for d in row] for row in ids.transpose(across + along).reshape(-1, count)]


def async_chain(program: Program, instruction: Instruction) -> Chain | None:
    """Which part of such a collective a fusion is; None for all else."""
    if instruction.opcode != "fusion":
        return None
    inner = called(program, instruction)
    for line in inner.instructions if inner is not None else ():
        number = re.search(r'chain_id="(\d+)"', line.text)
        if line.opcode in COLLECTIVES and number:
            calls = [i.text for i in inner.instructions if i.opcode == "custom-call"]  # type: ignore[union-attr]
            for role in ("Start", "Done"):
                if any(f"AsyncCollective{role}" in text for text in calls):
                    return Chain(number[1], role.lower())
            return Chain(number[1], "carrier")
    return None


def exchanged_bytes(
    program: Program, computation: Computation, line: Instruction, instruction: Instruction
) -> float:
    """Of the whole array that a group gathers, reduces or passes on, on one device.

    Args:
      computation: of the instruction.
      line: the collective itself.
      instruction: the collective, or what contains it.
    """
    where = computation
    while instruction is not line:
        where = called(program, instruction)  # type: ignore[assignment]
        instruction = next(
            i for i in where.instructions if i is line or _holds(program, i, line)
        )
    given = sum(where.by_name[name].bytes for name in line.operands)
    if line.opcode.startswith("collective-permute"):
        return given
    made = line.bytes
    if line.opcode.endswith("-start") and len(line.arrays) > 1:
        made -= given  # the tuple of a start holds what it was given, too
    return max(given, made)


def _holds(program: Program, instruction: Instruction, line: Instruction) -> bool:
    inner = called(program, instruction)
    return inner is not None and any(
        i is line or _holds(program, i, line) for i in inner.instructions
    )


# --------------------------------------------------------------------------------- kernels

# Matrix products for each block of scores, by what a splash kernel makes: q·k and p·v
# forward; q·k, dO·v and one for each gradient backward.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def attention_flops(computation: Computation, instruction: Instruction) -> float:
    """Of the blocks of scores that one of JAX's splash attention kernels computes.

    Its text holds the sizes of its blocks, and among its operands the table of its grid:
    [heads, rows, steps of each row]. A row has no more steps than the mask lets it, and a
    causal mask empties all blocks above the diagonal. A head smaller than the 128 lanes of a
    matrix unit takes as long as one that fills them, and is counted so.

    Returns:
      0 for any other kernel.
    """
    kind = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", instruction.text)
    if kind is None:
        return 0.0
    phase = kind[1]
    suffix = {"fwd": "", "dq": "_dq", "dkv": "_dkv"}[phase]
    block_q, block_kv = (
        _number(instruction.text, f"{key}{suffix}") for key in ("block_q", "block_kv")
    )
    operands = [
        computation.by_name[n].arrays[0]
        for n in instruction.operands
        if n in computation.by_name
    ]
    wide = [a.dims for a in operands if a.dtype in ("bf16", "f32") and len(a.dims) >= 3]
    query, key = wide[0], wide[1]
    length, keys, head_dim = query[-2], key[-2], -(-query[-1] // 128) * 128
    rows, columns = length // block_q, keys // block_kv
    visible = sum(
        min(columns, -(-((row + 1) * block_q + keys - length) // block_kv))
        for row in range(rows)
    )
    tables = [a.dims for a in operands if a.dtype.startswith("s") and len(a.dims) == 3]
    steps = math.prod(tables[0][1:]) if tables else rows * columns
    # A fused backward kernel gives dq too, a part for each block of keys.
    is_fused = any(len(array.dims) > len(query) for array in instruction.arrays)
    products = _PRODUCTS[phase] + is_fused
    scores = min(steps, visible) * block_q * block_kv
    return 2.0 * products * scores * head_dim * math.prod(query[:-2])


def _number(text: str, key: str) -> int:
    found = re.search(rf"\b{key}\W+(\d+)", text)
    if found is None:
        raise ValueError(f"a splash kernel's text does not say {key}.")
    return int(found[1])
