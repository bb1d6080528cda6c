"""The plan of the house, read from its source: no room reaches ahead, no setting idles."""

import ast
import dataclasses
import functools
import graphlib
import importlib
import itertools
import json
import pathlib
import subprocess
import sys
import typing
from collections.abc import Iterator

import pytest

from neo_jax import config as config_lib

PACKAGE = pathlib.Path(config_lib.__file__).parents[1]

# The way through the house. A file imports only from rooms before its own.
WAY = (
    "caches",
    "host_memory",
    "compilation",
    "config",
    "distributed",
    "tokenizer",
    "data",
    "sharding",
    "xla_flags",
    "attention",
    "activations",
    "int8",
    "lora",
    "model",
    "loss",
    "optimizer",
    "trainable",
    "state",
    "checkpoint",
    "metrics",
    "watch",
    "train",
    "diagnose",
    "hf",
    "mtf",
    "generate",
    "language_model",
    "pretrained",
    "evaluate",
    "stablehlo",
    "serve",
    "run",
    "exits",
    "pretrain",
    "finetune",
    "planning",
    "__init__",
    "completion",
    # Commands: from here everything is in reach but each other.
    "plan",
    "convert",
    "prepare",
    "doctor",
    "generate.__main__",
    "finetune.__main__",
    "main",
    "cli",
)
COMMANDS = WAY[WAY.index("plan") :]
# Files that stand and fall with an optional package, which they import at their head.
OPTIONAL = ("neo_jax.evaluate.harness",)


def source_files() -> list[pathlib.Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "experiments" not in p.parts)


def room_of(path: pathlib.Path) -> str:
    """The first step inside the package: neo_jax/data/packing.py is of `data`.

    A folder's `__main__.py` may have a place of its own: it is a command.
    """
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    whole = ".".join(parts)
    return whole if whole in WAY else parts[0]


@functools.cache
def parse(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path: pathlib.Path) -> str:
    parts = ("neo_jax", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# ------------------------------------------------------------------------------- imports


def imported_modules(path: pathlib.Path) -> set[str]:
    """Modules of neo_jax that a file imports, inside functions too, by their full names."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno}: name the package in full."
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if is_module(inner) else str(node.module))
    return {name for name in names if name.split(".")[0] == "neo_jax"}


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("path", source_files(), ids=module_name)
def test_a_file_imports_only_from_rooms_before_its_own(path: pathlib.Path) -> None:
    own = room_of(path)
    assert own in WAY, f"{own} is a new room: give it its place in WAY."
    for name in imported_modules(path):
        room = name.split(".")[1] if "." in name else "__init__"
        if room == own and path.stem != own:
            continue  # files of one room may use each other; cycles are told below
        assert WAY.index(room) < WAY.index(own), f"{own} must not import {name}."
        assert own not in COMMANDS or room not in COMMANDS, f"{own} must not import {name}."


def test_files_of_one_room_do_not_import_each_other_in_a_circle() -> None:
    graph = {module_name(path): imported_modules(path) for path in source_files()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, naming the circle


def test_importing_every_room_reaches_neither_tensorflow_nor_torch() -> None:
    modules = [m for path in source_files() if (m := module_name(path)) not in OPTIONAL]
    code = (
        "import importlib, json, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert set(modules) <= loaded
    assert not loaded & {"tensorflow", "torch", "transformers", "datasets", "lm_eval"}


# ------------------------------------------------------------------------------ settings

SECTIONS = {
    name: kind
    for name, kind in vars(config_lib).items()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind)
}


class Reads(ast.NodeVisitor):
    """Collects the settings that a file reads, as pairs (section, key).

    A section is known where a signature says so (`config: ModelConfig`, also `| None`), and
    from there through `config.model`, `name = config.model`, `self.config = config` and
    enclosing functions. What stands inside a `raise` is not a use. `getattr` with a name
    that is not a constant counts for the keys that the file holds as strings.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.found: set[tuple[str, str]] = set()
        self.scopes: list[dict[str, str]] = [{}]
        tree = parse(path)
        self.strings = {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        self.visit(tree)

    def section(self, node: ast.expr) -> str | None:
        """The section that an expression evaluates to, where that can be told."""
        if isinstance(node, ast.Name | ast.Attribute):
            name = ast.unparse(node)
            for scope in reversed(self.scopes):
                if name in scope:
                    return scope[name]
        if isinstance(node, ast.Attribute) and (outer := self.section(node.value)):
            hint = typing.get_type_hints(SECTIONS[outer]).get(node.attr)
            return hint.__name__ if hint in SECTIONS.values() else None
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).split(".")[-1]
            if name in ("load_experiment", "build", "from_json") and "config" in ast.unparse(
                node.func
            ):
                return "Config"
            return name if name in SECTIONS else None
        return None

    def annotated(self, annotation: ast.expr | None) -> str | None:
        """The section that `ModelConfig`, `config_lib.ModelConfig | None` … name."""
        text = ast.unparse(annotation) if annotation else ""
        names = {part.split(".")[-1].strip("'\" ") for part in text.split("|")}
        return next((name for name in SECTIONS if name in names), None)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        sections = {a.arg: self.annotated(a.annotation) for a in arguments}
        # An argument without a section hides an outer name of the same spelling.
        self.scopes.append({name: section or "" for name, section in sections.items()})
        self.generic_visit(node)
        self.scopes.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        scope: dict[str, str] = {}
        self.scopes.append(scope)
        for inner in ast.walk(node):  # dataclass fields, and self.config: Config
            if isinstance(inner, ast.AnnAssign) and (kind := self.annotated(inner.annotation)):
                scope[f"self.{ast.unparse(inner.target).removeprefix('self.')}"] = kind
        self.generic_visit(node)
        self.scopes.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        targets, values = [node.targets[0]], [node.value]
        if isinstance(targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
            targets, values = targets[0].elts, node.value.elts
        for target, value in zip(targets, values, strict=False):
            if section := self.section(value):
                name = ast.unparse(target)
                # An attribute of self outlives its method: it belongs to the class.
                self.scopes[-2 if name.startswith("self.") else -1][name] = section

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Load) and (section := self.section(node.value)):
            self.found.add((section, node.attr))

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        if ast.unparse(node.func) == "getattr" and (section := self.section(node.args[0])):
            keys = {field.name for field in dataclasses.fields(SECTIONS[section])}
            self.found |= {(section, key) for key in keys & self.strings}


@functools.cache
def reads_of(file: str) -> frozenset[tuple[str, str]]:
    return frozenset(Reads(PACKAGE / file).found)


def all_reads() -> set[tuple[str, str]]:
    files = [p for p in source_files() if room_of(p) != "config"]
    reads = {pair for path in files for pair in reads_of(str(path.relative_to(PACKAGE)))}
    # A property of a section that somebody reads passes on what it reads itself.
    for section, attribute in sorted(reads):
        prop = getattr(SECTIONS[section], attribute, None)
        if isinstance(prop, property):
            reads |= set(property_reads(section, attribute))
    return reads


def property_reads(section: str, name: str) -> Iterator[tuple[str, str]]:
    for node in itertools.chain.from_iterable(
        ast.walk(parse(path)) for path in source_files() if room_of(path) == "config"
    ):
        if isinstance(node, ast.ClassDef) and node.name == section:
            (body,) = (
                f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == name
            )
            for inner in ast.walk(body):
                if isinstance(inner, ast.Attribute) and ast.unparse(inner.value) == "self":
                    yield section, inner.attr


def test_every_setting_has_a_reader() -> None:
    """Every field of every section is read outside config/, where defaults and checks are.

    The reading is found in the source (see `Reads`), so a setting that is only checked,
    printed in an error, or saved with the rest of the config is idle.
    """
    reads = all_reads()
    idle = [
        f"{name}.{field.name}"
        for name, section in SECTIONS.items()
        for field in dataclasses.fields(section)
        if (name, field.name) not in reads
    ]
    assert not idle, f"nobody reads {', '.join(idle)}: use them or delete them."


@pytest.mark.parametrize(
    ("section", "key", "file"),
    [
        ("OptimizerConfig", "learning_rate", "optimizer.py"),
        ("ModelConfig", "num_layers", "model.py"),
    ],
)
def test_a_setting_reaches_its_use_in_two_hops(section: str, key: str, file: str) -> None:
    """From the experiment to the dataclass, from the dataclass to the line that uses it."""
    assert (section, key) in reads_of(file)


def test_the_finder_of_readers_tells_use_from_mention(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "room.py"
    file.write_text(
        "class A:\n"
        "    def __init__(self, config: ModelConfig):\n"
        "        self.config = config\n"
        "        raise ValueError(config.window_size)\n"
        "    def f(self):\n"
        "        return self.config.num_heads\n"
        "def g(config: config_lib.Config, other):\n"
        "    data, n = config.data, 3\n"
        "    def h(config):\n"
        "        return config.task\n"
        "    return data.seq_len + other.batch_size\n"
        "def i(mesh: 'MeshConfig | None' = None):\n"
        "    return [getattr(mesh, name) for name in ('fsdp', 'tensor')]\n"
    )
    assert Reads(file).found == {
        ("ModelConfig", "num_heads"),
        ("Config", "data"),
        ("DataConfig", "seq_len"),
        ("MeshConfig", "fsdp"),
        ("MeshConfig", "tensor"),
    }


# --------------------------------------------------------------------------------- doors


def test_shapes_at_public_doors_are_enforced_in_tests() -> None:
    jaxtyping = importlib.import_module("jaxtyping")
    jnp = importlib.import_module("jax.numpy")
    attention = importlib.import_module("neo_jax.attention")
    heads, three_dims = jnp.zeros((1, 4, 2, 8)), jnp.zeros((1, 4, 16))
    with pytest.raises(jaxtyping.TypeCheckError, match="query"):
        attention.attend(three_dims, heads, heads, window=None)
