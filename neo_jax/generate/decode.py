"""Text, token by token: the compiled part.

Enters: a decoder's parameters, texts that begin with prompts, and their rules. Leaves: the
texts with new tokens. `prefill` reads prompts in chunks; `advance` writes, in a `while_loop`
that ends when every text has. Shapes are static; caches are written in place.

The caches always lack the text's last token: it is what the next pass reads. So prompts are
filled in but for their last token, and writing has one body, without a special first step.

Shapes: B batch, T chunk, V vocab, L places of the text, A alternatives.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from neo_jax.generate import sampling
from neo_jax.generate.cache import Caches
from neo_jax.generate.network import Decoder
from neo_jax.generate.sampling import Leaf, Rules, Texts
from neo_jax.sharding import constrain
from neo_jax.state import Params


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["chosen", "best", "best_ids"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class LogProbs:
    """The model's own log-probabilities, in nats, before any rule; by place in the text.

    `chosen` [batch, places] is of the token that was taken; `best` and `best_ids`
    [batch, places, alternatives] are the most likely ones.
    """

    chosen: Leaf
    best: Leaf
    best_ids: Leaf

    def note(
        self,
        logits: Float[Array, "batch vocab"],
        token: jax.Array,
        texts: Texts,
        active: jax.Array,
    ) -> LogProbs:
        """With those of the tokens that are about to be appended to the active texts."""
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]
        best, ids = jax.lax.top_k(log_probs, self.best.shape[2])
        rows = jnp.arange(token.shape[0])
        place = jnp.where(active, texts.length, self.chosen.shape[1])  # elsewhere: dropped
        return LogProbs(
            self.chosen.at[rows, place].set(chosen, mode="drop"),
            self.best.at[rows, place].set(best, mode="drop"),
            self.best_ids.at[rows, place].set(ids, mode="drop"),
        )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("texts", "caches", "assistant_caches", "limit", "done", "not_finite", "log_probs"),
        "passes",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that writing changes. Arrays are [batch]."""

    texts: Texts
    caches: Caches
    assistant_caches: Caches | None  # of the model that guesses, if one does
    limit: Leaf  # length at which a text ends in any case
    done: Leaf
    not_finite: Leaf  # whether the logits of a row's next token were not finite
    log_probs: LogProbs | None
    passes: Leaf  # scalar: calls of the network so far


def prefill(
    graph: nnx.GraphDef[Decoder],
    params: Params,
    caches: Caches,
    ids: Int[Array, "batch chunk"],
    start: Int[Array, ""],
    count: Int[Array, " batch"],
) -> Caches:
    """The caches with one more chunk of each prompt.

    Args:
      graph: the decoder's structure.
      params: its parameters.
      caches: of the chunks before.
      ids: the chunk.
      start: the position of its first token.
      count: tokens of each row that are to be in the caches at last.
    """
    places = start + jnp.arange(ids.shape[1])
    positions_BT = jnp.where(places < count[:, None], places, -1)
    length = jnp.minimum(count, start + ids.shape[1])
    return nnx.merge(graph, params).hidden(ids, positions_BT, length, caches)[1]


# Guesses the next tokens of each text, [batch, guesses]: from the texts, the assistant's
# parameters and its caches, of which it returns what they are afterwards.
Guess = Callable[[Texts, Any, Any], tuple[jax.Array, Any]]


def advance(
    graph: nnx.GraphDef[Decoder],
    params: Params,
    state: State,
    rules: Rules,
    steps: Int[Array, ""],
    halted: Bool[Array, " batch"],
    assistant: Params | None = None,
    *,
    guess: Guess | None = None,
) -> State:
    """Goes on with every text that has not ended, at least one token a pass.

    Args:
      graph: the decoder's structure.
      params: its parameters.
      state: from the prompts, or from an earlier call.
      rules: of each row.
      steps: passes of the network, at most.
      halted: rows that have ended for a reason that is not in the rules.
      assistant: parameters of the model that guesses, if one does.
      guess: what guesses tokens before each pass, for the pass to check; see speculate.py.
    """
    decoder = nnx.merge(graph, params)
    state = dataclasses.replace(state, done=state.done | halted)
    last = state.passes + steps

    def goes_on(state: State) -> jax.Array:
        return ~state.done.all() & (state.passes < last)

    def one_pass(state: State) -> State:
        guesses = jnp.zeros((state.done.shape[0], 0), jnp.int32)
        if guess is not None:
            guesses, drafts = guess(state.texts, assistant, state.assistant_caches)
            state = dataclasses.replace(state, assistant_caches=drafts)
        return _one_pass(decoder, state, rules, guesses)

    state = jax.lax.while_loop(goes_on, one_pass, state)
    # Whole on every device, so that each host can read them.
    whole = lambda x: constrain(x, *[None] * x.ndim)  # noqa: E731
    return dataclasses.replace(
        state,
        texts=jax.tree.map(whole, state.texts),
        log_probs=jax.tree.map(whole, state.log_probs),
        done=whole(state.done),
        not_finite=whole(state.not_finite),
    )


def _one_pass(
    decoder: Decoder, state: State, rules: Rules, guesses: Int[Array, "batch guesses"]
) -> State:
    """Reads each text's last token and the guesses, and writes the tokens that follow.

    The first is the token that follows the text. Each further one counts if the guess that
    it follows is the token that was written there, so that wrong guesses change nothing.
    """
    texts, first = state.texts, state.texts.length[:, None] - 1
    last_B1 = jnp.take_along_axis(texts.ids, first, axis=1)
    ids_BT = jnp.concatenate([last_B1, guesses], axis=1)
    places_BT = first + jnp.arange(ids_BT.shape[1])
    is_read = ~state.done[:, None] & (places_BT < state.limit[:, None])
    hidden, caches = decoder.hidden(
        ids_BT,
        jnp.where(is_read, places_BT, -1),
        jnp.minimum(first[:, 0] + ids_BT.shape[1], state.limit),
        state.caches,
    )
    logits_BTV = decoder.logits(hidden)
    state = dataclasses.replace(state, caches=caches, passes=state.passes + 1)
    agrees = ~state.done
    for i in range(ids_BT.shape[1]):
        state, token = _append(state, logits_BTV[:, i], rules, agrees)
        if i < guesses.shape[1]:
            agrees &= ~state.done & (guesses[:, i] == token)
    return state


def _append(
    state: State, logits: Float[Array, "batch vocab"], rules: Rules, active: jax.Array
) -> tuple[State, jax.Array]:
    """Each active text with the token that its rules choose, and those tokens."""
    texts = state.texts
    token = sampling.draw(sampling.process(logits, texts, rules), texts, rules)
    not_finite = state.not_finite | (active & ~jnp.isfinite(logits).all(axis=-1))
    active &= ~not_finite
    log_probs = state.log_probs and state.log_probs.note(logits, token, texts, active)
    texts = texts.append(token, active)
    ends = active & (sampling.is_stop(token, rules) | (texts.length >= state.limit))
    state = dataclasses.replace(
        state,
        texts=texts,
        log_probs=log_probs,
        not_finite=not_finite,
        done=state.done | not_finite | ends,
    )
    return state, token
