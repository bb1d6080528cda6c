"""From logits to the next token.

Enters: logits [batch, vocab]. Leaves: token ids [batch].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sample(
    logits: Float[Array, "batch vocab"], key: jax.Array, *, temperature: float, top_k: int
) -> Int[Array, " batch"]:
    """Draws one token a row.

    Args:
      logits: scores of the next token.
      key: randomness of this draw.
      temperature: divides the logits; 0 takes the best token.
      top_k: only so many best tokens may be drawn; 0: all.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / temperature
    if top_k:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    return jax.random.categorical(key, logits)
