"""From an experiment's ConfigDict to frozen dataclasses that every room reads.

Enters: an experiment file (or its name), plus overrides `--config.section.key=value`.
Leaves: a `Config`, complete and checked: every default stands here once, every key is
known, every value has its type, and every contradiction was refused with one line.

    model.py, data.py, training.py, finetuning.py
                                     the sections: every key, its default and its meaning
    whole.py                         all of them, and the checks that need two
    presets.py                       released shapes, and meshes, by name
    building.py                      from ConfigDict, JSON and overrides to dataclasses
    loading.py                       experiment files
"""

from neo_jax.config.building import (
    build,
    default_config,
    from_json,
    mesh_preset,
    preset,
    preset_model,
    to_json,
)
from neo_jax.config.data import DataConfig
from neo_jax.config.errors import ConfigError
from neo_jax.config.finetuning import ClassifyConfig, FinetuneConfig, PreferenceConfig
from neo_jax.config.loading import experiment_names, load_experiment
from neo_jax.config.model import REMAT_TENSORS, ModelConfig
from neo_jax.config.presets import MESH_PRESETS, PRESETS
from neo_jax.config.training import (
    CheckpointConfig,
    EvalConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from neo_jax.config.whole import Config

__all__ = [
    "MESH_PRESETS",
    "PRESETS",
    "REMAT_TENSORS",
    "CheckpointConfig",
    "ClassifyConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "FinetuneConfig",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PreferenceConfig",
    "TrainConfig",
    "build",
    "default_config",
    "experiment_names",
    "from_json",
    "load_experiment",
    "mesh_preset",
    "preset",
    "preset_model",
    "to_json",
]
