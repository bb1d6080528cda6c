"""Words for a person: where tensors lie, and what a report says.

Enters: configs and reports. Leaves: text.
"""

from __future__ import annotations

import math

import jax

from neo_jax import metrics, optimizer, sharding, state
from neo_jax.config import Config
from neo_jax.planning import topologies
from neo_jax.planning.compiling import GIB, Report
from neo_jax.planning.topologies import Topology


def sharding_table(config: Config, topology: Topology) -> str:
    """Every parameter: its shape, the mesh axes of its dimensions, bytes of one device.

    Raises:
      ConfigError: as `state.abstract`.
    """
    mesh = sharding.make_mesh(config.mesh, topologies.devices(topology))
    tx = optimizer.build(config.optimizer, config.train.num_steps)
    abstract = state.abstract(config.model, mesh, tx)
    rows = [("parameter", "shape", "split over", "of one device", "MiB")]
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.params):
        part = leaf.sharding.shard_shape(leaf.shape)
        axes = ["+".join(axis) if axis else "·" for axis in _axes(leaf)]
        rows.append(
            (
                jax.tree_util.keystr(path, simple=True, separator="."),
                "×".join(map(str, leaf.shape)),
                ", ".join(axes),
                "×".join(map(str, part)),
                f"{math.prod(part) * leaf.dtype.itemsize / 2**20:.2f}",
            )
        )
    held = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract)
    )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(word.ljust(w) for word, w in zip(row, widths, strict=True)) for row in rows
    ]
    sizes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return "\n".join(
        [
            f"mesh: {sizes}",
            *(line.rstrip() for line in lines),
            f"parameters and both moments, of one device: {held / GIB:.2f} GiB",
        ]
    )


def _axes(leaf: jax.ShapeDtypeStruct) -> list[tuple[str, ...]]:
    spec = tuple(leaf.sharding.spec)
    spec += (None,) * (len(leaf.shape) - len(spec))
    return [(part,) if isinstance(part, str) else tuple(part or ()) for part in spec]


def one_line(report: Report) -> str:
    """The few numbers that candidates are compared by."""
    hbm = f"{report.hbm_gib:.2f} of {report.hbm_limit_gib:.2f} GiB"
    if report.predicted_mfu_exact is None:
        return f"does not fit: {hbm}"
    return (
        f"{hbm}, {report.predicted_step_seconds:.3f} s, "
        f"{report.predicted_tokens_per_second_per_chip:,.0f} tokens/s/chip, "
        f"MFU {report.predicted_mfu_exact:.1%}"
    )


def report_text(report: Report, config: Config) -> str:
    """A report as a short page."""
    flops = metrics.flops_per_token(config.model, report.seq_len)
    mesh = " × ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1)
    lines = [
        f"mesh {mesh or 'of one device'}; {report.batch_size} sequences of {report.seq_len} a "
        f"step in {report.accumulation_steps} slice(s); remat {report.remat}",
        f"HBM {report.hbm_gib:.2f} GiB of {report.hbm_limit_gib:.2f} a device "
        f"(libtpu {report.libtpu})",
    ]
    if report.predicted_step_seconds is not None:
        lines += [
            f"predicted {report.predicted_step_seconds:.3f} s a step "
            f"({report.predicted_step_seconds_without_overlap:.3f} s without overlap), "
            f"{report.predicted_tokens_per_second_per_chip:,.0f} tokens/s/chip",
            f"predicted MFU {report.predicted_mfu_exact:.1%} exact "
            f"({flops.exact / 1e9:.3f} GFLOP a token), {report.predicted_mfu_palm:.1%} PaLM's "
            f"({flops.palm / 1e9:.3f})",
            f"over ICI {report.ici_gib:.2f} GiB a device and step, "
            f"over DCN {report.dcn_gib:.2f}",
            "where the time goes: " + _parts(report),
        ]
    return "\n".join(lines)


def _parts(report: Report) -> str:
    """Shares of the step: what the cores do, and what they wait for."""
    total = report.predicted_step_seconds or 1.0
    own = {k: report.seconds_by_part.get(k, 0.0) for k in ("products", "other", "kernels")}
    waited = {f"waiting for {k}": v for k, v in report.exposed_seconds.items()}
    return ", ".join(
        f"{name} {seconds / total:.1%}" for name, seconds in (own | waited).items() if seconds
    )
