"""Every token is scored once, with the context promised; figures follow their definitions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo_jax.evaluate import perplexity
from neo_jax.evaluate.perplexity import HeldOut


def numbered(count: int) -> HeldOut:
    """A text whose tokens are their own places: the target at place i is i + 1."""
    return HeldOut(np.arange(1, count + 1, dtype=np.int32), first=0, num_bytes=4 * count)


@given(
    count=st.integers(1, 200),
    seq_len=st.integers(1, 20),
    stride=st.integers(1, 20),
    batch_size=st.integers(1, 5),
)
def test_every_token_is_scored_once_after_its_own_past(
    count: int, seq_len: int, stride: int, batch_size: int
) -> None:
    stride = min(stride, seq_len)
    scored = []
    for batch in perplexity.windows(
        numbered(count), seq_len=seq_len, stride=stride, batch_size=batch_size
    ):
        assert batch["inputs"].shape == (batch_size, seq_len)
        counts = batch["weights"] > 0
        np.testing.assert_array_equal(batch["inputs"][counts] + 1, batch["targets"][counts])
        scored += batch["targets"][counts].tolist()
    assert sorted(scored) == list(range(1, count + 1))


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_a_scored_token_sees_at_least_the_promised_context(stride: int) -> None:
    seq_len = 8
    for batch in perplexity.windows(
        numbered(100), seq_len=seq_len, stride=stride, batch_size=1
    ):
        places = np.flatnonzero(batch["weights"][0])
        starts_text = batch["inputs"][0, 0] == 0
        assert starts_text or places.min() >= seq_len - stride
        # What stands to the left in the window is the text just before.
        window = batch["inputs"][0, : places.max() + 1]
        np.testing.assert_array_equal(np.diff(window), 1)


def test_figures_are_those_of_the_definitions() -> None:
    text = numbered(50)
    scores = perplexity.evaluate(
        text,
        # Every token costs a tenth of its number, in nats.
        lambda batch: (
            float((0.1 * batch["targets"] * batch["weights"]).sum()),
            float(batch["weights"].sum()),
        ),
        seq_len=7,
        stride=4,
        batch_size=3,
    )
    nats = 0.1 * sum(range(1, 51))
    assert scores["tokens"] == 50
    assert scores["loss"] == pytest.approx(nats / 50, rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / 200, rel=1e-5)


def test_max_batches_scores_the_beginning_only() -> None:
    scores = perplexity.evaluate(
        numbered(50),
        lambda batch: (0.0, float(batch["weights"].sum())),
        seq_len=5,
        stride=5,
        batch_size=2,
        max_batches=3,
    )
    assert scores["tokens"] == 30


def test_collecting_an_eval_pipeline_gives_the_text_back() -> None:
    text = numbered(23)
    batches = list(perplexity.windows(text, seq_len=5, stride=5, batch_size=2))
    again = HeldOut.collect(iter(batches), text.num_bytes)
    np.testing.assert_array_equal(again.tokens, text.tokens)
    assert again.first == text.first


def test_no_text_is_said() -> None:
    with pytest.raises(ValueError, match="no text"):
        HeldOut.collect(iter([]), 0)
