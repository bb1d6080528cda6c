"""A model that has learned something writes what transformers writes with its weights.

Trained weights have sharp and flat distributions, loops and rare tokens, as random ones have
not. The text is this project's own README, byte by byte.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    embed_dim=64,
    num_heads=4,
    window_size=16,
    vocab_size=256,
    max_seq_len=256,
    compute_dtype="float32",
)
README = (pathlib.Path(__file__).parents[1] / "README.md").read_bytes()
LENGTHS = (1, 15, 16, 17, 50)

pytestmark = pytest.mark.slow


@functools.cache
def trained():
    """Parameters after 400 steps of 16 × 64 bytes, and the last losses in nats a byte."""
    graph, params = nnx.split(NeoLM(MODEL, nnx.Rngs(params=0)))
    params, tx = nnx.to_pure_dict(params), optax.adam(3e-3)

    @jax.jit
    def step(params, moments, ids):
        def loss(params):
            logits = nnx.merge(graph, params).logits(ids[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = tx.update(gradients, moments)
        return optax.apply_updates(params, updates), moments, value

    moments, losses = tx.init(params), []
    text, rng = np.frombuffer(README, np.uint8).astype(np.int32), np.random.default_rng(0)
    for _ in range(400):
        starts = rng.integers(0, len(text) - 65, 16)
        params, moments, value = step(
            params, moments, jnp.asarray(text[starts[:, None] + np.arange(65)])
        )
        losses.append(float(value))
    return graph, params, np.mean(losses[-20:])


@functools.cache
def theirs():
    model = transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(**hf.config_to_hf(MODEL), attn_implementation="eager")
    )
    weights = hf.to_hf(trained()[1], MODEL)
    model.load_state_dict(
        {name: torch.from_numpy(np.array(a)) for name, a in weights.items()}, strict=False
    )
    return model.eval()


def prompts() -> list[list[int]]:
    starts = np.random.default_rng(1).integers(0, len(README) - 60, len(LENGTHS))
    return [list(README[at : at + n]) for at, n in zip(starts, LENGTHS, strict=True)]


def both(**options) -> tuple[list[list[int]], list[list[int]]]:
    """New tokens by us and by transformers; all are written, whatever they are."""
    graph, params, _ = trained()
    asked = {**options, "eos_token_id": (), "max_new_tokens": 200}
    written = Generator(MODEL, graph, params, None).write(prompts(), from_keywords(asked))
    longest = max(LENGTHS)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts()])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts()])
    with torch.no_grad():
        out = theirs().generate(
            ids,
            attention_mask=mask,
            pad_token_id=0,
            eos_token_id=None,
            do_sample=False,
            max_new_tokens=200,
            **options,
        )
    return [text.token_ids for text in written], out[:, longest:].tolist()


def log_prob(prompt: list[int], new: list[int]) -> float:
    """Of new tokens, by transformers in float64."""
    with torch.no_grad():
        logits = theirs().double()(torch.tensor([prompt + new])).logits[0]
    theirs().float()
    log_probs = logits.log_softmax(dim=-1)[len(prompt) - 1 : -1]
    return float(log_probs[torch.arange(len(new)), torch.tensor(new)].sum())


def test_it_has_learned() -> None:
    assert trained()[2] < 1.8  # nats a byte; 5.5 at the start


def test_greedy_text_of_200_tokens_is_theirs() -> None:
    """Where a text parts from theirs, the two tokens are nearer than float32 tells apart."""
    for prompt, ours, other in zip(prompts(), *both(), strict=True):
        assert len(ours) == 200
        if ours == other:
            continue
        at = next(i for i in range(200) if ours[i] != other[i])
        gap = log_prob(prompt, ours[: at + 1]) - log_prob(prompt, other[: at + 1])
        print(f"prompt of {len(prompt)} parts at {at}, {abs(gap):.1e} nats apart")
        assert abs(gap) < 1e-4


def test_beams_are_theirs() -> None:
    """Where they are not, both are worth the same, or rounding chose between two beams."""
    same = 0
    for prompt, ours, other in zip(prompts(), *both(num_beams=4), strict=True):
        same += ours == other
        if ours != other:
            worth = log_prob(prompt, ours), log_prob(prompt, other)
            print(f"prompt of {len(prompt)}: log p {worth[0]:.6f}, theirs {worth[1]:.6f}")
    assert same >= len(LENGTHS) - 1
