"""Compiles the real training step for TPUs that are not here, and reports what it would need.

Enters: a config and a topology. Leaves: a `Report`: whether it fits, HBM, predicted seconds.
State and batch are shapes with shardings; no weight is ever in memory. Reports are kept in a
folder by what they depend on: the config, the topology, the compiler, and this code.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from neo_jax import metrics, optimizer, sharding, state, train, trainable, xla_flags
from neo_jax.config import Config
from neo_jax.planning import hlo, predict, topologies
from neo_jax.planning.topologies import Topology

GIB = 2**30
AnyReport = TypeVar("AnyReport")

# Rooms whose code decides what is compiled, and what is read from it.
_COMPILED_FROM = (
    *("sharding", "attention", "model", "loss", "optimizer", "state", "train"),
    *("int8", "lora", "trainable", "xla_flags", "planning"),
)


@dataclasses.dataclass(frozen=True)
class Report:
    """What is known of a step on a topology; sizes are of one device, rates of one chip.

    Attributes:
      over_by_gib: HBM that is lacking; 0 where it fits.
      predicted_…: None where it does not fit. See predict.py for what they assume.
      seconds_by_part, exposed_seconds: as `predict.Prediction.parts` and `exposed`.
      seconds_of_peak: what the model's own FLOPs alone would take at peak.
    """

    topology: str
    chips: int
    devices: int
    fits: bool
    hbm_gib: float
    hbm_limit_gib: float
    over_by_gib: float
    predicted_step_seconds: float | None
    predicted_step_seconds_without_overlap: float | None
    predicted_tokens_per_second_per_chip: float | None
    predicted_mfu_exact: float | None
    predicted_mfu_palm: float | None
    seconds_by_part: Mapping[str, float]
    exposed_seconds: Mapping[str, float]
    ici_gib: float | None
    dcn_gib: float | None
    mesh: Mapping[str, int]
    batch_size: int
    seq_len: int
    accumulation_steps: int
    remat: str
    remat_save: Sequence[str]
    remat_offload: Sequence[str]
    gather_weights: str
    compile_seconds: float
    libtpu: str
    jax: str


def compile_step(config: Config, topology: Topology) -> Report:
    """Compiles, reads and times the training step; about a minute of two cores.

    Raises:
      ConfigError: there is no compiler, or the config does not go with the topology.
    """
    config = on_slices(config, topology)
    mesh = sharding.make_mesh(config.mesh, topologies.devices(topology))
    with jax.set_mesh(mesh):
        flags = xla_flags.options(sharding.target(), slices=topology.num_slices)
    options = {name: f if isinstance(f, bool) else str(f) for name, f in flags.items()}
    began = time.monotonic()
    prediction = None
    compiled, needed = compile_or_count(lower(config, mesh), options)
    if compiled is not None:
        places = predict.places(list(mesh.devices.flat))
        prediction = predict.predict(hlo.parse(compiled.as_text() or ""), topology, places)
    return _report(config, topology, mesh, needed, prediction, time.monotonic() - began)


def compile_or_count(
    lowered: jax.stages.Lowered, options: Mapping[str, Any]
) -> tuple[jax.stages.Compiled | None, float]:
    """The compiled program, None where memory does not hold it, and the bytes it needs."""
    try:
        compiled = lowered.compile(compiler_options=dict(options) or None)
    except jax.errors.JaxRuntimeError as error:
        needed = out_of_memory(str(error))
        if needed is None:
            raise
        return None, needed
    return compiled, hbm_bytes(compiled.memory_analysis())


def on_slices(config: Config, topology: Topology) -> Config:
    """The config with as many slices as the topology has."""
    mesh = dataclasses.replace(config.mesh, slices=topology.num_slices)
    return dataclasses.replace(config, mesh=mesh)


def lower(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """The step as the training loop jits it, of a state that is nowhere.

    Raises:
      ConfigError: a tensor or the batch does not divide over the mesh.
    """
    tx = optimizer.build(config.optimizer, config.train.num_steps)
    graph, _ = state.model_graph(config.model)
    abstract = state.abstract(config.model, mesh, tx, config.finetune)
    _, frozen = trainable.divide(state.abstract_params(config.model, mesh), config.finetune)
    shape = (config.data.batch_size, config.data.seq_len)
    place = sharding.batch_sharding(mesh, shape)
    names = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    if config.data.isolate_documents:
        names |= {"segment_ids": jnp.int32, "positions": jnp.int32}
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for name, dtype in names.items()
    }
    step = functools.partial(train.train_step, graph=graph, config=config, tx=tx)
    with jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=0).lower(abstract, batch, frozen)


def bare_product_share(topology: Topology, size: int = 8192) -> float:
    """Share of peak that the product of two square bfloat16 matrices is predicted to reach.

    It is the yardstick of a step: the same compiler, the same predictor, nothing in the way.
    """
    device = topologies.devices(topology)[0]
    place = jax.sharding.SingleDeviceSharding(device)
    square = jax.ShapeDtypeStruct((size, size), jnp.bfloat16, sharding=place)
    compiled = jax.jit(jnp.matmul).lower(square, square).compile()
    program = hlo.parse(compiled.as_text() or "")
    prediction = predict.predict(program, topology, predict.places([device]))
    chip = topology.generation
    return prediction.flops / prediction.seconds / (chip.peak_flops / chip.devices)


def hbm_bytes(stats: Any) -> int:
    """Of a program while it runs: state, batch, results that are not donated, temporaries."""
    return int(
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )


_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}


def out_of_memory(message: str) -> float | None:
    """Bytes that a program needs, from the compiler's refusal; None if it is another error.

    It has several wordings: "Used 17.42G of 15.75G hbm", "the total memory required for HLO
    temporaries (300.00G) exceeds available HBM (15.75G)".
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in (
        r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
        r"\(([\d.]+)([KMGT]?)\) exceeds available HBM",
    ):
        found = re.search(pattern, message)
        if found:
            return float(found[1]) * _UNITS[found[2]]
    return None


def _report(
    config: Config,
    topology: Topology,
    mesh: Mesh,
    needed: float,
    prediction: predict.Prediction | None,
    seconds: float,
) -> Report:
    limit = topology.generation.hbm_limit_gib * GIB
    seconds_a_step = prediction.seconds if prediction else None
    rates: dict[str, float] = {}
    if prediction is not None:
        tokens = config.data.batch_size * config.data.seq_len
        rates["tokens"] = tokens / prediction.seconds / topology.chips
        flops = metrics.flops_per_token(config.model, config.data.seq_len, config.finetune)
        peak = topology.generation.peak_flops
        rates["exact"] = rates["tokens"] * flops.exact / peak
        rates["palm"] = rates["tokens"] * flops.palm / peak
    return Report(
        topology=topology.key,
        chips=topology.chips,
        devices=topology.devices,
        fits=prediction is not None,
        hbm_gib=needed / GIB,
        hbm_limit_gib=limit / GIB,
        over_by_gib=0.0 if prediction is not None else (needed - limit) / GIB,
        predicted_step_seconds=seconds_a_step,
        predicted_step_seconds_without_overlap=(
            prediction.seconds_without_overlap if prediction else None
        ),
        predicted_tokens_per_second_per_chip=rates.get("tokens"),
        predicted_mfu_exact=rates.get("exact"),
        predicted_mfu_palm=rates.get("palm"),
        seconds_by_part=dict(prediction.parts) if prediction else {},
        exposed_seconds=dict(prediction.exposed) if prediction else {},
        ici_gib=prediction.ici_bytes / GIB if prediction else None,
        dcn_gib=prediction.dcn_bytes / GIB if prediction else None,
        mesh=dict(mesh.shape),
        batch_size=config.data.batch_size,
        seq_len=config.data.seq_len,
        accumulation_steps=config.train.accumulation_steps,
        remat=config.model.remat,
        remat_save=list(config.model.remat_save),
        remat_offload=list(config.model.remat_offload),
        gather_weights=config.train.gather_weights,
        compile_seconds=seconds,
        libtpu=topologies.libtpu_version(),
        jax=jax.__version__,
    )


# ----------------------------------------------------------------------------------- cache


def default_cache() -> pathlib.Path:
    """Where reports are kept unless another folder is named."""
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return home / "neo_jax" / "plan"


@dataclasses.dataclass(frozen=True)
class Cache:
    """Reports in a folder, one file each, named by all that they depend on."""

    folder: pathlib.Path

    def get(self, name: str, kind: type[AnyReport]) -> AnyReport | None:
        """None if this was not compiled yet, or if its file cannot be read.

        Args:
          name: from `key`, with `source_hash`.
          kind: of report.
        """
        try:
            return kind(**json.loads(self._file(name).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def put(self, name: str, report: Any) -> None:
        """Raises: OSError: the folder cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._file(name)
        aside = path.with_suffix(".partial")
        aside.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")
        os.replace(aside, path)

    def _file(self, name: str) -> pathlib.Path:
        return self.folder / f"{name}.json"


def key(config: Config, topology: Topology) -> str:
    """Of what is asked: what a step is compiled from, the topology, the compiler."""
    tree = dataclasses.asdict(on_slices(config, topology))
    asked = {name: tree[name] for name in ("model", "mesh", "optimizer", "loss")}
    finetune = ("trainable", "last_layers")
    asked["finetune"] = {name: tree["finetune"][name] for name in finetune}
    data = ("seq_len", "batch_size", "isolate_documents")
    asked["data"] = {name: tree["data"][name] for name in data}
    asked["accumulation_steps"] = config.train.accumulation_steps
    asked["gather_weights"] = config.train.gather_weights
    asked["topology"] = topology.key
    asked["libtpu"] = topologies.libtpu_version()
    text = json.dumps(asked, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def source_hash(*more: str) -> str:
    """Of the code that makes the step and reads it, of more rooms, and of jax's version."""
    package = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256(jax.__version__.encode())
    for room in (*_COMPILED_FROM, *more):
        for path in sorted([*package.glob(f"{room}.py"), *package.glob(f"{room}/**/*.py")]):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
