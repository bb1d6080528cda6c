"""From a directory of weights, or a hub id, to parameters on their devices.

Enters: config.json and safetensors (one file or shards with an index), or torch's `.bin`.
Leaves: our tree of parameters, each leaf where `place` wants it. Tensors are read one at a
time, so that no host ever holds two copies of the model.

Sources: the formats of `safetensors` and of the sharded index that `save_pretrained` writes.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import pathlib
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from neo_jax.config import ConfigError, ModelConfig
from neo_jax.hf import names
from neo_jax.hf.configs import Head, config_from_hf, head_from_hf, read_json
from neo_jax.state import Params

logger = logging.getLogger(__name__)


class Pretrained(NamedTuple):
    """A model from a directory."""

    config: ModelConfig
    params: Params
    head: Head | None


def read(
    source: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> Pretrained:
    """Reads a Hugging Face model, tensor by tensor, straight to its devices.

    Beyond the parameters themselves no more than one tensor is held at a time.

    Args:
      source: a directory with config.json and weights, or the id of a model on the hub.
      dtype: of the parameters, such as "bfloat16"; left out, as they are stored
        (float16 and float64 become float32).
      mesh: over which the parameters are spread as sharding.py's table says; left out, all
        on the default device.

    Raises:
      ConfigError: nothing is there, the hub cannot be reached, or it is not a GPT-Neo.
      ValueError: weights are missing, unexpected, misshapen, cut off or unsafe to read.
    """
    folder = resolve(source)
    values = read_json(folder / "config.json")
    config, head = config_from_hf(values), head_from_hf(values)
    files = open_weights(folder)
    table = names.name_table(config, head)
    names.check_names(files.shapes, table)
    names.check_tied_head(files.shapes, files.read, config)
    # No parameter of ours is float16, whose range GPT-Neo's activations leave.
    dtype = dtype or ("bfloat16" if files.dtype == "bfloat16" else "float32")
    config = dataclasses.replace(
        config,
        param_dtype=dtype,  # type: ignore[arg-type]
        tie_embeddings=config.tie_embeddings or head is not None,
    )
    return Pretrained(config, stream(table, files.read, config, head, dtype, mesh), head)


def stream(
    table: list[names.Entry],
    read_tensor: Callable[[str], np.ndarray],
    config: ModelConfig,
    head: Head | None,
    dtype: str,
    mesh: Mesh | None,
) -> Params:
    """Our tree on its devices, from tensors that `read_tensor` gives one by one by name."""
    params = names.abstract_params(config, head, mesh)
    for path in dict.fromkeys(entry.path for entry in table):
        leaf = names.get_leaf(params, path)
        sharding = leaf.sharding
        entries = [entry for entry in table if entry.path == path]
        array = None if entries[0].layer is None else _zeros(leaf.shape, dtype, sharding)
        for entry in entries:
            tensor = read_tensor(entry.name)
            if not jnp.issubdtype(tensor.dtype, jnp.floating):
                raise ValueError(
                    f"{entry.name} is stored as {tensor.dtype}; weights are floating-point "
                    f"numbers, and quantised ones are not read."
                )
            if not np.isfinite(tensor).all():
                what = "NaN" if np.isnan(tensor).any() else "infinities"
                logger.warning("%s holds %s; so will the model's answers.", entry.name, what)
            shape = leaf.shape if entry.layer is None else leaf.shape[1:]
            part = _put(
                names.to_ours(entry, tensor.astype(dtype), shape), sharding, entry.layer
            )
            array = part if array is None else _write_layer(array, part, entry.layer)
        names.set_leaf(params, path, array)
    return params


def _zeros(shape: tuple[int, ...], dtype: str, sharding: Sharding | None) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.partial(jax.jit, donate_argnums=0)  # in place: one layer more, never one model
def _write_layer(stacked: jax.Array, part: jax.Array, layer: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, part, layer, axis=0)


def _put(host: np.ndarray, sharding: Sharding | None, layer: int | None) -> jax.Array:
    """One tensor on its devices; each takes only its own part of it."""
    if sharding is None:
        return jnp.asarray(host)
    if layer is not None:  # `layers` itself is never split
        assert isinstance(sharding, NamedSharding) and sharding.spec[:1] in ((), (None,))
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def resolve(source: str | os.PathLike[str]) -> pathlib.Path:
    """The local directory of a model; what the hub has is fetched into its cache.

    The hub's own variables are obeyed: HF_HOME and HF_HUB_CACHE name the cache, and with
    HF_HUB_OFFLINE=1 nothing but the cache is asked.

    Raises:
      ConfigError: no such directory, or no such model within reach.
    """
    path, name = pathlib.Path(source).expanduser(), os.fspath(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{name} holds no config.json; it is no Hugging Face model.")
        return path
    if path.exists() or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ConfigError(f"{name} is not a directory.")
    return resolve(_download(name))


def _download(name: str) -> str:
    """The folder of the hub's cache that holds a model, fetched where it is not yet there."""
    import huggingface_hub  # takes a second to import, and is seldom needed
    from huggingface_hub import constants

    # Nothing of the model's folders: other programs' copies, or checkpoints on the way.
    download = functools.partial(huggingface_hub.snapshot_download, ignore_patterns=["*/*"])
    try:
        folder = download(name, allow_patterns=["*.json", "*.txt", "*.safetensors"])
        if not any(pathlib.Path(folder).glob("*.safetensors")):
            download(name, allow_patterns=["pytorch_model*.bin"])
    except hub_errors() as error:
        if constants.HF_HUB_OFFLINE:
            raise ConfigError(
                f"{name!r} is neither a local directory nor in the cache "
                f"{constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to ask the hub; "
                f"unset it, or give a directory."
            ) from None
        reason = (str(error).splitlines() or [""])[0].strip(" .")
        raise ConfigError(
            f"{name!r} is neither a local directory nor to be had from {constants.ENDPOINT} "
            f"({type(error).__name__}: {reason}); check the name and the network, or give a "
            f"directory."
        ) from None
    return folder


def hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises: its HTTP library's own error, OSError and others.

    A failed upload, and whatever goes wrong in its Rust half, is a RuntimeError.
    """
    from huggingface_hub import errors

    bases = cast("tuple[type[Exception], ...]", errors.HfHubHTTPError.__bases__)
    return (*bases, ValueError, RuntimeError)


class Weights(NamedTuple):
    """The tensors of a directory's weight files, by the names of a `GPTNeoForCausalLM`."""

    shapes: Mapping[str, tuple[int, ...]]
    dtype: str  # of the first tensor, and so of the model
    read: Callable[[str], np.ndarray]


def open_weights(folder: pathlib.Path) -> Weights:
    """Opens safetensors where there are any, else torch's `.bin` files.

    Raises:
      ValueError: no weights, a missing shard, a file cut off, or a pickle that is unsafe.
    """
    for stem, suffix, opener in (
        ("model", "safetensors", _open_safetensors),
        ("pytorch_model", "bin", _open_bin),
    ):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            shards = _shards_of(index)
        elif single.is_file():
            shards = [single.name]
        else:
            continue
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{index} names shards that are missing: {names.some(missing)}.")
        return _joined([opener(folder / name) for name in shards])
    raise ValueError(f"{folder} holds neither model.safetensors nor pytorch_model.bin.")


def _shards_of(index: pathlib.Path) -> list[str]:
    """The files beside it that a sharded index names."""
    weight_map = read_json(index).get("weight_map")
    shards = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not shards or not all(isinstance(n, str) and pathlib.Path(n).name == n for n in shards):
        raise ValueError(f"{index} has no 'weight_map' of tensors to files beside it.")
    return sorted(set(shards))


def _joined(files: list[Weights]) -> Weights:
    """Several files as one, with full names."""
    place = {name: (file, name) for file in files for name in file.shapes}
    full = names.with_full_names(place)
    return Weights(
        shapes={name: file.shapes[stored] for name, (file, stored) in full.items()},
        dtype=files[0].dtype,
        read=lambda name: full[name][0].read(full[name][1]),
    )


# safetensors' names of the types that can be parameters.
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _open_safetensors(path: pathlib.Path) -> Weights:
    try:
        # pread, not mmap: pages of a mapped file would count as ours until the end.
        file = safetensors.safe_open(path, framework="np", backend="pread")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}.") from None
    kinds = {name: part.get_dtype() for name, part in slices.items()}
    return Weights(
        shapes={name: tuple(part.get_shape()) for name, part in slices.items()},
        dtype=next((_FLOATS[kind] for kind in kinds.values() if kind in _FLOATS), "float32"),
        read=file.get_tensor,
    )


def _open_bin(path: pathlib.Path) -> Weights:
    """Torch's own format, of which only tensors are read; needs torch."""
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{path} can only be read with torch, which is not installed; install it, or "
            f"give a directory with safetensors."
        ) from None
    try:
        with warnings.catch_warnings(action="ignore"):  # about versions of pickle
            # weights_only: a pickle can run any code, this reader refuses all but tensors.
            state = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # the reader's own, the archive's, the system's
        # Not torch's words: they advise to read such a file without its guard.
        called = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it would run {called[1]}" if called else type(error).__name__
        raise ValueError(
            f"{path} is refused, it is not a whole file of tensors and nothing else "
            f"({reason}); give a directory with safetensors."
        ) from None
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise ValueError(
            f"{path} is refused, it holds other things than tensors by their names; give a "
            f"directory with safetensors."
        )

    def read_tensor(name: str) -> np.ndarray:
        tensor = state[name].contiguous()
        if tensor.dtype == torch.bfloat16:  # NumPy has no such type of its own
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    floats = (str(t.dtype) for t in state.values() if t.is_floating_point())
    return Weights(
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        dtype=next(floats, "torch.float32").removeprefix("torch."),
        read=read_tensor,
    )
