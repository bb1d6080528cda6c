"""What each layer remembers of a text: the keys and values of its tokens.

Enters: keys and values of new tokens [batch, seq, heads, head_dim] and their positions.
Leaves: the context of their queries, and a cache that holds them.

A global layer's cache has a slot for every position. A local layer sees `window` keys, so its
cache is a ring of `window` slots, and of one more for each token beside the first that comes
in the same call: token p lies in slot p mod S, and what it displaces is out of every later
query's sight. A global layer's cache is a ring that never comes round, so both are one piece
of code. Which token a slot holds follows from the number of tokens, and is stored nowhere.

int8 caches keep one scale for each token and head: the largest magnitude over 127.

Shapes: B batch, T query position, S slot, N heads, H head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from neo_jax.config import ModelConfig
from neo_jax.model import compute_dtype
from neo_jax.sharding import constrain

Heads = Float[Array, "batch seq heads head_dim"]
_INT8_MAX = 127


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "value", "key_scale", "value_scale"],
    meta_fields=["window"],
)
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, [batch, heads, slots, head_dim].

    `window` is None in a global layer. The scales, [batch, heads, slots] in float32, are there
    in int8 caches only.
    """

    key: Any  # a jax.Array, or what stands for one in trees of shapes and shardings
    value: Any
    key_scale: Any
    value_scale: Any
    window: int | None

    @property
    def num_slots(self) -> int:
        """Tokens that it can hold."""
        return int(self.key.shape[2])


Caches = tuple[LayerCache, ...]  # one a layer, from the bottom up


def empty(
    config: ModelConfig, *, batch_size: int, capacity: int, chunk: int, dtype: str
) -> Caches:
    """Caches without a token.

    Args:
      config: the model's.
      batch_size: rows.
      capacity: tokens of the longest text, prompt and continuation together.
      chunk: the most tokens that enter in one call.
      dtype: "auto" (that of the activations), "bfloat16", "float32", "float64" or "int8".
    """
    kind = compute_dtype(config) if dtype == "auto" else jnp.dtype(dtype)

    def one_layer(attention_type: str) -> LayerCache:
        window = config.window_size if attention_type == "local" else None
        slots = capacity if window is None else min(capacity, window + chunk - 1)
        shape = (batch_size, config.num_heads, slots, config.head_dim)

        def zeros(shape: tuple[int, ...], kind: jnp.dtype) -> jax.Array:
            names = ("batch", "heads", None, None)[: len(shape)]
            return constrain(jnp.zeros(shape, kind), *names)

        def scale() -> jax.Array | None:
            return zeros(shape[:3], jnp.dtype("float32")) if kind == jnp.int8 else None

        return LayerCache(zeros(shape, kind), zeros(shape, kind), scale(), scale(), window)

    return tuple(one_layer(attention_type) for attention_type in config.layer_types)


def fit(caches: Caches, length: Int[Array, " batch"], chunk: int) -> Caches:
    """The same tokens in rings for calls of at most `chunk` tokens.

    Args:
      caches: of a larger chunk.
      length: tokens written so far, of each row.
      chunk: the most tokens that enter in one call from now on.
    """

    def one_layer(cache: LayerCache) -> LayerCache:
        if cache.window is None or cache.num_slots <= cache.window + chunk - 1:
            return cache
        slots = cache.window + chunk - 1
        # Slot s of the new ring takes the newest token that belongs there.
        from_BS = _held(length, slots) % cache.num_slots

        def move(x_BNS: jax.Array) -> jax.Array:
            index = from_BS.reshape(from_BS.shape[0], 1, slots, *[1] * (x_BNS.ndim - 3))
            return jnp.take_along_axis(x_BNS, index, axis=2)

        return jax.tree.map(move, cache)

    return tuple(one_layer(cache) for cache in caches)


@dataclasses.dataclass(frozen=True)
class Step:
    """A layer's cache during one call, with what all layers share; a `model.Memory`.

    `positions` [batch, seq] are those of the new tokens, -1 where there is none; `length`
    [batch] counts the tokens that each row's cache holds after this call.
    """

    cache: LayerCache
    positions: Int[Array, "batch seq"]
    length: Int[Array, " batch"]

    def attend(self, query: Heads, key: Heads, value: Heads) -> tuple[Heads, Step]:
        """See `model.Memory`. A row without a token keeps its cache, and gets some average."""
        cache = _write(self.cache, key, value, self.positions)
        mask_BTS = self._mask(cache)
        context = _softmax_average(query, cache, mask_BTS)
        return context, dataclasses.replace(self, cache=cache)

    def _mask(self, cache: LayerCache) -> Bool[Array, "batch query slot"]:
        held_B1S = _held(self.length, cache.num_slots)[:, None]
        distance_BTS = self.positions[:, :, None] - held_B1S
        mask_BTS = (held_B1S >= 0) & (distance_BTS >= 0)
        return mask_BTS if cache.window is None else mask_BTS & (distance_BTS < cache.window)


def _held(length: Int[Array, " batch"], slots: int) -> Int[Array, "batch slots"]:
    """Position of the token in each slot after `length` of them; negative where none is."""
    last_B1 = length[:, None] - 1
    return last_B1 - (last_B1 - jnp.arange(slots)) % slots


def _write(
    cache: LayerCache, key: Heads, value: Heads, positions: Int[Array, "batch seq"]
) -> LayerCache:
    rows_B1 = jnp.arange(positions.shape[0])[:, None]
    # A slot that does not exist: what goes there is dropped.
    slots_BT = jnp.where(positions < 0, cache.num_slots, positions % cache.num_slots)

    def put(into: jax.Array, what: jax.Array) -> jax.Array:
        return into.at[rows_B1, :, slots_BT].set(what.astype(into.dtype), mode="drop")

    if cache.key_scale is None or cache.value_scale is None:
        return dataclasses.replace(
            cache, key=put(cache.key, key), value=put(cache.value, value)
        )
    key, key_scale = _quantise(key)
    value, value_scale = _quantise(value)
    return dataclasses.replace(
        cache,
        key=put(cache.key, key),
        value=put(cache.value, value),
        key_scale=put(cache.key_scale, key_scale),
        value_scale=put(cache.value_scale, value_scale),
    )


def _quantise(x: Heads) -> tuple[jax.Array, jax.Array]:
    """int8 numbers, and the scale of each token and head by which they are multiplied."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axis=-1), jnp.finfo(jnp.float32).tiny) / _INT8_MAX
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def _softmax_average(
    q_BTNH: jax.Array, cache: LayerCache, mask_BTS: Bool[Array, "batch query slot"]
) -> jax.Array:
    """softmax(q·k) · v with scores and softmax in at least float32."""
    float_type = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    k_BNSH, v_BNSH = cache.key.astype(q_BTNH.dtype), cache.value.astype(q_BTNH.dtype)
    scores_BNTS = jnp.einsum(
        "BTNH,BNSH->BNTS", q_BTNH, k_BNSH, preferred_element_type=float_type
    )
    if cache.key_scale is not None:
        scores_BNTS *= cache.key_scale[:, :, None]
    # Finite, so that a row that sees nothing (one without a token) holds no NaN.
    scores_BNTS = jnp.where(mask_BTS[:, None], scores_BNTS, jnp.finfo(float_type).min)
    probs_BNTS = jax.nn.softmax(scores_BNTS, axis=-1)
    if cache.value_scale is not None:
        probs_BNTS *= cache.value_scale[:, :, None]
    return jnp.einsum("BNTS,BNSH->BTNH", probs_BNTS.astype(q_BTNH.dtype), v_BNSH)
