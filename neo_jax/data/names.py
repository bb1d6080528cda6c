"""Names of sources: what kind they are, where they lie, and the commands that make them.

Enters: a name as `data.source` has it. Leaves: its kind, its location and its options, or one
line about an option that there is not. sources.py lists the kinds.
"""

from __future__ import annotations

import pathlib
import urllib.parse
from collections.abc import Mapping

from neo_jax.config import ConfigError, DataConfig


def parse(name: str) -> tuple[str, str, dict[str, str]]:
    """Kind, location and options of a name; kind is "" for a plain path."""
    kind, colon, rest = name.partition(":")
    if not colon or kind not in ("pile", "tfds", "hf"):
        return "", name, {}
    location, _, query = rest.partition("?")
    options = dict(urllib.parse.parse_qsl(query.replace("+", "%2B")))
    valid = {"pile": ("split", "subsets"), "tfds": ("split",)}.get(
        kind, ("split", "config", "streaming")
    )
    for option in options:
        if option not in valid:
            raise ConfigError(
                f"data source {name!r} has no option {option!r}; there are {', '.join(valid)}."
            )
    return kind, location, options


def subsets(name: str) -> frozenset[str]:
    """The parts of The Pile that a source's name asks for; empty: all there is."""
    kind, _, options = parse(name)
    return subsets_of(options) if kind == "pile" else frozenset()


def subsets_of(options: Mapping[str, str]) -> frozenset[str]:
    """The same of options."""
    return frozenset(filter(None, options.get("subsets", "").split(",")))


def expanded(location: str) -> str:
    """A location with `~` written out; URLs stay as they are."""
    if "://" in location:
        return location.removeprefix("file://").rstrip("/")
    return str(pathlib.Path(location).expanduser())


def pile_tokens(options: Mapping[str, str]) -> str:
    """The folder beside The Pile's files that holds the tokens of a split."""
    split = options.get("split", "train")
    return "tokens" if split == "train" else f"tokens-{split}"


def prepare_command(name: str, config: DataConfig) -> str:
    """The command that tokenises a source once, for a person to copy."""
    kind, location, options = parse(name)
    output = f"{location}/{pile_tokens(options)}" if kind == "pile" else "TOKENS_DIR"
    if kind == "pile":  # all subsets at once; each can then be read by itself
        name = f"pile:{location}" + (
            f"?split={options['split']}" if "split" in options else ""
        )
    words = f"--source '{name}' --tokenizer {config.tokenizer} --output {output}"
    if config.eval_source is not None:
        words += " --holdout_every 0"
    return f"python -m neo_jax.prepare {words}"


def tfds_build_command(name: str) -> str:
    """The command that lets TFDS build one of its own data sets."""
    return f"python -m neo_jax.prepare --build_tfds {parse(name)[1]}"
