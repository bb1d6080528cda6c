"""A small GPT-Neo learns English from two centuries of presidents' speeches, on a CPU."""

from ml_collections import ConfigDict

from neo_jax import config as config_lib
from neo_jax.experiments import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model = config_lib.preset("tiny")
    config.model.vocab_size = 4096
    config.model.vocab_multiple = 128
    config.model.max_seq_len = 256
    config.model.num_layers = 4
    config.model.embed_dim = 192
    config.model.num_heads = 3
    config.model.window_size = 64
    config.data.source = "sotu"
    config.data.tokenizer = "bpe:4096"
    config.data.seq_len = 256
    config.data.batch_size = 8
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.train.num_steps = 1500
    config.eval.every = 500
    config.eval.batch_size = 16
    config.eval.stride = 64
    config.eval.sample_tokens = 160
    config.eval.prompt = "Fellow citizens of the Senate and House of Representatives:"
    config.checkpoint.every = 250
    config.eval.references = (
        ("gzip -9", 2.659),
        ("xz -9", 2.170),
        ("unigrams over GPT-2 tokens", 1.887),
        ("Kneser-Ney bigrams over GPT-2 tokens", 1.397),
    )
    return config
