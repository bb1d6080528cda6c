"""Heads other than the language model's: from hidden states to the scores of labels.

Enters: final hidden states [batch, seq, embed] and a head's parameters, `{"kernel": [embed,
labels]}` with a `"bias": [labels]` where transformers has one. Leaves: scores.

Source: Hugging Face transformers, models/gpt_neo/modeling_gpt_neo.py.

Shapes: B batch, T position, D embed, L label.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neo_jax.state import Params


def head_logits(
    head_params: Params, hidden: Float[Array, "batch seq embed"]
) -> Float[Array, "batch seq labels"]:
    """A head's scores at every position, at least float32."""
    float_type = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum(
        "BTD,DL->BTL",
        hidden,
        head_params["kernel"].astype(hidden.dtype),
        preferred_element_type=float_type,
    )
    return logits + head_params["bias"] if "bias" in head_params else logits


def last_token(ids: Int[Array, "batch seq"], pad_token_id: int | None) -> Int[Array, " batch"]:
    """The position that a sequence's class is read from: the last that is not padding.

    A row of nothing but padding gives 0. Source: transformers,
    GPTNeoForSequenceClassification.
    """
    if pad_token_id is None:
        return jnp.full(ids.shape[:1], ids.shape[1] - 1)
    return jnp.argmax(jnp.arange(ids.shape[1]) * (ids != pad_token_id), axis=-1)
