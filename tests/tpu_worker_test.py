"""worker.sh, on a real host: jobs started, told, ended."""

import os
import pathlib
import signal
import subprocess
from collections.abc import Callable

import pytest

from pod_scripts import SCRIPTS


@pytest.fixture
def host(tmp_path: pathlib.Path) -> Callable[..., str]:
    """Runs worker.sh with a home of its own."""
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "HOSTNAME": "host-0",
        "NEO_JAX_GRACE_SECONDS": "20",
    }

    def run(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [SCRIPTS / "worker.sh", *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    return run


def start(host: Callable[..., str], folder: pathlib.Path, program: str) -> int:
    """Starts a job whose program says when it is ready; its process."""
    ready = folder / "ready"
    os.mkfifo(ready)
    host(
        "start", "job", str(folder / "workdir"), f"READY={ready}", "--", "bash", "-c", program
    )
    assert ready.read_text() == "ready"  # waits for it
    ready.unlink()
    return int((folder / "neo_jax_jobs" / "job" / "pid").read_text().split()[0])


def await_end(pid: int) -> None:
    subprocess.run(["tail", f"--pid={pid}", "-s", "0.02", "-f", "/dev/null"], check=True)


def await_state(pid: int | str, state: str) -> None:
    """Until /proc tells the state of process `pid`: stopped is T, ended and not yet told Z."""
    while pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] != state:
        os.sched_yield()


def test_worker_notes_how_a_job_ended(host, tmp_path):
    assert host("state", "job") == "neo_jax-state host-0 absent - 0\n"
    pid = start(host, tmp_path, 'echo hello; printf ready >"$READY"; exit 3')
    await_end(pid)
    assert host("state", "job") == "neo_jax-state host-0 ended 3 0\n"
    log = host("tail", "job", "9")
    assert "hello\n" in log and "ended with 3" in log


def test_worker_gives_a_job_the_time_to_save(host, tmp_path):
    program = """
        trap 'mkdir -p "$0/checkpoints/12"; kill $!; exit 75' TERM
        tail -f /dev/null & printf ready >"$READY"; wait"""
    program = program.replace("$0", str(tmp_path / "workdir"))
    start(host, tmp_path, program)
    assert host("state", "job") == "neo_jax-state host-0 running - 0\n"
    assert "stopped job" in host("stop", "job")
    assert host("state", "job") == "neo_jax-state host-0 ended 75 12\n"
    assert host("stop", "job") == ""  # again: nothing to do


def test_worker_notes_a_job_that_ended_as_the_signal_came(host, tmp_path):
    program = """
        trap 'exit 75' TERM
        tail -f /dev/null & printf ready >"$READY"; wait"""
    shell = start(host, tmp_path, program)
    os.kill(shell, signal.SIGSTOP)  # it hears of the signal after its command's end
    await_state(shell, "T")
    (command,) = pathlib.Path(f"/proc/{shell}/task/{shell}/children").read_text().split()
    os.killpg(shell, signal.SIGTERM)
    await_state(command, "Z")
    os.kill(shell, signal.SIGCONT)
    await_end(shell)
    assert host("state", "job") == "neo_jax-state host-0 ended 75 0\n"


def test_worker_starting_ends_what_ran_before(host, tmp_path):
    first = start(host, tmp_path, 'printf ready >"$READY"; exec tail -f /dev/null')
    host("start", "other", str(tmp_path), "--", "true")
    assert not pathlib.Path(f"/proc/{first}").exists()
    assert host("state", "job").split()[2] == "ended"


def test_worker_tells_a_job_that_vanished(host, tmp_path):
    pid = start(host, tmp_path, 'printf ready >"$READY"; exec tail -f /dev/null')
    os.killpg(pid, 9)
    await_end(pid)
    assert host("state", "job").split()[2:] == ["lost", "-", "0"]
    assert host("stop", "job") == ""


def test_worker_does_not_take_a_stranger_for_its_job(host, tmp_path):
    """Numbers of processes are given away again."""
    folder = tmp_path / "neo_jax_jobs" / "job"
    folder.mkdir(parents=True)
    (folder / "pid").write_text(f"{os.getpid()} 1\n")
    assert host("state", "job").split()[2] == "lost"
    host("stop", "job")  # must not end this test
