"""GLUE: each task learned by a head on the last token, from a trained model.

Command: python -m neo_jax.finetune --config glue --workdir runs/glue --seeds 5 \
             --config.train.init_from=EleutherAI/gpt-neo-125m \
             --config.classify.folder=data/glue
One task: python -m neo_jax.main --config glue --workdir runs/cola_of_glue \
             --config.classify.name=cola --config.train.init_from=EleutherAI/gpt-neo-125m
Data: the official files (CoLA/train.tsv …) below classify.folder, or TFDS's glue/*.
"""

from ml_collections import ConfigDict

from neo_jax.experiments import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.task = "classify"
    config.classify.suite = "glue"
    config.classify.epochs = 3.0
    config.finetune.export = "hf"

    # Texts that are longer lose words at the end of their longest field.
    config.data.seq_len = 256
    config.data.batch_size = 32
    config.eval.batch_size = 64

    # Of GPT-1's fine-tuning on GLUE: Radford et al. 2018, section 4.1.
    config.optimizer.learning_rate = 6.25e-5
    config.optimizer.weight_decay = 0.01
    config.optimizer.b2 = 0.999
    config.optimizer.end_fraction = 0.0
    config.optimizer.warmup_steps = 100
    # Few steps of small batches: a loss that stands out is data, not a fault.
    config.optimizer.spike_sigmas = 100.0
    config.checkpoint.every = 1000
    return config
