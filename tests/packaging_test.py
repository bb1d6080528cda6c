"""What a user installs: the wheel holds every file, and the console command finds its way."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

from neo_jax import cli

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


KINDS = ("*.py", "py.typed", "*.yaml")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The wheel, built offline from a copy of what the checkout holds."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("neo_jax", "experiments"):
        for file in [f for kind in KINDS for f in (ROOT / folder).rglob(kind)]:
            (source / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            (source / file.relative_to(ROOT)).write_bytes(file.read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
    ]
    subprocess.run([*pip, "--no-index", "--wheel-dir", str(out), str(source)], check=True)
    (path,) = out.glob("neo_jax-*.whl")
    return path


def test_the_wheel_holds_every_room_and_experiment_and_nothing_else(
    wheel: pathlib.Path,
) -> None:
    expected = {"neo_jax/py.typed"}
    for file in (ROOT / "neo_jax").rglob("*.py"):
        expected.add(file.relative_to(ROOT).as_posix())
    for file in (ROOT / "neo_jax/evaluate/harness_tasks").glob("*.yaml"):
        expected.add(file.relative_to(ROOT).as_posix())
    for file in (ROOT / "experiments").glob("*.py"):
        expected.add(f"neo_jax/experiments/{file.name}")
    assert wheel.name.startswith("neo_jax-0.1.0-")  # the fallback: the copy has no git
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_installed_wheel_finds_experiments_by_name_from_anywhere(
    wheel: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere.mkdir()
    code = (
        "import json\n"
        "from neo_jax import config\n"
        "names = config.experiment_names()\n"
        "for name in names: config.load_experiment(name)\n"
        "print(json.dumps([config.__file__, names]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    file, names = json.loads(done.stdout)
    assert pathlib.Path(file).is_relative_to(site)
    assert "cpu_smoke" in names


# Imported only where a setting asks for them.
OPTIONAL = {
    "datasets",
    "flatbuffers",
    "libtpu",
    "lm_eval",
    "scipy",
    "sklearn",
    "tensorflow",
    "torch",
    "wandb",
}


def test_every_dependency_is_used_and_everything_used_is_a_dependency() -> None:
    """Of the core; the extras serve tests and machines."""
    used = set()
    for folder in ("neo_jax", "experiments"):
        for file in (ROOT / folder).rglob("*.py"):
            used |= used_packages(ast.parse(file.read_text(encoding="utf-8")))
    used -= sys.stdlib_module_names | {"flatbuffers", "neo_jax"} | OPTIONAL
    owners = importlib.metadata.packages_distributions()
    needed = {normal(owners.get(name, [name])[0]) for name in used}
    declared = {normal(re.split(r"[><=\[]", d)[0]) for d in PROJECT["project"]["dependencies"]}
    assert declared == needed


def used_packages(tree: ast.Module) -> set[str]:
    """Top-level names of what is imported, or found on disk without an import."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            (".find_spec", ".distribution")
        ):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return names


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_its_module(verb: str) -> None:
    module, _ = cli.VERBS[verb]
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "neo-jax: 'trian' is not a verb; did you mean 'train'?"),
        ([], "neo-jax: '' is not a verb; there are train"),
    ],
)
def test_a_wrong_verb_is_told_in_one_line(
    arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["neo-jax", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert str(exit_.value.code).startswith(line)
    assert "\n" not in str(exit_.value.code)


def test_a_verb_hands_its_arguments_to_its_module(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "echo_verb.py").write_text("import sys\nprint(__name__, *sys.argv[1:])\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.VERBS, "echo", ("echo_verb", "say it again"))
    monkeypatch.setattr(sys, "argv", ["neo-jax", "echo", "--one", "two"])
    cli.main()
    assert capsys.readouterr().out == "__main__ --one two\n"


def test_help_lists_every_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["neo-jax", "--help"])
    cli.main()
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in cli.VERBS)
