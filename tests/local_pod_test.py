"""A pod of four processes on this machine: trained by run.sh, one host killed, resumed.

The cloud is the fake one, but what is said to a host over ssh really runs, each host in a home
of its own. The processes talk to each other over the loopback address.
"""

import json
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys

import pytest

from children import LEAST
from main_test import EXPERIMENT
from pod_scripts import ROOT, SCRIPTS, Cloud

HOSTS = 4


@pytest.fixture
def pod(tmp_path: pathlib.Path) -> Cloud:
    """Four hosts that are set up, and an experiment."""
    cloud = Cloud(tmp_path)
    cloud.write_state(execute=True, hosts_per_slice=HOSTS)
    cloud.have_pod()
    for host in range(HOSTS):
        home = tmp_path / "hosts" / f"neo-{host}"
        home.mkdir(parents=True)
        (home / "neo_jax").symlink_to(ROOT)
        (home / "neo_jax_venv").symlink_to(sys.prefix)
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(8):
        lines = [f"Line {i} of text {number} says {i * number}." for i in range(40)]
        (texts / f"{number}.txt").write_text("\n".join(lines))
    (tmp_path / "mine.py").write_text(EXPERIMENT.format(texts=str(texts)))
    cloud.settings |= {
        "ACCELERATOR_TYPE": "v4-32",
        "CONFIG": str(tmp_path / "mine.py"),
        "WORKDIR": str(tmp_path / "run"),
        "BUCKET": "",
        "POLL_SECONDS": "0.3",
        "PATIENCE": "400",
        "OVERRIDES": "--config.eval.every=0 --config.eval.sample_tokens=0",
        "MAIN_FLAGS": f"--coordinator 127.0.0.1:{free_port()} --num_processes {HOSTS} "
        "--process_id %HOST%",
        # One flag: JOB_ENV is divided at spaces.
        "JOB_ENV": f"JAX_PLATFORMS=cpu XLA_FLAGS={LEAST.split()[0]} PYTHONPATH={ROOT} "
        f"JAX_COMPILATION_CACHE_DIR={tmp_path}/cache",
    }
    return cloud


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def state(cloud: Cloud, host: int) -> list[str]:
    """What worker.sh says of the run on a host: state, code, step."""
    done = subprocess.run(
        [SCRIPTS / "worker.sh", "state", "run"],
        env={**os.environ, "HOME": str(cloud.folder / "hosts" / f"neo-{host}")},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()[2:]


def logs(cloud: Cloud) -> str:
    files = sorted(cloud.folder.glob("hosts/*/neo_jax_jobs/run/log"))
    return "\n".join(file.read_text()[-2000:] for file in files)


@pytest.mark.slow
def test_a_pod_of_four_hosts_loses_one_and_goes_on(pod: Cloud) -> None:
    many = ("--", "--config.train.num_steps=2000")
    lines = [f"{key}={value!r}" for key, value in pod.settings.items()]
    (pod.folder / "pod.env").write_text("\n".join(lines) + "\n")
    first = subprocess.Popen(
        [SCRIPTS / "run.sh", *many],
        cwd=pod.folder,
        env=pod.environment,
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
    )
    # Until some checkpoints are written; tail waits for the file, and for its lines.
    lines_of = shlex.quote(str(pod.folder / "run" / "metrics.jsonl"))
    seen = f"tail -n +1 -F {lines_of} 2>/dev/null | grep -m 1 '\"step\": 8,'"
    subprocess.run(["bash", "-c", seen], check=True, capture_output=True, timeout=900)
    assert first.poll() is None, (first.communicate()[0], logs(pod))
    pid = int((pod.folder / "hosts/neo-2/neo_jax_jobs/run/pid").read_text().split()[0])
    os.killpg(pid, signal.SIGKILL)
    told, _ = first.communicate(timeout=600)
    assert first.returncode in (1, 75), (told, logs(pod))
    assert state(pod, 2)[0] == "lost"
    assert {state(pod, host)[0] for host in (0, 1, 3)} == {"ended"}  # by themselves

    saved = int(state(pod, 0)[2])
    settings = ("--", f"--config.train.num_steps={saved + 6}")
    # As babysit.sh would: a machine that is busy for a minute loses its company, too.
    for _ in range(4):
        done = subprocess.run(
            [SCRIPTS / "run.sh", *settings],
            cwd=pod.folder,
            env=pod.environment,
            stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode in (0, 1, 75), (done.stdout, logs(pod))
        if done.returncode == 0:
            break
    assert f"run started on {HOSTS} hosts." in done.stdout
    assert "run ended with 0" in done.stdout
    summary = json.loads((pod.folder / "run" / "summary.json").read_text())
    assert summary["step"] == saved + 6
    assert f"resuming after step {saved}" in logs(pod)
    assert f"{HOSTS} × cpu" in logs(pod)
    pod.run("fetch.sh", "here")
    assert len(list((pod.folder / "here" / "logs").iterdir())) == HOSTS
    assert (pod.folder / "here" / "workdir" / "metrics.jsonl").exists()
