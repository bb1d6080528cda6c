"""From a ConfigDict, JSON or the command line to a `Config` that is complete and checked."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from neo_jax.config.errors import ConfigError, did_you_mean
from neo_jax.config.model import ModelConfig
from neo_jax.config.presets import MESH_PRESETS, PRESETS
from neo_jax.config.training import MeshConfig
from neo_jax.config.whole import Config


def default_config() -> ConfigDict:
    """Every key with its default, for an experiment to change.

    Returns:
      A ConfigDict with the sections of `Config`. Assigning a wrong key or type is told by
      `build`, where a whole line can say what was meant.
    """
    sections = {
        field.name: _defaults(field.default_factory)  # type: ignore[arg-type]
        for field in dataclasses.fields(Config)
        if field.default_factory is not dataclasses.MISSING
    }
    return ConfigDict({"task": Config.task, **sections}, type_safe=False)


def build(config: Mapping[str, Any] | ConfigDict) -> Config:
    """Checks a ConfigDict, key by key, and freezes it.

    Args:
      config: sections of keys, as `default_config` returns; missing keys take defaults.
        `model` and `mesh` may be the name of a preset.

    Raises:
      ConfigError: an unknown key, a wrong type or a contradiction; one line.
    """
    tree = plain(config)
    for section in ("model", "mesh"):
        if isinstance(tree.get(section), str):
            tree[section] = _preset_of(section, tree[section])
    return _build(Config, tree, "")


def to_json(config: Config) -> str:
    """The resolved config as the text of `config.json`."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """The inverse of `to_json`.

    Raises:
      ConfigError: `text` is no JSON object, or not of this config's keys and types.
    """
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the config is not valid JSON: {error}.") from None
    return build(tree)


def mesh_preset(name: str) -> ConfigDict:
    """The `mesh` section of that name, complete and open to change.

    Raises:
      ConfigError: no preset has that name.
    """
    if name not in MESH_PRESETS:
        raise ConfigError(
            f"mesh preset {name!r} is unknown{did_you_mean(name, MESH_PRESETS)}; "
            f"there are {', '.join(MESH_PRESETS)}."
        )
    return ConfigDict({**_defaults(MeshConfig), **MESH_PRESETS[name]}, type_safe=False)


def preset(name: str) -> ConfigDict:
    """The `model` section of a released shape, complete and open to change.

    Raises:
      ConfigError: no preset has that name.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"model preset {name!r} is unknown{did_you_mean(name, PRESETS)}; "
            f"there are {', '.join(PRESETS)}."
        )
    return ConfigDict({**_defaults(ModelConfig), **PRESETS[name]}, type_safe=False)


def preset_model(name: str, **changes: Any) -> ModelConfig:
    """`preset` as a finished dataclass: `preset_model("neo_125m", num_layers=2)`."""
    return _build(ModelConfig, {**preset(name).to_dict(), **changes}, "model")


def override(tree: dict[str, Any], text: str) -> None:
    """Applies one `section.key=value` in place."""
    path, equals, raw = text.partition("=")
    if not equals:
        raise ConfigError(f"override {text!r} has no value; write --config.{path}=VALUE.")
    *parents, key = path.split(".")
    hints: dict[str, Any] = _hints(Config)
    node = tree
    for i, parent in enumerate(parents):
        if not dataclasses.is_dataclass(hints.get(parent)):
            raise ConfigError(_unknown_key(".".join(parents[: i + 1]), parent, hints))
        hints = _hints(hints[parent])
        inner = node.setdefault(parent, {})
        if isinstance(inner, str):  # a preset's name
            node[parent] = inner = _preset_of(parent, inner)
        node = inner
    if key not in hints:
        raise ConfigError(_unknown_key(path, key, hints))
    # Text stays text, also where it looks like something else: data.eval_source=2020,
    # model.remat=none.
    value = _literal(raw)
    hint = hints[key]
    names = typing.get_origin(hint) is Literal and raw in typing.get_args(
        hint
    )  # as model.remat=none
    is_text = hint is str or names or (hint == str | None and value is not None)
    if path in ("model", "mesh"):  # a preset's name
        is_text = True
    node[key] = raw if is_text else value


def _preset_of(section: str, name: str) -> dict[str, Any]:
    return (mesh_preset if section == "mesh" else preset)(name).to_dict()


def plain(config: Any) -> dict[str, Any]:
    """Nested dicts of a ConfigDict, or of a mapping as it is."""
    if isinstance(config, ConfigDict):
        return config.to_dict()
    if isinstance(config, Mapping):
        return dict(config)
    raise ConfigError(f"a config must be a ConfigDict, not {config!r}.")


def _defaults(section: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(section)}


@functools.cache
def _hints(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


def _build(section: type, tree: Mapping[str, Any], path: str) -> Any:
    hints = _hints(section)
    values = {}
    for key, value in tree.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in hints:
            raise ConfigError(_unknown_key(full, str(key), hints))
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{full}={value!r} must be a section of keys.")
            values[key] = _build(hints[key], value, full)
        else:
            values[key] = _coerce(value, hints[key], full)
    return section(**values)


def _unknown_key(full: str, key: str, valid: Iterable[str]) -> str:
    section = full.removesuffix(key)
    # The very key in another section is a likelier slip than a misspelling.
    meant = [
        f"{name}.{key}"
        for name, hint in _hints(Config).items()
        if dataclasses.is_dataclass(hint) and key in _hints(hint)  # type: ignore[arg-type]
    ] or [
        section + near for near in difflib.get_close_matches(key, list(valid), n=1, cutoff=0.5)
    ]
    if meant:
        return f"config has no key {full!r}, did you mean {meant[0]!r}?"
    return f"config has no key {full!r}; there are {', '.join(valid)}."


def _coerce(value: Any, hint: Any, path: str) -> Any:
    """`value` as `hint` asks, or a ConfigError; ints pass as floats, whole floats as ints."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        raise ConfigError(
            f"{path}={value!r} is not one of {', '.join(choices)}"
            f"{did_you_mean(value, choices) or '.'}"
        )
    if origin is types.UnionType:
        if value is None:
            return None
        (inner,) = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return _coerce(value, inner, path)
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            return _tuples(value)
        raise ConfigError(f"{path}={value!r} must be a list, as in \"['one', 'two']\".")
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{path}={value!r} must be a finite number.")
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{path}={value!r} must be of type {hint.__name__}.")


def _tuples(value: Any) -> Any:
    """Lists, as JSON and command lines have them, as tuples, at every depth."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _literal(raw: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if raw.lower() in words:
        return words[raw.lower()]
    try:
        return ast.literal_eval(raw)
    except (ValueError, SyntaxError):
        return raw
