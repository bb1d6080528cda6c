"""Benchmarks that a config names are run at every evaluation, and refused before training."""

import json
import pathlib

import jax
import pytest
from flax import nnx

from neo_jax import config as config_lib
from neo_jax import pretrain, tokenizer
from neo_jax.config import Config, ConfigError
from neo_jax.evaluate import in_loop
from neo_jax.metrics import read_metrics
from neo_jax.model import NeoLM

TEXT = "The dog ran home, and we followed the dog. "


def run_config(folder: pathlib.Path, *names: str) -> Config:
    tree = config_lib.default_config()
    tree.model = config_lib.preset("tiny")
    tree.model.update(num_layers=2, embed_dim=16, num_heads=2, vocab_size=270, max_seq_len=32)
    tree.data.update(source=str(folder / "text.jsonl"), tokenizer="bpe:270", seq_len=16)
    tree.data.update(batch_size=8, holdout_every=2, holdout_offset=1)
    tree.train.update(num_steps=2, tensorboard=False)
    tree.optimizer.update(warmup_steps=1, decay_steps=2)
    tree.eval.update(every=1, tasks=names, tasks_data=str(folder), tasks_limit=2)
    return config_lib.build(tree)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    lines = [json.dumps({"text": TEXT * 3})] * 4
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "lambada.openai.jsonl").write_text(json.dumps({"text": TEXT.strip()}) + "\n")
    return tmp_path


def test_the_harness_is_asked_time_and_again(
    folder: pathlib.Path, mesh: jax.sharding.Mesh
) -> None:
    pytest.importorskip("lm_eval")
    config = run_config(folder, "harness:lambada_openai", "lambada_openai")
    words = tokenizer.train_bpe([TEXT] * 3, 270)
    benchmarks = in_loop.Benchmarks(config.eval, config.model, mesh, words)
    names = ("lambada_openai/perplexity", "lambada_openai/acc")
    seen = []
    for seed in (0, 1):
        params = nnx.to_pure_dict(nnx.state(NeoLM(config.model, nnx.Rngs(params=seed))))
        found = benchmarks.score(params)
        assert found.keys() == {*names, *(f"harness:{name}" for name in names)}
        for name in names:
            assert found[f"harness:{name}"] == pytest.approx(found[name], rel=1e-5)
        seen.append(found[names[0]])
    assert seen[0] != seen[1]


@pytest.mark.slow
def test_figures_of_tasks_are_logged(folder: pathlib.Path) -> None:
    text = f"text:{folder / 'text.jsonl'}"
    pretrain.run(run_config(folder, "lambada_openai", text), folder / "run")
    lines = [line for line in read_metrics(folder / "run") if line["split"] == "eval"]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["lambada_openai/perplexity"] > 1 and line["lambada_openai/acc"] == 0
        assert line[f"{text}/bits_per_byte"] > 0
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["lambada_openai/acc"] == 0


def test_what_is_missing_is_told_before_training(folder: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="task 'piqq' is unknown; did you mean piqa"):
        pretrain.run(run_config(folder, "piqq"), folder / "run")
    with pytest.raises(ConfigError, match=r"'hellaswag': none of \d data files"):
        pretrain.run(run_config(folder, "hellaswag"), folder / "run")
    assert not (folder / "run" / "config.json").exists()
