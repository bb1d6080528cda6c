"""Decoding as the TPU's compiler makes it: caches in their place, products at bandwidth."""

import importlib.util
import pathlib
import sys

import pytest

pytest.importorskip("libtpu")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def benchmark():
    path = pathlib.Path(__file__).parents[1] / "benchmarks" / "generate_tpu.py"
    spec = importlib.util.spec_from_file_location("generate_tpu", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate_tpu"] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def report(name: str, batch: int, step) -> None:
    print(
        f"{name}, {batch} texts: {step.hbm / 2**30:.2f} GiB, {step.seconds * 1e3:.3f} ms "
        f"({step.schedule.seconds * 1e3:.3f} by schedule), {batch / step.seconds:,.0f} "
        f"tokens/s, {step.share:.0%} of the roofline; parts in seconds: {step.schedule.parts}"
    )


def test_caches_stay_in_place(benchmark) -> None:
    """A scatter over rows would take them once more, in another order."""
    step = benchmark.measure("neo_125m", 8, "auto")
    report("neo_125m", 8, step)
    assert step.temporary < 0.2 * step.caches


@pytest.mark.parametrize(("name", "share"), [("neo_1p3b", 0.85), ("neo_2p7b", 0.85)])
def test_a_lone_text_is_read_at_the_chips_bandwidth(benchmark, name, share) -> None:
    """On the vector unit, where XLA leaves a single row, it would be at a quarter of it."""
    step = benchmark.measure(name, 1, "auto")
    report(name, 1, step)
    assert step.share > share
