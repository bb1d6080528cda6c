"""A run from a trained model has its shape, words and weights, and a kill changes nothing."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

import neo_jax
from neo_jax import checkpoint, state
from neo_jax.checkpoint.folder import Folder
from tests.pretrain_test import _one_device as _one_device
from tests.pretrain_test import experiment as experiment
from tests.pretrain_test import finished as finished
from tests.pretrain_test import lines, run, summary
from tests.stopping import stopped_after

# Another shape and other words than the checkpoint's, which must not matter.
SHAPE = ("--config.model.embed_dim=24", "--config.data.tokenizer=gpt2")


def tune(experiment: str, base: pathlib.Path, workdir: pathlib.Path, *arguments: str) -> int:
    start = ("--config.task=finetune", f"--config.train.init_from={base}")
    return run(experiment, workdir, *start, *SHAPE, *arguments)


def params_at(workdir: pathlib.Path, step: int) -> dict[str, Any]:
    folder = Folder.of(workdir)
    names = checkpoint.restoring.names_saved(folder, step)
    wanted: dict[str, Any] = {}
    for name, (shape, dtype) in names.items():
        if name.startswith("params."):
            node = wanted
            *outer, last = name.split(".")
            for key in outer:
                node = node.setdefault(key, {})
            place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            node[last] = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    return checkpoint.restoring.read(folder, step, wanted)["params"]


def test_it_starts_from_the_checkpoints_shape_words_and_loss(
    experiment, finished, tmp_path
) -> None:
    workdir = tmp_path / "tuned"
    assert tune(experiment, finished, workdir, "--config.train.num_steps=4") == 0
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["embed_dim"] == 16
    assert (workdir / "tokenizer.json").read_text() == (
        finished / "tokenizer.json"
    ).read_text()
    assert lines(workdir)[0]["loss"] < lines(finished)[0]["loss"] - 0.5
    assert np.isfinite(neo_jax.load(workdir).logits([[1, 2, 3]])).all()


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["all", "last_layers", "lora"])
def test_a_killed_tuning_goes_on_to_the_digit(
    experiment, finished, tmp_path, trainable: str
) -> None:
    how = (f"--config.finetune.trainable={trainable}", "--config.finetune.last_layers=1")
    if trainable == "lora":
        how += ("--config.model.lora_rank=2", "--config.model.lora_dropout=0.2")
    assert tune(experiment, finished, tmp_path / "whole", *how) == 0
    with stopped_after(7):
        tune(experiment, finished, tmp_path / "killed", *how)
    assert tune(experiment, finished, tmp_path / "killed", *how) == 0
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


@pytest.mark.slow
def test_only_the_last_layers_move_and_are_kept(experiment, finished, tmp_path) -> None:
    workdir = tmp_path / "tuned"
    how = ("--config.finetune.trainable=last_layers", "--config.finetune.last_layers=1")
    assert tune(experiment, finished, workdir, *how, "--config.train.num_steps=4") == 0
    kept, before = params_at(workdir, 4), params_at(finished, 12)
    assert set(kept) == {"blocks", "ln_f"}
    for path, leaf in jax.tree.leaves_with_path(kept["blocks"]):
        old = dict(jax.tree.leaves_with_path(before["blocks"]))[path]
        assert leaf.shape == (1, *old.shape[1:])
        assert not np.array_equal(leaf[0], old[1])
    assert state.num_bytes(kept) < state.num_bytes(before)
    # Read as a model it is whole: the checkpoint's lower layer and the learned one.
    whole = neo_jax.load(workdir).params["blocks"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(whole[0], before["blocks"]["mlp"]["up"]["kernel"][0])
    np.testing.assert_array_equal(whole[1], kept["blocks"]["mlp"]["up"]["kernel"][0])


@pytest.mark.slow
def test_it_ends_early_and_with_the_best_checkpoint(
    experiment, finished, tmp_path, capsys
) -> None:
    workdir = tmp_path / "tuned"
    # At this rate it gets worse from the first evaluation on.
    how = ("--config.optimizer.learning_rate=0.3", "--config.optimizer.skip_spikes=False")
    how += ("--config.eval.every=2", "--config.finetune.patience=2")
    assert tune(experiment, finished, workdir, *how) == 0
    told = capsys.readouterr().err
    evaluated = [line for line in lines(workdir) if line["split"] == "eval"]
    losses = [line["loss"] for line in evaluated]
    best = evaluated[int(np.argmin(losses))]
    assert len(losses) - 1 - int(np.argmin(losses)) == 2, "two evaluations in vain, no more"
    assert summary(workdir)["step"] < 12, losses
    assert "it gets no better, and ends here" in told
    assert f"the best checkpoint is that of step {best['step']}" in told
    assert summary(workdir)["loss"] == pytest.approx(best["loss"], rel=1e-6)
    # Typed again it trains no further.
    assert tune(experiment, finished, workdir, *how) == 0
    assert [line for line in lines(workdir) if line["split"] == "eval"] == evaluated


@pytest.mark.slow
def test_a_model_tuned_on_instructions_answers_and_stops(
    experiment, finished, tmp_path
) -> None:
    answers = {"Who?": " Me.", "Where?": " Here.", "When?": " Now.", "Why?": " No."}
    path, workdir = tmp_path / "answers.jsonl", tmp_path / "tuned"
    path.write_text(
        "".join(
            json.dumps({"prompt": question, "completion": answer}) + "\n"
            for question, answer in answers.items()
        )
    )
    how = (f"--config.data.source={path}", f"--config.data.eval_source={path}")
    how += ("--config.data.record_format=instruction", "--config.data.packing=best_fit")
    how += ("--config.data.isolate_documents=true", "--config.optimizer.learning_rate=0.02")
    how += ("--config.train.num_steps=120", "--config.eval.every=40")
    assert tune(experiment, finished, workdir, *how) == 0
    assert summary(workdir)["loss"] < 0.1
    model = neo_jax.load(workdir)
    assert model.tokenizer is not None
    eos = model.tokenizer.eos_id
    for question, answer in answers.items():
        prompt = [eos, *model.tokenizer.encode(question)]
        (written,) = model.generate([prompt], max_new_tokens=9, temperature=0.0)
        assert written.text == answer, question
        assert len(written.token_ids) < 9  # the end-of-text token was learned


def test_without_a_checkpoint_it_says_how_to_name_one(experiment, tmp_path, capsys) -> None:
    assert run(experiment, tmp_path / "run", "--config.task=finetune") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "task 'finetune' starts from a trained model; name it, as in --config.train" in told
