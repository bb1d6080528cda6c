"""Attention by cuDNN's kernels, for NVIDIA GPUs from Ampere on, through jax.nn.

Enters: as `dense.banded_attention`, without keys before the queries. Leaves: the context.
Scores are not scaled (scale=1; jax would take 1/sqrt(head_dim)), and cuDNN leaves out the
blocks that causality or the window mask. Its window comes without segments only: where there
are both, window and segments are one mask [batch, 1, seq, seq].
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neo_jax.attention.dense import causal_mask

Heads = Float[Array, "batch seq heads head_dim"]


def supports(dtype: jnp.dtype, head_dim: int) -> bool:
    """Whether cuDNN's kernels take it: 16 bits, head_dim a multiple of 8 up to 128."""
    return jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128


def cudnn_attention(
    query: Heads,
    key: Heads,
    value: Heads,
    query_segments: Int[Array, "batch seq"] | None,
    key_segments: Int[Array, "batch seq"] | None,
    *,
    window: int | None,
    before: int,
    is_nvidia: bool,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Heads:
    """Causal attention of a whole sequence.

    Args:
      is_nvidia: whether the program is compiled for an NVIDIA GPU.
      implementation: "xla" computes the same call anywhere, for tests.

    Raises:
      ValueError: no NVIDIA GPU, a split sequence, or a type or head_dim that cuDNN lacks.
    """
    if implementation == "cudnn":
        if not is_nvidia:
            raise ValueError("model.attention='cudnn' needs an NVIDIA GPU; use 'auto'.")
        if not supports(query.dtype, query.shape[-1]):
            raise ValueError(
                f"model.attention='cudnn' takes 16-bit types and head_dim in multiples of 8 "
                f"up to 128, not {query.dtype} and {query.shape[-1]}; use 'auto'."
            )
    if before:
        raise ValueError("model.attention='cudnn' needs mesh.context=1; use 'auto'.")
    mask_B1TS = None
    if query_segments is not None and key_segments is not None:
        mask_B1TS = (query_segments[:, :, None] == key_segments[:, None, :])[:, None]
        if window is not None:
            positions = jnp.arange(query.shape[1])
            mask_B1TS &= causal_mask(positions, positions, window)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask_B1TS,
        scale=1.0,
        is_causal=True,
        local_window_size=(window - 1, 0) if window and mask_B1TS is None else None,
        implementation=implementation,
    )
