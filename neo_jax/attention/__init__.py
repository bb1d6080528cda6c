"""GPT-Neo's attention: causal, over all earlier tokens or over a window of them.

Enters: queries, keys and values [batch, seq, heads, head_dim]. Leaves: the context of each
query, of the same shape. `attend` chooses between the paths below by what the program is
compiled for; all agree with `dense.reference_attention`, which is the definition.

    reference  dense.py   all scores, then a mask
    banded     dense.py   XLA, only the scores that the mask can let through
    splash     splash.py  Pallas kernels for TPU
    cudnn      cudnn.py   cuDNN's kernels for NVIDIA GPUs

Where the mesh splits the sequence, context.py fetches the keys that a device lacks.

Source: EleutherAI/gpt-neo, models/gpt2/gpt2.py. Unlike Vaswani et al. (2017), scores are not
divided by sqrt(head_dim): the original folds that scale into the queries' initial weights.
A local layer's query at p sees the `window` keys p-window+1 … p, its own included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from neo_jax import sharding
from neo_jax.attention import context, cudnn, splash
from neo_jax.attention.dense import banded_attention, causal_mask, reference_attention

__all__ = ["CONTEXT", "attend", "banded_attention", "causal_mask", "reference_attention"]

Heads = Float[Array, "batch seq heads head_dim"]
Segments = Int[Array, "batch seq"]

# What a rematerialisation policy calls the result: on TPU the kernel's own residuals.
CONTEXT = "context"


def attend(
    query: Heads,
    key: Heads,
    value: Heads,
    *,
    window: int | None,
    segment_ids: Segments | None = None,
    path: str = "auto",
) -> Heads:
    """Causal attention by the path that suits the machine.

    The machine is that of `sharding.target()`: the mesh that is set says it, also where a
    program is compiled for a TPU on a machine without one.

    Args:
      window: keys that a query sees, its own included; None for all earlier ones.
      segment_ids: tokens see only tokens of their own segment; None: all are one segment.
      path: "auto" or a name of the list above. "splash" without a TPU is interpreted.

    Raises:
      ValueError: "cudnn" without an NVIDIA GPU, or what cuDNN cannot do.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else dict(mesh.shape)
    ways = sizes.get("context", 1)
    if path == "auto":
        path = _choose(query, ways)
    run = functools.partial(_paths()[path], window=window)
    # Of plain products the partitioner makes parts by itself; a kernel it cannot look into.
    if mesh.empty or mesh.size == 1 or (ways == 1 and path in ("reference", "banded")):
        return run(query, key, value, segment_ids, segment_ids, before=0)

    def on_one_device(q: Array, k: Array, v: Array, *ids: Array) -> Array:
        own = ids[0] if ids else None
        if ways == 1:
            return run(q, k, v, own, own, before=0)
        own = jnp.zeros(q.shape[:2], jnp.int32) if own is None else own
        k, v, of_keys, before = context.with_keys_before(k, v, own, window=window, ways=ways)
        return run(q, k, v, own, of_keys, before=before)

    heads = sharding.partition_spec(("batch", "seq", "heads", None), query.shape, sizes)
    tokens = sharding.partition_spec(("batch", "seq"), query.shape[:2], sizes)
    segments = () if segment_ids is None else (segment_ids,)
    return jax.shard_map(
        on_one_device,
        in_specs=(heads, heads, heads, *(tokens for _ in segments)),
        out_specs=heads,
        check_vma=False,  # Pallas kernels do not say over which axes their results vary
    )(query, key, value, *segments)


def _choose(query: Array, ways: int) -> str:
    """The fastest path that can compute this on the target; `ways` split the sequence."""
    target = sharding.target()
    if target.platform == "tpu":
        return "splash"
    if target.is_nvidia and ways == 1 and cudnn.supports(query.dtype, query.shape[-1]):
        return "cudnn"
    return "banded"


def _paths() -> Mapping[str, Callable[..., Array]]:
    target = sharding.target()

    def named(run: Callable[..., Array]) -> Callable[..., Array]:
        return lambda *args, **kwargs: checkpoint_name(run(*args, **kwargs), CONTEXT)

    return {
        "reference": named(reference_attention),
        "banded": named(banded_attention),
        "splash": functools.partial(
            splash.splash_attention, generation=target.generation, residuals=CONTEXT
        ),
        "cudnn": named(functools.partial(cudnn.cudnn_attention, is_nvidia=target.is_nvidia)),
    }
