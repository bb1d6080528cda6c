"""create.sh and setup.sh: from nothing to a pod whose hosts have the code."""

import pytest

from pod_scripts import Cloud

# ----------------------------------------------------------------------------- create


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


# ------------------------------------------------------------------------------ setup


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
