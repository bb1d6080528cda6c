"""Options of XLA's compiler, by what is compiled, and what for.

Enters: a `sharding.Target`. Leaves: the `compiler_options` of `jax.jit` and of an
ahead-of-time `lower(…).compile(…)`. Training and planning take them from here alone, so that
what is planned is what runs; nothing has to be set in the environment before JAX starts.
"""

from __future__ import annotations

from collections.abc import Mapping

from neo_jax.config import ModelConfig
from neo_jax.sharding import Target

Options = dict[str, bool | int | str]

# Every generation of TPU.
_TPU: Mapping[str, bool | int | str] = {
    # Left to itself, XLA turns the gathering of a layer's weights into a loop over slices
    # ("windowed einsum") whose products are as narrow as fsdp leaves them: 160 rows of 2.7B's
    # 2560 on 16 chips, where the matrix unit has 128 × 128 and more to fill.
    "xla_tpu_enable_windowed_einsum_for_all_gather": False,
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": False,
    # Collectives run beside the products that do not wait for them. These are libtpu's own
    # choices today; they are said, since the whole of fsdp rests on them.
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}
# Several slices: the sums of gradients over the slow network are spread over the step.
_SLICES: Mapping[str, bool | int | str] = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
}
# Vector memory that one fusion may fill, KiB. Source: MaxText,
# benchmarks/xla_flags_library.py, which gives the dense models on v6e this much.
_BY_GENERATION: Mapping[str, Mapping[str, bool | int | str]] = {
    "v6e": {"xla_tpu_scoped_vmem_limit_kib": 98304},
}
# NVIDIA: docs.jax.dev, "GPU performance tips"; off by default.
_NVIDIA: Mapping[str, bool | int | str] = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
}


def options(target: Target, *, slices: int) -> Options:
    """The compiler's options for a step on `target`; none on a CPU.

    Args:
      target: what is compiled for.
      slices: as `mesh.slices`; 1 where no data-centre network lies between devices.
    """
    if target.is_nvidia:
        return dict(_NVIDIA)
    generation = target.generation
    if generation is None:
        return {}
    across = _SLICES if slices != 1 else {}
    return {**_TPU, **across, **_BY_GENERATION.get(generation, {})}


# The passes that move what does not change in a loop in front of it.
_HOISTING = "while-loop-expensive-invariant-code-motion,while-loop-invariant-code-motion"


def forward_options(config: ModelConfig, target: Target) -> Options:
    """The compiler's options for a forward pass over parameters as they are stored.

    A CPU multiplies bfloat16 weights as float32. XLA would convert those of all layers before
    its loop over layers, and hold three times their bytes; kept in the loop, the conversion
    holds one layer's.
    """
    if target.platform == "cpu" and config.param_dtype == "bfloat16":
        return {"xla_disable_hlo_passes": _HOISTING}
    return {}
