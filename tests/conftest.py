"""What every test finds: eight simulated CPU devices, a mesh over them, optional data.

Enters: the environment. Leaves: fixtures `mesh`, `data_folder`, `cloud`. The device count is
a flag that XLA reads once, so it is set here, before any test imports jax.
"""

import os
import pathlib
import sys

import pytest

import children

NUM_DEVICES = 8

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could set XLA_FLAGS.")
# What the environment says comes last, and wins.
os.environ["XLA_FLAGS"] = (
    f"{children.xla_flags(NUM_DEVICES)} {os.environ.get('XLA_FLAGS', '')}".strip()
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis  # noqa: E402
import jaxtyping  # noqa: E402

import pod_scripts  # noqa: E402

# Shapes and types at public doors are enforced in tests, and only there. config/ is left
# out: it takes whatever a user wrote, and its own words about a wrong type are under test.
_PACKAGE = pathlib.Path(__file__).parents[1] / "neo_jax"
jaxtyping.install_import_hook(
    [
        f"neo_jax.{room.stem}"
        for room in sorted(_PACKAGE.iterdir())
        if room.stem not in ("__init__", "__pycache__", "config", "experiments", "py")
    ],
    # An int may stand for a float, as it may for mypy.
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

# No deadline: compiling takes as long as it takes. Derandomised: a red run can be repeated.
hypothesis.settings.register_profile("neo_jax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("neo_jax")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves tests marked `slow` out, unless `-m` says otherwise."""
    if config.option.markexpr:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow and not all(_named(config, item) for item in slow):
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def _named(config: pytest.Config, item: pytest.Item) -> bool:
    """Whether the command line names this very test, as `tests/x_test.py::test_y`."""
    return any("::" in argument and item.name in argument for argument in config.args)


@pytest.fixture
def mesh():
    """Eight CPU devices as data 2 × fsdp 2 × tensor 2 × context 1."""
    from neo_jax import config, sharding

    return sharding.make_mesh(config.MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="session")
def data_folder() -> pathlib.Path:
    """The optional folder of benchmark files and samples; tests skip where it is absent."""
    beside = pathlib.Path(__file__).parents[1].parent / "shared" / "data"
    folder = pathlib.Path(os.environ.get("NEO_JAX_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}; NEO_JAX_DATA names another folder")
    return folder


@pytest.fixture
def cloud(tmp_path: pathlib.Path) -> pod_scripts.Cloud:
    """A cloud without pods, for the scripts in tpu_scripts/."""
    return pod_scripts.Cloud(tmp_path)
