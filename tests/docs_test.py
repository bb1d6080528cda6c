"""The documentation: links lead somewhere, and every command and setting in it exists."""

import ast
import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

from neo_jax import cli
from neo_jax import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
NOTED = {"decisions.md", "lab_log.md"}  # tell how things were, which may be gone

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: pathlib.Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def prose(page: pathlib.Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: pathlib.Path) -> list[str]:
    """Lines of a shell, those that go on joined."""
    text = "\n".join(blocks(page, "sh", "bash")).replace("\\\n", " ")
    return [re.sub(r"\s+#.*$", "", line).strip() for line in text.splitlines()]


def anchors(page: pathlib.Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings]
    return {re.sub(r"[\s-]+", "-", heading) for heading in plain}


@each_page
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if anchor:
            assert anchor in anchors(other), target


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CONTRIBUTING.md"])
def test_what_the_site_takes_in_from_elsewhere_links_to_nothing_beside_it(name: str) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text())
    assert all(target.startswith("http") for target in targets), targets


@each_page
def test_python_is_python(page: pathlib.Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)


@each_page
def test_commands_exist(page: pathlib.Path) -> None:
    """Modules, verbs and their options, targets of make, scripts and their options."""
    targets = set(
        re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    )
    for line in commands(page):
        if match := re.search(r"python -m (neo_jax[.\w]*)(.*)", line):
            check_options(match[1], match[2])
        elif match := re.match(r"(?:\S+/)?neo-jax (\w+)(.*)", line):
            if match[1] != "completion":
                check_options(cli.VERBS[match[1]][0], match[2])
        elif match := re.match(r"make (.*)", line):
            named = re.findall(
                r"(?<![\w=\"-])[a-z][a-z-]*(?![\w=\"])", match[1].split("ARGS")[0]
            )
            assert set(named) <= targets, line
        elif match := re.match(r"((?:tpu_scripts|docker|\.ci)/\S+)(.*)", line):
            script = ROOT / match[1]
            assert os.access(script, os.X_OK), line
            check_text(script.read_text() + library(), match[2])


def check_options(module: str, words: str) -> None:
    assert importlib.util.find_spec(module) is not None, module
    check_text(source_of(module), words)
    for key in re.findall(r"--config\.([\w.]+)[= ]", words):
        # --config.model=neo_2p7b is a whole section.
        assert key in settings() or key == "model", f"--config.{key}"


def check_text(text: str, words: str) -> None:
    """Options must occur in a command's source, whole, or as the name of a setting there."""
    for option in re.findall(r"(?<!\S)(--[a-z][a-z_]*)(?=[\s=]|$)", words):
        name = option.removeprefix("--")
        assert re.search(rf"{option}\b|[\"']{name}[\"']", text), option


@functools.cache
def source_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    origin = pathlib.Path(spec.origin)
    files = origin.parent.glob("*.py") if origin.name == "__init__.py" else [origin]
    return "\n".join(file.read_text() for file in files)


def library() -> str:
    return (ROOT / "tpu_scripts" / "lib.sh").read_text()


@functools.cache
def settings() -> set[str]:
    flat = set()
    for section, values in config_lib.default_config().to_dict().items():
        flat |= (
            {f"{section}.{key}" for key in values} if isinstance(values, dict) else {section}
        )
    return flat


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in NOTED], ids=lambda page: page.name
)
def test_settings_named_in_prose_exist(page: pathlib.Path) -> None:
    """Such as `train.seed`: a section of the config, a point, a key."""
    sections = "|".join({key.split(".")[0] for key in settings() if "." in key})
    for name in re.findall(rf"`(?:--config\.)?((?:{sections})\.[a-z_]+)[`=]", prose(page)):
        section, key = name.split(".")
        is_file = key in ("py", "json", "jsonl", "md", "png")
        assert name in settings() or is_file or is_function(section, key), name


def is_function(room: str, name: str) -> bool:
    """Such as `checkpoint.restore_params`: some rooms are called like a section.

    `model.logits` and the like are of the model that `neo_jax.load` gives.
    """
    room = "pretrained" if room == "model" else room
    if importlib.util.find_spec(f"neo_jax.{room}") is None:
        return False
    text = source_of(f"neo_jax.{room}")
    return (
        re.search(rf"\b(def|class|import) .*\b{name}\b|^    {name}: ", text, re.M) is not None
    )


def test_the_site_names_only_pages_that_exist() -> None:
    named = re.findall(
        r"^\s+- .*: (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE
    )
    assert len(named) > 10
    assert all((ROOT / "docs" / name).is_file() for name in named)


def test_the_pods_page_computes_what_it_says() -> None:
    page = ROOT / "docs" / "pods.md"
    (code,) = re.findall(r'python -c "\n(.*?)"\n', page.read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert f"```text\n{done.stdout}```" in page.read_text()
    # It fills in what the table above it predicts.
    predicted = re.findall(
        r"^\| (v\S+) .*? ([\d,]+) \| [\d.]+ % /", page.read_text(), re.MULTILINE
    )
    assert dict(re.findall(r"'(v\S+)', \d+, (\d+)", code)) == {
        pod: speed.replace(",", "") for pod, speed in predicted
    }


@pytest.mark.slow
@pytest.mark.skipif(
    None in map(importlib.util.find_spec, ("material", "mkdocstrings")),
    reason="the extra docs is not installed",
)
def test_the_site_builds_without_a_warning(tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Capture" not in done.stderr and (tmp_path / "pods" / "index.html").is_file()
    # What a docstring says is on the page.
    reference = (tmp_path / "reference" / "index.html").read_text()
    assert "from a workdir, a directory of any kind" in reference
    assert "accumulation_steps" in reference
