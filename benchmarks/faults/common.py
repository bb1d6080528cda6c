"""What the fault scripts share: a tiny experiment of 200 steps, its start, its losses."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
NUM_STEPS = 200
# What differs between two equal runs.
CLOCK = ("tokens_per_second", "step_seconds", "elapsed_seconds", "mfu_palm", "mfu_exact")

_EXPERIMENT = """\
from neo_jax import config as config_lib
from neo_jax.experiments import base

def get_config():
    config = base.get_config()
    config.model = config_lib.preset("tiny")
    config.model.update(num_layers=2, embed_dim=32, num_heads=2, window_size=8)
    config.model.update(vocab_size=300, max_seq_len=32)
    config.data.update(source={texts!r}, tokenizer="bpe:300", seq_len=32, batch_size=4)
    config.data.update(holdout_every=4, holdout_offset=1)
    config.optimizer.update(learning_rate=1e-2, warmup_steps=2)
    config.train.update(num_steps={num_steps}, log_every=1)
    config.eval.update(every=25, sample_tokens=3)
    config.checkpoint.update(every=10, minutes=0.0)
    return config
"""


def write_experiment(folder: pathlib.Path) -> pathlib.Path:
    """Eight documents, of which two are held out, and an experiment on them; its path."""
    texts = folder / "texts"
    texts.mkdir()
    for number in range(8):
        lines = [f"Line {i} of text {number} says {i * number}." for i in range(160)]
        (texts / f"{number}.txt").write_text("\n".join(lines))
    path = folder / "experiment.py"
    path.write_text(_EXPERIMENT.format(texts=str(texts), num_steps=NUM_STEPS))
    return path


def start(
    experiment: pathlib.Path,
    workdir: pathlib.Path,
    *arguments: str,
    prefix: tuple[str, ...] = ("-m", "neo_jax.main"),
    stderr: int = subprocess.PIPE,
    **environment: str,
) -> subprocess.Popen[str]:
    """The training command on the CPU, in a process of its own."""
    return subprocess.Popen(
        [
            *(sys.executable, *prefix, "--config", str(experiment)),
            *("--workdir", str(workdir), *arguments),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(experiment.parent / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **environment,
        },
        stderr=stderr,
        text=True,
    )


def start_two(
    experiment: pathlib.Path, workdir: pathlib.Path, *arguments: str
) -> list[subprocess.Popen[str]]:
    """Two processes with a device each, which train together over jax.distributed (gloo)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        start(
            experiment,
            workdir,
            *arguments,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]


def lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, without what a clock says; a line that is half there is left out."""
    path = workdir / "metrics.jsonl"
    read = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        read.append({key: value for key, value in line.items() if key not in CLOCK})
    return read
