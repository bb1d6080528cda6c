"""GPT-Neo's attention: causal, over all earlier tokens or over a window of them.

Enters: queries, keys and values [batch, seq, heads, head_dim]. Leaves: the context of each
query, of the same shape. `attend` chooses between the paths below; all agree with
`reference_attention`, which is the definition.

Source: EleutherAI/gpt-neo, models/gpt2/gpt2.py. Unlike Vaswani et al. (2017), scores are not
divided by sqrt(head_dim): the original folds that scale into the queries' initial weights.
A local layer's query at p sees the `window` keys p-window+1 … p, its own included.

Shapes: B batch, T query position, S key position, N heads, H head_dim, C block, W window.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Heads = Float[Array, "batch seq heads head_dim"]
Segments = Int[Array, "batch seq"]

# Queries that a global layer's banded path handles together. Small blocks skip more of the
# masked half of the scores; large ones make better matrix products.
_QUERY_BLOCK = 256


def attend(
    query: Heads,
    key: Heads,
    value: Heads,
    *,
    window: int | None,
    segment_ids: Segments | None = None,
    path: str = "auto",
) -> Heads:
    """Causal attention by the path that suits the backend.

    Args:
      window: keys that a query sees, its own included; None for all earlier ones.
      segment_ids: tokens see only tokens of their own segment; None: all are one segment.
      path: "reference", "banded" or "auto".
    """
    if path == "reference":
        return reference_attention(query, key, value, window=window, segment_ids=segment_ids)
    return banded_attention(query, key, value, window=window, segment_ids=segment_ids)


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
    query: Heads,
    key: Heads,
    value: Heads,
    *,
    window: int | None,
    segment_ids: Segments | None = None,
) -> Heads:
    """The definition: all scores of all pairs, then a mask. O(seq²) memory.

    Args and returns as `attend`.
    """
    positions = jnp.arange(query.shape[1])
    mask_B1TS = causal_mask(positions, positions, window)[None, None]
    if segment_ids is not None:
        mask_B1TS &= (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return _softmax_average(query, key, value, mask_B1TS)


def banded_attention(
    query: Heads,
    key: Heads,
    value: Heads,
    *,
    window: int | None,
    segment_ids: Segments | None = None,
) -> Heads:
    """Only the scores that the mask can let through, in blocks of queries.

    A local layer costs O(seq × 2·window), a global one about half of O(seq²).
    Args and returns as `attend`.
    """
    if window is None or query.shape[1] <= window:
        return _causal_blocks(query, key, value, segment_ids)
    return _local_blocks(query, key, value, window, segment_ids)


def _causal_blocks(
    q_BTNH: Array, k_BTNH: Array, v_BTNH: Array, segment_ids_BT: Array | None
) -> Array:
    """Queries in blocks; each block's keys end where the block ends."""
    seq_len = q_BTNH.shape[1]
    contexts = []
    for start in range(0, seq_len, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, seq_len)
        mask_B1TS = causal_mask(jnp.arange(start, end), jnp.arange(end), None)[None, None]
        if segment_ids_BT is not None:
            same = segment_ids_BT[:, start:end, None] == segment_ids_BT[:, None, :end]
            mask_B1TS &= same[:, None]
        contexts.append(
            _softmax_average(q_BTNH[:, start:end], k_BTNH[:, :end], v_BTNH[:, :end], mask_B1TS)
        )
    return jnp.concatenate(contexts, axis=1)


def _local_blocks(
    q_BTNH: Array, k_BTNH: Array, v_BTNH: Array, window: int, segment_ids_BT: Array | None
) -> Array:
    """Blocks of W queries; each sees its own block's keys and the block's before."""
    B, T = q_BTNH.shape[:2]
    C = -(-T // window)

    def blocks(x_BT: Array) -> Array:
        pad = [(0, 0), (0, C * window - T)] + [(0, 0)] * (x_BT.ndim - 2)
        return jnp.pad(x_BT, pad).reshape(B, C, window, *x_BT.shape[2:])

    def with_previous(x_BCW: Array) -> Array:
        previous = jnp.pad(x_BCW[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (x_BCW.ndim - 2))
        return jnp.concatenate([previous, x_BCW], axis=2)

    # Key slot 0 of a block lies `window` before its first query; before the first block
    # there is nothing to see.
    slots = jnp.arange(2 * window)
    mask_TS = causal_mask(jnp.arange(window) + window, slots, window)
    exists_CS = (jnp.arange(C)[:, None] > 0) | (slots >= window)[None, :]
    mask_BC1TS = (mask_TS[None] & exists_CS[:, None, :])[None, :, None]
    if segment_ids_BT is not None:
        own_BCT = blocks(segment_ids_BT)
        same = own_BCT[..., :, None] == with_previous(own_BCT)[..., None, :]
        mask_BC1TS = mask_BC1TS & same[:, :, None]
    # Blocks join the batch, so that one product serves them all.
    fold = lambda x: x.reshape(B * C, *x.shape[2:])  # noqa: E731
    k_BCSNH, v_BCSNH = with_previous(blocks(k_BTNH)), with_previous(blocks(v_BTNH))
    mask_BC1TS = jnp.broadcast_to(mask_BC1TS, (B, *mask_BC1TS.shape[1:]))
    out = _softmax_average(
        fold(blocks(q_BTNH)), fold(k_BCSNH), fold(v_BCSNH), fold(mask_BC1TS)
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
