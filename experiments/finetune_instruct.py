"""A trained GPT-Neo learns to answer: instructions with their answers, prompts masked.

Command: python -m neo_jax.main --config finetune_instruct --workdir runs/finetune_instruct \\
        --config.train.init_from=EleutherAI/gpt-neo-125m --config.data.source=mine.jsonl
Data: a record a line, {"prompt", "completion"}, {"messages": [{"role", "content"}, …]} or
Alpaca's {"instruction", "input", "output"}. Answers are learned, and where they end: what
follows an answer is the end-of-text token. Every 20th record is held out. Rows hold several
records, which do not see each other. The learning rate is chosen by the model's size; the run
ends where three evaluations brought nothing better, with the best checkpoint.
Adapters alone, in peft's format in the workdir's folder `peft`:
    python -m neo_jax.main --config finetune_instruct --workdir runs/finetune_instruct_lora \\
        --config.train.init_from=EleutherAI/gpt-neo-1.3B --config.data.source=mine.jsonl \\
        --config.finetune.trainable=lora --config.model.lora_rank=16 \\
        --config.finetune.export=peft
"""

from ml_collections import ConfigDict

from neo_jax.experiments import base

QUESTION = """\
Below is an instruction that describes a task. Write a response that appropriately completes \
the request.

### Instruction:
Name three colours.

### Response:
"""


def get_config() -> ConfigDict:
    config = base.get_config()
    config.task = "finetune"
    # A third more arithmetic, and a fraction of the memory; "none" where there is enough.
    config.model.remat = "full"
    # More of them than of query and value learn what a text should be like.
    config.model.lora_targets = ("query", "key", "value", "out", "up", "down")

    config.data.source = "data/mine.jsonl"
    config.data.record_format = "instruction"
    config.data.packing = "best_fit"
    config.data.isolate_documents = True
    config.data.seq_len = 1024
    config.data.batch_size = 8

    config.train.num_steps = 600
    config.optimizer.learning_rate = 0.0  # by the model's size
    config.optimizer.warmup_steps = 30
    config.optimizer.weight_decay = 0.0

    config.eval.every = 50
    config.eval.prompt = QUESTION  # of the sample at the end
    config.eval.sample_tokens = 60
    config.checkpoint.every = 50
    config.finetune.patience = 3
    config.finetune.export = "hf"
    return config
