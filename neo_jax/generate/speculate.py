"""Guesses at the next tokens, which one pass of the network then checks all at once.

Enters: the texts so far. Leaves: a few tokens for each that may follow. Greedy text is the
same with any guesses; good ones save passes. Sources: Leviathan et al. (2023) for a smaller
model's guesses, Saxena (2023), "Prompt lookup decoding", for those from the text itself.

Shapes: B batch, L places of the text, K guesses.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from neo_jax.generate.cache import Caches
from neo_jax.generate.network import Decoder
from neo_jax.generate.sampling import Texts
from neo_jax.state import Params

_LONGEST_MATCH = 3  # tokens at the text's end that are looked for earlier in it

Guesses = Int[Array, "batch guesses"]


def look_up(texts: Texts, _: None, caches: None, *, count: int) -> tuple[Guesses, None]:
    """What followed the last place where the text read as it does at its end.

    A longer match goes before a later one. Without any match the guesses are arbitrary.
    """
    ids_BL, length_B1 = texts.ids, texts.length[:, None]
    places = jnp.arange(ids_BL.shape[1])
    # At place i: how many tokens up to and with i equal the text's last ones.
    matched_BL = jnp.zeros(ids_BL.shape, jnp.int32)
    still_BL = places < length_B1 - 1
    for back in range(_LONGEST_MATCH):
        last_B1 = jnp.take_along_axis(ids_BL, jnp.maximum(length_B1 - 1 - back, 0), axis=1)
        still_BL &= (jnp.roll(ids_BL, back, axis=1) == last_B1) & (places >= back)
        matched_BL += still_BL
    best = jnp.argmax(matched_BL * ids_BL.shape[1] + places, axis=1)[:, None]
    following = jnp.minimum(best + 1 + jnp.arange(count), ids_BL.shape[1] - 1)
    return jnp.take_along_axis(ids_BL, following, axis=1), caches


def ask_assistant(
    texts: Texts,
    params: Params,
    caches: Caches,
    *,
    graph: nnx.GraphDef[Decoder],
    count: int,
) -> tuple[Guesses, Caches]:
    """What a smaller model would write, greedily, one token after another.

    Its caches lack the text's last token, as the checking model's do. It reads its last guess
    as well, so that they do so again if all are right.
    """
    decoder = nnx.merge(graph, params)
    first_B = texts.length - 1
    token_B1 = jnp.take_along_axis(texts.ids, first_B[:, None], axis=1)
    capacity = texts.ids.shape[1]

    def read(
        carry: tuple[jax.Array, Caches], i: jax.Array
    ) -> tuple[tuple[jax.Array, Caches], jax.Array]:
        token_B1, caches = carry
        place_B = first_B + i
        positions_B1 = jnp.where(place_B < capacity, place_B, -1)[:, None]
        held_B = jnp.minimum(place_B + 1, capacity)
        hidden, caches = decoder.hidden(token_B1, positions_B1, held_B, caches)
        guess_B1 = decoder.logits(hidden).argmax(axis=-1).astype(jnp.int32)
        return (guess_B1, caches), guess_B1[:, 0]

    (_, caches), guesses = jax.lax.scan(read, (token_B1, caches), jnp.arange(count + 1))
    return guesses[:count].T, caches
