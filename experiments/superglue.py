"""SuperGLUE: each task learned by a head on the last token, from a trained model.

Command: python -m neo_jax.finetune --config superglue --workdir runs/superglue --seeds 5 \
             --config.train.init_from=EleutherAI/gpt-neo-125m \
             --config.classify.folder=data/super_glue
One task: python -m neo_jax.main --config superglue --workdir runs/wic_of_superglue \
             --config.classify.name=wic --config.train.init_from=EleutherAI/gpt-neo-125m
Data: the official files (WiC/train.jsonl …) below classify.folder, or TFDS's super_glue/*.
"""

from ml_collections import ConfigDict

from neo_jax.experiments import glue


def get_config() -> ConfigDict:
    config = glue.get_config()
    config.classify.suite = "super_glue"
    # Most training splits are a tenth of GLUE's, and their passages longer.
    config.classify.epochs = 10.0
    config.data.seq_len = 512
    config.data.batch_size = 16
    return config
