"""Attention in plain XLA: the definition, and a path that leaves out what is masked.

Enters: queries, keys and values [batch, seq, heads, head_dim]; keys may reach further back
than the queries, by `before` positions. Leaves: the context of each query.

Shapes: B batch, T query position, S key position, N heads, H head_dim, C block, W window.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Queries = Float[Array, "batch query heads head_dim"]
Keys = Float[Array, "batch key heads head_dim"]
QuerySegments = Int[Array, "batch query"]
KeySegments = Int[Array, "batch key"]

# Queries that a global layer's banded path handles together. Small blocks skip more of the
# masked half of the scores; large ones make better matrix products.
_QUERY_BLOCK = 256


def causal_mask(
    query_positions: Int[Array, " query"],
    key_positions: Int[Array, " key"],
    window: int | None,
) -> Bool[Array, "query key"]:
    """True where a query may look at a key, by their positions in the sequence."""
    distance_TS = query_positions[:, None] - key_positions[None, :]
    mask_TS = distance_TS >= 0
    return mask_TS if window is None else mask_TS & (distance_TS < window)


def reference_attention(
    query: Queries,
    key: Keys,
    value: Keys,
    query_segments: QuerySegments | None,
    key_segments: KeySegments | None,
    *,
    window: int | None,
    before: int,
) -> Queries:
    """The definition: all scores of all pairs, then a mask. O(seq²) memory.

    Args:
      query_segments: tokens see only tokens of their own segment; None: all are one segment.
      key_segments: those of the keys; None together with the former.
      window: keys that a query sees, its own included; None for all earlier ones.
      before: keys in front of that of the first query.
    """
    query_positions = before + jnp.arange(query.shape[1])
    mask_B1TS = causal_mask(query_positions, jnp.arange(key.shape[1]), window)[None, None]
    if query_segments is not None and key_segments is not None:
        mask_B1TS &= (query_segments[:, :, None] == key_segments[:, None, :])[:, None]
    return _softmax_average(query, key, value, mask_B1TS)


def banded_attention(
    query: Queries,
    key: Keys,
    value: Keys,
    query_segments: QuerySegments | None,
    key_segments: KeySegments | None,
    *,
    window: int | None,
    before: int,
) -> Queries:
    """Only the scores that the mask can let through, in blocks of queries.

    A local layer costs O(seq × 2·window), a global one about half of O(seq²).
    Args and returns as `reference_attention`.
    """
    segments = query_segments, key_segments
    if window is None or query.shape[1] <= window:
        return _causal_blocks(query, key, value, *segments, window, before)
    return _local_blocks(query, key, value, *segments, window, before)


def _causal_blocks(
    q_BTNH: Array,
    k_BSNH: Array,
    v_BSNH: Array,
    q_segments_BT: Array | None,
    k_segments_BS: Array | None,
    window: int | None,
    before: int,
) -> Array:
    """Queries in blocks; each block's keys end where the block ends."""
    seq_len = q_BTNH.shape[1]
    contexts = []
    for start in range(0, seq_len, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, seq_len)
        last = before + end
        mask_TS = causal_mask(jnp.arange(before + start, last), jnp.arange(last), window)
        mask_B1TS = mask_TS[None, None]
        if q_segments_BT is not None and k_segments_BS is not None:
            same = q_segments_BT[:, start:end, None] == k_segments_BS[:, None, :last]
            mask_B1TS &= same[:, None]
        contexts.append(
            _softmax_average(
                q_BTNH[:, start:end], k_BSNH[:, :last], v_BSNH[:, :last], mask_B1TS
            )
        )
    return jnp.concatenate(contexts, axis=1)


def _local_blocks(
    q_BTNH: Array,
    k_BSNH: Array,
    v_BSNH: Array,
    q_segments_BT: Array | None,
    k_segments_BS: Array | None,
    window: int,
    before: int,
) -> Array:
    """Blocks of W queries; each sees its own block's keys and the block's before."""
    B, T = q_BTNH.shape[:2]
    C = -(-T // window)

    def blocks(x_BT: Array, front: int) -> Array:
        pad = [(0, 0), (front, C * window - T)] + [(0, 0)] * (x_BT.ndim - 2)
        return jnp.pad(x_BT, pad).reshape(B, -1, window, *x_BT.shape[2:])

    def with_previous(x_BS: Array) -> Array:
        x_BCW = blocks(x_BS, window - before)
        return jnp.concatenate([x_BCW[:, :-1], x_BCW[:, 1:]], axis=2)

    # Key slot 0 of a block lies `window` before its first query; before the first block
    # there are `before` keys to see.
    slots = jnp.arange(2 * window)
    mask_TS = causal_mask(jnp.arange(window) + window, slots, window)
    exists_CS = (jnp.arange(C)[:, None] > 0) | (slots >= window - before)[None, :]
    mask_BC1TS = (mask_TS[None] & exists_CS[:, None, :])[None, :, None]
    if q_segments_BT is not None and k_segments_BS is not None:
        own_BCT, seen_BCS = blocks(q_segments_BT, 0), with_previous(k_segments_BS)
        same_BCTS = own_BCT[..., :, None] == seen_BCS[..., None, :]
        mask_BC1TS = mask_BC1TS & same_BCTS[:, :, None]
    # Blocks join the batch, so that one product serves them all.
    fold = lambda x: x.reshape(B * C, *x.shape[2:])  # noqa: E731
    k_BCSNH, v_BCSNH = with_previous(k_BSNH), with_previous(v_BSNH)
    mask_BC1TS = jnp.broadcast_to(mask_BC1TS, (B, *mask_BC1TS.shape[1:]))
    out = _softmax_average(
        fold(blocks(q_BTNH, 0)), fold(k_BCSNH), fold(v_BCSNH), fold(mask_BC1TS)
    )
    return out.reshape(B, C * window, *out.shape[2:])[:, :T]


def _softmax_average(q_BTNH: Array, k_BSNH: Array, v_BSNH: Array, mask_B1TS: Array) -> Array:
    """softmax(q·k) · v with the scores and the softmax in at least float32."""
    float_type = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    scores_BNTS = jnp.einsum(
        "BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=float_type
    )
    # Every query sees at least itself, so no row is all -inf.
    probs_BNTS = jax.nn.softmax(jnp.where(mask_B1TS, scores_BNTS, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", probs_BNTS.astype(v_BSNH.dtype), v_BSNH)
