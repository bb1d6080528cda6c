"""Several hosts, of which process 0 drives.

Enters: functions that all hosts must call together, with the same arguments. Leaves: on
process 0 the same functions, which tell the others before they compute; on the others a loop
that does as it is told. So one host alone reads data and talks to a harness. With one process
nothing is sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from neo_jax.evaluate.batching import Request
from neo_jax.evaluate.scoring import Score, Scorer
from neo_jax.language_model import LanguageModel

Result = TypeVar("Result")
Calls = Mapping[str, Callable[..., Any]]


def drive(calls: Calls, body: Callable[[Calls], Result]) -> Result | None:
    """Runs `body` on process 0, whose calls all hosts make.

    Args:
      calls: by name; their arguments are what JSON can hold, with tuples as lists.
      body: gets the functions to call.

    Returns:
      What `body` returns; None on other processes, once it has ended.
    """
    if jax.process_count() == 1:
        return body(calls)
    if jax.process_index() != 0:
        while (message := _broadcast(None)) is not None:
            calls[message[0]](*message[1])
        return None

    def told(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            return calls[name](*_broadcast([name, arguments])[1])

        return call

    try:
        return body({name: told(name) for name in calls})
    finally:
        _broadcast(None)


def calls_of(model: LanguageModel, scorer: Scorer) -> Calls:
    """What evaluations ask of a model: `score` requests, and `write` after prompts."""

    def score(requests: list[Any]) -> list[Score]:
        return scorer.score(model.params, [Request(*request) for request in requests])

    def write(prompts: list[list[int]], options: dict[str, Any]) -> list[list[int]]:
        return [text.token_ids for text in model.generate(prompts, **options)]

    return {"score": score, "write": write}


def _broadcast(message: Any) -> Any:
    """The message of process 0, on every process."""
    data = np.frombuffer(json.dumps(message).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(data), np.int32)))
    # The others know the size only now.
    data = data if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes())
