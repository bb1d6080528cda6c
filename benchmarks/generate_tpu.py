"""What a token costs on a TPU, as its compiler sees it: HBM, time, and the bandwidth's share.

    pip install 'neo-jax[plan]'
    python benchmarks/generate_tpu.py            # the table of docs/generate.md; half an hour
    python benchmarks/generate_tpu.py --only neo_2p7b:1:auto --parts

The compiled loop of decoding (`decode.advance`, greedy) for v5e-1, caches for 2048 positions,
all of them read at each token. Time is the longer of two: the compiler's schedule with its own
estimates, as `plan` reads it, and all bytes that it moves over the published bandwidth. The
roofline is that of reading every weight (of the position table a row) and every cached key
and value once. `--only` takes MODEL:BATCH:DTYPE, DTYPE being auto or int8 (weights, keys and
values).
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import re
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from neo_jax import config as config_lib
from neo_jax import sharding, state
from neo_jax.config import MeshConfig
from neo_jax.generate import cache, decode, from_keywords, network, requests
from neo_jax.planning import compiling, hlo, predict, topologies

CAPACITY, NEW = 2048, 256
# The largest batches are those that fit.
CELLS = (
    *("neo_125m:1:auto", "neo_125m:1:int8", "neo_125m:256:auto"),
    *("neo_1p3b:1:auto", "neo_1p3b:1:int8", "neo_1p3b:56:auto"),
    *("neo_2p7b:1:auto", "neo_2p7b:1:int8", "neo_2p7b:16:auto", "neo_2p7b:28:auto"),
)


def lower(name: str, batch: int, kind: str, mesh: jax.sharding.Mesh):  # type: ignore[no-untyped-def]
    """The loop, of arguments that are nowhere; bytes of weights and caches that it reads."""
    config = dataclasses.replace(config_lib.preset_model(name), param_dtype="bfloat16")
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(tree):  # type: ignore[no-untyped-def]
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                np.shape(x), getattr(x, "dtype", np.asarray(x).dtype), sharding=everywhere
            ),
            tree,
        )

    options = from_keywords({"max_new_tokens": NEW, "batch_size": batch})
    prompts = [[1] * (CAPACITY - NEW)] * batch
    group = requests.requests(prompts, options, config, None)
    ids, length = np.zeros((batch, CAPACITY), np.int32), np.zeros(batch, np.int32)
    with jax.set_mesh(mesh):
        graph, params = network.abstract(config, kind)
        caches = jax.eval_shape(
            lambda: cache.empty(
                config, batch_size=batch, capacity=CAPACITY, chunk=1, dtype=kind
            )
        )
        before = decode.State(
            texts=requests.texts(ids, length, options, config.vocab_size),
            caches=caches,
            assistant_caches=None,
            limit=length,
            done=np.zeros(batch, bool),
            not_finite=np.zeros(batch, bool),
            log_probs=None,
            passes=np.int32(0),
        )
        rules = requests.rules(group, options, config, None, batch)
        loop = jax.jit(
            lambda params, *rest: decode.advance(graph, params, *rest), donate_argnums=1
        )
        arguments = (params, before, rules, np.int32(NEW), np.zeros(batch, bool))
        lowered = loop.lower(*map(place, arguments))
    positions = params["embedder"]["positions"]
    weights = state.num_bytes(params) - state.num_bytes(positions)
    if (
        kind == "int8"
    ):  # the table is not read but for a row a text: the head is a matrix apart
        weights -= state.num_bytes(params["embedder"]["embedding"])
    return lowered, weights, state.num_bytes(caches)


def main() -> None:
    """Compiles and prints a row for each cell, as it is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=CELLS, help="cells, MODEL:BATCH:DTYPE")
    parser.add_argument("--parts", action="store_true", help="show what the time goes into")
    arguments = parser.parse_args()
    topology = topologies.parse("v5e-1", 1)
    chip = topology.generation
    mesh = sharding.make_mesh(MeshConfig(), topologies.devices(topology))
    places = predict.places(list(mesh.devices.flat))
    print(f"libtpu {topologies.libtpu_version()}, jax {jax.__version__}, {topology.key}")
    print("| | texts | weights, caches | HBM GiB | ms a step | tokens/s | of the roofline |")
    print("|---|---|---|---|---|---|---|")
    for cell in arguments.only:
        name, batch, kind = cell.split(":")
        began = time.monotonic()
        lowered, weights, caches = lower(name, int(batch), kind, mesh)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needed = compiling.out_of_memory(str(error))
            if needed is None:
                raise
            print(f"| {name} | {batch} | {kind} | {needed / 2**30:.2f}: does not fit | | | |")
            continue
        stats = compiled.memory_analysis()
        hbm = (
            stats.argument_size_in_bytes
            + stats.output_size_in_bytes
            - stats.alias_size_in_bytes
            + stats.temp_size_in_bytes
        )
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
        one = predict.predict(dataclasses.replace(program, entry=body), topology, places)
        moved = one.hbm_bytes / chip.hbm_bytes_per_second
        seconds = max(one.seconds, moved)
        roofline = (weights + caches) / chip.hbm_bytes_per_second
        print(
            f"| {name} | {batch} | {kind} | {hbm / 2**30:.2f} | {seconds * 1e3:.3f} | "
            f"{int(batch) / seconds:,.0f} | {roofline / seconds:.0%} |",
            flush=True,
        )
        if arguments.parts:
            parts = ", ".join(f"{k} {v * 1e3:.2f}" for k, v in one.parts.items())
            waits = sum(one.exposed.values()) * 1e3
            read = weights / chip.hbm_bytes_per_second * 1e3
            print(
                f"  schedule {one.seconds * 1e3:.3f} ms ({parts}; waiting {waits:.2f}), bytes "
                f"alone {moved * 1e3:.3f}, weights alone {read:.3f}; compiled in "
                f"{time.monotonic() - began:.0f} s"
            )
            show(program, body, topology, places)


def show(program, body, topology, places) -> None:  # type: ignore[no-untyped-def]
    """The operations that take longest, those of one origin and shape together."""
    timer = predict._Timer(program, topology, places)
    found = collections.defaultdict(lambda: [0, 0.0, 0.0])
    for line in body.instructions:
        if line.opcode.endswith("-done") or line.opcode in ("while", "conditional"):
            continue
        cost = timer._cost(body, line)
        if cost is None:
            continue
        origin = re.sub(r".*while/body/", "", line.op_name) or line.opcode
        entry = found[f"{cost.part:9s}{origin[-44:]:45s}{line.arrays[0].dims}"]
        entry[0] += 1
        entry[1] += cost.seconds * 1e6
        entry[2] += cost.counts.get("hbm_bytes", 0) / topology.generation.hbm_bytes_per_second
    for key, (count, spent, moved) in sorted(found.items(), key=lambda x: -x[1][1])[:16]:
        print(f"    {spent:9.1f} µs, bytes alone {moved * 1e6:9.1f}, {count:4d} × {key}")


if __name__ == "__main__":
    main()
