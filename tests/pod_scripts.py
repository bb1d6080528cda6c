"""Runs the scripts for pods against fake_cloud.py, which checks words and takes pods away.

Enters: settings, as pod.env has them, and what shall befall the pods. Leaves: what a script
said, and the command lines that the cloud heard. The fixture `cloud` (conftest.py) is one.
"""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

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
