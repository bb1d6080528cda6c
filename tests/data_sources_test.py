"""Every format gives the same documents, and says in one line what is wrong with a bad one."""

import bz2
import gzip
import json
import lzma
import os
import pathlib
import subprocess
import sys

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from array_record.python import array_record_module

import fake_gcs
from neo_jax import tokenizer as tokenizers
from neo_jax.config import ConfigError, DataConfig
from neo_jax.data import corpus, readers, sources
from neo_jax.data.records import Document, Unreadable
from neo_jax.data.tokens import encode

TEXTS = ["first text", "second\n\ntext é", "third 日本", "fourth 👍 text", "fifth"]


def texts(name, **keys) -> list[str]:
    return [record.text for record in records(name, **keys)]


def records(name, **keys):
    source = sources.open_source(str(name), DataConfig(source=str(name), **keys))
    found = list(sources.all_records(source))
    assert len(found) == sum(source.count(unit) for unit in source.units())
    return found


def problem(name, **keys) -> str:
    """The one line that tells of the first unreadable record."""
    config = DataConfig(source=str(name), **keys)
    tokenizer = tokenizers.load("gpt2")
    with pytest.raises(ConfigError) as error:
        list(encode(corpus.split_records(str(name), config, "train"), tokenizer, config))
    assert "\n" not in str(error.value)
    return str(error.value)


def jsonl(rows=None) -> bytes:
    rows = [{"text": text} for text in TEXTS] if rows is None else rows
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_array_record(path: pathlib.Path, data: list[bytes]) -> None:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in data:
        writer.write(record)
    writer.close()


# -------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("a.jsonl", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress),
        ("a.jsonl.bz2", bz2.compress),
        ("a.jsonl.xz", lzma.compress),
        ("a.json", bytes),
    ],
)
def test_json_lines(tmp_path, name, compress):
    (tmp_path / name).write_bytes(compress(jsonl()))
    assert texts(tmp_path / name) == TEXTS


def test_zstd_in_several_frames(tmp_path):
    compress = zstandard.ZstdCompressor().compress
    half = len(jsonl()) // 2
    (tmp_path / "a.jsonl.zst").write_bytes(
        compress(jsonl()[:half]) + compress(b"") + compress(jsonl()[half:])
    )
    assert texts(tmp_path / "a.jsonl.zst") == TEXTS


def test_json_lines_without_a_last_newline_and_with_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + jsonl().replace(b"\n", b"\r\n\n").rstrip())
    assert texts(tmp_path / "a.jsonl") == TEXTS


@pytest.mark.parametrize("rows", [TEXTS, [{"text": text} for text in TEXTS]])
def test_a_json_array(tmp_path, rows):
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    assert texts(tmp_path / "a.json") == TEXTS


def test_parquet(tmp_path):
    table = pyarrow.table({"text": TEXTS, "id": range(5)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert texts(tmp_path / "a.parquet") == TEXTS


@pytest.mark.parametrize("opener", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
def test_arrow(tmp_path, opener):
    table = pyarrow.table({"text": TEXTS})
    with opener(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert texts(tmp_path / "a.arrow") == TEXTS


@pytest.mark.parametrize("name", ["a.array_record", "a.array_record-00000-of-00001"])
def test_array_record_of_text_and_of_objects(tmp_path, name):
    write_array_record(tmp_path / name, [text.encode() for text in TEXTS])
    assert texts(tmp_path / name) == TEXTS
    (tmp_path / name).unlink()
    write_array_record(tmp_path / name, [json.dumps({"text": t}).encode() for t in TEXTS])
    assert texts(tmp_path / name) == TEXTS


def test_text_files_by_file_and_by_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes("\n\none\ntwo\n \n\nthree é".encode())
    (tmp_path / "b.txt").write_text("four\n")
    assert texts(tmp_path) == ["\n\none\ntwo\n \n\nthree é", "four\n"]
    assert texts(tmp_path, txt_documents="blank_lines") == ["one\ntwo", "three é", "four"]


def test_a_directory_and_a_glob_are_read_in_the_order_of_their_names(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in (("sub/b.jsonl", "2"), ("a.jsonl", "1"), ("z.jsonl.gz", "3")):
        data = jsonl([{"text": text}])
        (tmp_path / name).write_bytes(gzip.compress(data) if name[-1] == "z" else data)
    (tmp_path / ".hidden.jsonl").write_bytes(jsonl())
    (tmp_path / "README").write_text("not data")
    assert texts(tmp_path) == ["1", "2", "3"]
    assert texts(tmp_path / "**" / "*.jsonl") == ["1", "2"]


def test_files_on_another_filesystem():
    system = fsspec.filesystem("memory")
    system.pipe("/corpus/a.jsonl", jsonl())
    system.pipe("/corpus/b.jsonl.zst", zstandard.ZstdCompressor().compress(jsonl()))
    try:
        assert texts("memory://corpus/a.jsonl") == TEXTS
        assert texts("memory://corpus") == TEXTS * 2
        assert texts("memory://corpus/*.zst") == TEXTS
    finally:
        system.rm("/corpus", recursive=True)


def test_a_filesystem_whose_package_is_missing_names_it(monkeypatch):
    def refuse(*_, **__):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    line = problem("gs://bucket/corpus")
    assert "gs:// that is not installed; pip install 'neo_jax[gcs]'" in line


def test_what_a_remote_filesystem_raises_is_one_line(monkeypatch):
    class Refused(Exception):
        pass

    def refuse(*_, **__):
        raise Refused("403, no storage.objects.get\nand more")

    system = fsspec.filesystem("memory")
    system.pipe("/corpus/a.jsonl", jsonl())
    try:
        monkeypatch.setattr(type(system), "_open", refuse)
        line = problem("memory://corpus/a.jsonl")
        assert line == "memory:///corpus/a.jsonl: Refused: 403, no storage.objects.get."
        monkeypatch.setattr(type(system), "isfile", refuse)
        assert "cannot be reached: Refused: 403, no storage" in problem("memory://corpus")
    finally:
        system.store.clear()


def test_a_bucket_is_read_like_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("gcsfs", reason="reads gs://; an optional library")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "bucket"
    (folder / "texts").mkdir(parents=True)
    (folder / "texts" / "a.jsonl").write_bytes(jsonl())
    data = zstandard.ZstdCompressor().compress(jsonl())
    (folder / "texts" / "b.jsonl.zst").write_bytes(data)
    write_array_record(folder / "c.array_record", [text.encode() for text in TEXTS])
    with fake_gcs.serving(folder) as address:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        assert texts("gs://corpus/texts") == TEXTS * 2
        assert texts("gs://corpus/texts/*.zst") == TEXTS
        assert texts("gs://corpus/c.array_record") == TEXTS
        assert "found no file" in problem("gs://corpus/nothing")
        assert "cannot be reached: Forbidden" in problem("gs://corpus/forbidden/a.jsonl")


def test_hugging_face_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="an optional library")
    data = datasets.Dataset.from_dict({"text": TEXTS})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(
        tmp_path / "two"
    )
    assert texts(tmp_path / "one") == TEXTS
    assert texts(f"hf:{tmp_path}/two?split=test") == TEXTS[:1]
    assert texts(f"hf:{tmp_path}/two?streaming=1") == TEXTS
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "train.jsonl").write_bytes(jsonl())
    assert texts(f"hf:{tmp_path}/three") == TEXTS
    assert texts(f"hf:{tmp_path}/three?streaming=1") == TEXTS
    assert "no split 'dev'" in problem(f"hf:{tmp_path}/two?split=dev")


def test_a_tfds_directory_is_read_without_tensorflow(data_folder):
    folder = data_folder / "tfds"
    name = "tfds:glue/cola?split=validation"
    found = texts(name, tfds_dir=str(folder), text_field="sentence")
    assert len(found) == 1043 and all(found)
    assert "no field 'text'; there are 'idx', 'label', 'sentence'" in problem(
        name, tfds_dir=str(folder)
    )


def test_tfds_prepared_by_hand(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    class Tiny(tfds.core.GeneratorBasedBuilder):
        """Five texts."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from ((index, {"text": text}) for index, text in enumerate(TEXTS))

    Tiny(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    found = texts("tfds:tiny", tfds_dir=str(tmp_path))
    assert sorted(found) == sorted(TEXTS)
    assert texts(tmp_path / "tiny" / "1.0.0") == found


@pytest.mark.slow
def test_tfds_builds_its_own_set_from_files(data_folder, tmp_path):
    python = os.environ.get("NEO_JAX_TF_PYTHON")
    if not python:
        pytest.skip("needs TensorFlow in an environment of its own: make tf-env")
    texts_at = data_folder / "tinyshakespeare"
    line = [python, "-m", "neo_jax.prepare", "--build_tfds", "tiny_shakespeare"]
    line += ["--manual_dir", str(texts_at), "--tfds_dir", str(tmp_path)]
    subprocess.run(line, check=True, capture_output=True)
    found = [
        text
        for split in ("train", "validation", "test")
        for text in texts(f"tfds:tiny_shakespeare?split={split}", tfds_dir=str(tmp_path))
    ]
    assert len(found) == 3 and "".join(found) == (texts_at / "input.txt").read_text()
    assert "tensorflow" not in sys.modules


def test_a_tfds_set_that_is_not_there_names_the_way_to_build_it(tmp_path):
    line = problem("tfds:glue/cola", tfds_dir=str(tmp_path))
    assert "--build_tfds glue/cola" in line and str(tmp_path) in line


def test_building_a_tfds_set_asks_for_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"neo_jax\[tf\]"):
        sources.build_tfds("glue/cola", str(tmp_path), None)


# -------------------------------------------------------------------------------- The Pile


@pytest.fixture
def pile(tmp_path):
    (tmp_path / "train").mkdir()
    for shard in range(3):
        rows = [
            {"text": f"{name} {shard}", "meta": {"pile_set_name": name}}
            for name in ("ArXiv", "Github", "Wikipedia (en)")
        ]
        data = zstandard.ZstdCompressor().compress(jsonl(rows))
        (tmp_path / "train" / f"{shard:02d}.jsonl.zst").write_bytes(data)
    (tmp_path / "val.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(jsonl(rows)))
    return tmp_path


def test_the_pile_and_its_subsets(pile):
    assert len(texts(f"pile:{pile}")) == 9
    found = records(f"pile:{pile}?subsets=ArXiv,Wikipedia (en)")
    documents = [record for record in found if record is not None]
    assert len(found) == 9 and len(documents) == 6
    assert {document.group for document in documents} == {"ArXiv", "Wikipedia (en)"}
    assert len(texts(f"pile:{pile}?split=val")) == 3


def test_a_missing_pile_names_bytes_and_the_command(tmp_path):
    config = DataConfig(source=f"pile:{tmp_path}/pile", holdout_every=0)
    with pytest.raises(ConfigError) as error:
        sources.preflight(config)
    line = str(error.value)
    assert "\n" not in line
    assert sources.PILE_BYTES // 2**30 == 825
    assert f"{sources.PILE_BYTES:,} bytes" in line and "holds 0 bytes" in line
    assert f"python -m neo_jax.prepare --source 'pile:{tmp_path}/pile'" in line


def test_text_too_large_for_memory_names_the_command(tmp_path):
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.truncate(5 << 30)  # a file of holes takes no room
    with pytest.raises(ConfigError, match=r"5,368,709,120 bytes.*python -m neo_jax\.prepare"):
        sources.preflight(DataConfig(source=str(tmp_path / "a.jsonl")))


# ------------------------------------------------------------------------------- cut files


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.array_record"])
@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 50])
def test_pieces_of_a_file_are_the_file(tmp_path, name, pieces):
    rng = np.random.default_rng(0)
    rows = [{"text": f"{i} " + "x" * int(rng.integers(0, 200))} for i in range(60)]
    path = tmp_path / name
    if name.endswith("jsonl"):
        path.write_bytes(jsonl(rows))
    elif name.endswith("parquet"):
        table = pyarrow.table({"text": [row["text"] for row in rows]})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    else:
        write_array_record(path, [json.dumps(row).encode() for row in rows])
    size = path.stat().st_size
    spans = readers.split(str(path), size, max(1, size // pieces))
    found = [row.value for span in spans for row in readers.rows(span, "file")]
    assert found == rows
    assert sum(readers.count(span, "file") for span in spans) == len(rows)
    for span in spans:  # and each row says where it stands in the whole file
        for row in readers.rows(span, "file"):
            number = int(row.value["text"].split()[0])
            place = readers.where(span, row.index).rsplit(" ", 1)[-1]
            assert int(place) == number + (1 if name.endswith("jsonl") else 0)


# --------------------------------------------------------------------------- instructions

INSTRUCTIONS = [
    (
        {"prompt": "2+2=", "completion": "4"},
        [("2+2=", False), ("4", True)],
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ho"},
            ]
        },
        [("User: Hi\n", False), ("Assistant:", False), (" Ho", True)],
    ),
    (
        {"instruction": "Add.", "input": "", "output": "Done."},
        [
            (
                "Below is an instruction that describes a task. Write a response that "
                "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
                "### Response:\n",
                False,
            ),
            ("Done.", True),
        ],
    ),
]


@pytest.mark.parametrize(("row", "parts"), INSTRUCTIONS)
def test_instructions_are_told_apart_by_their_fields(tmp_path, row, parts):
    (tmp_path / "a.jsonl").write_bytes(jsonl([row]))
    (document,) = records(tmp_path / "a.jsonl", record_format="instruction")
    assert isinstance(document, Document)
    assert list(document.parts) == parts


def test_prompts_are_masked_and_the_end_is_learned(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([row for row, _ in INSTRUCTIONS]))
    config = DataConfig(source=str(path), record_format="instruction", holdout_every=0)
    tokenizer = tokenizers.load("gpt2")
    split = corpus.split_records(str(path), config, "train")
    for document, (_, parts) in zip(
        encode(split, tokenizer, config), INSTRUCTIONS, strict=True
    ):
        learned = tokenizer.decode(document.ids[document.trainable])
        assert learned == "".join(t for t, on in parts if on) + "<|endoftext|>"
        masked = tokenizer.decode(document.ids[~document.trainable])
        assert masked == "".join(t for t, on in parts if not on)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x"}, "neither 'prompt' and 'completion'"),
        ({"prompt": "x"}, "no field 'completion'"),
        ({"messages": []}, "one message or more"),
        ({"messages": [{"role": "user", "content": "x"}]}, "nothing to learn"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role 'robot' is not one of"),
        ({"instruction": "x", "output": 3}, "field 'output' is int"),
    ],
)
def test_instructions_that_are_none(tmp_path, row, words):
    (tmp_path / "a.jsonl").write_bytes(jsonl([row]))
    assert words in problem(tmp_path / "a.jsonl", record_format="instruction")


# -------------------------------------------------------------------------------- mistakes


def test_a_truncated_zstd_file(tmp_path):
    data = zstandard.ZstdCompressor().compress(jsonl() * 5000)
    (tmp_path / "a.jsonl.zst").write_bytes(data[: len(data) // 2])
    assert "a.jsonl.zst: the zstd file ends early, it is truncated" in problem(tmp_path)


def test_a_truncated_gzip_file(tmp_path):
    data = gzip.compress(os.urandom(100) * 100)
    (tmp_path / "a.jsonl.gz").write_bytes(data[:-20])
    assert "truncated" in problem(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz", "a.parquet", "a.array_record"])
def test_a_file_that_is_something_else(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is no such file " * 10000)
    assert name in problem(tmp_path / name)


def test_invalid_json_is_named_by_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl() + b'{"text": \n' + jsonl())
    assert "a.jsonl line 6: not valid JSON" in problem(tmp_path)


def test_invalid_json_deep_in_a_large_file_is_named_by_its_line(tmp_path):
    line = jsonl([{"text": "x" * 1000}])
    (tmp_path / "a.jsonl").write_bytes(line * 2345 + b"nonsense\n" + line * 1000)
    source = sources.open_source(str(tmp_path), DataConfig())
    assert len(source.units()) > 1
    (bad,) = [r for r in sources.all_records(source) if isinstance(r, Unreadable)]
    assert bad.where.endswith("a.jsonl line 2346")


def test_a_missing_field_lists_the_fields(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"content": "x", "id": 3}]))
    line = problem(tmp_path)
    assert "a.jsonl line 1: there is no field 'text'; there are 'content', 'id': name" in line
    assert texts(tmp_path, text_field="content") == ["x"]


@pytest.mark.parametrize("value", [3, None, {"a": 1}, [0.5, 1.5], ["a", "b"], [[1], [2, 3]]])
def test_a_field_of_the_wrong_type(tmp_path, value):
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": value}]))
    assert "it must be text, or a list of whole token ids" in problem(tmp_path)


def test_token_ids_instead_of_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": [15496, 995]}]))
    config = DataConfig(source=str(tmp_path), holdout_every=0)
    split = corpus.split_records(str(tmp_path), config, "train")
    (document,) = encode(split, tokenizers.load("gpt2"), config)
    assert document.ids.tolist() == [15496, 995, 50256]
    assert document.num_bytes == len("Hello world")


@pytest.mark.parametrize("ids", [[5, 50257], [-1]])
def test_token_ids_beyond_the_vocabulary(tmp_path, ids):
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": ids}]))
    assert "is not in 0 … 50256" in problem(tmp_path)


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.txt", b"ab\xff"), ("a.jsonl", b'{"text": "\xff"}\n'), ("a.jsonl", b'"\\ud800"\n')],
)
def test_text_that_is_not_utf8(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    (record,) = records(tmp_path)
    assert isinstance(record, Unreadable) and record.kind == "undecodable"


def test_an_empty_directory_and_a_missing_path(tmp_path):
    assert f"found no file; tried {tmp_path}/**" in problem(tmp_path)
    assert "found no file; tried" in problem(tmp_path / "nothing.jsonl")
    (tmp_path / "README").write_text("x")
    assert "none of 1 file(s) is data" in problem(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    (tmp_path / "a.jsonl").chmod(0)
    assert "Permission denied" in problem(tmp_path / "a.jsonl")


def test_no_permission_as_the_system_would_say_it(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(jsonl())

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(fsspec, "open", refuse)
    assert "a.jsonl: Permission denied" in problem(tmp_path / "a.jsonl")
    source = sources.open_source(str(tmp_path), DataConfig())
    with pytest.raises(ConfigError, match=r"a\.jsonl: Permission denied"):
        source.count(source.units()[0])


def test_an_unknown_option_lists_the_options():
    assert "no option 'spilt'; there are split, config, streaming" in problem("hf:x/y?spilt=a")
