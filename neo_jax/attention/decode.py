"""Attention of one new token of each text to a cache, as one kernel for TPU.

Enters: a query, a key and a value of each text and head, and the cache. Leaves: the context,
and the cache with the new token. XLA takes several passes over the scores, and a scatter that
copies whole caches; here each block of keys and values is read once, while the one before it
is computed, and of the block that the new token enters one tile is written back, as in Ragged
Paged Attention (arXiv 2604.15464). The softmax is rescaled from block to block (Milakov and
Gimelshein, arXiv 1805.02867). Blocks behind the last token are neither read nor computed.

Heads that are smaller than the lanes of a register lie side by side in it. A query is then a
row with zeros beside it, and of its average the same part counts.

Shapes: B batch, N heads, H head_dim, S slot; G registers of heads, P heads in one, L = P × H.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

_LANES = 128
# Of a block of keys, and of one of values. Both, twice, fit into the 16 MiB of vector memory
# that the compiler gives a kernel, and take HBM longer (3.2 µs on v5e) than a step of the grid
# takes by itself.
_BLOCK_BYTES = 1_400_000
_LEAST = -1e30  # below every score; finite, so that no difference of two is NaN


def compiles_for(generation: str | None) -> bool:
    """Whether the kernel is for this TPU: v2 and v3 have no vectors of bfloat16."""
    return generation not in (None, "v2", "v3")


def side_by_side(num_heads: int, head_dim: int) -> int:
    """How many heads share the lanes of a register."""
    most = max(_LANES // head_dim, 1)
    return max(count for count in range(1, most + 1) if num_heads % count == 0)


def supports(shape: Sequence[int], dtype: jnp.dtype) -> bool:
    """Whether the kernel takes keys [batch, registers, slots, lanes] of this type."""
    _, registers, slots, lanes = shape
    least = registers * max(lanes, _LANES) * _LANES * dtype.itemsize
    return slots % _LANES == 0 and least <= _BLOCK_BYTES


class Cached(NamedTuple):
    """A layer's keys and values as the kernel reads and writes them.

    `keys` and `values` are [batch, registers, slots, lanes]; int8 ones have scales, float32
    [batch, heads, slots].
    """

    keys: Any
    values: Any
    key_scales: Any = None
    value_scales: Any = None


def decode_attention(
    query: Float[Array, "batch heads head_dim"],
    key: Float[Array, "batch heads head_dim"],
    value: Float[Array, "batch heads head_dim"],
    entry: Cached,
    cache: Cached,
    held: Int[Array, " batch"],
    *,
    window: int | None,
    interpret: bool = False,
) -> tuple[Float[Array, "batch heads head_dim"], Cached]:
    """softmax(q·k) · v over a cache and one new token behind it, which then enters the cache.

    Args:
      query, key, value: of the new token.
      entry: its key and value as the cache keeps them, [batch, heads, head_dim], and their
        scales, [batch, heads].
      cache: of the tokens before; token p lies in slot p mod S. It is overwritten.
      held: tokens of each text that the cache has seen, so the new one's position.
      window: tokens that a query sees, itself included; None for all.
      interpret: run anywhere, slowly.

    Returns:
      The context, and the cache with the new token.
    """
    (B, N, _), (_, G, S, L) = query.shape, cache.keys.shape
    size = cache.keys.dtype.itemsize
    block = _block(S, G * max(L, _LANES) * size)
    tokens = [_beside_zeros(x, N // G) for x in (query, key, value)]
    # Scales [batch, heads] as columns, [batch, heads, 1].
    entry = Cached(
        *(x if x is None else x.reshape(B, G if x.ndim == 3 else N, -1) for x in entry)
    )
    entries, caches = ([x for x in each if x is not None] for each in (entry, cache))
    if not interpret:
        # Small ones XLA would bring to the chip's own memory whole, and back, around the call.
        caches = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in caches]
    tile = 32 // size  # rows of a tile of registers, the least that is written

    def read(b: Any, j: Any, held: Any) -> Any:
        # Behind the last token the same block again, which is not read again.
        return jnp.minimum(j, jnp.maximum(jnp.minimum(held[b], S) - 1, 0) // block)

    context, *after = pl.pallas_call(
        functools.partial(_kernel, window=window, num_slots=S, num_caches=len(caches)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, S // block),
            in_specs=[
                *[_of_a_text(x) for x in (*tokens, *entries)],
                *[_of_a_text(x, block, read) for x in caches],
            ],
            out_specs=[
                _of_a_text(tokens[0]),
                *[_tile_of_a_text(x, tile) for x in caches[:2]],
                *[_tile_of_a_text(x, _LANES) for x in caches[2:]],
            ],
            scratch_shapes=[
                pltpu.VMEM((N, block), jnp.float32),
                pltpu.VMEM((N, L), jnp.float32),
                pltpu.VMEM((N, 1), jnp.float32),
                pltpu.VMEM((N, 1), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (tokens[0], *caches)],
        input_output_aliases={4 + len(entries) + i: 1 + i for i in range(len(caches))},
        cost_estimate=pl.CostEstimate(
            flops=4 * B * N * L * S,
            transcendentals=B * N * S,
            bytes_accessed=2 * B * G * L * (S + tile) * size,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="decode_attention",
    )(held, *tokens, *entries, *caches)
    return _own_part(context, N // G), Cached(*after)


def _beside_zeros(x: Array, count: int) -> Array:
    """[B, N, H] → [B, N, P × H]: each head in its place among `count` of them."""
    own_NP1 = jnp.tile(jnp.eye(count, dtype=x.dtype), (x.shape[1] // count, 1))[:, :, None]
    return (x[:, :, None] * own_NP1).reshape(*x.shape[:2], -1) if count > 1 else x


def _own_part(x: Array, count: int) -> Array:
    """The way back."""
    if count == 1:
        return x
    B, N, L = x.shape
    parts = x.reshape(B, N // count, count, count, L // count)
    return jnp.stack([parts[:, :, i, i] for i in range(count)], axis=2).reshape(B, N, -1)


def _of_a_text(x: Array, slots: int | None = None, index: Any = None) -> pl.BlockSpec:
    """One text's whole, or `slots` of its slots (the third dimension), the `index`-th."""
    shape: list[int | None] = [None, *x.shape[1:]]
    if slots is not None:
        shape[2] = slots

    def where(b: Any, j: Any, held: Any) -> tuple[Any, ...]:
        return (b, 0, 0 if index is None else index(b, j, held), 0)[: x.ndim]

    return pl.BlockSpec(tuple(shape), where)


def _tile_of_a_text(x: Array, slots: int) -> pl.BlockSpec:
    """The `slots` that the new token enters."""
    return _of_a_text(x, slots, lambda b, _, held: jax.lax.rem(held[b], x.shape[2]) // slots)


def _block(slots: int, bytes_a_slot: int) -> int:
    """Slots that are read at one time."""
    return max(
        block
        for block in range(_LANES, slots + 1, _LANES)
        if slots % block == 0 and (block == _LANES or block * bytes_a_slot <= _BLOCK_BYTES)
    )


def _kernel(
    held_ref: Any, *refs: Any, window: int | None, num_slots: int, num_caches: int
) -> None:
    """One block of one text's cache; the sums of its earlier blocks are in the scratch."""
    (query_ref, new_key_ref, new_value_ref), refs = refs[:3], refs[3:]
    entries, caches = refs[:num_caches], refs[num_caches : 2 * num_caches]
    out_ref, *written = refs[2 * num_caches : 3 * num_caches + 1]
    scores_ref, sums_ref, largest_ref, total_ref = refs[3 * num_caches + 1 :]
    key_ref, value_ref, *scales = caches
    (num_heads, block), registers = scores_ref.shape, key_ref.shape[0]
    heads = [
        pl.ds(g * (num_heads // registers), num_heads // registers) for g in range(registers)
    ]
    held, j = held_ref[pl.program_id(0)], pl.program_id(1)
    slot, kind = jax.lax.rem(held, num_slots), query_ref.dtype
    new_N1 = (query_ref[...].astype(jnp.float32) * new_key_ref[...].astype(jnp.float32)).sum(
        axis=1, keepdims=True
    )

    def product(rows: Array, columns: Array, axis: int) -> Array:
        """Of matrices, over the last dimension of `rows` and one of `columns`, in float32."""
        return jax.lax.dot_general(
            rows.astype(kind),
            columns.astype(kind),
            (((1,), (axis,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if kind == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    @pl.when(j == 0)
    def _() -> None:
        largest_ref[...] = new_N1
        total_ref[...] = jnp.ones_like(new_N1)  # exp(its score - its score)
        sums_ref[...] = new_value_ref[...].astype(jnp.float32)

    @pl.when(j * block < held)
    def _() -> None:
        for register, rows in enumerate(heads):
            scores_ref[rows] = product(query_ref[rows], key_ref[register], 1)
        scores_NS = scores_ref[...]
        if scales:
            scores_NS *= scales[0][...]
        scores_NS = jnp.where(_seen(held, j, block, num_slots, window), scores_NS, _LEAST)
        before_N1 = largest_ref[...]
        largest_N1 = jnp.maximum(before_N1, scores_NS.max(axis=1, keepdims=True))
        weights_NS = jnp.exp(scores_NS - largest_N1)
        shrink_N1 = jnp.exp(before_N1 - largest_N1)
        largest_ref[...] = largest_N1
        total_ref[...] = total_ref[...] * shrink_N1 + weights_NS.sum(axis=1, keepdims=True)
        if scales:
            weights_NS *= scales[1][...]
        scores_ref[...] = weights_NS
        sums_ref[...] *= shrink_N1
        for register, rows in enumerate(heads):
            sums_ref[rows] += product(scores_ref[rows], value_ref[register], 0)

    @pl.when(j == slot // block)
    def _() -> None:
        for entry, cache, out in zip(entries, caches, written, strict=True):
            _enter(entry, cache, out, slot, block)

    @pl.when(j == pl.num_programs(1) - 1)
    def _() -> None:
        out_ref[...] = (sums_ref[...] / total_ref[...]).astype(kind)


def _enter(entry: Any, cache: Any, out: Any, slot: Any, block: int) -> None:
    """Writes the tile that the new token enters.

    Where it lies in a block that was not read, all its slots are free, and what stands here of
    another block is as good as anything.
    """
    size = out.shape[1]
    slots = pl.ds(pl.multiple_of(jax.lax.rem(slot, block) // size * size, size), size)
    is_scale = len(cache.shape) == 2
    shape = (1, size) if is_scale else (size, 1)
    is_here = jax.lax.broadcasted_iota(jnp.int32, shape, int(is_scale)) == slot % size
    if is_scale:
        out[...] = jnp.where(is_here, entry[...], cache[:, slots])
        return
    new_GL = entry[...].astype(jnp.float32)
    for register in range(cache.shape[0]):
        old_SL = cache[register, slots].astype(jnp.float32)
        new_SL = jnp.where(is_here, new_GL[register : register + 1], old_SL)
        out[register] = new_SL.astype(out.dtype)


def _seen(held: Any, j: Any, block: int, slots: int, window: int | None) -> Array:
    """Which of a block's slots the next token sees, [1, block]."""
    slot_1S = j * block + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
    # Slot s holds the newest token before `held` that belongs there.
    back_1S = jax.lax.rem(jnp.maximum(held - 1, 0), slots) - slot_1S
    back_1S = jnp.where(back_1S < 0, back_1S + slots, back_1S)
    seen_1S = back_1S < held
    return seen_1S if window is None else seen_1S & (back_1S < window - 1)
