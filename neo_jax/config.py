"""From an experiment's ConfigDict to frozen dataclasses that every room reads.

Enters: an experiment file (or its name), plus overrides `--config.section.key=value`.
Leaves: a `Config`, complete and checked: every default stands here once, every key is
known, every value has its type, and every contradiction was refused with one line.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import json
import math
import pathlib
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from ml_collections import ConfigDict


class ConfigError(ValueError):
    """A mistake in a config or on the command line; its message is one line."""


# ------------------------------------------------------------------------------ sections


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
    activation: Literal["gelu_new", "gelu", "relu", "silu"] = "gelu_new"
    layer_norm_eps: float = 1e-5
    tie_embeddings: bool = True
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

    def __post_init__(self) -> None:
        if self.mlp_dim == 0:
            object.__setattr__(self, "mlp_dim", 4 * self.embed_dim)
        object.__setattr__(self, "attention_types", self._smallest_period())
        _require_positive(
            self,
            "model",
            "num_layers embed_dim num_heads mlp_dim window_size vocab_size vocab_multiple "
            "max_seq_len layer_norm_eps",
        )
        self._check_remat()
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
                    f"{_did_you_mean(name, REMAT_TENSORS)}; there are "
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


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes [batch, seq] arrays."""

    source: str = "sotu"  # a name, a file, a directory or a glob; see data/sources.py
    # Several sources instead of `source`: entries (source, weight). More weights in an entry
    # follow one another, the next from each of `mixture_changes` on.
    mixture: tuple[tuple[str | float, ...], ...] = ()
    mixture_changes: tuple[int, ...] = ()  # since the start of training
    # What those count. A step stays the same step where the batch size changes on resume.
    mixture_changes_in: Literal["sequences", "steps"] = "sequences"
    # Held-out text. Left out: every `holdout_every`-th document of `source`.
    eval_source: str | None = None
    holdout_every: int = 20  # documents, in the source's order; 0: none is held out
    holdout_offset: int = 10  # index of the first document held out
    # "gpt2", "bpe:4096" (trained on the training documents), a path or a hub id.
    tokenizer: str = "gpt2"
    record_format: Literal["text", "instruction"] = "text"
    text_field: str = "text"  # the field of a record that holds its text, or its token ids
    txt_documents: Literal["file", "blank_lines"] = "file"  # what ends a document in .txt
    tfds_dir: str = "~/tensorflow_datasets"  # where TFDS keeps prepared data sets
    on_error: Literal["raise", "skip"] = "raise"  # on unreadable records; skips are counted
    max_document_bytes: int = 0  # UTF-8 bytes; longer documents are left out; 0: no limit
    seq_len: int = 2048  # tokens
    batch_size: int = 8  # sequences, all hosts together
    # "concat": cut the joined documents; "best_fit": whole documents, as few rows as fit
    # them; "none": each document starts a row. None of them loses a token.
    packing: Literal["concat", "best_fit", "none"] = "concat"
    isolate_documents: bool = False  # attention and positions start anew at each document
    shuffle: bool = True
    num_workers: int = 0  # processes that read ahead; 0 reads in this one
    allow_spec_change: bool = False  # resume though the data or its settings changed

    def __post_init__(self) -> None:
        _require_positive(self, "data", "seq_len batch_size")
        for key in ("num_workers", "max_document_bytes", "holdout_every"):
            if getattr(self, key) < 0:
                raise ConfigError(f"data.{key}={getattr(self, key)} must not be negative.")
        if self.holdout_every and not 0 <= self.holdout_offset < self.holdout_every:
            raise ConfigError(
                f"data.holdout_offset={self.holdout_offset} must lie in "
                f"0 … data.holdout_every-1={self.holdout_every - 1}."
            )
        object.__setattr__(self, "mixture", self._checked_mixture())

    def _checked_mixture(self) -> tuple[tuple[str | float, ...], ...]:
        stages = len(self.mixture_changes) + 1
        changes = list(self.mixture_changes)
        if changes != sorted(set(changes)) or any(
            not isinstance(at, int) or at <= 0 for at in changes
        ):
            raise ConfigError(
                f"data.mixture_changes={changes} must be {self.mixture_changes_in} after 0, "
                f"each later than the one before."
            )
        entries: list[tuple[str | float, ...]] = []
        for entry in self.mixture:
            if not _is_mixture_entry(entry, stages):
                raise ConfigError(
                    f"data.mixture: {entry!r} must be a source and {stages} weight(s), none "
                    f"negative: one, and one for each of data.mixture_changes."
                )
            entries.append((entry[0], *map(float, entry[1:])))
        for stage in range(stages):
            if entries and not any(entry[stage + 1] for entry in entries):
                raise ConfigError(f"data.mixture: the weights of stage {stage} are all 0.")
        names = [str(entry[0]) for entry in entries]
        if len(set(names)) < len(names):
            raise ConfigError(f"data.mixture names a source twice: {', '.join(names)}.")
        return tuple(entries)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1, which takes what is left.

    `mesh` may be the name of a preset instead: see MESH_PRESETS.
    """

    # Groups of devices with fast links inside and a data-centre network between them; -1:
    # as many as the devices say. The axes below are those of one slice: the batch is split
    # over slices, too, and parameters are copied to each.
    slices: int = 1
    data: int = 1  # the batch is split, parameters are copied
    fsdp: int = -1  # the batch and the parameters are split
    tensor: int = 1  # heads, mlp and vocabulary are split
    context: int = 1  # the sequence is split

    def __post_init__(self) -> None:
        sizes = {axis: getattr(self, axis) for axis in ("data", "fsdp", "tensor", "context")}
        for axis, size in {"slices": self.slices, **sizes}.items():
            if size < 1 and size != -1:
                raise ConfigError(f"mesh.{axis}={size} must be positive, or -1 for the rest.")
        if list(sizes.values()).count(-1) > 1:
            rest = [axis for axis, size in sizes.items() if size == -1]
            raise ConfigError(f"mesh: only one axis may be -1, not {', '.join(rest)}.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping, and the learning rate's path.

    `modern` and `mtf`, the two recipes, are sets of these keys: see experiments/base.py.
    """

    learning_rate: float = 6e-4  # the peak
    schedule: Literal["cosine", "mtf_cosine", "constant"] = "cosine"
    warmup_steps: int = 3000  # optimiser steps
    decay_steps: int | None = None  # step at which the cosine ends; left out: train.num_steps
    end_fraction: float = 0.1  # learning rate after the cosine, as a part of the peak
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    bias_correction: bool = True
    weight_decay: float = 0.1  # decoupled, times the learning rate
    clip_norm: float = 1.0  # global gradient norm
    # An update is left out where loss or gradient norm is not finite, or stands out of the
    # last values. Without it the first non-finite value ends the run, with a diagnosis.
    skip_spikes: bool = True
    spike_sigmas: float = 6.0  # standard deviations above the mean of the last values

    def __post_init__(self) -> None:
        _require_positive(self, "optimizer", "learning_rate eps clip_norm spike_sigmas")
        for key in ("b1", "b2"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(
                    f"optimizer.{key}={getattr(self, key)} must be at least 0 and below 1."
                )
        if not 0 <= self.end_fraction <= 1:
            raise ConfigError(f"optimizer.end_fraction={self.end_fraction} must lie in 0 … 1.")
        for key in ("warmup_steps", "weight_decay"):
            if getattr(self, key) < 0:
                raise ConfigError(
                    f"optimizer.{key}={getattr(self, key)} must not be negative."
                )
        if self.decay_steps is not None and self.decay_steps <= 0:
            raise ConfigError(f"optimizer.decay_steps={self.decay_steps} must be positive.")
        if self.schedule == "cosine" and (self.decay_steps or math.inf) <= self.warmup_steps:
            raise ConfigError(
                f"optimizer.decay_steps={self.decay_steps} must exceed "
                f"optimizer.warmup_steps={self.warmup_steps}, where the cosine begins."
            )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Cross-entropy over the vocabulary."""

    z_loss: float = 0.0  # weight of log²Z, which keeps the softmax's normaliser near 1
    block_size: int = 512  # positions of each sequence whose logits exist at one time

    def __post_init__(self) -> None:
        _require_positive(self, "loss", "block_size")
        if self.z_loss < 0:
            raise ConfigError(f"loss.z_loss={self.z_loss} must not be negative.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    num_steps: int = 1000  # optimiser steps
    seed: int = 0  # of the weights and of the data's order
    # A workdir whose parameters a new run starts with, where they fit: to fine-tune, or after
    # a change of the model. What is missing there starts fresh, and is listed.
    init_from: str | None = None
    accumulation_steps: int = 1  # slices of the batch, one after another, one update
    # When a device gathers the weights that mesh.fsdp splits: "layer", as each layer needs
    # them, or "step", all layers at once, which spares the backward pass a second gathering.
    gather_weights: Literal["layer", "step"] = "layer"
    log_every: int = 10  # steps between lines of metrics.jsonl
    # Updates left out in a row that send the run back to its last checkpoint, past the data
    # that it met since; 0: never. Finite values alone are spikes at most 4 times in a row,
    # since the window takes them in.
    rollback_after: int = 8
    tensorboard: bool = True
    wandb_project: str | None = None  # also log to Weights & Biases, which must be installed

    def __post_init__(self) -> None:
        _require_positive(self, "train", "num_steps accumulation_steps log_every")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"train.seed={self.seed} must lie in 0 … {2**31 - 1}.")
        if self.rollback_after < 0:
            raise ConfigError(
                f"train.rollback_after={self.rollback_after} must not be negative."
            )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out text during training, and a sample at the end."""

    every: int = 500  # steps; 0: only at the end
    batch_size: int | None = None  # sequences; left out: data.batch_size
    max_batches: int = 0  # of each evaluation; 0: all of the held-out text
    stride: int | None = None  # tokens scored by one window; left out: data.seq_len
    prompt: str = ""  # of the sample; empty: starts a document
    sample_tokens: int = 0  # tokens to write at the end; 0: no sample
    temperature: float = 0.8
    top_k: int = 40  # 0: all
    # Benchmarks at every evaluation: names of neo_jax.evaluate, or text:SOURCE.
    tasks: tuple[str, ...] = ()
    tasks_data: str | None = None  # folder of their files; left out: the hub
    tasks_limit: int = 0  # samples of each task; 0: all
    # Pairs (name, bits per byte) that the final figure is printed beside.
    references: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        keys = ("every", "max_batches", "sample_tokens", "temperature", "top_k", "tasks_limit")
        for key in keys:
            if getattr(self, key) < 0:
                raise ConfigError(f"eval.{key}={getattr(self, key)} must not be negative.")
        for key in ("batch_size", "stride"):
            if getattr(self, key) is not None and getattr(self, key) <= 0:
                raise ConfigError(f"eval.{key}={getattr(self, key)} must be positive.")
        for entry in self.references:
            if not (_is_mixture_entry(entry, stages=1) and entry[1] > 0):
                raise ConfigError(
                    f"eval.references: {entry!r} must be a name and its bits per byte, "
                    f"as in ('gzip -9', 2.659)."
                )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the whole training state is written, and how much of it is kept."""

    every: int = 1000  # steps; the last step is always saved
    minutes: float = 30.0  # also saved when this long ago; 0: by steps alone
    keep: int = 2  # newest checkpoints kept
    keep_every: int = 0  # checkpoints at multiples of this step are kept, too; 0: none
    keep_best: int = 1  # as many of the lowest held-out loss are kept, too

    def __post_init__(self) -> None:
        _require_positive(self, "checkpoint", "every keep")
        for key in ("minutes", "keep_every", "keep_best"):
            if getattr(self, key) < 0:
                raise ConfigError(
                    f"checkpoint.{key}={getattr(self, key)} must not be negative."
                )


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment."""

    task: Literal["pretrain"] = "pretrain"
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        """Checks that need two sections."""
        if self.data.seq_len > self.model.max_seq_len:
            raise ConfigError(
                f"data.seq_len={self.data.seq_len} exceeds "
                f"model.max_seq_len={self.model.max_seq_len} positions; "
                f"lower data.seq_len to {self.model.max_seq_len} or raise model.max_seq_len."
            )
        if self.data.batch_size % self.train.accumulation_steps:
            raise ConfigError(
                f"train.accumulation_steps={self.train.accumulation_steps} does not divide "
                f"data.batch_size={self.data.batch_size}."
            )
        if self.eval.stride is not None and self.eval.stride > self.data.seq_len:
            raise ConfigError(
                f"eval.stride={self.eval.stride} exceeds data.seq_len={self.data.seq_len}; "
                f"tokens between two windows would never be scored."
            )


# ------------------------------------------------------------------------------- presets

# Sources: EleutherAI/gpt-neo, branch sampling_etc, configs/GPT3_XL_pretrained.json and
# GPT3_2-7B_pretrained.json; configs/gpt3_small_256.json and gpt3_medium_256.json at 23485e3.
PRESETS: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        "tiny": {
            "num_layers": 4,
            "embed_dim": 128,
            "num_heads": 4,
            "window_size": 64,
            "vocab_size": 4096,
            "max_seq_len": 256,
        },
        "neo_125m": {"num_layers": 12, "embed_dim": 768, "num_heads": 12},
        "neo_350m": {"num_layers": 24, "embed_dim": 1024, "num_heads": 16},
        "neo_1p3b": {"num_layers": 24, "embed_dim": 2048, "num_heads": 16},
        "neo_2p7b": {"num_layers": 32, "embed_dim": 2560, "num_heads": 20},
    }
)


# Meshes by name: `--config.mesh=fsdp_tensor`, with `--config.mesh.tensor=2` after it.
MESH_PRESETS: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        # Small models: every device holds all parameters.
        "data": {"data": -1, "fsdp": 1},
        # The default. Every device holds a part of every parameter.
        "fsdp": {"fsdp": -1},
        # Fewer sequences than devices: four devices share one. 4 divides every released
        # model's heads; 8 does not divide 2.7B's 20.
        "fsdp_tensor": {"fsdp": -1, "tensor": 4},
        # Long sequences: four devices share one, each a part of it.
        "fsdp_context": {"fsdp": -1, "context": 4},
        # Several slices: `fsdp` inside each, copies over the network between them.
        "hybrid": {"slices": -1, "fsdp": -1},
    }
)


def mesh_preset(name: str) -> ConfigDict:
    """The `mesh` section of that name, complete and open to change.

    Raises:
      ConfigError: no preset has that name.
    """
    if name not in MESH_PRESETS:
        raise ConfigError(
            f"mesh preset {name!r} is unknown{_did_you_mean(name, MESH_PRESETS)}; "
            f"there are {', '.join(MESH_PRESETS)}."
        )
    return ConfigDict({**_defaults(MeshConfig), **MESH_PRESETS[name]}, type_safe=False)


def preset(name: str) -> ConfigDict:
    """The `model` section of a released shape, complete and open to change.

    Raises:
      ConfigError: no preset has that name.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"model preset {name!r} is unknown{_did_you_mean(name, PRESETS)}; "
            f"there are {', '.join(PRESETS)}."
        )
    return ConfigDict({**_defaults(ModelConfig), **PRESETS[name]}, type_safe=False)


def preset_model(name: str, **changes: Any) -> ModelConfig:
    """`preset` as a finished dataclass: `preset_model("neo_125m", num_layers=2)`."""
    return _build(ModelConfig, {**preset(name).to_dict(), **changes}, "model")


# ----------------------------------------------------------------------------- assembling


def default_config() -> ConfigDict:
    """Every key with its default, for an experiment to change.

    Returns:
      A ConfigDict with the sections of `Config`. Assigning a wrong key or type is told by
      `build`, where a whole line can say what was meant.
    """
    sections = {
        field.name: _defaults(field.default_factory)  # type: ignore[arg-type]
        for field in dataclasses.fields(Config)
        if field.default_factory is not dataclasses.MISSING
    }
    return ConfigDict({"task": Config.task, **sections}, type_safe=False)


def build(config: Mapping[str, Any] | ConfigDict) -> Config:
    """Checks a ConfigDict, key by key, and freezes it.

    Args:
      config: sections of keys, as `default_config` returns; missing keys take defaults.
        `model` and `mesh` may be the name of a preset.

    Raises:
      ConfigError: an unknown key, a wrong type or a contradiction; one line.
    """
    tree = _plain(config)
    for section in ("model", "mesh"):
        if isinstance(tree.get(section), str):
            tree[section] = _preset_of(section, tree[section])
    return _build(Config, tree, "")


def to_json(config: Config) -> str:
    """The resolved config as the text of `config.json`."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """The inverse of `to_json`.

    Raises:
      ConfigError: `text` is no JSON object, or not of this config's keys and types.
    """
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the config is not valid JSON: {error}.") from None
    return build(tree)


def load_experiment(name_or_path: str, overrides: Iterable[str] = ()) -> Config:
    """Runs an experiment's `get_config()` and applies `section.key=value` overrides.

    Args:
      name_or_path: a Python file, or the bare name of an experiment that comes with neo_jax.
      overrides: strings such as `optimizer.learning_rate=3e-4`.

    Raises:
      ConfigError: no such file or name, no `get_config` in it, a mistake in it, or a bad
        override.
    """
    with _told_in_one_line(name_or_path):
        tree = _plain(_experiment_module(name_or_path).get_config())
    for text in overrides:
        _override(tree, text)
    return build(tree)


def experiment_names() -> list[str]:
    """Names that `load_experiment` knows without a path."""
    folder = _experiments_folder()
    return sorted(p.stem for p in folder.glob("*.py") if p.stem not in ("__init__", "base"))


# ------------------------------------------------------------------------------- in detail


def _preset_of(section: str, name: str) -> dict[str, Any]:
    return (mesh_preset if section == "mesh" else preset)(name).to_dict()


def _plain(config: Any) -> dict[str, Any]:
    """Nested dicts of a ConfigDict, or of a mapping as it is."""
    if isinstance(config, ConfigDict):
        return config.to_dict()
    if isinstance(config, Mapping):
        return dict(config)
    raise ConfigError(f"a config must be a ConfigDict, not {config!r}.")


@contextlib.contextmanager
def _told_in_one_line(name_or_path: str) -> Iterator[None]:
    """Whatever an experiment raises, as a ConfigError that names the experiment."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        reason: Any = error
        while isinstance(reason, (AttributeError, KeyError)) and reason.args:
            reason = reason.args[0]  # as ml_collections wraps what it has to say
        line = " ".join(f"{kind}{reason}".split())
        raise ConfigError(f"--config {name_or_path}: {line}") from error


def _is_mixture_entry(entry: Any, stages: int) -> bool:
    return (
        isinstance(entry, (list, tuple))
        and len(entry) == stages + 1
        and isinstance(entry[0], str)
        and all(isinstance(w, (int, float)) and 0 <= w < math.inf for w in entry[1:])
    )


def _require_positive(section: Any, name: str, keys: str) -> None:
    for key in keys.split():
        if getattr(section, key) <= 0:
            raise ConfigError(f"{name}.{key}={getattr(section, key)} must be positive.")


def _did_you_mean(name: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


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


def _defaults(section: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(section)}


@functools.cache
def _hints(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


def _build(section: type, tree: Mapping[str, Any], path: str) -> Any:
    hints = _hints(section)
    values = {}
    for key, value in tree.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in hints:
            raise ConfigError(_unknown_key(full, str(key), hints))
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{full}={value!r} must be a section of keys.")
            values[key] = _build(hints[key], value, full)
        else:
            values[key] = _coerce(value, hints[key], full)
    return section(**values)


def _unknown_key(full: str, key: str, valid: Iterable[str]) -> str:
    section = full.removesuffix(key)
    # The very key in another section is a likelier slip than a misspelling.
    meant = [
        f"{name}.{key}"
        for name, hint in _hints(Config).items()
        if dataclasses.is_dataclass(hint) and key in _hints(hint)  # type: ignore[arg-type]
    ] or [
        section + near for near in difflib.get_close_matches(key, list(valid), n=1, cutoff=0.5)
    ]
    if meant:
        return f"config has no key {full!r}, did you mean {meant[0]!r}?"
    return f"config has no key {full!r}; there are {', '.join(valid)}."


def _coerce(value: Any, hint: Any, path: str) -> Any:
    """`value` as `hint` asks, or a ConfigError; ints pass as floats, whole floats as ints."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        raise ConfigError(
            f"{path}={value!r} is not one of {', '.join(choices)}"
            f"{_did_you_mean(value, choices) or '.'}"
        )
    if origin is types.UnionType:
        if value is None:
            return None
        (inner,) = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return _coerce(value, inner, path)
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            return _tuples(value)
        raise ConfigError(f"{path}={value!r} must be a list, as in \"['one', 'two']\".")
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{path}={value!r} must be a finite number.")
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{path}={value!r} must be of type {hint.__name__}.")


def _tuples(value: Any) -> Any:
    """Lists, as JSON and command lines have them, as tuples, at every depth."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _override(tree: dict[str, Any], text: str) -> None:
    """Applies one `section.key=value` in place."""
    path, equals, raw = text.partition("=")
    if not equals:
        raise ConfigError(f"override {text!r} has no value; write --config.{path}=VALUE.")
    *parents, key = path.split(".")
    hints: dict[str, Any] = _hints(Config)
    node = tree
    for i, parent in enumerate(parents):
        if not dataclasses.is_dataclass(hints.get(parent)):
            raise ConfigError(_unknown_key(".".join(parents[: i + 1]), parent, hints))
        hints = _hints(hints[parent])
        inner = node.setdefault(parent, {})
        if isinstance(inner, str):  # a preset's name
            node[parent] = inner = _preset_of(parent, inner)
        node = inner
    if key not in hints:
        raise ConfigError(_unknown_key(path, key, hints))
    # Text stays text, also where it looks like a number: data.eval_source=2020.
    value = _literal(raw)
    is_text = hints[key] is str or (hints[key] == str | None and value is not None)
    if path in ("model", "mesh"):  # a preset's name
        is_text = True
    node[key] = raw if is_text else value


def _literal(raw: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if raw.lower() in words:
        return words[raw.lower()]
    try:
        return ast.literal_eval(raw)
    except (ValueError, SyntaxError):
        return raw


def _experiments_folder() -> pathlib.Path:
    """`neo_jax/experiments` in an installed wheel, `experiments` in a checkout."""
    package = pathlib.Path(__file__).parent
    installed = package / "experiments"
    return installed if installed.is_dir() else package.parent / "experiments"


def _experiment_module(name_or_path: str) -> types.ModuleType:
    folder = _experiments_folder()
    path = pathlib.Path(name_or_path)
    if path.suffix != ".py":
        path = folder / f"{name_or_path}.py"
    if not path.is_file():
        names = experiment_names()
        raise ConfigError(
            f"there is no such file or experiment"
            f"{_did_you_mean(path.stem, names) or '; there are ' + ', '.join(names) + '.'}"
        )
    # Experiments say `from neo_jax.experiments import base`, in a checkout as in a wheel.
    if "neo_jax.experiments" not in sys.modules:
        package = types.ModuleType("neo_jax.experiments")
        package.__path__ = [str(folder)]
        sys.modules["neo_jax.experiments"] = package
    spec = importlib.util.spec_from_file_location(f"_experiment_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError("the file defines no get_config().")
    return module
