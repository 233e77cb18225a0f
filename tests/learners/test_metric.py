"""Learners that compare, against their formulas."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from tests import toys


def _embedded(key, learner):
    """Support features by class `[3, 2, 4]`, query features, and the learner's logits for the queries."""
    task, theta = toys.blobs().sample(key, ()), learner.init(key)
    f = lambda x: np.asarray(toys.features().apply(theta.params, x), np.float64)
    return (
        f(task.support.x).reshape(3, 2, 4),
        f(task.query.x),
        learner.predict(learner.adapt(key, theta, task.support), task.query.x),
    )


def test_a_protonets_logits_are_distances_to_the_means_of_classes(key):
    support, query, logits = _embedded(key, jm.protonet(toys.features(), ways=3))
    expected = [[-((x - own.mean(0)) ** 2).sum() for own in support] for x in query]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    support, query, logits = _embedded(key, jm.protonet(toys.features(), ways=3, distance="cosine"))
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(logits, [[cosine(x, own.mean(0)) - 1 for own in support] for x in query], rtol=1e-4, atol=1e-5)


def test_matching_attends_to_examples(key):
    support, query, logits = _embedded(key, jm.matching(toys.features(), ways=3, temperature=0.5))
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    weights = np.exp([[[cosine(x, one) / 0.5 for one in own] for own in support] for x in query])
    np.testing.assert_allclose(np.exp(logits), weights.sum(2) / weights.sum((1, 2))[:, None], rtol=1e-4)


def test_ridge_solves_for_the_head(key):
    support, query, logits = _embedded(key, jm.ridge(toys.features(), ways=3, strength=0.7))
    ones = lambda rows: np.concatenate([rows, np.ones_like(rows[:, :1])], 1)
    rows, labels = ones(support.reshape(6, 4)), np.repeat(np.eye(3), 2, 0)
    weights = np.linalg.solve(rows.T @ rows + 0.7 * np.eye(5), rows.T @ labels)  # the same by the other normal equation
    np.testing.assert_allclose(logits, ones(query) @ weights, rtol=1e-3, atol=1e-4)


def test_ridge_learns_its_strength(key):
    learner = jm.ridge(toys.features(), ways=3)
    theta, task = learner.init(key), toys.blobs().sample(key, ())
    _, gradient, _ = learner.grad(key, theta, task, meta_step=0)
    assert all(float(jnp.abs(leaf)) > 0 for leaf in (gradient.hyper["ridge"]["log_strength"], gradient.hyper["ridge"]["scale"]))


MAKERS = [jm.protonet, jm.matching, jm.ridge]


@pytest.mark.parametrize("make", MAKERS)
def test_a_class_without_examples_is_never_taken(key, make):
    """Learners of 5 ways on episodes of 3: the classes that are there have the logits that they have for 3 ways."""
    task = toys.blobs().sample(key, ())
    wide, plain = (make(toys.features(), ways=ways) for ways in (5, 3))
    theta = plain.init(key)
    theta = theta._replace(params=jax.tree.map(lambda leaf: 0.1 * leaf, theta.params))  # features near 0, where a mean of none is
    logits, expected = (each.predict(each.adapt(key, theta, task.support), task.query.x) for each in (wide, plain))
    np.testing.assert_allclose(logits[:, :3], expected, rtol=1e-4, atol=1e-5)
    assert (np.argmax(logits, 1) < 3).all() and float(logits[:, 3:].max()) < float(logits[:, :3].min()) - 10


@pytest.mark.parametrize("make", MAKERS)
def test_padding_counts_for_nothing(key, make):
    learner = make(toys.features(), ways=3)
    theta, task = learner.init(key), toys.blobs().sample(key, ())
    x = jnp.concatenate([task.support.x, jnp.full((2, 6), 9.0)])
    y = jnp.concatenate([task.support.y, jnp.array([0, 1])])
    padded = jm.Batch(x, y, jnp.array([1.0] * 6 + [0.0] * 2))
    outputs = [learner.predict(learner.adapt(key, theta, each), task.query.x) for each in (task.support, padded)]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", MAKERS)
def test_one_theta_serves_any_number_of_ways(key, make):
    trained, tested = (make(toys.features(), ways=ways) for ways in (5, 3))
    outer = optax.adam(0.01)
    theta = trained.init(key)
    fit = jm.fit(key, trained, toys.blobs(ways=5), outer=outer, steps=60, batch=4, theta=theta, progress=False)
    before, after = (jm.fewshot(key, tested, each, toys.blobs(), 60) for each in (theta, fit.theta))
    assert after.mean > before.mean and after.by_step.shape == (1, 2)


def test_support_statistics_serve_the_queries(key):
    model: Any = jm.mlp(4, hidden=(8,), shape=(6,), norm="support")
    learner = jm.protonet(model, ways=3)
    theta, task = learner.init(key), toys.blobs().sample(key, ())
    phi = learner.adapt(key, theta, task.support)
    np.testing.assert_allclose(learner.predict(phi, task.query.x)[:1], learner.predict(phi, task.query.x[:1]), rtol=1e-5)
    chex.assert_trees_all_close(phi.stats, model.stats(theta.params, task.support.x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jm.protonet(toys.features(), ways=0), "protonet: ways must be an int of at least 1, got 0"),
        (lambda: jm.protonet(toys.features(), ways=3, distance="l1"), "distance must be 'euclidean' or 'cosine', got 'l1'"),
        (lambda: jm.matching(toys.features(), ways=3, temperature=0), "matching: temperature must be above 0"),
        (lambda: jm.ridge(toys.features(), ways=3, strength=0), "ridge: strength must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_conv4_without_a_head_embeds(key):
    for pool, size in ((False, 8), (True, 8)):
        model = jm.conv4(None, filters=8, pool=pool)
        params = model.init(key)
        assert model.apply(params, jnp.zeros((2, 28, 28, 1))).shape == (2, size) and "head" not in params
        assert model.layers == ("block1", "block2", "block3", "block4")
