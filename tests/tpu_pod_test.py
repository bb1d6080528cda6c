"""status.sh, ssh.sh, fetch.sh and delete.sh: what is asked of a pod that is there."""

import pytest

from pod_scripts import Cloud


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
