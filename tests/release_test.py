"""What goes out of the house: versions, archives, workflows, images."""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import tarfile

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
DOCKER = ROOT / "docker"


# ------------------------------------------------------------------------------- versions


def git(folder: pathlib.Path, *words: str) -> None:
    identity = ("-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("tag", "after", "version"),
    [
        ("v1.2.3", 0, r"1\.2\.3"),
        ("v1.2.3", 2, r"1\.2\.4\.dev2\+g\w+"),
        (None, 0, r"0\.1\.1\.dev1\+g\w+"),
    ],
)
def test_the_version_is_that_of_the_tag(tag, after, version, tmp_path):
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    git(tmp_path, "init")
    git(tmp_path, "add", "pyproject.toml")
    git(tmp_path, "commit", "-m", "first")
    if tag:
        git(tmp_path, "tag", tag)
    for number in range(after):
        git(tmp_path, "commit", "--allow-empty", "-m", str(number))
    done = subprocess.run(
        [sys.executable, "-m", "setuptools_scm"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.fullmatch(version, done.stdout.strip())


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="sdists hold what git knows")
def test_a_wheel_comes_out_of_an_sdist_in_an_empty_folder(tmp_path):
    build = (
        "import setuptools.build_meta as m, sys; print(getattr(m, sys.argv[1])(sys.argv[2]))"
    )

    def run(what: str, source: pathlib.Path) -> pathlib.Path:
        subprocess.run(
            [sys.executable, "-c", build, what, str(tmp_path)],
            cwd=source,
            check=True,
            capture_output=True,
        )
        ending = "*.tar.gz" if what == "build_sdist" else "*.whl"
        (path,) = tmp_path.glob(ending)
        return path

    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", "--no-local", str(ROOT), str(clone))
    sdist = run("build_sdist", clone)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / sdist.name.removesuffix(".tar.gz")
    for name in ("LICENSE", "README.md", "experiments/cpu_smoke.py", "tests/conftest.py"):
        assert (source / name).is_file(), name
    wheel = run("build_wheel", source)
    assert wheel.name.split("-")[1] == sdist.name.removesuffix(".tar.gz").split("-")[1]


# ------------------------------------------------------------------------------- workflows


def workflows() -> list[pathlib.Path]:
    return sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", workflows(), ids=lambda p: p.stem)
def test_a_workflow_is_one(path: pathlib.Path) -> None:
    text = path.read_text()
    read = yaml.safe_load(text)
    # YAML 1.1 takes the key "on" for a truth value.
    assert {"name", "jobs", True} <= set(read)
    assert read["permissions"]
    for job in read["jobs"].values():
        assert job["runs-on"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1"))
    # What a pull request says is never put into a command.
    assert "github.event" not in text


def test_the_check_is_the_one_that_developers_run() -> None:
    read = yaml.safe_load((ROOT / ".github" / "workflows" / "check.yml").read_text())
    assert {"run": ".ci/run"} in read["jobs"]["everything"]["steps"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem
)
def test_an_issue_template_is_one(path: pathlib.Path) -> None:
    read = yaml.safe_load(path.read_text())
    if path.stem != "config":
        assert {"name", "description", "body"} <= set(read)
        assert all({"type", "id", "attributes"} <= set(part) for part in read["body"])


def test_the_citation_holds_what_is_needed() -> None:
    read = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "title", "message", "authors", "license"} <= set(read)


# --------------------------------------------------------------------------------- images


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile: (name, the rest), lines joined."""
    text = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def test_the_dockerfile_keeps_hadolints_rules() -> None:
    """Those that concern it, by their numbers in hadolint's list."""
    found = instructions()
    names = [name for name, _ in found]
    for name, rest in found:
        assert name.isupper()  # DL3000 and spelling
        if name == "FROM":
            image = rest.split(" AS ")[0]
            assert ":" in image and not image.endswith(":latest")  # DL3006, DL3007
        if name == "WORKDIR":
            assert rest.startswith("/")  # DL3000
        if name == "RUN":
            assert not re.search(r"\bsudo\b|\bcd ", rest)  # DL3004, DL3003
            assert "pip install" not in rest  # install.sh does, and is looked at below
        if name in ("CMD", "ENTRYPOINT"):
            assert isinstance(yaml.safe_load(rest), list)  # DL3025
        if name == "COPY" and "--from=" in rest:
            assert re.search(r"--from=build\b", rest)  # DL3022
    assert "ADD" not in names and "MAINTAINER" not in names  # DL3020, DL4000
    assert names.count("CMD") == names.count("ENTRYPOINT") == 1  # DL4003, DL4004
    (user,) = (rest for name, rest in found if name == "USER")
    assert user != "root" and names.index("USER") < names.index("CMD")  # DL3002


def test_the_images_installer_is_exact_and_leaves_no_cache() -> None:
    text = (DOCKER / "install.sh").read_text()
    assert "--no-cache-dir" in text  # DL3042
    assert "--constraint requirements/constraints.txt" in text  # DL3013


def test_what_the_image_copies_holds_what_it_installs_from() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for name in ("README.md", "LICENSE", "neo_jax", "experiments", "requirements", "docker"):
        assert name not in ignored
    for name in (".git", ".venv*", "runs"):
        assert name in ignored


def test_compose_names_files_extras_and_commands_that_are_there() -> None:
    read = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    build = read["services"]["train"]["build"]
    context = (DOCKER / build["context"]).resolve()
    assert context == ROOT and (context / build["dockerfile"]).is_file()
    extra = read["services"]["tpu"]["build"]["args"]["EXTRA"]
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
    command = read["services"]["train"]["command"]
    experiment = command[command.index("--config") + 1]
    assert (ROOT / "experiments" / f"{experiment}.py").is_file()


def test_the_installers_steps_are_those_of_a_bare_environment(tmp_path):
    """Run with commands that only write themselves down."""
    said = tmp_path / "said"
    fake = f'#!/bin/sh\necho "$(basename "$0") $*" >>{shlex.quote(str(said))}\n'
    for name in ("bin/python3", "env/bin/pip", "env/bin/neo-jax"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(fake)
        path.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    for extra in ("", "tpu"):
        command = [DOCKER / "install.sh", tmp_path / "env", extra]
        subprocess.run(command, env=environment, check=True)
    lines = said.read_text().splitlines()
    assert lines[0] == f"python3 -m venv {tmp_path}/env"
    assert lines[1].endswith("requirements/constraints.txt .")
    assert lines[4].endswith("requirements/constraints.txt .[tpu]")
