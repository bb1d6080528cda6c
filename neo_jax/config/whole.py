"""A whole experiment: all sections, and the checks that need two of them."""

from __future__ import annotations

import dataclasses
from typing import Literal

from neo_jax.config.data import DataConfig
from neo_jax.config.errors import ConfigError
from neo_jax.config.finetuning import ClassifyConfig, FinetuneConfig, PreferenceConfig
from neo_jax.config.model import ModelConfig
from neo_jax.config.training import (
    CheckpointConfig,
    EvalConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment."""

    task: Literal["pretrain", "finetune", "classify", "preference"] = "pretrain"
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    finetune: FinetuneConfig = dataclasses.field(default_factory=FinetuneConfig)
    classify: ClassifyConfig = dataclasses.field(default_factory=ClassifyConfig)
    preference: PreferenceConfig = dataclasses.field(default_factory=PreferenceConfig)

    def __post_init__(self) -> None:
        """Checks that need two sections."""
        if self.data.seq_len > self.model.max_seq_len:
            raise ConfigError(
                f"data.seq_len={self.data.seq_len} exceeds "
                f"model.max_seq_len={self.model.max_seq_len} positions; "
                f"lower data.seq_len to {self.model.max_seq_len} or raise model.max_seq_len."
            )
        if self.task == "pretrain" and not self.optimizer.learning_rate:
            raise ConfigError(
                "optimizer.learning_rate=0 learns nothing; give the peak, as in "
                "--config.optimizer.learning_rate=6e-4."
            )
        if (self.task == "preference") != (self.data.record_format == "preference"):
            raise ConfigError(
                f"task {self.task!r} with data.record_format={self.data.record_format!r}: "
                f"records of preferences go with task 'preference', and only with it."
            )
        if self.data.length_group and self.task not in ("classify", "preference"):
            raise ConfigError(
                f"data.length_group={self.data.length_group} with task {self.task!r}: text is "
                f"packed into rows of one length; leave it 0."
            )
        if (self.finetune.trainable == "lora") != bool(self.model.lora_rank):
            raise ConfigError(
                f"finetune.trainable={self.finetune.trainable!r} with model.lora_rank="
                f"{self.model.lora_rank}: a rank goes with 'lora', and only with it."
            )
        if self.model.kernel_dtype == "int8" and self.finetune.trainable != "lora":
            raise ConfigError(
                f"model.kernel_dtype='int8' cannot be learned; set finetune.trainable='lora', "
                f"not {self.finetune.trainable!r}."
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
