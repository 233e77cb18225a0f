"""MAML in float64 against PyTorch's numbers, which `tests/references/make_torch.py` wrote."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import jmeta as jm

REFERENCES = Path(__file__).parents[1] / "references"
SETUPS = {"conv4": (lambda: jm.conv4(3, filters=8), jm.xent), "mlp": (lambda: jm.mlp(1, hidden=(8, 8)), jm.mse)}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def load(name):
    with np.load(REFERENCES / f"maml_{name}.npz") as file:
        return dict(file)


def tree(arrays, prefix):
    flat = {name.removeprefix(prefix): jnp.asarray(a) for name, a in arrays.items() if name.startswith(prefix)}
    return unflatten_dict(flat, sep="/")


def flat(params) -> dict[str, Any]:
    return dict(flatten_dict(params, sep="/"))


def task_of(arrays):
    def batch(part):
        x, y = arrays[f"{part}_x"], arrays[f"{part}_y"]
        return jm.Batch(jnp.asarray(x / 255 if x.dtype == np.uint8 else x), jnp.asarray(y))

    return jm.Task(batch("support"), batch("query"))


def setup(name, steps, order):
    """PyTorch's arrays, the same learner in jmeta, and the same theta."""
    arrays, (model, loss) = load(name), SETUPS[name]
    learner = jm.maml(model(), loss, optax.sgd(float(arrays["rate"])), jm.repeat(steps), order=order)
    theta = learner.init(jax.random.key(0))
    return arrays, learner, theta._replace(params=tree(arrays, "theta/"))


def assert_close(ours, theirs):
    # A convolution's bias in front of a batch-norm has a gradient of 0, of which both sides make 1e-17: hence atol.
    ours, theirs = flat(ours), flat(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == jnp.float64
        np.testing.assert_allclose(ours[name], value, rtol=1e-8, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", SETUPS)
def test_meta_gradient_and_loss_are_pytorchs(name, steps, order):
    arrays, learner, theta = setup(name, steps, order)
    _, gradient, info = jax.jit(learner.grad)(jax.random.key(1), theta, task_of(arrays), meta_step=0)
    np.testing.assert_allclose(info["loss"], arrays[f"steps{steps}/loss"], rtol=1e-10)
    assert_close(gradient.params, tree(arrays, f"steps{steps}/order{order}/"))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", SETUPS)
def test_adapted_parameters_are_pytorchs(name, steps):
    arrays, learner, theta = setup(name, steps, 2)
    phi = jax.jit(learner.adapt)(jax.random.key(1), theta, task_of(arrays).support)
    assert_close(phi.params, tree(arrays, f"steps{steps}/phi/"))


@pytest.mark.parametrize("name", SETUPS)
def test_the_orders_differ_in_the_reference(name):
    arrays = load(name)
    first, second = (flat(tree(arrays, f"steps3/order{order}/")) for order in (1, 2))
    assert not np.allclose(first["head/kernel"], second["head/kernel"], rtol=1e-2)
