"""Examples: each comes once an epoch, and neither hosts nor a new start change the order."""

import numpy as np
import pytest

from neo_jax.config import ConfigError, DataConfig
from neo_jax.data import examples
from neo_jax.data.examples import ExampleBatches

COUNT, SEQ = 23, 40


def batches(
    batch_size: int = 4, host: int = 0, hosts: int = 1, endless: bool = True, seed: int = 5
) -> ExampleBatches:
    lengths = np.arange(COUNT) * 7 % SEQ + 1
    tokens = np.where(np.arange(SEQ) < lengths[:, None], np.arange(COUNT)[:, None], -1)
    return ExampleBatches(
        arrays={
            "inputs": tokens.astype(np.int32),
            "labels": np.arange(COUNT, dtype=np.int32),
            "weights": np.ones(COUNT, np.float32),
        },
        lengths=lengths,
        tokens=("inputs",),
        multiple=16,
        seed=seed,
        batch_size=batch_size,
        host_rows=examples.share(batch_size, host, hosts),
        endless=endless,
    )


def stream(made: ExampleBatches, count: int) -> list[int]:
    drawn = examples.pipeline(made, DataConfig(batch_size=made.batch_size))
    return [int(label) for _ in range(count) for label in next(drawn)["labels"]]


def test_every_example_comes_once_an_epoch_in_another_order_each_time() -> None:
    seen = stream(batches(batch_size=1), 2 * COUNT)
    first, second = seen[:COUNT], seen[COUNT:]
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert first != second
    assert stream(batches(batch_size=1, seed=6), COUNT) != first


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_the_batch_size_and_the_hosts_do_not_change_the_order(batch_size: int) -> None:
    expected = stream(batches(batch_size=1), 24)
    assert stream(batches(batch_size), 24 // batch_size) == expected
    if batch_size % 2 == 0:
        halves = [batches(batch_size, host, 2).at(0)["labels"] for host in (0, 1)]
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
