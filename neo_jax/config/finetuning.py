"""What differs when a run starts from a trained model."""

from __future__ import annotations

import dataclasses
from typing import Literal

from neo_jax.config.errors import ConfigError, require_positive


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
