"""Several processes are one run: they find each other, save together, and tell a loss."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

import children
from neo_jax import distributed, main
from neo_jax.checkpoint import Checkpointer
from neo_jax.config import CheckpointConfig, ConfigError
from tests import two_processes
from tests.train_test import tiny

ROOT = pathlib.Path(__file__).parents[1]
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed, "_supervise", lambda: None)
    return monkeypatch


def test_without_a_word_of_others_a_process_is_alone(environment, monkeypatch) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", None)
    distributed.start()


def test_the_environment_says_who_takes_part(environment, monkeypatch) -> None:
    told = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: told.update(given))
    environment.setenv("JAX_COORDINATOR_ADDRESS", "host0:1234")
    with pytest.raises(ConfigError, match="host0:1234 needs --num_processes and --process_id"):
        distributed.start()
    environment.setenv("JAX_NUM_PROCESSES", "4")
    environment.setenv("JAX_PROCESS_ID", "3")
    distributed.start()
    assert (told["coordinator_address"], told["num_processes"]) == ("host0:1234", 4)
    assert told["process_id"] == 3 and told["heartbeat_timeout_seconds"] < 60
    distributed.start("other:1", 2, 1)  # flags come first
    assert (told["coordinator_address"], told["process_id"]) == ("other:1", 1)
    environment.setenv("JAX_PROCESS_ID", "three")
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID='three' must be a number"):
        distributed.start()


def test_who_does_not_find_the_others_says_so(environment, monkeypatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("DEADLINE_EXCEEDED: waited too long\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ConfigError) as error:
        distributed.start("host0:1234", 2, 0)
    line = str(error.value)
    assert "--coordinator host0:1234: the processes of this run did not find each" in line
    assert "DEADLINE_EXCEEDED: waited too long and more" in line and "\n" not in line


LOST = [
    "UNKNOWN: Gloo all-reduce failed: [external/gloo/transport/tcp/pair.cc:547] Connection "
    "closed by peer [127.0.0.1]:40112",
    "UNAVAILABLE: Task /job:jax_worker/replica:0/task:1 heartbeat timeout.",
    "DEADLINE_EXCEEDED: Barrier timed out. Id: save_start",
]


@pytest.mark.parametrize("text", LOST)
def test_a_lost_process_is_told_from_other_errors(monkeypatch, text) -> None:
    assert distributed.lost_process(RuntimeError(text)) is None  # there is no other
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert distributed.lost_process(RuntimeError(text)) == text.splitlines()[0]
    full = "RESOURCE_EXHAUSTED: Out of memory allocating 1024 bytes."
    assert distributed.lost_process(RuntimeError(full)) is None


def test_a_run_that_lost_a_process_ends_with_69_and_a_line(tmp_path, monkeypatch, capsys):
    class Left(BaseException):
        pass

    def leave(code: int) -> None:
        raise Left(code)

    def train(*_: object) -> None:
        raise jax.errors.JaxRuntimeError(LOST[0])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(main.os, "_exit", leave)
    monkeypatch.setitem(main.TASKS, "pretrain", train)  # type: ignore[misc]
    with pytest.raises(Left) as left:
        main.main(["--config", "cpu_smoke", "--workdir", str(tmp_path)])
    assert left.value.args == (69,)
    told = capsys.readouterr().err
    assert told.startswith("neo_jax: process 0 of 2 lost another one of this run (UNKNOWN: Gl")
    assert told.endswith("and they resume from the newest checkpoint.\n")


@pytest.mark.parametrize(
    ("ending", "code", "words"),
    [
        ("os.abort()", os.EX_UNAVAILABLE, "JAX ended this process, most likely since another"),
        ("sys.exit(75)", 75, ""),
        ("os.kill(os.getpid(), 9)", 137, ""),
        ("os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)", 143, ""),
    ],
    ids=["aborted", "exit", "killed", "told"],
)
def test_a_parent_passes_on_signals_and_tells_of_an_abort(ending, code, words) -> None:
    text = (
        "import os, signal, sys, time\n"
        "from neo_jax import distributed\n"
        f"distributed._supervise()\n{ending}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert words in done.stderr and bool(done.stderr) == bool(words)


# ----------------------------------------------------------------------------- for real


def both(workdir: pathlib.Path, what: str, seed: int) -> None:
    """Runs tests/two_processes.py twice at a time; both must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    pair = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.two_processes", str(workdir), what, str(seed)],
            cwd=ROOT,
            env={
                **os.environ,
                "XLA_FLAGS": children.xla_flags(),
                **dict(zip(VARIABLES, (address, "2", str(index)), strict=True)),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for process in pair:
        _, told = process.communicate()
        assert process.returncode == 0, told


@pytest.mark.slow
def test_what_two_processes_save_one_reads_and_back(tmp_path) -> None:
    shapes = two_processes.abstract(jax.devices()[:1])
    both(tmp_path, "save", 1)
    with Checkpointer(tmp_path, CheckpointConfig()) as saved:
        assert saved.newest_good() == 1 and saved.meta(1)["processes"] == 2
        two_processes.compare(saved.read(1, shapes), two_processes.values(shapes, 1))
        alone = two_processes.place(shapes, two_processes.values(shapes, 2))
        saved.save(2, alone, {}, tiny())
    both(tmp_path, "compare", 2)
