"""From a compiled TPU program to the seconds that one run of it takes.

Enters: a `Program` (hlo.py), a topology, and where each device lies. Leaves: a `Prediction`:
seconds with and without overlap, and where they go. No TPU is asked; what is assumed is here.

How an operation is timed:
- A fusion takes the compiler's own `estimated_cycles`, over the clock.
- Nothing is faster than its matrix products at peak, nor than the bytes that it must move
  between HBM and the chip at the published bandwidth (counting.py counts both, leaving out
  whatever the program might spare itself).
- A Pallas kernel has no cycles. Its FLOPs are those of the blocks that it visits (block sizes
  and the width of its grid stand in the program), at `KERNEL_EFFICIENCY` of peak; what it
  moves comes at `KERNEL_BANDWIDTH` of HBM's.
- A collective takes the bytes that a device must send or receive, over the links that its
  group can use, plus a latency a hop. Of several slices, the part between slices crosses the
  data centre's network.
- A while loop takes its body times the compiler's trip count, a conditional its longest
  branch.

What runs at the same time: the schedule is followed instruction by instruction. A collective
(or a copy between memories) begins at its start, waits for others of its kind before it, and
is waited for at its done; only operations that the schedule places in between hide it. What is
not asynchronous in the program is not hidden. `seconds_without_overlap` hides nothing.

Limits: operations that the compiler gives no cycles and that move nothing (scalar work, waits
of the host) are free; an update in place moves its own bytes, not the tiles that it rewrites;
HBM traffic of prefetches does not slow the operation that they run beside; chips do not wait
for a slower one; input is there in time. A bare 8192³ product takes 88 % of peak on v5e and
70 % on v6e by the compiler's cycles (docs/plan.md), which bounds what can be predicted for a
step.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from neo_jax.planning import counting
from neo_jax.planning.hlo import Computation, Instruction, Program
from neo_jax.planning.topologies import Topology

# Splash attention, forward and backward together: 1,084 ms a step on v6e for 36 layers × 3
# sequences of 8192 × 32 heads × 128, two forward kernels (one recomputed) and one fused
# backward, blocks of 2048 × 1024. They visit 62.5 % of the score blocks: 3.34e14 FLOPs, 33.6 %
# of 918 TFLOP/s. Source: vlasenkoalexey/tpu_performance_autoresearch_wiki@5986ede,
# 2026-06-02-v035-maxtext-ce-s8k-bs3.md. No such measurement of other generations was found;
# where matrix units are slower beside the vector unit, the share can only be higher.
KERNEL_EFFICIENCY = 0.336

# Of a kernel that waits for HBM: "up to 86 % memory bandwidth utilization in decode", Llama 3
# 8B on tpu7x, weights included, which XLA reads. Source: Ragged Paged Attention, arXiv
# 2604.15464.
KERNEL_BANDWIDTH = 0.86

HOP_SECONDS = 1e-6  # latency of one ICI hop. Source: "How To Scale Your Model", sharding
DCN_SECONDS = 1e-4  # latency between slices; two hosts and a switch


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One run of a program on one device.

    Attributes:
      seconds: with the overlap that the schedule allows.
      seconds_without_overlap: one operation after the other.
      parts: seconds by kind, without overlap: `products` (fusions with a matrix product),
        `other` (all other fusions), `kernels`, `copies` (between memories), `ici`, `dcn`.
      exposed: seconds of `copies`, `ici` and `dcn` that nothing hides; with products, other
        and kernels they make up `seconds`.
      flops: of matrix products and kernels.
      ici_bytes, dcn_bytes: sent or received, whichever is more, by a device.
      hbm_bytes: moved by fusions, kernels and copies.
    """

    seconds: float
    seconds_without_overlap: float
    parts: Mapping[str, float]
    exposed: Mapping[str, float]
    flops: float
    ici_bytes: float
    dcn_bytes: float
    hbm_bytes: float


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a device lies: its slice, and its chip's coordinates in the torus."""

    slice_index: int
    coords: tuple[int, ...]


def places(devices: Sequence[Any]) -> list[Place]:
    """Of devices as JAX describes them."""
    return [Place(getattr(d, "slice_index", None) or 0, tuple(d.coords)) for d in devices]


def predict(program: Program, topology: Topology, places: Sequence[Place]) -> Prediction:
    """Times a program.

    Args:
      program: of one device; all run the same.
      topology: whose chips run it.
      places: of the devices, in the program's order of them.

    Raises:
      ValueError: a loop whose trip count the compiler does not know.
    """
    return _prediction(_Timer(program, topology, places).run(program.entry))


def one_more_trip(program: Program, topology: Topology, places: Sequence[Place]) -> Prediction:
    """Times one pass through the loop of which only the data know when it ends.

    Args as `predict`; the program has one such loop.
    """
    timer = _Timer(program, topology, places)
    bodies = [
        program.computations[instruction.attribute("body") or ""]
        for instruction in program.entry.instructions
        if instruction.opcode == "while" and program.trip_count(instruction) is None
    ]
    if len(bodies) != 1:
        raise ValueError(
            f"{len(bodies)} loops of the program have no known trip count, not 1."
        )
    return _prediction(timer.run(bodies[0]))


def _prediction(total: _Totals) -> Prediction:
    return Prediction(
        seconds=total.seconds,
        seconds_without_overlap=sum(total.parts.values()),
        parts=dict(total.parts),
        exposed=dict(total.exposed),
        flops=total.counts["flops"],
        ici_bytes=total.counts["ici_bytes"],
        dcn_bytes=total.counts["dcn_bytes"],
        hbm_bytes=total.counts["hbm_bytes"],
    )


_Sums = collections.defaultdict[str, float]


@dataclasses.dataclass
class _Totals:
    """Of a computation, all its loops included."""

    seconds: float = 0.0
    parts: _Sums = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    exposed: _Sums = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    counts: _Sums = dataclasses.field(default_factory=lambda: collections.defaultdict(float))

    def add(self, other: _Totals, times: int = 1) -> None:
        self.seconds += other.seconds * times
        for own, theirs in (
            (self.parts, other.parts),
            (self.exposed, other.exposed),
            (self.counts, other.counts),
        ):
            for key, value in theirs.items():
                own[key] += value * times


@dataclasses.dataclass(frozen=True)
class _Cost:
    """Of one operation: where it runs, and how long."""

    part: str  # as in `Prediction.parts`
    seconds: float
    counts: Mapping[str, float]


# What runs beside the cores, each one thing at a time.
_BESIDE = ("copies", "ici", "dcn")


class _Timer:
    def __init__(self, program: Program, topology: Topology, places: Sequence[Place]):
        self._program, self._topology, self._places = program, topology, places
        self._chip = topology.generation
        self._done: dict[str, _Totals] = {}

    def run(self, computation: Computation) -> _Totals:
        """Follows the schedule of a computation."""
        if computation.name not in self._done:
            self._done[computation.name] = self._follow(computation)
        return self._done[computation.name]

    def _follow(self, computation: Computation) -> _Totals:
        total = _Totals()
        free = dict.fromkeys(_BESIDE, 0.0)  # when each is done with what it was given
        ends: dict[str, tuple[str, float]] = {}  # what is under way: its part, its end

        def wait(part: str, until: float) -> None:
            if until > total.seconds:
                total.exposed[part] += until - total.seconds
                total.seconds = until

        for instruction in computation.instructions:
            inner = self._inner(instruction)
            if inner is not None:
                total.add(*inner)
                free = {part: max(end, 0.0) for part, end in free.items()}
                continue
            started = self._started_by(computation, instruction)
            if started is not None:
                part, end = ends.pop(started, ("", 0.0))
                wait(part, end)
                continue
            cost = self._cost(computation, instruction)
            if cost is None:
                continue
            total.parts[cost.part] += cost.seconds
            for key, value in cost.counts.items():
                total.counts[key] += value
            if cost.part not in _BESIDE:
                total.seconds += cost.seconds
                continue
            end = max(free[cost.part], total.seconds) + cost.seconds
            free[cost.part] = end
            chain = counting.async_chain(self._program, instruction)
            if chain is not None:
                ends[f"chain {chain.number}"] = (cost.part, end)
            elif self._is_start(computation, instruction):
                ends[instruction.name] = (cost.part, end)
            else:
                wait(cost.part, end)
        # What is still under way at the end of a loop's body is waited for there.
        for part, end in sorted(ends.values(), key=lambda pair: pair[1]):
            wait(part, end)
        return total

    # ------------------------------------------------------------------- control flow

    def _inner(self, instruction: Instruction) -> tuple[_Totals, int] | None:
        """What a loop, a conditional or a call runs, and how often; None for the rest."""
        if instruction.opcode == "while":
            body = self._program.computations[instruction.attribute("body") or ""]
            trips = self._program.trip_count(instruction)
            if trips is None:
                raise ValueError(f"loop {instruction.name} has no known trip count.")
            return self.run(body), trips
        if instruction.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
            names = (
                [name.strip().lstrip("%") for name in branches[1].split(",")]
                if branches
                else [
                    instruction.attribute("true_computation") or "",
                    instruction.attribute("false_computation") or "",
                ]
            )
            longest = max(
                (self.run(self._program.computations[name]) for name in names),
                key=lambda total: total.seconds,
            )
            return longest, 1
        if instruction.opcode == "call":
            inner = counting.called(self._program, instruction)
            return None if inner is None else (self.run(inner), 1)
        return None

    def _is_start(self, computation: Computation, instruction: Instruction) -> bool:
        """Whether something later in the computation waits for this."""
        return any(
            self._started_by(computation, user) == instruction.name
            for user in computation.users[instruction.name]
        )

    def _started_by(self, computation: Computation, instruction: Instruction) -> str | None:
        """The start that this is the done of; None if it is no done."""
        chain = counting.async_chain(self._program, instruction)
        if chain is not None and chain.role == "done":
            return f"chain {chain.number}"
        if not instruction.opcode.endswith("-done"):
            return None
        name = instruction.operands[0]
        while computation.by_name[name].opcode in ("get-tuple-element", "async-update"):
            name = computation.by_name[name].operands[0]
        return name

    # -------------------------------------------------------------------- operations

    def _cost(self, computation: Computation, instruction: Instruction) -> _Cost | None:
        """What one operation costs; None for what is free."""
        chain = counting.async_chain(self._program, instruction)
        carries = chain is not None and chain.role == "carrier"
        kind = None if carries else self._collective(instruction)
        if kind is not None:
            return self._collective_cost(computation, kind, instruction)
        if instruction.opcode == "custom-call":
            return self._kernel_cost(computation, instruction)
        moved = counting.hbm_bytes(self._program, computation, instruction)
        if instruction.opcode in ("copy-start", "copy", "async-start", "slice-start"):
            part = "copies" if instruction.opcode.endswith("-start") else "other"
            return _Cost(part, moved / self._hbm, {"hbm_bytes": moved})
        flops = counting.flops(self._program, computation, instruction)
        seconds = max(
            (instruction.cycles or 0.0) / self._chip.clock,
            flops / self._peak,
            moved / self._hbm,
        )
        counts = {"flops": flops, "hbm_bytes": moved}
        return _Cost("products" if flops else "other", seconds, counts) if seconds else None

    @property
    def _peak(self) -> float:
        return self._chip.peak_flops / self._chip.devices

    @property
    def _hbm(self) -> float:
        return self._chip.hbm_bytes_per_second / self._chip.devices

    def _kernel_cost(self, computation: Computation, instruction: Instruction) -> _Cost | None:
        """Of a Pallas kernel; other custom calls only move what they are given."""
        moved = counting.hbm_bytes(self._program, computation, instruction)
        flops = counting.attention_flops(computation, instruction)
        seconds = max(
            flops / (self._peak * KERNEL_EFFICIENCY), moved / (self._hbm * KERNEL_BANDWIDTH)
        )
        if "tpu_custom_call" not in instruction.text or not seconds:
            return None
        return _Cost("kernels", seconds, {"flops": flops, "hbm_bytes": moved})

    def _collective(self, instruction: Instruction) -> tuple[str, Instruction] | None:
        """The collective that an operation starts or is, and the line that describes it."""
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in counting.COLLECTIVES:
            return opcode, instruction
        inner = counting.called(self._program, instruction)
        if inner is None or instruction.opcode == "call":
            return None
        for line in inner.instructions:
            found = self._collective(line)
            if found is not None:
                # An all-reduce of which each device keeps its slice moves half as much.
                is_scatter = inner.root.opcode == "dynamic-slice" and found[0] == "all-reduce"
                return ("reduce-scatter", found[1]) if is_scatter else found
        return None

    def _collective_cost(
        self, computation: Computation, kind: tuple[str, Instruction], at: Instruction
    ) -> _Cost:
        opcode, line = kind
        size = counting.exchanged_bytes(self._program, computation, line, at)
        groups = counting.groups(line) or [list(range(len(self._places)))]
        group = [self._places[device] for device in max(groups, key=len)]
        slices = len({place.slice_index for place in group})
        inside = len(group) / slices
        rounds = 2 if opcode == "all-reduce" else 1
        if opcode == "collective-permute":
            far = any(
                self._places[a].slice_index != self._places[b].slice_index for a, b in groups
            )
            if not far:
                pairs = [(self._places[a], self._places[b]) for a, b in groups]
                hops, busiest = self._permutation(pairs)
                seconds = size * busiest / self._chip.link_bytes_per_second
                return _Cost("ici", seconds + hops * HOP_SECONDS, {"ici_bytes": size})
            ici, dcn = 0.0, size
        else:
            spread = inside / 4 if opcode == "all-to-all" else 1.0
            ici = rounds * size * (inside - 1) / inside * max(spread, 1.0)
            dcn = rounds * size / inside * (slices - 1) / slices
        hops, links = self._route(group)
        per_device = self._chip.link_bytes_per_second / self._chip.devices
        counts = {"ici_bytes": ici, "dcn_bytes": dcn}
        if dcn:
            share = (self._chip.dcn_bytes_per_second or math.inf) / self._chip.devices
            seconds = dcn / share + DCN_SECONDS
            return _Cost("dcn", max(seconds, ici / (links * per_device)), counts)
        return _Cost("ici", ici / (links * per_device) + hops * HOP_SECONDS, counts)

    def _route(self, group: Sequence[Place]) -> tuple[int, int]:
        """Hops between the farthest chips of a group; links out of each that it uses."""
        hops = links = 0
        for dim, size in enumerate(self._topology.grid):
            used = {place.coords[dim] for place in group}
            if len(used) < 2:
                continue
            ring = len(used) == size and self._closes(dim)
            hops += len(used) // 2 if ring else max(used) - min(used)
            links += 2 if ring else 1
        return hops, max(links, 1)

    def _permutation(self, pairs: Sequence[tuple[Place, Place]]) -> tuple[int, int]:
        """The most hops that a message of these makes, and the most messages on one link.

        Each goes the shortest way, along one dimension after the other.
        """
        most, loads = 0, collections.Counter[tuple[object, ...]]()
        for source, target in pairs:
            at, hops = list(source.coords), 0
            for dim, size in enumerate(self._topology.grid):
                way = target.coords[dim] - at[dim]
                if self._closes(dim) and abs(way) > size // 2:
                    way -= int(math.copysign(size, way))
                for _ in range(abs(way)):
                    step = 1 if way > 0 else -1
                    loads[(*at, dim, step)] += 1
                    at[dim] = (at[dim] + step) % size
                hops += abs(way)
            most = max(most, hops)
        return most, max(loads.values(), default=0)

    def _closes(self, dim: int) -> bool:
        """Whether the ends of a dimension of the torus are neighbours."""
        return self._topology.grid[dim] % self._chip.wraps_at == 0
