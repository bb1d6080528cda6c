"""Tells the notebooks where the repository is: badges, and what they install from.

    python notebooks/badges.py https://github.com/OWNER/NAME

Enters: the repository's address on GitHub. Leaves: the notebooks beside this file, each with
badges below its title that open it in Colab and in Kaggle, where it then installs neo_jax from
that address. Outputs stay; another address takes an earlier one's place.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).parent
_INSTALLED_FROM = re.compile(r'(environ\.get\("NEO_JAX_SOURCE", )"[^"]*"')


def badges(repository: str, name: str) -> str:
    """A line of Markdown for one notebook."""
    path = f"{repository}/blob/main/notebooks/{name}.ipynb"
    colab = path.replace("https://github.com", "https://colab.research.google.com/github")
    colab_badge = "https://colab.research.google.com/assets/colab-badge.svg"
    kaggle_badge = "https://kaggle.com/static/images/open-in-kaggle.svg"
    kaggle = f"https://kaggle.com/kernels/welcome?src={path}"
    return (
        f"[![Open in Colab]({colab_badge})]({colab}) "
        f"[![Open in Kaggle]({kaggle_badge})]({kaggle})\n"
    )


def tell(path: pathlib.Path, repository: str) -> None:
    """Writes the address into one notebook."""
    notebook = json.loads(path.read_text())
    title, *rest = notebook["cells"][0]["source"]
    if rest[:2] and rest[1].startswith("[![Open in Colab]"):
        rest = rest[2:]
    # pretrain_pod runs on a pod of one's own, from the checkout that it copies there.
    line = [] if path.stem == "pretrain_pod" else ["\n", badges(repository, path.stem)]
    notebook["cells"][0]["source"] = [title, *line, *rest]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["source"] = [
                _INSTALLED_FROM.sub(rf'\1"git+{repository}"', text) for text in cell["source"]
            ]
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Runs the command.

    Raises:
      SystemExit: 2 where the address is none of a repository on GitHub.
    """
    parser = argparse.ArgumentParser(
        description="Writes badges that open the notebooks in Colab and Kaggle.",
        epilog="example: python notebooks/badges.py https://github.com/OWNER/NAME",
    )
    parser.add_argument("repository", help="https://github.com/OWNER/NAME")
    repository = parser.parse_args().repository
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", repository):
        print(
            f"badges.py: {repository!r} is no repository; give https://github.com/OWNER/NAME.",
            file=sys.stderr,
        )
        sys.exit(2)
    for path in sorted(HERE.glob("*.ipynb")):
        tell(path, repository)


if __name__ == "__main__":
    main()
