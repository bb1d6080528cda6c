"""The names of Hugging Face's GPT-Neo and ours, and state dicts in memory both ways.

Enters: a mapping from Hugging Face names to arrays, or our tree of parameters. Leaves: the
other. Every tensor is moved bit by bit, so that a round trip changes nothing.

How the two differ: torch's Linear keeps [out, in], our kernels [in, out], with heads and
head_dim apart; we stack the layers along a leading dimension; our embeddings have rows of
zeros up to `padded_vocab_size`.

Source: Hugging Face transformers, models/gpt_neo/modeling_gpt_neo.py.

Shapes: D embed, F mlp, V vocab.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from neo_jax import sharding
from neo_jax.config import ModelConfig
from neo_jax.hf.configs import HEADS, Head
from neo_jax.state import Params, model_graph


class Entry(NamedTuple):
    """A tensor of Hugging Face's and where it lies in our tree."""

    path: str  # ours, dotted
    layer: int | None  # row of the leading `layers` dimension; None: there is none
    name: str  # theirs
    shape: tuple[int, ...]  # theirs


def name_table(config: ModelConfig, head: Head | None = None) -> list[Entry]:
    """Every tensor of a model, in the order in which a reader would meet them.

    With a `head`, the tree is `{"model": parameters of NeoLM, "head": its own}`, and a
    checkpoint holds no language model's head.
    """
    D, F, V = config.embed_dim, config.mlp_dim, config.vocab_size
    outside = [
        ("embedder.embedding", "transformer.wte.weight", (V, D)),
        ("embedder.positions", "transformer.wpe.weight", (config.max_seq_len, D)),
        ("ln_f.scale", "transformer.ln_f.weight", (D,)),
        ("ln_f.bias", "transformer.ln_f.bias", (D,)),
    ]
    if not config.tie_embeddings and head is None:
        outside.append(("untied_head", "lm_head.weight", (V, D)))
    of_a_block = [
        ("ln_1.scale", "ln_1.weight", (D,)),
        ("ln_1.bias", "ln_1.bias", (D,)),
        ("attention.query.kernel", "attn.attention.q_proj.weight", (D, D)),
        ("attention.key.kernel", "attn.attention.k_proj.weight", (D, D)),
        ("attention.value.kernel", "attn.attention.v_proj.weight", (D, D)),
        ("attention.out.kernel", "attn.attention.out_proj.weight", (D, D)),
        ("attention.out.bias", "attn.attention.out_proj.bias", (D,)),
        ("ln_2.scale", "ln_2.weight", (D,)),
        ("ln_2.bias", "ln_2.bias", (D,)),
        ("mlp.up.kernel", "mlp.c_fc.weight", (F, D)),
        ("mlp.up.bias", "mlp.c_fc.bias", (F,)),
        ("mlp.down.kernel", "mlp.c_proj.weight", (D, F)),
        ("mlp.down.bias", "mlp.c_proj.bias", (D,)),
    ]
    table = [Entry(path, None, name, shape) for path, name, shape in outside] + [
        Entry(f"blocks.{path}", layer, f"transformer.h.{layer}.{name}", shape)
        for path, name, shape in of_a_block
        for layer in range(config.num_layers)
    ]
    if head is None:
        return table
    name, has_bias = HEADS[head.architecture]
    labels = len(head.labels)
    on_top = [Entry("head.kernel", None, f"{name}.weight", (labels, D))]
    if has_bias:
        on_top.append(Entry("head.bias", None, f"{name}.bias", (labels,)))
    return [entry._replace(path=f"model.{entry.path}") for entry in table] + on_top


def abstract_params(
    config: ModelConfig, head: Head | None = None, mesh: Mesh | None = None
) -> Params:
    """Our tree with a `jax.ShapeDtypeStruct` at each leaf; nothing is computed.

    With a `mesh` each says where it lies.
    """
    if head is not None:  # the language model's own head is not part of the tree
        config = dataclasses.replace(config, tie_embeddings=True)
    _, variables = model_graph(config)
    params = nnx.to_pure_dict(variables)
    if mesh is not None:
        places = nnx.to_pure_dict(sharding.param_shardings(variables, mesh))
        params = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            params,
            places,
        )
    return (
        params
        if head is None
        else {"model": params, "head": _abstract_head(config, head, mesh)}
    )


def with_head(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """A `NeoLM` with a classifier as the network and its head, the form that `to_hf` takes.

    A language model's own head that is not tied is left out, as transformers leaves it out.
    """
    network = {k: v for k, v in params.items() if k not in ("classifier", "untied_head")}
    shape = dataclasses.replace(config, num_labels=0, tie_embeddings=True)
    return shape, {"model": network, "head": params["classifier"]}


def _abstract_head(config: ModelConfig, head: Head, mesh: Mesh | None) -> Params:
    def leaf(*axes: str | None) -> jax.ShapeDtypeStruct:
        shape = tuple(config.embed_dim if axis else len(head.labels) for axis in axes)
        place = None if mesh is None else sharding.named_sharding(mesh, axes, shape)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(config.param_dtype), sharding=place)

    has_bias = HEADS[head.architecture][1]
    return {"kernel": leaf("embed", None)} | ({"bias": leaf(None)} if has_bias else {})


def to_ours(entry: Entry, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """One of their tensors as ours, of `shape` (without `layers`); bits unchanged."""
    if entry.path.endswith(".kernel"):
        tensor = tensor.T
    elif shape[0] > tensor.shape[0]:  # rows that pad the vocabulary
        tensor = np.pad(tensor, [(0, shape[0] - tensor.shape[0]), (0, 0)])
    return tensor.reshape(shape)


def to_theirs(entry: Entry, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_ours`; C-contiguous, as safetensors wants it."""
    if entry.path.endswith(".kernel"):
        array = array.reshape(entry.shape[::-1]).T
    elif array.shape[0] > entry.shape[0]:
        array = array[: entry.shape[0]]
    return np.ascontiguousarray(array.reshape(entry.shape))


# ------------------------------------------------------------------------------- in memory


def from_hf(state: Mapping[str, Any], config: ModelConfig, head: Head | None = None) -> Params:
    """Our parameters from Hugging Face's state dict.

    Args:
      state: arrays by their names, of one float type, which is kept.
      config: the shape of the model, see `config_from_hf`.
      head: what stands on top, if not a language model's head; see `name_table`.

    Returns:
      The tree that `nnx.merge` takes beside the graph of `NeoLM(config)`, NumPy leaves.

    Raises:
      ValueError: names or shapes do not fit; all that do not are told at once.
    """
    state = with_full_names(state)
    table = name_table(config, head)
    check_names({name: tuple(array.shape) for name, array in state.items()}, table)
    check_tied_head(state, state.__getitem__, config)
    params = abstract_params(config, head)
    for path in dict.fromkeys(entry.path for entry in table):
        entries = [entry for entry in table if entry.path == path]
        shape = get_leaf(params, path).shape
        if entries[0].layer is None:
            array = to_ours(entries[0], np.asarray(state[entries[0].name]), shape)
        else:
            rows = [to_ours(e, np.asarray(state[e.name]), shape[1:]) for e in entries]
            array = np.stack(rows)
        set_leaf(params, path, array)
    return params


def to_hf(
    params: Params, config: ModelConfig, head: Head | None = None
) -> dict[str, np.ndarray]:
    """Hugging Face's state dict of our parameters; the inverse of `from_hf`.

    A tied head is left out, as transformers leaves it out of the files that it writes.
    """
    return {
        entry.name: to_theirs(entry, to_host(row_of(params, entry)))
        for entry in name_table(config, head)
    }


def with_full_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` with the names of a `GPTNeoForCausalLM` and without what holds no weights.

    Older checkpoints keep their attention masks (`attn.attention.bias`, `masked_bias`), and
    a bare `GPTNeoModel` leaves the prefix `transformer.` out.
    """
    masks = (".attn.attention.bias", ".attn.attention.masked_bias")
    kept = {name: value for name, value in state.items() if not name.endswith(masks)}
    if "wte.weight" in kept:
        kept = {f"transformer.{name}": value for name, value in kept.items()}
    return kept


def check_names(shapes: Mapping[str, tuple[int, ...]], table: Iterable[Entry]) -> None:
    """Compares a checkpoint's names and shapes with what a model needs.

    Raises:
      ValueError: one line that tells the missing, the unexpected and the misshapen.
    """
    wanted = {entry.name: entry.shape for entry in table}
    # A tied head may be written out; whether it equals the embedding is checked on reading.
    extra = [name for name in shapes if name not in wanted and name != "lm_head.weight"]
    misshapen = [
        f"{name} {list(shapes[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    missing = [name for name in wanted if name not in shapes]
    report = [
        f"{what}: {some(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", extra),
            ("of another shape", misshapen),
        )
        if names
    ]
    if report:
        raise ValueError(f"weights do not fit the config; {'; '.join(report)}.")


def check_tied_head(
    names: Container[str], read: Callable[[str], np.ndarray], config: ModelConfig
) -> None:
    """Refuses a head that is written out, said to be tied, and yet not the embedding."""
    if not config.tie_embeddings or "lm_head.weight" not in names:
        return
    if not np.array_equal(read("lm_head.weight"), read("transformer.wte.weight")):
        raise ValueError(
            "lm_head.weight differs from transformer.wte.weight, though the config ties them; "
            "set tie_word_embeddings to false in config.json to load both."
        )


def get_leaf(params: Params, path: str) -> Any:
    """The leaf at a dotted path."""
    for key in path.split("."):
        params = params[key]
    return params


def set_leaf(params: Params, path: str, leaf: Any) -> None:
    """Puts `leaf` at a dotted path, in place."""
    *parents, last = path.split(".")
    for key in parents:
        params = params[key]
    params[last] = leaf


def row_of(params: Params, entry: Entry) -> Any:
    """The part of our tree that one of their tensors holds."""
    array = get_leaf(params, entry.path)
    return array if entry.layer is None else array[entry.layer]


def to_host(array: Any) -> np.ndarray:
    """The whole array, also where other hosts hold parts of it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def some(names: list[str], at_most: int = 6) -> str:
    """The first few of a list of names, and how many more there are."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more
