"""Plans of rows in files: the same rows, made once, and no copy for another process."""

import os
import pickle

import numpy as np
import pytest

from neo_jax.data import packing, plans


class Documents:
    """A `TokenStore` of ends alone, in a file as where they were prepared."""

    num_bytes, eos_id, fingerprint = 0, 0, ""

    def __init__(self, folder, seed=0):
        lengths = np.random.default_rng(seed).integers(1, 90, 3000)
        np.save(folder / f"{seed}.npy", np.cumsum(lengths))
        self.path = folder / f"{seed}.npy"
        self.num_documents, self.num_tokens = len(lengths), int(lengths.sum())

    def document_ends(self):
        return np.load(self.path, mmap_mode="r")

    def read(self, ranges):
        raise AssertionError("planning reads no token")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows_of(rows):
    return [rows.pieces(i) for i in range(rows.num_rows)]


@pytest.mark.parametrize("kind", [packing.BestFitRows, packing.DocumentRows])
def test_large_plans_lie_in_files_and_go_to_workers_by_name(kind, tmp_path, monkeypatch):
    store = Documents(tmp_path)
    expected = kind(store, 64)
    in_memory = len(pickle.dumps(expected))
    monkeypatch.setattr(plans, "_WORTH_A_FILE", 0)
    rows = kind(store, 64)
    sent = pickle.dumps(rows)
    assert rows_of(pickle.loads(sent)) == rows_of(rows) == rows_of(expected)
    assert rows_of(pickle.loads(pickle.dumps(pickle.loads(sent)))) == rows_of(expected)
    if kind is packing.BestFitRows:  # whose plan is more than the ends of documents
        assert len(sent) < 1000 < in_memory


def test_a_plan_is_made_once_for_each_set_of_documents(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "_WORTH_A_FILE", 0)
    store, other = Documents(tmp_path), Documents(tmp_path, seed=1)
    first = rows_of(packing.BestFitRows(store, 64))
    different = (
        rows_of(packing.BestFitRows(other, 64)),
        rows_of(packing.BestFitRows(store, 32)),
    )
    assert first not in different
    assert len(list((cache / "neo_jax" / "plans").iterdir())) == 3
    monkeypatch.setattr(packing, "_plan", None)  # not made again
    assert rows_of(packing.BestFitRows(store, 64)) == first


def test_a_plan_that_finds_no_room_stays_in_memory(cache, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(plans, "_WORTH_A_FILE", 0)
    store = Documents(tmp_path)
    cache.write_text("a file where the folder should be")
    rows = packing.BestFitRows(store, 64)
    assert "stays in memory" in caplog.text
    assert rows_of(pickle.loads(pickle.dumps(rows))) == rows_of(rows)
    assert (
        sum(length for row in rows_of(rows) for _, length in row) == store.document_ends()[-1]
    )


def test_plans_long_not_used_make_room(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "_WORTH_A_FILE", 0)
    folder = cache / "neo_jax" / "plans"
    stores = [Documents(tmp_path, seed) for seed in range(4)]

    def plan_of(number):
        before = set(folder.glob("*"))
        packing.BestFitRows(stores[number], 64)
        (new,) = set(folder.glob("*")) - before
        return new

    first, second, third = (plan_of(number) for number in range(3))
    half = folder / "best-fit-64-abc.1.tmp"  # of a process that was killed
    half.mkdir()
    one = sum(path.stat().st_size for path in first.iterdir())
    monkeypatch.setattr(plans, "_MOST_BYTES", int(2.5 * one))
    for age, path in ((5, half), (4, first), (3, second), (2, third)):
        os.utime(path, (0, path.stat().st_mtime - age * plans._IN_USE_SECONDS))
    mapped = packing.BestFitRows(stores[0], 64)  # opened, and so the newest
    expected = rows_of(mapped)
    fourth = plan_of(3)
    assert set(folder.iterdir()) == {first, fourth}
    os.utime(first, (0, 0))
    monkeypatch.setattr(plans, "_MOST_BYTES", 0)
    plan_of(1)
    assert not first.exists()
    assert fourth.exists()  # however large: a run may be handing it to its workers
    assert rows_of(mapped) == expected  # removed, and mapped all the same
