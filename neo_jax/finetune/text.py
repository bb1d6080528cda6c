"""Tuning a language model on text or instructions.

Enters: `task = "finetune"`, a checkpoint, and any source of data/sources.py. Instructions
(`data.record_format = "instruction"`) are learned from their answers alone. Leaves: what
pre-training leaves, and the best checkpoint by held-out loss.
"""

from __future__ import annotations

import pathlib

from neo_jax import run as run_lib
from neo_jax.config import Config
from neo_jax.finetune.tuning import Tuning
from neo_jax.pretrain import Pretraining


def run(config: Config, workdir: pathlib.Path) -> None:
    """Tunes, evaluates and samples; resumes as pre-training does. Raises as `run.start`."""
    run_lib.start(TextTuning, config, workdir)


class TextTuning(Tuning, Pretraining):
    """Pre-training's text and judgement, from a trained model."""
