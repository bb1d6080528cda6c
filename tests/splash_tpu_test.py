"""Splash as the real TPU compiler sees it: every generation's blocks fit its memory."""

import functools

import jax
import jax.numpy as jnp
import pytest

import tpu_compiler
from neo_jax import sharding
from neo_jax.attention import attend
from neo_jax.config import MeshConfig


def compile_gradient(topology: str, head_dim: int, seq: int, **mesh: int) -> str:
    """The text of a compiled program: a global and a local layer, and their gradients."""
    over = tpu_compiler.mesh(topology, MeshConfig(**mesh))
    batch, heads = over.shape["data"] * over.shape["fsdp"], 2 * over.shape["tensor"]
    shape = (batch, seq, heads, head_dim)
    place = functools.partial(sharding.named_sharding, over)
    x = jax.ShapeDtypeStruct(
        shape, jnp.bfloat16, sharding=place(("batch", "seq", "heads", None), shape)
    )
    ids = jax.ShapeDtypeStruct(
        shape[:2], jnp.int32, sharding=place(("batch", "seq"), shape[:2])
    )

    def gradient(q, k, v, ids):
        def total(q, k, v):
            x = attend(q, k, v, window=None)
            x = attend(x, k, v, window=256, segment_ids=ids)
            return jnp.sum(jnp.sin(x.astype(jnp.float32)))

        return jax.grad(total, argnums=(0, 1, 2))(q, k, v)

    with jax.set_mesh(over):
        return jax.jit(gradient).lower(x, x, x, ids).compile().as_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "head_dim", "seq", "mesh"),
    [
        ("v5e:2x2", 64, 2048, {}),
        ("v5e:2x2", 80, 1300, {"tensor": 2}),
        ("v5e:2x2", 128, 4096, {"context": 2}),
        ("v4:2x2x1", 128, 2048, {}),
        ("v5p:2x2x1", 128, 2048, {}),
        ("v6e:2x2", 128, 2048, {}),
        ("v3:2x2", 128, 2048, {}),
    ],
)
def test_splash_compiles_for(topology, head_dim, seq, mesh):
    text = compile_gradient(topology, head_dim, seq, **mesh)
    for kernel in ("fwd", "fwd_segmented", "dkv", "dkv_segmented", "dq_segmented"):
        assert f"splash_mha_{kernel}" in text, kernel
