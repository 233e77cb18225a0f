"""MAML++: its schedule, its norms of each step, and its place among the others."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmeta as jm
from tests import toys


def test_the_weights_follow_the_released_codes_schedule():
    steps, epochs = 5, 10
    schedule = jm.step_weights(steps, epochs=epochs, epoch=500)
    early, late = np.full(steps - 1, 1 / steps), 1 / steps
    for epoch in range(epochs):
        others = np.maximum(early - epoch / (steps * epochs), 0.03 / steps)
        last = min(late + epoch * (steps - 1) / (steps * epochs), 1 - (steps - 1) * 0.03 / steps)
        np.testing.assert_allclose(schedule(500 * epoch + 7), [*others, last], rtol=1e-5)
    np.testing.assert_array_equal(schedule(5000), [0, 0, 0, 0, 1])


def test_each_step_has_norms_of_its_own(key):
    rule, params = jm.step_norms(2), toys.normed().init(key)
    hyper = rule.init(params)
    assert set(hyper) == {f"layer{number}/norm/{name}" for number in (1, 2) for name in ("scale", "bias")}
    hyper = {**hyper, "layer1/norm/scale": jnp.stack([jnp.full(8, 2.0), jnp.full(8, 3.0)])}
    learning, predicting = ((key, 0, 2.0), (key, 1, 3.0), (key, 2, 3.0)), ((None, 0, 2.0), (None, 1, 2.0), (None, 2, 3.0))
    for own, step, value in (*learning, *predicting):  # what is predicted after a step uses that step's
        gated = rule.gate(params, step=step, hyper=hyper, key=own)
        np.testing.assert_array_equal(gated["layer1"]["norm"]["scale"], value)
        chex.assert_trees_all_equal(gated["head"], params["head"])


def test_norms_are_meta_learned_and_not_adapted(key):
    learner = jm.maml_plus_plus(toys.normed(), jm.xent, jm.repeat(2))
    theta, task = learner.init(key), toys.blobs().sample(key, ())
    phi = learner.adapt(key, theta, task.support)
    chex.assert_trees_all_equal(phi.params["layer1"]["norm"], theta.params["layer1"]["norm"])
    _, gradient, _ = jax.jit(lambda theta: learner.grad(key, theta, task, meta_step=0))(theta)
    assert all(float(jnp.abs(leaf[step]).max()) > 0 for leaf in gradient.hyper["step_norms"].values() for step in (0, 1))
    assert all(leaf.shape == (2,) for leaf in jax.tree.leaves(gradient.hyper["learned_rates"]))


def test_first_order_comes_first(key):
    theta, task = None, toys.blobs().sample(key, ())
    gradients = {}
    for name, first_order in (("both", 3), ("second", 0)):
        learner = jm.maml_plus_plus(toys.normed(), jm.xent, jm.repeat(2), first_order=first_order)
        theta = learner.init(key) if theta is None else theta
        grad = jax.jit(lambda step, learner=learner, theta=theta: learner.grad(key, theta, task, meta_step=step)[1].params)
        gradients[name] = [grad(step) for step in (2, 3)]
    chex.assert_trees_all_close(gradients["both"][1], gradients["second"][1], rtol=1e-5, atol=1e-6)
    difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), gradients["both"][0], gradients["second"][0])
    assert max(jax.tree.leaves(difference)) > 1e-4


def test_what_cannot_be_is_refused(key):
    with pytest.raises(ValueError, match=r"step_norms: no normalisation of .* has a scale"):
        jm.step_norms(2).init(toys.net().init(key))
    learner = jm.maml(toys.net(), jm.xent, jm.learned_rates(0.1), jm.repeat(3), step_weights=jm.step_weights(1))
    with pytest.raises(
        ValueError, match=r"maml: step_weights must give one weight for each of the 3 inner steps, got shape \(1,\)"
    ):
        learner.grad(key, learner.init(key), toys.blobs().sample(key, ()), meta_step=0)
    for make in (lambda: jm.step_norms(0), lambda: jm.step_weights(0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            make()
