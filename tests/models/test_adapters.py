"""A user's own Flax networks, and networks in mixed precision."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jmeta as jm
from jmeta.models.layers import BatchNorm
from tests import toys

EXAMPLE = jax.ShapeDtypeStruct((1, 6), "float32")


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, name="zeta")(x))
        return nn.Dense(3, name="alpha")(x)


class Stateful(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=False)(x))


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=False)(x))


class PlainNnx(nnx.Module):
    def __init__(self, rngs):
        self.zeta = nnx.Linear(6, 8, rngs=rngs)
        self.alpha = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.alpha(nnx.relu(self.zeta(x)))


class StatefulNnx(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x):
        return self.norm(x)


class DroppingNnx(nnx.Module):
    def __init__(self, rngs):
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        self.dense = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.drop(x))


@pytest.mark.parametrize(
    "make", [lambda: jm.from_linen(Plain(), EXAMPLE), lambda: jm.from_nnx(PlainNnx, EXAMPLE)], ids=["linen", "nnx"]
)
def test_a_network_of_ones_own_is_meta_trained(key, make):
    model = make()
    learner = jm.maml(model, jm.xent, optax.sgd(0.1), jm.repeat(2))
    losses = jm.fit(key, learner, toys.blobs(), optax.adam(1e-2), 100, 4, progress=False).history["loss"]
    assert losses[-20:].mean() < 0.8 * losses[:20].mean()


def test_layers_are_in_forward_order():
    assert jm.from_linen(Plain(), EXAMPLE).layers == jm.from_nnx(PlainNnx, EXAMPLE).layers == ("zeta", "alpha")


def test_nnx_apply_is_the_modules_own(key):
    model = jm.from_nnx(PlainNnx, EXAMPLE)
    x = jnp.ones((2, 6))
    np.testing.assert_allclose(model.apply(model.init(key), x), PlainNnx(nnx.Rngs(params=key))(x), rtol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: jm.from_linen(Stateful(), EXAMPLE), "mutable collections .'batch_stats'.*GroupNorm"),
        (lambda: jm.from_linen(Dropping(), EXAMPLE), "dropout"),
        (lambda: jm.from_nnx(StatefulNnx, EXAMPLE), "BatchStat.*GroupNorm"),
        (lambda: jm.from_nnx(DroppingNnx, EXAMPLE), "besides its parameters.*dropout"),
    ],
)
def test_state_and_dropout_are_refused_with_advice(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _images(key, count):
    classes = jnp.arange(count) % 5
    shapes = jax.random.uniform(key, (5, 28, 28, 1))[classes]
    return jm.Batch(shapes + 0.3 * jax.random.normal(key, shapes.shape), classes)


def _task(key):
    keys = jax.random.split(key)
    return jm.Task(_images(keys[0], 5), _images(keys[1], 15))


def _gradient(key, model):
    learner = jm.maml(model, jm.xent, optax.sgd(0.1), jm.repeat(1))
    theta = learner.init(key)
    _, gradient, info = jax.jit(lambda theta: learner.grad(key, theta, _task(key), meta_step=0))(theta)
    return gradient.params, float(info["loss"])


@pytest.mark.parametrize("norm", ["batch", "support"])
def test_mixed_precision_learns_what_full_precision_does(key, norm):
    full = jm.conv4(5, filters=16, norm=norm)
    (exact, loss), (narrow, narrow_loss) = (_gradient(key, model) for model in (full, jm.mixed(full)))
    assert narrow_loss == pytest.approx(loss, rel=0.05)
    for leaf in jax.tree.leaves(narrow):
        assert leaf.dtype == jnp.float32 and jnp.isfinite(leaf).all()
    ours, theirs = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (narrow, exact))
    assert (ours @ theirs) / (jnp.linalg.norm(ours) * jnp.linalg.norm(theirs)) > 0.95


@pytest.mark.parametrize("norm", ["batch", "support", "group", "layer", "instance", "none"])
def test_every_product_of_mixed_precision_is_narrow(key, norm):
    model = jm.mixed(jm.conv4(5, filters=8, norm=norm))
    learner = jm.maml(model, jm.xent, optax.sgd(0.1), jm.repeat(1))
    theta = jax.eval_shape(learner.init, key)
    program = jax.make_jaxpr(lambda theta: learner.grad(key, theta, _task(key), meta_step=0))(theta)
    products = re.findall(r":(\w+)\[[^\]]*\] = dot_general\[", str(program))
    assert len(products) > 20 and set(products) == {"bf16"}


def test_mixed_keeps_parameters_layers_and_statistics_wide(key):
    model = jm.conv4(5, filters=8, norm="support")
    narrow = jm.mixed(model)
    assert narrow.layers == model.layers and narrow.init is model.init and narrow is jm.mixed(model, "bfloat16")
    params, x = narrow.init(key), _images(key, 5).x
    assert narrow.stats is not None and model.stats is not None
    stats, exact = jax.jit(narrow.stats)(params, x), jax.jit(model.stats)(params, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype("float32")}
    first = stats["block1"]["norm"]["mean"], exact["block1"]["norm"]["mean"]
    np.testing.assert_allclose(*first, rtol=0.02, atol=0.002)
    exact, apply = np.asarray(jax.jit(model.apply)(params, x)), jax.jit(narrow.apply)
    for outputs in (apply(params, x), apply(params, x, stats)):
        assert outputs.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(outputs), exact, rtol=0.1, atol=0.05)


def test_statistics_of_a_narrow_batch_are_wide(key):
    """A mean of 100 and a deviation of 1 would drown in bfloat16's 8 bits, were they summed in it."""
    x = (100 + jax.random.normal(key, (512, 4))).astype(jnp.bfloat16)
    written: Any = BatchNorm().apply({"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}, x, mutable=["stats"])[1]
    exact = x.astype(jnp.float32)
    np.testing.assert_allclose(np.asarray(written["stats"]["mean"]), np.asarray(exact.mean(0)), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(written["stats"]["variance"]), np.asarray(exact.var(0)), rtol=1e-4)


def test_networks_of_ones_own_can_be_mixed(key):
    for model in (jm.from_linen(Plain(), EXAMPLE), jm.from_nnx(PlainNnx, EXAMPLE)):
        narrow, params, x = jm.mixed(model), model.init(key), jnp.ones((2, 6))
        assert narrow.apply(params, x).dtype == jnp.float32
        np.testing.assert_allclose(narrow.apply(params, x), model.apply(params, x), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [jnp.int8, "complex64", "narrow"])
def test_mixed_takes_floating_types_alone(dtype):
    with pytest.raises(ValueError, match="mixed: dtype must be a floating type"):
        jm.mixed(toys.net(), dtype)
