"""What differs when a run starts from a trained model."""

from __future__ import annotations

import dataclasses
from typing import Literal

from neo_jax.config.errors import ConfigError, require_positive


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """What a pair of answers teaches; see finetune/preference.py."""

    beta: float = 0.1  # how strongly the model is held to the checkpoint
    # Without the checkpoint's log-probabilities, and with each answer's mean over its tokens
    # instead of their sum: together, and with a beta of 2 or more, that is SimPO.
    reference_free: bool = False
    length_normalised: bool = False
    target_margin: float = 0.0  # reward by which the chosen answer should be ahead
    label_smoothing: float = 0.0  # share of pairs that are taken to be labelled wrongly

    def __post_init__(self) -> None:
        require_positive(self, "preference", "beta")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"preference.label_smoothing={self.label_smoothing} must be at least 0 and "
                f"below 0.5."
            )
        if self.target_margin < 0:
            raise ConfigError(
                f"preference.target_margin={self.target_margin} must not be negative."
            )


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Which parameters are learned, and when it is enough."""

    # "last_layers": the topmost layers and the final LayerNorm. What a task adds to the model
    # is learned in any case.
    trainable: Literal["all", "lora", "last_layers"] = "all"
    last_layers: int = 2  # of "last_layers"
    # Evaluations without a better figure after which the run ends, with its best checkpoint;
    # 0: it never ends early.
    patience: int = 0
    # What the end writes into the workdir for others: "hf", a directory that transformers
    # loads, adapters merged; "peft", the adapters alone.
    export: Literal["none", "hf", "peft"] = "none"

    def __post_init__(self) -> None:
        if self.export == "peft" and self.trainable != "lora":
            raise ConfigError(
                f"finetune.export='peft' writes adapters, and finetune.trainable="
                f"{self.trainable!r} has none; use 'hf'."
            )
        require_positive(self, "finetune", "last_layers")
        if self.patience < 0:
            raise ConfigError(f"finetune.patience={self.patience} must not be negative.")


@dataclasses.dataclass(frozen=True)
class ClassifyConfig:
    """Which task of GLUE or SuperGLUE is learned or asked, and how."""

    name: str | None = None  # as in evaluate/glue/tasks.py: cola, sst2 … record, super_rte
    # What `python -m neo_jax.finetune` goes through where it is given no names.
    suite: Literal["glue", "super_glue"] = "glue"
    # "head": a matrix on the last token; "prompt": the language model learns to write the
    # answer; "ask": it learns nothing, and answers as it is.
    form: Literal["head", "prompt", "ask"] = "head"
    # Folder that holds the benchmark's own files, a folder a task; left out: TFDS.
    folder: str | None = None
    # How often the training split is gone through; train.num_steps, eval.every and, at most a
    # tenth of the steps, the warm-up follow from it. 0: they are as they are given.
    epochs: float = 3.0
    evaluations: int = 3  # of a run with `epochs`, the last one included
    shots: int = 0  # of "ask": answered examples before each question, drawn by train.seed
    # Only the checkpoint's shape and words are taken: what reading has given shows beside it.
    random_weights: bool = False
    new_head: bool = False  # in place of the checkpoint's own, which may have other labels
    labels: tuple[str, ...] = ()  # names of the head's outputs; the run fills them in

    def __post_init__(self) -> None:
        require_positive(self, "classify", "evaluations")
        for key in ("epochs", "shots"):
            if getattr(self, key) < 0:
                raise ConfigError(f"classify.{key}={getattr(self, key)} must not be negative.")
        if self.shots and self.form != "ask":
            raise ConfigError(
                f"classify.shots={self.shots} go with classify.form='ask', and only with it."
            )
