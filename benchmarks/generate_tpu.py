"""What a token costs on a TPU, as its compiler sees it: HBM, time, and the bandwidth's share.

    pip install 'neo-jax[plan]'
    python benchmarks/generate_tpu.py            # the table of docs/generate.md; half an hour
    python benchmarks/generate_tpu.py --only neo_2p7b:1:auto --parts

The compiled loop of decoding (`decode.advance`, greedy) for v5e-1, caches for 2048 positions,
all of them read at each token. Time is the longest of three: the compiler's schedule with its
own estimates, as `plan` reads it; all bytes that it moves over the published bandwidth; and
the roofline, reading every weight (of the position table a row) and every cached key and
value once. `--only` takes MODEL:BATCH:DTYPE, DTYPE being auto or int8 (weights, keys and
values).
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import re

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from neo_jax import config as config_lib
from neo_jax.generate import from_keywords
from neo_jax.planning import compiling, decoding, hlo, predict, topologies

CONTEXT = 2048
# The largest batches are those that fit.
CELLS = (
    *("neo_125m:1:auto", "neo_125m:1:int8", "neo_125m:8:auto", "neo_125m:384:auto"),
    *("neo_1p3b:1:auto", "neo_1p3b:1:int8", "neo_1p3b:56:auto"),
    *("neo_2p7b:1:auto", "neo_2p7b:1:int8", "neo_2p7b:16:auto", "neo_2p7b:30:auto"),
)


@dataclasses.dataclass(frozen=True)
class Step:
    """A token of each text; bytes are of one chip, seconds predicted."""

    hbm: int
    temporary: int  # beside weights and caches
    weights: float  # that are read
    caches: float
    schedule: predict.Prediction
    program: hlo.Program  # its entry is the loop's body
    topology: topologies.Topology
    places: list[predict.Place]

    @property
    def moved(self) -> float:
        """Seconds that all bytes take which the program moves."""
        return self.schedule.hbm_bytes / self.topology.generation.hbm_bytes_per_second

    @property
    def seconds(self) -> float:
        """The longest of the schedule, of moving all bytes, and of the roofline."""
        return max(self.schedule.seconds, self.moved, self.roofline)

    @property
    def roofline(self) -> float:
        """Seconds that reading weights and caches once takes."""
        read = self.weights + self.caches
        return read / self.topology.generation.hbm_bytes_per_second

    @property
    def share(self) -> float:
        """Of the roofline."""
        return self.roofline / self.seconds


def measure(name: str, batch: int, kind: str) -> Step:
    """Compiles a cell.

    Raises:
      JaxRuntimeError: it does not fit.
    """
    topology = topologies.parse("v5e-1", 1)
    tree = config_lib.default_config()
    tree.model = config_lib.preset(name)
    tree.model.param_dtype = "bfloat16"
    options = from_keywords(
        {"batch_size": batch, "weight_dtype": kind, "cache_dtype": kind, "max_new_tokens": 1}
    )
    writing = decoding.lower(config_lib.build(tree), topology, options, CONTEXT)
    compiled = writing.lowered.compile()
    stats = compiled.memory_analysis()
    program = hlo.parse(compiled.as_text() or "")
    body = max(
        (
            program.computations[instruction.attribute("body") or ""]
            for computation in program.computations.values()
            for instruction in computation.instructions
            if instruction.opcode == "while"
        ),
        key=lambda computation: len(computation.instructions),
    )
    program = dataclasses.replace(program, entry=body)
    places = predict.places(list(writing.mesh.devices.flat))
    return Step(
        hbm=stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes,
        temporary=stats.temp_size_in_bytes,
        weights=writing.weight_bytes,
        caches=writing.cache_bytes,
        schedule=predict.predict(program, topology, places),
        program=program,
        topology=topology,
        places=places,
    )


def main() -> None:
    """Compiles and prints a row for each cell, as it is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=CELLS, help="cells, MODEL:BATCH:DTYPE")
    parser.add_argument("--parts", action="store_true", help="show what the time goes into")
    arguments = parser.parse_args()
    print(f"libtpu {topologies.libtpu_version()}, jax {jax.__version__}, v5e-1")
    print("| | texts | weights, caches | HBM GiB | ms a step | tokens/s | of the roofline |")
    print("|---|---|---|---|---|---|---|")
    for cell in arguments.only:
        name, batch, kind = cell.split(":")
        try:
            step = measure(name, int(batch), kind)
        except jax.errors.JaxRuntimeError as error:
            needed = compiling.out_of_memory(str(error))
            if needed is None:
                raise
            print(f"| {name} | {batch} | {kind} | {needed / 2**30:.2f}: does not fit | | | |")
            continue
        print(
            f"| {name} | {batch} | {kind} | {step.hbm / 2**30:.2f} | {step.seconds * 1e3:.3f} "
            f"| {int(batch) / step.seconds:,.0f} | {step.share:.0%} |",
            flush=True,
        )
        if arguments.parts:
            show(step)


def show(step: Step) -> None:
    """What the time goes into: operations of one origin and shape together."""
    one = step.schedule
    parts = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in one.parts.items())
    waits = sum(one.exposed.values()) * 1e3
    print(
        f"  schedule {one.seconds * 1e3:.3f} ms ({parts}; waiting {waits:.2f}), bytes alone "
        f"{step.moved * 1e3:.3f}"
    )
    timer = predict._Timer(step.program, step.topology, step.places)
    rate = step.topology.generation.hbm_bytes_per_second
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
    for line in step.program.entry.instructions:
        if line.opcode.endswith("-done") or line.opcode in ("while", "conditional"):
            continue
        cost = timer._cost(step.program.entry, line)
        if cost is None:
            continue
        origin = re.sub(r".*while/body/", "", line.op_name) or line.opcode
        entry = found[f"{cost.part:9s}{origin[-44:]:45s}{line.arrays[0].dims}"]
        entry[0] += 1
        entry[1] += cost.seconds * 1e6
        entry[2] += cost.counts.get("hbm_bytes", 0) / rate
    for key, (count, spent, moved) in sorted(found.items(), key=lambda x: -x[1][1])[:16]:
        print(f"    {spent:9.1f} µs, bytes alone {moved * 1e6:9.1f}, {count:4d} × {key}")


if __name__ == "__main__":
    main()
