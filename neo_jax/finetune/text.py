"""Tuning a language model on text or instructions.

Enters: `task = "finetune"`, a checkpoint, and any source of data/sources.py. Instructions
(`data.record_format = "instruction"`) are learned from their answers alone. Leaves: what
pre-training leaves, and the best checkpoint by held-out loss.
"""

from __future__ import annotations

import pathlib

from neo_jax import run as run_lib
from neo_jax.config import Config
from neo_jax.data.pipeline import Pipeline
from neo_jax.finetune.tuning import Tuning
from neo_jax.pretrain import Pretraining


def run(config: Config, workdir: pathlib.Path) -> None:
    """Tunes, evaluates and samples; resumes as pre-training does. Raises as `run.start`."""
    run_lib.start(TextTuning, config, workdir)


class TextTuning(Tuning, Pretraining):
    """Pre-training's text and judgement, from a trained model."""

    def describe_data(self) -> str:
        """See `Run`."""
        return super().describe_data() + cut_records(self.config, self.data)


def cut_records(config: Config, data: Pipeline) -> str:
    """A warning of instructions that no row holds whole; empty where there are none."""
    if config.data.record_format != "instruction":
        return ""
    lengths = data.document_lengths().values()
    count = sum(int((tokens > config.data.seq_len).sum()) for tokens in lengths)
    return (
        f"; {count:,} records are longer than data.seq_len={config.data.seq_len}, and what is "
        f"cut off is learned without its prompt"
        if count
        else ""
    )
