"""Attention with the sequence split over the mesh axis `context`.

Enters, inside `jax.shard_map`: this device's keys and values. Leaves: the same with those of
the devices before it in front, as many as its queries may see. A local layer takes the last
window-1 positions from its neighbour (from more of them where their part is shorter), a
global one all parts of all devices before it. They travel in steps from each device to
the next, in the order in which they stand, so that the mask needs no knowledge of the
device: key s lies at position s - before, as seen from this device's first query.

What would lie before the sequence's beginning is of no token's segment. A global layer
computes the scores of those keys in vain; the last device, for which the others wait, has
none of them.

Shapes: B batch, T position of this device, S position of keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Keys = Float[Array, "batch seq heads head_dim"]
Extended = Float[Array, "batch key heads head_dim"]

# The segment of keys that do not exist.
NOWHERE = int(jnp.iinfo(jnp.int32).min)


def with_keys_before(
    key: Keys,
    value: Keys,
    segment_ids: Int[Array, "batch seq"],
    *,
    window: int | None,
    ways: int,
) -> tuple[Extended, Extended, Int[Array, "batch key"], int]:
    """Keys, values and their segments with what lies before them, and how much that is.

    Args:
      window: keys that a query sees, its own included; None for all earlier ones.
      ways: devices that share a sequence.
    """
    T = key.shape[1]
    wanted = T * (ways - 1)
    wanted = wanted if window is None else min(window - 1, wanted)
    index = jax.lax.axis_index("context")
    to_next = [(i, i + 1) for i in range(ways - 1)]
    parts = [(key, value, segment_ids)]
    left, hops = wanted, 0
    while left:
        take, hops = min(T, left), hops + 1
        tail = jax.tree.map(lambda x, take=take: x[:, -take:], parts[0])
        k, v, ids = jax.lax.ppermute(tail, "context", to_next)
        parts.insert(0, (k, v, jnp.where(index >= hops, ids, NOWHERE)))
        left -= take
    k, v, ids = (jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    return k, v, ids, wanted
