"""Memory of a process that computes on the CPU: kept between steps instead of given back.

XLA asks for one block of memory for the temporaries of a step, gigabytes of it, and frees it
at the step's end. The C library returns a block of that size to the kernel at once, and the
next step pays for every page of it again: zeroed by the kernel and, in a virtual machine,
fetched back from the host. What the first fetching costs shows in docs/lab_log.md
(2026-11-25, the training step beside torch's).
"""

from __future__ import annotations

import ctypes
import glob
import os

# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*")


def keep_freed_memory() -> bool:
    """Tells the C library to keep what is freed for the next request. Call before any thread.

    The process then holds its highest use of memory until it ends. Memory of an accelerator is
    not concerned, and where there is one, nothing is done.

    Returns:
      Whether the library took it: False beside an accelerator and where malloc is not glibc's.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    on_cpu = platforms == "cpu" or not any(glob.glob(pattern) for pattern in _ACCELERATORS)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if on_cpu else None
    if mallopt is None:
        return False
    # One arena, since only the main one can hold a block of gigabytes without mmap; never
    # mmap; never trim (-1 stands for the largest threshold).
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    return all(mallopt(name, value) == 1 for name, value in settings)
