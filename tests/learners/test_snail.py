"""SNAIL as a learner of episodes."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from jmeta import builders, presets
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


@pytest.mark.parametrize("norm", ["none", "batch", "support"])
def test_masked_examples_are_not_looked_at_nor_in_the_statistics(key, norm):
    """One shot of two is left: the known part of the network is what it is for these alone, whatever the others show."""
    embedding = jm.mlp(4, hidden=(8,), shape=(6,), norm=norm)
    sizes = {"features": 4, "most_shots": 2, "attention": ((8, 8), (8, 8)), "filters": 8}
    learner, task = jm.snail(jm.snail_net(embedding, 3, **sizes)), toys.blobs().sample(key, ())
    theta, mask = learner.init(key), jnp.array([1.0, 0, 1, 0, 1, 0])
    other = task.support.x + (1 - mask)[:, None] * 5
    outputs = [
        learner.predict(learner.adapt(key, theta, task.support._replace(x=x, mask=mask)), task.query.x)
        for x in (task.support.x, other)
    ]
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)
    if embedding.stats is not None:
        known = learner.adapt(key, theta, task.support._replace(mask=mask)).known["stats"]
        alone = embedding.stats(theta.params["embedding"], task.support.x[::2])
        chex.assert_trees_all_close(known, alone, rtol=1e-4, atol=1e-5)


def test_queries_of_the_presets_network_are_answered_each_by_itself(key):
    config = dataclasses.replace(presets.preset("snail-omniglot-5w1s"), filters=4, train_shots=2)
    learner = builders.make_learner(config)
    theta, keys = learner.init(key), jax.random.split(key)
    support = jm.Batch(jax.random.uniform(keys[0], (10, 28, 28, 1)), jnp.arange(10) % 5)
    queries = jax.random.uniform(keys[1], (3, 28, 28, 1))

    @jax.jit
    def answers(theta):
        known = learner.adapt(key, theta, support)
        return learner.predict(known, queries), jnp.concatenate([learner.predict(known, one[None]) for one in queries])

    together, alone = answers(theta)
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


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
