"""Attention: the window and causality to the bit, segments, and the two paths alike."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo_jax.attention import attend, causal_mask

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


@pytest.mark.parametrize("path", PATHS)
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


@pytest.mark.parametrize("path", PATHS)
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
