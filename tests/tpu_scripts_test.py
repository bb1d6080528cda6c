"""The scripts for pods, run against a cloud that checks every word and takes pods away."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = ROOT / "tpu_scripts"
FAKE = ROOT / "tests" / "fake_cloud.py"
PUBLIC = sorted(
    path.relative_to(SCRIPTS).as_posix()
    for path in SCRIPTS.rglob("*.sh")
    if path.name not in ("lib.sh", "worker.sh")
)
ON_GKE = [name for name in PUBLIC if name.startswith("gke/")]

SETTINGS = {
    "PROJECT": "my-project",
    "ZONE": "us-central2-b",
    "TPU_NAME": "neo",
    "ACCELERATOR_TYPE": "v4-16",
    "CONFIG": "neo_2p7b",
    "BUCKET": "my-bucket",
    "POLL_SECONDS": "0",
    "PATIENCE": "3",
    "CLUSTER": "my-cluster",
    "LOCATION": "us-central2",
    "TOPOLOGY": "2x2x2",
    "IMAGE": "registry/neo-jax:tpu",
}


class Cloud:
    """Runs scripts in a folder of its own, and tells what the cloud heard."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.settings = dict(SETTINGS)
        self.write_state(
            hosts_per_slice=2,
            fates=[],
            created=0,
            step=0,
            polls_to_finish=5,
            execute=False,
            violations=[],
        )
        (folder / "bin").mkdir()
        for tool in ("gcloud", "kubectl"):
            path = folder / "bin" / tool
            # Imported, not run, so that Python need not compile it each time.
            code = f"import sys; sys.path.append({str(FAKE.parent)!r}); import fake_cloud as f"
            path.write_text(
                f'#!/bin/sh\nexec {sys.executable} -SE -c "{code}; f.main()" {tool} "$@"\n'
            )
            path.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "FAKE_CLOUD": str(folder),
        }

    @property
    def state(self) -> dict[str, Any]:
        read: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        return read

    def write_state(self, **changes: Any) -> None:
        path = self.folder / "state.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**before, **changes}))

    def have_pod(self, state: str = "ACTIVE", **changes: Any) -> None:
        pod = {
            "name": "neo",
            "fate": "well",
            "type": "v4-16",
            "slices": 1,
            "state": state,
            "node_state": "READY",
            "jobs": {},
            "polls": 0,
        }
        self.write_state(pod={**pod, **changes})

    def run(
        self, script: str, *arguments: str, code: int = 0, stdin: str = "", **settings: str
    ) -> str:
        """Standard error and output of a script, whose exit status must be `code`."""
        lines = [f"{k}={v!r}" for k, v in {**self.settings, **settings}.items()]
        (self.folder / "pod.env").write_text("\n".join(lines) + "\n")
        done = subprocess.run(
            [SCRIPTS / script, *arguments],
            cwd=self.folder,
            env=self.environment,
            input=stdin,
            stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
            text=True,
            timeout=900,  # a hang would else last for ever
            check=False,
        )
        assert done.returncode == code, done.stdout
        assert not self.state["violations"]
        return done.stdout

    def calls(self, *words: str) -> list[list[str]]:
        """Command lines so far that hold all these words."""
        path = self.folder / "calls.jsonl"
        found = map(json.loads, path.read_text().splitlines()) if path.exists() else []
        return [call for call in found if all(any(w in c for c in call) for w in words)]


@pytest.fixture
def cloud(tmp_path: pathlib.Path) -> Cloud:
    return Cloud(tmp_path)


# ------------------------------------------------------------------------- every script


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


# ------------------------------------------------------------------------------- create


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, {"--node-id=neo", "--runtime-version=tpu-ubuntu2204-base"}),
        ({"PROVISIONING": "spot"}, {"--spot"}),
        ({"PROVISIONING": "reserved"}, {"--reserved"}),
        (
            {"PROVISIONING": "reserved", "RESERVATION_PROJECT": "theirs"},
            {"--reservation-host-project=theirs"},
        ),
        ({"NUM_SLICES": "2"}, {"--node-count=2", "--node-prefix=neo"}),
        (
            {"ACCELERATOR_TYPE": "v5litepod-64", "VALID_UNTIL": "6h", "INTERNAL_IPS": "1"},
            {
                "--runtime-version=v2-alpha-tpuv5-lite",
                "--valid-until-duration=6h",
                "--internal-ips",
            },
        ),
        (
            {"NETWORK": "net", "SUBNETWORK": "sub", "SERVICE_ACCOUNT": "a@b.c"},
            {"--network=net", "--subnetwork=sub", "--service-account=a@b.c"},
        ),
        ({"RUNTIME_VERSION": "mine"}, {"--runtime-version=mine"}),
    ],
)
def test_create_asks_for_what_the_settings_say(settings, words, cloud):
    told = cloud.run("create.sh", **settings)
    (call,) = cloud.calls("create")
    assert words <= set(call)
    assert told.splitlines()[-1].endswith("create.sh: neo: ACTIVE")


def test_create_keeps_a_pod_that_is_there(cloud: Cloud) -> None:
    cloud.have_pod()
    cloud.run("create.sh")
    assert not cloud.calls("create") and not cloud.calls("delete")


@pytest.mark.parametrize(
    "state", ["PROVISIONING", "SUSPENDED", "SUSPENDING", "FAILED", "DELETING"]
)
def test_create_gets_there_from_any_state(state: str, cloud: Cloud) -> None:
    cloud.have_pod(state)
    cloud.run("create.sh")
    assert len(cloud.calls("create")) == (state != "PROVISIONING")
    assert len(cloud.calls("delete")) == (state in ("SUSPENDED", "SUSPENDING", "FAILED"))


def test_create_replaces_a_pod_whose_slice_is_gone(cloud: Cloud) -> None:
    cloud.have_pod(node_state="PREEMPTED")
    assert "neo: PREEMPTED" in cloud.run("create.sh")
    assert len(cloud.calls("create")) == len(cloud.calls("delete")) == 1


def test_create_without_waiting(cloud: Cloud) -> None:
    told = cloud.run("create.sh", "--no_wait")
    assert told.splitlines()[-1].endswith("neo: WAITING_FOR_RESOURCES")


@pytest.mark.parametrize(
    ("fate", "code", "words"),
    [
        ("quota", 1, "no quota for v4-16 (on-demand) in us-central2-b of my-project: ask"),
        ("permission", 2, "my-project does not allow it"),
        ("race", 0, "neo exists by now."),
        ("stockout", 0, "no capacity within the interval"),
        ("provisioning", 0, "neo: SUSPENDED"),
    ],
)
def test_create_is_refused(fate, code, words, cloud):
    cloud.write_state(fates=[fate])
    assert words in cloud.run("create.sh", code=code)


def test_create_does_not_take_an_outage_for_an_absence(cloud: Cloud) -> None:
    cloud.write_state(outage=1)
    assert "the pod's state cannot be learnt" in cloud.run("create.sh", code=1)
    assert not cloud.calls("create")


def test_create_does_not_take_another_pod_for_its_own(cloud: Cloud) -> None:
    cloud.have_pod(type="v4-8")
    assert "neo exists and is a v4-8, not a v4-16" in cloud.run("create.sh", code=2)


# -------------------------------------------------------------------------------- setup


def test_setup_copies_installs_and_counts(cloud: Cloud) -> None:
    cloud.have_pod()
    told = cloud.run("setup.sh")
    assert "all 2 hosts: code:1,jax==1" in told
    (copied,) = cloud.calls("scp")
    assert {"--node=all", "--worker=all", "neo:neo_jax.tar.gz"} <= set(copied)
    assert cloud.calls("ssh", "worker.sh install") and cloud.calls("mount my-bucket")
    assert cloud.calls("start check", "neo_jax.doctor --distributed --devices 8")


@pytest.mark.parametrize(
    ("fate", "words"),
    [
        ("versions", "the hosts differ:"),
        ("devices", "the hosts do not see 8 devices together."),
        ("setup", "the code could not be copied to every host."),
    ],
)
def test_setup_tells_what_is_wrong(fate, words, cloud):
    cloud.have_pod(fate=fate)
    assert words in cloud.run("setup.sh", code=1)


def test_setup_leaves_a_run_alone(cloud: Cloud) -> None:
    cloud.have_pod(jobs={"run": {f"neo-w-{i}": ["running", "-"] for i in (0, 1)}})
    assert "run runs; nothing is changed under it" in cloud.run("setup.sh")
    assert not cloud.calls("scp") and not cloud.calls("start")


def test_the_same_code_makes_the_same_archive(cloud: Cloud) -> None:
    digests = {cloud.run("setup.sh", "--dry_run").split("copying ")[1][:16] for _ in range(2)}
    assert len(digests) == 1


# ---------------------------------------------------------------------------------- run


def test_run_starts_every_host_and_ends_as_they_do(cloud: Cloud) -> None:
    cloud.have_pod()
    told = cloud.run(
        "run.sh",
        "--",
        "--config.eval.prompt=It's two words",
        JOB_ENV="A=1 B=2",
        MAIN_FLAGS="--flag",
        OVERRIDES="--config.train.seed=3",
    )
    assert "run ended with 0 after step" in told
    (start,) = cloud.calls("worker.sh start")
    assert {"--node=all", "--worker=all"} <= set(start)
    (command,) = (word for word in start if word.startswith("--command="))
    assert command == (
        "--command=bash neo_jax/tpu_scripts/worker.sh start run /mnt/neo_jax/run A=1 B=2 -- "
        "python -m neo_jax.main --config neo_2p7b --workdir /mnt/neo_jax/run --flag "
        r"--config.train.seed=3 --config.eval.prompt=It\'s\ two\ words"
    )


def test_run_joins_what_runs_already(cloud: Cloud) -> None:
    cloud.have_pod(jobs={"run": {f"neo-w-{i}": ["running", "-"] for i in (0, 1)}})
    assert "run runs on all 2 hosts already" in cloud.run("run.sh")
    assert not cloud.calls("worker.sh start")


def test_run_that_is_not_waited_for_is_started_once(cloud: Cloud) -> None:
    cloud.have_pod()
    cloud.run("run.sh", "--no_wait")
    assert "run runs already." in cloud.run("run.sh", "--no_wait")
    assert len(cloud.calls("worker.sh start")) == 1


def test_run_starts_all_anew_where_one_host_dropped_out(cloud: Cloud) -> None:
    cloud.have_pod(jobs={"run": {"neo-w-0": ["running", "-"], "neo-w-1": ["lost", "-"]}})
    cloud.run("run.sh")
    assert len(cloud.calls("worker.sh start")) == 1


@pytest.mark.parametrize(
    ("fate", "code", "words"),
    [
        ("sigterm", 75, "run ended with 75"),
        ("abrupt", 75, "the pod is SUSPEND"),
        ("node", 75, "the pod is PREEMPTED"),
        ("crash", 1, "run ended with 1"),
        ("mistake", 2, "run ended with 2"),
        ("partial", 1, "ending run on all"),
        ("silent", 1, "hosts do not answer, though the pod is ACTIVE"),
    ],
)
def test_run_ends_as_the_run_ended(fate, code, words, cloud):
    cloud.have_pod(fate=fate)
    assert words in cloud.run("run.sh", code=code)


@pytest.mark.parametrize(
    ("states", "verdict"),
    [
        (["running -", "running -"], "running"),
        (["running -"], "silent"),
        (["running -", "ended 0"], "partly"),
        (["absent -", "absent -"], "partly"),
        (["ended 0", "ended 0"], "0"),
        (["ended 75", "ended 75"], "75"),
        (["ended 75", "ended 69"], "75"),
        (["lost -", "ended 69"], "75"),
        (["ended 75", "ended 134"], "75"),
        (["ended 137", "ended 69"], "1"),
        (["ended 1", "ended 75"], "1"),
        (["ended 1", "ended 2"], "2"),
    ],
)
def test_what_the_states_of_hosts_mean_together(states, verdict):
    told = subprocess.run(
        ["bash", "-c", f'source "{SCRIPTS}/lib.sh"; verdict 2'],
        input="".join(f"host-{i} {state} 0\n" for i, state in enumerate(states)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout == f"{verdict}\n"


def test_run_of_several_slices_reaches_all_of_them(cloud: Cloud) -> None:
    cloud.have_pod(slices=2)
    assert "run started on 4 hosts" in cloud.run("run.sh", NUM_SLICES="2")


def test_run_without_a_pod_or_a_shared_folder(cloud: Cloud) -> None:
    assert "neo is ABSENT; create.sh makes it." in cloud.run("run.sh", code=75)
    assert "sets neither BUCKET nor WORKDIR" in cloud.run("run.sh", code=2, BUCKET="")


def test_run_is_stopped(cloud: Cloud) -> None:
    cloud.have_pod(jobs={"run": {f"neo-w-{i}": ["running", "-"] for i in (0, 1)}})
    cloud.run("run.sh", "--stop")
    assert all(what == "ended" for what, _ in cloud.state["pod"]["jobs"]["run"].values())


# ------------------------------------------------------------------------------ babysit


@pytest.mark.slow
def test_babysit_survives_a_storm_of_twenty_preemptions(cloud: Cloud) -> None:
    """Of every kind, among failures of other sorts; no two failures without a step between."""
    fates = ["sigterm", "abrupt", "node", "setup", "provisioning"] * 5
    fates[5:5], fates[12:12], fates[19:19] = ["quota"], ["stockout"], ["partial"]
    cloud.write_state(fates=fates)
    told = cloud.run("babysit.sh", "--delete", PROVISIONING="spot", MAX_FAILURES="3")
    # Five of each kind but "provisioning", which never became a pod that could be taken away,
    # and one after the partial failure.
    assert re.search(r"done at step \d+; the pod was taken away 21 times\.", told)
    assert cloud.state["fates"] == [] and cloud.state["pod"]["state"] == "DELETING"
    assert all("--spot" in call for call in cloud.calls("queued-resources", "create"))


def test_babysit_gives_up_on_a_run_that_does_not_get_on(cloud: Cloud) -> None:
    cloud.write_state(fates=["stuck"])
    told = cloud.run("babysit.sh", code=1, MAX_FAILURES="3")
    assert "failed 3 times in a row without a step beyond 0." in told
    assert len(cloud.calls("worker.sh start run")) == 3


def test_babysit_does_not_repeat_a_mistake(cloud: Cloud) -> None:
    cloud.write_state(fates=["mistake"])
    assert "that will not mend itself" in cloud.run("babysit.sh", code=2)
    assert len(cloud.calls("worker.sh start run")) == 1


def test_babysit_that_starts_again_takes_up_the_run(cloud: Cloud) -> None:
    cloud.have_pod(jobs={"run": {f"neo-w-{i}": ["running", "-"] for i in (0, 1)}})
    assert "taken away 0 times" in cloud.run("babysit.sh")
    assert not cloud.calls("worker.sh start") and not cloud.calls("create")


# ------------------------------------------------------------ status, ssh, fetch, delete


def test_status_tells_pod_slices_and_hosts(cloud: Cloud) -> None:
    assert cloud.run("status.sh").splitlines() == ["pod neo (v4-16 × 1, on-demand): ABSENT"]
    jobs = {"run": {"neo-w-0": ["running", "-"], "neo-w-1": ["ended", "1"]}}
    cloud.have_pod(jobs=jobs)
    assert cloud.run("status.sh").splitlines() == [
        "pod neo (v4-16 × 1, on-demand): ACTIVE",
        "slice neo: READY\tHEALTHY",
        "host neo-w-0: run is running; newest checkpoint: step 0",
        "host neo-w-1: run is ended with 1; newest checkpoint: step 0",
        "the end of run's log",
    ]


@pytest.mark.parametrize(
    ("through", "command", "flag"),
    [
        ("", ["gcloud", "compute", "tpus"], None),
        ("internal", ["gcloud", "compute", "tpus"], "--internal-ip"),
        ("iap", ["gcloud", "alpha", "compute"], "--tunnel-through-iap"),
    ],
)
def test_ssh_opens_a_shell_on_one_host(through, command, flag, cloud):
    cloud.have_pod(slices=2)
    arguments = ("--slice", "1", "--host", "1")
    told = cloud.run("ssh.sh", *arguments, NUM_SLICES="2", SSH_THROUGH=through)
    assert "a shell on neo-1" in told
    (call,) = cloud.calls("ssh")
    assert call[:3] == command and "--worker=1" in call
    assert flag is None or flag in call


def test_ssh_to_a_slice_that_is_not_there(cloud: Cloud) -> None:
    assert "there are 1, counted from 0" in cloud.run("ssh.sh", "--slice", "1", code=2)


def test_fetch_brings_results_and_every_log(cloud: Cloud) -> None:
    cloud.have_pod(slices=2)
    cloud.run("fetch.sh", "here", NUM_SLICES="2")
    assert (cloud.folder / "here" / "workdir" / "metrics.jsonl").exists()
    logs = sorted(path.name for path in (cloud.folder / "here" / "logs").iterdir())
    assert logs == ["0-0.log", "0-1.log", "1-0.log", "1-1.log"]
    (sync,) = cloud.calls("rsync")
    assert "gs://my-bucket/run" in sync and "--exclude=^checkpoints/.*$" in sync


def test_delete_asks_first_and_is_content_with_nothing(cloud: Cloud) -> None:
    assert "neo is ABSENT." in cloud.run("delete.sh")
    cloud.have_pod()
    assert "nothing was deleted" in cloud.run("delete.sh", code=1, stdin="no\n")
    assert cloud.state["pod"]["state"] == "ACTIVE"
    cloud.run("delete.sh", stdin="y\n")
    assert cloud.state["pod"]["state"] == "DELETING"
    assert cloud.calls("worker.sh stop run")  # it may save


# ---------------------------------------------------------------------------------- GKE


def manifest(cloud: Cloud, *arguments: str, **settings: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(
        cloud.run("gke/run.sh", "--dry_run", *arguments, **settings)
    )
    return read


def test_gke_the_manifest_says_what_the_settings_say(cloud: Cloud) -> None:
    job = manifest(
        cloud,
        "--",
        '--config.eval.prompt=a "b" \\ c',
        NUM_SLICES="3",
        PROVISIONING="spot",
        JOB_ENV="A=1 B=x=y",
    )
    (slices,) = job["spec"]["replicatedJobs"]
    one_slice = slices["template"]["spec"]
    pod = one_slice["template"]["spec"]
    (container,) = pod["containers"]
    assert slices["replicas"] == 3
    assert one_slice["parallelism"] == one_slice["completions"] == 2  # of 4 chips each
    assert container["command"][-1] == '--config.eval.prompt=a "b" \\ c'
    assert container["env"] == [{"name": "A", "value": "1"}, {"name": "B", "value": "x=y"}]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v4-podslice",
        "cloud.google.com/gke-tpu-topology": "2x2x2",
        "cloud.google.com/gke-spot": "true",
    }
    # A mistake ends the set at once; any other end of a host starts all anew.
    (rule,) = one_slice["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert job["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"


def test_gke_on_demand_wants_no_spot_label(cloud: Cloud) -> None:
    (slices,) = manifest(cloud)["spec"]["replicatedJobs"]
    selector = slices["template"]["spec"]["template"]["spec"]["nodeSelector"]
    assert len(selector) == 2


def test_gke_every_at_sign_is_filled_in(cloud: Cloud) -> None:
    assert not re.search(r"@[A-Z]", cloud.run("gke/run.sh", "--dry_run"))


def test_gke_pools_are_made_once(cloud: Cloud) -> None:
    cloud.run("gke/create.sh", NUM_SLICES="2", PROVISIONING="spot")
    cloud.run("gke/create.sh", NUM_SLICES="2", PROVISIONING="spot")
    calls = cloud.calls("node-pools", "create")
    assert [call[4] for call in calls] == ["neo-0", "neo-1"]
    assert {"--machine-type=ct4p-hightpu-4t", "--tpu-topology=2x2x2", "--num-nodes=2"} <= set(
        calls[0]
    )


def test_gke_no_quota(cloud: Cloud) -> None:
    cloud.write_state(fates=["quota"])
    assert "no room for neo in us-central2-b" in cloud.run("gke/create.sh", code=1)


@pytest.mark.parametrize(("fate", "code"), [("well", 0), ("mistake", 1)])
def test_gke_run_waits_for_the_end(fate, code, cloud):
    cloud.write_state(fates=[fate])
    cloud.run("gke/run.sh", code=code)
    assert yaml.safe_load(cloud.state["jobset"]["manifest"])["kind"] == "JobSet"
    cloud.run("gke/run.sh", code=code)
    assert len(cloud.calls("apply")) == 1


def test_gke_delete_is_content_with_nothing(cloud: Cloud) -> None:
    cloud.run("gke/delete.sh", "--pools")
    assert cloud.calls("kubectl", "delete") and cloud.calls("node-pools", "delete")


@pytest.mark.parametrize("script", ON_GKE)
def test_gke_a_topology_that_hosts_do_not_make_up(script: str, cloud: Cloud) -> None:
    told = cloud.run(script, code=2, TOPOLOGY="1x1")
    assert "TOPOLOGY=1x1: hosts of 4 chips do not make it up." in told


# --------------------------------------------------------------- worker.sh, on a real host


@pytest.fixture
def host(tmp_path: pathlib.Path) -> Callable[..., str]:
    """Runs worker.sh with a home of its own."""
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "HOSTNAME": "host-0",
        "NEO_JAX_GRACE_SECONDS": "20",
    }

    def run(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [SCRIPTS / "worker.sh", *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    return run


def start(host: Callable[..., str], folder: pathlib.Path, program: str) -> int:
    """Starts a job whose program says when it is ready; its process."""
    ready = folder / "ready"
    os.mkfifo(ready)
    host(
        "start", "job", str(folder / "workdir"), f"READY={ready}", "--", "bash", "-c", program
    )
    assert ready.read_text() == "ready"  # waits for it
    ready.unlink()
    return int((folder / "neo_jax_jobs" / "job" / "pid").read_text().split()[0])


def await_end(pid: int) -> None:
    subprocess.run(["tail", f"--pid={pid}", "-s", "0.02", "-f", "/dev/null"], check=True)


def test_worker_notes_how_a_job_ended(host, tmp_path):
    assert host("state", "job") == "neo_jax-state host-0 absent - 0\n"
    pid = start(host, tmp_path, 'echo hello; printf ready >"$READY"; exit 3')
    await_end(pid)
    assert host("state", "job") == "neo_jax-state host-0 ended 3 0\n"
    log = host("tail", "job", "9")
    assert "hello\n" in log and "ended with 3" in log


def test_worker_gives_a_job_the_time_to_save(host, tmp_path):
    program = """
        trap 'mkdir -p "$0/checkpoints/12"; kill $!; exit 75' TERM
        tail -f /dev/null & printf ready >"$READY"; wait"""
    program = program.replace("$0", str(tmp_path / "workdir"))
    start(host, tmp_path, program)
    assert host("state", "job") == "neo_jax-state host-0 running - 0\n"
    assert "stopped job" in host("stop", "job")
    assert host("state", "job") == "neo_jax-state host-0 ended 75 12\n"
    assert host("stop", "job") == ""  # again: nothing to do


def test_worker_starting_ends_what_ran_before(host, tmp_path):
    first = start(host, tmp_path, 'printf ready >"$READY"; exec tail -f /dev/null')
    host("start", "other", str(tmp_path), "--", "true")
    assert not pathlib.Path(f"/proc/{first}").exists()
    assert host("state", "job").split()[2] == "ended"


def test_worker_tells_a_job_that_vanished(host, tmp_path):
    pid = start(host, tmp_path, 'printf ready >"$READY"; exec tail -f /dev/null')
    os.killpg(pid, 9)
    await_end(pid)
    assert host("state", "job").split()[2:] == ["lost", "-", "0"]
    assert host("stop", "job") == ""


def test_worker_does_not_take_a_stranger_for_its_job(host, tmp_path):
    """Numbers of processes are given away again."""
    folder = tmp_path / "neo_jax_jobs" / "job"
    folder.mkdir(parents=True)
    (folder / "pid").write_text(f"{os.getpid()} 1\n")
    assert host("state", "job").split()[2] == "lost"
    host("stop", "job")  # must not end this test
