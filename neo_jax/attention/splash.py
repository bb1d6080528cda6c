"""Attention by JAX's splash kernels, for TPU: blocks that the mask empties are never computed.

Enters: as `dense.banded_attention`. Leaves: the context. The kernels do not scale scores,
know masks at compile time, and take sequences in blocks that are multiples of 128; whatever
else comes is padded here. Padding behind the last key needs no mask: no query looks ahead.

Source of the kernels: jax.experimental.pallas.ops.tpu.splash_attention.

Shapes: B batch, T query position, S key position, N heads, H head_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from neo_jax.attention.context import NOWHERE

Queries = Float[Array, "batch query heads head_dim"]
Keys = Float[Array, "batch key heads head_dim"]

_LANES = 128  # every block is a multiple of it


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Positions that a kernel holds in the chip's vector memory at one time.

    `query` × `key` scores are a grid step of the forward pass, made in pieces of `compute`
    keys; the `back` sizes are those of the backward pass. `fused` makes the gradients of
    queries, keys and values in one kernel: five matrix products instead of seven, but it
    visits the empty blocks, too, and sums the queries' gradients outside.
    """

    query: int
    key: int
    compute: int
    back_query: int
    back_key: int
    back_compute: int
    fused: bool


# By generation of TPU: (a global layer's blocks, a local layer's). Large blocks spare grid
# steps, small ones compute less of what is masked, which is most of a local layer's rows.
# Each row compiles for its generation (docs/lab_log.md says at which shapes); they are chosen
# by counting scores and steps, not measured on the chips.
_BIG = Blocks(1024, 1024, 512, 1024, 1024, 512, fused=True)
_SMALL = Blocks(512, 512, 512, 512, 512, 512, fused=True)
_WINDOW = Blocks(512, 256, 256, 512, 256, 256, fused=False)
BLOCKS: Mapping[str, tuple[Blocks, Blocks]] = {
    "v2": (_SMALL, _WINDOW),
    "v3": (_SMALL, _WINDOW),
    "v4": (_SMALL, _WINDOW),
    "v5e": (_BIG, _WINDOW),
    "v5p": (_BIG, _WINDOW),
    "v6e": (_BIG, _WINDOW),
    "tpu7x": (_BIG, _WINDOW),
}
# Mosaic does not compile bfloat16 vectors for them.
_FLOAT32_ONLY = ("v2", "v3")


def splash_attention(
    query: Queries,
    key: Keys,
    value: Keys,
    query_segments: Int[Array, "batch query"] | None,
    key_segments: Int[Array, "batch key"] | None,
    *,
    window: int | None,
    before: int,
    generation: str | None,
    residuals: str,
) -> Queries:
    """Causal attention; other arguments as `dense.reference_attention`.

    Args:
      generation: a key of `BLOCKS`; None where there is no TPU: the kernels are interpreted.
      residuals: what a rematerialisation policy calls the context and its normalisers.
    """
    dtype = query.dtype
    if generation in _FLOAT32_ONLY:
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    T, S = query.shape[1], key.shape[1]
    blocks = BLOCKS[generation or "v5e"][window is not None]
    length = _padded(T, blocks)
    # Keys in front: to whole lanes, so that key blocks may begin anywhere before.
    front = -before % _LANES
    tail = front + before + length - (front + S)
    if front and key_segments is None:
        query_segments = jnp.zeros(query.shape[:2], jnp.int32)
        key_segments = jnp.zeros(key.shape[:2], jnp.int32)

    def pad(x: Array, before: int, after: int, value: int = 0) -> Array:
        widths = [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths, constant_values=value) if before or after else x

    # [B, T, N, H] → [B, N, T, H], as the kernels want it.
    q_BNTH = pad(query, 0, length - T).swapaxes(1, 2)
    k_BNSH, v_BNSH = (pad(x, front, tail).swapaxes(1, 2) for x in (key, value))
    kernel = _kernel(
        num_heads=query.shape[2],
        shape=(length, front + before + length),
        window=window,
        blocks=blocks,
        residuals=residuals,
        interpret=generation is None,
    )
    segments: tuple[kernels.SegmentIds, ...] = ()
    if query_segments is not None and key_segments is not None:
        # A padded query sees its own key, which is of segment 0 as it is.
        of_queries = pad(query_segments, 0, length - T)
        of_keys = pad(pad(key_segments, front, 0, NOWHERE), 0, tail)
        segments = (kernels.SegmentIds(of_queries, of_keys),)
    out_BNTH = cast(Array, jax.vmap(kernel)(q_BNTH, k_BNSH, v_BNSH, *segments))
    return out_BNTH.swapaxes(1, 2)[:, :T].astype(dtype)


def _padded(length: int, blocks: Blocks) -> int:
    """`length` rounded up to whole blocks, or to lanes where it is shorter than a block."""
    largest = max(blocks.query, blocks.key, blocks.back_query, blocks.back_key)
    lanes = -(-length // _LANES) * _LANES
    return lanes if lanes < largest else -(-length // largest) * largest


def _fit(block: int, length: int) -> int:
    """The largest multiple of 128 that divides `length` and is at most `block`."""
    return max(b for b in range(_LANES, min(block, length) + 1, _LANES) if length % b == 0)


def _kernel(
    *,
    num_heads: int,
    shape: tuple[int, int],
    window: int | None,
    blocks: Blocks,
    residuals: str,
    interpret: bool,
) -> kernels.SplashAttentionKernel:
    """The kernels for one mask; `shape` is queries × keys, and the last ones coincide."""
    offset = shape[1] - shape[0]
    mask = (
        masks.CausalMask(shape, offset=offset)
        if window is None
        else masks.LocalMask(shape, window_size=(window - 1, 0), offset=offset)
    )
    query, key = _fit(blocks.query, shape[0]), _fit(blocks.key, shape[1])
    back_query, back_key = _fit(blocks.back_query, shape[0]), _fit(blocks.back_key, shape[1])
    sizes = kernels.BlockSizes(
        block_q=query,
        block_kv=key,
        block_kv_compute=_fit(blocks.compute, key),
        block_q_dkv=back_query,
        block_kv_dkv=back_key,
        block_kv_dkv_compute=_fit(blocks.back_compute, back_key),
        block_q_dq=None if blocks.fused else back_query,
        block_kv_dq=None if blocks.fused else back_key,
        use_fused_bwd_kernel=blocks.fused,
    )
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * num_heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=residuals,
        interpret=interpret,
    )
