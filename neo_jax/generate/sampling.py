"""From the logits of the next token to the token, under the rules of each request.

Enters: logits [batch, vocab], the texts so far, and `Rules`. Leaves: token ids [batch].
A rule that is None is not in the compiled program; one that is there has a value for each row,
so that requests with different values share a program.

The rules apply in the order of transformers' `_get_logits_processor`, and mean the same:
biases and forbidden words, penalties, n-grams, the shortest length; then temperature, top-k,
top-p, min-p and typical. Frequency and presence penalties are those of OpenAI's API, which
count new tokens only.

A row's randomness is its own: the key of its t-th token is folded from its seed, its stream
and t, whatever else is in the batch.

Shapes: B batch, V vocab, L places of the text, K candidates, S biased sequences, P their
longest prefix.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# An array of one kind or the other: NumPy's as a batch is put together, JAX's when it runs.
Leaf = Any
Scores = Float[Array, "batch vocab"]
Tokens = Int[Array, " batch"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["ids", "length", "prompt_length", "seen", "count"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts so far.

    `ids` [batch, places] hold `length` tokens a row, of which the first `prompt_length` were
    given. `seen` [batch, vocab] marks all tokens of a text, `count` [batch, vocab] its new
    ones; both are None where no rule asks.
    """

    ids: Leaf
    length: Leaf
    prompt_length: Leaf
    seen: Leaf | None
    count: Leaf | None

    def append(self, token: Tokens, active: Bool[Array, " batch"]) -> Texts:
        """The texts with one more token in the active rows."""
        rows = jnp.arange(token.shape[0])
        place = jnp.where(active, self.length, self.ids.shape[1])  # elsewhere: dropped
        ids = self.ids.at[rows, place].set(token, mode="drop")
        seen, count = self.seen, self.count
        if seen is not None:
            seen = seen.at[rows, token].max(active)
        if count is not None:
            count = count.at[rows, token].add(active.astype(count.dtype))
        return Texts(ids, self.length + active, self.prompt_length, seen, count)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "stop_ids",
        "seed",
        "stream",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "min_new_tokens",
        "bias_prefix",
        "bias_last",
        "bias",
    ],
    meta_fields=["num_candidates", "no_repeat_ngram_size"],
)
@dataclasses.dataclass(frozen=True)
class Rules:
    """What each row of a batch obeys. Arrays are [batch] unless said; None: no such rule."""

    stop_ids: Leaf  # [batch, any]: tokens that end a text; -1 fills up
    seed: Leaf
    stream: Leaf  # tells texts of one seed apart
    temperature: Leaf | None = None  # None: the best token, without chance
    top_k: Leaf | None = None
    top_p: Leaf | None = None
    min_p: Leaf | None = None
    typical_p: Leaf | None = None
    repetition_penalty: Leaf | None = None
    frequency_penalty: Leaf | None = None
    presence_penalty: Leaf | None = None
    min_new_tokens: Leaf | None = None
    # Sequences whose last token is biased where the text ends with the others.
    bias_prefix: Leaf | None = None  # [batch, sequences, longest]; -1 fills up, in front
    bias_last: Leaf | None = None  # [batch, sequences]
    bias: Leaf | None = None  # [batch, sequences]
    num_candidates: int | None = None  # the largest top_k; None: every token is one
    no_repeat_ngram_size: int = 0  # 0: no such rule


def process(logits: Scores, texts: Texts, rules: Rules) -> Scores:
    """The scores after every rule that does not need chance."""
    scores = logits
    if rules.bias is not None:
        scores = _add_bias(scores, texts, rules)
    if rules.repetition_penalty is not None:
        penalty = rules.repetition_penalty[:, None]
        penalised = jnp.where(scores < 0, scores * penalty, scores / penalty)
        assert texts.seen is not None
        scores = jnp.where(texts.seen, penalised, scores)
    if rules.frequency_penalty is not None:
        scores = scores - rules.frequency_penalty[:, None] * texts.count
    if rules.presence_penalty is not None:
        assert texts.count is not None
        scores = scores - rules.presence_penalty[:, None] * (texts.count > 0)
    if rules.no_repeat_ngram_size:
        banned = _completes_ngram(texts, rules.no_repeat_ngram_size, scores.shape[1])
        scores = jnp.where(banned, -jnp.inf, scores)
    if rules.min_new_tokens is not None:
        is_short = texts.length - texts.prompt_length < rules.min_new_tokens
        is_stop = _one_hot(rules.stop_ids, scores.shape[1])
        scores = jnp.where(is_short[:, None] & is_stop, -jnp.inf, scores)
    return scores


def draw(scores: Scores, texts: Texts, rules: Rules) -> Tokens:
    """One token a row: the best, or one by chance among the candidates that remain."""
    if rules.temperature is None:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    # A row with temperature 0 takes the best token beside rows that do not.
    is_greedy = rules.temperature == 0
    scores = scores / jnp.where(is_greedy, 1, rules.temperature)[:, None]
    ranked, ids = candidates(scores, rules)
    keys = jax.vmap(_key)(rules.seed, rules.stream, texts.length - texts.prompt_length)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, ranked.shape[1:], ranked.dtype))(keys)
    rank = jnp.argmax(ranked + jnp.where(is_greedy[:, None], 0, noise), axis=-1)
    token = jnp.take_along_axis(ids, rank[:, None], axis=1)[:, 0]
    return jnp.where(is_greedy, jnp.argmax(scores, axis=-1), token).astype(jnp.int32)


def candidates(
    scores: Scores, rules: Rules
) -> tuple[Float[Array, "batch candidates"], Int[Array, "batch candidates"]]:
    """The tokens that may be drawn, and their scores; -inf for those that may not.

    They come ranked, the best first, where a rule asks for ranks.
    """
    V = scores.shape[1]
    filters = (rules.top_k, rules.top_p, rules.min_p, rules.typical_p)
    if all(rule is None for rule in filters):
        return scores, jnp.broadcast_to(jnp.arange(V), scores.shape)
    ranked, ids = jax.lax.top_k(scores, min(rules.num_candidates or V, V))
    if rules.top_k is not None:
        ranked = jnp.where(
            jnp.arange(ranked.shape[1]) < rules.top_k[:, None], ranked, -jnp.inf
        )
    if rules.top_p is not None:
        probs = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        is_best = jnp.arange(ranked.shape[1]) == 0
        ranked = jnp.where(is_best | (before < rules.top_p[:, None]), ranked, -jnp.inf)
    if rules.min_p is not None:
        probs = jax.nn.softmax(ranked, axis=-1)
        ranked = jnp.where(probs < rules.min_p[:, None] * probs[:, :1], -jnp.inf, ranked)
    if rules.typical_p is not None:
        ranked = _typical(ranked, rules.typical_p)
    return ranked, ids


def is_stop(token: Tokens, rules: Rules) -> Bool[Array, " batch"]:
    """Whether a token ends its row's text."""
    return (token[:, None] == rules.stop_ids).any(axis=-1)


def _key(seed: jax.Array, stream: jax.Array, step: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), step)


def _typical(ranked: jax.Array, mass: jax.Array) -> jax.Array:
    """Keeps tokens whose surprise is nearest to the expected one (Meister et al., 2022)."""
    log_probs = jax.nn.log_softmax(ranked, axis=-1)
    probs = jnp.exp(log_probs)
    entropy = -jnp.where(probs > 0, probs * log_probs, 0).sum(axis=-1, keepdims=True)
    distance = jnp.abs(-log_probs - entropy)
    order = jnp.argsort(distance, axis=-1)
    reached = jnp.cumsum(jnp.take_along_axis(probs, order, axis=-1), axis=-1)
    last = jnp.minimum((reached < mass[:, None]).sum(axis=-1), ranked.shape[1] - 1)
    farthest = jnp.take_along_axis(order, last[:, None], axis=-1)
    limit = jnp.take_along_axis(distance, farthest, axis=-1)
    nearest = jnp.arange(ranked.shape[1]) == order[:, :1]
    return jnp.where((distance <= limit) | nearest, ranked, -jnp.inf)


def _add_bias(scores: Scores, texts: Texts, rules: Rules) -> Scores:
    assert rules.bias_prefix is not None and rules.bias is not None
    longest = rules.bias_prefix.shape[2]
    places = texts.length[:, None] - longest + jnp.arange(longest)
    tail_BP = jnp.take_along_axis(texts.ids, jnp.maximum(places, 0), axis=1)
    tail_BP = jnp.where(places < 0, -2, tail_BP)  # before the text: matches nothing
    agrees = (rules.bias_prefix == -1) | (rules.bias_prefix == tail_BP[:, None])
    bias_BS = jnp.where(agrees.all(axis=-1), rules.bias, 0)
    rows = jnp.arange(scores.shape[0])[:, None]
    return scores.at[rows, rules.bias_last].add(bias_BS)


def _completes_ngram(texts: Texts, size: int, vocab: int) -> Bool[Array, "batch vocab"]:
    """Tokens that would make the text's last `size` tokens occur a second time in it."""
    ids_BL, length_B1 = texts.ids, texts.length[:, None]
    starts = ids_BL.shape[1] - size + 1
    if starts < 1:
        return jnp.zeros((ids_BL.shape[0], vocab), bool)
    repeats_BL = jnp.arange(starts) + size <= length_B1
    for i in range(size - 1):
        place = jnp.maximum(length_B1 - size + 1 + i, 0)
        last_B1 = jnp.take_along_axis(ids_BL, place, axis=1)
        repeats_BL &= ids_BL[:, i : i + starts] == last_B1
    follows_BL = ids_BL[:, size - 1 :]
    return _one_hot(jnp.where(repeats_BL, follows_BL, -1), vocab)


def _one_hot(ids: Int[Array, "batch any"], vocab: int) -> Bool[Array, "batch vocab"]:
    """True at each of a row's ids; negative ones are none."""
    rows = jnp.arange(ids.shape[0])[:, None]
    place = jnp.where(ids < 0, vocab, ids)
    return jnp.zeros((ids.shape[0], vocab), bool).at[rows, place].set(True, mode="drop")
