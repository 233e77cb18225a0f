"""One, two and eight devices give the same gradients, the same training and the same scores."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from jmeta.train import batch_gradient
from tests import toys

COUNTS = (1, 2, 8)
BATCH = 8
RUN = """
import sys
import jmeta as jm
from tests import test_devices
jm.use_cores(8)
test_devices.tell(sys.argv[1])
"""


def _metanas():
    net = jm.supernet(3, cells=1, nodes=1, channels=2, shape=(8, 8, 1))
    adam: Any = {name: optax.adam(0.01, b1=0.0) for name in ("alpha", "w")}
    turns = jm.lambda_mask([[1, 0], [0, 1]], optax.partition(adam, jm.top_level), labels=("alpha", "w"))
    rule = jm.chain(jm.mix(jm.anneal(1.0, 0.1, 2, every=2), threshold=0.01), turns)
    return jm.reptile(net, jm.xent, rule, jm.repeat(2), unroll=False, carry_state=True)


def _pictures():
    blobs = toys.blobs(size=64).sample
    return jm.Tasks(lambda key, data: jax.tree.map(lambda x: x.reshape(-1, 8, 8, 1) if x.ndim == 2 else x, blobs(key, ())))


CASES = {
    "maml, parameters shared out": lambda: (jm.maml(toys.net(), jm.xent, optax.sgd(0.1), jm.repeat(2)), toys.blobs()),
    "maml": lambda: (jm.maml(toys.net(), jm.xent, optax.sgd(0.1), jm.repeat(2)), toys.blobs()),
    "reptile": lambda: (
        jm.reptile(toys.net(), jm.xent, optax.adam(1e-2, b1=0.0, eps_root=1e-12), jm.minibatches(3, 4), carry_state=True),
        toys.blobs(),
    ),
    "metanas": lambda: (_metanas(), _pictures()),
    "snail": lambda: (
        jm.snail(jm.snail_net(toys.features(), 3, features=4, most_shots=2, attention=((4, 4), (4, 4)), filters=4)),
        toys.blobs(),
    ),
    "protonet": lambda: (jm.protonet(toys.features(), ways=3), toys.blobs()),
}


def tell(name):
    """Prints, as JSON, how far two and eight devices are from one."""
    learner, tasks = CASES[name]()
    key = jax.random.key(0)
    outer = optax.sgd(0.1)  # Adam would turn gradients that are zero but for rounding into whole steps
    found = {"gradient": [], "theta": [], "score": []}
    for count in COUNTS:
        share = min(4, count) if name.endswith("shared out") else 1
        mesh = jm.task_mesh(count, params=share)
        with jax.enable_x64(True):
            theta = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, _begin(learner, mesh, share))
            gradient = jax.jit(batch_gradient(learner, tasks.sample, BATCH, 1, mesh))(key, theta, tasks.data, 0)[1]
            found["gradient"].append(np.asarray(jax.flatten_util.ravel_pytree(gradient)[0]))
        theta = _begin(learner, mesh, share)
        done = jm.fit(key, learner, tasks, outer, 100, BATCH, theta=theta, chunk=1, mesh=mesh, progress=False)
        found["theta"].append(np.asarray(jax.flatten_util.ravel_pytree(done.theta.params)[0]))
        found["score"].append(str(jm.fewshot(key, learner, done.theta, tasks, 64, mesh=mesh)))
    far = {part: [_distance(each, found[part][0]) for each in found[part]] for part in ("gradient", "theta")}
    print(json.dumps({**far, "score": found["score"], "dtype": str(found["gradient"][0].dtype)}))


def _begin(learner, mesh, share):
    key = jax.random.key(0)
    return learner.init(key) if share == 1 else jm.init_sharded(key, learner, mesh, {"*/dense/kernel": 1})


def _distance(ours, one):
    """The largest difference, against the largest number."""
    return float(np.abs(ours - one).max() / np.abs(one).max())


@pytest.mark.parametrize("name", CASES)
def test_two_and_eight_devices_give_what_one_gives(name):
    command, where = [sys.executable, "-c", RUN, name], Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=where)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["dtype"] == "float64"
    assert max(found["gradient"]) < 1e-6
    assert max(found["theta"]) < 1e-4
    assert len(set(found["score"])) == 1
