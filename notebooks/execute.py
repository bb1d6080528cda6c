"""Executes notebooks from top to bottom, in the order given, and keeps their outputs.

    python notebooks/execute.py pretrain_tiny quickstart pretrain_pod

Enters: names of notebooks beside this file, and the environment variables that they read
(NEO_JAX_SHORT, NEO_JAX_RUNS, NEO_JAX_MODEL, NEO_JAX_GLUE). Leaves: the same files with new
outputs. A cell that fails ends it with the cell's error. Needs the extra `docs`.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import tempfile

import nbclient
import nbformat

HERE = pathlib.Path(__file__).parent


def execute(name: str, folder: pathlib.Path) -> nbformat.NotebookNode:
    """A notebook with outputs; its cells run in `folder`."""
    notebook = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
    # The kernel starts elsewhere, and finds the checkout nevertheless.
    os.environ.setdefault("NEO_JAX_CHECKOUT", str(HERE.parent))
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    client = nbclient.NotebookClient(
        notebook,
        timeout=3600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                text = last_states(output.text).replace(str(folder), ".")
                output.text = re.sub(r"/tmp/tmp\.\w+/", "", text)  # setup.sh's own
    return notebook


def last_states(text: str) -> str:
    """What a terminal would show at the end: a bar overwrites itself."""
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", "\n".join(lines))


def main() -> None:
    """Runs the command.

    Raises:
      SystemExit: 2 where no such notebook is there.
    """
    parser = argparse.ArgumentParser(
        description="Executes notebooks from top to bottom, and keeps their outputs.",
        epilog="example: python notebooks/execute.py pretrain_tiny quickstart finetune_lora",
    )
    there = sorted(path.stem for path in HERE.glob("*.ipynb"))
    parser.add_argument(
        "names", nargs="+", metavar="NAME", choices=there, help=f"of {', '.join(there)}"
    )
    names = parser.parse_args().names
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("NEO_JAX_RUNS", os.path.join(folder, "runs"))
        for name in names:
            notebook = execute(name, pathlib.Path(folder))
            nbformat.write(notebook, HERE / f"{name}.ipynb")
            print(f"{name}: executed")


if __name__ == "__main__":
    main()
