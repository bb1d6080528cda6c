"""Adapters leave for peft and come back; a tuned workdir is a model like any other."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import neo_jax
from neo_jax import convert, hf, lora, state, trainable
from neo_jax.config import ConfigError, FinetuneConfig, preset_model
from neo_jax.evaluate import __main__ as evaluate
from neo_jax.generate import __main__ as generate
from tests.finetune_text_test import params_of
from tests.pretrain_test import _one_device as _one_device
from tests.pretrain_test import experiment as experiment
from tests.pretrain_test import finished as finished
from tests.tuning_test import tune

pytestmark = pytest.mark.slow

IDS = np.arange(1, 15)[None]
HOW = (
    "--config.finetune.trainable=lora",
    "--config.model.lora_rank=3",
    "--config.model.lora_targets=('query','value','out','up','down')",
    "--config.train.num_steps=4",
)


@pytest.fixture(scope="module")
def tuned(experiment: str, finished: pathlib.Path, tmp_path_factory: Any) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("tuned") / "lora"
    how = (*HOW, "--config.model.lora_dropout=0.1", "--config.finetune.export=peft")
    assert tune(experiment, finished, workdir, *how) == 0
    return workdir


def test_a_workdir_of_adapters_loads_as_a_whole_model(tuned, finished) -> None:
    model, base = neo_jax.load(tuned), neo_jax.load(finished)
    assert model.config.lora_rank == 0
    assert np.abs(model.logits(IDS) - base.logits(IDS)).max() > 1e-3
    assert model.generate("Line", max_new_tokens=3)[0].token_ids


def test_the_adapters_go_to_peft_and_back(tuned, finished, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    import torch

    ours = neo_jax.load(tuned).logits(IDS)
    assert convert.main(["--source", str(finished), "--output", str(tmp_path / "base")]) == 0
    adapter = tmp_path / "adapter"
    assert (
        convert.main(["--source", str(tuned), "--output", str(adapter), "--format", "peft"])
        == 0
    )
    base = transformers.GPTNeoForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, str(adapter))
    with torch.no_grad():
        logits = theirs(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    # And back, from a directory that peft itself wrote.
    theirs.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    path = tmp_path / "again" / "adapter_config.json"
    path.write_text(
        json.dumps(
            {**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "base")}
        )
    )
    back = neo_jax.load(tmp_path / "again").logits(IDS)
    np.testing.assert_allclose(back, ours, rtol=0, atol=1e-5 * np.abs(ours).max())


def test_the_run_exports_its_adapters_itself(tuned) -> None:
    assert hf.is_adapter(tuned / "peft")
    values = json.loads((tuned / "peft" / "adapter_config.json").read_text())
    assert values["r"] == 3
    assert set(values["target_modules"]) == {"q_proj", "v_proj", "out_proj", "c_fc", "c_proj"}


def test_another_base_is_refused_in_one_line(experiment, tuned, finished, tmp_path) -> None:
    copy = tmp_path / "lora"
    shutil.copytree(tuned, copy)
    noted = json.loads((copy / "base.json").read_text())
    (copy / "base.json").write_text(json.dumps({**noted, "fingerprint": "0" * 16}))
    with pytest.raises(ConfigError, match="is another checkpoint, or has changed since"):
        neo_jax.load(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_proj", "c_attn"]}, "c_attn are no Linears of a GPT-Neo"),
        ({"peft_type": "IA3"}, "is no plain LoRA adapter"),
        ({"use_dora": True}, "is no plain LoRA adapter"),
    ],
)
def test_what_is_no_adapter_of_ours_is_told(tuned, tmp_path, changes, message) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(tuned / "peft", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ConfigError, match=message):
        neo_jax.load(folder)


def test_an_adapter_of_another_shape_is_refused(tuned, tmp_path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(tuned / "peft", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 5}))
    with pytest.raises(ValueError, match="belongs to another model"):
        neo_jax.load(folder)


def test_int8_kernels_learn_and_load(experiment, finished, tmp_path) -> None:
    workdir = tmp_path / "int8"
    assert tune(experiment, finished, workdir, *HOW, "--config.model.kernel_dtype=int8") == 0
    logits = neo_jax.load(workdir).logits(IDS)
    assert np.isfinite(jax.device_get(logits)).all()


def test_the_commands_take_the_workdir(tuned, tmp_path, capsys) -> None:
    argv = ["--checkpoint", str(tuned), "--prompt", "Line", "--max_new_tokens", "3"]
    assert generate.main(argv) == 0
    text, report = tmp_path / "text.txt", tmp_path / "report.json"
    text.write_text("Line 3 of text 1 says 3.\n" * 3)
    argv = ["--checkpoint", str(tuned), "--text", str(text), "--json", str(report)]
    assert not evaluate.main(argv)
    assert report.exists()


def test_a_classifiers_adapters_and_head_go_to_peft(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    import torch

    shape = preset_model("tiny", num_layers=2, embed_dim=32, vocab_size=60, num_labels=3)
    shape = dataclasses.replace(shape, lora_rank=2, compute_dtype="float32")
    params = jax.tree.map(jnp.asarray, params_of(shape))
    learned, _ = trainable.divide(params, FinetuneConfig(trainable="lora"))
    hf.write_adapter(learned, shape, "somewhere", tmp_path)
    merged, plain = lora.merge(params, shape)
    network = {key: leaf for key, leaf in params.items() if key != "classifier"}
    values = {**hf.config_to_hf(plain), "num_labels": 3, "pad_token_id": 59}
    base = transformers.GPTNeoForSequenceClassification(transformers.GPTNeoConfig(**values))
    bare = dataclasses.replace(plain, num_labels=0)
    named = hf.to_hf(network, bare)
    weights = {name: torch.from_numpy(np.array(array)) for name, array in named.items()}
    missing, unexpected = base.load_state_dict(weights, strict=False)
    assert missing == ["score.weight"] and not unexpected
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    ids = np.arange(1, 15)[None]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    graph, _ = state.model_graph(plain)

    @jax.jit
    def ours(params):
        model = nnx.merge(graph, params)
        return model.labels(model.hidden(jnp.asarray(ids))[:, -1])

    scale = np.abs(expected).max()
    np.testing.assert_allclose(ours(merged), expected, rtol=0, atol=1e-5 * scale)
