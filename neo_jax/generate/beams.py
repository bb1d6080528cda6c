"""Beam search: several continuations of each text at a time, the likeliest in the end.

Enters: texts, `beams` rows each, with prompts read but for their last token. Leaves: for each
text the best continuations that ended, with their scores: log-probability divided by
length ** length_penalty. It finds what transformers' `_beam_search` finds, with the same rules
for when a text is finished (`early_stopping`).

Shapes: R request, K beam, C candidate, V vocab, M new token.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from neo_jax.generate import sampling
from neo_jax.generate.cache import Caches
from neo_jax.generate.network import Decoder
from neo_jax.generate.sampling import Leaf, Rules, Texts
from neo_jax.sharding import constrain
from neo_jax.state import Params

_NEVER = -1e9  # a log-probability that no text has


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("texts", "caches", "running", "new", "ended", "ended_scores", "ended_length"),
        *("is_ended", "can_improve", "all_stop", "not_finite", "step"),
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class BeamState:
    """Everything that the search changes."""

    texts: Texts  # rows are request × beams + beam
    caches: Caches
    running: Leaf  # [request, beam] log-probabilities of the texts that go on
    new: Leaf  # [request, beam, new token] their tokens
    ended: Leaf  # [request, beam, new token] the best that ended
    ended_scores: Leaf  # [request, beam]
    ended_length: Leaf  # [request, beam]
    is_ended: Leaf  # [request, beam] whether there is such a text
    can_improve: Leaf  # [request] whether a text that goes on could still become the best
    all_stop: Leaf  # scalar: nothing goes on
    not_finite: Leaf  # [request]
    step: Leaf  # scalar: tokens written


def start(
    texts: Texts, caches: Caches, is_asked: Leaf, beams: int, max_new_tokens: int
) -> BeamState:
    """The state before the first token; requests that are not asked fill up a bucket."""
    R = is_asked.shape[0]
    first_only = jnp.where(jnp.arange(beams) == 0, 0.0, _NEVER)  # else all beams are one
    return BeamState(
        texts=texts,
        caches=caches,
        running=jnp.tile(first_only, (R, 1)),
        new=jnp.zeros((R, beams, max_new_tokens), jnp.int32),
        ended=jnp.zeros((R, beams, max_new_tokens), jnp.int32),
        ended_scores=jnp.full((R, beams), _NEVER),
        ended_length=jnp.zeros((R, beams), jnp.int32),
        is_ended=jnp.tile(~is_asked[:, None], (1, beams)),
        can_improve=is_asked,
        all_stop=jnp.asarray(False),
        not_finite=jnp.zeros(R, bool),
        step=jnp.asarray(0, jnp.int32),
    )


def search(
    graph: nnx.GraphDef[Decoder],
    params: Params,
    state: BeamState,
    rules: Rules,
    is_asked: jax.Array,
    length_penalty: jax.Array,
    num_stops: int,
    early_stopping: bool | Literal["never"],
) -> BeamState:
    """Runs the search to its end.

    Args:
      graph: the decoder's structure.
      params: its parameters.
      state: from `start`.
      rules: of each row.
      is_asked: [request], false for those that fill up a bucket.
      length_penalty: scalar.
      num_stops: different tokens that end a text.
      early_stopping: True ends a request with as many texts as beams, False when no better
        one of the present length can come, "never" when none of any length can.
    """
    decoder = nnx.merge(graph, params)

    def goes_on(state: BeamState) -> jax.Array:
        full = state.is_ended.all() if early_stopping is True else jnp.asarray(False)
        return state.can_improve.any() & ~full & ~state.all_stop & ~state.not_finite.any()

    def one_step(state: BeamState) -> BeamState:
        return _one_step(
            decoder, state, rules, is_asked, length_penalty, num_stops, early_stopping
        )

    state = jax.lax.while_loop(goes_on, one_step, state)
    whole = lambda x: constrain(x, *[None] * x.ndim)  # noqa: E731
    return dataclasses.replace(
        state,
        ended=whole(state.ended),
        ended_scores=whole(state.ended_scores),
        ended_length=whole(state.ended_length),
        not_finite=whole(state.not_finite),
    )


def _one_step(
    decoder: Decoder,
    state: BeamState,
    rules: Rules,
    is_asked: jax.Array,
    length_penalty: jax.Array,
    num_stops: int,
    early_stopping: bool | Literal["never"],
) -> BeamState:
    texts, (R, K, M) = state.texts, state.new.shape
    first = texts.length[:, None] - 1
    last_N1 = jnp.take_along_axis(texts.ids, first, axis=1)
    hidden, caches = decoder.hidden(last_N1, first, texts.length, state.caches)
    logits_NV = decoder.logits(hidden)[:, 0]
    scores_NV = sampling.process(jax.nn.log_softmax(logits_NV, axis=-1), texts, rules)
    V = scores_NV.shape[1]

    # Enough candidates that as many as beams go on, whichever end.
    totals_RKV = scores_NV.reshape(R, K, V) + state.running[:, :, None]
    total_RC, index_RC = jax.lax.top_k(totals_RKV.reshape(R, K * V), max(2, 1 + num_stops) * K)
    beam_RC, token_RC = index_RC // V, (index_RC % V).astype(jnp.int32)
    new_RCM = _take(state.new, beam_RC).at[:, :, state.step].set(token_RC)
    is_stop_RC = sampling.is_stop(token_RC.reshape(-1), jax.tree.map(lambda x: x[:1], rules))
    stops_RC = is_stop_RC.reshape(R, -1) | (state.step + 1 >= M) | ~is_asked[:, None]

    running, chosen = jax.lax.top_k(total_RC + stops_RC * _NEVER, K)
    rows_N = (jnp.arange(R)[:, None] * K + _take(beam_RC, chosen)).reshape(-1)
    carried = jax.tree.map(lambda x: x[rows_N], (texts, caches))
    token_N = _take(token_RC, chosen).reshape(-1)
    texts = carried[0].append(token_N, jnp.ones(R * K, bool))
    state = _collect(state, new_RCM, total_RC, stops_RC, length_penalty, early_stopping)

    if early_stopping == "never":
        hoped_length = jnp.where(length_penalty > 0, M, state.step + 1)
    else:
        hoped_length = state.step + 1
    hoped = running[:, 0] / hoped_length.astype(running.dtype) ** length_penalty
    worst_RK = jnp.where(state.is_ended, state.ended_scores.min(axis=1, keepdims=True), _NEVER)
    not_finite = ~jnp.isfinite(logits_NV).all(axis=-1).reshape(R, K).all(axis=-1)
    return dataclasses.replace(
        state,
        texts=texts,
        caches=carried[1],
        running=running,
        new=_take(new_RCM, chosen),
        can_improve=state.can_improve & (hoped[:, None] > worst_RK).any(axis=1),
        all_stop=stops_RC.all(),
        not_finite=not_finite & is_asked,
        step=state.step + 1,
    )


def _collect(
    state: BeamState,
    new_RCM: jax.Array,
    total_RC: jax.Array,
    stops_RC: jax.Array,
    length_penalty: jax.Array,
    early_stopping: bool | Literal["never"],
) -> BeamState:
    """The best of the texts that had ended and of those that end now."""
    K, length = state.running.shape[1], state.step + 1
    # Candidates below the best `beams` are only there to go on.
    ends_RC = stops_RC & (jnp.arange(stops_RC.shape[1]) < K)
    score_RC = total_RC / length.astype(total_RC.dtype) ** length_penalty
    is_closed_R = ~state.can_improve
    if early_stopping is True:
        is_closed_R |= state.is_ended.all(axis=1)
    score_RC += is_closed_R[:, None] * _NEVER
    score_RC += ~ends_RC * _NEVER

    def join(old: jax.Array, now: jax.Array) -> jax.Array:
        return jnp.concatenate([old, now.astype(old.dtype)], axis=1)

    best, which = jax.lax.top_k(join(state.ended_scores, score_RC), K)
    lengths_RC = jnp.broadcast_to(length, ends_RC.shape)
    return dataclasses.replace(
        state,
        ended=_take(join(state.ended, new_RCM), which),
        ended_scores=best,
        ended_length=_take(join(state.ended_length, lengths_RC), which),
        is_ended=_take(join(state.is_ended, ends_RC), which),
    )


def _take(x_RC: jax.Array, index_RK: jax.Array) -> jax.Array:
    """x[r, index[r, k]], whatever dimensions follow."""
    index = index_RK.reshape(*index_RK.shape, *[1] * (x_RC.ndim - 2))
    return jnp.take_along_axis(x_RC, index, axis=1)
