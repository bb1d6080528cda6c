"""From gradients to parameter updates: the learning rate's path, clipping, AdamW, spikes.

Enters: an `OptimizerConfig` and, at each step, a tree of gradients with its parameters.
Leaves: an optax transformation whose updates are added to the parameters, and the schedule
it follows, for the log. Both recipes are one chain,

    clip by global norm → Adam, with or without bias correction → + decay × parameter → × −lr

and differ in the config alone. Source of the `mtf` recipe: EleutherAI/gpt-neo,
optimizers.py. What is ours: a state in float32 whatever the parameters are, and the window
of recent losses and gradient norms that tells which updates to leave out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from neo_jax.config import OptimizerConfig

SPIKE_WINDOW = 128  # finite values that the next one is compared with

Schedule = Callable[[ArrayLike], Float[Array, ""]]

# LayerNorm's parameters and every bias: the original skips names that hold "norm" or "bias";
# its LayerNorms are called norm_1, ours ln_1 and ln_f.
_NOT_DECAYED = re.compile(r"norm|bias|(^|\.)ln(_|\.|$)")


def schedule(config: OptimizerConfig, num_steps: int) -> Schedule:
    """The learning rate of each update.

    "cosine": update `step` of the warm-up, counted from 0, uses (step + 1) / warmup_steps of
      the peak, so that the first moves the weights and the last reaches the peak. Then half a
      cosine, from the peak at warmup_steps to end_fraction × peak at decay_steps; then flat.
    "mtf_cosine": the cosine starts at step 0, and while step < warmup_steps it is multiplied
      by step / warmup_steps. The first update therefore has a learning rate of 0.
      Source: EleutherAI/gpt-neo, optimizers.py, get_optimizer.
    "constant": the warm-up of "cosine", then the peak.

    Args:
      config: `decay_steps` left out means `num_steps`.
      num_steps: length of the run; it may be shorter than the warm-up.

    Returns:
      step (int scalar, 0 for the first update) → learning rate (float32 scalar; float64
      where jax_enable_x64 is on).
    """
    warmup = config.warmup_steps
    end = config.decay_steps or num_steps

    def cosine(step: Array, start: int) -> Array:
        progress = jnp.clip((step - start) / max(end - start, 1), 0, 1)
        return config.end_fraction + (1 - config.end_fraction) * (
            0.5 + 0.5 * jnp.cos(jnp.pi * progress)
        )

    def rate(step: ArrayLike) -> Array:
        step = jnp.asarray(step, float)
        if config.schedule == "mtf_cosine":
            warm = jnp.minimum(step / warmup, 1) if warmup else 1.0
            return config.learning_rate * cosine(step, 0) * warm
        warm = jnp.minimum((step + 1) / max(warmup, 1), 1)
        if config.schedule == "constant":
            return config.learning_rate * warm
        return config.learning_rate * cosine(step, warmup) * warm

    return rate


def build(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """The optimiser of a run of `num_steps` updates.

    `update(grads, state, params, grad_norm=norm)` takes the gradients' global norm where the
    caller has it already, and computes it otherwise. The state's only large arrays are `mu`
    and `nu`, which mirror the parameters' tree and shapes, so that they take their shardings.
    """
    return optax.chain(
        _clip(config.clip_norm),
        _scale_by_adam(config.b1, config.b2, config.eps, config.bias_correction),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule(config, num_steps)),
    )


def global_norm(tree: Any) -> Float[Array, ""]:
    """Euclidean norm over all entries of all arrays, summed in float32 or wider."""
    return optax.tree.norm(jax.tree.map(_widen, tree))


def decay_mask(params: Any) -> Any:
    """Which parameters decay: all but LayerNorm's and biases, told by name.

    Args:
      params: any tree with key paths: nested dicts, `nnx.State`, dataclasses.

    Returns:
      The same tree with a bool in place of each array. It has no need of values.
    """

    def decays(path: jax.tree_util.KeyPath, _: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return _NOT_DECAYED.search(name) is None

    return jax.tree_util.tree_map_with_path(decays, params)


class Recent(NamedTuple):
    """The last finite values of one quantity: a ring, filled from 0."""

    values: Float[Array, " window"]
    seen: Int[Array, ""]  # finite values seen so far


class Spikes(NamedTuple):
    """What has to be remembered to tell a spike; part of the training state."""

    loss: Recent
    grad_norm: Recent
    skipped: Int[Array, ""]  # updates left out so far
    skipped_in_a_row: Int[Array, ""]  # up to the last step
    non_finite: Int[Array, ""]  # steps whose loss or gradient norm was not finite


def no_spikes() -> Spikes:
    """What is remembered before the first step."""
    # Each leaf an array of its own: the state is donated, and none may be donated twice.
    return Spikes(
        loss=Recent(jnp.zeros(SPIKE_WINDOW, jnp.float32), jnp.zeros((), jnp.int32)),
        grad_norm=Recent(jnp.zeros(SPIKE_WINDOW, jnp.float32), jnp.zeros((), jnp.int32)),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
        non_finite=jnp.zeros((), jnp.int32),
    )


def judge(
    spikes: Spikes,
    loss: Float[Array, ""],
    grad_norm: Float[Array, ""],
    config: OptimizerConfig,
) -> tuple[Bool[Array, ""], Spikes]:
    """Whether to leave out the update of a step, and what to remember of it.

    A value is a spike if it is not finite, or lies more than `spike_sigmas` standard
    deviations above the mean of the `SPIKE_WINDOW` finite ones before it; until there are so
    many, no finite value is one. Finite values are remembered also where the update is left
    out, so that a new level is soon no spike any more; non-finite ones are only counted.

    With `skip_spikes` off only non-finite values stop an update, and with it all later ones:
    the state stays as it was before them, for a diagnosis.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if config.skip_spikes:
        sigmas = config.spike_sigmas
        stands_out = _stands_out(spikes.loss, loss, sigmas)
        stands_out |= _stands_out(spikes.grad_norm, grad_norm, sigmas)
        skip = ~finite | stands_out
    else:
        skip = ~finite | (spikes.skipped_in_a_row > 0)
    return skip, Spikes(
        loss=_remember(spikes.loss, loss),
        grad_norm=_remember(spikes.grad_norm, grad_norm),
        skipped=spikes.skipped + skip,
        skipped_in_a_row=jnp.where(skip, spikes.skipped_in_a_row + 1, 0),
        non_finite=spikes.non_finite + ~finite,
    )


def _stands_out(recent: Recent, value: Array, sigmas: float) -> Array:
    # Taken from the first value, so that the deviation of equal ones is 0 and not rounding.
    centre = recent.values[0]
    values = recent.values - centre
    threshold = jnp.mean(values) + sigmas * jnp.std(values)
    is_full = recent.seen >= recent.values.size
    return is_full & (value.astype(jnp.float32) - centre > threshold)


def _remember(recent: Recent, value: Array) -> Recent:
    value = value.astype(jnp.float32)
    finite = jnp.isfinite(value)
    at = recent.seen % recent.values.size
    kept = jnp.where(finite, value, recent.values[at])
    return Recent(recent.values.at[at].set(kept), recent.seen + finite)


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _widen(x: Array) -> Array:
    return x.astype(_wide(x.dtype))


def _clip(clip_norm: float) -> optax.GradientTransformationExtraArgs:
    """Gradients × c / max(norm, c), widened. optax's own would compute the norm again."""

    def update(
        grads: Any,
        state: optax.EmptyState,
        params: Any = None,
        *,
        grad_norm: Array | None = None,
        **_: Any,
    ) -> tuple[Any, optax.EmptyState]:
        del params
        if grad_norm is None:
            grad_norm = global_norm(grads)
        scale = clip_norm / jnp.maximum(grad_norm, clip_norm)
        return jax.tree.map(lambda g: _widen(g) * scale.astype(_wide(g.dtype)), grads), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _scale_by_adam(
    b1: float, b2: float, eps: float, bias_correction: bool
) -> optax.GradientTransformation:
    """Adam's direction, m / (√v + eps), of float32 moments.

    optax's `scale_by_adam` always corrects the bias, and keeps `nu` in the parameters' dtype:
    in bfloat16, v + 0.05 (g² − v) is v for most of the small changes that training makes.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        def zeros() -> Any:
            return jax.tree.map(lambda p: jnp.zeros_like(p, _wide(p.dtype)), params)

        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu=zeros(), nu=zeros())

    def update(
        grads: Any, state: optax.ScaleByAdamState, params: Any = None
    ) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, grads)

        def direction(m: Array, v: Array) -> Array:
            if bias_correction:
                m = m / _weight_seen(b1, count).astype(m.dtype)
                v = v / _weight_seen(b2, count).astype(v.dtype)
            return m / (jnp.sqrt(v) + eps)

        return (
            jax.tree.map(direction, mu, nu),
            optax.ScaleByAdamState(count=count, mu=mu, nu=nu),
        )

    return optax.GradientTransformation(init, update)


def _weight_seen(decay: float, count: Array) -> Array:
    """1 − decay^count, without the digits that float32 loses when decay is near 1."""
    log = math.log(decay) if decay else -math.inf
    return -jnp.expm1(jnp.asarray(count, float) * log)
