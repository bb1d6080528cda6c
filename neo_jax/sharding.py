"""Where every tensor lives: one mesh, one table from logical axes to mesh axes.

Enters: the `mesh` section of a config, and tensors whose dimensions are named where they
are born (`out_sharding=("embed", "heads", "head_dim")` in model.py). Leaves: a
`NamedSharding` for each of them. Nothing is replicated silently: a name that the table
does not hold, a rank that does not fit, a size that does not divide, or two dimensions on
one mesh axis raise, and the message says what would do.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from neo_jax.config import ConfigError, MeshConfig

MESH_AXES = ("data", "fsdp", "tensor", "context")

# The table. `None`: that dimension is whole on every device.
TABLE: Mapping[str, tuple[str, ...] | None] = {
    # Activations.
    "batch": ("data", "fsdp"),
    "seq": ("context",),
    # Parameters.
    "layers": None,
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "head_dim": None,
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "positions": None,
}


# TPU generations by the names that JAX gives their devices.
_GENERATIONS = (
    (r"TPU v2", "v2"),
    (r"TPU v3", "v3"),
    (r"TPU v4", "v4"),
    (r"TPU v5 ?(lite|e)", "v5e"),
    (r"TPU v5p?", "v5p"),
    (r"TPU v6 ?(lite|e)", "v6e"),
    (r"TPU ?v?7x?", "tpu7x"),
)


@dataclasses.dataclass(frozen=True)
class Target:
    """What a program is compiled for, as JAX names it: `platform` "cpu", "gpu" or "tpu"."""

    platform: str
    device_kind: str

    @property
    def generation(self) -> str | None:
        """Of a TPU: "v2" … "tpu7x"; None elsewhere.

        Raises:
          ValueError: a TPU of unknown kind.
        """
        if self.platform != "tpu":
            return None
        for pattern, name in _GENERATIONS:
            if re.fullmatch(pattern, self.device_kind):
                return name
        known = ", ".join(name for _, name in _GENERATIONS)
        raise ValueError(f"device kind {self.device_kind!r} is none of TPU {known}.")

    @property
    def is_nvidia(self) -> bool:
        """Whether it is a GPU that cuDNN serves."""
        return self.platform == "gpu" and bool(re.match("NVIDIA|Tesla", self.device_kind))


def target() -> Target:
    """The devices of the mesh that is set; where none is, those that JAX computes on.

    A mesh may hold devices that are not there: under `jax.set_mesh` of a TPU topology a
    machine without a TPU traces what the TPU will run.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    device = jax.devices()[0] if device is None else device
    return Target(device.platform, device.device_kind)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The device mesh, axes `data, fsdp, tensor, context`.

    Args:
      config: sizes of the axes; one may be -1, which takes the devices that are left.
      devices: those to use; left out, all of every host.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = max(1, len(devices) // fixed)
    if int(np.prod(list(sizes.values()))) != len(devices):
        shape = " × ".join(f"{axis}={getattr(config, axis)}" for axis in MESH_AXES)
        raise ConfigError(
            f"mesh {shape} does not make up {len(devices)} devices; "
            f"set one axis to -1 to take the rest, and let the others divide {len(devices)}."
        )
    # Auto, not Explicit: the partitioner propagates shardings through the model's einsums.
    return jax.make_mesh(
        tuple(sizes.values()),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices,
    )


def partition_spec(
    names: Sequence[str | None], shape: Sequence[int], axis_sizes: Mapping[str, int]
) -> PartitionSpec:
    """Looks each dimension up in the table.

    Args:
      names: the logical axis of each dimension; None for one that stays whole.
      shape: the tensor's sizes.
      axis_sizes: size of each mesh axis.

    Raises:
      ValueError: an unknown name, a wrong rank, an indivisible size, or one mesh axis asked
        to split two dimensions.
    """
    if len(names) != len(shape):
        raise ValueError(
            f"{len(names)} axis names {tuple(names)} for a tensor {tuple(shape)}."
        )
    spec: list[tuple[str, ...] | None] = []
    taken: dict[str, str] = {}
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in TABLE:
            raise ValueError(
                f"logical axis {name!r} is unknown; there are {', '.join(TABLE)}."
            )
        axes = (TABLE[name] if name is not None else None) or ()
        axes = tuple(axis for axis in axes if axis_sizes[axis] > 1)
        for axis in axes:
            if axis in taken:
                raise ValueError(
                    f"{taken[axis]!r} and {name!r} of one tensor {tuple(names)} would both be "
                    f"split over mesh axis {axis!r}; name one of them None."
                )
            taken[axis] = str(name)
        parts = int(np.prod([axis_sizes[axis] for axis in axes]))
        if size % parts:
            fits = [n for n in range(1, size + 1) if size % n == 0][:12]
            raise ValueError(
                f"{name}={size} does not divide over {' × '.join(axes)}={parts}; "
                f"use one of {{{', '.join(map(str, fits))}}}."
            )
        spec.append(axes or None)
    return PartitionSpec(*spec)


def named_sharding(
    mesh: Mesh, names: Sequence[str | None], shape: Sequence[int]
) -> NamedSharding:
    """`partition_spec` on a mesh. Raises ValueError as it does."""
    return NamedSharding(mesh, partition_spec(names, shape, dict(mesh.shape)))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Tells the partitioner where an activation lives; without a mesh, does nothing.

    Args:
      x: any tensor inside a jitted function.
      names: the logical axis of each dimension, or None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(
        x, partition_spec(names, x.shape, dict(mesh.shape))
    )


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each Param, from the names it was born with.

    Args:
      params: an `nnx.State` of Params (abstract or not) whose metadata hold `out_sharding`.

    Returns:
      A tree of the same structure as `nnx.pure(params)`.
    """

    def place(path: Any, param: nnx.Variable) -> NamedSharding:
        try:
            return named_sharding(mesh, param.get_metadata()["out_sharding"], param.shape)
        except ValueError as error:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ConfigError(f"mesh: parameter {name}: {error}") from None

    return jax.tree_util.tree_map_with_path(
        place, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


def batch_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Of an int or float array [batch, seq]: batch over data and fsdp, seq over context."""
    try:
        return named_sharding(mesh, ("batch", "seq"), shape)
    except ValueError as error:
        raise ConfigError(f"data.batch_size or data.seq_len: {error}") from None
