"""Attention: the window and causality to the bit, segments, and every path alike.

Splash runs interpreted here; tests/splash_tpu_test.py compiles it for the chips. cuDNN's
kernels need an NVIDIA GPU: here the same call takes its XLA implementation, which checks what
is asked of it, and not how cuDNN answers.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo_jax import sharding
from neo_jax.attention import attend, causal_mask, cudnn, splash
from neo_jax.config import MeshConfig

PATHS = ("reference", "banded")


def random_heads(
    seq: int, *, batch: int = 2, heads: int = 3, head_dim: int = 5, seed: int = 0
):
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(rng.normal(size=(batch, seq, heads, head_dim)), jnp.float32)
        for _ in range(3)
    ]


def reached(path: str, seq: int, window: int | None, position: int) -> np.ndarray:
    """Whether each query's context changes, in any bit, with the key at `position`."""
    q, k, v = random_heads(seq)
    run = jax.jit(lambda k, v: attend(q, k, v, window=window, path=path))
    before = np.asarray(run(k, v))
    after = np.asarray(run(k.at[:, position].add(1.0), v.at[:, position].add(1.0)))
    return (before != after).any(axis=(0, 2, 3))


@pytest.mark.parametrize("path", [*PATHS, "splash"])
@pytest.mark.parametrize("position", [0, 1, 300])
def test_window_of_256_sees_255_back_and_not_256_back(path, position):
    """To the bit: a query sees its own key and the 255 before it, and nothing else."""
    changed = reached(path, 700, 256, position)
    expected = (np.arange(700) >= position) & (np.arange(700) < position + 256)
    np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("window", "seq"), [(1, 6), (2, 15), (7, 1), (7, 7), (7, 8), (7, 30), (30, 30)]
)
def test_any_window_is_exact(path, window, seq):
    position = seq // 3
    expected = (np.arange(seq) >= position) & (np.arange(seq) < position + window)
    np.testing.assert_array_equal(reached(path, seq, window, position), expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("position", [0, 255, 256, 512])
def test_global_attention_is_causal_to_the_bit(path, position):
    np.testing.assert_array_equal(
        reached(path, 600, None, position), np.arange(600) >= position
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [None, 9, 64])
def test_segments_do_not_see_each_other(path, window):
    q, k, v = random_heads(40)
    segments = jnp.asarray([[0] * 11 + [1] * 2 + [2] * 27, [5] * 40])
    run = jax.jit(functools.partial(attend, window=window, path=path))
    together = run(q, k, v, segment_ids=segments)
    bounds = [0, 11, 13, 40]
    alone = [run(q[:1, a:b], k[:1, a:b], v[:1, a:b]) for a, b in itertools.pairwise(bounds)]
    np.testing.assert_allclose(together[:1], jnp.concatenate(alone, axis=1), atol=1e-6)
    np.testing.assert_allclose(together[1:], run(q[1:], k[1:], v[1:]), atol=1e-6)


@pytest.mark.parametrize(
    ("seq", "window"),
    [(1, None), (257, None), (513, None), (256, 1), (257, 7), (255, 256), (513, 256)],
)
def test_paths_agree_in_values_and_gradients(seq, window):
    heads = random_heads(seq)
    segments = jnp.asarray(np.random.default_rng(3).integers(0, 2, (2, seq)).cumsum(1) // 40)

    def total(path, heads):
        context = attend(*heads, window=window, segment_ids=segments, path=path)
        return jnp.sum(jnp.sin(3 * context)), context

    values_and_gradients = [
        jax.jit(jax.value_and_grad(lambda h, p=path: total(p, h), has_aux=True))(heads)
        for path in PATHS
    ]
    (_, a), a_grads = values_and_gradients[0]
    (_, b), b_grads = values_and_gradients[1]
    np.testing.assert_allclose(b, a, atol=2e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x, atol=2e-5), a_grads, b_grads)


# Sequence, window, head_dim, and whether there are segments.
KERNEL_CASES = [
    (300, 256, 64, False),
    (300, None, 80, True),
    (130, 7, 128, True),
    (520, 256, 80, True),
]


def values_and_gradients(run, heads):
    """The context, and gradients of a sum that weighs its entries differently."""

    def total(heads):
        context = run(*heads)
        return jnp.sum(jnp.sin(3 * context)), context

    gradients, context = jax.jit(jax.grad(total, has_aux=True))(heads)
    return [context, *gradients]


def ragged_segments(batch: int, seq: int):
    """Documents of different lengths, then padding, which is of a segment of its own."""
    ids = np.random.default_rng(3).random((batch, seq)) < 0.03
    return jnp.asarray(np.where(np.arange(seq) < seq - 9, ids.cumsum(1), 10**6), jnp.int32)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("path", ["splash", "cudnn"])
@pytest.mark.parametrize(("seq", "window", "head_dim", "segmented"), KERNEL_CASES)
def test_kernels_equal_the_reference(path, seq, window, head_dim, segmented):
    heads = random_heads(seq, batch=2, heads=2, head_dim=head_dim)
    heads[0] = heads[0] / head_dim**0.5  # scores of the size that training sees
    ids = ragged_segments(2, seq) if segmented else None
    settings = {"window": window, "segment_ids": ids}
    if path == "splash":
        run = functools.partial(attend, path=path, **settings)
    else:
        run = lambda q, k, v: cudnn.cudnn_attention(  # noqa: E731
            *(q, k, v, ids, ids),
            window=window,
            before=0,
            is_nvidia=False,
            implementation="xla",
        )
    expected = values_and_gradients(
        functools.partial(attend, path="reference", **settings), heads
    )
    assert_same(values_and_gradients(run, heads), expected)


@pytest.mark.parametrize(
    ("length", "padded"), [(1, 128), (128, 128), (640, 640), (1025, 2048), (2048, 2048)]
)
def test_sequences_fill_whole_blocks(length, padded):
    blocks = splash.BLOCKS["v5e"][0]
    assert splash._padded(length, blocks) == padded


@pytest.mark.parametrize(
    ("path", "window", "seq", "segmented"),
    [
        ("banded", None, 48, True),
        ("banded", 7, 48, False),
        ("banded", 7, 48, True),
        ("banded", 12, 48, True),  # as long as a device's part
        ("banded", 30, 48, True),  # keys of three devices
        ("reference", 7, 48, True),
        ("splash", None, 600, False),
        ("splash", 256, 600, True),
    ],
)
def test_a_split_sequence_is_exact(path, window, seq, segmented):
    """Four devices to a sequence: the same values and gradients as one device's."""
    heads = random_heads(seq, batch=2, heads=2, head_dim=8)
    ids = ragged_segments(2, seq) if segmented else None
    settings = {"window": window, "segment_ids": ids}
    expected = values_and_gradients(
        functools.partial(attend, path="reference", **settings), heads
    )
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, context=4))
    with jax.set_mesh(mesh):
        place = sharding.named_sharding(mesh, ("batch", "seq", None, None), heads[0].shape)
        ours = values_and_gradients(
            functools.partial(attend, path=path, **settings), jax.device_put(heads, place)
        )
    assert_same(ours, expected)


def test_a_local_layer_fetches_no_more_than_its_window():
    """What travels between devices is window-1 keys and values, not the sequence."""
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, context=8))
    heads = [jax.ShapeDtypeStruct((1, 512, 2, 4), jnp.float32)] * 3
    with jax.set_mesh(mesh):
        text = str(jax.make_jaxpr(functools.partial(attend, window=17, path="banded"))(*heads))
    sent = re.findall(r":(\S+) = ppermute", " ".join(text.split()))
    # Keys, values and segments.
    assert text.count("ppermute") == 3 and "all_gather" not in text
    assert sent == ["f32[1,16,2,4]", "f32[1,16,2,4]", "i32[1,16]"]


def test_the_mesh_says_what_is_compiled_for():
    """Not the machine that traces: a TPU's mesh takes the TPU's path on a CPU."""
    heads = [jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)] * 3

    def program(platform: str, kind: str, ways: int = 1) -> str:
        device = jax.sharding.AbstractDevice(kind, num_cores=1, platform=platform)
        mesh = jax.sharding.AbstractMesh(
            (1, 2, 1, ways), sharding.MESH_AXES, abstract_device=device
        )
        with jax.sharding.use_abstract_mesh(mesh):
            assert sharding.target() == sharding.Target(platform, kind)
            return str(jax.make_jaxpr(functools.partial(attend, window=7))(*heads))

    assert "splash_mha_fwd" in program("tpu", "TPU v5 lite")
    assert "splash" not in program("cpu", "cpu")
    assert "splash" not in program("gpu", "AMD Instinct MI300X")
    # Only half of cuDNN's contract holds where the sequence is split.
    assert "dot_general" in program("gpu", "NVIDIA H100 80GB HBM3", ways=2)
    with pytest.raises(RuntimeError, match="cuDNN is not detected"):
        program("gpu", "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(
    ("kind", "generation"),
    [
        ("TPU v2", "v2"),
        ("TPU v3", "v3"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
    ],
)
def test_generations_of_tpu(kind, generation):
    assert sharding.Target("tpu", kind).generation == generation
    assert generation in splash.BLOCKS


def test_an_unknown_tpu_is_named():
    with pytest.raises(ValueError, match="'TPU v99' is none of TPU v2, v3"):
        _ = sharding.Target("tpu", "TPU v99").generation


@pytest.mark.parametrize(
    ("dtype", "head_dim", "before", "is_nvidia", "words"),
    [
        ("bfloat16", 64, 0, False, "needs an NVIDIA GPU"),
        ("float32", 64, 0, True, "not float32 and 64"),
        ("bfloat16", 65, 0, True, "not bfloat16 and 65"),
        ("bfloat16", 64, 4, True, "needs mesh.context=1"),
    ],
)
def test_what_cudnn_cannot_do_is_refused(dtype, head_dim, before, is_nvidia, words):
    x = jnp.zeros((1, 8, 1, head_dim), dtype)
    with pytest.raises(ValueError, match=words):
        cudnn.cudnn_attention(
            *(x, x, x, None, None), window=None, before=before, is_nvidia=is_nvidia
        )


@pytest.mark.parametrize("path", [*PATHS, "splash"])
def test_scores_are_not_scaled(path):
    """Two keys, one head: the probabilities follow from the bare products."""
    q = jnp.ones((1, 2, 1, 4))
    k = jnp.asarray([1.0, 0.5]).reshape(1, 2, 1, 1) * jnp.ones((1, 2, 1, 4))
    v = jnp.asarray([1.0, 0.0]).reshape(1, 2, 1, 1) * jnp.ones((1, 2, 1, 4))
    context = attend(q, k, v, window=None, path=path)
    expected = 1 / (1 + np.exp(2.0 - 4.0))
    np.testing.assert_allclose(context[0, 1], expected, rtol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_scores_of_bfloat16_are_float32(path):
    """A score of 257 is not 256, as bfloat16 would have it."""
    q = jnp.ones((1, 2, 1, 257), jnp.bfloat16)
    k = q.at[:, 1, :, 0].set(0)  # scores 257 and 256
    v = jnp.zeros_like(q).at[:, 0].set(1)
    context = attend(q, k, v, window=None, path=path)
    assert context.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(context[0, 1]), 1 / (1 + np.exp(-1.0)), rtol=4e-3)


def test_causal_mask_counts_the_query_itself():
    positions = jnp.arange(5)
    expected = np.tril(np.ones((5, 5), bool)) & ~np.tril(np.ones((5, 5), bool), -2)
    np.testing.assert_array_equal(causal_mask(positions, positions, 2), expected)
