"""The plain sampler: greedy is the argmax, seeds decide, old text is forgotten."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neo_jax import config as config_lib
from neo_jax.generate import decode
from neo_jax.generate.sampling import sample
from neo_jax.model import NeoLM


@pytest.fixture(scope="module")
def model():
    config = config_lib.preset_model(
        "tiny", num_layers=2, embed_dim=16, num_heads=2, vocab_size=50, max_seq_len=32
    )
    # Larger weights than at birth, so that one token is clearly the best.
    graph, params = nnx.split(NeoLM(config, nnx.Rngs(params=0)))
    return graph, jax.tree.map(lambda w: w * 8, nnx.to_pure_dict(params))


def generate(model, prompt, **changes):
    settings = {
        "max_new_tokens": 12,
        "context": 16,
        "seed": 0,
        "temperature": 1.0,
        "top_k": 0,
    }
    return decode.generate(*model, prompt, **{**settings, **changes})


def test_greedy_takes_the_argmax_of_the_whole_text_each_time(model) -> None:
    ids = [3, 1, 4]
    written = generate(model, ids, temperature=0.0)
    for token in written:
        logits = nnx.merge(*model).logits(jnp.asarray([ids[-16:]]))[0, -1]
        assert token == int(jnp.argmax(logits))
        ids.append(token)


def test_top_1_is_greedy_and_a_seed_decides(model) -> None:
    greedy = generate(model, [7], temperature=0.0)
    assert generate(model, [7], top_k=1, seed=5) == greedy
    assert generate(model, [7], seed=1) == generate(model, [7], seed=1)
    assert generate(model, [7], seed=1, temperature=3.0) != generate(
        model, [7], seed=2, temperature=3.0
    )


def test_text_beyond_the_context_changes_nothing(model) -> None:
    recent = list(range(16))
    assert generate(model, [40, 41, *recent]) == generate(model, [5, 9, *recent])


def test_sampled_frequencies_are_the_softmax_of_the_best_k() -> None:
    logits = jnp.log(jnp.asarray([0.1, 0.2, 0.3, 0.4]))
    draws = sample(jnp.tile(logits, (20_000, 1)), jax.random.key(0), temperature=1.0, top_k=3)
    counts = np.bincount(np.asarray(draws), minlength=4)
    expected = np.array([0, 2, 3, 4]) / 9
    assert counts[0] == 0
    # Four standard deviations of a frequency over 20,000 draws.
    np.testing.assert_allclose(counts / 20_000, expected, atol=4 * (0.25 / 20_000) ** 0.5)
