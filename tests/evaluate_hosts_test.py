"""With two hosts one drives, and the scores are those of one host."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

import children
from evaluate_scoring_test import CONFIG, one_device, params, random_requests  # noqa: F401
from neo_jax.evaluate import hosts
from neo_jax.evaluate.scoring import Scorer
from neo_jax.state import Params

# Both processes draw the weights from one seed, spread them over one mesh, and only the
# first has requests.
HOST = """
import json, sys
sys.path[:0] = {path!r}
import jax
jax.distributed.initialize("localhost:{port}", 2, int(sys.argv[1]))
from flax import nnx
from neo_jax import sharding, state
from neo_jax.config import MeshConfig
from neo_jax.evaluate import hosts
from neo_jax.evaluate.batching import Request
from neo_jax.evaluate.scoring import Scorer
from neo_jax.model import NeoLM
import evaluate_scoring_test as test

mesh = sharding.make_mesh(MeshConfig())
assert mesh.size == 4
_, abstract = state.model_graph(test.CONFIG)
places = nnx.to_pure_dict(sharding.param_shardings(abstract, mesh))
full = test.large_params()
spread = jax.tree.map(
    lambda leaf, place: jax.make_array_from_callback(leaf.shape, place, lambda i: leaf[i]),
    full, places,
)
scorer = Scorer(test.CONFIG, mesh)
calls = {{"score": lambda r: scorer.score(spread, [Request(*each) for each in r])}}

def body(calls):
    requests = test.random_requests(5)
    return calls["score"](requests[:3]) + calls["score"](requests[3:])

found = hosts.drive(calls, body)
print(json.dumps(found), flush=True)
"""


def test_one_host_calls_straight_away() -> None:
    calls = {"double": lambda x: 2 * x}
    assert hosts.drive(calls, lambda these: these["double"](21)) == 42


@pytest.mark.slow
def test_two_hosts_score_as_one(params: Params) -> None:  # noqa: F811
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    tests = pathlib.Path(__file__).parent
    code = HOST.format(path=[str(tests.parent), str(tests)], port=port)
    flags = {"XLA_FLAGS": children.xla_flags(2), "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(index)],
            env={**os.environ, **flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in running]
    assert [p.returncode for p in running] == [0, 0], outputs[0][1] + outputs[1][1]
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert second is None
    requests = random_requests(5)
    expected = Scorer(CONFIG, one_device()).score(params, requests)
    assert [one[1:] for one in first] == [list(one[1:]) for one in expected]
    nats = [one[0] for one in first]
    assert nats == pytest.approx([one.loglikelihood for one in expected], abs=1e-5)
    assert jax.process_count() == 1
