"""The command `neo-jax doctor`: what this machine has for neo_jax, and what is wrong with it.

Enters: the machine. Leaves: versions, devices, memory, disks, caches and variables as text or
JSON; last, one line for each fault, with what would mend it. Exit status: 0 where nothing is
wrong, 1 where something is.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import resource
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

from neo_jax import caches
from neo_jax import distributed as distributed_lib

_EXAMPLES = """examples:
  neo-jax doctor
  neo-jax doctor --json
  neo-jax doctor --distributed --devices 32     on all hosts of a pod at the same time
"""

# What a figure or a fault may depend on.
_NAMED = ("neo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "libtpu")
_VARIABLES = re.compile(
    r"^(JAX|XLA|TPU|LIBTPU|CUDA_VISIBLE|HF|NEO_JAX|XDG_CACHE|TFDS)(_|$)", re.IGNORECASE
)
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)

_LEAST_MEMORY = 2 << 30  # `make train` peaks below it
_LEAST_DISK = 1 << 30
_LEAST_FILES = 1024  # ArrayRecord opens every shard


@dataclasses.dataclass
class Report:
    """What was found: sections of facts, and faults, each one line with its remedy."""

    facts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    faults: list[str] = dataclasses.field(default_factory=list)

    def text(self) -> str:
        """As one reads it."""
        lines = []
        for section, facts in self.facts.items():
            lines.append(section)
            lines += [f"  {name:24} {value}" for name, value in facts.items()]
        lines += [f"wrong: {fault}" for fault in self.faults] or ["nothing is wrong."]
        return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    report = examine(arguments.devices, distributed=arguments.distributed)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(report), indent=1))
    else:
        print(report.text())
    return 1 if report.faults else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m neo_jax.doctor",
        description="Tell what this machine has for neo_jax, and what is wrong with it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="let the hosts of a pod find each other first",
    )
    parser.add_argument("--json", action="store_true", help="facts and faults as JSON")
    parser.add_argument(
        "--devices", type=int, metavar="N", help="devices that should be there"
    )
    return parser


def examine(expected_devices: int | None = None, *, distributed: bool = False) -> Report:
    """Looks at everything; a part that cannot be looked at is a fault, not an end."""
    report = Report()
    looks: tuple[tuple[str, Callable[[Report], dict[str, Any]]], ...] = (
        ("versions", _versions),
        ("devices", lambda report: _devices(report, expected_devices, distributed)),
        ("machine", _machine),
        ("caches", _caches),
        ("environment", _environment),
    )
    for section, look in looks:
        report.facts[section] = look(report)
    return report


# ------------------------------------------------------------------------------- versions


def _versions(report: Report) -> dict[str, Any]:
    found = {"python": platform.python_version()}
    for name in _NAMED:
        if (version := _version(name)) is not None:
            found[name] = version
    if "neo_jax" not in found:
        report.faults.append("neo_jax is not installed as a package: pip install .")
    else:
        report.faults += too_old(importlib.metadata.requires("neo_jax") or [])
    jax, jaxlib = found.get("jax"), found.get("jaxlib")
    if jax and jaxlib and _numbers(jax)[:2] != _numbers(jaxlib)[:2]:
        report.faults.append(
            f"jax {jax} and jaxlib {jaxlib} differ: pip install -U jax jaxlib"
        )
    return found


def too_old(requirements: Sequence[str]) -> list[str]:
    """One line for each package that is missing or older than `name>=version` asks for."""
    faults = []
    for requirement in requirements:
        match = re.match(
            r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*(?:([>=]=)([0-9.]+))?", requirement
        )
        if match is None or ";" in requirement:  # of an extra
            continue
        name, relation, wanted = match.groups()
        version = _version(name)
        command = f"pip install '{requirement}'"
        if version is None:
            faults.append(f"{name} is missing: {command}")
        elif relation == ">=" and _numbers(version) < _numbers(wanted):
            faults.append(f"{name} {version} is older than {wanted}: {command}")
    return faults


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:4])


# -------------------------------------------------------------------------------- devices


def _devices(report: Report, expected: int | None, distributed: bool) -> dict[str, Any]:
    import jax

    try:
        if distributed:
            distributed_lib.start()
        devices = jax.devices()
    except (RuntimeError, ValueError) as error:  # no backend, a chip in use, no other hosts
        line = str(error).strip().splitlines()[0]
        report.faults.append(f"JAX finds no device: {line}{_holders()}")
        return {}
    first = devices[0]
    found: dict[str, Any] = {
        "platform": first.platform,
        "kind": first.device_kind,
        "number": f"{len(devices)}, {jax.local_device_count()} of this process",
        "processes": f"{jax.process_index()} of {jax.process_count()}",
    }
    memory = first.memory_stats() or {}
    if "bytes_limit" in memory:
        found["memory of one"] = _size(memory["bytes_limit"])
        found["in use"] = _size(memory["bytes_in_use"])
    if first.platform == "cpu" and not os.environ.get("JAX_PLATFORMS"):
        for kind, extra in _idle_accelerators():
            report.faults.append(f"{kind} here, and JAX uses the CPU: pip install '{extra}'")
    if expected is not None and len(devices) != expected:
        report.faults.append(f"{len(devices)} devices are here, not {expected}")
    return found


def _idle_accelerators() -> list[tuple[str, str]]:
    found = []
    if glob.glob("/dev/accel[0-9]*"):
        found.append(("a TPU is", "neo_jax[tpu]"))
    if glob.glob("/dev/nvidia[0-9]*"):
        found.append(("an NVIDIA GPU is", "neo_jax[gpu]"))
    return found


def _holders() -> str:
    """Which other processes of this user have a chip open; a TPU serves one at a time."""
    numbers = set()
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        try:
            target = os.readlink(link)
        except OSError:  # gone meanwhile, or somebody else's
            continue
        if re.match(r"/dev/(accel|vfio/)\d", target):
            numbers.add(int(link.split("/")[2]))
    numbers -= {os.getpid()}
    return f"; held by process {', '.join(map(str, sorted(numbers)))}" if numbers else ""


# ----------------------------------------------------------------------- machine and caches


def _machine(report: Report) -> dict[str, Any]:
    total, free = memory()
    cores = len(os.sched_getaffinity(0))
    files, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    disk = shutil.disk_usage(os.getcwd()).free
    shared = pathlib.Path("/dev/shm")
    found = {
        "system": platform.platform(),
        "cores": cores,
        "memory": f"{_size(free)} free of {_size(total)}",
        "disk of this folder": f"{_size(disk)} free",
        "open files": files,
    }
    if shared.is_dir():
        found["shared memory"] = f"{_size(shutil.disk_usage(shared).free)} free"
    if free < _LEAST_MEMORY:
        report.faults.append(
            f"{_size(free)} of memory are free; training wants 2 GiB at least"
        )
    if disk < _LEAST_DISK:
        report.faults.append(f"{_size(disk)} are free in {os.getcwd()}; checkpoints want more")
    if files < _LEAST_FILES:
        report.faults.append(
            f"a process may open {files} files; say ulimit -n {min(65536, most_files)}"
        )
    return found


def memory() -> tuple[int, int]:
    """Bytes in all and free, of the machine or of the container, whichever is less."""
    fields = {}
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        name, value = line.split(":")
        fields[name] = int(value.split()[0]) << 10
    total, free = fields["MemTotal"], fields["MemAvailable"]
    group = pathlib.Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return total, free
    return min(total, limit), min(free, max(0, limit - used))


def _caches(report: Report) -> dict[str, Any]:
    hub = os.environ.get("HF_HOME") or pathlib.Path("~/.cache/huggingface").expanduser()
    folders = {
        "compiled programs": caches.compiled_programs(),
        "Hugging Face": pathlib.Path(hub),
    }
    found = {}
    for name, folder in folders.items():
        found[name] = f"{folder}: {_size(_bytes_of(folder)) if folder.is_dir() else 'empty'}"
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            report.faults.append(
                f"the cache of {name}, {folder}, cannot be written; set XDG_CACHE_HOME "
                f"(or HF_HOME) to a folder that can"
            )
    return found


def _bytes_of(folder: pathlib.Path) -> int:
    """Of the files in a folder; links are not followed."""
    return sum(
        path.lstat().st_size
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    )


def _environment(report: Report) -> dict[str, Any]:
    found = {
        name: "(set)" if _SECRET.search(name) else value
        for name, value in sorted(os.environ.items())
        if _VARIABLES.match(name)
    }
    if os.environ.get("JAX_ENABLE_X64", "").lower() in ("1", "true"):
        report.faults.append("JAX_ENABLE_X64 makes numbers 64 bits wide and slow: unset it")
    if os.environ.get("JAX_DISABLE_JIT", "").lower() in ("1", "true"):
        report.faults.append("JAX_DISABLE_JIT keeps JAX from compiling anything: unset it")
    return found


def _size(number: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}" if unit != "B" else f"{number} B"
        number = number / 1024  # type: ignore[assignment]
    return f"{number:.1f} GiB"


if __name__ == "__main__":
    sys.exit(main())
