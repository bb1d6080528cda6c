"""Speculation: guesses change how many passes a text takes, and never the text."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from neo_jax import config as config_lib
from neo_jax import hf, sharding
from neo_jax.config import ConfigError
from neo_jax.generate import Generator, from_keywords
from neo_jax.model import NeoLM

MODEL = config_lib.preset_model(
    "tiny",
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    window_size=8,
    vocab_size=23,  # so few that texts repeat themselves, and guesses are often right
    max_seq_len=96,
    compute_dtype="float32",
)
SMALL = config_lib.preset_model(
    "tiny",
    num_layers=1,
    attention_types=("global",),
    embed_dim=16,
    num_heads=2,
    vocab_size=23,
    max_seq_len=96,
    compute_dtype="float32",
)


@functools.cache
def generator(config, *, mesh=None) -> Generator:
    graph, params = nnx.split(NeoLM(config, nnx.Rngs(params=4)))
    params = jax.tree.map(lambda w: w * 3, nnx.to_pure_dict(params))
    if mesh is not None:
        places = hf.abstract_params(config, mesh=mesh)
        params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, places))
    return Generator(config, graph, params, None)


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 23, n).tolist() for n in (1, 9, 40)]


def texts(model: Generator, assistant: Generator | None = None, **options):
    return model.write(prompts(), from_keywords(options), assistant=assistant)


PLAIN = {"max_new_tokens": 50}


@pytest.mark.parametrize(
    "count",
    [3, pytest.param(1, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)],
)
def test_guesses_from_the_text_leave_it_as_it_is(count: int) -> None:
    """Rings of eight slots come round several times, with right guesses and wrong ones."""
    expected = texts(generator(MODEL), **PLAIN)
    assert texts(generator(MODEL), prompt_lookup_num_tokens=count, **PLAIN) == expected


@pytest.mark.parametrize(
    ("helper", "count"),
    [
        (SMALL, 4),  # whose guesses are mostly wrong
        pytest.param(MODEL, 4, marks=pytest.mark.slow),  # whose are all right
        pytest.param(SMALL, 1, marks=pytest.mark.slow),
    ],
    ids=["small", "itself", "one"],
)
def test_guesses_of_an_assistant_leave_the_text_as_it_is(helper, count: int) -> None:
    expected = texts(generator(MODEL), **PLAIN)
    assisted = texts(generator(MODEL), generator(helper), num_assistant_tokens=count, **PLAIN)
    assert assisted == expected


def test_right_guesses_save_passes(monkeypatch) -> None:
    """An assistant that is the model itself guesses right, five tokens a pass."""
    passes, model = [], generator(MODEL)
    results = model._results
    monkeypatch.setattr(
        model,
        "_results",
        lambda state, *rest: passes.append(int(state.passes)) or results(state, *rest),
    )
    texts(model, **PLAIN)
    texts(model, model, num_assistant_tokens=4, **PLAIN)
    assert passes == [50, 10]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"eos_token_id": [3, 5], "min_new_tokens": 4},
        {"cache_dtype": "int8"},
    ],
    ids=str,
)
def test_rules_count_the_same_with_guesses(options) -> None:
    options = {**PLAIN, **options}
    expected = texts(generator(MODEL), **options)
    assert texts(generator(MODEL), prompt_lookup_num_tokens=3, **options) == expected
    helper = generator(SMALL)
    assert texts(generator(MODEL), helper, num_assistant_tokens=3, **options) == expected


@pytest.mark.slow
def test_guesses_leave_the_text_as_it_is_on_a_mesh() -> None:
    mesh = sharding.make_mesh(config_lib.MeshConfig(data=2, fsdp=2, tensor=2))
    expected = texts(generator(MODEL), **PLAIN)
    spread, helper = generator(MODEL, mesh=mesh), generator(SMALL, mesh=mesh)
    assert texts(spread, prompt_lookup_num_tokens=3, **PLAIN) == expected
    assert texts(spread, helper, num_assistant_tokens=4, **PLAIN) == expected


@pytest.mark.parametrize(
    ("options", "assistant", "message"),
    [
        ({"num_assistant_tokens": 2}, None, "need each other"),
        ({}, SMALL, "need each other"),
        ({"num_assistant_tokens": 2, "temperature": 1.0}, SMALL, "write greedily"),
        (
            {"num_assistant_tokens": 2, "prompt_lookup_num_tokens": 2},
            SMALL,
            "both guess; set one",
        ),
    ],
    ids=str,
)
def test_guesses_refused(options, assistant, message: str) -> None:
    helper = None if assistant is None else generator(assistant)
    with pytest.raises(ConfigError, match=message):
        texts(generator(MODEL), helper, **options)


def test_an_assistant_of_fewer_tokens_is_refused() -> None:
    fewer = config_lib.preset_model(
        "tiny", num_layers=2, embed_dim=16, num_heads=2, vocab_size=20, max_seq_len=96
    )
    with pytest.raises(ConfigError, match="vocab_size=20, less than the model's 23"):
        texts(generator(MODEL), generator(fewer), num_assistant_tokens=2)
