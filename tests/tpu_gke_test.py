"""The scripts for GKE, against a fake gcloud and kubectl."""

import re
from typing import Any

import pytest
import yaml

from pod_scripts import ON_GKE, Cloud


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
