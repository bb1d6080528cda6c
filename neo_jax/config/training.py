"""Devices, optimiser, loss, loop, evaluation and checkpoints."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from neo_jax.config.data import is_mixture_entry
from neo_jax.config.errors import ConfigError, require_positive


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

    learning_rate: float = 6e-4  # the peak; 0: tuning takes one for the model's size
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
        require_positive(self, "optimizer", "eps clip_norm spike_sigmas")
        for key in ("b1", "b2"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(
                    f"optimizer.{key}={getattr(self, key)} must be at least 0 and below 1."
                )
        if not 0 <= self.end_fraction <= 1:
            raise ConfigError(f"optimizer.end_fraction={self.end_fraction} must lie in 0 … 1.")
        for key in ("learning_rate", "warmup_steps", "weight_decay"):
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
        require_positive(self, "loss", "block_size")
        if self.z_loss < 0:
            raise ConfigError(f"loss.z_loss={self.z_loss} must not be negative.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    num_steps: int = 1000  # optimiser steps
    seed: int = 0  # of the weights and of the data's order
    # What a new run starts with. Pre-training: a workdir, whose parameters are taken where
    # they fit, as after a change of the model; the others start fresh, and are listed. Tuning:
    # any checkpoint, a Hugging Face directory or hub id among them, whose shape is taken.
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
        require_positive(self, "train", "num_steps accumulation_steps log_every")
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
    # Benchmarks at every evaluation: names of neo_jax.evaluate, text:SOURCE, or harness:NAME
    # for the tasks of lm-evaluation-harness.
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
            if not (is_mixture_entry(entry, stages=1) and entry[1] > 0):
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
        require_positive(self, "checkpoint", "every keep")
        for key in ("minutes", "keep_every", "keep_best"):
            if getattr(self, key) < 0:
                raise ConfigError(
                    f"checkpoint.{key}={getattr(self, key)} must not be negative."
                )
