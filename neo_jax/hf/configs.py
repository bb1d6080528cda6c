"""What a config.json says of a GPT-Neo, as our `ModelConfig` and `Head`; and back.

Enters: the keys of a config.json. Leaves: our dataclasses, or one line that tells what the
file describes instead.

Source: Hugging Face transformers, models/gpt_neo/configuration_gpt_neo.py.
"""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from neo_jax.activations import ACTIVATIONS
from neo_jax.config import ConfigError, ModelConfig, preset_model
from neo_jax.config.errors import did_you_mean

logger = logging.getLogger(__name__)


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

# Other words for the same key: transformers' attribute_map and its older siblings.
_ALIASES = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "n_positions": "max_position_embeddings",
}

# Hugging Face's other names for a function of ours; the tanh form of GELU has several.
_ACTIVATIONS = {name: name for name in ACTIVATIONS} | {
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_python": "gelu",
    "swish": "silu",
}
# Those that transformers gives weights of their own, which GPTNeoConfig says nothing of.
_WITH_WEIGHTS = ("prelu", "xielu")


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
    dropouts = {key: value for key, value in given.items() if "dropout" in key and value}
    dropouts.pop("classifier_dropout", None)  # of a head, and never zero by default
    if dropouts:
        logger.warning("config.json: %s passed over; neo_jax has no dropout.", dropouts)
    shape = {
        ours: given[key] for key, ours in _SAME_VALUE.items() if given.get(key) is not None
    }
    if given.get("attention_types"):
        shape["attention_types"] = given["attention_types"]
    shape["activation"] = _activation(given.get("activation_function", "gelu_new"))
    # A key that a file leaves out has GPTNeoConfig's default, which is the 1.3B model's.
    return preset_model("neo_1p3b", **shape)


def _activation(name: str) -> str:
    """Our name of a function that transformers knows by this one."""
    if name in _WITH_WEIGHTS:
        raise ConfigError(
            f"config.json: activation_function {name!r} learns weights of its own, which "
            f"neo_jax's MLP does not have; train on with another, such as 'leaky_relu'."
        )
    if name not in _ACTIVATIONS:
        raise ConfigError(
            f"config.json: activation_function {name!r} is unknown"
            f"{did_you_mean(name, _ACTIVATIONS)}; there are {', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[name]


def eos_id(folder: pathlib.Path, otherwise: int | None) -> int | None:
    """The id that ends a text, by a config.json; `otherwise` where it tells none."""
    told = read_json(folder / "config.json").get("eos_token_id")
    if isinstance(told, list):  # several may end a text; the first is the tokenizer's
        told = told[0] if told else None
    return told if isinstance(told, int) else otherwise


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


# ---------------------------------------------------------------------------------- heads


class Head(NamedTuple):
    """A linear layer that takes the language model's place on top of the network.

    Its parameters are `{"kernel": [embed, labels]}`, with a `"bias": [labels]` where
    transformers has one.
    """

    architecture: str  # transformers' class: one of HEADS
    labels: tuple[str, ...]
    pad_token_id: int | None = None
    problem_type: str | None = None


TEXT_HEAD = "GPTNeoForSequenceClassification"
# transformers' class: the module's name, and whether it has a bias.
HEADS: Mapping[str, tuple[str, bool]] = {
    TEXT_HEAD: ("score", False),
    "GPTNeoForTokenClassification": ("classifier", True),
    "GPTNeoForQuestionAnswering": ("qa_outputs", True),
}


def head_from_hf(values: Mapping[str, Any]) -> Head | None:
    """The head that a config.json names; None for a language model's.

    Raises:
      ConfigError: an architecture that has no GPT-Neo head.
    """
    (architecture, *_) = values.get("architectures") or ["GPTNeoForCausalLM"]
    if architecture in ("GPTNeoForCausalLM", "GPTNeoModel"):
        return None
    if architecture not in HEADS:
        raise ConfigError(
            f"config.json: architecture {architecture!r} is unknown; there are "
            f"GPTNeoForCausalLM, {', '.join(HEADS)}."
        )
    # transformers writes id2label only where it is not LABEL_0, LABEL_1.
    names = values.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}
    return Head(
        architecture=architecture,
        labels=tuple(names[key] for key in sorted(names, key=int)),
        pad_token_id=values.get("pad_token_id"),
        problem_type=values.get("problem_type"),
    )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object. Raises ConfigError, in one line, where the file holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} does not hold a JSON object.")
    return values
