"""How likely a text is to the model, token by token, and what the model makes of it.

Enters: token ids [batch, seq], filled up behind each text. Leaves: log-probabilities of every
token after the first, or hidden states. One pass reads all; since no token looks ahead, what
fills a row up changes nothing before it.

Shapes: B batch, T position, D embed, V vocab, C position in a block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from neo_jax.model import NeoLM
from neo_jax.state import Params

_BLOCK = 64  # positions whose logits exist at one time


def token_log_probs(
    graph: nnx.GraphDef[NeoLM], params: Params, ids: Int[Array, "batch seq"]
) -> Float[Array, "batch seq-1"]:
    """Log p of tokens 1 … seq-1, each given those before it; nats, float32."""
    model = nnx.merge(graph, params)
    hidden_BTD, vocab = model.hidden(ids), model.config.vocab_size
    head_VD = model.head.astype(hidden_BTD.dtype)
    B, T, D = hidden_BTD.shape
    blocks = -(-T // _BLOCK)
    pad = blocks * _BLOCK - T
    targets_BT = jnp.pad(ids[:, 1:], [(0, 0), (0, pad + 1)])
    hidden_BTD = jnp.pad(hidden_BTD, [(0, 0), (0, pad), (0, 0)])

    def one_block(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden_BCD, targets_BC = block
        logits_BCV = jnp.einsum(
            "BCD,VD->BCV", hidden_BCD, head_VD, preferred_element_type=jnp.float32
        )[..., :vocab]
        log_probs_BCV = jax.nn.log_softmax(logits_BCV, axis=-1)
        return jnp.take_along_axis(log_probs_BCV, targets_BC[..., None], axis=-1)[..., 0]

    in_blocks = (
        hidden_BTD.reshape(B, blocks, _BLOCK, D).swapaxes(0, 1),
        targets_BT.reshape(B, blocks, _BLOCK).swapaxes(0, 1),
    )
    return jax.lax.map(one_block, in_blocks).swapaxes(0, 1).reshape(B, -1)[:, : T - 1]


def pooled(
    graph: nnx.GraphDef[NeoLM],
    params: Params,
    ids: Int[Array, "batch seq"],
    length: Int[Array, " batch"],
    pooling: str,
) -> Float[Array, "batch embed"]:
    """One vector a text: its last token's hidden state, or the mean over its tokens."""
    hidden_BTD = nnx.merge(graph, params).hidden(ids).astype(jnp.float32)
    if pooling == "last":
        return jnp.take_along_axis(hidden_BTD, length[:, None, None] - 1, axis=1)[:, 0]
    is_text_BT1 = (jnp.arange(ids.shape[1]) < length[:, None])[..., None]
    return jnp.where(is_text_BT1, hidden_BTD, 0).sum(axis=1) / length[:, None]
