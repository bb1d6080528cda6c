"""The convert command: from every kind to every kind, verified; StableHLO alone; mistakes."""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import children
import neo_jax
from neo_jax import config, convert, hf, pretrained, tokenizer

TINY_MTF = pathlib.Path(__file__).parent / "fixtures" / "mtf_tiny"
MODEL = config.ModelConfig(
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    window_size=8,
    vocab_size=50257,
    max_seq_len=32,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    """A Hugging Face directory with its tokenizer."""
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32),
        hf.abstract_params(MODEL),
    )
    hf.write(params, MODEL, folder, eos_id=50256)
    hf.write_tokenizer(tokenizer.load("gpt2"), folder, 32)
    return folder


def run(*arguments: object) -> int:
    return convert.main([str(argument) for argument in arguments])


def test_there_and_back_again(source, tmp_path, capsys):
    """Hugging Face → workdir → Hugging Face: the same bytes, and the same tokenizer."""
    workdir, back = tmp_path / "workdir", tmp_path / "back"
    assert run("--source", source, "--output", workdir, "--format", "orbax", "--verify") == 0
    assert "largest difference of logits 0 " in capsys.readouterr().out
    assert run("--source", workdir, "--output", back, "--format", "hf", "--verify") == 0
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes(), name
    words, kept = tokenizer.load("gpt2"), tokenizer.load(back)
    assert kept.encode("Née à Zürich") == words.encode("Née à Zürich")
    assert neo_jax.load(workdir).tokenizer.eos_id == 50256


def test_original_to_hugging_face(tmp_path, capsys):
    assert run("--source", TINY_MTF, "--output", tmp_path / "hf", "--verify") == 0
    assert "largest difference of logits 0 " in capsys.readouterr().out
    model = pretrained.read(tmp_path / "hf")
    expected = pretrained.read(TINY_MTF)
    jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)


def test_dtype_is_told_and_measured(source, tmp_path, capsys):
    output = tmp_path / "half"
    arguments = ["--source", source, "--output", output, "--dtype", "bfloat16", "--verify"]
    assert run(*arguments) == 0
    assert json.loads((output / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    line = capsys.readouterr().out.splitlines()[-1]
    divergence = float(line.split("mean KL ")[1].split()[0])
    assert 0 < divergence < 1e-2


def test_verify_notices_a_difference(source, tmp_path, capsys):
    output = tmp_path / "hf"
    assert run("--source", source, "--output", output) == 0
    weights = safetensors.numpy.load_file(output / "model.safetensors")
    weights["transformer.ln_f.bias"][3] += 0.01
    safetensors.numpy.save_file(weights, output / "model.safetensors")
    assert convert.verify(str(source), str(output), None) == 1
    assert "do not answer alike" in capsys.readouterr().err


def test_what_does_not_answer_alike_is_not_uploaded(source, tmp_path, monkeypatch):
    uploaded = []
    monkeypatch.setattr(hf, "push_to_hub", lambda *arguments: uploaded.append(arguments))
    arguments = ["--source", source, "--verify", "--push_to_hub", "a/b", "--output"]
    monkeypatch.setattr(convert, "verify", lambda *_: 1)
    assert run(*arguments, tmp_path / "a") == 1 and not uploaded
    monkeypatch.setattr(convert, "verify", lambda *_: 0)
    assert run(*arguments, tmp_path / "b") == 0 and uploaded == [(tmp_path / "b", "a/b")]


def test_a_head_is_kept(tmp_path, capsys):
    head = hf.Head("GPTNeoForTokenClassification", ("a", "b", "c"))
    shapes = hf.abstract_params(MODEL, head)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    hf.write(params, MODEL, tmp_path / "a", head=head)
    assert run("--source", tmp_path / "a", "--output", tmp_path / "b", "--verify") == 0
    assert hf.read(tmp_path / "b").head == head
    arguments = ["--source", tmp_path / "a", "--output", tmp_path / "c", "--format", "orbax"]
    assert run(*arguments) == 1
    assert "only --format hf keeps its head" in capsys.readouterr().err


@pytest.mark.slow
def test_stablehlo_runs_without_this_code(source, tmp_path):
    """Reloaded by a process that imports JAX alone, for two batch sizes."""
    output = tmp_path / "hlo"
    assert run("--source", source, "--output", output, "--format", "stablehlo") == 0
    code = (
        "import json, sys, numpy as np, safetensors.numpy\n"
        "from jax import export\n"
        "folder = sys.argv[1]\n"
        "forward = export.deserialize(open(folder + '/forward.stablehlo', 'rb').read())\n"
        "params = {}\n"
        "for name, array in safetensors.numpy.load_file(\n"
        "    folder + '/params.safetensors').items():\n"
        "    *parents, last = name.split('.')\n"
        "    node = params\n"
        "    for key in parents: node = node.setdefault(key, {})\n"
        "    node[last] = array\n"
        "for batch in (1, 3):\n"
        "    ids = np.arange(32 * batch, dtype=np.int32).reshape(batch, 32)\n"
        "    np.save(f'{folder}/{batch}.npy', forward.call(params, ids))\n"
        "decode = export.deserialize(open(folder + '/decode.stablehlo', 'rb').read())\n"
        "ids = np.arange(0, 48 * 1000, 1000, dtype=np.int32).reshape(2, 24)\n"
        # Layers global, local: 32 positions, a window of 8.
        "keys = tuple(np.zeros((2, 4, 8, slots), np.float32) for slots in (32, 8))\n"
        "values = tuple(np.zeros((2, 4, slots, 8), np.float32) for slots in (32, 8))\n"
        "logits = []\n"
        "for t in range(24):\n"
        "    place = np.full(2, t, np.int32)\n"
        "    one, keys, values = decode.call(params, keys, values, ids[:, t], place)\n"
        "    logits.append(one)\n"
        "np.save(folder + '/decode.npy', np.stack(logits, axis=1))\n"
        "assert 'neo_jax' not in sys.modules\n"
        "for each in (forward, decode): assert set(each.platforms) >= {'tpu', 'cpu', 'cuda'}\n"
    )
    environment = {**os.environ, "XLA_FLAGS": children.xla_flags()}
    subprocess.run([sys.executable, "-c", code, output], check=True, env=environment)
    assert convert.verify(str(source), str(output), None) == 0
    model = neo_jax.load(source)
    for batch in (1, 3):
        expected = model.logits(np.arange(32 * batch).reshape(batch, 32))
        actual = np.load(output / f"{batch}.npy")
        np.testing.assert_allclose(actual, expected, atol=2e-5 * float(expected.std()))
    expected = model.logits(np.arange(0, 48 * 1000, 1000).reshape(2, 24))
    actual = np.load(output / "decode.npy")
    np.testing.assert_allclose(actual, expected, atol=2e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "/no/such"], "/no/such is not a directory"),
        (["--source", "SOURCE", "--output", "SOURCE"], "is not empty"),
        (["--source", "SOURCE", "--output", "SOURCE/config.json"], "is a file"),
        (
            ["--source", "SOURCE", "--format", "orbax", "--push_to_hub", "a/b"],
            "needs --format",
        ),
    ],
)
def test_mistakes_are_one_line(source, tmp_path, capsys, arguments, message):
    arguments = ["--output", str(tmp_path / "o"), *arguments]
    assert run(*(a.replace("SOURCE", str(source)) for a in arguments)) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def _change_config(folder: pathlib.Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def _shards(folder: pathlib.Path) -> None:
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    there, missing = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index = {name: missing if "ln_f" in name else there for name in weights}
    safetensors.numpy.save_file(weights, folder / there)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def _cut_off(folder: pathlib.Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _pickle(folder: pathlib.Path) -> None:
    """What would make a directory, were it read as pickles are."""
    (folder / "model.safetensors").unlink()
    code = f"cos\nmkdir\n(S'{folder / 'executed'}'\ntR.".encode()
    (folder / "pytorch_model.bin").write_bytes(code)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_shards, "names shards that are missing: model-00002-of-00002.safetensors"),
        (_cut_off, "is not a whole safetensors file"),
        (lambda folder: _change_config(folder, model_type="gpt2"), "'gpt2', which is not"),
        (lambda folder: _change_config(folder, model_type="gptj"), "'gptj', which is not"),
        (
            lambda folder: _change_config(folder, max_position_embeddings=31),
            "of another shape: transformer.wpe.weight [32, 32] instead of [31, 32]",
        ),
        (
            lambda folder: _change_config(
                folder, num_layers=4, attention_types=[[["local"], 4]]
            ),
            "missing: transformer.h.2.ln_1.weight",
        ),
        (
            lambda folder: _change_config(
                folder, num_layers=1, attention_types=[[["local"], 1]]
            ),
            "unexpected: transformer.h.1",
        ),
        (_pickle, "is refused" if importlib.util.find_spec("torch") else "with torch"),
    ],
    ids=["shard", "cut", "gpt2", "gptj", "shape", "missing", "unexpected", "pickle"],
)
def test_bad_checkpoints_are_one_line(source, tmp_path, capsys, spoil, message):
    folder = pathlib.Path(shutil.copytree(source, tmp_path / "bad"))
    spoil(folder)
    assert run("--source", folder, "--output", tmp_path / "o") == 1
    error = capsys.readouterr().err
    assert error.startswith("convert: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "o").exists() and not (folder / "executed").exists()


def test_nan_is_warned_of_and_kept(source, tmp_path, caplog):
    folder = pathlib.Path(shutil.copytree(source, tmp_path / "bad"))
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    weights["transformer.wpe.weight"][3, 4] = np.nan
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    assert run("--source", folder, "--output", tmp_path / "o") == 0
    assert "transformer.wpe.weight holds NaN" in caplog.text
    kept = safetensors.numpy.load_file(tmp_path / "o" / "model.safetensors")
    np.testing.assert_array_equal(
        kept["transformer.wpe.weight"], weights["transformer.wpe.weight"]
    )


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    assert "--format orbax" in capsys.readouterr().out
