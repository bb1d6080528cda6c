"""Weights in int8 for decoding: a quarter of float32's bytes, half of bfloat16's.

Enters: a decoder's kernels. Leaves: modules of the same behaviour with int8 kernels and a
float32 scale for each output channel, its largest magnitude over 127. Activations stay as they
are.

Embeddings and LayerNorms keep their type; the head, a tenth to a third of what a token reads,
becomes an int8 matrix of its own where it was tied.

Shapes: B batch, T position, D embed, V vocab, I and O all input and output dimensions as one,
G and J input dimension split in two.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from neo_jax import int8
from neo_jax.model import Linear, product
from neo_jax.sharding import target

# XLA's CPU products do not take int8. For one token the product is written as so many
# multiply-adds of long vectors, which it turns into loops that convert in registers: 0.9 to
# 1.7 ms for 28 million weights where a float32 product takes 2.5 and one that converts
# first 28 (two cores of an AMD EPYC with AVX-512; docs/lab_log.md).
_TERMS = 16


class Int8Linear(nnx.Module):
    """`model.Linear` with an int8 kernel."""

    def __init__(self, kernel: Array, equation: str, bias: nnx.Param | None):
        _, names, out = equation.replace("->", ",").split(",")
        self.equation = equation
        summed = tuple(i for i, name in enumerate(names) if name not in out)
        values, scale = int8.quantise(kernel, summed)
        self.kernel, self.scale = nnx.Param(values), nnx.Param(scale)
        self.bias = bias
        self.num_summed = len(summed)

    def __call__(self, x: Array, dropout_keys: None = None) -> Array:
        """As `Linear`, which takes keys where it has an adapter that drops out."""
        rows = x.size * self.scale.size // self.kernel.size
        if rows == 1 and target().platform == "cpu":
            y = self._one_row(x)
        else:
            y = product(self.equation, x, self.kernel[...].astype(x.dtype))
        y = (y * self.scale[...]).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def _one_row(self, x: Array) -> Array:
        # Bound to the token, lest XLA converts the kernel once for all, before the loop over
        # tokens, which then would read four bytes a weight.
        kernel, x = jax.lax.optimization_barrier((self.kernel[...], x))
        lead = x.shape[: x.ndim - self.num_summed]
        J = _TERMS if x.size % _TERMS == 0 else 1
        x_JG1 = x.reshape(J, -1, 1)
        kernel_JGO = kernel.reshape(J, x_JG1.shape[1], -1)
        terms = (x_JG1[j] * kernel_JGO[j].astype(x.dtype) for j in range(J))
        terms_GO = functools.reduce(jnp.add, terms)
        # A product, not a sum: XLA would draw the terms into a sum's loop, seven times slower.
        y_O = jnp.ones(terms_GO.shape[0], x.dtype) @ terms_GO
        return y_O.reshape(*lead, *kernel.shape[self.num_summed :])


def quantised(linear: Linear) -> Int8Linear:
    """The same layer in int8."""
    return Int8Linear(linear.kernel[...], linear.equation, linear.bias)


def quantised_head(head: Float[Array, "vocab embed"]) -> Int8Linear:
    """The output matrix in int8, [embed, vocab], so that its outputs lie side by side."""
    return Int8Linear(head.T, "BTD,DV->BTV", None)
