"""Reptile against its closed form, and what it carries."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from tests import toys


def _grad(key, learner, theta=None, tasks=None):
    theta = learner.init(key) if theta is None else theta
    return jax.jit(lambda theta, task: learner.grad(key, theta, task, meta_step=0))(theta, (tasks or toys.blobs()).sample(key, ()))


@pytest.mark.parametrize("steps", [1, 3, 12])
def test_quadratic_gives_the_closed_form(key, steps):
    with jax.enable_x64(True):
        learner = jm.reptile(toys.quadratic(jnp.float64), toys.half_square, optax.sgd(0.1), jm.repeat(steps))
        _, gradient, info = learner.grad(key, learner.init(key), toys.quadratic_task(jnp.float64), meta_step=0)
    phi = 1 + (3 - 1) * 0.9**steps
    np.testing.assert_allclose(gradient.params["p"], 3 - phi, rtol=1e-14)
    np.testing.assert_allclose(info["loss"], 0.5 * (phi + 2) ** 2, rtol=1e-14)


def test_one_outer_step_of_rate_one_ends_in_the_mean_of_the_adapted(key):
    learner = jm.reptile(toys.net(), jm.xent, optax.sgd(0.1), jm.repeat(3))
    theta, tasks = learner.init(key), toys.blobs()
    fit = jm.fit(key, learner, tasks, outer=optax.sgd(1.0), steps=1, batch=4, theta=theta, progress=False)
    key_step, adapted = jax.random.fold_in(key, 0), []
    for number in range(4):
        key_task, key_learn = jax.random.split(jax.random.fold_in(key_step, number))
        adapted.append(learner.adapt(key_learn, theta, tasks.sample(key_task, ()).support).params)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *adapted)
    chex.assert_trees_all_close(fit.theta.params, mean, atol=1e-6)


def test_the_inner_optimiser_goes_on_from_task_to_task(key):
    """Two meta-steps of one task each are one run of Adam, whose second half starts from the outer step's parameters."""
    adam = optax.adam(0.01, b1=0.0)
    learner = jm.reptile(toys.net(), jm.xent, adam, jm.repeat(2), carry_state=True)
    theta, support = learner.init(key), toys.blobs().sample(key, ()).support
    params, state = theta.params, adam.init(theta.params)
    for _ in range(4):
        grads = jax.grad(lambda p: jm.xent(toys.net().apply(p, support.x), support.y))(params)
        updates, state = adam.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for _ in range(2):
        base, gradient, _ = _grad(key, learner, theta)
        theta = base._replace(params=jax.tree.map(jnp.subtract, theta.params, gradient.params))
    chex.assert_trees_all_close(theta.params, params, atol=1e-6)
    assert int(optax.tree.get(theta.memory["state"], "count")) == 4


def test_without_transduction_a_query_is_predicted_with_the_support_set_alone(key):
    task, model = toys.blobs().sample(key, ()), toys.normed(norm="batch")
    together, alone = (jm.reptile(model, jm.xent, optax.sgd(0.1), jm.repeat(2), transductive=each) for each in (True, False))
    theta = together.init(key)
    phi = alone.adapt(key, theta, task.support)
    outputs = alone.predict(phi, task.query.x)
    for number, one in enumerate(task.query.x):
        expected = model.apply(phi.params, jnp.concatenate([task.support.x, one[None]]))[-1]
        np.testing.assert_allclose(outputs[number], expected, atol=1e-5)
    assert not np.allclose(outputs, together.predict(together.adapt(key, theta, task.support), task.query.x), atol=1e-3)
    np.testing.assert_allclose(alone.curve(key, theta, task)[-1], outputs, atol=1e-5)
    assert not jm.fewshot(key, alone, theta, toys.blobs(), 4).transductive
    assert jm.fewshot(key, together, theta, toys.blobs(), 4).transductive
    base, _, _ = _grad(key, alone, theta)
    assert base.memory == ()


def test_it_moves_to_where_a_reset_and_the_steps_led(key):
    learner = jm.reptile(toys.net(), jm.xent, jm.chain(jm.zap("head"), optax.sgd(0.1)), jm.repeat(2))
    theta = learner.init(key)
    phi = learner.adapt(key, theta, toys.blobs().sample(key, ()).support)
    chex.assert_trees_all_close(_grad(key, learner)[1].params, jax.tree.map(jnp.subtract, theta.params, phi.params), atol=1e-6)


def test_channels_that_one_task_silences_stay_for_the_others(key):
    rule = jm.chain(jm.route(0.5, where="forward", refresh="task"), optax.sgd(0.1))
    learner = jm.reptile(toys.normed(), jm.xent, rule, jm.repeat(2))
    theta = learner.init(key)
    phi = learner.adapt(key, theta, toys.blobs().sample(key, ()).support)
    moved, scale = _grad(key, learner)[1].params["layer1"]["norm"]["scale"], phi.params["layer1"]["norm"]["scale"]
    assert (np.asarray(scale) == 0).sum() == 4
    np.testing.assert_array_equal(np.asarray(moved)[np.asarray(scale) == 0], 0)


def test_a_reset_beside_one_tasks_silence_is_a_way_gone_all_the_same(key):
    """A head drawn anew is moved to from theta's, whether or not another part of the rule silences channels for the task."""
    rule = jm.chain(jm.zap("head"), jm.route(0.5, where="forward", refresh="task"), optax.sgd(0.1))
    learner = jm.reptile(toys.normed(), jm.xent, rule, jm.repeat(2))
    theta = learner.init(key)
    phi, moved = learner.adapt(key, theta, toys.blobs().sample(key, ()).support).params, _grad(key, learner)[1].params
    chex.assert_trees_all_close(moved["head"], jax.tree.map(jnp.subtract, theta.params["head"], phi["head"]), atol=1e-6)
    silent = np.asarray(phi["layer1"]["norm"]["scale"]) == 0
    assert silent.sum() == 4 and not np.asarray(moved["layer1"]["norm"]["scale"])[silent].any()


def test_it_warns_of_meta_parameters(key):
    learner = jm.reptile(toys.net(), jm.xent, jm.learned_rates(0.1), jm.repeat(2))
    with pytest.warns(UserWarning, match="reptile: the meta-parameters of learned_rates stay as they start"):
        learner.init(key)


def test_it_learns(key):
    learner = jm.reptile(toys.net(), jm.xent, optax.adam(0.02, b1=0.0), jm.minibatches(5, 4), carry_state=True)
    tasks = toys.blobs(shots=4)
    fit = jm.fit(key, learner, tasks, outer=optax.sgd(1.0), steps=60, batch=4, progress=False)
    before, after = (jm.fewshot(key, learner, theta, tasks, 40) for theta in (learner.init(key), fit.theta))
    assert after.mean > before.mean + 0.1
