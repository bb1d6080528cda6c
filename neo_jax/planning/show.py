"""Words for a person: where tensors lie, and what a report says.

Enters: configs and reports. Leaves: text.
"""

from __future__ import annotations

from collections.abc import Mapping

from neo_jax import metrics, sharding, state
from neo_jax.config import Config
from neo_jax.planning import topologies
from neo_jax.planning.compiling import Report, on_slices
from neo_jax.planning.decoding import DecodeReport
from neo_jax.planning.topologies import Topology


def sharding_table(config: Config, topology: Topology) -> str:
    """Where every parameter lies: `sharding.describe` on chips that are not here.

    Raises:
      ConfigError: the config does not go with the topology; there is no compiler.
    """
    config = on_slices(config, topology)
    mesh = sharding.make_mesh(config.mesh, topologies.devices(topology))
    _, params = state.model_graph(config.model)
    return sharding.describe(params, mesh)


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
    flops = metrics.flops_per_token(config.model, report.seq_len, config.finetune)
    mesh = " × ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1)
    lines = [
        f"mesh {mesh or 'of one device'}; {report.batch_size} sequences of {report.seq_len} a "
        f"step in {report.accumulation_steps} slice(s); remat {_remat(report)}",
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
            "where the time goes: "
            + _shares(
                report.predicted_step_seconds, report.seconds_by_part, report.exposed_seconds
            ),
        ]
    return "\n".join(lines)


def decode_text(report: DecodeReport) -> str:
    """A report on writing text as a short page."""
    mesh = " × ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1)
    lines = [
        f"mesh {mesh or 'of one device'}; {report.batch_size} text(s) of {report.context} "
        f"tokens; weights {report.weight_dtype}, caches {report.cache_dtype}",
        f"HBM {report.hbm_gib:.2f} GiB of {report.hbm_limit_gib:.2f} a device "
        f"(libtpu {report.libtpu}); weights {report.weights_gib:.2f}, caches "
        f"{report.cache_gib:.2f}",
        f"roofline {report.roofline_seconds_per_pass * 1e3:.3f} ms a pass, "
        f"{report.roofline_tokens_per_second:,.0f} tokens/s: reading both once",
    ]
    if report.predicted_seconds_per_pass is not None:
        lines += [
            f"predicted {report.predicted_seconds_per_pass * 1e3:.3f} ms a pass, "
            f"{report.predicted_tokens_per_second:,.0f} tokens/s, "
            f"{report.predicted_share_of_roofline:.0%} of the roofline",
            "where the time goes: "
            + _shares(
                report.predicted_seconds_per_pass,
                report.seconds_by_part,
                report.exposed_seconds,
            ),
        ]
    return "\n".join(lines)


def _remat(report: Report) -> str:
    saved = [f"{name} saved" for name in report.remat_save]
    saved += [f"{name} offloaded" for name in report.remat_offload]
    return f"{report.remat} ({', '.join(saved)})" if saved else report.remat


def _shares(total: float, parts: Mapping[str, float], exposed: Mapping[str, float]) -> str:
    """Of the time: what the cores do, and what they wait for."""
    own = {k: parts.get(k, 0.0) for k in ("products", "other", "kernels")}
    waited = {f"waiting for {k}": v for k, v in exposed.items()}
    return ", ".join(
        f"{name} {seconds / total:.1%}" for name, seconds in (own | waited).items() if seconds
    )
