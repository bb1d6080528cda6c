"""Whole texts against transformers' `generate`: greedy, ragged batches, penalties, beams."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from neo_jax import config as config_lib
from neo_jax import hf
from neo_jax.generate import Generator, from_keywords
from neo_jax.model import NeoLM

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MODEL = config_lib.preset_model(
    "tiny",
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    window_size=16,
    vocab_size=151,
    max_seq_len=256,
    compute_dtype="float32",
)
EOS = 150


@functools.cache
def ours() -> Generator:
    graph, params = nnx.split(NeoLM(MODEL, nnx.Rngs(params=1)))
    params = jax.tree.map(lambda w: w * 3, nnx.to_pure_dict(params))
    return Generator(MODEL, graph, params, None)


@functools.cache
def theirs():
    _, params = nnx.split(NeoLM(MODEL, nnx.Rngs(params=1)))
    params = jax.tree.map(lambda w: w * 3, nnx.to_pure_dict(params))
    model = transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(**hf.config_to_hf(MODEL), attn_implementation="eager")
    )
    weights = {n: torch.from_numpy(np.array(a)) for n, a in hf.to_hf(params, MODEL).items()}
    model.load_state_dict(weights, strict=False)
    return model.eval()


def their_text(prompts: list[list[int]], **options) -> list[list[int]]:
    """New tokens, up to and with the end of text; prompts are padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = theirs().generate(
            ids, attention_mask=mask, pad_token_id=0, do_sample=False, **options
        )
    texts = out[:, longest:].tolist()
    stop = options["eos_token_id"]
    return [t[: t.index(stop) + 1] if stop in t else t for t in texts]


def prompts_of(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 150, n).tolist() for n in lengths]


def our_text(prompts: list[list[int]], **options) -> list[list[int]]:
    return [t.token_ids for t in ours().write(prompts, from_keywords(options))]


def test_greedy_is_theirs_for_200_tokens() -> None:
    prompts = prompts_of(1, 17, 40)
    options = {"max_new_tokens": 200, "eos_token_id": EOS, "min_new_tokens": 200}
    assert our_text(prompts, **options) == their_text(prompts, **options)


def test_penalties_compose_as_theirs() -> None:
    prompts = prompts_of(5, 12, 30)
    options = {
        "max_new_tokens": 40,
        "min_new_tokens": 10,
        "eos_token_id": EOS,
        "repetition_penalty": 1.4,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[7], [3, 9]],
    }
    assert our_text(prompts, **options) == their_text(prompts, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length_penalty": 2.0, "early_stopping": True},
        pytest.param({"early_stopping": "never"}, marks=pytest.mark.slow),
        pytest.param(
            {"length_penalty": -1.0, "no_repeat_ngram_size": 3}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_beams_are_theirs(options) -> None:
    # The end of text is made likely, so that beams end at different lengths.
    prompts, bias = prompts_of(6, 11), {(EOS,): 4.0}
    options = {
        "num_beams": 4,
        "num_return_sequences": 2,
        "max_new_tokens": 24,
        "eos_token_id": EOS,
        **options,
    }
    found = our_text(prompts, sequence_bias=bias, **options)
    assert found == their_text(prompts, sequence_bias=bias, **options)
    assert {len(text) for text in found} != {24}  # some ended by themselves
