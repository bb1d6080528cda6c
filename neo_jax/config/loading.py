"""Experiments by name or path: Python files with a `get_config()`."""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

from neo_jax.config.building import build, override, plain
from neo_jax.config.errors import ConfigError, did_you_mean
from neo_jax.config.whole import Config


def load_experiment(name_or_path: str, overrides: Iterable[str] = ()) -> Config:
    """Runs an experiment's `get_config()` and applies `section.key=value` overrides.

    Args:
      name_or_path: a Python file, or the bare name of an experiment that comes with neo_jax.
      overrides: strings such as `optimizer.learning_rate=3e-4`.

    Raises:
      ConfigError: no such file or name, no `get_config` in it, a mistake in it, or a bad
        override.
    """
    with _told_in_one_line(name_or_path):
        tree = plain(_experiment_module(name_or_path).get_config())
    for text in overrides:
        override(tree, text)
    return build(tree)


def experiment_names() -> list[str]:
    """Names that `load_experiment` knows without a path."""
    folder = _experiments_folder()
    return sorted(p.stem for p in folder.glob("*.py") if p.stem not in ("__init__", "base"))


@contextlib.contextmanager
def _told_in_one_line(name_or_path: str) -> Iterator[None]:
    """Whatever an experiment raises, as a ConfigError that names the experiment."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        reason: Any = error
        while isinstance(reason, (AttributeError, KeyError)) and reason.args:
            reason = reason.args[0]  # as ml_collections wraps what it has to say
        line = " ".join(f"{kind}{reason}".split())
        raise ConfigError(f"--config {name_or_path}: {line}") from error


def _experiments_folder() -> pathlib.Path:
    """`neo_jax/experiments` in an installed wheel, `experiments` in a checkout."""
    package = pathlib.Path(__file__).parent.parent
    installed = package / "experiments"
    return installed if installed.is_dir() else package.parent / "experiments"


def _experiment_module(name_or_path: str) -> types.ModuleType:
    folder = _experiments_folder()
    path = pathlib.Path(name_or_path)
    if path.suffix != ".py":
        path = folder / f"{name_or_path}.py"
    if not path.is_file():
        names = experiment_names()
        raise ConfigError(
            f"there is no such file or experiment"
            f"{did_you_mean(path.stem, names) or '; there are ' + ', '.join(names) + '.'}"
        )
    # Experiments say `from neo_jax.experiments import base`, in a checkout as in a wheel.
    if "neo_jax.experiments" not in sys.modules:
        package = types.ModuleType("neo_jax.experiments")
        package.__path__ = [str(folder)]
        sys.modules["neo_jax.experiments"] = package
    spec = importlib.util.spec_from_file_location(f"_experiment_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError("the file defines no get_config().")
    return module
