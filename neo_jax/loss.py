"""Cross-entropy over a large vocabulary without ever holding all the logits.

Enters: final hidden states, the output matrix, targets and weights. Leaves: sums of losses
over the weighted tokens; whoever averages divides once, by the sum of the weights.

Positions are taken in blocks, and the gradient of each block is formed while its logits are
at hand: three matrix products in all, where recomputing the logits would cost four and
keeping them [batch, seq, vocab] floats.

Shapes: B batch, T position, D embed, V vocab (padded), K blocks, C positions of a block.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neo_jax.sharding import constrain


class LossSums(NamedTuple):
    """Sums over tokens, each times its weight; float32 scalars.

    `loss` is what is minimised: cross-entropy plus z-loss. `nll` is the cross-entropy alone,
    in nats, and has no gradient.
    """

    loss: Float[Array, ""]
    nll: Float[Array, ""]


def cross_entropy(
    hidden: Float[Array, "batch seq embed"],
    head: Float[Array, "vocab embed"],
    targets: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    *,
    vocab_size: int,
    z_loss: float,
    block_size: int,
) -> LossSums:
    """Sums of next-token losses.

    Args:
      hidden: final hidden states.
      head: output matrix; rows from `vocab_size` on are padding and get no probability.
      targets: the token that each position should predict, below `vocab_size`.
      weights: 0 where a position does not count.
      z_loss: weight of log²Z. Source: Mesh TensorFlow, layers.py,
        softmax_cross_entropy_with_logits.
      block_size: positions of each sequence whose logits exist at one time.
    """
    C = min(block_size, hidden.shape[1])
    pad = -hidden.shape[1] % C
    # [B, T, …] → [K, B, C, …]; positions added to fill the last block weigh nothing.
    blocks = [
        jnp.moveaxis(
            jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2)).reshape(
                x.shape[0], -1, C, *x.shape[2:]
            ),
            1,
            0,
        )
        for x in (hidden, targets, weights)
    ]
    return LossSums(*_blockwise(vocab_size, z_loss, blocks[0], head, blocks[1], blocks[2]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blockwise(
    vocab_size: int,
    z_loss: float,
    x_KBCD: Array,
    head_VD: Array,
    targets_KBC: Array,
    weights_KBC: Array,
) -> tuple[Array, Array]:
    def add_block(sums: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        x_BCD, targets_BC, weights_BC = block
        loss_BC, nll_BC, _, _ = _block_losses(vocab_size, z_loss, x_BCD, head_VD, targets_BC)
        both = jnp.stack([jnp.sum(loss_BC * weights_BC), jnp.sum(nll_BC * weights_BC)])
        return sums + both, None

    zeros = jnp.zeros(2, _float_type(x_KBCD))
    sums, _ = jax.lax.scan(add_block, zeros, (x_KBCD, targets_KBC, weights_KBC))
    return sums[0], sums[1]


def _blockwise_forward(
    vocab_size: int,
    z_loss: float,
    x_KBCD: Array,
    head_VD: Array,
    targets_KBC: Array,
    weights_KBC: Array,
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    float_type = _float_type(x_KBCD)

    def add_block(
        carry: tuple[Array, Array], block: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array], Array]:
        sums, d_head_DV = carry
        x_BCD, targets_BC, weights_BC = block
        loss_BC, nll_BC, probs_BCV, log_z_BC = _block_losses(
            vocab_size, z_loss, x_BCD, head_VD, targets_BC
        )
        both = jnp.stack([jnp.sum(loss_BC * weights_BC), jnp.sum(nll_BC * weights_BC)])
        # d(nll)/d(logits) = probs - onehot; d(log²Z)/d(logits) = 2·logZ·probs.
        scale_BC = weights_BC * (1 + 2 * z_loss * log_z_BC)
        is_target_BCV = targets_BC[..., None] == jnp.arange(head_VD.shape[0])
        d_logits_BCV = probs_BCV * scale_BC[..., None] - jnp.where(
            is_target_BCV, weights_BC[..., None], 0
        )
        d_logits_BCV = d_logits_BCV.astype(x_BCD.dtype)
        d_x_BCD = jnp.einsum("BCV,VD->BCD", d_logits_BCV, head_VD.astype(x_BCD.dtype))
        # [D, V], so that the small operand of the product is the one that is transposed.
        d_head_DV += jnp.einsum(
            "BCD,BCV->DV", x_BCD, d_logits_BCV, preferred_element_type=float_type
        )
        return (sums + both, d_head_DV), d_x_BCD

    carry = jnp.zeros(2, float_type), jnp.zeros(head_VD.shape[::-1], float_type)
    (sums, d_head_DV), d_x_KBCD = jax.lax.scan(
        add_block, carry, (x_KBCD, targets_KBC, weights_KBC)
    )
    return (sums[0], sums[1]), (d_x_KBCD, d_head_DV.T.astype(head_VD.dtype))


def _blockwise_backward(
    vocab_size: int,
    z_loss: float,
    residuals: tuple[Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Array, Array, None, None]:
    d_x_KBCD, d_head_VD = residuals
    d_loss = cotangents[0]  # the nll is reported, not minimised
    return (d_x_KBCD * d_loss).astype(d_x_KBCD.dtype), d_head_VD * d_loss, None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _block_losses(
    vocab_size: int, z_loss: float, x_BCD: Array, head_VD: Array, targets_BC: Array
) -> tuple[Array, Array, Array, Array]:
    """Losses and cross-entropies [B, C], probabilities [B, C, V], and log Z [B, C]."""
    logits_BCV = jnp.einsum(
        "BCD,VD->BCV",
        x_BCD,
        head_VD.astype(x_BCD.dtype),
        preferred_element_type=_float_type(x_BCD),
    )
    logits_BCV = constrain(logits_BCV, "batch", None, "vocab")
    is_real_V = jnp.arange(head_VD.shape[0]) < vocab_size
    logits_BCV = jnp.where(is_real_V, logits_BCV, -jnp.inf)
    log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    probs_BCV = jnp.exp(logits_BCV - log_z_BC[..., None])
    target_logit_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    nll_BC = log_z_BC - target_logit_BC
    return nll_BC + z_loss * jnp.square(log_z_BC), nll_BC, probs_BCV, log_z_BC


def _float_type(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
