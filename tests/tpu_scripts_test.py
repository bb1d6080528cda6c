"""What every script for pods has: help, a dry run, settings that are checked."""

import json
import os
import pathlib
import re
import shutil
import subprocess
from typing import Any

import pytest

from pod_scripts import FAKE, PUBLIC, SCRIPTS, Cloud


@pytest.mark.parametrize("path", sorted(SCRIPTS.rglob("*.sh")), ids=lambda p: p.name)
def test_bash_can_read_it(path: pathlib.Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(
        ["shellcheck", "-x", "-P", "SCRIPTDIR", *sorted(SCRIPTS.rglob("*.sh"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", PUBLIC)
def test_help_tells_the_purpose_and_the_arguments(script: str, cloud: Cloud) -> None:
    told = cloud.run(script, "--help")
    assert f"usage: {script}" in told and "--env FILE" in told
    assert not cloud.calls()


@pytest.mark.parametrize("script", PUBLIC)
def test_a_dry_run_prints_and_touches_nothing(script: str, cloud: Cloud) -> None:
    if script == "gke/xpk.sh":  # only ever prints
        told = cloud.run(script)
    else:
        told = cloud.run(script, *DRY_ARGUMENTS.get(script, []), "--dry_run")
    assert "neo" in told
    assert not cloud.calls()
    assert sorted(os.listdir(cloud.folder)) == ["bin", "pod.env", "state.json"]


DRY_ARGUMENTS = {"ssh.sh": ["--all", "hostname"]}


@pytest.mark.parametrize("script", PUBLIC)
def test_an_unknown_argument_is_a_mistake(script: str, cloud: Cloud) -> None:
    told = cloud.run(script, "--speed", "9", code=2)
    assert "unknown argument --speed; see --help." in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"PROJECT": ""}, "pod.env sets no PROJECT."),
        ({"TPU_NAME": "Neo_1"}, "TPU_NAME=Neo_1: take small letters"),
        ({"ACCELERATOR_TYPE": "v9-8"}, "ACCELERATOR_TYPE=v9-8 is unknown; examples: v4-32"),
        ({"ACCELERATOR_TYPE": "tpu7x-8"}, "is lent through GKE only"),
        ({"PROVISIONING": "cheap"}, "PROVISIONING=cheap must be on-demand, spot or reserved."),
        ({"NUM_SLICES": "0"}, "NUM_SLICES=0 must be positive."),
        ({"SSH_THROUGH": "vpn"}, "SSH_THROUGH=vpn must be empty, iap or internal."),
        ({"RUN_NAME": "a b"}, "RUN_NAME=a b: take letters"),
    ],
)
def test_a_wrong_setting_is_named(settings, words, cloud):
    told = cloud.run("create.sh", code=2, **settings)
    assert words in told
    assert told.count("\n") == 1
    assert not cloud.calls()


def test_a_missing_environment_file_is_named(cloud: Cloud) -> None:
    told = cloud.run("create.sh", "--env", "other.env", code=2)
    assert "other.env cannot be read; copy" in told and "env.example" in told


def test_every_setting_is_explained_in_the_example() -> None:
    read = set()
    for path in (SCRIPTS / "lib.sh", SCRIPTS / "gke" / "lib.sh"):
        text = path.read_text()
        read |= set(re.findall(r'"\$\{([A-Z_]+):=', text))
        for keys in re.findall(r"for key in ([A-Z_ ]+);", text):
            read |= set(keys.split())
    example = (SCRIPTS / "env.example").read_text()
    explained = set(re.findall(r"^(?:# )?([A-Z_]+)=", example, re.MULTILINE))
    assert read == explained


def test_the_example_is_a_file_that_works(cloud: Cloud) -> None:
    told = cloud.run("create.sh", "--env", str(SCRIPTS / "env.example"), "--dry_run")
    assert "--accelerator-type=v4-32 --runtime-version=tpu-ubuntu2204-base" in told


SDK = pathlib.Path("/usr/lib/google-cloud-sdk/data/cli/gcloud_completions.py")


@pytest.mark.skipif(not SDK.exists(), reason="no Google Cloud SDK to compare with")
def test_the_grammar_is_that_of_the_sdk() -> None:
    """Of whichever SDK is installed, and for every flag that the scripts may use."""
    tree: dict[str, Any] = {}
    exec(SDK.read_text(), tree)
    grammar = json.loads((FAKE.parent / "fixtures" / "gcloud_grammar.json").read_text())
    for command, known in grammar["commands"].items():
        node = tree["STATIC_COMPLETION_CLI_TREE"]
        for word in command.split():
            node = node["commands"][word]
        assert known["flags"].items() <= node["flags"].items(), command
