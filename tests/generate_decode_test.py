"""Decoding token by token: equal to one full pass, whatever the chunks, rows and caches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neo_jax import config as config_lib
from neo_jax import model as model_room
from neo_jax import sharding
from neo_jax.config import ConfigError
from neo_jax.generate import Generator, NotFiniteError, cache, from_keywords, network, quantise
from neo_jax.model import NeoLM

WINDOW = 8
MODEL = config_lib.preset_model(
    "tiny",
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    window_size=WINDOW,
    vocab_size=97,
    max_seq_len=96,
    compute_dtype="float32",
)

# Of the largest logit. Weights this large multiply the rounding of sums taken in another
# order; a mask that is off by one changes logits by tenths.
TOLERANCE = 5e-4


@functools.cache
def model():
    # Larger weights than at birth, so that one token is clearly the best.
    graph, params = nnx.split(NeoLM(MODEL, nnx.Rngs(params=0)))
    return graph, jax.tree.map(lambda w: w * 3, nnx.to_pure_dict(params))


@functools.cache
def generator() -> Generator:
    return Generator(MODEL, *model(), None)


@functools.cache
def full_pass():
    graph, params = model()
    return jax.jit(lambda ids: nnx.merge(graph, params).logits(ids))


def greedy_by_full_passes(prompt: list[int], written: list[int]) -> list[int]:
    """What a full pass over prompt and text takes for the best token at each place."""
    ids = np.zeros((1, MODEL.max_seq_len), np.int32)
    ids[0, : len(prompt) + len(written)] = prompt + written
    best = np.asarray(full_pass()(ids))[0].argmax(axis=-1)
    return best[len(prompt) - 1 : len(prompt) - 1 + len(written)].tolist()


def write(prompts, **options):
    return generator().write(prompts, from_keywords(options))


def random_prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, MODEL.vocab_size, n).tolist() for n in lengths]


# ------------------------------------------------------------------------------ the caches


@functools.cache
def decoder():
    return network.prepare(*model(), MODEL, "auto")


@functools.partial(jax.jit, static_argnums=(0,))
def one_call(graph, params, caches, ids, positions, length):
    decoder = nnx.merge(graph, params)
    hidden, caches = decoder.hidden(ids, positions, length, caches)
    return decoder.logits(hidden), caches


def logits_in_chunks(ids, sizes, *, chunk, dtype="auto", length=None):
    """Logits [batch, seq, vocab] of rows that enter in chunks of the given sizes.

    `length` says how many tokens of each row are real; the others must leave no trace.
    """
    graph, params = decoder()
    ids = np.asarray(ids)
    length = np.full(len(ids), ids.shape[1]) if length is None else np.asarray(length)
    caches = cache.empty(
        MODEL, batch_size=len(ids), capacity=MODEL.max_seq_len, chunk=chunk, dtype=dtype
    )
    parts, at = [], 0
    for size in sizes:
        places = at + np.arange(size)
        positions = np.where(places < length[:, None], places, -1)
        after = np.minimum(length, at + size)
        part, caches = one_call(graph, params, caches, ids[:, places], positions, after)
        parts.append(part)
        at += size
    return np.concatenate(parts, axis=1)


# 1, the window and its neighbours, and rings that come round several times; chunks that
# divide the window, cross it, and are longer.
@pytest.mark.parametrize(
    "sizes",
    [
        [1] * 40,
        [9] * 5,
        *(
            pytest.param(sizes, marks=pytest.mark.slow)
            for sizes in ([7] * 6, [8] * 5, [1, 7, 1, 30, 1], [40])
        ),
    ],
    ids=str,
)
def test_tokens_in_chunks_equal_one_pass(sizes: list[int]) -> None:
    ids = np.asarray(random_prompts(sum(sizes), sum(sizes)))
    expected = np.asarray(full_pass()(ids))
    got = logits_in_chunks(ids, sizes, chunk=max(sizes))
    np.testing.assert_allclose(got, expected, atol=TOLERANCE * np.abs(expected).max())


def test_rows_of_different_lengths_do_not_meet() -> None:
    ids, length = np.asarray(random_prompts(30, 30, 30)), np.array([1, 13, 30])
    expected = np.asarray(full_pass()(ids))
    got = logits_in_chunks(ids, [10] * 3, chunk=10, length=length)
    for row, count in enumerate(length):
        np.testing.assert_allclose(
            got[row, :count], expected[row, :count], atol=TOLERANCE * np.abs(expected).max()
        )


def test_a_ring_is_cut_to_the_window_without_loss() -> None:
    graph, params = decoder()
    ids, length = np.asarray(random_prompts(21, 21)), np.array([20, 5])
    caches = cache.empty(
        MODEL, batch_size=2, capacity=MODEL.max_seq_len, chunk=20, dtype="auto"
    )
    positions = np.where(np.arange(20) < length[:, None], np.arange(20), -1)
    _, caches = one_call(graph, params, caches, ids[:, :20], positions, length)
    assert caches[1].num_slots == WINDOW + 19
    caches = cache.fit(caches, jnp.asarray(length), 1)
    assert caches[1].num_slots == WINDOW and caches[0].num_slots == MODEL.max_seq_len
    next_ids = ids[np.arange(2), length][:, None]
    got, _ = one_call(graph, params, caches, next_ids, length[:, None], length + 1)
    expected = np.asarray(full_pass()(ids))[np.arange(2), length]
    np.testing.assert_allclose(got[:, 0], expected, atol=TOLERANCE * np.abs(expected).max())


def test_bytes_of_the_caches_of_the_released_shapes() -> None:
    """0.5625 of full caches at 2048 positions: half the layers keep only 256 tokens."""
    for name, per_token in (
        ("neo_125m", 36_864),
        ("neo_1p3b", 196_608),
        ("neo_2p7b", 327_680),
    ):
        config = config_lib.preset_model(name)
        shapes = jax.eval_shape(
            lambda config=config: cache.empty(
                config, batch_size=1, capacity=2048, chunk=1, dtype="bfloat16"
            )
        )
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
        assert held == 0.5625 * per_token * 2048


def test_int8_caches_hold_half_and_change_little() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 12, 4, 8)).astype(np.float32) for _ in range(3))
    places, contexts = jnp.broadcast_to(jnp.arange(12), (2, 12)), {}
    for dtype in ("float32", "int8"):
        caches = cache.empty(MODEL, batch_size=2, capacity=16, chunk=12, dtype=dtype)
        step = cache.Step(caches[0], places, jnp.full(2, 12))
        _, after = step.attend(*map(jnp.asarray, (q, k, v)))
        step = cache.Step(after.cache, jnp.full((2, 1), 12), jnp.full(2, 13))
        contexts[dtype], _ = step.attend(*(jnp.asarray(x[:, :1]) for x in (q, k, v)))
    error = np.abs(contexts["int8"] - contexts["float32"])
    assert 0 < error.max() < 0.03 * np.abs(contexts["float32"]).max()
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(after.cache)}
    assert kinds == {"int8", "float32"}


@pytest.mark.parametrize(
    ("equation", "shape", "x"),
    [
        ("BTD,DNH->BTNH", (32, 4, 8), (1, 1, 32)),
        ("BTNH,NHD->BTD", (4, 8, 32), (1, 1, 4, 8)),
        ("BTD,DV->BTV", (32, 97), (1, 1, 32)),
    ],
)
def test_int8_weights_are_near_for_one_token_and_for_many(equation, shape, x) -> None:
    """A token alone takes another way through the product than several together."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=shape).astype(np.float32) * rng.uniform(0.1, 9, shape[-1])
    linear = quantise.Int8Linear(jnp.asarray(kernel), equation, None)
    assert linear.kernel[...].dtype == jnp.int8 and linear.scale[...].size == np.prod(
        [size for size, name in zip(shape, equation.split(",")[1], strict=False)
         if name in equation.split("->")[1]]
    )  # fmt: skip
    x = rng.normal(size=x).astype(np.float32)
    together = linear(jnp.asarray(np.tile(x, (2, 1) + (1,) * (x.ndim - 2))))
    np.testing.assert_allclose(linear(jnp.asarray(x)), together[:1], rtol=1e-4, atol=1e-4)
    expected = np.einsum(equation, x, kernel)
    assert 0 < np.abs(together[0] - expected).max() < 0.02 * np.abs(expected).max()


def test_int8_weights_write() -> None:
    light = Generator(MODEL, *model(), None, weight_dtype="int8")
    (text,) = light.write([[3]], from_keywords({"max_new_tokens": 5}))
    assert len(text.token_ids) == 5


# ------------------------------------------------------------------------------ whole texts


def test_greedy_text_is_that_of_full_passes() -> None:
    prompts = random_prompts(1, 7, 8, 9, 20, 50)
    for prompt, text in zip(prompts, write(prompts, max_new_tokens=40), strict=True):
        assert len(text.token_ids) == 40 and text.finish_reason == "length"
        assert text.token_ids == greedy_by_full_passes(prompt, text.token_ids)


def test_a_text_does_not_depend_on_its_batch() -> None:
    prompts, options = random_prompts(3, 17, 40), {"max_new_tokens": 12, "temperature": 1.5}
    together = [text.token_ids for text in write(prompts, **options)]
    assert together == [write([p], **options)[0].token_ids for p in prompts]
    assert together[::-1] == [text.token_ids for text in write(prompts[::-1], **options)]


def test_a_seed_decides_for_its_own_prompt() -> None:
    prompt = random_prompts(4)[0]
    hot = {"max_new_tokens": 16, "temperature": 2.0}
    a, b, again = (t.token_ids for t in write([prompt] * 3, seed=[1, 2, 1], **hot))
    assert a == again != b
    several = [t.token_ids for t in write([prompt], num_return_sequences=3, seed=1, **hot)]
    assert several[0] == a and len({tuple(t) for t in several}) == 3


def test_a_stop_token_ends_its_row_and_no_other() -> None:
    prompts = random_prompts(5, 9)
    long = [t.token_ids for t in write(prompts, max_new_tokens=20)]
    stop = next(t for t in long[0] if t not in long[1])
    first, second = write(prompts, max_new_tokens=20, eos_token_id=stop)
    assert first.token_ids == long[0][: long[0].index(stop) + 1]
    assert first.finish_reason == "stop"
    assert second.token_ids == long[1] and second.finish_reason == "length"
    kept, _ = write(prompts, max_new_tokens=20, min_new_tokens=19, eos_token_id=stop)
    assert stop not in kept.token_ids[:19]


def test_log_probs_are_those_of_full_passes() -> None:
    prompt = random_prompts(6)[0]
    (text,) = write([prompt], max_new_tokens=10, temperature=1.0, top_k=5, logprobs=3)
    ids = np.asarray([prompt + text.token_ids])
    log_probs = jax.nn.log_softmax(full_pass()(ids)[0], axis=-1)[5:-1]
    expected = np.asarray(log_probs)[np.arange(10), text.token_ids]
    np.testing.assert_allclose(text.log_probs, expected, atol=1e-4)
    for place, best in zip(np.asarray(log_probs), text.top_log_probs, strict=True):
        assert list(best) == np.argsort(-place)[:3].tolist()


def test_best_of_returns_the_likeliest() -> None:
    options = {"max_new_tokens": 6, "temperature": 3.0, "seed": 3}
    prompts = random_prompts(4)
    every = write(prompts, num_return_sequences=6, logprobs=0, **options)
    means = [np.mean(text.log_probs) for text in every]
    best = write(prompts, best_of=6, num_return_sequences=2, **options)
    wanted = [every[i].token_ids for i in np.argsort(means)[::-1][:2]]
    assert [text.token_ids for text in best] == wanted


@pytest.mark.slow
def test_requests_of_all_lengths_share_programs() -> None:
    """A hundred prompts of random lengths compile no more than the buckets."""
    fresh = Generator(MODEL, *model(), None)
    rng = np.random.default_rng(1)
    options = from_keywords({"max_new_tokens": 8})
    capacities = (64, 96)
    for length in rng.integers(1, 88, 100):
        fresh.write([rng.integers(0, 97, length).tolist()], options)
    # Chunks of 16, 64 and 256 tokens at two lengths of caches, whose rings follow the largest
    # chunk; one program writes at each length.
    assert fresh.num_programs <= 4 * len(capacities)
    before = fresh.num_programs
    for length in rng.integers(1, 88, 20):
        fresh.write([rng.integers(0, 97, length).tolist()], options)
    assert fresh.num_programs == before


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"cache_dtype": "int8"}, marks=pytest.mark.slow),
        pytest.param({"prompt_lookup_num_tokens": 3}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_ways_of_a_tpu_give_the_same_text(options, monkeypatch) -> None:
    """Rows that fill a register up, and caches that are written a row at a time."""
    prompts, options = random_prompts(3, 17, 40), {"max_new_tokens": 24, **options}
    expected = write(prompts, **options)
    for room in (cache, model_room):
        monkeypatch.setattr(room, "target", lambda: sharding.Target("tpu", "TPU v5 lite"))
    fresh = Generator(MODEL, *model(), None)
    assert fresh.write(prompts, from_keywords(options)) == expected
    assert fresh.write(prompts[1:2], from_keywords(options)) == expected[1:2]


# ------------------------------------------------------------------------- longer than allowed


def test_a_text_beyond_the_positions_is_refused_cut_or_pressed() -> None:
    (prompt,) = random_prompts(90)
    with pytest.raises(
        ConfigError, match=r"would have 110, more than the model's 96 positions"
    ):
        write([prompt], max_new_tokens=20)
    (cut,) = write([prompt], max_new_tokens=20, overflow="truncate_left")
    assert cut == write([prompt[-76:]], max_new_tokens=20)[0]
    (pressed,) = write([prompt], max_new_tokens=20, overflow="interpolate")
    assert len(pressed.token_ids) == 20
    # What fits is left as it is.
    for way in ("truncate_left", "interpolate"):
        short = write([prompt[:30]], max_new_tokens=5, overflow=way)
        assert short == write([prompt[:30]], max_new_tokens=5)


def test_interpolated_positions_lie_between_their_neighbours() -> None:
    _, params = decoder()
    table = np.asarray(params["embedder"]["positions"])
    stretched = np.asarray(network.stretch_positions(params, 2)["embedder"]["positions"])
    np.testing.assert_array_equal(stretched[::2], table)
    np.testing.assert_allclose(stretched[1:-1:2], (table[1:] + table[:-1]) / 2, atol=1e-6)


# ------------------------------------------------------------------------------- refusals


def test_nan_is_named_with_its_prompt_and_token() -> None:
    graph, params = model()
    broken = params["embedder"]["positions"].at[6].set(jnp.nan)
    params = {**params, "embedder": {**params["embedder"], "positions": broken}}
    fresh = Generator(MODEL, graph, params, None)
    with pytest.raises(NotFiniteError, match=r"new token 3 of prompt 1 are not finite"):
        fresh.write(random_prompts(1, 4), from_keywords({"max_new_tokens": 4}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 3}, "no option 'topk'; did you mean 'top_k'"),
        ({"temperature": -0.1}, r"temperature=-0\.1 must be a finite number, 0"),
        ({"temperature": float("nan")}, "temperature=nan must be"),
        ({"top_p": 0.0}, r"top_p=0\.0 must be above 0 and at most 1"),
        ({"top_p": 1.5}, r"top_p=1\.5 must be above 0"),
        ({"top_k": -1}, "top_k=-1 must be"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens=2\.5 must be a whole number"),
        ({"min_new_tokens": 9, "max_new_tokens": 4}, "min_new_tokens=9 exceeds"),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams > 1 takes no chance"),
        ({"num_beams": 2, "num_return_sequences": 3}, "exceeds num_beams=2"),
        ({"cache_dtype": "int4"}, "cache_dtype=.int4. must be"),
        ({"length_penalty": 2.0}, "length_penalty needs num_beams above 1"),
        ({"num_return_sequences": 2}, "would be one text 2 times"),
        ({"stop_strings": [""]}, "empty string"),
        ({"stop_strings": "x"}, "stop_strings needs a tokenizer"),
        ({"bad_words_ids": [[97]]}, "token id 97 of a bias or forbidden word"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"seed": -1}, "seed=-1 must be"),
    ],
    ids=str,
)
def test_options_refused(options, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        write([[1]], **options)
    assert "\n" not in str(error.value)


def test_prompts_refused() -> None:
    with pytest.raises(ConfigError, match="prompt 1 is empty, and there is no tokenizer"):
        write([[1], []])
    with pytest.raises(ConfigError, match="prompt 0 holds token ids from 1 to 97"):
        write([[1, 97]])


# --------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"data": 8, "fsdp": 1}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 1, "tensor": 4, "context": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_text_is_the_same_on_any_mesh(sizes) -> None:
    from neo_jax import hf

    mesh = sharding.make_mesh(config_lib.MeshConfig(**sizes))
    graph, params = model()
    places = jax.tree.map(lambda leaf: leaf.sharding, hf.abstract_params(MODEL, mesh=mesh))
    spread = Generator(MODEL, graph, jax.device_put(params, places), None)
    prompts = random_prompts(3, 12)
    options = from_keywords({"max_new_tokens": 12})
    assert spread.write(prompts, options) == generator().write(prompts, options)
