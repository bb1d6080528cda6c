"""GPT-Neo 2.7B, as released: 420 billion tokens of the Pile.

Source: EleutherAI/gpt-neo, branch sampling_etc, configs/GPT3_2-7B_pretrained.json.
Recipe: `mtf`, the original's arithmetic; no weight decay; the cosine ends at step 300,000.
    The original computed in float32; here bfloat16 is the default on accelerators, and
    --config.model.compute_dtype=float32 is the original's.
Published: Pile 0.7165 bits per byte; WikiText perplexity 11.39, LAMBADA 5.626 / 62.22 %.
Data: the Pile, in `data/pile` (`train/*.jsonl.zst`, `val.jsonl.zst`), tokenised once by
    python -m neo_jax.prepare --source pile:data/pile --tokenizer gpt2 \\
        --output data/pile/tokens --holdout_every 0
Command: python -m neo_jax.main --config neo_2p7b --workdir runs/neo_2p7b
Memory: 39.5 GiB for parameters, moments and gradients, over all devices together.
A look at it without the data, on a CPU:
    python -m neo_jax.main --config neo_2p7b --workdir /tmp/neo_2p7b \\
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
    config.model = config_lib.preset("neo_2p7b")

    config.data.batch_size = 512
    config.train.num_steps = 400_000
    config.optimizer.learning_rate = 1.6e-4
    config.optimizer.decay_steps = 300_000  # then flat at a tenth of the peak
    config.optimizer.weight_decay = 0.0
    return config
