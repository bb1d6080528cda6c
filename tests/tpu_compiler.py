"""The TPU compiler on a machine without a TPU, for tests.

Enters: the name of a topology. Leaves: a mesh over chips that are not there, for which
programs compile as they would on them. libtpu is the extra `plan`; tests skip without it.
"""

import importlib.util
import os

import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from neo_jax import sharding
from neo_jax.config import MeshConfig

# A machine of its own, with no metadata server to ask who it is.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no chip that two could quarrel over
}
V4 = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}


def mesh(topology: str, config: MeshConfig, num_slices: int = 1) -> Mesh:
    """A mesh over the chips of a topology such as "v5e:2x2", so many times."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: it is the extra `plan`")
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    more = V4 if topology.startswith("v4") else {}
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, num_slices=num_slices, **more
    )
    return sharding.make_mesh(config, described.devices)
