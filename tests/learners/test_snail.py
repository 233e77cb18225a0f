"""SNAIL as a learner of episodes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from jmeta.learners.snail import _fewer
from tests import toys


def _learner(most_shots=2, **options):
    sizes = {"features": 4, "most_shots": most_shots, "attention": ((8, 8), (8, 8)), "filters": 8}
    return jm.snail(jm.snail_net(jm.mlp(4, hidden=(8,), shape=(6,)), 3, **sizes), **options)


def test_it_learns_to_learn(key):
    learner, tasks = _learner(), toys.blobs()
    theta = learner.init(key)
    fit = jm.fit(key, learner, tasks, outer=optax.adam(3e-3), steps=250, batch=16, theta=theta, progress=False)
    before, after = (jm.fewshot(key, learner, each, tasks, 100) for each in (theta, fit.theta))
    assert after.mean > before.mean + 0.3 and not after.transductive
    assert jm.fewshot(key, learner, fit.theta, toys.blobs(shots=1), 100).mean > before.mean + 0.2


def test_shots_are_drawn_evenly_and_each_class_has_as_many(key):
    support = toys.blobs(shots=4).sample(key, ()).support
    masks = np.array([_fewer(each, support, 3).mask for each in jax.random.split(key, 400)]).reshape(400, 3, 4)
    shots = masks.sum(2)
    assert (shots == shots[:, :1]).all()
    counts = np.bincount(shots[:, 0].astype(int), minlength=5)
    assert counts[0] == 0 and counts[1:].min() > 70


def test_masked_examples_are_not_looked_at(key):
    learner, task = _learner(), toys.blobs().sample(key, ())
    theta, mask = learner.init(key), jnp.array([1.0, 0, 1, 0, 1, 0])
    other = task.support.x + (1 - mask)[:, None] * 5
    outputs = [
        learner.predict(learner.adapt(key, theta, task.support._replace(x=x, mask=mask)), task.query.x)
        for x in (task.support.x, other)
    ]
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-6)


def test_the_order_of_examples_is_drawn(key):
    learner, task = _learner(), toys.blobs().sample(key, ())
    theta = learner.init(key)
    outputs = [
        np.asarray(learner.predict(learner.adapt(each, theta, task.support), task.query.x)) for each in jax.random.split(key)
    ]
    assert not np.allclose(*outputs)


def test_more_examples_than_it_is_made_for_are_refused(key):
    learner = _learner(most_shots=1)
    with pytest.raises(ValueError, match="snail: the support set has 6 examples, but the network is made for 3"):
        learner.adapt(key, learner.init(key), toys.blobs().sample(key, ()).support)
