"""How likely a text is to the model, token by token, and what the model makes of it.

Enters: token ids [batch, seq], filled up behind each text. Leaves: log-probabilities of every
token after the first, or hidden states. One pass reads all; since no token looks ahead, what
fills a row up changes nothing before it.

Shapes: B batch, T position, D embed, V vocab, C position in a block.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from neo_jax.generate.network import Decoder
from neo_jax.state import Params

_BLOCK = 64  # positions whose logits exist at one time


# The graph of all three is a model's, NeoLM, or that of the decoder made of it, Decoder.


def logits(
    graph: nnx.GraphDef[Any], params: Params, ids: Int[Array, "batch seq"]
) -> Float[Array, "batch seq vocab"]:
    """Scores of the token after each one, over the real ids, at least float32."""
    model = nnx.merge(graph, params)
    if isinstance(model, Decoder):
        return model.logits(model.whole(ids))
    return model.logits(ids)


def token_log_probs(
    graph: nnx.GraphDef[Any], params: Params, ids: Int[Array, "batch seq"]
) -> Float[Array, "batch seq-1"]:
    """Log p of tokens 1 … seq-1, each given those before it; nats, float32."""
    model = nnx.merge(graph, params)
    hidden_BTD = _hidden(model, ids)
    B, T, D = hidden_BTD.shape
    blocks = -(-T // _BLOCK)
    pad = blocks * _BLOCK - T
    targets_BT = jnp.pad(ids[:, 1:], [(0, 0), (0, pad + 1)])
    hidden_BTD = jnp.pad(hidden_BTD, [(0, 0), (0, pad), (0, 0)])

    def one_block(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden_BCD, targets_BC = block
        logits_BCV = _scores(model, hidden_BCD)
        log_probs_BCV = jax.nn.log_softmax(logits_BCV, axis=-1)
        return jnp.take_along_axis(log_probs_BCV, targets_BC[..., None], axis=-1)[..., 0]

    in_blocks = (
        hidden_BTD.reshape(B, blocks, _BLOCK, D).swapaxes(0, 1),
        targets_BT.reshape(B, blocks, _BLOCK).swapaxes(0, 1),
    )
    return jax.lax.map(one_block, in_blocks).swapaxes(0, 1).reshape(B, -1)[:, : T - 1]


def pooled(
    graph: nnx.GraphDef[Any],
    params: Params,
    ids: Int[Array, "batch seq"],
    length: Int[Array, " batch"],
    pooling: str,
) -> Float[Array, "batch embed"]:
    """One vector a text: its last token's hidden state, or the mean over its tokens."""
    hidden_BTD = _hidden(nnx.merge(graph, params), ids).astype(jnp.float32)
    if pooling == "last":
        return jnp.take_along_axis(hidden_BTD, length[:, None, None] - 1, axis=1)[:, 0]
    is_text_BT1 = (jnp.arange(ids.shape[1]) < length[:, None])[..., None]
    return jnp.where(is_text_BT1, hidden_BTD, 0).sum(axis=1) / length[:, None]


def _hidden(model: Any, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq embed"]:
    return model.whole(ids) if isinstance(model, Decoder) else model.hidden(ids)


def _scores(
    model: Any, hidden: Float[Array, "batch seq embed"]
) -> Float[Array, "batch seq vocab"]:
    if isinstance(model, Decoder):
        return model.logits(hidden)
    # The rows that pad the head are multiplied as well: cutting them off would copy it.
    head_VD = model.head.astype(hidden.dtype)
    logits_BTV = jnp.einsum("BTD,VD->BTV", hidden, head_VD, preferred_element_type=jnp.float32)
    return logits_BTV[..., : model.config.vocab_size]
