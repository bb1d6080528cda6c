"""Weights and configs of Hugging Face's GPT-Neo, in and out, by one table of names.

Enters: a config.json's keys and a mapping from Hugging Face names to arrays. Leaves: our
`ModelConfig` and our tree of parameters; and the same way back. Every tensor is moved bit by
bit, so that a round trip changes nothing.

How the two differ: torch's Linear keeps [out, in], our kernels [in, out], with heads and
head_dim apart; we stack the layers along a leading dimension; our embeddings have rows of
zeros up to `padded_vocab_size`.

Source: Hugging Face transformers, models/gpt_neo (configuration and modeling).

Shapes: D embed, F mlp, V vocab.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from neo_jax.config import ConfigError, ModelConfig
from neo_jax.state import Params, model_graph

logger = logging.getLogger(__name__)

# -------------------------------------------------------------------------------- configs

# Hugging Face's key and ours, where one value says the same in both.
_SAME_VALUE = {
    "num_layers": "num_layers",
    "hidden_size": "embed_dim",
    "num_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "window_size": "window_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "layer_norm_epsilon": "layer_norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}

# GPTNeoConfig's own defaults: files written by `to_diff_dict` leave them out.
_DEFAULTS: Mapping[str, Any] = {
    "num_layers": 24,
    "hidden_size": 2048,
    "num_heads": 16,
    "intermediate_size": None,
    "window_size": 256,
    "vocab_size": 50257,
    "max_position_embeddings": 2048,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "activation_function": "gelu_new",
    "attention_types": [[["global", "local"], 12]],
}

# Other words for the same key: transformers' attribute_map and its older siblings.
_ALIASES = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "n_positions": "max_position_embeddings",
}

# Hugging Face's name of an activation and ours; the tanh form of GELU has several names.
_ACTIVATIONS = {
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """The shape that a GPT-Neo config.json describes.

    Dropouts are passed over with a note: a model without them computes what
    transformers computes in evaluation.

    Raises:
      ConfigError: the config is not GPT-Neo's, or not one that can be computed.
    """
    kind = values.get("model_type", "gpt_neo")
    if kind != "gpt_neo":
        raise ConfigError(
            f"config.json has model_type {kind!r}, which is not GPT-Neo; "
            f"only model_type 'gpt_neo' can be read."
        )
    given = {_ALIASES.get(key, key): value for key, value in values.items()}
    hf = {**_DEFAULTS, **{key: value for key, value in given.items() if key in _DEFAULTS}}
    dropouts = {key: value for key, value in given.items() if "dropout" in key and value}
    dropouts.pop("classifier_dropout", None)  # of a head, and never zero by default
    if dropouts:
        logger.warning("config.json: %s passed over; neo_jax has no dropout.", dropouts)
    activation = hf["activation_function"]
    if activation not in _ACTIVATIONS:
        raise ConfigError(
            f"config.json: activation_function {activation!r} is unknown; "
            f"there are {', '.join(_ACTIVATIONS)}."
        )
    return ModelConfig(
        **{ours: hf[theirs] for theirs, ours in _SAME_VALUE.items()},
        attention_types=hf["attention_types"] or _DEFAULTS["attention_types"],
        activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """What transformers' `GPTNeoConfig` takes, as config.json holds it."""
    pattern = list(config.attention_types)
    return {
        "model_type": "gpt_neo",
        "architectures": ["GPTNeoForCausalLM"],
        **{theirs: getattr(config, ours) for theirs, ours in _SAME_VALUE.items()},
        "attention_types": [[pattern, config.num_layers // len(pattern)]],
        "attention_layers": list(config.layer_types),
        "activation_function": config.activation,
        "attention_dropout": 0.0,
        "embed_dropout": 0.0,
        "resid_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": config.vocab_size - 1,
        "eos_token_id": config.vocab_size - 1,
    }


# -------------------------------------------------------------------------- the name table


class Entry(NamedTuple):
    """A tensor of Hugging Face's and where it lies in our tree."""

    path: str  # ours, dotted
    layer: int | None  # row of the leading `layers` dimension; None: there is none
    name: str  # theirs
    shape: tuple[int, ...]  # theirs


def name_table(config: ModelConfig) -> list[Entry]:
    """Every tensor of a model, in the order in which a reader would meet them."""
    D, F, V = config.embed_dim, config.mlp_dim, config.vocab_size
    assert F is not None
    outside = [
        ("embedder.embedding", "transformer.wte.weight", (V, D)),
        ("embedder.positions", "transformer.wpe.weight", (config.max_seq_len, D)),
        ("ln_f.scale", "transformer.ln_f.weight", (D,)),
        ("ln_f.bias", "transformer.ln_f.bias", (D,)),
    ]
    if not config.tie_embeddings:
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
    return [Entry(path, None, name, shape) for path, name, shape in outside] + [
        Entry(f"blocks.{path}", layer, f"transformer.h.{layer}.{name}", shape)
        for path, name, shape in of_a_block
        for layer in range(config.num_layers)
    ]


def abstract_params(config: ModelConfig) -> Params:
    """Our tree with a `jax.ShapeDtypeStruct` at each leaf; nothing is computed."""
    return nnx.to_pure_dict(model_graph(config)[1])


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


def from_hf(state: Mapping[str, Any], config: ModelConfig) -> Params:
    """Our parameters from Hugging Face's state dict.

    Args:
      state: arrays by their names, of one float type, which is kept.
      config: the shape of the model, see `config_from_hf`.

    Returns:
      The tree that `nnx.merge` takes beside the graph of `NeoLM(config)`, NumPy leaves.

    Raises:
      ValueError: names or shapes do not fit; all that do not are told at once.
    """
    state = with_full_names(state)
    table = name_table(config)
    check_names({name: tuple(array.shape) for name, array in state.items()}, table)
    params = abstract_params(config)
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


def to_hf(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """Hugging Face's state dict of our parameters; the inverse of `from_hf`.

    A tied head is left out, as transformers leaves it out of the files that it writes.
    """
    state = {}
    for entry in name_table(config):
        array = get_leaf(params, entry.path)
        row = array if entry.layer is None else array[entry.layer]
        state[entry.name] = to_theirs(entry, np.asarray(row))
    return state


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
        f"{what}: {_some(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", extra),
            ("of another shape", misshapen),
        )
        if names
    ]
    if report:
        raise ValueError(f"weights do not fit the config; {'; '.join(report)}.")


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


def _some(names: list[str], at_most: int = 6) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more
