"""Rules of sampling against NumPy and transformers; chance against counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from neo_jax.config import ModelConfig
from neo_jax.generate import from_keywords, sampling
from neo_jax.generate.requests import Request, rules, texts

VOCAB, ROWS, PLACES = 40, 3, 24
CONFIG = ModelConfig(vocab_size=VOCAB, num_layers=2, embed_dim=8, num_heads=2)
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
# Texts over few tokens, so that n-grams and biased sequences occur.
PROMPTS = [RNG.integers(0, 6, n).tolist() for n in (3, 8, 15)]
NEW = [RNG.integers(0, 6, 4).tolist() for _ in range(ROWS)]


def before_the_token(options):
    """Texts of a prompt and four new tokens each, and the rules of the options."""
    ids, length = np.zeros((ROWS, PLACES), np.int32), np.zeros(ROWS, np.int32)
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)], length[row] = prompt, len(prompt)
    state = texts(ids, length, options, VOCAB)
    state = jax.tree.map(jnp.asarray, state)
    for i in range(len(NEW[0])):
        token = jnp.asarray([new[i] for new in NEW])
        state = state.append(token, jnp.ones(ROWS, bool))
    group = [Request(i, prompt, 9, 0, 1) for i, prompt in enumerate(PROMPTS)]
    return state, jax.tree.map(
        jnp.asarray, rules(group, options, CONFIG, None, ROWS * options.rows_per_prompt)
    )


def scores(**options) -> np.ndarray:
    state, of_rows = before_the_token(from_keywords(options))
    return np.asarray(sampling.process(jnp.asarray(LOGITS), state, of_rows))


def kept(**options) -> list[set[int]]:
    """Which tokens may be drawn, of each row."""
    _, of_rows = before_the_token(from_keywords(options))
    scaled = jnp.asarray(LOGITS / np.float32(from_keywords(options).chance))
    ranked, ids = map(np.asarray, sampling.candidates(scaled, of_rows))
    return [
        set(row[np.isfinite(values)].tolist()) for row, values in zip(ids, ranked, strict=True)
    ]


# ----------------------------------------------------------------------------- in plain NumPy


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(np.float64(x) - x.max())
    return e / e.sum()


def oracle_scores(row: int, name: str, value) -> np.ndarray:
    x, new = LOGITS[row].astype(np.float64), NEW[row]
    text = PROMPTS[row] + new
    if name == "repetition_penalty":
        for t in set(text):
            x[t] = x[t] * value if x[t] < 0 else x[t] / value
    elif name == "frequency_penalty":
        for t in new:
            x[t] -= value
    elif name == "presence_penalty":
        for t in set(new):
            x[t] -= value
    elif name == "no_repeat_ngram_size":
        for t in range(VOCAB):
            longer = [*text, t]
            grams = [tuple(longer[i : i + value]) for i in range(len(longer) - value + 1)]
            if grams.count(grams[-1]) > 1:
                x[t] = -np.inf
    elif name == "bad_words_ids":
        for word in value:
            if text[len(text) - len(word) + 1 :] == word[:-1]:
                x[word[-1]] = -np.inf
    elif name == "sequence_bias":
        for word, bias in value.items():
            if text[len(text) - len(word) + 1 :] == list(word[:-1]):
                x[word[-1]] += bias
    elif name == "logit_bias":
        for t, bias in value.items():
            x[t] += bias
    elif name == "min_new_tokens" and len(new) < value:
        x[[7, 9]] = -np.inf
    return x


TAIL = NEW[1][-2:]
PENALTIES = {
    "repetition_penalty": [1.3, 0.7],
    "frequency_penalty": [0.8],
    "presence_penalty": [-1.5],
    "no_repeat_ngram_size": [1, 2, 3],
    "bad_words_ids": [[[5], [*TAIL, 3], [TAIL[-1], 4], [39]]],
    "sequence_bias": [{(2,): -4.0, (*TAIL, 3): 2.5, (TAIL[-1], 3): 1.0}],
    "logit_bias": [{0: 5.0, 39: -5.0}],
    "min_new_tokens": [4, 5],
}


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in PENALTIES.items() for v in values], ids=str
)
def test_scores_equal_the_oracle(name: str, value) -> None:
    got = scores(**{name: value}, eos_token_id=[7, 9], max_new_tokens=20)
    for row in range(ROWS):
        np.testing.assert_allclose(got[row], oracle_scores(row, name, value), rtol=1e-5)


def oracle_kept(row: int, name: str, value: float) -> set[int]:
    x = LOGITS[row]
    p, best_first = softmax(x), np.argsort(-x)
    if name == "top_k":
        return set(best_first[:value].tolist())
    if name == "min_p":
        return set(np.flatnonzero(p >= value * p.max()).tolist())
    if name == "typical_p":
        surprise = -np.log(p)
        best_first = np.argsort(np.abs(surprise - (p * surprise).sum()))
    chosen: set[int] = set()
    for t in best_first.tolist():  # until they are likely enough together
        chosen.add(t)
        if p[list(chosen)].sum() >= value:
            break
    return chosen


FILTERS = {"top_k": [1, 7, 40], "top_p": [0.1, 0.8, 0.99], "min_p": [0.02, 1.0]}
FILTERS |= {"typical_p": [0.2, 0.9]}


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in FILTERS.items() for v in values], ids=str
)
def test_candidates_equal_the_oracle(name: str, value: float) -> None:
    assert kept(**{name: value}) == [oracle_kept(row, name, value) for row in range(ROWS)]


def test_filters_apply_one_after_another() -> None:
    """Top-p counts within what top-k left, renormalised."""
    for row, got in enumerate(kept(top_k=5, top_p=0.7, temperature=2.0)):
        best = np.argsort(-LOGITS[row])[:5]
        p = softmax(LOGITS[row][best] / 2)
        wanted = best[: int(np.searchsorted(np.cumsum(p), 0.7)) + 1]
        assert got == set(wanted.tolist())


# ----------------------------------------------------------------------- as transformers do


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("RepetitionPenaltyLogitsProcessor", {"repetition_penalty": 1.3}),
        ("NoRepeatNGramLogitsProcessor", {"no_repeat_ngram_size": 2}),
        ("NoBadWordsLogitsProcessor", {"bad_words_ids": [[5], [1, 2], [3, 0, 1]]}),
        ("SequenceBiasLogitsProcessor", {"sequence_bias": {(2,): -4.0, (1, 3): 2.5}}),
        ("TopKLogitsWarper", {"top_k": 6}),
        ("TopPLogitsWarper", {"top_p": 0.85}),
        ("MinPLogitsWarper", {"min_p": 0.1}),
        ("TypicalLogitsWarper", {"typical_p": 0.6}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_rules_equal_transformers(kind: str, options) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    (value,) = options.values()
    extra = {"eos_token_id": 7} if "BadWords" in kind else {}
    processor = getattr(transformers.generation.logits_process, kind)(value, **extra)
    ours = scores(**options) if "Processor" in kind else kept(**options)
    for row in range(ROWS):
        ids = torch.tensor([PROMPTS[row] + NEW[row]])
        theirs = processor(ids, torch.tensor(LOGITS[row : row + 1]))[0].numpy()
        if "Processor" in kind:
            np.testing.assert_allclose(ours[row], theirs, rtol=1e-5)
        else:
            assert ours[row] == set(np.flatnonzero(np.isfinite(theirs)).tolist())


# --------------------------------------------------------------------------------- chance


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"top_k": 6}, {"top_p": 0.8, "temperature": 1.5}],
    ids=str,
)
def test_draws_follow_the_distribution(options) -> None:
    """Chi-square over 20,000 draws of one row, each under its own seed."""
    count, asked = 20_000, from_keywords(options)
    state, of_rows = before_the_token(asked)
    many = lambda x: jnp.repeat(x[1:2], count, axis=0)  # noqa: E731
    state, of_rows = jax.tree.map(many, (state, of_rows))
    of_rows = dataclasses.replace(of_rows, seed=jnp.arange(count, dtype="uint32"))
    drawn = np.asarray(jax.jit(sampling.draw)(many(jnp.asarray(LOGITS)), state, of_rows))
    p = softmax(LOGITS[1] / asked.chance)
    allowed = sorted(kept(**options)[1])
    assert set(drawn.tolist()) <= set(allowed)
    p = p[allowed] / p[allowed].sum()
    seen = np.bincount(drawn, minlength=VOCAB)[allowed]
    rare = p * count < 5  # too few for the statistic: taken together
    groups = lambda x: np.append(x[~rare], x[rare].sum())  # noqa: E731
    keep = groups(p) > 0
    test = scipy.stats.chisquare(groups(seen)[keep], groups(p)[keep] * count)
    assert test.pvalue > 1e-3


def test_temperature_0_beside_others_is_greedy() -> None:
    state, of_rows = before_the_token(from_keywords({"temperature": 5.0}))
    heat = jnp.asarray([0.0, 5.0, 0.0])
    for seed in range(5):
        seeds = jnp.full(ROWS, seed, "uint32")
        now = dataclasses.replace(of_rows, temperature=heat, seed=seeds)
        drawn = np.asarray(sampling.draw(jnp.asarray(LOGITS), state, now))
        assert drawn[[0, 2]].tolist() == LOGITS.argmax(axis=1)[[0, 2]].tolist()
