"""Text from a model: caches, rules, the compiled loop, and many requests through it.

Read cache.py, sampling.py and decode.py for how a token comes about; generator.py brings
requests to them, options.py says what may be asked.
"""

from neo_jax.generate.generator import (
    Generator,
    NotFiniteError,
    Stream,
    Written,
)
from neo_jax.generate.options import Options, from_keywords
from neo_jax.generate.requests import eos_id, power_of_two

__all__ = [
    "Generator",
    "NotFiniteError",
    "Options",
    "Stream",
    "Written",
    "eos_id",
    "from_keywords",
    "power_of_two",
]
