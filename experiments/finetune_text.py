"""A trained GPT-Neo goes on with a text of yours.

Command: python -m neo_jax.main --config finetune_text --workdir runs/finetune_text \\
        --config.train.init_from=EleutherAI/gpt-neo-125m --config.data.source=mine.txt
It starts from a workdir, a Hugging Face directory, a hub id or an original checkpoint, and has
its shape and tokenizer. It learns from text files, JSON lines, Parquet or TFDS (docs/data.md),
of which every 20th document is held out; one long text is parted at its blank lines by
`--config.data.txt_documents=blank_lines`, or another is held out by `data.eval_source`. The
learning rate is chosen by the model's size. The run ends after 1000 steps, or where four
evaluations brought nothing better, with the best checkpoint, a sample, and a directory `hf` in
the workdir that transformers loads.
Less memory: adapters alone are learned, beside kernels in bfloat16 or int8 (for large models),
    python -m neo_jax.main --config finetune_text --workdir runs/finetune_text_lora \\
        --config.train.init_from=EleutherAI/gpt-neo-2.7B --config.data.source=mine.txt \\
        --config.finetune.trainable=lora --config.model.lora_rank=8 \\
        --config.model.param_dtype=bfloat16
    or the last layers alone,
    python -m neo_jax.main --config finetune_text --workdir runs/finetune_text_last \\
        --config.train.init_from=EleutherAI/gpt-neo-1.3B --config.data.source=mine.txt \\
        --config.finetune.trainable=last_layers --config.finetune.last_layers=4
"""

from ml_collections import ConfigDict

from neo_jax.experiments import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.task = "finetune"
    # A third more arithmetic, and a fraction of the memory; "none" where there is enough.
    config.model.remat = "full"

    config.data.source = "data/mine.txt"
    config.data.seq_len = 1024
    config.data.batch_size = 8

    config.train.num_steps = 1000
    config.optimizer.learning_rate = 0.0  # by the model's size
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.01

    config.eval.every = 100
    config.eval.sample_tokens = 200
    config.checkpoint.every = 100
    config.finetune.patience = 4
    config.finetune.export = "hf"
    return config
