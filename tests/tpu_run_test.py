"""run.sh and babysit.sh: a run is started on every host, watched and taken up again."""

import re
import subprocess

import pytest

from pod_scripts import SCRIPTS, Cloud

# -------------------------------------------------------------------------------- run


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


# ---------------------------------------------------------------------------- babysit


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
