"""CAVIA by rules equals CAVIA by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from tests import toys


def _net():
    return jm.with_context(lambda shape: jm.mlp(3, hidden=(8,), shape=shape), (6,), 4)


def test_it_equals_cavia_by_hand(key):
    net, task = _net(), toys.blobs().sample(key, ())
    learner = jm.cavia(net, jm.xent, optax.sgd(0.5), jm.repeat(2))
    theta = learner.init(key)
    theta = theta._replace(params={**theta.params, "context": jnp.ones(4)})  # which the reset undoes

    def by_hand(params):
        def loss(context, batch):
            return jm.xent(net.apply({**params, "context": context}, batch.x), batch.y)

        context = jnp.zeros(4)
        for _ in range(2):
            context = context - 0.5 * jax.grad(loss)(context, task.support)
        return loss(context, task.query)

    value, expected = jax.value_and_grad(by_hand)(theta.params)
    _, gradient, info = learner.grad(key, theta, task, meta_step=0)
    np.testing.assert_allclose(info["loss"], value, rtol=1e-5)
    chex.assert_trees_all_close(gradient.params, expected, rtol=1e-4, atol=1e-6)
    phi = learner.adapt(key, theta, task.support)
    chex.assert_trees_all_equal(phi.params["head"], theta.params["head"])
    assert float(jnp.abs(phi.params["context"]).max()) > 0


def test_images_get_the_context_as_channels(key):
    net = jm.with_context(lambda shape: jm.conv4(3, filters=4, shape=shape), (16, 16, 1), 2)
    params, x = net.init(key), jax.random.normal(key, (5, 16, 16, 1))
    inner = jm.conv4(3, filters=4, shape=(16, 16, 3))
    context = jnp.array([1.0, -2.0])
    channels = jnp.broadcast_to(context, (5, 16, 16, 2))
    own = {name: layer for name, layer in params.items() if name != "context"}
    outputs = net.apply({**params, "context": context}, x)
    np.testing.assert_allclose(outputs, inner.apply(own, jnp.concatenate([x, channels], -1)), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="cavia: the model has no layer 'context', but layer1, layer2, head"):
        jm.cavia(toys.net(), jm.xent, optax.sgd(0.1), jm.repeat(1))
    with pytest.raises(ValueError, match="with_context: size must be at least 1, got 0"):
        jm.with_context(lambda shape: jm.mlp(1, shape=shape), (1,), 0)
