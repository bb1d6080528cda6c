"""Low-rank adapters: a little that is learned beside kernels that are not.

Enters: a model's Linears and the settings `model.lora_*`. Leaves: for each Linear that they
name an `Adapter`, whose output is added to the Linear's, and `merge`, which puts what was
learned into the kernels, so that nothing of it costs anything afterwards.

Source: Hu et al. 2021, LoRA (arXiv:2106.09685); the initial values are those of Hugging Face's
peft, tuners/lora/layer.py.

Shapes: I and O all input and output dimensions of a kernel as one, R rank, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, UInt32

from neo_jax.config import ModelConfig
from neo_jax.int8 import quantise

# One generator's state for each sequence: what is dropped depends neither on how a batch is
# cut into slices nor on the devices.
RowKeys = UInt32[Array, "batch 2"]


class Adapter(nnx.Module):
    """x ↦ alpha / rank · (drop(x) · A) · B; B is 0 at first, and so is the output."""

    def __init__(
        self,
        config: ModelConfig,
        rngs: nnx.Rngs,
        *,
        name: str,
        equation: str,
        sizes: dict[str, int],
    ):
        given, kernel, out = equation.replace("->", ",").split(",")
        count = sum(letter not in out for letter in kernel)  # input dimensions stand first
        rank = config.lora_rank
        inner = "".join(letter for letter in given if letter not in kernel) + "R"
        self.down = f"{given},{kernel[:count]}R->{inner}"
        self.up = f"{inner},R{kernel[count:]}->{out}"
        names, shape = tuple(sizes), tuple(sizes.values())
        # Learned, and so kept in float32 beside bfloat16 kernels, too.
        dtype = jnp.promote_types(config.param_dtype, jnp.float32)
        bound = math.prod(shape[:count]) ** -0.5
        a = jax.random.uniform(
            rngs.params(), (*shape[:count], rank), dtype, minval=-bound, maxval=bound
        )
        self.a = nnx.Param(a, out_sharding=(*names[:count], "rank"), eager_sharding=False)
        self.b = nnx.Param(
            jnp.zeros((rank, *shape[count:]), dtype),
            out_sharding=("rank", *names[count:]),
            eager_sharding=False,
        )
        self.scale = config.lora_alpha / rank
        self.dropout = config.lora_dropout
        self.salt = zlib.crc32(name.encode()) >> 1  # Linears of one layer drop differently

    def __call__(self, x: Array, keys: RowKeys | None) -> Array:
        if keys is not None and self.dropout:
            x = self._dropped(x, keys)
        inner = jnp.einsum(self.down, x, self.a[...].astype(x.dtype))
        return self.scale * jnp.einsum(self.up, inner, self.b[...].astype(x.dtype))

    def _dropped(self, x: Array, keys: RowKeys) -> Array:
        kept = 1 - self.dropout

        def row(x: Array, key: Array) -> Array:
            key = jax.random.fold_in(jax.random.wrap_key_data(key), self.salt)
            return jnp.where(jax.random.bernoulli(key, kept, x.shape), x / kept, 0)

        return jax.vmap(row)(x, keys)


def row_keys(seed: int, step: Array, num_rows: int) -> RowKeys:
    """Keys for the rows of a step's batch."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    rows = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_rows))
    return jax.random.key_data(rows)


def layer_keys(keys: RowKeys, layer: Array | int) -> RowKeys:
    """The same rows' keys for one layer."""
    fold = jax.vmap(jax.random.fold_in, (0, None))
    return jax.random.key_data(fold(jax.random.wrap_key_data(keys), layer))


def merge(params: dict[str, Any], config: ModelConfig) -> tuple[dict[str, Any], ModelConfig]:
    """Parameters of the same model without adapters: kernels with A · B added to them.

    Kernels in int8 become float32: what was learned may be finer than their steps.

    Args:
      params: all of the model's.
      config: the model that they are of.
    """
    plain = dataclasses.replace(config, lora_rank=0, kernel_dtype="param")
    if not config.lora_rank and config.kernel_dtype == "param":
        return params, plain
    scale = config.lora_alpha / max(config.lora_rank, 1)

    def merged(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        node = dict(node)
        if "kernel_scale" in node:
            node["kernel"] = dequantise(node["kernel"], node.pop("kernel_scale"))
        if "adapter" in node:
            adapter = node.pop("adapter")
            node["kernel"] = _add(node["kernel"], adapter["a"], adapter["b"], scale)
        return {key: merged(inner) for key, inner in node.items()}

    return merged(params), plain


@functools.partial(jax.jit, static_argnames="scale")
def _add(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    """Kernels [layers, in…, out…] and the products of a [layers, in…, rank] and b."""
    a_LIR = a.reshape(a.shape[0], -1, a.shape[-1])
    b_LRO = b.reshape(*b.shape[:2], -1)
    change = jnp.einsum("LIR,LRO->LIO", a_LIR, b_LRO).reshape(kernel.shape)
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    return (kernel.astype(wide) + scale * change.astype(wide)).astype(kernel.dtype)


@jax.jit
def dequantise(kernel: Array, scale: Array) -> Array:
    """Float32 kernels [layers, in…, out…] of int8 ones and their scales [layers, out…]."""
    missing = kernel.ndim - scale.ndim
    shape = (scale.shape[0], *(1,) * missing, *scale.shape[1:])
    return kernel.astype(jnp.float32) * scale.reshape(shape)


def with_int8_kernels(params: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Parameters whose kernels are int8 where `like` has them so; the given ones are donated.

    Args:
      params: arrays as a checkpoint has them.
      like: shapes and shardings as the model wants them.
    """
    result = {}
    for key, inner in params.items():
        if not isinstance(inner, dict):
            result[key] = inner
        elif "kernel_scale" in like.get(key, {}):
            wanted = like[key]
            missing = wanted["kernel"].ndim - wanted["kernel_scale"].ndim
            turn = jax.jit(
                lambda kernel, missing=missing: quantise(kernel, range(1, 1 + missing)),
                out_shardings=(wanted["kernel"].sharding, wanted["kernel_scale"].sharding),
                donate_argnums=0,
            )
            kernel, scale = turn(inner["kernel"])
            result[key] = {**inner, "kernel": kernel, "kernel_scale": scale}
        else:
            result[key] = with_int8_kernels(inner, like.get(key, {}))
    return result
