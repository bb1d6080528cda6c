"""The blockwise loss against plain softmax cross-entropy, and what it never holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from neo_jax.loss import cross_entropy, token_log_probs

B, T, D, V, PADDED = 3, 13, 8, 37, 48


def example(dtype=np.float64):
    """Hidden states, head, targets and ragged weights."""
    rng = np.random.default_rng(0)
    weights = rng.random((B, T)) * (rng.random((B, T)) < 0.7)
    return (
        jnp.asarray(rng.normal(size=(B, T, D)), dtype),
        jnp.asarray(rng.normal(size=(PADDED, D)), dtype),
        jnp.asarray(rng.integers(0, V, (B, T))),
        jnp.asarray(weights, dtype),
    )


def plain(hidden, head, targets, weights, z_loss):
    logits = jnp.einsum("BTD,VD->BTV", hidden, head[:V])
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nll = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum((nll + z_loss * log_z**2) * weights), jnp.sum(nll * weights)


@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("block_size", [1, 4, 5, 13, 512])
def test_equals_plain_cross_entropy(block_size, z_loss):
    with jax.enable_x64(True):
        hidden, head, targets, weights = example()

        def blockwise(hidden, head):
            sums = cross_entropy(
                hidden,
                head,
                targets,
                weights,
                vocab_size=V,
                z_loss=z_loss,
                block_size=block_size,
            )
            return 1.7 * sums.loss, sums.nll

        def expected(hidden, head):
            loss, nll = plain(hidden, head, targets, weights, z_loss)
            return 1.7 * loss, nll

        ours, theirs = (
            jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(hidden, head)
            for f in (blockwise, expected)
        )
        without_gradient = jax.jit(blockwise)(hidden, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours, theirs)
    np.testing.assert_allclose(without_gradient, ours[0], rtol=1e-12)
    assert not np.any(ours[1][1][V:]), "rows that pad the vocabulary got a gradient"


def test_equals_numpy():
    with jax.enable_x64(True):
        hidden, head, targets, weights = example()
        sums = cross_entropy(
            hidden, head, targets, weights, vocab_size=V, z_loss=1e-4, block_size=4
        )
    logits = np.asarray(hidden) @ np.asarray(head[:V]).T
    expected = reference.cross_entropy(logits, np.asarray(targets), np.asarray(weights), 1e-4)
    np.testing.assert_allclose((sums.loss, sums.nll), expected, rtol=1e-12)


def test_padding_rows_carry_no_probability():
    """The loss does not move with them, however large they are."""
    hidden, head, targets, weights = example(np.float32)
    settings = {"vocab_size": V, "z_loss": 1e-4, "block_size": 4}
    before = cross_entropy(hidden, head, targets, weights, **settings)
    after = cross_entropy(hidden, head.at[V:].set(1e4), targets, weights, **settings)
    assert before == after


def test_large_logits_stay_finite():
    hidden, head, targets, weights = example(np.float32)
    grad = jax.grad(
        lambda h: (
            cross_entropy(
                h, 1e3 * head, targets, weights, vocab_size=V, z_loss=0.0, block_size=4
            ).loss
        )
    )(1e2 * hidden)
    assert np.isfinite(grad).all()


def test_bfloat16_sums_are_float32():
    hidden, head, targets, weights = example(np.float32)
    sums = cross_entropy(
        hidden.astype(jnp.bfloat16),
        head,
        targets,
        weights,
        vocab_size=V,
        z_loss=0.0,
        block_size=4,
    )
    expected = plain(hidden, head, targets, weights, 0.0)[0]
    assert sums.loss.dtype == jnp.float32
    np.testing.assert_allclose(sums.loss, expected, rtol=2e-2)


def _largest(jaxpr) -> int:
    """Elements of the largest array that any equation writes, loops included."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [int(np.prod(v.aval.shape)) for v in equation.outvars]
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                sizes.append(_largest(inner))
    return max(sizes)


def test_the_full_logits_never_exist():
    """Neither in the program, nor as bytes set aside by the compiler."""
    batch, seq, embed, vocab, block = 2, 512, 8, 1024, 32
    arrays = (
        jax.ShapeDtypeStruct((batch, seq, embed), jnp.float32),
        jax.ShapeDtypeStruct((vocab, embed), jnp.float32),
        jax.ShapeDtypeStruct((batch, seq), jnp.int32),
        jax.ShapeDtypeStruct((batch, seq), jnp.float32),
    )

    def gradient(hidden, head, targets, weights):
        def loss(hidden, head):
            return cross_entropy(
                hidden,
                head,
                targets,
                weights,
                vocab_size=vocab - 3,
                z_loss=1e-4,
                block_size=block,
            ).loss

        return jax.grad(loss, argnums=(0, 1))(hidden, head)

    assert _largest(jax.make_jaxpr(gradient)(*arrays).jaxpr) == batch * block * vocab
    memory = jax.jit(gradient).lower(*arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * batch * seq * vocab / 2


@pytest.mark.parametrize("block_size", [4, 13, 512])
def test_log_probs_of_tokens_have_the_gradients_of_any_function_of_them(block_size):
    with jax.enable_x64(True):
        hidden, head, targets, weights = example()

        def blockwise(hidden, head):
            log_probs = token_log_probs(
                hidden, head, targets, vocab_size=V, block_size=block_size
            )
            return jnp.sum(jnp.tanh(jnp.sum(log_probs * weights, axis=1) / 30))

        def expected(hidden, head):
            log_p = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", hidden, head[:V]))
            log_probs = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
            return jnp.sum(jnp.tanh(jnp.sum(log_probs * weights, axis=1) / 30))

        ours, theirs = (
            jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden, head)
            for f in (blockwise, expected)
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours, theirs)
