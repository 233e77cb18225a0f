"""What the benchmarks count."""

import importlib.util
import sys
from pathlib import Path

import jax
import pytest

from jmeta.evaluate.cost import operations

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def work():
    spec = importlib.util.spec_from_file_location("work", FOLDER / "work.py")
    assert spec is not None and spec.loader is not None
    sys.modules["work"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("row", "order"), [("asb-64", 1), *((row, order) for row in ("sinusoid", "omniglot-5w1s", "colour84-5w5s") for order in (1, 2))]
)
def test_operations_are_those_of_the_program(key, work, row, order):
    small = work.ROWS[row]._replace(order=order, steps=2, queries=2, filters=8)
    if small.network == "pooled":
        small = small._replace(shape=(32, 32, 3))
    if small.kind == "asb":
        small = small._replace(shots=2, ways=20)
    learner = work.learner_of(small)
    theta = jax.eval_shape(learner.init, key)
    inputs, queries = (jax.ShapeDtypeStruct((count, *small.shape), "float32") for count in work.examples(small))
    labels = [
        jax.ShapeDtypeStruct(x.shape[:1] if small.network != "mlp" else x.shape, "int32" if small.network != "mlp" else "float32")
        for x in (inputs, queries)
    ]
    task = work.jm.Task(work.jm.Batch(inputs, labels[0]), work.jm.Batch(queries, labels[1]))
    found = operations(lambda theta, task: learner.grad(key, theta, task, meta_step=0)[1], theta, task)
    zeros = 0.15 if small.network == "conv3" else 0.05  # without padding the way back multiplies zeros around the maps
    assert work.operations(small) == pytest.approx(small.tasks * found, rel=zeros)
