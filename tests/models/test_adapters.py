"""A user's own Flax networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jmeta as jm
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
