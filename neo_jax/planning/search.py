"""Ranks settings of a step by estimate, so that only the best need to be compiled.

Enters: a config and a topology. Leaves: `Candidate`s, best first: mesh × remat × accumulation
of the config's own batch. The estimates are arithmetic on the model's shape. They put
candidates in order, and no figure of them is reported as a prediction.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import nnx

from neo_jax import config as config_lib
from neo_jax import metrics, sharding, state, trainable
from neo_jax.config import Config, ConfigError
from neo_jax.planning.compiling import GIB, Report
from neo_jax.planning.topologies import Topology, parse

# Share of peak that matrix products reach in a step, as compiled steps showed.
_PRODUCT_EFFICIENCY = 0.8


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A config to try, and what it is thought to need.

    Attributes:
      hbm_gib: of a device, by estimate.
      seconds: of a step, by estimate.
    """

    config: Config
    hbm_gib: float
    hbm_limit_gib: float
    seconds: float

    @property
    def fits(self) -> bool:
        return self.hbm_gib <= self.hbm_limit_gib

    def flags(self) -> str:
        """Settings as the command line takes them."""
        return " ".join(f"--config.{flag}" for flag in _flags(self.config))

    def __str__(self) -> str:
        return f"{' '.join(_flags(self.config))} (about {self.hbm_gib:.1f} GiB)"


@dataclasses.dataclass(frozen=True)
class _Remat:
    """What a policy keeps of a layer, in bytes a token and embed entry, and does again.

    Attributes:
      policy: as `model.remat`.
      save: as `model.remat_save`.
      kept: bytes, of bfloat16 arrays: 2 is one array [batch, seq, embed].
      again: share of the forward pass that is computed twice.
    """

    policy: str
    save: tuple[str, ...]
    kept: float
    again: float


_QKV = ("query", "key", "value")
# A layer's products are 12 of embed²: query, key, value and out one each, up and down four.
# "none" keeps every intermediate: of embed size x, ln_1, q, k, v, context, out, sum, ln_2,
# down, sum; of 4 × embed up, its activation and what its derivative needs. Of each period of
# two layers all others keep what enters it; its last "down" is never done again.
REMAT = (
    _Remat("none", (), kept=2 * 11 + 8 * 3, again=0.0),
    _Remat("full", (), kept=1, again=0.9),
    _Remat("custom", ("context", "attention_out", "residual"), kept=6, again=7 / 12),
    _Remat("custom", (*_QKV, "context"), kept=9, again=7 / 12),
    # Query, key and value are cheap to do again: kept, they are copied for the kernel.
    _Remat("custom", ("context", "attention_out", "residual", "mlp_up"), 14, again=3 / 12),
    # The same and up: products are not done again.
    _Remat("minimal", (), kept=20, again=0.05),
)


def candidates(config: Config, topology: Topology) -> list[Candidate]:
    """All that divide over the topology: those that fit first, each group fastest first.

    Raises:
      ConfigError: none does.
    """
    weights, learned = state.num_params(config.model), _num_learned(config)
    found = [
        _estimate(changed, topology, weights, learned)
        for changed in _settings(config, topology)
    ]
    if not found:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size} has no share for each of the "
            f"{topology.devices} devices of {topology.key}; raise it, or take fewer chips."
        )
    return sorted(found, key=lambda c: (not c.fits, c.seconds if c.fits else c.hbm_gib))


def smallest_that_fits(config: Config, topology: Topology) -> str | None:
    """The next larger slice of the same kind on which something fits, by estimate."""
    for chips in sorted({2**n for n in range(13)}):
        try:
            grid = parse(f"{topology.kind}-{chips}")
            if grid.chips > topology.chips and candidates(config, grid)[0].fits:
                return grid.name
        except ConfigError:
            continue
    return None


def flags_of(report: Report) -> list[str]:
    """Settings of a report, as `section.key=value`."""
    slices = parse_key(report.topology)
    sizes = {**report.mesh, "data": report.mesh["data"] // slices}
    mesh = [f"mesh.{axis}={sizes[axis]}" for axis in sharding.MESH_AXES]
    return [
        *mesh,
        f"mesh.slices={slices}",
        f"model.remat={report.remat}",
        *_saved("save", report.remat_save),
        *_saved("offload", report.remat_offload),
        f"train.gather_weights={report.gather_weights}",
        f"data.batch_size={report.batch_size}",
        f"train.accumulation_steps={report.accumulation_steps}",
    ]


def _flags(config: Config) -> list[str]:
    mesh = [
        f"mesh.{axis}={size}"
        for axis, size in dataclasses.asdict(config.mesh).items()
        if size != 1
    ]
    return [
        *mesh,
        f"model.remat={config.model.remat}",
        *_saved("save", config.model.remat_save),
        f"train.accumulation_steps={config.train.accumulation_steps}",
    ]


def _saved(how: str, names: Sequence[str]) -> list[str]:
    quoted = ",".join(f"'{name}'" for name in names)
    return [f'"model.remat_{how}=[{quoted}]"'] if names else []


def parse_key(key: str) -> int:
    """Slices of a topology's key."""
    found = re.match(r"(\d+)x(?=[a-z])", key)
    return int(found[1]) if found else 1


def _settings(config: Config, topology: Topology) -> Iterator[Config]:
    """Meshes that the tensors and the batch divide over, with every remat and accumulation."""
    devices, model = topology.devices // topology.num_slices, config.model
    for tensor, data in itertools.product((1, 2, 4, 8), _powers(devices)):
        fsdp, rest = divmod(devices, tensor * data)
        if rest or model.num_heads % tensor or model.mlp_dim % tensor:
            continue
        if model.embed_dim % fsdp:
            continue
        # Slices are joined by data parallelism: weights are not fetched through the network.
        parts = data * fsdp * topology.num_slices
        rows, rest = divmod(config.data.batch_size, parts)
        if rest or not rows:
            continue
        mesh = config_lib.MeshConfig(
            slices=topology.num_slices, data=data, fsdp=fsdp, tensor=tensor
        )
        for steps, remat in itertools.product(_powers(rows), REMAT):
            how: dict[str, Any] = {
                "remat": remat.policy,
                "remat_save": remat.save,
                "remat_offload": (),
            }
            yield dataclasses.replace(
                config,
                mesh=mesh,
                model=dataclasses.replace(model, **how),
                train=dataclasses.replace(config.train, accumulation_steps=steps),
            )


def _powers(limit: int) -> list[int]:
    """Powers of two that divide `limit`."""
    return [2**n for n in range(limit.bit_length()) if limit % 2**n == 0]


def _num_learned(config: Config) -> int:
    _, params = state.model_graph(config.model)
    learned, _ = trainable.divide(nnx.to_pure_dict(params), config.finetune)
    return sum(leaf.size for leaf in jax.tree.leaves(learned))


def _estimate(config: Config, topology: Topology, weights: int, learned: int) -> Candidate:
    model, mesh, chip = config.model, config.mesh, topology.generation
    shards = mesh.fsdp * mesh.tensor
    rows = config.data.batch_size // (mesh.data * mesh.fsdp * mesh.slices)
    slices = config.train.accumulation_steps
    tokens = rows // slices * config.data.seq_len  # of a device, in one slice
    table = model.padded_vocab_size * model.embed_dim
    layer = (weights - table) / model.num_layers
    remat = next(r for r in REMAT if (r.policy, r.save) == (model.remat, model.remat_save))

    held = 12 * learned / shards  # float32 parameters and two moments
    held += (4 if slices == 1 else 8) * learned / shards  # gradients, and their sum
    if model.param_dtype == "float32":  # beside those in bfloat16, below
        held += 4 * max(0, weights - learned) / shards
    held += 2 * weights / shards  # parameters in bfloat16
    # Two periods of gathered weights, one in use and one on its way, and one of gradients.
    held += len(model.attention_types) * layer * (2 * 2 + 4) / mesh.tensor
    held += remat.kept * tokens * model.embed_dim * model.num_layers
    # A layer's intermediates while its backward pass runs.
    held += REMAT[0].kept * tokens * model.embed_dim * len(model.attention_types)
    block = min(config.loss.block_size, config.data.seq_len) / config.data.seq_len
    held += 10 * tokens * block * model.padded_vocab_size / mesh.tensor  # a block of logits
    held += (4 + 4) * table / mesh.tensor + 4 * tokens * model.embed_dim  # its gradients

    flops = metrics.flops_per_token(model, config.data.seq_len, config.finetune).exact
    per_device = flops * (1 + remat.again / 3) * tokens * slices / mesh.tensor
    busy = per_device / (chip.peak_flops / chip.devices * _PRODUCT_EFFICIENCY)
    link = 2 * chip.link_bytes_per_second / chip.devices
    # Weights come for the forward and the backward pass of each slice, gradients go back.
    passed = (2 * 2 + 4) * weights / mesh.tensor * slices * (mesh.fsdp > 1)
    # Four reductions of activations a layer, there and back.
    passed += 8 * 2 * tokens * model.embed_dim * model.num_layers * slices * (mesh.tensor > 1)
    passed += 2 * 4 * weights / shards * (mesh.data > 1)
    seconds = max(busy, passed / link) + 0.05 * passed / link
    if topology.num_slices > 1:
        network = (chip.dcn_bytes_per_second or 0.0) / chip.devices
        seconds += 2 * 4 * weights / shards / network
    seconds += 28 * weights / shards / (chip.hbm_bytes_per_second / chip.devices)
    return Candidate(config, held / GIB, chip.hbm_limit_gib, seconds)
