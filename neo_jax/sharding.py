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
from jax.experimental import mesh_utils
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
    "rank": None,
    "labels": None,
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
      devices: those to use; left out, all of every host. Of several slices, `data` spans
        them all.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or the devices lie in
        other slices than the config says.
    """
    slices = _by_slice(config, list(jax.devices() if devices is None else devices))
    sizes = _axis_sizes(config, len(slices[0]))
    # The torus of some slices has no such axes (8 × 2 of v6e's 4 × 4), unless one is cut.
    parts = [
        mesh_utils.create_device_mesh(
            tuple(sizes.values()), devices, allow_split_physical_axes=True
        )
        for devices in slices
    ]
    # Slices lie behind one another along `data`, so that only its sums cross the network.
    together = np.concatenate(parts, MESH_AXES.index("data"))
    # Auto, not Explicit: the partitioner propagates shardings through the model's einsums.
    return Mesh(together, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _by_slice(config: MeshConfig, devices: list[jax.Device]) -> list[list[jax.Device]]:
    """The devices of each slice: as they say, or where they do not, in equal parts."""
    groups: dict[int, list[jax.Device]] = {}
    says = devices[0].platform == "tpu"
    for device in devices:
        # A chip of a topology of one slice does not know which it is of.
        index = getattr(device, "slice_index", 0) if says else 0
        groups.setdefault(index, []).append(device)
    wanted = len(groups) if config.slices == -1 else config.slices
    if says and wanted != len(groups):
        raise ConfigError(
            f"mesh.slices={config.slices}, but the devices lie in {len(groups)}; "
            f"use mesh.slices={len(groups)}, or -1."
        )
    if len(groups) == wanted:
        return [groups[index] for index in sorted(groups)]
    if len(devices) % wanted:
        raise ConfigError(
            f"mesh.slices={wanted} does not divide {len(devices)} devices; "
            f"use a number that does."
        )
    size = len(devices) // wanted
    return [devices[at : at + size] for at in range(0, len(devices), size)]


def _axis_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Sizes of the axes inside a slice of `num_devices`."""
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = max(1, num_devices // fixed)
    if int(np.prod(list(sizes.values()))) != num_devices:
        shape = " × ".join(f"{axis}={getattr(config, axis)}" for axis in MESH_AXES)
        of_slice = "" if config.slices == 1 else " of a slice"
        raise ConfigError(
            f"mesh {shape} does not make up {num_devices} devices{of_slice}; "
            f"set one axis to -1 to take the rest, and let the others divide {num_devices}."
        )
    return sizes


def axes_of(name: str, axis_sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes that the table splits a logical axis over, those of size 1 left out.

    Raises:
      ValueError: the table does not hold that name.
    """
    if name not in TABLE:
        raise ValueError(f"logical axis {name!r} is unknown; there are {', '.join(TABLE)}.")
    return tuple(axis for axis in TABLE[name] or () if axis_sizes[axis] > 1)


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
        axes = () if name is None else axes_of(name, axis_sizes)
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


def constrain_params(tree: Any, params: Any, *, gathered: bool) -> Any:
    """Tells the partitioner where parameters, or their gradients, live inside a program.

    Args:
      tree: arrays, nested as `nnx.to_pure_dict(params)`.
      params: as for `param_shardings`.
      gathered: whether what `fsdp` splits is to be whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    sizes = dict(mesh.shape) | ({"fsdp": 1} if gathered else {})

    def spec(param: nnx.Variable) -> PartitionSpec:
        return partition_spec(param.get_metadata()["out_sharding"], param.shape, sizes)

    specs = jax.tree.map(spec, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, nnx.to_pure_dict(specs))


def restricted(params: Any, tree: Any) -> Any:
    """Those Params that have a counterpart in a tree with a part of their names.

    Args:
      params: as for `param_shardings`.
      tree: nested dicts.
    """
    return nnx.State({
        key: restricted(params[key], inner) if isinstance(inner, dict) else params[key]
        for key, inner in tree.items()
    })  # fmt: skip


def host_share(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Which part of every batch this process loads.

    Returns:
      Its index and the number of parts: it loads the batch's rows index/count …
      (index+1)/count, for the places that `rows_by_process` names. Processes that share
      sequences load the same part.

    Raises:
      ConfigError: the batch does not divide, or the processes' rows are no equal parts.
    """
    rows = rows_by_process(mesh, batch_size)
    parts = sorted(set(rows.values()))
    whole = sorted(row for part in parts for row in part)
    if whole != list(range(batch_size)) or len({len(part) for part in parts}) > 1:
        raise ConfigError(
            f"mesh: {len(rows)} processes hold {len(parts)} parts of {batch_size} sequences "
            f"that overlap in part; let mesh.tensor × mesh.context divide the "
            f"{jax.local_device_count()} devices of a process."
        )
    return parts.index(rows[jax.process_index()]), len(parts)


def rows_by_process(mesh: Mesh, batch_size: int) -> dict[int, tuple[int, ...]]:
    """The rows of a batch on each process' devices, in order.

    The chips of a TPU's host are neighbours in two dimensions, and so seldom in one: their
    rows are not always one piece of the batch.
    """
    shape = (batch_size, mesh.shape["context"])
    rows: dict[int, set[int]] = {}
    places = batch_sharding(mesh, shape).devices_indices_map(shape)
    for device in mesh.devices.flat:
        index = places[device]
        assert index is not None
        own = rows.setdefault(device.process_index, set())
        own.update(range(*index[0].indices(batch_size)))
    return {process: tuple(sorted(own)) for process, own in rows.items()}


def describe(params: Any, mesh: Mesh) -> str:
    """The plan in words: the mesh, and for each parameter what one device holds of it.

    Args:
      params: as for `param_shardings`.
      mesh: where they lie.

    Raises:
      ConfigError: as `param_shardings`.
    """
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    rows = [("parameter", "dimension (÷ mesh axes)", "a device holds", "MiB")]
    here = total = 0
    places = jax.tree.leaves(param_shardings(params, mesh))
    leaves = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    for (path, param), place in zip(leaves, places, strict=True):
        part = place.shard_shape(param.shape)
        words = []
        for name, size in zip(param.get_metadata()["out_sharding"], param.shape, strict=True):
            over = [f"{axis} {mesh.shape[axis]}" for axis in axes_of(name, dict(mesh.shape))]
            words.append(f"{name} {size}" + "".join(f" ÷ {axis}" for axis in over))
        num_bytes = int(np.prod(part)) * param.dtype.itemsize
        here, total = here + num_bytes, total + param.size * param.dtype.itemsize
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        shape = " × ".join(map(str, part))
        rows.append((name, ", ".join(words), shape, f"{num_bytes / 2**20:,.1f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    kind = mesh.devices.flat[0].device_kind
    activations = ", ".join(
        f"{name} ÷ {' × '.join(parts)}"
        for name in TABLE
        if (parts := axes_of(name, dict(mesh.shape))) and name != "embed"
    )
    return "\n".join(
        [
            f"mesh: {axes} = {mesh.size} × {kind}",
            f"activations: {activations or 'whole on every device'}",
            *(
                "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=False))
                + f"  {row[3]:>9}"
                for row in rows
            ),
            f"parameters of a device: {here / 2**20:,.1f} MiB of {total / 2**20:,.1f}",
        ]
    )


def batch_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Of an array [batch, …, seq] or [batch]: batch over data and fsdp, seq over context."""
    names: tuple[str | None, ...] = ("batch",)
    if len(shape) > 1:
        names = ("batch", *(None,) * (len(shape) - 2), "seq")
    try:
        return named_sharding(mesh, names, shape)
    except ValueError as error:
        raise ConfigError(f"data.batch_size or data.seq_len: {error}") from None
