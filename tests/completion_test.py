"""Completion: what may come next on a `neo-jax` command line, and the shells' scripts."""

import importlib
import os
import pathlib
import re
import subprocess
import sys

import pytest

from neo_jax import cli, completion, config


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], ["train"]),
        (["do"], ["doctor"]),
        (["train", "--conf"], ["--config"]),
        (["train", "--config", "cpu_s"], ["cpu_smoke"]),
        (["train", "--config", "cpu_smoke", "--w"], ["--workdir"]),
        (["convert", "--ver"], ["--verify"]),
        (["generate", "--max"], ["--max_new_tokens"]),
        (["checkpoint", "p"], ["prune"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["train", "runs/"], []),  # the shell's own files
        (["checkpoint", "prune", "runs/"], []),
        (["no_such_verb", "--x"], []),
    ],
)
def test_what_may_come_next(words: list[str], expected: list[str]) -> None:
    assert completion.candidates(words, cli.VERBS) == expected


def test_every_verb_and_every_experiment_is_offered() -> None:
    assert completion.candidates([""], cli.VERBS) == [*cli.VERBS, "completion"]
    assert completion.experiments() == config.experiment_names()


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_verbs_options_are_those_of_its_help(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read from the source, some of them from loops over tables."""
    module = importlib.import_module(cli.VERBS[verb][0])
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{module.__name__}.__main__")
    told = ""
    # The checkpoint command has verbs of its own.
    for words in [[], *([word] for word in completion.candidates([verb, ""], cli.VERBS))]:
        with pytest.raises(SystemExit):
            module.main([*words, "--help"])
        told += capsys.readouterr().out
    declared = set(re.findall(r"(?m)^  (?:-\w, )?(--[a-z][a-z0-9_]*)(?![\w.])", told))
    assert set(completion.options(cli.VERBS[verb][0])) == declared - {"--help"}
    assert len(declared) > 1


def test_bash_completes(tmp_path: pathlib.Path) -> None:
    """The printed script, in a real shell, with the command that it asks."""
    root = pathlib.Path(cli.__file__).parents[1]
    command = tmp_path / "neo-jax"
    command.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "from neo_jax.cli import main; main()" "$@"\n'
    )
    command.chmod(0o755)
    script = (
        'eval "$(neo-jax completion bash)"; COMP_WORDS=(neo-jax train --config cpu_s); '
        'COMP_CWORD=3; _neo_jax; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHONPATH": str(root),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "cpu_smoke\n"


def test_a_shell_that_nobody_knows() -> None:
    with pytest.raises(SystemExit) as exit_:
        completion.main(["tcsh"], cli.VERBS)
    assert exit_.value.code == (
        "neo-jax completion: name a shell, bash, zsh, fish; not ['tcsh']."
    )


def test_completing_imports_neither_jax_nor_any_room() -> None:
    code = (
        "import sys; from neo_jax import cli, completion; "
        "completion.candidates(['train', '--config', ''], cli.VERBS); "
        "completion.candidates(['convert', '--'], cli.VERBS); "
        "print(*[m for m in sys.modules if m.startswith(('jax', 'neo_jax.'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["neo_jax.completion", "neo_jax.cli"]
