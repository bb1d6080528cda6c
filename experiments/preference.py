"""A trained GPT-Neo learns which of two answers is better.

Command: python -m neo_jax.main --config preference --workdir runs/preference \\
        --config.train.init_from=EleutherAI/gpt-neo-125m --config.data.source=pairs.jsonl
Data: a record a line, {"prompt", "chosen", "rejected"}, each a text, or messages {"role",
"content"}; every 20th is held out. What is learned is the difference of the two answers,
beside the checkpoint's own (DPO); a model tuned on the chosen answers is a good beginning.
metrics.jsonl holds the share of pairs that are told right (`accuracy`), and by how much
(`margin`). The run ends where three evaluations brought nothing better.
Adapters alone, in peft's format in the workdir's folder `peft`:
    python -m neo_jax.main --config preference --workdir runs/preference_lora \\
        --config.train.init_from=EleutherAI/gpt-neo-1.3B --config.data.source=pairs.jsonl \\
        --config.finetune.trainable=lora --config.model.lora_rank=16 \\
        --config.optimizer.learning_rate=5e-5 --config.finetune.export=peft
Without a reference, each answer's mean over its tokens (SimPO):
    python -m neo_jax.main --config preference --workdir runs/preference_simpo \\
        --config.train.init_from=EleutherAI/gpt-neo-125m --config.data.source=pairs.jsonl \\
        --config.preference.reference_free=True --config.preference.length_normalised=True \\
        --config.preference.beta=2.0 --config.preference.target_margin=1.0
"""

from ml_collections import ConfigDict

from neo_jax.experiments import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.task = "preference"
    config.model.remat = "full"
    config.model.lora_targets = ("query", "key", "value", "out", "up", "down")

    config.data.source = "data/pairs.jsonl"
    config.data.record_format = "preference"
    config.data.seq_len = 1024
    config.data.batch_size = 32  # pairs

    config.train.num_steps = 1000
    # Both answers' probabilities fall where it is much larger.
    config.optimizer.learning_rate = 1e-6
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.0

    config.eval.every = 100
    config.checkpoint.every = 100
    config.finetune.patience = 3
    config.finetune.export = "hf"
    return config
