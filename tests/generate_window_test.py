"""The released window of 256 in 2048 positions: what is read in pieces equals one pass.

Prompts just short of the window, of its length, just beyond, and up to the last position; read
in chunks of every size that is used and of odd ones, side by side and alone; then token by
token, while rings of 256 slots come round.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neo_jax import config as config_lib
from neo_jax.generate import Generator, cache, from_keywords, network
from neo_jax.model import NeoLM

LENGTHS = (1, 255, 256, 257, 600, 2047)
PLACES, WINDOW = 2048, 256
MODEL = config_lib.preset_model(
    "tiny",
    num_layers=2,
    embed_dim=32,
    num_heads=2,
    window_size=WINDOW,
    vocab_size=101,
    max_seq_len=PLACES,
    compute_dtype="float32",
)

# Of the largest logit; float32 sums in another order.
TOLERANCE = 2e-5

pytestmark = pytest.mark.slow


@functools.cache
def model():
    graph, params = nnx.split(NeoLM(MODEL, nnx.Rngs(params=0)))
    return graph, jax.tree.map(lambda w: w * 1.5, nnx.to_pure_dict(params))


@functools.cache
def texts() -> np.ndarray:
    """[row, place]: a text of the whole context for each of `LENGTHS`."""
    return np.random.default_rng(0).integers(0, 101, (len(LENGTHS), PLACES))


@functools.cache
def expected() -> np.ndarray:
    """Logits of one full pass, [row, place, vocab]."""
    graph, params = model()
    return np.asarray(jax.jit(lambda ids: nnx.merge(graph, params).logits(ids))(texts()))


@functools.cache
def decoder():
    return network.prepare(*model(), MODEL, "auto")


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def read(graph, params, caches, ids, positions, length):
    network_ = nnx.merge(graph, params)
    hidden, caches = network_.hidden(ids, positions, length, caches)
    return caches, network_.logits(hidden)


def read_all(rows: list[int], chunk: int, more: int):
    """Largest error, and how many places were compared.

    Reads prompts of `LENGTHS[rows]` in chunks, then `more` tokens one after another.
    """
    ids, length = texts()[rows], np.asarray([LENGTHS[row] for row in rows])
    longest, worst, count = int(length.max()), 0.0, 0
    caches = cache.empty(
        MODEL, batch_size=len(rows), capacity=PLACES, chunk=chunk, dtype="auto"
    )

    def compare(logits, places: np.ndarray, is_token: np.ndarray) -> None:
        nonlocal worst, count
        for i, row in enumerate(rows):
            at = places[i][is_token[i]]
            error = np.abs(np.asarray(logits)[i][is_token[i]] - expected()[row, at])
            worst, count = max(worst, error.max(initial=0)), count + len(at)

    for start in range(0, longest, chunk):
        places = np.broadcast_to(start + np.arange(chunk), (len(rows), chunk))
        is_token = places < length[:, None]
        part = np.take_along_axis(ids, np.minimum(places, PLACES - 1), axis=1)
        caches, logits = read(
            *decoder(),
            caches,
            part,
            np.where(is_token, places, -1),
            np.minimum(length, start + chunk),
        )
        compare(logits, places, is_token)
    caches = jax.jit(cache.fit, static_argnums=2)(caches, jnp.asarray(length), 1)
    assert [layer.num_slots for layer in caches] == [PLACES, WINDOW]
    for step in range(more):
        places = (length + step)[:, None]
        is_token = places < PLACES
        part = np.take_along_axis(ids, np.minimum(places, PLACES - 1), axis=1)
        after = np.minimum(length + step + 1, PLACES)
        caches, logits = read(*decoder(), caches, part, np.where(is_token, places, -1), after)
        compare(logits, places, is_token)
    return worst / np.abs(expected()).max(), count


@pytest.mark.parametrize("chunk", [1, 16, 64, 100, 256, 2047])
def test_rows_of_all_lengths_in_chunks_then_by_token(chunk: int) -> None:
    """All lengths side by side; 300 tokens more bring each ring round."""
    error, count = read_all(list(range(len(LENGTHS))), chunk, 300)
    print(f"chunks of {chunk}: {count} places, largest error {error:.1e} of the largest logit")
    assert count == sum(LENGTHS) + 5 * 300 + 1
    assert error < TOLERANCE


@pytest.mark.parametrize("row", range(len(LENGTHS)), ids=[str(n) for n in LENGTHS])
def test_a_prompt_alone_in_chunks_then_by_token(row: int) -> None:
    error, count = read_all([row], 64, 20)
    print(f"{LENGTHS[row]} tokens: {count} places, largest error {error:.1e}")
    assert count == LENGTHS[row] + min(20, PLACES - LENGTHS[row])
    assert error < TOLERANCE


def test_written_text_is_what_a_full_pass_would_write() -> None:
    """Through the whole generator: buckets, chunks as it chooses them, the compiled loop."""
    generator = Generator(MODEL, *model(), None)
    prompts = [texts()[row, :n].tolist() for row, n in enumerate(LENGTHS[:-1])]
    written = generator.write(prompts, from_keywords({"max_new_tokens": 300}))
    (last,) = generator.write(
        [texts()[-1, :-1].tolist()], from_keywords({"max_new_tokens": 1})
    )
    graph, params = model()
    full_pass = jax.jit(lambda ids: nnx.merge(graph, params).logits(ids))
    for prompt, text in zip(
        [*prompts, texts()[-1, :-1].tolist()], [*written, last], strict=True
    ):
        ids = np.zeros((1, PLACES), np.int32)
        whole = prompt + text.token_ids
        ids[0, : len(whole)] = whole
        logits = np.asarray(full_pass(ids))[0, len(prompt) - 1 : len(whole) - 1]
        assert text.token_ids == logits.argmax(axis=-1).tolist()
