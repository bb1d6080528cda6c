"""Two processes that train together: the same numbers as one, and the same each time."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from children import xla_flags
from neo_jax import main

ROOT = pathlib.Path(__file__).parents[1]

EXPERIMENT = """\
from neo_jax import config as config_lib
from neo_jax.experiments import base

def get_config():
    config = base.get_config()
    config.model = config_lib.preset("tiny")
    config.model.update(num_layers=2, embed_dim=32, num_heads=2, window_size=8)
    config.model.update(vocab_size=300, max_seq_len=32)
    config.data.update(source={texts!r}, tokenizer="bpe:300", seq_len=32, batch_size=8)
    config.data.update(holdout_every=4, holdout_offset=1)
    config.optimizer.update(learning_rate=1e-4, warmup_steps=0, eps=1e-6)
    config.mesh.update(fsdp=4, tensor=2)
    config.train.update(num_steps=4, log_every=1)
    config.eval.update(every=2, sample_tokens=8)
    return config
"""


# A pod's hosts have squares of its grid: rows of a batch that lie apart.
INTERLEAVED = """
import jax
from neo_jax import sharding

make_mesh = sharding.make_mesh

def interleaved(config):
    half = jax.device_count() // 2
    devices = jax.devices()
    return make_mesh(config, [devices[i // 2 + i % 2 * half] for i in range(len(devices))])

sharding.make_mesh = interleaved
"""


def start(experiment: pathlib.Path, workdir: pathlib.Path, devices: int, *more: str):
    command = [sys.executable, "-m", "neo_jax.main", "--config", str(experiment)]
    return subprocess.Popen(
        [*command, "--workdir", str(workdir), *more],
        env={**os.environ, "XLA_FLAGS": xla_flags(devices), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(workdir: pathlib.Path, *processes: subprocess.Popen) -> list[float]:
    for process in processes:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors[-2000:]
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in found if "loss" in line]


@pytest.mark.slow
def test_two_processes_of_four_devices_are_one_of_eight(tmp_path):
    for number in range(8):
        text = "\n".join(f"Line {i} of text {number} says {i * number}." for i in range(40))
        (tmp_path / f"{number}.txt").write_text(text)
    experiment = tmp_path / "mine.py"
    experiment.write_text(EXPERIMENT.format(texts=f"{tmp_path}/*.txt"))

    def two(name: str, experiment: pathlib.Path = experiment, *more: str) -> list[float]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        processes = [
            start(
                *(experiment, tmp_path / name, 4),
                *("--coordinator", f"localhost:{port}", "--num_processes", "2"),
                *("--process_id", str(i), *more),
            )
            for i in range(2)
        ]
        return losses(tmp_path / name, *processes)

    one = losses(tmp_path / "one", start(experiment, tmp_path / "one", 8))
    first, second = two("first"), two("second")
    assert len(one) == 6  # 4 steps, the evaluation after the second, and the last
    np.testing.assert_allclose(first, one, rtol=1e-5)
    assert first == second
    apart = tmp_path / "apart.py"
    apart.write_text(experiment.read_text() + INTERLEAVED)
    meshes = ("--config.mesh.fsdp=8", "--config.mesh.tensor=1")
    np.testing.assert_allclose(two("apart", apart, *meshes), one, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num_processes", "2"], "go with --coordinator HOST:PORT"),
        (["--coordinator", "h:1"], "--coordinator h:1 needs --num_processes and"),
        (
            ["--coordinator", "h:1", "--num_processes", "2", "--process_id", "2"],
            "--process_id 2 must lie in 0 … --num_processes-1 = 1",
        ),
    ],
)
def test_half_of_several_processes_is_refused(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(main.compilation, "use_cache", lambda: None)
    with pytest.raises(SystemExit) as exit_:
        main.main(["--config", "cpu_smoke", "--workdir", str(tmp_path), *arguments])
    line = capsys.readouterr().err
    assert exit_.value.code == 2 and words in line and line.count("\n") == 1
