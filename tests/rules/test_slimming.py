"""Slimming: the pull on the scales, and a pruned network that gives what the masked one gives."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from tests import toys

NETS = {
    "conv4": lambda filters: jm.conv4(3, filters=filters, shape=(28, 28, 1)),
    "conv4 pooled": lambda filters: jm.conv4(3, filters=filters, pool=True, shape=(32, 32, 3), norm="instance"),
}


def _moved(key, params):
    """Scales and biases as after training, so that biases of silent channels would be heard."""
    return jax.tree.map(lambda p, r: p + 0.5 * r, params, optax.tree.random_like(key, params))


def test_scales_alone_are_drawn_towards_zero(key):
    net = toys.normed()
    learner = jm.maml(net, jm.xent, jm.learned_rates(0.1), jm.repeat(1))
    theta = learner.init(key)
    theta = theta._replace(params=_moved(key, theta.params))
    outer = optax.chain(jm.slimming(0.01), optax.sgd(1.0))
    zeros = jax.tree.map(jnp.zeros_like, theta)
    updates: Any = outer.update(zeros, outer.init(theta), theta)[0]
    for name in ("layer1", "layer2"):
        scale = theta.params[name]["norm"]["scale"]
        np.testing.assert_allclose(updates.params[name]["norm"]["scale"], -0.01 * np.sign(scale))
        updates.params[name]["norm"]["scale"] = jnp.zeros(8)
    chex.assert_trees_all_equal(jax.tree.map(abs, updates), zeros)
    expected = jax.grad(lambda scale: 0.01 * jnp.abs(scale).sum())(theta.params["layer1"]["norm"]["scale"])
    found: Any = jm.slimming(0.01).update(zeros.params, optax.EmptyState(), theta.params)[0]
    np.testing.assert_allclose(found["layer1"]["norm"]["scale"], expected)


@pytest.mark.parametrize("name", NETS)
def test_a_pruned_network_gives_what_the_masked_one_gives(key, name):
    make = NETS[name]
    net, x = make(8), jax.random.normal(key, (5, 32, 32, 3) if "pooled" in name else (5, 28, 28, 1))
    rates = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), net.init(key))  # of two steps
    theta = jm.Theta(_moved(key, net.init(key)), {"learned_rates": net.init(key), "only": {"learned_rates": rates}})
    small = jm.prune(theta, 0.5)
    assert sum(small.filters) == 16 and min(small.filters) >= 1
    expected = net.apply(small.masked.params, x)
    np.testing.assert_allclose(make(small.filters).apply(small.theta.params, x), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - net.apply(theta.params, x)).max() > 1e-3
    chex.assert_trees_all_equal_shapes(small.theta.hyper["learned_rates"], small.theta.params)
    first = jax.tree.map(lambda leaf: leaf[0], small.theta.hyper["only"]["learned_rates"])
    chex.assert_trees_all_equal(first, small.theta.hyper["learned_rates"])
    scales = np.concatenate([np.abs(theta.params[layer]["norm"]["scale"]) for layer in small.kept])
    kept = np.concatenate(list(small.kept.values()))
    assert scales[kept].min() >= scales[~kept].max()


def test_nothing_pruned_is_the_same(key):
    theta = jm.Theta(jm.conv4(3, filters=8).init(key))
    chex.assert_trees_all_equal(jm.prune(theta, 0.0).theta, theta)
    assert jm.prune(theta, 0.999).filters == (1, 1, 1, 1)


def test_layers_follow_each_other_as_they_are_given(key):
    net = jm.mlp(3, hidden=(8, 8, 8), shape=(6,), norm="batch")
    params, x = _moved(key, net.init(key)), jax.random.normal(key, (5, 6))
    other = {"layer1": "one", "layer2": "two", "layer3": "three", "head": "z"}
    small = jm.prune(jm.Theta({other[name]: part for name, part in params.items()}), 0.5, layers=tuple(other.values()))
    back, masked = ({name: tree.params[other[name]] for name in other} for tree in (small.theta, small.masked))
    found = jm.mlp(3, hidden=small.filters, shape=(6,), norm="batch").apply(back, x)
    np.testing.assert_allclose(found, net.apply(masked, x), rtol=1e-4, atol=1e-5)


def _theta(net):
    return jm.Theta(net.init(jax.random.key(0)))


def _of_each_step(net):
    params = net.init(jax.random.key(0))
    return jm.Theta(params, {"step_norms": jm.step_norms(2).init(params)})


def test_scales_shrink_in_training(key):
    net = toys.normed()
    learner = jm.maml(net, jm.xent, optax.sgd(0.1), jm.repeat(1))
    mean = {}
    for strength in (0.0, 0.1):
        outer = optax.chain(jm.slimming(strength), optax.adam(1e-2))
        params = jm.fit(key, learner, toys.blobs(), outer, steps=30, batch=4, progress=False).theta.params
        mean[strength] = np.mean([np.abs(params[name]["norm"]["scale"]) for name in ("layer1", "layer2")])
    assert mean[0.1] < mean[0.0] - 0.1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: jm.prune(_theta(jm.conv4(3, filters=8)), 1.0), "fraction must be from 0 to below 1, got 1.0"),
        (lambda: jm.prune(_theta(jm.resnet12(3, widths=(8,), shape=(16, 16, 3))), 0.5), "got block1, head.*residual network"),
        (lambda: jm.prune(_theta(toys.net()), 0.5), "got layer1, layer2, head.*without normalisation"),
        (lambda: jm.prune(_theta(jm.conv4(3, filters=8))._replace(memory={"state": jnp.ones(1)}), 0.5), "carries the state"),
        (lambda: jm.prune(_theta(jm.conv4(3, filters=8)), 0.5, layers=("a", "head")), "layers must be those of the parameters"),
        (lambda: jm.prune(_of_each_step(jm.conv4(3, filters=8)), 0.5), r"meta-parameters of shape \(2, 8\).*jmeta.step_norms"),
        (lambda: jm.slimming(-1.0), "strength must be a finite number of at least 0"),
        (lambda: jm.slimming(1.0).update({}, optax.EmptyState()), "update needs params"),
        (lambda: jm.conv4(3, filters=(8, 8)), "one for each of the four blocks"),
        (lambda: jm.conv4(3, filters=(8, 8, 0, 8)), "filters must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()
