"""What every experiment starts from: all defaults, and the two recipes as sets of keys.

`modern` is the default: Adam with bias correction, a cosine that starts where the warm-up
ends. `mtf` is how the released models were trained, by EleutherAI/gpt-neo (Mesh TensorFlow).
Both initialise as the original does, because its scores are not divided by sqrt(head_dim):
the scale is folded into the queries' initial weights.
"""

from ml_collections import ConfigDict

from neo_jax import config as config_lib


def get_config() -> ConfigDict:
    """Every key at its default."""
    return config_lib.default_config()


def mtf_recipe(config: ConfigDict) -> None:
    """The original's training arithmetic. Source: EleutherAI/gpt-neo, optimizers.py."""
    config.optimizer.bias_correction = False
    config.optimizer.schedule = "mtf_cosine"
    config.loss.z_loss = 1e-4


def pile(config: ConfigDict) -> None:
    """The released models' text: the Pile, with its own validation split held out."""
    config.data.source = "pile:data/pile"
    config.data.eval_source = "pile:data/pile?split=val"
    config.data.tokenizer = "gpt2"
    config.data.seq_len = 2048
    config.data.num_workers = 4
    config.eval.max_batches = 20  # of a validation split that is a thousandth of the Pile
