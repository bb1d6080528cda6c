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
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neo_jax.attention import decode
from neo_jax.config import ModelConfig
from neo_jax.model import compute_dtype, filled_up
from neo_jax.sharding import axes_of, constrain, partition_spec, target

Heads = Float[Array, "batch seq heads head_dim"]
_INT8_MAX = 127
# Of a lone text reading the weights is all the time; beside a kernel XLA fetches fewer of them
# beforehand where they are as large as 2.7B's.
_SMALL = 2048
_MOST_ROWS = 256  # that are written one after another, each an operation of the program


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "value", "key_scale", "value_scale"],
    meta_fields=["window", "in_registers"],
)
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """A layer's keys [batch, heads, head_dim, slots], values [batch, heads, slots, head_dim].

    Both lie as products want them, which would else copy them at each token. With
    `in_registers` they lie as the TPU's kernel reads them, [batch, registers, slots, lanes],
    small heads side by side (attention/decode.py). `window` is None in a global layer. The
    scales, [batch, heads, slots] in float32, are in int8 caches only.
    """

    key: Any  # a jax.Array, or what stands for one in trees of shapes and shardings
    value: Any
    key_scale: Any
    value_scale: Any
    window: int | None
    in_registers: bool = False

    @property
    def num_slots(self) -> int:
        """Tokens that it can hold."""
        return int(self.value.shape[2])

    @property
    def axis_of_keys(self) -> int:
        """The dimension of `key` that counts slots; of `value` it is the third."""
        return 2 if self.in_registers else 3


Caches = tuple[LayerCache, ...]  # one a layer, from the bottom up


def empty(
    config: ModelConfig,
    *,
    batch_size: int,
    capacity: int,
    chunk: int,
    dtype: str,
    for_kernels: bool = True,
) -> Caches:
    """Caches without a token.

    Args:
      config: the model's.
      batch_size: rows.
      capacity: tokens of the longest text, prompt and continuation together.
      chunk: the most tokens that enter in one call.
      dtype: "auto" (that of the activations), "bfloat16", "float32", "float64" or "int8".
      for_kernels: in the order that a kernel of the target wants, where there is one.
    """
    kind = compute_dtype(config) if dtype == "auto" else jnp.dtype(dtype)
    rows = _of_one_device("batch", batch_size)
    heads = _of_one_device("heads", config.num_heads)
    is_worth_it = for_kernels and (rows > 1 or config.embed_dim <= _SMALL)
    in_registers = is_worth_it and decode.compiles_for(target().generation)

    def one_layer(attention_type: str) -> LayerCache:
        window = config.window_size if attention_type == "local" else None
        slots = capacity if window is None else min(capacity, window + chunk - 1)
        B, N, H = batch_size, config.num_heads, config.head_dim

        def zeros(shape: tuple[int, ...], kind: jnp.dtype) -> jax.Array:
            names = ("batch", "heads", None, None)[: len(shape)]
            return constrain(jnp.zeros(shape, kind), *names)

        def scale() -> jax.Array | None:
            return zeros((B, N, slots), jnp.dtype("float32")) if kind == jnp.int8 else None

        key, value = zeros((B, N, H, slots), kind), zeros((B, N, slots, H), kind)
        if in_registers:
            count = decode.side_by_side(heads, H)
            shape = B, N // count, slots, count * H
            key, value = zeros(shape, kind), zeros(shape, kind)
        return LayerCache(key, value, scale(), scale(), window, in_registers)

    return tuple(one_layer(attention_type) for attention_type in config.layer_types)


def _of_one_device(name: str, total: int) -> int:
    """What a device of the mesh has of a dimension."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = () if mesh.empty else axes_of(name, mesh.shape)
    return total // math.prod(mesh.shape[axis] for axis in axes)


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

        def move(x: jax.Array | None, axis: int) -> jax.Array | None:
            if x is None:
                return None
            shape = [slots if i == axis else 1 for i in range(x.ndim)]
            shape[0] = x.shape[0]
            return jnp.take_along_axis(x, from_BS.reshape(shape), axis=axis)

        return LayerCache(
            move(cache.key, cache.axis_of_keys),
            move(cache.value, 2),
            move(cache.key_scale, 2),
            move(cache.value_scale, 2),
            cache.window,
            cache.in_registers,
        )

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
        if self._is_for_kernel(query):
            return self._by_kernel(query, key, value)
        context = self._softmax_average(filled_up(query), key, value)[:, : query.shape[1]]
        # So that the write waits for the read, which leaves it in place: without an order
        # between them XLA copies the cache, at each token. 0 × x is x's NaN, else 0.
        wait = 0 * context
        cache = _write(self.cache, key + wait, value + wait, self.positions, self._before())
        return context, dataclasses.replace(self, cache=cache)

    def _is_for_kernel(self, query: Heads) -> bool:
        """Whether a TPU writes a token of each text, out of caches that its kernel reads."""
        cache = self.cache
        return (
            query.shape[1] == 1
            and cache.in_registers
            and decode.supports(cache.key.shape, cache.key.dtype)
        )

    def _by_kernel(self, query: Heads, key: Heads, value: Heads) -> tuple[Heads, Step]:
        """One token of each text.

        Where a row has none, what is written takes the slot of its next token, which no query
        sees before.
        """
        layer = self.cache
        cache = decode.Cached(layer.key, layer.value, layer.key_scale, layer.value_scale)
        tokens = (query[:, 0], key[:, 0], value[:, 0])
        entry = decode.Cached(*tokens[1:])
        if layer.key_scale is not None:
            (key, key_scale), (value, value_scale) = map(_quantise, tokens[1:])
            entry = decode.Cached(key, value, key_scale, value_scale)
        arguments = (*tokens, entry, cache, self._before())
        run = functools.partial(decode.decode_attention, window=layer.window)
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty and mesh.size > 1:
            names = ("batch", "heads", None, None)
            specs = jax.tree.map(
                lambda x: partition_spec(names[: x.ndim], x.shape, mesh.shape), arguments
            )
            # Pallas kernels do not say over which axes their results vary.
            run = jax.shard_map(
                run, in_specs=specs, out_specs=(specs[0], specs[4]), check_vma=False
            )
        context, after = run(*arguments)
        cache_after = dataclasses.replace(
            layer,
            key=after.keys,
            value=after.values,
            key_scale=after.key_scales,
            value_scale=after.value_scales,
        )
        return context[:, None], dataclasses.replace(self, cache=cache_after)

    def _softmax_average(self, q_BTNH: Array, key_BTNH: Array, value_BTNH: Array) -> Array:
        """softmax(q·k) · v over the tokens in the cache and the new ones beside them.

        The cache is read as it was: XLA would copy one that is written before it is read.
        Scores and softmax are in at least float32.
        """
        cache, kind = self.cache, q_BTNH.dtype
        float_type = jnp.promote_types(kind, jnp.float32)
        product = functools.partial(jnp.einsum, preferred_element_type=float_type)
        keys, values = cache.key.astype(kind), cache.value.astype(kind)
        if cache.in_registers:
            keys, values = (_by_head(x, q_BTNH.shape[-1]) for x in (keys, values))
            keys = keys.swapaxes(2, 3)
        old_BNTS = product("BTNH,BNHS->BNTS", q_BTNH, keys)
        if cache.key_scale is not None:
            old_BNTS *= cache.key_scale[:, :, None]
        new_BNTS = product("BTNH,BSNH->BNTS", q_BTNH, key_BTNH)
        # Finite, so that a row that sees nothing (one without a token) holds no NaN.
        least = jnp.finfo(float_type).min
        old_mask, new_mask = self._masks(q_BTNH.shape[1])
        old_BNTS = jnp.where(old_mask, old_BNTS, least)
        new_BNTS = jnp.where(new_mask, new_BNTS, least)
        # The softmax over both, which need not lie in one array for it.
        largest_BNT1 = jnp.maximum(
            old_BNTS.max(axis=-1, keepdims=True), new_BNTS.max(axis=-1, keepdims=True)
        )
        old_BNTS, new_BNTS = jnp.exp(old_BNTS - largest_BNT1), jnp.exp(new_BNTS - largest_BNT1)
        total_BNT1 = old_BNTS.sum(axis=-1, keepdims=True) + new_BNTS.sum(-1, keepdims=True)
        if cache.value_scale is not None:
            old_BNTS *= cache.value_scale[:, :, None]
        old_BNTH = product("BNTS,BNSH->BNTH", old_BNTS.astype(kind), values)
        new_BNTH = product("BNTS,BSNH->BNTH", new_BNTS.astype(kind), value_BTNH)
        context_BNTH = (old_BNTH + new_BNTH) / total_BNT1
        return context_BNTH.swapaxes(1, 2).astype(kind)

    def _before(self) -> Int[Array, " batch"]:
        """Tokens that each row's cache held before this call."""
        return self.length - (self.positions >= 0).sum(axis=1)

    def _masks(self, num_queries: int) -> tuple[Array, Array]:
        """Which keys each query sees, [batch, 1, query, key]: of the slots, of the new ones.

        Queries beyond the tokens see nothing.
        """
        beyond = num_queries - self.positions.shape[1]
        queries_BT = jnp.pad(self.positions, [(0, 0), (0, beyond)], constant_values=-1)

        def mask(keys_BS: Array) -> Array:
            distance_BTS = queries_BT[:, :, None] - keys_BS[:, None]
            mask_BTS = (keys_BS[:, None] >= 0) & (distance_BTS >= 0)
            if self.cache.window is not None:
                mask_BTS &= distance_BTS < self.cache.window
            return mask_BTS[:, None]

        return mask(_held(self._before(), self.cache.num_slots)), mask(self.positions)


def _held(length: Int[Array, " batch"], slots: int) -> Int[Array, "batch slots"]:
    """Position of the token in each slot after `length` of them; negative where none is."""
    last_B1 = length[:, None] - 1
    return last_B1 - (last_B1 - jnp.arange(slots)) % slots


def _write(
    cache: LayerCache,
    key: Heads,
    value: Heads,
    positions: Int[Array, "batch seq"],
    before: Int[Array, " batch"],
) -> LayerCache:
    key_scale, value_scale = cache.key_scale, cache.value_scale
    if _is_written_by_row(positions):
        put = functools.partial(_put_by_row, slot=before % cache.num_slots)
    else:
        # A slot that does not exist: what goes there is dropped.
        slots_BT = jnp.where(positions < 0, cache.num_slots, positions % cache.num_slots)
        put = functools.partial(_put, slots=slots_BT)
    if key_scale is not None:
        key, new_key_scale = _quantise(key)
        value, new_value_scale = _quantise(value)
        key_scale = put(key_scale, new_key_scale, axis=2)
        value_scale = put(value_scale, new_value_scale, axis=2)
    if cache.in_registers:
        key, value = (x.reshape(*x.shape[:2], cache.key.shape[1], -1) for x in (key, value))
    key, value = put(cache.key, key, axis=cache.axis_of_keys), put(cache.value, value, axis=2)
    return LayerCache(key, value, key_scale, value_scale, cache.window, cache.in_registers)


def _by_head(x: Array, head_dim: int) -> Array:
    """[batch, registers, slots, lanes] → [batch, heads, slots, head_dim]."""
    B, G, S, L = x.shape
    parts_BGSPH = x.reshape(B, G, S, L // head_dim, head_dim)
    return parts_BGSPH.swapaxes(2, 3).reshape(B, -1, S, head_dim)


def _put(into: Array, what: Array, *, axis: int, slots: Int[Array, "batch seq"]) -> Array:
    """`what` [batch, seq, heads, …] in the slots, which are a dimension of `into`."""
    rows_B1 = jnp.arange(slots.shape[0])[:, None]
    index = (rows_B1, *[slice(None)] * (axis - 1), slots)
    return into.at[index].set(what.astype(into.dtype), mode="drop")


def _is_written_by_row(positions: Int[Array, "batch seq"]) -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    is_whole = mesh.empty or not axes_of("batch", mesh.shape)
    return (
        target().platform == "tpu"
        and is_whole
        and positions.shape[1] == 1
        and 1 < positions.shape[0] <= _MOST_ROWS
    )


def _put_by_row(into: Array, what: Array, *, axis: int, slot: Int[Array, " batch"]) -> Array:
    """As `_put`, one token a row; what a row without a token puts there is never seen.

    On a TPU a scatter over rows wants its slots in front of the heads, and would copy the
    caches into that order and back; an update of one row takes them as they are. (Of a lone
    row the scatter is better: more weights are fetched beforehand.) Where a row has no token,
    the slot is the one that its next token takes, which no query sees before.
    """
    what = jnp.moveaxis(what, 1, axis).astype(into.dtype)
    for row in range(slot.shape[0]):
        at: list[Any] = [row, *[0] * (axis - 1), slot[row], *[0] * (into.ndim - 1 - axis)]
        into = jax.lax.dynamic_update_slice(into, what[row : row + 1], at)
    return into


def _quantise(x: Float[Array, "*tokens head_dim"]) -> tuple[jax.Array, jax.Array]:
    """int8 numbers, and the scale of each token and head by which they are multiplied."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axis=-1), jnp.finfo(jnp.float32).tiny) / _INT8_MAX
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale
