"""The learning rate of a tuning run for which nobody named one.

Enters: a config whose model has the checkpoint's shape. Leaves: the same with a peak for it.
"""

from __future__ import annotations

import dataclasses

from neo_jax import state
from neo_jax.config import Config

# GPT-Neo's own peaks, 6e-4 at 125M and 1.6e-4 at 2.7B, lie on this power of the size.
_AT_125M, _SIZE, _POWER = 6e-4, 125_198_592, -0.433
# A trained model is moved at a tenth of the rate that it was trained with.
_OF_PRETRAINING = 0.1
# Source: Schulman et al. 2025, "LoRA Without Regret": ten times the rate of full tuning.
_OF_ADAPTERS = 10


def settled(config: Config) -> Config:
    """The config with a peak in place of `optimizer.learning_rate=0`, to two digits."""
    if config.optimizer.learning_rate:
        return config
    plain = dataclasses.replace(config.model, lora_rank=0, kernel_dtype="param")
    rate = _OF_PRETRAINING * _AT_125M * (state.num_params(plain) / _SIZE) ** _POWER
    if config.finetune.trainable == "lora":
        rate *= _OF_ADAPTERS
    adam = dataclasses.replace(config.optimizer, learning_rate=float(f"{rate:.1e}"))
    return dataclasses.replace(config, optimizer=adam)
