"""A run that ends in its midst, as a kill would end it: nothing is saved or tidied up."""

import contextlib
from collections.abc import Iterator

import pytest

from neo_jax.metrics import Writer


class Stopped(BaseException):
    """Stands for a machine that goes away."""


@contextlib.contextmanager
def stopped_after(step: int, visit: int = 1) -> Iterator[None]:
    """The run inside ends after a step, at its first or a later visit; it must get there."""
    advance, visits = Writer.advance, []

    def stop(writer: Writer, at: int) -> None:
        advance(writer, at)
        visits.append(at)
        if at == step and visits.count(at) == visit:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "advance", stop)
        with pytest.raises(Stopped):
            yield
