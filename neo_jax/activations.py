"""The functions between an MLP's two products, by transformers' names.

Enters: any float array. Leaves: one of the same shape and type. Names that mean the same
function are told by hf/configs.py.

Source: Hugging Face transformers, activations.py (ACT2FN).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

gelu = functools.partial(jax.nn.gelu, approximate=False)


def laplace(x: Array) -> Array:
    """A Gaussian's integral, with the mean √½ and the deviation √(1/4π) of Ma et al. 2022.

    Source: "Mega: Moving Average Equipped Gated Attention"; the digits are transformers'.
    """
    return 0.5 * (1 + jax.lax.erf((x - 0.707107) / (0.282095 * 2**0.5)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),  # the tanh form
    "gelu": gelu,
    "gelu_10": lambda x: jnp.clip(gelu(x), -10, 10),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "leaky_relu": functools.partial(jax.nn.leaky_relu, negative_slope=0.01),
    "silu": jax.nn.silu,
    "hardswish": jax.nn.hard_swish,
    "mish": jax.nn.mish,
    "laplace": laplace,
    "sigmoid": jax.nn.sigmoid,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "tanh": jnp.tanh,
    "linear": lambda x: x,
}
