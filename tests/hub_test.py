"""The hub: downloading and uploading with its own client, the cache, and no network.

Each process here sees another hub, through the hub's own variables: a stand-in on the
loopback, none at all, or one that may not be asked. What the client reads from the
environment it reads once, so each is a process of its own.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import hub_stand_in
from neo_jax import hf, tokenizer
from neo_jax.config import ModelConfig

MODEL = ModelConfig(
    num_layers=2, embed_dim=16, num_heads=2, window_size=8, vocab_size=300, max_seq_len=32
)
NOBODY = "http://127.0.0.1:9"  # the port of `discard`, where nothing listens


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """A model as it stands on the hub, with a tokenizer and things that nobody needs here."""
    folder = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32),
        hf.abstract_params(MODEL),
    )
    hf.write(params, MODEL, folder, shard_bytes=10_000, eos_id=0)
    hf.write_tokenizer(tokenizer.train_bpe(["some words"], 270), folder, 32)
    held = {path.name: path.read_bytes() for path in folder.iterdir()}
    return held | {
        "README.md": b"# A model",
        "flax_model.msgpack": b"many bytes",
        "onnx/model.safetensors": b"of another program",
        "checkpoint-5/config.json": b"{}",
    }


def run(home: pathlib.Path, *commands: list[str], **variables: str) -> list[tuple[int, str]]:
    """Exit status and output of `convert` with each list of arguments, in one process."""
    code = (
        "import contextlib, io, json, sys\n"
        "from neo_jax import convert\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):\n"
        "        status = convert.main(arguments)\n"
        "    print('RESULT', json.dumps([status, out.getvalue()]))\n"
    )
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        env={
            **inherited,
            "PYTHONPATH": str(pathlib.Path(__file__).parents[1]),
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",  # Git LFS is what the stand-in speaks
            **variables,
        },
        check=True,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    return [tuple(json.loads(line[7:])) for line in lines if line.startswith("RESULT")]


@pytest.fixture(scope="module")
def session(files, tmp_path_factory):
    """One model fetched, turned, and uploaded again; the hub is gone afterwards."""
    home, output = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("out") / "hf"
    old = {"config.json": files["config.json"], "pytorch_model.bin": b"no tensors at all"}
    models = {"some/neo": files, "some/old": old, "some/cut": {**files}}
    models["some/cut"]["model-00002-of-00004.safetensors"] = b"cut off"
    with hub_stand_in.Hub(models) as hub:
        arguments = ["--source", "some/neo", "--output", str(output), "--verify"]
        results = run(
            home,
            [*arguments, "--push_to_hub", "some/copy"],
            ["--source", "some/nothing", "--output", str(output.parent / "a")],
            ["--source", "some/old", "--output", str(output.parent / "b")],
            ["--source", "some/cut", "--output", str(output.parent / "c")],
            HF_ENDPOINT=hub.address,
            HF_TOKEN=hub_stand_in.TOKEN,
        )
    return hub, home, output, results


def test_a_model_is_fetched_and_uploaded(session, files):
    hub, _, output, results = session
    status, text = results[0]
    assert status == 0 and "largest difference of logits 0 " in text, text
    assert f"uploaded to {hub.address}/some/copy" in text
    uploaded = hub.models["some/copy"]
    assert uploaded == {path.name: path.read_bytes() for path in output.iterdir()}
    assert uploaded["tokenizer.json"] == files["tokenizer.json"]
    assert json.loads(uploaded["config.json"])["eos_token_id"] == 0


def test_only_what_is_needed_is_fetched(session):
    _, home, _, _ = session
    snapshot = home / "hub" / "models--some--neo" / "snapshots" / hub_stand_in.COMMIT
    names = {path.name for path in snapshot.rglob("*") if not path.is_dir()}
    assert "config.json" in names and "tokenizer.json" in names
    assert len([name for name in names if name.endswith(".safetensors")]) == 4
    assert not names & {"README.md", "flax_model.msgpack", "model.safetensors"}
    assert not (snapshot / "checkpoint-5").exists()


def test_mistakes_on_the_hub_are_one_line(session):
    hub, _, _, results = session
    wanted = [
        "'some/nothing' is neither a local directory nor to be had from " + hub.address,
        "pytorch_model.bin is refused",
        "model-00002-of-00004.safetensors is not a whole safetensors file",
    ]
    for (status, text), message in zip(results[1:], wanted, strict=True):
        assert status == 1 and message in text and text.count("\n") == 1, text


def lay_out(cache: pathlib.Path, name: str, files: dict[str, bytes]) -> None:
    """A model in a cache by hand: refs/main names a snapshot."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / hub_stand_in.COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(hub_stand_in.COMMIT)
    for file in ("config.json", *(name for name in files if name.startswith("model"))):
        (snapshot / file).write_bytes(files[file])


@pytest.mark.slow
def test_without_a_hub_the_cache_serves(session, files, tmp_path):
    """First nobody listens where the hub should be, then nobody may be asked."""
    _, home, _, _ = session
    lay_out(home / "hub", "by/hand", files)
    results = run(
        home,
        ["--source", "some/neo", "--output", str(tmp_path / "a"), "--push_to_hub", "x/y"],
        ["--source", "some/thing", "--output", str(tmp_path / "b")],
        HF_ENDPOINT=NOBODY,
        HF_TOKEN=hub_stand_in.TOKEN,
    )
    assert results[0][0] == 1 and "wrote " in results[0][1]
    upload = results[0][1].splitlines()[-1]
    assert f"cannot be uploaded to {NOBODY} as 'x/y' (ConnectError" in upload
    status, text = results[1]
    assert status == 1 and f"nor to be had from {NOBODY}" in text and text.count("\n") == 1
    results = run(
        tmp_path / "elsewhere",
        ["--source", "some/neo", "--output", str(tmp_path / "c"), "--verify"],
        ["--source", "some/thing", "--output", str(tmp_path / "d")],
        ["--source", "by/hand", "--output", str(tmp_path / "e"), "--verify"],
        HF_HUB_CACHE=str(home / "hub"),
        HF_HUB_OFFLINE="1",
    )
    assert results[0][0] == 0 and "largest difference of logits 0 " in results[0][1]
    status, text = results[1]
    assert status == 1 and text.count("\n") == 1
    assert f"nor in the cache {home / 'hub'}, and HF_HUB_OFFLINE forbids" in text
    assert not (tmp_path / "d").exists()
    assert results[2][0] == 0 and "largest difference of logits 0 " in results[2][1]


def test_uploading_needs_a_login(tmp_path, files):
    source = tmp_path / "source"
    source.mkdir()
    for name in files:
        if "/" not in name:
            (source / name).write_bytes(files[name])
    with hub_stand_in.Hub({}) as hub:
        ((status, text),) = run(
            tmp_path / "home",
            ["--source", str(source), "--output", str(tmp_path / "o"), "--push_to_hub", "a/b"],
            HF_ENDPOINT=hub.address,
        )
    assert status == 1 and "hf auth login" in text.splitlines()[-1]
    assert text.count("\n") == 2 and not hub.models
