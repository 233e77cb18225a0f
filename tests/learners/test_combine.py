"""Learners made of learners."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from tests import toys


def _two(**options):
    return tuple(jm.maml(toys.net(), jm.xent, optax.sgd(0.1), jm.repeat(steps), **options) for steps in (1, 3))


def _fit(key, learner, steps, theta=None, batch=4, **options):
    options = {"outer": optax.sgd(0.1), "progress": False} | options
    return jm.fit(key, learner, toys.blobs(), steps=steps, batch=batch, theta=theta, **options)


@pytest.mark.parametrize("chunk", [1, 4])
def test_each_learner_trains_from_its_meta_step(key, chunk):
    first, second = _two()
    both = jm.switch(first, second, at=(3,))
    theta = first.init(key)
    fit = _fit(key, both, 5, theta, chunk=chunk)
    begun = _fit(key, first, 3, theta, chunk=chunk)
    chex.assert_trees_all_close(_fit(key, both, 3, theta, chunk=chunk).theta, begun.theta, atol=1e-6)
    only_second = _fit(key, jm.switch(first, second, at=(0,)), 5, theta, chunk=chunk)
    chex.assert_trees_all_close(only_second.theta, _fit(key, second, 5, theta, chunk=chunk).theta, atol=1e-6)
    distances = [float(optax.tree.norm(optax.tree.sub(fit.theta.params, other.theta.params))) for other in (begun, only_second)]
    assert min(distances) > 1e-4
    task = toys.blobs().sample(key, ())
    chex.assert_trees_all_equal(both.curve(key, theta, task), second.curve(key, theta, task))


def test_a_state_that_goes_on_passes_from_one_to_the_next(key):
    first, second = (
        jm.reptile(toys.net(), jm.xent, optax.adam(0.01, b1=0.0), jm.repeat(steps), carry_state=True) for steps in (2, 5)
    )
    fit = _fit(key, jm.switch(first, second, at=(1,)), 3, batch=2)
    assert int(optax.tree.get(fit.theta.memory["state"], "count")) == 2 + 5 + 5


def test_a_base_that_depends_on_the_task_still_wants_a_batch_of_one(key):
    rule = jm.chain(jm.zap("head", which="all"), optax.sgd(0.1))
    parts = [jm.asb(toys.net(), jm.xent, rule, jm.one_by_one(2), through=through) for through in (True, False)]
    learner = jm.switch(*parts, at=(1,))
    with pytest.raises(ValueError, match="meta-batch must be 1"):
        _fit(key, learner, 2, batch=2)
    assert np.isfinite(_fit(key, learner, 2, batch=1).history["loss"]).all()


def test_learners_that_do_not_fit_are_refused(key):
    first, second = _two()
    with pytest.raises(ValueError, match="switch: at must name a meta-step for each learner but the first"):
        jm.switch(first, second, at=())
    other = jm.watched(second, lambda theta: {"mean": jnp.mean(theta.params["head"]["kernel"])})
    with pytest.raises(ValueError, match="switch: the learners must have one theta, gradient and info"):
        _fit(key, jm.switch(first, other, at=(1,)), 2)


def test_what_is_watched_is_logged(key):
    look = lambda theta: {"mean": jnp.mean(theta.params["head"]["kernel"])}
    plain = _two()[0]
    theta = plain.init(key)
    fit = _fit(key, jm.watched(plain, look), 2, theta)
    np.testing.assert_allclose(fit.history["mean"][0], look(theta)["mean"], rtol=1e-5)
    chex.assert_trees_all_equal(fit.theta, _fit(key, plain, 2, theta).theta)
    assert jax.tree.leaves(fit.history)[0].shape == (2,)
