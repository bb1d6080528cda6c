"""GPT-Neo in JAX and Flax; begin reading at main.py and config.py."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neo_jax.pretrained import LanguageModel


def load(source: str | os.PathLike[str], **options: Any) -> LanguageModel:
    """A language model: `neo_jax.load("EleutherAI/gpt-neo-125m").logits(ids)`.

    Args and errors as `neo_jax.pretrained.load`.
    """
    from neo_jax import pretrained  # imports JAX, which `import neo_jax` alone need not

    return pretrained.load(source, **options)
