"""The command: a report from a checkpoint and files, mistakes in one line, cards, drawings."""

import json
import math
import pathlib
import re
import struct
from typing import Any

import pytest
from flax import nnx

from neo_jax import checkpoint as checkpoint_lib
from neo_jax import config as config_lib
from neo_jax import tokenizer
from neo_jax.evaluate import __main__ as command
from neo_jax.evaluate import published, report
from neo_jax.model import NeoLM

TEXT = "The dog ran home, and we followed the dog. "


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run that has ended, with random weights."""
    path = tmp_path_factory.mktemp("run")
    words = tokenizer.train_bpe([TEXT] * 3, 270)
    words.save(path)
    model = config_lib.preset_model(
        "tiny",
        num_layers=2,
        embed_dim=16,
        num_heads=2,
        vocab_size=words.vocab_size,
        vocab_multiple=16,
        max_seq_len=32,
        window_size=8,
    )
    config = config_lib.Config(model=model, data=config_lib.DataConfig(seq_len=32))
    params = nnx.to_pure_dict(nnx.state(NeoLM(model, nnx.Rngs(params=0))))
    checkpoint_lib.save_params(path, params, config)
    (path / "config.json").write_text(config_lib.to_json(config))
    summary = {"loss": 2.5, "perplexity": 12.18, "bits_per_byte": 1.25, "stride": 32}
    (path / "summary.json").write_text(json.dumps(summary))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": TEXT.strip()})] * 3
    (path / "lambada.openai.jsonl").write_text("\n".join(lines) + "\n")
    rows = [{"goal": "Run", "sol1": "a dog", "sol2": "home", "label": n % 2} for n in range(4)]
    rows[3]["goal"] = TEXT * 9
    lines = [json.dumps(row) for row in rows]
    (path / "piqa.validation.jsonl").write_text("\n".join(lines) + "\n")
    (path / "book.txt").write_text(TEXT * 20)
    return path


@pytest.fixture(scope="module")
def finished(workdir: pathlib.Path, data: pathlib.Path) -> dict[str, Any]:
    """A report of tasks, text and memory, as the command writes it."""
    out = data / "out" / "mine.json"
    command.main(
        [
            *("--checkpoint", str(workdir), "--tasks", "lambada_openai,piqa"),
            *("--text", str(data / "book.txt"), "--stride", "16"),
            *("--data", str(data), "--json", str(out), "--mesh", "data=2,fsdp=4"),
        ]
    )
    return json.loads(out.read_text())


def test_the_report_tells_every_figure_and_how_it_came_about(
    finished: dict[str, Any], data: pathlib.Path
) -> None:
    tasks = finished["tasks"]
    assert list(tasks) == ["lambada_openai", "piqa", f"text {data / 'book.txt'}"]
    assert tasks["piqa"]["samples"] == 4 and tasks["piqa"]["truncated"] == 2
    assert tasks["piqa"]["data"].endswith("piqa.validation.jsonl")
    assert set(tasks["piqa"]["metrics"]) == {"acc", "acc_norm", "acc_bytes"}
    acc = tasks["piqa"]["metrics"]["acc"]
    assert acc["stderr"] > 0 and "unnormalised" in acc["definition"]
    assert acc["published"]["GPT-Neo 125M"] == pytest.approx(0.6306)
    gap = acc["difference"]["GPT-Neo 125M"]
    assert gap == pytest.approx(acc["value"] - 0.6306)
    assert "--tasks lambada_openai,piqa" in finished["command"]
    assert finished["parameters"] > 0 and finished["device"].startswith("8 ×")


def test_the_report_for_people(finished: dict[str, Any], data: pathlib.Path) -> None:
    text = (data / "out" / "mine.md").read_text()
    assert "| piqa | acc | " in text
    assert "| GPT-Neo 2.7B | 5.6260 | +" in text  # lambada's perplexity, and how far we are
    assert "2 contexts were cut at their front" in text
    assert finished["command"] in text


def test_pictures(finished: dict[str, Any], data: pathlib.Path) -> None:
    drawn = data / "out" / "mine.png"
    assert drawn.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    three = dict.fromkeys(("piqa", "hellaswag", "winogrande"), finished["tasks"]["piqa"])
    other = data / "out" / "other.json"
    other.write_text(json.dumps({**finished, "model": "other", "tasks": three}))
    command.main(["--reports", f"{other},{other}", "--plot", str(data / "out" / "both.png")])
    for name in ("both.png", "both_radar.png"):
        width, height = struct.unpack(">II", (data / "out" / name).read_bytes()[16:24])
        assert width > 300 and height > 300


def test_a_report_stays_within_json(finished: dict[str, Any], tmp_path: pathlib.Path) -> None:
    finished = json.loads(json.dumps(finished))
    finished["tasks"]["piqa"]["metrics"]["acc"]["value"] = float("inf")
    report.write(finished, tmp_path / "inf.json")
    again = report.read(tmp_path / "inf.json")
    assert again["tasks"]["piqa"]["metrics"]["acc"]["value"] is None


def test_a_card_is_made_of_what_the_run_left(
    workdir: pathlib.Path, data: pathlib.Path, finished: dict[str, Any]
) -> None:
    out = data / "card.md"
    arguments = ["--checkpoint", str(workdir), "--card", str(out)]
    command.main([*arguments, "--reports", str(data / "out" / "mine.json")])
    text = out.read_text()
    for said in (
        "2 layers",
        "`sotu`",
        "1.2500 bits per byte",
        "| piqa | acc |",
        "Bias was not",
    ):
        assert said in text
    before = out.read_text()
    with pytest.raises(SystemExit):  # nothing is overwritten
        command.main(arguments)
    assert out.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "piqq"], "did you mean piqa"),
        (["--tasks", "piqa", "--data", "gone"], "--data gone: there is no such"),
        (["--tasks", "hellaswag"], r"words in its path: hellaswag \+ val"),
        (["--tasks", "piqa", "--limit", "0"], "--limit=0 must be positive"),
        (["--tasks", "piqa", "--mesh", "rows=2"], "--mesh 'rows=2' is not AXIS=N"),
        (["--tasks", "piqa", "--checkpoint", "./gone"], "gone is not a directory"),
        (["--text", "gone.jsonl"], "gone.jsonl"),
        ([], "nothing to do"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    workdir: pathlib.Path,
    data: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # without the harness
    start = ["--checkpoint", str(workdir), "--data", str(data)]
    with pytest.raises(SystemExit) as stopped:
        command.main([*start, *arguments])
    assert stopped.value.code == 2
    line = capsys.readouterr().err.strip()
    assert line.count("\n") == 0 and re.search(said, line)


def test_empty_text_is_told(
    workdir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    with pytest.raises(SystemExit) as stopped:
        command.main(["--checkpoint", str(workdir), "--text", str(empty)])
    assert stopped.value.code == 1
    assert "no text to evaluate: 1 empty documents" in capsys.readouterr().err


def test_published_figures_agree_with_each_other() -> None:
    """Bits per byte and perplexity of The Pile imply one number of tokens a byte."""
    bits, ppl = (
        published.figures("pile", name) for name in ("bits_per_byte", "token_perplexity")
    )
    implied = {model: bits[model] / math.log2(ppl[model]) for model in ppl}
    assert implied == pytest.approx({"GPT-Neo 1.3B": 0.2870, "GPT-Neo 2.7B": 0.2869}, abs=1e-4)
