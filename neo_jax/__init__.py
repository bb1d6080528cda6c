"""GPT-Neo in JAX and Flax; begin reading at main.py and config/."""

from __future__ import annotations

import importlib.util
import os
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neo_jax.language_model import LanguageModel


def load(source: str | os.PathLike[str], **options: Any) -> LanguageModel:
    """A language model: `neo_jax.load("EleutherAI/gpt-neo-125m").logits(ids)`.

    Args and errors as `neo_jax.pretrained.load`.
    """
    from neo_jax import pretrained  # imports JAX, which `import neo_jax` alone need not

    return pretrained.load(source, **options)


def _has_tpu() -> bool:
    """Whether a chip of Google's is on this machine's bus; looked up as JAX does."""
    vendors = pathlib.Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(path.read_text().strip() == "0x1ae0" for path in vendors)


# The TPU compiler, installed for `neo-jax plan` on a machine without a TPU, complains on every
# start of JAX that it was not told whose host it is. These answers keep it quiet; JAX then
# finds no chip and goes on to the next backend.
if importlib.util.find_spec("libtpu") is not None and not _has_tpu():
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip to quarrel over
