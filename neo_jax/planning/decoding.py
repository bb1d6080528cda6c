"""Compiles the decoding of text for TPUs that are not here, and reports what it would need.

Enters: a model's config, a topology, `Options` of writing and a length. Leaves: a
`DecodeReport`. What is compiled is `generate.decode.advance`, the loop that `neo-jax generate`
runs, of parameters and caches that are shapes with shardings. A pass of the network, one token
of each text, is the loop's body: the difference that one more trip makes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from neo_jax import sharding, state
from neo_jax.config import Config, ConfigError
from neo_jax.generate import cache, decode, network, requests
from neo_jax.generate.options import Options
from neo_jax.planning import compiling, hlo, predict, topologies
from neo_jax.planning.compiling import GIB
from neo_jax.planning.topologies import Topology
from neo_jax.state import Params

# Besides what a training step is compiled from.
COMPILED_FROM = ("generate",)


@dataclasses.dataclass(frozen=True)
class DecodeReport:
    """What is known of writing on a topology; sizes are of one device.

    Attributes:
      over_by_gib: HBM that is lacking; 0 where it fits.
      weights_gib, cache_gib: what each pass must read at least: the device's part of the
        parameters' products, and of the caches at their full length.
      roofline_…: a pass that takes no longer than reading both at the published bandwidth.
      predicted_…: None where it does not fit. Rates are of all texts together.
      seconds_by_part, exposed_seconds: of a pass, as `predict.Prediction`.
    """

    topology: str
    chips: int
    devices: int
    fits: bool
    hbm_gib: float
    hbm_limit_gib: float
    over_by_gib: float
    weights_gib: float
    cache_gib: float
    roofline_seconds_per_pass: float
    roofline_tokens_per_second: float
    predicted_seconds_per_pass: float | None
    predicted_tokens_per_second: float | None
    predicted_tokens_per_second_per_chip: float | None
    predicted_share_of_roofline: float | None
    seconds_by_part: Mapping[str, float]
    exposed_seconds: Mapping[str, float]
    mesh: Mapping[str, int]
    batch_size: int
    context: int
    weight_dtype: str
    cache_dtype: str
    compile_seconds: float
    libtpu: str
    jax: str


def compile_decode(
    config: Config, topology: Topology, options: Options, context: int
) -> DecodeReport:
    """Compiles, reads and times the writing of `options.batch_size` texts.

    Args:
      config: its model and its mesh.
      topology: where it is to run.
      options: how texts are written.
      context: tokens of each text, prompt and continuation together; the caches have a place
        for each.

    Raises:
      ConfigError: there is no compiler, the texts do not divide over the topology, or are
        longer than the model's positions.
    """
    began = time.monotonic()
    writing = lower(config, topology, options, context)
    one_pass = None
    compiled, needed = compiling.compile_or_count(writing.lowered, {})
    if compiled is not None:
        program = hlo.parse(compiled.as_text() or "")
        places = predict.places(list(writing.mesh.devices.flat))
        one_pass = predict.one_more_trip(program, topology, places)
    chip, rows = topology.generation, options.batch_size
    weights, held, mesh = writing.weight_bytes, writing.cache_bytes, writing.mesh
    bound = (weights + held) / (chip.hbm_bytes_per_second / chip.devices)
    seconds = None
    if one_pass is not None:
        # Caches and weights come by prefetches, which the schedule alone lets overlap, and not
        # all of which it marks: reading both once is never undercut.
        moved = one_pass.hbm_bytes / (chip.hbm_bytes_per_second / chip.devices)
        seconds = max(one_pass.seconds, moved, bound)
    limit = chip.hbm_limit_gib * GIB
    return DecodeReport(
        topology=topology.key,
        chips=topology.chips,
        devices=topology.devices,
        fits=one_pass is not None,
        hbm_gib=needed / GIB,
        hbm_limit_gib=limit / GIB,
        over_by_gib=0.0 if one_pass else (needed - limit) / GIB,
        weights_gib=weights / GIB,
        cache_gib=held / GIB,
        roofline_seconds_per_pass=bound,
        roofline_tokens_per_second=rows / bound,
        predicted_seconds_per_pass=seconds,
        predicted_tokens_per_second=rows / seconds if seconds else None,
        predicted_tokens_per_second_per_chip=rows / seconds / topology.chips
        if seconds
        else None,
        predicted_share_of_roofline=bound / seconds if seconds else None,
        seconds_by_part=dict(one_pass.parts) if one_pass else {},
        exposed_seconds=dict(one_pass.exposed) if one_pass else {},
        mesh=dict(mesh.shape),
        batch_size=rows,
        context=context,
        weight_dtype=options.weight_dtype,
        cache_dtype=options.cache_dtype,
        compile_seconds=time.monotonic() - began,
        libtpu=topologies.libtpu_version(),
        jax=jax.__version__,
    )


class Writing(NamedTuple):
    """The loop that writes, traced.

    Attributes:
      weight_bytes, cache_bytes: of one device, what each pass must read at least.
    """

    lowered: jax.stages.Lowered
    weight_bytes: float
    cache_bytes: float
    mesh: Mesh


def lower(config: Config, topology: Topology, options: Options, context: int) -> Writing:
    """The loop of arguments that are nowhere; arguments and errors as `compile_decode`."""
    mesh = mesh_of(config, topology, options, context)
    config = compiling.on_slices(config, topology)
    with jax.set_mesh(mesh):
        graph, params = abstract_decoder(config, mesh, options.weight_dtype)
        caches = _abstract_caches(config, mesh, options, context)
        writing, rules = _start(config, mesh, options, caches, context)
        run = jax.jit(functools.partial(decode.advance, graph), donate_argnums=1)
        halted = np.zeros(options.batch_size, bool)
        lowered = run.lower(params, writing, rules, np.int32(context), halted)
    tied = config.model.tie_embeddings and options.weight_dtype == "auto"
    held = sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(caches)
    )
    weights = _product_bytes(params, tied) / mesh.shape["tensor"]
    return Writing(lowered, weights, held, mesh)


def _product_bytes(params: Params, tied: bool) -> int:
    """Of the parameters that every pass reads whole.

    Of the positions, and of an embedding that is no head, it reads a row a text.
    """
    embedder = params["embedder"]
    tables = [embedder["positions"], *([] if tied else [embedder["embedding"]])]
    return state.num_bytes(params) - state.num_bytes(tables)


def mesh_of(config: Config, topology: Topology, options: Options, context: int) -> Mesh:
    """Where texts are written.

    Raises:
      ConfigError: as `compile_decode`.
    """
    if context > config.model.max_seq_len:
        raise ConfigError(
            f"--context {context} exceeds model.max_seq_len={config.model.max_seq_len}."
        )
    config = compiling.on_slices(config, topology)
    mesh = sharding.make_mesh(config.mesh, topologies.devices(topology))
    rows = (options.batch_size, config.model.num_heads)
    try:
        sharding.named_sharding(mesh, ("batch", "heads"), rows)
    except ValueError as error:
        raise ConfigError(f"--batch_size {options.batch_size}: {error}") from None
    return mesh


def key(config: Config, topology: Topology, options: Options, context: int) -> str:
    """Of what is asked, as `compiling.key`."""
    tree = dataclasses.asdict(compiling.on_slices(config, topology))
    asked = {
        **{name: tree[name] for name in ("model", "mesh")},
        "options": {k: str(v) for k, v in dataclasses.asdict(options).items()},
        "context": context,
        "topology": topology.key,
        "libtpu": topologies.libtpu_version(),
    }
    return (
        "decode-" + hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    )


def abstract_decoder(
    config: Config, mesh: Mesh, weight_dtype: str
) -> tuple[nnx.GraphDef[network.Decoder], Params]:
    """A decoder's structure, and its parameters as shapes where `network.prepare` leaves them.

    Raises:
      ConfigError: a parameter does not divide over the mesh.
    """
    graph, _ = state.model_graph(config.model)
    given = state.abstract_params(config.model, mesh)
    made: list[nnx.GraphDef[network.Decoder]] = []

    def prepare(params: Params) -> Params:
        decoder, params = network.prepare(graph, params, config.model, weight_dtype)
        made.append(decoder)
        return params

    shapes = jax.eval_shape(prepare, given)

    def place(path: Any, shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = _spec([entry.key for entry in path], shape, given)
        return jax.ShapeDtypeStruct(
            shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec)
        )

    return made[0], jax.tree_util.tree_map_with_path(place, shapes)


def _spec(path: list[Any], shape: jax.ShapeDtypeStruct, given: Params) -> PartitionSpec:
    """Of a decoder's parameter: as the model's that it was made of."""
    is_head = path[0] == "int8_head"
    source: list[Any] = (
        ["untied_head"] if "untied_head" in given else ["embedder", "embedding"]
    )
    if not is_head:
        source = [name for name in path if not isinstance(name, int)]
        is_scale_of_kernel = source[-1] == "scale" and not str(source[-2]).startswith("ln_")
        source[-1] = "kernel" if is_scale_of_kernel else source[-1]
    leaf: Any = given
    for name in source:
        leaf = leaf[name]
    spec = list(leaf.sharding.spec) + [None] * (leaf.ndim - len(leaf.sharding.spec))
    spec = spec[1:] if path[0] == "blocks" else spec  # a layer of the stack
    spec = spec[::-1] if is_head else spec  # [embed, vocab]
    return PartitionSpec(*spec[len(spec) - len(shape.shape) :])  # scales: of the outputs


def _abstract_caches(
    config: Config, mesh: Mesh, options: Options, context: int
) -> cache.Caches:
    shapes = jax.eval_shape(
        lambda: cache.empty(
            config.model,
            batch_size=options.batch_size,
            capacity=context,
            chunk=options.guesses + 1,
            dtype=options.cache_dtype,
        )
    )

    def place(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = ("batch", "heads", None, None)[: len(shape.shape)]
        where = sharding.named_sharding(mesh, names, shape.shape)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

    return jax.tree.map(place, shapes)


def _start(
    config: Config, mesh: Mesh, options: Options, caches: cache.Caches, context: int
) -> tuple[decode.State, Any]:
    """The state from which `Generator` writes one token after another, and the rules."""
    rows = options.batch_size
    ids, length = np.zeros((rows, context), np.int32), np.ones(rows, np.int32)
    group = [requests.Request(i, [0], context - 1, i, 1) for i in range(rows)]
    writing = decode.State(
        texts=requests.texts(ids, length, options, config.model.vocab_size),
        caches=caches,
        assistant_caches=None,
        limit=np.full(rows, context, np.int32),
        done=np.zeros(rows, bool),
        not_finite=np.zeros(rows, bool),
        log_probs=None,
        passes=np.int32(0),
    )
    rules = requests.rules(group, options, config.model, None, rows)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=everywhere)

    return jax.tree.map(place, (writing, rules))
