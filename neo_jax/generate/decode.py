"""Text, token by token.

Enters: a model and a prompt. Leaves: the tokens that follow it. Each token takes one pass
over the whole text so far, in a buffer of one size, so that it is compiled once.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from neo_jax import sharding
from neo_jax.generate.sampling import sample
from neo_jax.model import NeoLM
from neo_jax.state import Params


def generate(
    graph: nnx.GraphDef[NeoLM],
    params: Params,
    prompt: list[int],
    *,
    max_new_tokens: int,
    context: int,
    seed: int,
    temperature: float,
    top_k: int,
) -> list[int]:
    """Continues a prompt.

    Args:
      graph: structure of the model.
      params: its parameters.
      prompt: token ids, at least one.
      max_new_tokens: how many to add.
      context: tokens that the model reads at once; older ones are forgotten.
      seed: the same seed gives the same text.
      temperature: see `sample`.
      top_k: see `sample`.

    Returns:
      The new token ids.
    """

    @jax.jit
    def next_token(
        params: Params, ids: jax.Array, length: ArrayLike, key: jax.Array
    ) -> jax.Array:
        logits = nnx.merge(graph, params).logits(ids)
        last = jax.lax.dynamic_index_in_dim(logits, length - 1, axis=1, keepdims=False)
        return sample(last, key, temperature=temperature, top_k=top_k)[0]

    ids = list(prompt)
    # A mesh splits every batch over these axes, so there is a row, always the same, for each.
    axes = dict(jax.sharding.get_abstract_mesh().shape)
    rows = math.prod(axes.get(axis, 1) for axis in sharding.TABLE["batch"] or ())
    keys = jax.random.split(jax.random.key(seed), max_new_tokens)
    for key in keys:
        seen = ids[-context:]
        buffer = jnp.asarray([seen + [0] * (context - len(seen))] * rows, jnp.int32)
        ids.append(int(next_token(params, buffer, len(seen), key)))
    return ids[len(prompt) :]
