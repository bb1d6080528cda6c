"""A request's score is that of the definition, whatever is computed beside it, and where."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_jax import config as config_lib
from neo_jax import sharding, state
from neo_jax.config import MeshConfig
from neo_jax.evaluate import batching
from neo_jax.evaluate.batching import Request
from neo_jax.evaluate.scoring import Score, Scorer
from neo_jax.model import NeoLM
from neo_jax.state import Params

CONFIG = config_lib.preset_model(
    "tiny",
    num_layers=2,
    embed_dim=32,
    num_heads=2,
    window_size=8,
    vocab_size=100,
    vocab_multiple=16,
    max_seq_len=48,
)


@pytest.fixture(scope="module")
def params() -> Params:
    return large_params()


def large_params() -> Params:
    """Weights large enough that predictions differ."""
    made = nnx.to_pure_dict(nnx.state(NeoLM(CONFIG, nnx.Rngs(params=0))))
    return jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim > 1 else leaf, made)


def random_requests(count: int, seed: int = 0) -> list[Request]:
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        length = int(draw.integers(2, CONFIG.max_seq_len + 2))
        tokens = draw.integers(0, CONFIG.vocab_size, length).tolist()
        found.append(Request(tokens, int(draw.integers(1, length))))
    return found


def one_device() -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def logits(params: Params, texts: list[list[int]]) -> np.ndarray:
    """All of them, in one shape: causality makes the padding harmless."""
    ids = np.zeros((24, CONFIG.max_seq_len), np.int32)
    for row, tokens in enumerate(texts):
        ids[row, : len(tokens)] = tokens
    return np.asarray(_forward(params, ids))


@jax.jit
def _forward(params: Params, ids: jax.Array) -> jax.Array:
    graph, _ = state.model_graph(CONFIG)
    return nnx.merge(graph, params).logits(ids)


def definition(params: Params, requests: list[Request]) -> list[Score]:
    all_logits = logits(params, [request.tokens[:-1] for request in requests])
    log_probs = np.asarray(jax.nn.log_softmax(all_logits, axis=-1), np.float64)
    scores = []
    for row, (tokens, num) in zip(log_probs, requests, strict=False):
        places = np.arange(len(tokens) - 1 - num, len(tokens) - 1)
        hits = row[places].argmax(axis=-1) == np.asarray(tokens[-num:])
        leading = int(np.argmin(hits)) if not hits.all() else num
        nats = float(row[places, tokens[-num:]].sum())
        scores.append(Score(nats, bool(hits.all()), leading))
    return scores


def assert_same(found: list[Score], expected: list[Score], tolerance: float) -> None:
    np.testing.assert_allclose(
        [s.loglikelihood for s in found], [s.loglikelihood for s in expected], atol=tolerance
    )
    assert [s[1:] for s in found] == [s[1:] for s in expected]


@pytest.fixture(scope="module")
def asked(params: Params) -> tuple[list[Request], list[Score]]:
    """Requests of every length, some of them parts or twins of others, greedy ones too."""
    requests = random_requests(12)
    longest = max(requests, key=lambda request: len(request.tokens)).tokens
    requests += [Request([*longest[:-1], token], 1) for token in (1, 2)]
    requests += [Request(longest[:9], 3), Request(longest, 5), Request(longest, 5)]
    # What the model itself would write, token by token.
    written = longest[:4]
    for _ in range(3):
        written = [*written, int(logits(params, [written])[0, len(written) - 1].argmax())]
    requests += [Request(written, 3), Request([*written[:-1], (written[-1] + 1) % 100], 3)]
    scores = Scorer(CONFIG, one_device()).score(params, requests)
    return requests, scores


def test_scores_are_those_of_the_definition(
    params: Params, asked: tuple[list[Request], list[Score]]
) -> None:
    requests, scores = asked
    assert_same(scores, definition(params, requests), 1e-5)
    assert scores[-2][1:] == (True, 3) and scores[-1][1:] == (False, 2)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_scores_do_not_depend_on_the_batch(
    params: Params, asked: tuple[list[Request], list[Score]], batch_size: int
) -> None:
    requests, scores = asked
    scorer = Scorer(CONFIG, one_device(), batch_size=batch_size)
    assert_same(scorer.score(params, requests[::-1])[::-1], scores, 1e-5)


def test_scores_do_not_depend_on_the_devices(
    params: Params, asked: tuple[list[Request], list[Score]], mesh: jax.sharding.Mesh
) -> None:
    requests, scores = asked
    _, abstract = state.model_graph(CONFIG)
    places = nnx.to_pure_dict(sharding.param_shardings(abstract, mesh))
    spread = jax.device_put(params, places)
    assert_same(Scorer(CONFIG, mesh).score(spread, requests), scores, 1e-5)


@pytest.mark.parametrize(
    "request_",
    [Request([1, 2], 2), Request([1], 1), Request([1, 2], 0), Request([1] * 50, 1)],
    ids=["nothing before", "one token", "nothing scored", "too long"],
)
def test_a_request_that_cannot_be_scored_is_refused(params: Params, request_: Request) -> None:
    with pytest.raises(ValueError, match=f"a request of {len(request_.tokens)} tokens"):
        Scorer(CONFIG, one_device()).score(params, [request_])


def test_no_requests_no_scores(params: Params) -> None:
    assert Scorer(CONFIG, one_device()).score(params, []) == []


# --------------------------------------------------------------------------------- batches


@given(
    seed=st.integers(0, 99),
    count=st.integers(1, 40),
    shards=st.sampled_from([1, 2, 8]),
    tokens_per_batch=st.sampled_from([1, 100, 1000]),
    cost=st.sampled_from([1.0, 1e6]),
)
@settings(max_examples=40)
def test_every_scored_token_is_asked_once_after_its_own_past(
    seed: int, count: int, shards: int, tokens_per_batch: int, cost: float
) -> None:
    requests = random_requests(count, seed)
    requests.append(Request(requests[0].tokens[:2], 1))
    seen: dict[int, list[tuple[int, int]]] = {i: [] for i in range(len(requests))}
    for batch in batching.plan(
        requests,
        shards=shards,
        tokens_per_batch=tokens_per_batch,
        tokens_per_program=cost,
        longest=CONFIG.max_seq_len,
    ):
        length = batch.inputs.shape[1]
        assert batch.inputs.shape[0] % shards == 0 and length <= CONFIG.max_seq_len
        assert batch.places.shape[1] % batch.block == 0
        rows = batch.inputs.reshape(shards, -1)
        for shard, slot in np.argwhere(batch.owners >= 0):
            owner, rank = batch.owners[shard, slot], batch.ranks[shard, slot]
            tokens, num = requests[owner]
            place, at = batch.places[shard, slot], len(tokens) - num + rank
            start = place - place % length
            assert place - start == at - 1
            np.testing.assert_array_equal(rows[shard, start : place + 1], tokens[:at])
            assert batch.targets[shard, slot] == tokens[at]
            seen[owner].append(rank)
    assert all(sorted(seen[i]) == list(range(r.num_scored)) for i, r in enumerate(requests))


def test_answers_that_differ_in_their_last_token_share_a_row() -> None:
    requests = [Request([5, 6, 7, answer], 1) for answer in (1, 2, 3, 4)]
    requests.append(Request([5, 6, 9], 1))  # begins the others, but for its last token
    (batch,) = batching.plan(
        requests, shards=1, tokens_per_batch=64, tokens_per_program=1, longest=16
    )
    assert len(batch.inputs) == 1


@given(
    lengths=st.lists(st.sampled_from([16, 32, 48, 80]), min_size=1, max_size=12),
    cost=st.floats(0, 300),
)
def test_padded_lengths_cost_least(lengths: list[int], cost: float) -> None:
    def price(chosen: tuple[int, ...]) -> float:
        padded = [min(c for c in chosen if c >= length) for length in lengths]
        return sum(padded) + cost * len(chosen)

    longest = max(lengths)
    others = sorted(set(lengths) - {longest})
    every = [
        (*some, longest) for size in range(3) for some in itertools.combinations(others, size)
    ]
    found = tuple(batching.choose_lengths(lengths, cost, 3))
    assert price(found) == pytest.approx(min(map(price, every)))
