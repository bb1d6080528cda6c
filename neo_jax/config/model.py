"""The shape of a GPT-Neo, and how it is computed."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from neo_jax.config.errors import ConfigError, did_you_mean, require_positive

# Tensors that a rematerialisation policy may keep, in the order of the forward pass.
# "residual" is what runs from layer to layer inside a period.
REMAT_TENSORS = (
    "query",
    "key",
    "value",
    "context",
    "attention_out",
    "mlp_up",
    "residual",
)

# Transformers' names; activations.py has the functions.
Activation = Literal[
    "gelu_new",
    "gelu",
    "gelu_10",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "leaky_relu",
    "silu",
    "hardswish",
    "mish",
    "laplace",
    "sigmoid",
    "sqrtsoftplus",
    "tanh",
    "linear",
]


LINEARS = ("query", "key", "value", "out", "up", "down")  # of a layer


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a GPT-Neo and how it is computed.

    `attention_types` is the pattern that repeats down the layers: one period, one entry a
    layer, or Hugging Face's nested form `[[["global", "local"], 12]]`. It is kept as the
    smallest period.
    """

    num_layers: int = 12
    embed_dim: int = 768
    num_heads: int = 12
    mlp_dim: int = 0  # 0: 4 × embed_dim
    attention_types: tuple[str, ...] = ("global", "local")
    window_size: int = 256  # keys that a local layer sees, the query's own included
    vocab_size: int = 50257
    vocab_multiple: int = 128  # embedding rows are padded up to a multiple of this
    max_seq_len: int = 2048  # learned positions
    activation: Activation = "gelu_new"
    layer_norm_eps: float = 1e-5
    tie_embeddings: bool = True
    num_labels: int = 0  # scores of the head that classifies texts; 0: there is no such head
    initializer: Literal["mtf", "hf"] = "mtf"
    param_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    # "auto": bfloat16 on TPU and GPU, float32 on CPU.
    compute_dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    # "auto": by the machine, see attention/__init__.py.
    attention: Literal["auto", "reference", "banded", "splash", "cudnn"] = "auto"
    scan_layers: bool = True  # one compiled period, run in a loop; false unrolls it
    # What the backward pass recomputes of each period of layers: "none" of it, "full": all;
    # "minimal": all but the matrix products, "custom": all but the tensors that are saved
    # on the device (remat_save) or in the host's memory (remat_offload). Their names:
    # query, key, value, context, attention_out, mlp_up, residual.
    remat: Literal["none", "full", "minimal", "custom"] = "none"
    remat_save: tuple[str, ...] = ()
    remat_offload: tuple[str, ...] = ()
    # Adapters beside the kernels of some Linears, see lora.py; rank 0: there are none.
    lora_rank: int = 0
    lora_alpha: float = 16.0  # what they add is scaled by alpha / rank
    lora_dropout: float = 0.0  # share of their inputs that training drops
    # query, key, value, out, up, down
    lora_targets: tuple[str, ...] = ("query", "value")
    # "int8": kernels of the layers, which then cannot be learned, one byte a weight.
    kernel_dtype: Literal["param", "int8"] = "param"

    def __post_init__(self) -> None:
        if self.mlp_dim == 0:
            object.__setattr__(self, "mlp_dim", 4 * self.embed_dim)
        object.__setattr__(self, "attention_types", self._smallest_period())
        require_positive(
            self,
            "model",
            "num_layers embed_dim num_heads mlp_dim window_size vocab_size vocab_multiple "
            "max_seq_len layer_norm_eps",
        )
        self._check_remat()
        self._check_lora()
        if self.num_labels < 0:
            raise ConfigError(f"model.num_labels={self.num_labels} must not be negative.")
        if self.embed_dim % self.num_heads:
            near = [n for n in range(1, self.embed_dim + 1) if self.embed_dim % n == 0]
            near = sorted(sorted(near, key=lambda n: abs(n - self.num_heads))[:4])
            raise ConfigError(
                f"model.num_heads={self.num_heads} does not divide "
                f"model.embed_dim={self.embed_dim}; the nearest that do: "
                f"{', '.join(map(str, near))}."
            )

    def _check_remat(self) -> None:
        names = (*self.remat_save, *self.remat_offload)
        for name in names:
            if name not in REMAT_TENSORS:
                raise ConfigError(
                    f"model.remat_save or model.remat_offload: {name!r} is unknown"
                    f"{did_you_mean(name, REMAT_TENSORS)}; there are "
                    f"{', '.join(REMAT_TENSORS)}."
                )
        if len(set(names)) < len(names):
            raise ConfigError(
                f"model.remat_save and model.remat_offload name a tensor twice: "
                f"{', '.join(names)}."
            )
        if bool(names) != (self.remat == "custom"):
            raise ConfigError(
                f"model.remat={self.remat!r} with model.remat_save={list(self.remat_save)} "
                f"and model.remat_offload={list(self.remat_offload)}: names of tensors go "
                f"with model.remat='custom', and only with it."
            )

    def _check_lora(self) -> None:
        if self.lora_rank < 0:
            raise ConfigError(f"model.lora_rank={self.lora_rank} must not be negative.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(
                f"model.lora_dropout={self.lora_dropout} must be at least 0 and below 1."
            )
        require_positive(self, "model", "lora_alpha")
        for name in self.lora_targets:
            if name not in LINEARS:
                raise ConfigError(
                    f"model.lora_targets: {name!r} is unknown{did_you_mean(name, LINEARS)}; "
                    f"there are {', '.join(LINEARS)}."
                )
        if self.lora_rank and not self.lora_targets:
            raise ConfigError(
                f"model.lora_rank={self.lora_rank} with no model.lora_targets adapts nothing."
            )

    def _smallest_period(self) -> tuple[str, ...]:
        given = self.attention_types
        pattern, must_fill = _flatten_attention_types(given)
        for name in pattern:
            if name not in ("global", "local"):
                raise ConfigError(
                    f"model.attention_types: {name!r} is unknown; use 'global' or 'local'."
                )
        if (
            not pattern
            or (self.num_layers > 0 and self.num_layers % len(pattern))
            or (must_fill and len(pattern) != self.num_layers)
        ):
            raise ConfigError(
                f"model.attention_types={given!r} describes {len(pattern)} layers, but "
                f"model.num_layers={self.num_layers}; give one entry a layer, or a period "
                f"that divides the layers."
            )
        for period in range(1, len(pattern) + 1):
            if len(pattern) % period == 0 and pattern == pattern[:period] * (
                len(pattern) // period
            ):
                return pattern[:period]
        raise AssertionError("a pattern is always its own period")

    @property
    def head_dim(self) -> int:
        """Size of one head; `embed_dim / num_heads`."""
        return self.embed_dim // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Embedding rows: `vocab_size` rounded up to `vocab_multiple` (50257 → 50304)."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def layer_types(self) -> tuple[str, ...]:
        """One of "global", "local" for each layer, from the bottom up."""
        return self.attention_types * (self.num_layers // len(self.attention_types))


def _flatten_attention_types(value: Any) -> tuple[tuple[str, ...], bool]:
    """The pattern as a flat tuple, and whether it was Hugging Face's form, which is total."""
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        raise ConfigError(
            f"model.attention_types={value!r} must be a list such as ['global', 'local']."
        )
    if all(isinstance(item, str) for item in value):
        return tuple(value), False
    flat: list[str] = []
    for item in value:
        try:
            names, repeats = item
            if isinstance(names, str):
                raise ValueError
            flat.extend(list(names) * repeats)
        except (TypeError, ValueError):
            raise ConfigError(
                f"model.attention_types: {item!r} is not of the form "
                f"[['global', 'local'], 12]."
            ) from None
    return tuple(flat), True
