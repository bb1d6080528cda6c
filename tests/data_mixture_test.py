"""A mixture keeps its proportions, and every source is read in order, without a gap."""

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_jax.config import ConfigError, DataConfig
from neo_jax.data.mixture import Mixture

WEIGHTS = st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(any)


@settings(max_examples=60)
@given(WEIGHTS, st.integers(1, 400))
def test_proportions_are_exact_within_one_block(weights, length):
    mixture = Mixture([weights], ())
    counts = collections.Counter(mixture.place(t)[0] for t in range(length))
    for source, weight in enumerate(weights):
        exact = length * weight / sum(weights)
        assert abs(counts[source] - exact) < len(weights)
        assert mixture.counts(length)[source] == counts[source]


@settings(max_examples=60)
@given(WEIGHTS)
def test_a_source_of_weight_0_gives_nothing(weights):
    mixture = Mixture([weights], ())
    for t in range(200):
        assert weights[mixture.place(t)[0]] > 0


@settings(max_examples=60)
@given(st.lists(WEIGHTS, min_size=1, max_size=4), st.integers(1, 60))
def test_each_source_is_walked_without_gap_or_repeat(stages, every):
    width = max(map(len, stages))
    stages = [stage + [0.0] * (width - len(stage)) for stage in stages]
    mixture = Mixture(stages, [every * (i + 1) for i in range(len(stages) - 1)])
    taken = collections.Counter()
    for t in range(every * (len(stages) + 2)):
        assert mixture.counts(t) == [taken[s] for s in range(width)]
        source, index = mixture.place(t)
        assert index == taken[source]
        taken[source] += 1


def test_weights_change_at_the_position_that_was_given():
    mixture = Mixture([[1, 0], [0, 1]], [10])
    assert [mixture.place(t)[0] for t in range(8, 12)] == [0, 0, 1, 1]


def test_far_away_is_as_near_as_here():
    mixture = Mixture([[0.3, 0.7]], ())
    far = 10**15
    counts = mixture.counts(far)
    assert sum(counts) == far
    assert abs(counts[0] - 0.3 * far) < 2
    assert mixture.place(far)[1] == counts[mixture.place(far)[0]]


@pytest.mark.parametrize(
    ("mixture", "changes", "words"),
    [
        ((("a",),), (), "1 weight"),
        ((("a", 1, 2),), (), "1 weight"),
        ((("a", 1),), (5,), "2 weight"),
        ((("a", 0.0),), (), "all 0"),
        ((("a", -1.0),), (), "none negative"),
        ((("a", 1), ("a", 2)), (), "twice"),
        ((("a", 1, 1, 1),), (5, 5), "later than the one before"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(mixture, changes, words):
    with pytest.raises(ConfigError, match=words):
        DataConfig(mixture=mixture, mixture_changes=changes)
