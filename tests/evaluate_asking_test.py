"""Words become tokens, windows and figures as lm-evaluation-harness has them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo_jax import tokenizer
from neo_jax.config import ConfigError
from neo_jax.evaluate import documents, memorisation
from neo_jax.evaluate.asking import Asker, rolling_windows
from neo_jax.evaluate.batching import Request
from neo_jax.evaluate.documents import Text
from neo_jax.evaluate.scoring import Score
from neo_jax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return tokenizer.load("gpt2")


def flat(requests: list[Request] | object) -> list[Score]:
    """A model to which every token costs one nat, and even ids are the likeliest."""
    scores = []
    for tokens, num in requests:  # type: ignore[attr-defined]
        odd = [i for i, token in enumerate(tokens[-num:]) if token % 2]
        scores.append(Score(-float(num), not odd, odd[0] if odd else num))
    return scores


# ---------------------------------------------------------------------------------- windows


@given(count=st.integers(0, 60), max_seq_len=st.integers(1, 12), stride=st.integers(1, 12))
def test_windows_score_every_token_once_after_its_own_past(
    count: int, max_seq_len: int, stride: int
) -> None:
    stride = min(stride, max_seq_len)
    document = list(range(1, count + 1))
    scored = []
    for number, (tokens, num) in enumerate(rolling_windows(document, 0, max_seq_len, stride)):
        assert len(tokens) <= max_seq_len + 1 and num < len(tokens)
        assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
        assert number == 0 or len(tokens) == max_seq_len + 1  # as much before as can be read
        scored += tokens[-num:]
    assert scored == document


def test_windows_are_the_harness_s() -> None:
    utils = pytest.importorskip("lm_eval.utils")
    for count, longest, stride in [(23, 5, 5), (23, 5, 2), (5, 5, 5), (6, 5, 1), (3, 5, 4)]:
        document = list(range(1, count + 1))
        theirs = utils.get_rolling_token_windows(document, 0, longest, longest - stride + 1)
        expected = [
            Request([*inputs, outputs[-1]], len(outputs)) for inputs, outputs in theirs
        ]
        assert list(rolling_windows(document, 0, longest, stride)) == expected


def test_a_stride_that_skips_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="stride=6 must lie in 1 … 5"):
        list(rolling_windows([1, 2], 0, 5, 6))


# ------------------------------------------------------------------------------------ pairs


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("The cat", " sat", ("The cat", " sat")),
        ("The cat ", "sat", ("The cat", " sat")),
        ("", "sat", ("<|endoftext|>", "sat")),
        ("", "<|endoftext|>sat", ("<|endoftext|>", "sat")),
        (" ", "sat", ("<|endoftext|>", " sat")),
        # The joined text may be cut elsewhere than where the context ends.
        ("Ty", "pe", ("Type", None)),
    ],
)
def test_pairs_are_cut_as_the_harness_cuts_them(
    words: Tokenizer, context: str, continuation: str, expected: tuple[str, str | None]
) -> None:
    asker = Asker(flat, words, max_seq_len=16)
    if expected[1] is None:
        with pytest.raises(ValueError, match="no tokens to score"):
            asker.encode_pairs([(context, continuation)])
        return
    ((before, after),) = asker.encode_pairs([(context, continuation)])
    assert (words.decode(before), words.decode(after)) == expected


def test_a_long_context_loses_its_front_and_is_counted(words: Tokenizer) -> None:
    asked: list[Request] = []

    def remember(requests: list[Request]) -> list[Score]:
        asked.extend(requests)
        return flat(requests)

    asker = Asker(remember, words, max_seq_len=8)  # type: ignore[arg-type]
    asker.tokens([(list(range(20)), [91, 92]), ([1, 2], [3])])
    assert asked[0] == Request([*range(13, 20), 91, 92], 2)
    assert asker.truncated == 1
    with pytest.raises(ValueError, match="a continuation of 9 tokens"):
        asker.tokens([([1], [2] * 9)])


# ------------------------------------------------------------------------------- documents


def test_figures_are_those_of_the_definitions(words: Tokenizer) -> None:
    texts = [
        Text("Grüße an alle", "Grüße an  alle ", "a"),
        Text("one two three", "one two three", "b"),
        Text("", "", "b"),
    ]
    tokens = sum(len(words.encode(text.scored)) for text in texts)
    figures = documents.perplexities(texts, Asker(flat, words, max_seq_len=4))
    total = figures[documents.ALL]
    # One nat a token; words by whitespace, an empty end counted; "ü" and "ß" are two bytes.
    num_words, num_bytes = 4 + 3, 17 + 13
    assert total["token_perplexity"].value == pytest.approx(math.e)
    assert total["word_perplexity"].value == pytest.approx(math.exp(tokens / num_words))
    assert total["byte_perplexity"].value == pytest.approx(math.exp(tokens / num_bytes))
    assert total["bits_per_byte"].value == pytest.approx(tokens / num_bytes / math.log(2))
    assert total["pile_bits_per_byte"].value == pytest.approx(0.29335 / math.log(2))
    assert total["empty_documents"].value == 1
    assert set(figures) == {documents.ALL, "a", "b"}
    assert figures["b"]["bytes"].value == 13


def test_the_standard_error_is_that_of_many_such_samples(words: Tokenizer) -> None:
    """Documents drawn anew scatter by about the error that one draw states."""
    draw = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(300):
        counts = draw.integers(5, 50, 60)
        nats = counts * draw.gamma(4.0, 0.5, 60)
        ratio = documents._ratio(nats, counts.astype(float))
        values.append(ratio.value)
        errors.append(ratio.stderr)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)  # type: ignore[arg-type]


def test_no_text_is_said(words: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no text to evaluate: 2 empty documents"):
        documents.perplexities([Text("", "")] * 2, Asker(flat, words, max_seq_len=4))


def test_documents_come_with_their_groups(tmp_path) -> None:
    file = tmp_path / "val.jsonl"
    file.write_text(
        '{"text": "one", "meta": {"pile_set_name": "ArXiv"}}\n'
        '{"text": "two", "meta": {"pile_set_name": "Github"}}\n'
    )
    texts = documents.read(f"pile:{tmp_path}?split=val")
    assert [(text.scored, text.group) for text in texts] == [
        ("one", "ArXiv"),
        ("two", "Github"),
    ]
    file.write_text('{"no": 1}\n')
    with pytest.raises(ConfigError, match=r"val\.jsonl"):
        documents.read(f"pile:{tmp_path}?split=val")


# ------------------------------------------------------------------------------------ memory


def test_memory_is_counted_from_the_first_token_on(words: Tokenizer) -> None:
    """Even ids are what the model would write."""
    even = [i for i in range(1000, 2000) if i % 2 == 0]
    texts = [Text(words.decode(even[i : i + 40]), "") for i in (0, 100)]
    encoded = [words.encode(text.scored) for text in texts]
    asker = Asker(flat, words, max_seq_len=64)
    outcome = memorisation.check(texts, asker, "here", prompt=4, length=3, samples=500)
    matches = []
    for ids in encoded:
        for place in range(len(ids) - 6):
            after = ids[place + 4 : place + 7]
            matches.append(next((i for i, t in enumerate(after) if t % 2), 3))
    assert outcome.num_samples == len(matches)
    assert outcome.metrics["exact_match"].value == pytest.approx(np.mean(np.equal(matches, 3)))
    assert outcome.metrics["mean_match"].value == pytest.approx(np.mean(matches))
    assert outcome.metrics["longest_match"].value == max(matches)
    with pytest.raises(ConfigError, match="none of 2 documents has the 200 tokens"):
        memorisation.check(texts, asker, "here", prompt=100, length=100)
