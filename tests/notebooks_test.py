"""The notebooks: each runs from top to bottom on a CPU, and is kept with its outputs."""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import types
from typing import Any

import pytest

import children

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
# In the order in which they run: the model that pretrain_tiny leaves is asked and tuned.
NAMES = ("pretrain_tiny", "quickstart", "finetune_lora", "glue", "pretrain_pod")

each = pytest.mark.parametrize("name", NAMES)


def cells(name: str, kind: str) -> list[dict[str, Any]]:
    read = json.loads((FOLDER / f"{name}.ipynb").read_text())
    return [cell for cell in read["cells"] if cell["cell_type"] == kind]


def test_every_notebook_is_looked_at() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@each
def test_it_is_kept_with_its_outputs(name: str) -> None:
    code = cells(name, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs and all(output["output_type"] != "error" for output in outputs)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 300_000


@each
def test_it_tells_before_it_does(name: str) -> None:
    first = "".join(cells(name, "markdown")[0]["source"])
    assert first.startswith("# ") and len(first) > 100


def test_badges_open_it_where_the_repository_is(tmp_path: pathlib.Path) -> None:
    for path in FOLDER.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)

    def tell(address: str) -> str:
        command = [sys.executable, str(tmp_path / "badges.py"), address]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr

    assert tell("https://github.com/they/theirs") == ""
    assert tell("https://github.com/we/ours") == ""  # in place of the other's
    for name in NAMES:
        before = (FOLDER / f"{name}.ipynb").read_text()
        after = (tmp_path / f"{name}.ipynb").read_text()
        page = f"github.com/we/ours/blob/main/notebooks/{name}.ipynb"
        assert after.count(page) == (0 if name == "pretrain_pod" else 1)
        page = page.replace("github.com", "colab.research.google.com/github")
        assert after.count(page) == (0 if name == "pretrain_pod" else 1)
        assert "theirs" not in after
        assert after.count('"git+https://github.com/we/ours') == before.count("NEO_JAX_SOURCE")
        outputs = [cell.get("outputs") for cell in json.loads(after)["cells"]]
        assert outputs == [cell.get("outputs") for cell in json.loads(before)["cells"]]
    told = tell("github.com/we/ours")
    assert "'github.com/we/ours' is no repository" in told and told.count("\n") == 1


def executor() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("nbclient") is None, reason="the extra docs is not installed"
)
def test_they_run_from_top_to_bottom(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEO_JAX_SHORT", "1")
    monkeypatch.setenv("NEO_JAX_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", children.xla_flags())  # one device
    monkeypatch.setenv("PATH", f"{pathlib.Path(sys.executable).parent}:/usr/bin:/bin")
    for name in NAMES:
        notebook = executor().execute(name, tmp_path)
        kinds = {
            key
            for cell in notebook.cells
            for output in cell.get("outputs", [])
            for key in output.get("data", {})
        }
        assert name == "pretrain_pod" or "image/png" in kinds  # a plot
