"""Scores and their intervals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from tests import toys


def _learner(norm="none", steps=2):
    return jm.maml(jm.mlp(3, hidden=(8,), shape=(6,), norm=norm), jm.xent, optax.sgd(0.1), jm.repeat(steps))


def test_score_equals_a_loop_over_episodes(key):
    learner, tasks = _learner(), toys.blobs()
    theta = learner.init(key)
    score = jm.fewshot(key, learner, theta, tasks, 30)
    values = []
    for index in range(30):
        key_task, key_learn = jax.random.split(jax.random.fold_in(key, index))
        task = tasks.sample(key_task, ())
        outputs = learner.predict(learner.adapt(key_learn, theta, task.support), task.query.x)
        values.append(float((outputs.argmax(-1) == task.query.y).mean()))
    assert score.mean == pytest.approx(np.mean(values), abs=1e-6)
    assert score.interval == pytest.approx(1.96 * np.std(values, ddof=1) / np.sqrt(30), abs=1e-6)
    assert score.by_step.shape == (3, 2) and score.by_step[-1, 0] == score.mean
    np.testing.assert_allclose(score.each, values, atol=1e-6)
    before = jax.vmap(lambda key: tasks.sample(key, ()))(
        jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i))[0])(jnp.arange(30))
    )
    outputs = jax.vmap(lambda x: learner.predict(theta, x))(before.query.x)
    assert score.by_step[0, 0] == pytest.approx(float((outputs.argmax(-1) == before.query.y).mean()), abs=1e-6)


def test_the_last_step_alone_scores_as_at_the_end_of_the_curve(key):
    learner, tasks = _learner(), toys.blobs()
    last, every = (jm.fewshot(key, learner, learner.init(key), tasks, 30, every_step=each) for each in (False, True))
    assert last.mean == pytest.approx(every.mean, abs=1e-6) and last.interval == pytest.approx(every.interval, abs=1e-6)
    assert last.by_step.shape == (1, 2) and "by inner step" not in str(last)


def test_the_learner_tested_may_take_more_steps(key):
    theta = _learner().init(key)
    assert jm.fewshot(key, _learner(steps=5), theta, toys.blobs(), 5).by_step.shape == (6, 2)


@pytest.mark.parametrize("norm, transductive", [("batch", True), ("support", False), ("layer", False), ("none", False)])
def test_transduction_is_found_and_printed(key, norm, transductive):
    learner = _learner(norm)
    score = jm.fewshot(key, learner, learner.init(key), toys.blobs(), 5)
    assert score.transductive == transductive
    assert ("not transductive" in str(score)) != transductive
    assert "5 episodes" in str(score) and "95 % interval" in str(score)


def test_paired_differences_are_those_of_the_same_episodes(key):
    theta = _learner().init(key)
    one, other = (jm.fewshot(key, _learner(steps=steps), theta, toys.blobs(), 30) for steps in (2, 0))
    mean, interval = jm.paired(one, other)
    assert mean == pytest.approx(one.mean - other.mean)
    assert interval == pytest.approx(1.96 * (one.each - other.each).std(ddof=1) / 30**0.5)
    assert jm.paired(one, one) == (0.0, 0.0)
    with pytest.raises(ValueError, match="same episodes, got 30 and 5"):
        jm.paired(one, jm.fewshot(key, _learner(), theta, toys.blobs(), 5))


def test_too_few_episodes_have_no_interval(key):
    learner = _learner()
    with pytest.raises(ValueError, match="episodes must be at least 2"):
        jm.fewshot(key, learner, learner.init(key), toys.blobs(), 1)


def test_regression_needs_a_metric_of_its_own(key):
    learner = jm.maml(jm.mlp(1), jm.mse, optax.sgd(0.01), jm.repeat(1))
    with pytest.raises(ValueError, match=r"metric=jm\.mse"):
        jm.fewshot(key, learner, learner.init(key), jm.sinusoid(5), 5)


def test_losses(key):
    logits, y, mask = jnp.array([[2.0, 0.0], [0.0, 1.0], [5.0, 0.0]]), jnp.array([0, 0, 1]), jnp.array([1.0, 1.0, 0.0])
    assert float(jm.accuracy(logits, y)) == pytest.approx(1 / 3)
    assert float(jm.accuracy(logits, y, mask)) == pytest.approx(1 / 2)
    expected = np.mean([np.log1p(np.exp(-2.0)), 1 + np.log1p(np.exp(-1.0))])
    assert float(jm.xent(logits, y, mask)) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="must be equal"):
        jm.mse(logits, logits[:, 0])
