"""A `gcloud` and a `kubectl` that check what they are told, and lose pods on a schedule.

Enters: a command line, as the scripts of tpu_scripts/ give it, and a folder of state named by
FAKE_CLOUD. Leaves: what the real command would print, its exit status, a line in calls.jsonl,
and the state. A command line that the real one would refuse is refused, and noted in
`violations`, so that no script can hide it.

Every pod that is asked for takes its fate from the list `fates`; when the list is used up,
runs go well. The grammar is the SDK's own table (fixtures/gcloud_grammar.json) and what its
sources check beyond it.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any, NoReturn

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
HERE = pathlib.Path(os.environ.get("FAKE_CLOUD", "."))

# What kubectl's reference documents for the verbs in use; True: takes a value.
KUBECTL = {
    "get": {"--output": True, "--selector": True, "--namespace": True},
    "apply": {"--filename": True, "--namespace": True},
    "delete": {"--ignore-not-found": False, "--namespace": True},
    "logs": {"--selector": True, "--container": True, "--tail": True, "--namespace": True},
}


class Refused(Exception):
    """The real command would not take this command line."""


# --------------------------------------------------------------------------------- grammar


def parse_gcloud(words: list[str]) -> tuple[str, list[str], dict[str, str]]:
    """Command, positional arguments and flags, or Refused."""
    grammar = json.loads((FIXTURES / "gcloud_grammar.json").read_text())
    command = next(
        (c for c in grammar["commands"] if words[: len(c.split())] == c.split()), None
    )
    if command is None:
        raise Refused(f"Invalid choice: {' '.join(words[:4])}")
    known = {**grammar["wide"], **grammar["commands"][command]["flags"]}
    positionals, flags = take(words[len(command.split()) :], known)
    wanted = len(grammar["commands"][command]["positionals"])
    if len(positionals) < wanted or (len(positionals) > wanted and "scp" not in command):
        raise Refused(f"{command} takes {wanted} arguments, not {positionals}")
    check_gcloud(command, positionals, flags)
    return command, positionals, flags


def take(words: list[str], known: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    positionals, flags = [], {}
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            positionals.append(word)
            continue
        name, equals, value = word.partition("=")
        kind = known.get(name)
        if kind is None:
            raise Refused(f"unrecognized arguments: {word}")
        if kind in ("bool", False):
            if equals:
                raise Refused(f"{name} takes no value")
        elif not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise Refused(f"{name}: expected one argument")
        if isinstance(kind, list) and value not in kind:
            raise Refused(f"{name}: invalid choice {value!r}")
        flags[name] = value
    return positionals, flags


def check_gcloud(command: str, positionals: list[str], flags: dict[str, str]) -> None:
    """What the SDK's sources demand beyond the names of flags."""

    def demand(right: bool, message: str) -> None:
        if not right:
            raise Refused(f"{command}: {message}")

    if command != "storage rsync":
        place = "--location" if "node-pools" in command else "--zone"
        demand(place in flags and "--project" in flags, f"{place} and --project")
    demand(
        not {"--tunnel-through-iap", "--internal-ip"} <= set(flags),
        "--internal-ip and --tunnel-through-iap exclude each other",
    )
    if command.endswith("queued-resources create"):
        demand("--runtime-version" in flags, "--runtime-version is required")
        demand("--accelerator-type" in flags, "--accelerator-type is required")
        demand(
            ("--node-id" in flags) != ("--node-count" in flags), "--node-id or --node-count"
        )
        demand(int(flags.get("--node-count", 2)) > 1, "node count must be greater than 1")
        demand("--node-prefix" not in flags or "--node-count" in flags, "--node-prefix alone")
        duration = flags.get("--valid-until-duration", "1h")
        demand(bool(re.fullmatch(r"(\d+[smhdw])+", duration)), f"no duration: {duration}")
        demand(bool(re.fullmatch(r"[a-z][a-z0-9-]*[a-z0-9]", positionals[0])), "bad name")
    if command.endswith("queued-resources ssh"):
        demand("--command" in flags, "--command is required")
    if command.endswith("queued-resources scp"):
        remote = [":" in path for path in positionals]
        demand(sum(remote) == 1, "one side is remote")
        if remote[0]:
            demand(
                "all" not in (flags.get("--node"), flags.get("--worker")),
                "cannot target several workers while copying files to the client",
            )
    if command == "container node-pools create":
        demand("--cluster" in flags, "--cluster")
        demand(
            ("--reservation" in flags) == (flags.get("--reservation-affinity") == "specific"),
            "--reservation goes with --reservation-affinity=specific",
        )


# ---------------------------------------------------------------------------------- state


class Cloud:
    """The state between two commands."""

    def __init__(self) -> None:
        self.path = HERE / "state.json"
        self.state = json.loads(self.path.read_text())

    def save(self) -> None:
        self.path.write_text(json.dumps(self.state))

    @property
    def pod(self) -> dict[str, Any] | None:
        """There is one at most."""
        pod: dict[str, Any] | None = self.state.get("pod")
        return pod

    def nodes(self) -> list[str]:
        assert self.pod is not None
        name, slices = self.pod["name"], self.pod["slices"]
        return [name] if slices == 1 else [f"{name}-{i}" for i in range(slices)]

    def hosts(self, flags: dict[str, str]) -> list[tuple[str, int]]:
        found = []
        for i, node in enumerate(self.nodes()):
            for worker in range(self.state["hosts_per_slice"]):
                if flags.get("--node", "0") in ("all", str(i)) and flags.get(
                    "--worker", "0"
                ) in ("all", str(worker)):
                    found.append((node, worker))
        return found


def fail(message: str, code: int = 1) -> NoReturn:
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    sys.exit(code)


# ------------------------------------------------------------------------------- gcloud


def create(cloud: Cloud, name: str, flags: dict[str, str]) -> None:
    if cloud.pod:
        fail(f"ALREADY_EXISTS: Resource '{name}' already exists")
    fate = cloud.state["fates"].pop(0) if cloud.state["fates"] else "well"
    cloud.state["created"] += 1
    if fate == "quota":
        fail(
            "RESOURCE_EXHAUSTED: Quota limit 'TPUV4sPreemptiblePodPerProjectPerZone' exceeded"
        )
    if fate == "permission":
        fail("PERMISSION_DENIED: Permission 'tpu.queuedresources.create' denied")
    cloud.state["pod"] = {
        "name": name,
        "fate": fate,
        "type": flags["--accelerator-type"],
        "slices": int(flags.get("--node-count", 1)),
        "state": "WAITING_FOR_RESOURCES",
        "node_state": "READY",
        "jobs": {},
        "polls": 0,
    }
    if fate == "race":  # somebody else's request came first
        cloud.state["pod"]["fate"] = "well"
        fail(f"ALREADY_EXISTS: Resource '{name}' already exists")


AFTER = {
    "WAITING_FOR_RESOURCES": "PROVISIONING",
    "PROVISIONING": "ACTIVE",
    "SUSPENDING": "SUSPENDED",
    "DELETING": None,
}


def describe(cloud: Cloud, flags: dict[str, str]) -> None:
    """Each look at the queue is a step in time."""
    pod = cloud.pod
    if cloud.state.get("outage", 0) > 0:
        cloud.state["outage"] -= 1
        fail("UNAVAILABLE: The service is currently unavailable")
    if pod is None:
        fail("NOT_FOUND: Resource was not found")
    if "failedData" in flags["--format"]:
        print("no capacity within the interval" if pod["state"] == "FAILED" else "")
        return
    print(pod["state"])
    after = AFTER.get(pod["state"], pod["state"])
    if pod["state"] == "PROVISIONING" and pod["fate"] in ("provisioning", "stockout"):
        after = "SUSPENDING" if pod["fate"] == "provisioning" else "FAILED"
    if pod["state"] == "ACTIVE" and pod.get("going"):
        after = "SUSPENDING"
    if after is None:
        cloud.state["pod"] = None
    else:
        pod["state"] = after


def describe_node(cloud: Cloud, node: str, flags: dict[str, str]) -> None:
    pod = cloud.pod
    if pod is None or node not in cloud.nodes():
        fail("NOT_FOUND: Resource was not found")
    values = {
        "state": pod["node_state"],
        "networkEndpoints.len()": str(cloud.state["hosts_per_slice"]),
        "acceleratorType.basename()": pod["type"],
        "state,health": f"{pod['node_state']}\tHEALTHY",
    }
    print(values[flags["--format"].removeprefix("value(").removesuffix(")")])


def delete(cloud: Cloud, flags: dict[str, str]) -> None:
    pod = cloud.pod
    if pod is None:
        fail("NOT_FOUND: Resource was not found")
    if pod["state"] == "ACTIVE" and "--force" not in flags:
        fail("FAILED_PRECONDITION: the queued resource has nodes")
    pod["state"] = "DELETING"


def reach(cloud: Cloud) -> dict[str, Any]:
    """The pod, where its hosts can be connected to."""
    pod = cloud.pod
    if pod is None:
        fail("NOT_FOUND: Resource was not found")
    if pod["fate"] == "setup":
        pod["state"] = "SUSPENDING"
    if pod["state"] != "ACTIVE" or pod["node_state"] != "READY":
        fail('This TPU has terminal state "PREEMPTED", so it cannot be used anymore.')
    return pod


def ssh(cloud: Cloud, flags: dict[str, str]) -> None:
    pod = reach(cloud)
    if cloud.state["execute"]:
        cloud.save()
        sys.exit(execute(cloud.hosts(flags), flags["--command"]))
    match = re.search(r"worker\.sh (\w+) ?(\S*)", flags["--command"])
    assert match, flags["--command"]
    verb, job = match.groups()
    for node, worker in cloud.hosts(flags):
        host = f"{node}-w-{worker}"
        if verb == "versions":
            different = pod["fate"] == "versions" and worker == 1
            print(f"neo_jax-versions {host} code:1,jax=={'2' if different else '1'}")
        elif verb == "start":
            pod["jobs"].setdefault(job, {})[host] = ["running", "-"]
            pod["fate"] = "sigterm" if pod["fate"] == "hang" else pod["fate"]
        elif verb == "stop" and job in pod["jobs"] and pod["jobs"][job][host][0] == "running":
            pod["jobs"][job][host] = ["ended", "75"]
        elif verb == "tail":
            print(f"the end of {job}'s log")
    if verb == "state":
        tell_state(cloud, pod, job, cloud.hosts(flags))


def tell_state(
    cloud: Cloud, pod: dict[str, Any], job: str, hosts: list[tuple[str, int]]
) -> None:
    if job in pod["jobs"]:
        pod["polls"] += 1
        decide(cloud, pod, job)
    for node, worker in hosts:
        host = f"{node}-w-{worker}"
        what, code = pod["jobs"].get(job, {}).get(host, ["absent", "-"])
        if pod["fate"] != "silent" or worker == 0 or job == "check":
            print(f"neo_jax-state {host} {what} {code} {cloud.state['step']}")
    if pod["state"] != "ACTIVE" or pod["node_state"] != "READY":
        fail("Connection closed")


def decide(cloud: Cloud, pod: dict[str, Any], job: str) -> None:
    """What happens to a job at its n-th look; each makes a step first."""
    states, fate = pod["jobs"][job], pod["fate"]

    def end(code: int, only: str = "") -> None:
        for host, state in states.items():
            if host.endswith(only) and state[0] == "running":
                states[host] = ["ended", str(code)]

    if job == "check":
        return end(1 if fate == "devices" else 0)
    if pod["polls"] < 4:
        return None
    if fate not in ("stuck", "mistake"):
        cloud.state["step"] += 1
    if fate == "sigterm":
        pod["going"] = True
        end(75)
    elif fate == "abrupt":
        pod["state"] = "SUSPENDING"
    elif fate == "node":
        pod["node_state"] = "PREEMPTED"
    elif fate == "partial":
        end(1, "w-1")
        pod["fate"], pod["polls"] = "hang", 0  # the others wait, until all start anew
    elif fate in ("crash", "stuck", "mistake"):
        end(2 if fate == "mistake" else 1)
        pod["fate"] = "well" if fate == "crash" else fate
        pod["polls"] = 0
    elif fate == "well" and pod["polls"] >= cloud.state["polls_to_finish"]:
        end(0)
    return None


def execute(hosts: list[tuple[str, int]], command: str) -> int:
    """Really runs a command, once a host, each with its own home; first failure wins."""
    running = []
    for number, (node, worker) in enumerate(hosts):
        home = HERE / "hosts" / f"{node}-{worker}"
        home.mkdir(parents=True, exist_ok=True)
        index = hosts_before(node) + worker if len(hosts) == 1 else number
        environment = {
            **os.environ,
            "HOME": str(home),
            "HOSTNAME": home.name,
            "JAX_PROCESS_ID": str(index),  # as a TPU host knows of itself
        }
        running.append(subprocess.Popen(["bash", "-c", command], cwd=home, env=environment))
    codes = [process.wait() for process in running]
    return next((code for code in codes if code), 0)


def hosts_before(node: str) -> int:
    state = json.loads((HERE / "state.json").read_text())
    index = int(node.rsplit("-", 1)[1]) if state["pod"]["slices"] > 1 else 0
    return index * int(state["hosts_per_slice"])


def scp(cloud: Cloud, paths: list[str], flags: dict[str, str]) -> None:
    reach(cloud)
    source, target = paths
    for node, worker in cloud.hosts(flags):
        home = HERE / "hosts" / f"{node}-{worker}"
        if ":" in source:
            found = home / source.split(":")[1]
            if not cloud.state["execute"]:
                pathlib.Path(target).write_text(f"log of {node}-{worker}\n")
            elif not found.exists():
                fail(f"scp: {source}: No such file or directory")
            else:
                shutil.copy(found, target)
        elif cloud.state["execute"]:
            home.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, home / target.split(":")[1])


def node_pools(cloud: Cloud, verb: str, name: str) -> None:
    pools: dict[str, str] = cloud.state.setdefault("pools", {})
    if verb == "create":
        fate = cloud.state["fates"].pop(0) if cloud.state["fates"] else "well"
        if fate == "quota":
            fail("ResponseError: code=403, message=Insufficient regional quota: TPU")
        pools[name] = "RUNNING"
    elif name not in pools:
        fail(f"ResponseError: code=404, message=Not found: nodePools/{name}")
    elif verb == "describe":
        print(pools[name])
    else:
        del pools[name]


def gcloud(words: list[str], cloud: Cloud) -> None:
    command, positionals, flags = parse_gcloud(words)
    verb = command.split()[-1]
    if command.startswith("container"):
        node_pools(cloud, verb, positionals[0])
    elif command == "storage rsync":
        (pathlib.Path(positionals[1]) / "metrics.jsonl").write_text("{}\n")
    elif command.endswith("tpu-vm describe"):
        describe_node(cloud, positionals[0], flags)
    elif command.endswith("tpu-vm ssh"):
        print(f"a shell on {positionals[0]}")
    elif verb == "create":
        create(cloud, positionals[0], flags)
    elif verb == "describe":
        describe(cloud, flags)
    elif verb == "delete":
        delete(cloud, flags)
    elif verb == "ssh":
        ssh(cloud, flags)
    else:
        scp(cloud, positionals, flags)


# ------------------------------------------------------------------------------ kubectl


def kubectl(words: list[str], cloud: Cloud) -> None:
    verb = words[0]
    if verb not in KUBECTL:
        raise Refused(f"unknown command {verb!r}")
    positionals, flags = take(words[1:], KUBECTL[verb])
    jobset = cloud.state.get("jobset")
    if verb == "apply":
        cloud.state["jobset"] = {"manifest": sys.stdin.read(), "polls": 0}
        print("jobset.jobset.x-k8s.io/neo created")
    elif verb == "delete":
        if jobset is None and "--ignore-not-found" not in flags:
            fail("NotFound")
        cloud.state["jobset"] = None
    elif verb == "get" and positionals[0] == "jobset":
        if jobset is None:
            fail('jobsets.jobset.x-k8s.io "neo" not found')
        if flags.get("--output") == "name":
            print("jobset.jobset.x-k8s.io/neo")
            return
        jobset["polls"] += 1
        fate = cloud.state["fates"][0] if cloud.state["fates"] else "well"
        if jobset["polls"] > 2:
            print("Failed" if fate == "mistake" else "Completed", end="")
    else:
        print("NAME READY")


def main() -> None:
    tool, *words = sys.argv[1:]
    with (HERE / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps([tool, *words]) + "\n")
    cloud = Cloud()
    try:
        (gcloud if tool == "gcloud" else kubectl)(words, cloud)
    except Refused as refused:
        cloud.state["violations"].append(f"{tool} {' '.join(words)}: {refused}")
        cloud.save()
        fail(str(refused), 2)
    finally:
        if not cloud.state["execute"] or "ssh" not in words:
            cloud.save()


if __name__ == "__main__":
    main()
