"""Cross-entropy over a large vocabulary without ever holding all the logits.

Enters: final hidden states, the output matrix, targets and weights. Leaves: sums of losses
over the weighted tokens; whoever averages divides once, by the sum of the weights.

Positions are taken in blocks, and the gradient of each block is formed while its logits are
at hand: three matrix products in all, where recomputing the logits would cost four and
keeping them [batch, seq, vocab] floats. On a mesh every device takes the blocks of its own
tokens against its own part of the vocabulary. What travels is two numbers a token, and over
`tensor` the gradient of the hidden states; the head's gradient is summed at home and leaves
once, at the end.

Shapes: B batch, T position, D embed, V vocab (padded), K blocks, C positions of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from neo_jax import sharding


class LossSums(NamedTuple):
    """Sums over tokens, each times its weight; float32 scalars.

    `loss` is what is minimised: cross-entropy plus z-loss. `nll` is the cross-entropy alone,
    in nats, and has no gradient. `extras` are other figures of a task, by name, to be logged.
    """

    loss: Float[Array, ""]
    nll: Float[Array, ""]
    extras: Mapping[str, Float[Array, ""]] = {}  # never changed in place


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
    settings = _Settings(vocab_size, z_loss, block_size)
    return LossSums(*_sums(settings, hidden, head, targets, weights))


def token_log_probs(
    hidden: Float[Array, "batch seq embed"],
    head: Float[Array, "vocab embed"],
    targets: Int[Array, "batch seq"],
    *,
    vocab_size: int,
    block_size: int,
) -> Float[Array, "batch seq"]:
    """Log p of every target, in nats, at least float32; the full logits never exist.

    For losses that are no sum over tokens. What the gradient of a token weighs is known only
    once all are scored, so the backward pass computes the logits again, block by block.

    Args as `cross_entropy`.
    """
    settings = _Settings(vocab_size, 0.0, block_size)
    return _log_probs(settings, hidden, head, targets)


class _Settings(NamedTuple):
    vocab_size: int
    z_loss: float
    block_size: int


class _Axes(NamedTuple):
    """Mesh axes, those of one device left out, that split the tokens, vocab and embed."""

    tokens: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    settings: _Settings, x_BTD: Array, head_VD: Array, targets_BT: Array, weights_BT: Array
) -> tuple[Array, Array]:
    return _on_every_device(
        functools.partial(_local_sums, settings),
        (x_BTD, head_VD, targets_BT, weights_BT),
        leaves="sums",
    )


def _sums_forward(
    settings: _Settings, x_BTD: Array, head_VD: Array, targets_BT: Array, weights_BT: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    sums, d_x_BTD, d_head_VD = _on_every_device(
        functools.partial(_local_gradients, settings),
        (x_BTD, head_VD, targets_BT, weights_BT),
        leaves="gradients",
    )
    return sums, (d_x_BTD, d_head_VD.astype(head_VD.dtype))


def _sums_backward(
    settings: _Settings, residuals: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, None]:
    d_x_BTD, d_head_VD = residuals
    d_loss = cotangents[0]  # the nll is reported, not minimised
    return (d_x_BTD * d_loss).astype(d_x_BTD.dtype), d_head_VD * d_loss, None, None


_sums.defvjp(_sums_forward, _sums_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probs(settings: _Settings, x_BTD: Array, head_VD: Array, targets_BT: Array) -> Array:
    return _on_every_device(
        functools.partial(_local_log_probs, settings),
        (x_BTD, head_VD, targets_BT),
        leaves="tokens",
    )


def _log_probs_forward(
    settings: _Settings, x_BTD: Array, head_VD: Array, targets_BT: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    log_probs_BT = _log_probs(settings, x_BTD, head_VD, targets_BT)
    return log_probs_BT, (x_BTD, head_VD, targets_BT)


def _log_probs_backward(
    settings: _Settings, residuals: tuple[Array, Array, Array], d_log_probs_BT: Array
) -> tuple[Array, Array, None]:
    x_BTD, head_VD, targets_BT = residuals
    # Of cross-entropies that weigh minus what comes back to each token.
    _, d_x_BTD, d_head_VD = _on_every_device(
        functools.partial(_local_gradients, settings),
        (x_BTD, head_VD, targets_BT, -d_log_probs_BT),
        leaves="gradients",
    )
    return d_x_BTD.astype(x_BTD.dtype), d_head_VD.astype(head_VD.dtype), None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def _on_every_device(
    run: Callable[..., Any],
    arrays: tuple[Array, ...],
    leaves: Literal["sums", "gradients", "tokens"],
) -> Any:
    """`run` on each device's tokens and vocabulary; without a mesh, on all of them."""
    x_BTD, head_VD, targets_BT = arrays[:3]
    # Before it travels: half the bytes.
    arrays = (x_BTD, head_VD.astype(x_BTD.dtype), *arrays[2:])
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(_Axes(), *arrays)
    sizes = dict(mesh.shape)
    axes = _Axes(
        tokens=sharding.axes_of("batch", sizes) + sharding.axes_of("seq", sizes),
        vocab=sharding.axes_of("vocab", sizes),
        embed=sharding.axes_of("embed", sizes),
    )
    spec = functools.partial(sharding.partition_spec, axis_sizes=sizes)
    hidden = spec(("batch", "seq", None), x_BTD.shape)
    tokens = spec(("batch", "seq"), targets_BT.shape)
    scalars = (PartitionSpec(), PartitionSpec())
    out_specs = {
        "sums": scalars,
        "gradients": (scalars, hidden, spec(("vocab", "embed"), head_VD.shape)),
        "tokens": tokens,
    }
    of_tokens = (tokens,) * (len(arrays) - 2)
    return jax.shard_map(
        functools.partial(run, axes),
        in_specs=(hidden, spec(("vocab", None), head_VD.shape), *of_tokens),
        out_specs=out_specs[leaves],
        check_vma=False,
    )(*arrays)


def _local_sums(
    settings: _Settings, axes: _Axes, x_BTD: Array, head_VD: Array, *tokens: Array
) -> tuple[Array, Array]:
    def add_block(sums: Array, block: tuple[Array, ...]) -> tuple[Array, None]:
        x_BCD, targets_BC, weights_BC = block
        loss_BC, nll_BC, _, _ = _block_losses(settings, axes, x_BCD, head_VD, targets_BC)
        both = jnp.stack([jnp.sum(loss_BC * weights_BC), jnp.sum(nll_BC * weights_BC)])
        return sums + both, None

    zeros = jnp.zeros(2, _float_type(x_BTD))
    sums, _ = jax.lax.scan(add_block, zeros, _blocks(settings, x_BTD, *tokens))
    sums = _psum(sums, axes.tokens)
    return sums[0], sums[1]


def _local_log_probs(
    settings: _Settings, axes: _Axes, x_BTD: Array, head_VD: Array, targets_BT: Array
) -> Array:
    def one_block(block: tuple[Array, ...]) -> Array:
        x_BCD, targets_BC = block
        _, nll_BC, _, _ = _block_losses(settings, axes, x_BCD, head_VD, targets_BC)
        return -nll_BC

    log_probs_KBC = jax.lax.map(one_block, _blocks(settings, x_BTD, targets_BT))
    log_probs_BT = jnp.moveaxis(log_probs_KBC, 0, 1).reshape(x_BTD.shape[0], -1)
    return log_probs_BT[:, : x_BTD.shape[1]]


def _local_gradients(
    settings: _Settings, axes: _Axes, x_BTD: Array, head_VD: Array, *tokens: Array
) -> tuple[tuple[Array, Array], Array, Array]:
    """The sums of all devices, and this one's parts of the gradients."""
    float_type = _float_type(x_BTD)
    ids_V = _ids_of_rows(axes, head_VD)

    def add_block(
        carry: tuple[Array, Array], block: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array], Array]:
        sums, d_head_DV = carry
        x_BCD, targets_BC, weights_BC = block
        loss_BC, nll_BC, probs_BCV, log_z_BC = _block_losses(
            settings, axes, x_BCD, head_VD, targets_BC
        )
        both = jnp.stack([jnp.sum(loss_BC * weights_BC), jnp.sum(nll_BC * weights_BC)])
        # d(nll)/d(logits) = probs - onehot; d(log²Z)/d(logits) = 2·logZ·probs.
        scale_BC = weights_BC * (1 + 2 * settings.z_loss * log_z_BC)
        is_target_BCV = targets_BC[..., None] == ids_V
        d_logits_BCV = probs_BCV * scale_BC[..., None] - jnp.where(
            is_target_BCV, weights_BC[..., None], 0
        )
        d_logits_BCV = d_logits_BCV.astype(x_BCD.dtype)
        d_x_BCD = _psum(jnp.einsum("BCV,VD->BCD", d_logits_BCV, head_VD), axes.vocab)
        # [D, V], so that the small operand of the product is the one that is transposed.
        d_head_DV += jnp.einsum(
            "BCD,BCV->DV", x_BCD, d_logits_BCV, preferred_element_type=float_type
        )
        return (sums + both, d_head_DV), d_x_BCD

    carry = jnp.zeros(2, float_type), jnp.zeros(head_VD.shape[::-1], float_type)
    (sums, d_head_DV), d_x_KBCD = jax.lax.scan(
        add_block, carry, _blocks(settings, x_BTD, *tokens)
    )
    d_x_BTD = jnp.moveaxis(d_x_KBCD, 0, 1).reshape(x_BTD.shape[0], -1, x_BTD.shape[2])
    # Each device has summed over its tokens for all of D, and keeps the total of its part.
    assert set(axes.embed) <= set(axes.tokens)
    if axes.embed:
        d_head_DV = jax.lax.psum_scatter(
            d_head_DV, axes.embed, scatter_dimension=0, tiled=True
        )
    d_head_DV = _psum(d_head_DV, tuple(a for a in axes.tokens if a not in axes.embed))
    sums = _psum(sums, axes.tokens)
    return (sums[0], sums[1]), d_x_BTD[:, : x_BTD.shape[1]], d_head_DV.T


def _blocks(settings: _Settings, x_BTD: Array, *tokens: Array) -> tuple[Array, ...]:
    """[B, T, …] → [K, B, C, …]; positions added to fill the last block weigh nothing."""
    C = min(settings.block_size, x_BTD.shape[1])
    pad = -x_BTD.shape[1] % C
    return tuple(
        jnp.moveaxis(
            jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2)).reshape(
                x.shape[0], -1, C, *x.shape[2:]
            ),
            1,
            0,
        )
        for x in (x_BTD, *tokens)
    )


def _block_losses(
    settings: _Settings, axes: _Axes, x_BCD: Array, head_VD: Array, targets_BC: Array
) -> tuple[Array, Array, Array, Array]:
    """Losses and cross-entropies [B, C], probabilities [B, C, V], and log Z [B, C]."""
    logits_BCV = jnp.einsum(
        "BCD,VD->BCV", x_BCD, head_VD, preferred_element_type=_float_type(x_BCD)
    )
    ids_V = _ids_of_rows(axes, head_VD)
    logits_BCV = jnp.where(ids_V < settings.vocab_size, logits_BCV, -jnp.inf)
    log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    if axes.vocab:
        largest_BC = jax.lax.pmax(log_z_BC, axes.vocab)
        log_z_BC = largest_BC + jnp.log(_psum(jnp.exp(log_z_BC - largest_BC), axes.vocab))
    probs_BCV = jnp.exp(logits_BCV - log_z_BC[..., None])
    row_BC = targets_BC - ids_V[0]  # of another device's part: out of range
    is_here_BC = (row_BC >= 0) & (row_BC < len(ids_V))
    row_BC1 = jnp.where(is_here_BC, row_BC, 0)[..., None]
    target_logit_BC = jnp.take_along_axis(logits_BCV, row_BC1, axis=-1)[..., 0]
    target_logit_BC = _psum(jnp.where(is_here_BC, target_logit_BC, 0), axes.vocab)
    nll_BC = log_z_BC - target_logit_BC
    return nll_BC + settings.z_loss * jnp.square(log_z_BC), nll_BC, probs_BCV, log_z_BC


def _ids_of_rows(axes: _Axes, head_VD: Array) -> Array:
    """The token of each row of this device's part of the head."""
    rows = jnp.arange(head_VD.shape[0])
    return rows + jax.lax.axis_index(axes.vocab) * len(rows) if axes.vocab else rows


def _psum(x: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.psum(x, axes) if axes else x


def _float_type(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
