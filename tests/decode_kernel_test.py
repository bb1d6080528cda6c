"""The kernel that writes a token on a TPU: equal to NumPy, and to decoding without it."""

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from neo_jax import config as config_lib
from neo_jax import hf, sharding
from neo_jax.attention import decode
from neo_jax.generate import Generator, from_keywords
from neo_jax.model import NeoLM
from neo_jax.planning import decoding, topologies

B, N, H = 4, 6, 16
MODEL = config_lib.preset_model(
    "tiny",
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    window_size=128,
    vocab_size=97,
    max_seq_len=256,
    compute_dtype="float32",
)


def seen(held: int, slots: int, window: int | None) -> list[int]:
    """Positions of the cached tokens that the next one sees."""
    first = max(0, held - slots, 0 if window is None else held - window + 1)
    return list(range(first, held))


def averaged(query, key, value, keys, values, held, window):
    """softmax(q·k) · v in float64; `keys` and `values` [batch, heads, head_dim, slots]."""
    out = np.zeros_like(query)
    for row, count in enumerate(held):
        slots = [p % keys.shape[-1] for p in seen(count, keys.shape[-1], window)]
        k = np.concatenate([keys[row][..., slots], key[row][..., None]], axis=-1)
        v = np.concatenate([values[row][..., slots], value[row][..., None]], axis=-1)
        scores = np.einsum("nh,nhs->ns", query[row], k)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[row] = np.einsum("ns,nhs->nh", weights / weights.sum(-1, keepdims=True), v)
    return out


def as_cache(x: np.ndarray, beside: int) -> jax.Array:
    """[batch, heads, head_dim, slots] as registers, `beside` heads in one."""
    parts = x.reshape(B, N // beside, beside * H, x.shape[-1])
    return jnp.asarray(parts.swapaxes(2, 3), jnp.float32)


@pytest.mark.parametrize("beside", [1, 2])
@pytest.mark.parametrize(
    ("slots", "window", "held"),
    [
        (256, None, (0, 1, 128, 255)),
        (256, 200, (0, 255, 256, 3000)),
    ],
)
def test_it_is_the_softmax_average_and_writes_the_token(
    beside: int,
    slots: int,
    window: int | None,
    held: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode, "_BLOCK_BYTES", 1)  # several blocks a cache
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, B, N, H))
    keys, values = rng.standard_normal((2, B, N, H, slots))
    given = [jnp.asarray(x, jnp.float32) for x in (query, key, value)]
    context, after = decode.decode_attention(
        *given,
        decode.Cached(*given[1:]),
        decode.Cached(as_cache(keys, beside), as_cache(values, beside)),
        jnp.asarray(held, jnp.int32),
        window=window,
        interpret=True,
    )
    expected = averaged(query, key, value, keys, values, held, window)
    assert np.allclose(context, expected, atol=1e-5)
    for new, old, made in ((key, keys, after.keys), (value, values, after.values)):
        made = np.asarray(made).swapaxes(2, 3).reshape(B, N, H, slots)
        for row, count in enumerate(held):
            kept = [p % slots for p in seen(count, slots, None) if p % slots != count % slots]
            assert np.allclose(made[row][..., count % slots], new[row])
            assert np.array_equal(made[row][..., kept], np.float32(old[row][..., kept]))


@pytest.mark.parametrize(
    ("num_heads", "head_dim", "count"), [(12, 64, 2), (16, 128, 1), (3, 64, 1), (9, 32, 3)]
)
def test_small_heads_share_a_register(num_heads: int, head_dim: int, count: int) -> None:
    assert decode.side_by_side(num_heads, head_dim) == count


@functools.cache
def weights():
    # Larger than at birth, so that one token is clearly the best.
    graph, params = nnx.split(NeoLM(MODEL, nnx.Rngs(params=0)))
    return graph, jax.tree.map(lambda w: w * 3, nnx.to_pure_dict(params))


@functools.cache
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, MODEL.vocab_size, length).tolist() for length in (1, 60, 127, 129)]


def write(generator: Generator, cache_dtype: str) -> list[list[int]]:
    options = from_keywords({"max_new_tokens": 120, "cache_dtype": cache_dtype})
    return [text.token_ids for text in generator.write(prompts(), options)]


@contextlib.contextmanager
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Has the kernel run here, by JAX's interpreter; gives a list that grows with each use."""
    run, calls = decode.decode_attention, []

    def count(*args, **kwargs):
        calls.append(1)
        return run(*args, **kwargs, interpret=True)

    monkeypatch.setattr(decode, "compiles_for", lambda generation: True)
    monkeypatch.setattr(decode, "decode_attention", count)
    jax.clear_caches()  # programs that were traced without it
    yield calls
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache_dtype", "sizes"),
    [
        ("auto", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("auto", {}),
        ("int8", {}),
        ("int8", {"fsdp": 1, "tensor": 4, "data": 2}),
    ],
)
def test_texts_are_those_that_are_written_without_it(
    cache_dtype: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write(Generator(MODEL, *weights(), None), cache_dtype)
    graph, params = weights()
    if sizes:
        mesh = sharding.make_mesh(config_lib.MeshConfig(**sizes))
        places = jax.tree.map(lambda x: x.sharding, hf.abstract_params(MODEL, mesh=mesh))
        params = jax.device_put(params, places)
    with interpreted(monkeypatch) as calls:
        found = write(Generator(MODEL, graph, params, None), cache_dtype)
    assert calls, "the kernel was not asked"
    assert found == expected


# ------------------------------------------------------------------------ the real compiler


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4-8", "v5e-1", "v5p-8", "v6e-1", "tpu7x-8"])
@pytest.mark.parametrize(
    ("heads", "head_dim", "slots", "window", "dtype"),
    [
        (20, 128, 2048, None, "bfloat16"),
        (16, 128, 256, 256, "int8"),
        (12, 64, 2048, None, "bfloat16"),
        (16, 64, 256, 256, "int8"),
        (12, 64, 1024, None, "float32"),
    ],
)
def test_every_generation_compiles_it_in_place(
    name: str, heads: int, head_dim: int, slots: int, window: int | None, dtype: str
) -> None:
    pytest.importorskip("libtpu")
    topology = topologies.parse(name, 1)
    mesh = Mesh(np.array(topologies.devices(topology)[:1]), ("x",))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def array(*shape: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=everywhere)

    def scales(*shape: int) -> list[jax.ShapeDtypeStruct]:
        return [array(*shape, dtype="float32")] * 2 if dtype == "int8" else []

    assert decode.compiles_for(topology.kind)
    beside = decode.side_by_side(heads, head_dim)
    shape = (8, heads // beside, slots, beside * head_dim)
    kind = "float32" if dtype == "float32" else "bfloat16"

    def step(*operands: Any) -> Any:
        context, cache = decode.decode_attention(*operands, window=window)
        # Something behind it, as in a model: XLA fails where a kernel with operands that must
        # stay in HBM gives the program's own result.
        return 2 * context, cache

    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(step, donate_argnums=4)
            .lower(
                *[array(8, heads, head_dim, dtype=kind)] * 3,
                decode.Cached(*[array(8, heads, head_dim)] * 2, *scales(8, heads)),
                decode.Cached(*[array(*shape)] * 2, *scales(8, heads, slots)),
                array(8, dtype="int32"),
            )
            .compile()
        )
    sizes = compiled.memory_analysis()
    assert sizes.temp_size_in_bytes < 0.25 * sizes.alias_size_in_bytes  # no cache is copied


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_no_cache_is_brought_to_the_chips_own_memory_and_back(dtype: str) -> None:
    pytest.importorskip("libtpu")
    tree = config_lib.default_config()
    tree.model = config_lib.preset("neo_125m")
    tree.model.num_layers = 4
    tree.model.param_dtype = "bfloat16"
    options = from_keywords({"batch_size": 8, "cache_dtype": dtype, "max_new_tokens": 1})
    topology = topologies.parse("v5e-1", 1)
    lowered = decoding.lower(config_lib.build(tree), topology, options, 2048).lowered
    text = lowered.compile().as_text() or ""
    kinds = re.findall(r"\w+\[8,6,(?:256|2048),128\]\{[^}]*\}", text)
    assert kinds and not [kind for kind in kinds if "S(1)" in kind]
