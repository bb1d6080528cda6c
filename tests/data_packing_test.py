"""No token is lost: each is a target exactly once, in every way of packing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_jax import tokenizer as tokenizers
from neo_jax.data import packing
from neo_jax.data.tokens import EncodedDocument, MemoryTokens

PACKINGS = ("concat", "best_fit", "none")
EOS = 50256
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def gpt2() -> tokenizers.Tokenizer:
    return tokenizers.load("gpt2")


def make_store(lengths, tokenizer, masked=False) -> MemoryTokens:
    """Documents whose tokens are all different, so that each can be followed."""
    documents, token = [], 0
    for index, length in enumerate(lengths):
        ids = np.arange(token, token + length + 1).astype(np.uint16)
        ids[-1] = EOS
        mask = np.arange(length + 1) % 3 > 0 if masked else None
        documents.append(EncodedDocument(index, ids, mask, length, "test", index))
        token += length
    return MemoryTokens(documents, tokenizer)


def all_rows(store, how, seq_len, isolate=False):
    rows = packing.make_rows(store, how, seq_len)
    batch = packing.empty_batch(rows.num_rows, seq_len, isolate, EOS)
    pieces = [rows.pieces(row) for row in range(rows.num_rows)]
    packing.fill(batch, range(rows.num_rows), store, pieces)
    return batch


@pytest.mark.parametrize("how", PACKINGS)
@settings(max_examples=60)
@given(lengths=LENGTHS, seq_len=st.integers(1, 50))
def test_every_token_is_a_target_exactly_once(gpt2, how, lengths, seq_len):
    store = make_store(lengths, gpt2)
    batch = all_rows(store, how, seq_len)
    seen = batch["targets"][batch["weights"] > 0]
    (stream,), _ = store.read([(0, store.num_tokens)])
    assert sorted(seen.tolist()) == sorted(stream.tolist())
    assert np.count_nonzero(seen == EOS) == len(lengths)
    assert batch["weights"].sum() == sum(lengths) + len(lengths)


@pytest.mark.parametrize("how", PACKINGS)
@settings(max_examples=60)
@given(lengths=LENGTHS, seq_len=st.integers(1, 50))
def test_the_input_is_the_token_before_the_target(gpt2, how, lengths, seq_len):
    store = make_store(lengths, gpt2)
    batch = all_rows(store, how, seq_len)
    (stream,), _ = store.read([(-1, store.num_tokens)])
    before = {}
    for previous, token in zip(stream.tolist(), stream.tolist()[1:], strict=False):
        before.setdefault(token, set()).add(previous)
    used = batch["weights"] > 0
    for x, y in zip(batch["inputs"][used], batch["targets"][used], strict=True):
        assert int(x) in before[int(y)]


@settings(max_examples=60)
@given(lengths=LENGTHS, seq_len=st.integers(1, 50))
def test_concat_is_the_stream_itself(gpt2, lengths, seq_len):
    store = make_store(lengths, gpt2)
    batch = all_rows(store, "concat", seq_len)
    (stream,), _ = store.read([(-1, store.num_tokens)])
    count = store.num_tokens
    assert batch["inputs"].ravel()[:count].tolist() == stream[:-1].tolist()
    assert batch["targets"].ravel()[:count].tolist() == stream[1:].tolist()
    # Only the last row may hold padding.
    assert (
        batch["weights"].ravel()[:count].all() and not batch["weights"].ravel()[count:].any()
    )


@settings(max_examples=60)
@given(lengths=LENGTHS, seq_len=st.integers(2, 50))
def test_best_fit_cuts_no_document_that_fits(gpt2, lengths, seq_len):
    store = make_store(lengths, gpt2)
    rows = packing.make_rows(store, "best_fit", seq_len)
    pieces = [piece for row in range(rows.num_rows) for piece in rows.pieces(row)]
    whole = {
        (int(e - n - 1), n + 1) for e, n in zip(store.document_ends(), lengths, strict=True)
    }
    assert {(s, n) for s, n in whole if n <= seq_len} <= set(pieces)
    assert len(pieces) == sum(-(-(n + 1) // seq_len) for n in lengths)
    assert rows.num_rows <= packing.make_rows(store, "none", seq_len).num_rows


def one_by_one(lengths, seq_len) -> list[int]:
    """Best-fit decreasing as the paper words it; the room that is left in each bin."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [b for b, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda b: rooms[b])] -= length
        else:
            rooms.append(seq_len - length)
    return sorted(rooms)


@settings(max_examples=200)
@given(data=st.data(), seq_len=st.integers(1, 60))
def test_best_fit_is_what_placing_one_by_one_gives(data, seq_len):
    lengths = np.asarray(
        data.draw(st.lists(st.integers(1, seq_len), min_size=1, max_size=120)), np.uint8
    )
    bins = packing._best_fit(lengths, seq_len)
    rooms = seq_len - np.bincount(bins, lengths)
    assert sorted(rooms.astype(int).tolist()) == one_by_one(lengths.tolist(), seq_len)


def test_best_fit_wastes_little():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 512, 5000).astype(np.uint16)
    bins = packing._best_fit(lengths, 512)
    assert np.bincount(bins, lengths).max() <= 512
    assert (bins.max() + 1) * 512 < 1.01 * lengths.sum()


@pytest.mark.parametrize("how", PACKINGS)
@settings(max_examples=60)
@given(lengths=LENGTHS, seq_len=st.integers(1, 50))
def test_isolated_segments_hold_one_document_each(gpt2, how, lengths, seq_len):
    store = make_store(lengths, gpt2)
    batch = all_rows(store, how, seq_len, isolate=True)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for b in range(len(batch["inputs"])):
        segments, weights = batch["segment_ids"][b], batch["weights"][b]
        assert ((segments > 0) == (weights > 0)).all()
        numbers = np.unique(segments[segments > 0])
        assert numbers.tolist() == list(range(1, len(numbers) + 1))
        for number in numbers:
            places = np.flatnonzero(segments == number)
            assert (np.diff(places) == 1).all()
            assert batch["positions"][b, places].tolist() == list(range(len(places)))
            tokens = batch["targets"][b, places]
            assert len(set(document_of[tokens[tokens != EOS]])) <= 1
            assert EOS not in batch["inputs"][b, places[1:]]


def test_padding_has_segment_and_position_0(gpt2):
    batch = all_rows(make_store([3], gpt2), "none", 8, isolate=True)
    assert batch["segment_ids"][0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert batch["positions"][0].tolist() == [0, 1, 2, 3, 0, 0, 0, 0]


@pytest.mark.parametrize("how", PACKINGS)
@settings(max_examples=40)
@given(lengths=LENGTHS, seq_len=st.integers(1, 50))
def test_masks_stay_with_their_tokens(gpt2, how, lengths, seq_len):
    store = make_store(lengths, gpt2, masked=True)
    batch = all_rows(store, how, seq_len)
    (stream,), masks = store.read([(0, store.num_tokens)])
    assert masks is not None
    learned = sorted(stream[masks[0]].tolist())
    assert sorted(batch["targets"][batch["weights"] > 0].tolist()) == learned


def test_types_are_those_of_the_contract(gpt2):
    batch = all_rows(make_store([5, 9], gpt2), "concat", 4, isolate=True)
    types = {key: value.dtype.name for key, value in batch.items()}
    assert types == {
        "inputs": "int32",
        "targets": "int32",
        "weights": "float32",
        "segment_ids": "int32",
        "positions": "int32",
    }
