"""Kernels in int8, weight-only: a scale for each output channel.

Enters: a kernel. Leaves: int8 values and float32 scales, the largest magnitude of a channel
over 127, so that `values × scale` is within half a scale of the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

_MAX = 127


def quantise(kernel: Array, summed: Sequence[int]) -> tuple[Array, Array]:
    """int8 values of the kernel's shape, and scales over the dimensions that are not summed.

    Args:
      kernel: of a matrix product.
      summed: its dimensions that the product sums over.
    """
    kernel = kernel.astype(jnp.float32)
    largest = jnp.abs(kernel).max(axis=tuple(summed), keepdims=True)
    scale = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny) / _MAX
    values = jnp.round(kernel / scale).astype(jnp.int8)
    return values, scale.squeeze(tuple(summed))
