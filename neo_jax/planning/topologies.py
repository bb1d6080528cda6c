"""The TPUs: from a name such as v5e-16 or v5e:4x4 to chips, devices and what they can do.

Enters: a name and a number of slices. Leaves: a `Topology`, and the devices that the TPU
compiler compiles for on a machine without a TPU. Everything that is known of a generation
stands in one row of `GENERATIONS`, with its source.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies as jax_topologies

from neo_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generation of TPU; every figure is of a chip unless it says otherwise.

    Attributes:
      peak_flops: FLOP/s of dense bfloat16 products.
      clock: Hz; peak_flops / (2 × mxus × mxu_side²), which agrees with published clocks.
      hbm_limit_gib: of one device, what a program can use.
      hbm_bytes_per_second: between HBM and the cores.
      link_bytes_per_second: one ICI link, one way.
      dcn_bytes_per_second: this chip's share of its host's network, one way; None where
        several slices cannot be joined.
      cores: TensorCores.
      devices: JAX devices that a chip shows.
      dims: dimensions of its torus.
      wraps_at: sizes that a dimension must be a multiple of to close into a ring.
      max_chips: of one slice.
      names_cores: whether v4-8 counts cores, and not chips.
      host: chips of one host, as bounds.
    """

    peak_flops: float
    clock: float
    hbm_limit_gib: float
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    dcn_bytes_per_second: float | None
    cores: int
    devices: int
    dims: int
    wraps_at: int
    max_chips: int
    names_cores: bool
    host: tuple[int, int, int]


# Peak FLOP/s, HBM and pod sizes: docs.cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e,tpu7x},
#   "System architecture". v2, whose page gives no peak: Jouppi et al., CACM 63(7), 2020, doi
#   10.1145/3360307, table 1; its bandwidth: jax, pallas/mosaic/tpu_info.py.
# Clock: peak / (2 × MXUs × side²), with 1, 2, 4, 4, 4 MXUs of 128 a core for v2, v3, v4, v5e
#   and v5p, 4 of 256 for v6e and tpu7x. It is Jouppi et al.'s 700, 940 and 1050 MHz.
# HBM limit: what the compiler (libtpu 0.0.42.1) says when a program asks for too much.
# ICI: "bidirectional bandwidth per chip" of the same pages, over both directions and all
#   ports: v5e 400, v6e 800, v5p and tpu7x 1200 GB/s. v3, v4: "How To Scale Your Model",
#   jax-ml.github.io/scaling-book/tpus, table of links; v2: 496 Gbit/s a link, CACM table 1.
# DCN: v5p 50, v6e and tpu7x 100 Gbit/s a chip, docs.cloud.google.com/tpu/docs (table of
#   specifications); v5e 6.4 Tbit/s a pod of 256; v4: 25 GB/s a host of 4, scaling book.
# Rings: a dimension of v5e and v6e closes at 16, of v4, v5p, tpu7x at multiples of 4 chips
#   (scaling book); v2 and v3 at the whole pod.
GENERATIONS: Mapping[str, Generation] = {
    "v2": Generation(
        46e12, 0.70e9, 7.48, 7.16e11, 62e9, None, 2, 2, 2, 16, 256, True, (2, 2, 1)
    ),
    "v3": Generation(
        123e12, 0.94e9, 15.48, 9.0e11, 1e11, None, 2, 2, 2, 32, 1024, True, (2, 2, 1)
    ),
    "v4": Generation(
        275e12, 1.05e9, 30.75, 1.2e12, 4.5e10, 6.25e9, 2, 1, 3, 4, 4096, True, (2, 2, 1)
    ),
    "v5e": Generation(
        197e12, 1.5e9, 15.75, 8.19e11, 5e10, 3.125e9, 1, 1, 2, 16, 256, False, (2, 2, 1)
    ),
    "v5p": Generation(
        459e12, 1.75e9, 95.74, 2.765e12, 1e11, 6.25e9, 2, 1, 3, 4, 6144, True, (2, 2, 1)
    ),
    "v6e": Generation(
        918e12, 1.75e9, 31.25, 1.638e12, 1e11, 12.5e9, 1, 1, 2, 16, 256, False, (2, 2, 1)
    ),
    "tpu7x": Generation(
        2307e12, 2.2e9, 94.75, 7.38e12, 1e11, 12.5e9, 2, 2, 3, 4, 9216, True, (2, 2, 1)
    ),
}

# Chips of a slice by name → its grid. Google's own choices (the pages named above).
_FLAT = {
    1: (1, 1),
    4: (2, 2),
    8: (2, 4),
    16: (4, 4),
    32: (4, 8),
    64: (8, 8),
    128: (8, 16),
    256: (16, 16),
    512: (16, 32),
    1024: (32, 32),
}
_CUBIC = {
    4: (2, 2, 1),
    8: (2, 2, 2),
    16: (2, 2, 4),
    32: (2, 4, 4),
    64: (4, 4, 4),
    128: (4, 4, 8),
    256: (4, 8, 8),
    512: (8, 8, 8),
    1024: (8, 8, 16),
    2048: (8, 16, 16),
    4096: (16, 16, 16),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several equal slices of TPUs.

    Attributes:
      name: as it was asked for.
      kind: key of `GENERATIONS`.
      grid: chips of one slice along each dimension of the torus.
      num_slices: joined by the data centre's network.
    """

    name: str
    kind: str
    grid: tuple[int, ...]
    num_slices: int

    @property
    def generation(self) -> Generation:
        return GENERATIONS[self.kind]

    @property
    def chips_per_slice(self) -> int:
        return math.prod(self.grid)

    @property
    def chips(self) -> int:
        return self.chips_per_slice * self.num_slices

    @property
    def devices(self) -> int:
        """As JAX counts them: a chip of v2, v3 and tpu7x is two."""
        return self.chips * self.generation.devices

    @property
    def key(self) -> str:
        """The same for all names of the same machine: v5e:4x4, 2xv5e:4x4."""
        slices = f"{self.num_slices}x" if self.num_slices > 1 else ""
        return f"{slices}{self.kind}:{'x'.join(map(str, self.grid))}"

    def __str__(self) -> str:
        slices = f"{self.num_slices} slices of " if self.num_slices > 1 else ""
        grid = "×".join(map(str, self.grid))
        return (
            f"{self.name}: {slices}{grid} {self.kind}, {self.chips} chips, "
            f"{self.devices} devices"
        )


def names() -> dict[str, list[str]]:
    """Names by size that `parse` knows, a list for each generation."""
    return {
        kind: [f"{kind}-{chips * _named_per_chip(kind)}" for chips in _grids(kind)]
        for kind in GENERATIONS
    }


def parse(name: str, num_slices: int = 1) -> Topology:
    """A topology by size (v5e-16, v4-8) or by grid (v5e:4x4, v4:2x2x1).

    v2, v3, v4, v5p and tpu7x are named by cores, two a chip; v5e and v6e by chips.

    Raises:
      ConfigError: no such machine; lists those that there are.
    """
    found = re.fullmatch(r"(\w+?)(?:-(\d+)|:(\d+(?:x\d+)*))", name.strip().lower())
    kind = found[1] if found else ""
    kind = {"v5litepod": "v5e", "v7x": "tpu7x"}.get(kind, kind)
    if found is None or kind not in GENERATIONS:
        sizes = "; ".join(f"{sizes[0]} … {sizes[-1]}" for sizes in names().values())
        raise ConfigError(
            f"--topology {name!r} is unknown; there are sizes in powers of two, {sizes}, and "
            f"grids, as in v5e:4x4 and v4:2x2x1."
        )
    generation = GENERATIONS[kind]
    if num_slices < 1:
        raise ConfigError(f"--num_slices {num_slices} must be at least 1.")
    if num_slices > 1 and generation.dcn_bytes_per_second is None:
        raise ConfigError(
            f"--num_slices {num_slices}: slices of {kind} cannot be joined, those from v4 on "
            f"can."
        )
    if found[2]:
        chips, rest = divmod(int(found[2]), _named_per_chip(kind))
        grid = _grids(kind).get(chips, ())
        if rest or not grid:
            raise ConfigError(
                f"--topology {name!r}: there is no such size; there are "
                f"{', '.join(names()[kind])}, and grids as in {kind}:{_example(kind)}."
            )
    else:
        grid = tuple(int(size) for size in found[3].split("x"))
        if len(grid) == 3 and generation.dims == 2 and grid[2] == 1:
            grid = grid[:2]
        if len(grid) == 2 and generation.dims == 3:
            grid = (*grid, 1)
        if len(grid) != generation.dims or math.prod(grid) > generation.max_chips:
            raise ConfigError(
                f"--topology {name!r}: a slice of {kind} has {generation.dims} dimensions "
                f"and at most {generation.max_chips} chips, as in {kind}:{_example(kind)}."
            )
    return Topology(name, kind, grid, num_slices)


def _named_per_chip(kind: str) -> int:
    return GENERATIONS[kind].cores if GENERATIONS[kind].names_cores else 1


def _grids(kind: str) -> dict[int, tuple[int, ...]]:
    generation = GENERATIONS[kind]
    known = _FLAT if generation.dims == 2 else _CUBIC
    first = 1 if kind in ("v5e", "v6e") else 4
    return {n: grid for n, grid in known.items() if first <= n <= generation.max_chips}


def _example(kind: str) -> str:
    return "4x4" if GENERATIONS[kind].dims == 2 else "2x2x2"


# ------------------------------------------------------------------------------- devices

_MISSING = (
    "the TPU compiler is not installed; pip install 'neo_jax[plan]' brings it (libtpu), and "
    "it needs no TPU."
)


def libtpu_version() -> str:
    """Version of the installed TPU compiler.

    Raises:
      ConfigError: there is none; says the extra to install.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(_MISSING)
    return importlib.metadata.version("libtpu")


# The compiler asks for these as if it ran on a TPU's own host; any will do. The last lets
# other processes on this machine compile at the same time.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def devices(topology: Topology) -> list[jax.Device]:
    """Devices to compile for; nothing can run on them.

    Raises:
      ConfigError: there is no compiler, or it does not know the grid.
    """
    libtpu_version()
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    generation = topology.generation
    options: dict[str, Any] = {
        # A host is 2 × 2 chips where the slice is that large.
        "chips_per_host_bounds": tuple(
            min(host, size)
            for host, size in zip(generation.host, (*topology.grid, 1), strict=False)
        ),
        "num_slices": topology.num_slices,
    }
    if generation.cores > generation.devices:
        options["chip_config_name"] = "megacore"  # both cores as one device
    grid = "x".join(map(str, topology.grid))
    try:
        described = jax_topologies.get_topology_desc(
            platform="tpu", topology_name=f"{topology.kind}:{grid}", **options
        )
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"--topology {topology.name!r}: {reason}.") from None
    return list(described.devices)
