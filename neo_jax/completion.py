"""What makes a shell complete `neo-jax`: verbs, their options, experiments by name.

Enters: the words of a command line so far. Leaves: words that may come next, in a tenth of a
second: options are read from the source of a verb's module, since running it would import JAX.
"""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence

_USAGE = """\
usage: neo-jax completion bash|zsh|fish

Prints a script for the shell:
  bash: echo 'eval "$(neo-jax completion bash)"' >>~/.bashrc
  zsh:  echo 'eval "$(neo-jax completion zsh)"' >>~/.zshrc
  fish: neo-jax completion fish >~/.config/fish/completions/neo-jax.fish\
"""

# Each asks `neo-jax completion -- WORDS…`, the last word being the one under the cursor, and
# leaves files to the shell where the answer is empty.
SCRIPTS = {
    "bash": """\
_neo_jax() {
  local word
  COMPREPLY=()
  while read -r word; do COMPREPLY+=("$word"); done \\
    < <(neo-jax completion -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -o bashdefault -o default -F _neo_jax neo-jax""",
    "zsh": """\
_neo_jax() {
  local -a found
  found=("${(@f)$(neo-jax completion -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
  if [[ -n "${found[1]}" ]]; then compadd -- "${found[@]}"; else _files; fi
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _neo_jax neo-jax""",
    "fish": """\
function __neo_jax
    neo-jax completion -- (commandline -opc)[2..] (commandline -ct) 2>/dev/null
end
complete -c neo-jax -a '(__neo_jax)'""",
}


def main(arguments: Sequence[str], verbs: Mapping[str, tuple[str, str]]) -> None:
    """Prints a shell's script, or what may come next.

    Args:
      arguments: a shell's name; or `--` and the words after `neo-jax`.
      verbs: as `cli.VERBS`.

    Raises:
      SystemExit: neither; with one line.
    """
    if arguments[:1] == ["--"]:
        print("\n".join(candidates(arguments[1:], verbs)))
    elif len(arguments) == 1 and arguments[0] in SCRIPTS:
        print(SCRIPTS[arguments[0]])
    elif arguments in (["--help"], ["-h"]):
        print(_USAGE)
    else:
        sys.exit(f"neo-jax completion: name a shell, {', '.join(SCRIPTS)}; not {arguments}.")


def candidates(words: Sequence[str], verbs: Mapping[str, tuple[str, str]]) -> list[str]:
    """What the last of `words` may become; empty where a file may stand there."""
    *before, last = words or [""]
    if not before:
        found = [*verbs, "completion"]
    elif before[0] == "completion":
        found = list(SCRIPTS)
    elif before[0] not in verbs:
        return []
    elif before[-1] == "--config":
        found = experiments()
    elif last.startswith("-"):
        found = options(verbs[before[0]][0])
    elif len(before) == 1:
        found = re.findall(r"""\bverb\(["'](\w+)["']""", _source(verbs[before[0]][0]))
    else:
        return []
    return [word for word in found if word.startswith(last)]


def options(module: str) -> list[str]:
    """The long options that a command's source declares."""
    source = _source(module)
    found = set(re.findall(r"""["'](--[a-z][a-z0-9_]*)["']""", source))
    return sorted(found | _declared_together(ast.parse(source)))


def _source(module: str) -> str:
    """Of a command; empty where there is no such module."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    origin = pathlib.Path(spec.origin)
    # A package's command stands in __main__.py.
    if origin.name == "__init__.py":
        origin = origin.with_name("__main__.py")
    return origin.read_text()


def _declared_together(tree: ast.Module) -> set[str]:
    """Options that a loop or a function declares, as in `add_argument(f"--{name}")`.

    `name` is a constant of the module, goes through a tuple or a table of the module, or is
    looked up in such a table.
    """
    constants: dict[str, list[str]] = {}
    for line in tree.body:
        if isinstance(line, ast.Assign | ast.AnnAssign) and line.value is not None:
            target = line.targets[0] if isinstance(line, ast.Assign) else line.target
            constants[ast.unparse(target)] = _first_words(line.value)
    # Where a variable's values come from: the name of a constant, or a tuple in its place.
    values = {name: list(words) for name, words in constants.items()}
    for node in ast.walk(tree):
        if isinstance(node, ast.For):
            name = ast.unparse(node.target).strip("()").split(",")[0]
            table = ast.unparse(node.iter).removesuffix(".items()")
            values.setdefault(name, []).extend(constants.get(table) or _first_words(node.iter))
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) in constants:
            name, table = ast.unparse(node.slice), ast.unparse(node.value)
            values.setdefault(name, []).extend(constants[table])
    return {
        f"--{value}"
        for name in re.findall(r"""add_argument\(f["']--\{(\w+)\}""", ast.unparse(tree))
        for value in values.get(name, [])
    }


def _first_words(node: ast.expr) -> list[str]:
    """The string itself, a table's keys, or what each entry of a tuple begins with."""
    if isinstance(node, ast.Tuple):
        return [word for entry in node.elts for word in _first_words(entry)[:1]]
    keys = node.keys if isinstance(node, ast.Dict) else [node]
    return [k.value for k in keys if isinstance(k, ast.Constant) and isinstance(k.value, str)]


def experiments() -> list[str]:
    """Names that `--config` takes, without running any."""
    package = pathlib.Path(__file__).parent
    installed = package / "experiments"
    folder = installed if installed.is_dir() else package.parent / "experiments"
    return sorted(p.stem for p in folder.glob("*.py") if p.stem not in ("__init__", "base"))
