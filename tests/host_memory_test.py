"""Memory that a process freed is there for the next request, without a page fault."""

from __future__ import annotations

import os
import pathlib
import platform
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Page faults of the second of two equal blocks, asked for in a thread, as XLA does.
_SECOND_BLOCK = """
import resource, sys, threading
import numpy as np
from neo_jax import host_memory

if sys.argv[1] == "keep":
    assert host_memory.keep_freed_memory()
faults = []

def block():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(1 << 28, np.uint8)[:: 4096] = 1
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

def twice():
    block(), block()

thread = threading.Thread(target=twice)
thread.start(), thread.join()
print(faults[1])
"""


def _faults(mode: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _SECOND_BLOCK, mode],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "NUMPY_MADVISE_HUGEPAGE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_second_block_costs_no_page_faults() -> None:
    assert _faults("keep") < 100
    # The property is not a gift of the machine: without the call every page is paid again.
    assert _faults("give back") > 10_000


def test_nothing_is_done_beside_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    from neo_jax import host_memory

    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    monkeypatch.setattr(host_memory, "_ACCELERATORS", ("/dev/null",))
    assert not host_memory.keep_freed_memory()
