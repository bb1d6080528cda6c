"""Examples: each comes once an epoch, and neither hosts nor a new start change the order."""

import pickle

import numpy as np
import pytest

from neo_jax.config import ConfigError, DataConfig
from neo_jax.data import examples
from neo_jax.data.examples import ExampleBatches

COUNT, SEQ = 23, 40


def batches(
    batch_size: int = 4,
    host: int = 0,
    hosts: int = 1,
    endless: bool = True,
    seed: int = 5,
    group: int = 0,
    count: int = COUNT,
) -> ExampleBatches:
    lengths = np.arange(count) * 7 % SEQ + 1
    tokens = np.where(np.arange(SEQ) < lengths[:, None], np.arange(count)[:, None], -1)
    return ExampleBatches(
        arrays={
            "inputs": tokens.astype(np.int32),
            "labels": np.arange(count, dtype=np.int32),
            "weights": np.ones(count, np.float32),
        },
        lengths=lengths,
        tokens=("inputs",),
        multiple=16,
        seed=seed,
        batch_size=batch_size,
        host_rows=examples.share(batch_size, host, hosts),
        endless=endless,
        length_group=group,
    )


def stream(made: ExampleBatches, count: int) -> list[int]:
    drawn = examples.pipeline(made, DataConfig(batch_size=made.batch_size))
    return [int(label) for _ in range(count) for label in next(drawn)["labels"]]


@pytest.mark.parametrize("count", [COUNT, 300])
@pytest.mark.parametrize("group", [0, 2, 4, 1000])
def test_every_example_comes_once_an_epoch_in_another_order_each_time(
    group: int, count: int
) -> None:
    seen = stream(batches(batch_size=1, group=group, count=count), 2 * count)
    first, second = seen[:count], seen[count:]
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second
    assert stream(batches(1, seed=6, group=group, count=count), count) != first


def test_rows_of_like_length_come_together_in_any_order_in_every_epoch() -> None:
    grouped = batches(group=4, count=3 * 128 + 2)
    spread = [
        np.ptp(grouped.lengths[grouped.at(position)["labels"]])
        for position in range(0, 3 * grouped.num_sequences, 4)
    ]
    # 128 rows of 40 lengths are sorted together, give or take a tenth.
    assert np.median(spread) <= 4 and np.mean(np.asarray(spread) <= 9) > 0.95
    means = [
        grouped.lengths[grouped.at(position)["labels"]].mean() for position in range(0, 128, 4)
    ]
    assert means != sorted(means) and means != sorted(means, reverse=True)


def test_grouping_by_length_is_of_the_data_that_a_checkpoint_names() -> None:
    config = DataConfig(batch_size=4)
    one = examples.pipeline(batches(group=4), config)
    for _ in range(13):
        next(one)
    other = examples.pipeline(pickle.loads(pickle.dumps(batches(group=4))), config)
    other.restore(one.state())
    np.testing.assert_equal(next(other), next(one))
    with pytest.raises(ConfigError, match="length_group '4' → None"):
        examples.pipeline(batches(), config).restore(one.state())


@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_the_batch_size_and_the_hosts_do_not_change_the_order(
    batch_size: int, group: int
) -> None:
    expected = stream(batches(batch_size=1, group=group), 24)
    assert stream(batches(batch_size, group=group), 24 // batch_size) == expected
    if batch_size % 2 == 0:
        halves = [batches(batch_size, host, 2, group=group).at(0)["labels"] for host in (0, 1)]
        assert np.concatenate(halves).tolist() == expected[:batch_size]


def test_a_new_start_goes_on_where_the_old_one_was() -> None:
    config = DataConfig(batch_size=4)
    one = examples.pipeline(batches(), config)
    for _ in range(7):
        next(one)
    other = examples.pipeline(batches(), config)
    other.restore(one.state())
    np.testing.assert_equal(next(other), next(one))
    changed = examples.pipeline(batches(), config)
    with pytest.raises(ConfigError, match="the data changed since the checkpoint: seed"):
        examples.pipeline(batches(seed=1), config).restore(changed.state())


def test_a_batch_is_as_long_as_its_longest_row_rounded_up_on_every_host() -> None:
    for position in range(0, 20, 4):
        whole = batches().at(position)
        longest = (whole["inputs"] >= 0).sum(axis=1).max()
        assert whole["inputs"].shape[1] == min(SEQ, -(-longest // 16) * 16)
        part = batches(host=1, hosts=2).at(position)
        np.testing.assert_array_equal(part["inputs"], whole["inputs"][2:])


def test_held_out_examples_come_once_in_order_and_the_rest_has_no_weight() -> None:
    made = batches(endless=False)
    drawn = [made.at(position) for position in range(0, COUNT, 4)]
    counted = [
        int(label)
        for batch in drawn
        for label, weight in zip(batch["labels"], batch["weights"], strict=True)
        if weight
    ]
    assert counted == list(range(COUNT))
    assert {len(batch["labels"]) for batch in drawn} == {4}


def test_a_batch_that_does_not_divide_over_the_hosts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_size=4 does not divide over 3 hosts"):
        examples.share(4, 0, 3)
