"""A loaded model that writes, scores and embeds; and the command around it."""

import io
import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

import neo_jax
from neo_jax import checkpoint, config, tokenizer
from neo_jax.config import ConfigError
from neo_jax.generate import __main__ as command
from neo_jax.model import NeoLM

WORDS = tokenizer.train_bpe(["some words and others, zwölf Wörter ✓"] * 9, 280)
MODEL = config.ModelConfig(
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    window_size=8,
    vocab_size=WORDS.vocab_size,
    max_seq_len=64,
    compute_dtype="float32",
)


@pytest.fixture(autouse=True)
def _no_user_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command would keep compiled programs where the user has them."""
    monkeypatch.setattr(command.compilation, "use_cache", lambda: None)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("workdir")
    params = nnx.to_pure_dict(nnx.state(NeoLM(MODEL, nnx.Rngs(params=0))))
    whole = config.Config(model=MODEL, data=config.DataConfig(seq_len=64))
    checkpoint.save_params(folder, jax.tree.map(lambda w: w * 3, params), whole)
    (folder / "config.json").write_text(config.to_json(whole))
    WORDS.save(folder)
    return folder


@pytest.fixture(scope="module")
def model(workdir):
    return neo_jax.load(workdir)


def test_text_and_ids_give_the_same(model) -> None:
    texts = ["some words", "", "and others, zwölf"]
    ids = [WORDS.encode(text) for text in texts]
    from_text = model.generate(texts, max_new_tokens=9)
    assert from_text == model.generate(ids, max_new_tokens=9)
    assert from_text[1] == model.generate([[WORDS.eos_id]], max_new_tokens=9)[0]
    assert model.generate(texts[0], max_new_tokens=9) == from_text[:1]
    for one in from_text:
        assert one.text == WORDS.decode(one.token_ids, skip_special_tokens=True)
    echoed = model.generate(texts, max_new_tokens=9, echo=True)
    assert [one.text for one in echoed] == [
        text + one.text for text, one in zip(texts, from_text, strict=True)
    ]


def test_padding_on_either_side_is_no_part_of_a_prompt(model) -> None:
    ids, mask = np.asarray([[5, 6, 7, 0, 0], [1, 2, 3, 4, 5]]), np.ones((2, 5), int)
    mask[0, 3:] = 0
    right = model.generate(ids, attention_mask=mask, max_new_tokens=9)
    ids[0], mask[0] = np.roll(ids[0], 2), np.roll(mask[0], 2)
    left = model.generate(ids, attention_mask=mask, max_new_tokens=9)
    assert left == right == model.generate([[5, 6, 7], [1, 2, 3, 4, 5]], max_new_tokens=9)


def test_a_stop_string_is_cut_off_across_tokens_and_the_stream_shows_the_same(model) -> None:
    (whole,) = model.generate(["some"], max_new_tokens=40, eos_token_id=[])
    # From the middle of one token to the middle of another: no token is the string.
    lengths = [len(WORDS.decode(whole.token_ids[:n])) for n in range(41)]
    at = next(n for n in lengths if n >= 6 and "\ufffd" not in whole.text[n - 2 : n + 2])
    stop = whole.text[at - 1 : at + 1]
    shown: list[str] = []
    options = {"max_new_tokens": 40, "eos_token_id": [], "stop_strings": [stop, "never there"]}
    (cut,) = model.generate(["some"], stream=lambda _, piece: shown.append(piece), **options)
    assert cut.text == whole.text[: whole.text.index(stop)] == "".join(shown)
    assert cut.finish_reason == "stop"
    assert stop in WORDS.decode(cut.token_ids) and stop not in WORDS.decode(cut.token_ids[:-1])
    assert model.generate(["some"], **options) == [cut]


def test_scores_are_those_of_the_logits(model) -> None:
    texts = [WORDS.encode("some words and others"), [3]]
    scored = model.score(texts)
    log_probs = np.asarray(jax.nn.log_softmax(model.logits([texts[0]])[0], axis=-1))
    expected = log_probs[np.arange(len(texts[0]) - 1), texts[0][1:]]
    assert scored[0].log_probs[0] is None and scored[1].log_probs == [None]
    np.testing.assert_allclose(scored[0].log_probs[1:], expected, atol=1e-4)
    np.testing.assert_allclose(scored[0].total, expected.sum(), rtol=1e-5)
    (started,) = model.score(texts[:1], from_start=True)
    (again,) = model.score([[WORDS.eos_id, *texts[0]]])
    np.testing.assert_allclose(started.log_probs, again.log_probs[1:], atol=1e-4)
    with pytest.raises(ConfigError, match=r"text 0 has 65 tokens, more than the model's 64"):
        model.score([[1] * 65])


def test_vectors_are_pooled_over_the_text_alone(model) -> None:
    texts = [[1, 2, 3, 4, 5], [7]]
    alone = [model.embed([text], pooling="mean")[0] for text in texts]
    np.testing.assert_allclose(model.embed(texts), alone, atol=1e-6)
    assert model.embed(texts).shape == (2, MODEL.embed_dim)
    last = model.embed(texts, pooling="last")
    np.testing.assert_allclose(last[1], alone[1], atol=1e-6)
    with pytest.raises(ConfigError, match="pooling='max' must be 'mean' or 'last'"):
        model.embed(texts, pooling="max")
    with pytest.raises(ConfigError, match="text 1 is empty"):
        model.embed([[1], []])


def test_the_command_writes_what_the_model_writes(workdir, model, tmp_path, capsys) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"some words"\n[5, 6, 7]\n')
    base = ["--checkpoint", str(workdir), "--max_new_tokens", "9"]
    out = tmp_path / "out.json"
    assert command.main([*base, "--prompts_file", str(prompts), "--json", str(out)]) == 0
    records = json.loads(out.read_text())
    expected = model.generate([WORDS.encode("some words"), [5, 6, 7]], max_new_tokens=9)
    assert [r["token_ids"] for r in records] == [one.token_ids for one in expected]
    assert records[0]["prompt"] == "some words" and records[0]["text"] == expected[0].text
    capsys.readouterr()
    assert command.main([*base, "--prompts_file", str(prompts), "--json", str(out)]) == 1
    assert f"--json {out} exists" in capsys.readouterr().err
    assert command.main([*base, "--prompt", "some words"]) == 0
    assert capsys.readouterr().out == expected[0].text + "\n"


def test_the_command_talks(workdir, model, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("some words\nand\n"))
    assert command.main(["--checkpoint", str(workdir), "--max_new_tokens", "9"]) == 0
    said = [one.text for one in model.generate(["some words", "and"], max_new_tokens=9)]
    assert capsys.readouterr().out == f"{said[0]}\n{said[1]}\n"


def test_the_command_takes_an_assistant_and_ends_texts(workdir, model, capsys) -> None:
    base = ["--checkpoint", str(workdir), "--prompt", "some words"]
    (whole,) = model.generate(["some words"], max_new_tokens=9)
    helped = ["--assistant_model", str(workdir), "--num_assistant_tokens", "3"]
    assert command.main([*base, "--max_new_tokens", "9", *helped]) == 0
    assert capsys.readouterr().out == whole.text + "\n"
    ends = ["--max_new_tokens", "9", "--eos_token_id", str(whole.token_ids[4]), "--json", "-"]
    assert command.main([*base, *ends]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    stop = whole.token_ids.index(whole.token_ids[4])
    assert record["token_ids"] == whole.token_ids[: stop + 1]
    assert record["finish_reason"] == "stop"


def test_the_command_raises_a_tokens_score(workdir, capsys) -> None:
    base = ["--checkpoint", str(workdir), "--prompt", "some words", "--json", "-"]
    assert command.main([*base, "--max_new_tokens", "3", "--logit_bias", "7=1e4"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["token_ids"] == [7, 7, 7]
    assert command.main([*base, "--logit_bias", "the=1"]) == 1
    assert capsys.readouterr().err == (
        "generate: --logit_bias 'the=1' is not ID=NUMBER, as in 262=-5.\n"
    )


def test_an_unknown_option_of_the_command_is_one_line(capsys) -> None:
    with pytest.raises(SystemExit) as error:
        command.main(["--checkpoint", "x", "--topk", "3"])
    assert error.value.code == 2
    assert (
        capsys.readouterr().err
        == "generate: there is no option --topk; did you mean --top_k?\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--top_p", "2"], "top_p=2.0 must be above 0"),
        (["--prompt", "x", "--temperature", "-1"], "temperature=-1.0 must be"),
        (["--prompt", "some " * 99], "more than the model's 64 positions"),
        (["--prompts_file", "/nowhere.txt"], "No such file"),
        (["--mesh", "rows=2", "--prompt", "x"], "'rows=2' is not AXIS=SIZE"),
    ],
    ids=str,
)
def test_the_command_refuses_in_one_line(workdir, arguments, message, capsys) -> None:
    assert command.main(["--checkpoint", str(workdir), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
