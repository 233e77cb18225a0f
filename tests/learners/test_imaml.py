"""iMAML against closed forms, and against MAML through an inner loop that has converged."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from tests import toys


def _on_the_quadratic(key, learner):
    with jax.enable_x64(True):
        theta, task = learner.init(key), toys.quadratic_task(jnp.float64)
        phi = learner.adapt(key, theta, task.support).params["p"]
        return float(phi), float(learner.grad(key, theta, task, meta_step=0)[1].params["p"])


def _quadratic(steps, **options):
    with jax.enable_x64(True):
        return jm.imaml(toys.quadratic(jnp.float64), toys.half_square, optax.sgd(0.2), jm.repeat(steps), **options)


def test_quadratic_gives_the_closed_form(key):
    """The support loss is (p - 1)^2 / 2, of Hessian 1, the query gradient p + 2."""
    phi, gradient = _on_the_quadratic(key, _quadratic(60, strength=2.0))
    np.testing.assert_allclose(phi, (1 + 2 * 3) / 3, rtol=1e-12)
    np.testing.assert_allclose(gradient, (phi + 2) / (1 + 1 / 2), rtol=1e-12)
    early, gradient = _on_the_quadratic(key, _quadratic(1, strength=2.0))
    assert early == pytest.approx(3 - 0.2 * 2) and gradient == pytest.approx((early + 2) / 1.5)


def test_the_released_codes_system(key):
    phi, gradient = _on_the_quadratic(key, _quadratic(3, strength=2.0, damping=1.0, added=10.0))
    np.testing.assert_allclose(gradient, (phi + 2) / (2 + 1 / 12), rtol=1e-12)


def test_it_approaches_mamls_gradient_as_the_inner_loop_converges(key):
    """On a convex problem: logistic regression pulled towards where it began."""
    with jax.enable_x64(True):
        net, task = jm.mlp(3, hidden=(), shape=(6,)), toys.blobs().sample(key, ())
        task = jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, task)
        theta = jm.Theta(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), net.init(key)))
        maml = jm.maml(net, jm.xent, jm.chain(jm.proximal(2.0), optax.sgd(0.2)), jm.repeat(200))
        exact = jax.jit(maml.grad, static_argnames="meta_step")(key, theta, task, meta_step=0)[1]
        gaps = []
        for steps in (2, 10, 200):
            learner = jm.imaml(net, jm.xent, optax.sgd(0.2), jm.repeat(steps), strength=2.0, iterations=30)
            ours = jax.jit(learner.grad, static_argnames="meta_step")(key, theta, task, meta_step=0)[1]
            gaps.append(float(optax.tree.norm(optax.tree.sub(ours.params, exact.params)) / optax.tree.norm(exact.params)))
    assert gaps[0] > 10 * gaps[1] > 100 * gaps[2] and gaps[2] < 1e-8


@pytest.mark.parametrize("name", ["shrunk as it begins", "one part stands still"])
def test_resets_and_what_stands_still_are_differentiated_through(key, name):
    """Against MAML through an inner loop that has converged, on a convex problem."""
    rules = {
        "shrunk as it begins": lambda pull: jm.chain(jm.shrink_perturb(0.6, 0.0), pull, optax.sgd(0.2)),
        "one part stands still": lambda pull: jm.chain(pull, jm.only("head/bias", optax.sgd(0.2))),
    }
    with jax.enable_x64(True):
        model = jm.mlp(3, hidden=(), shape=(6,))
        task = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, toys.blobs().sample(key, ()))
        theta = jm.Theta(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.init(key)))
        still = jm.chain()  # imaml pulls by itself
        learners = (
            jm.maml(model, jm.xent, rules[name](jm.proximal(2.0)), jm.repeat(200)),
            jm.imaml(model, jm.xent, rules[name](still), jm.repeat(200), strength=2.0, iterations=30),
        )
        exact, ours = (jax.jit(each.grad, static_argnames="meta_step")(key, theta, task, meta_step=0)[1] for each in learners)
        chex.assert_trees_all_close(ours.params, exact.params, rtol=1e-7, atol=1e-10)
        assert float(optax.tree.norm(exact.params)) > 0.01


def test_memory_is_flat_in_inner_steps_but_for_second_order(key):
    net = jm.mlp(3, hidden=(64, 64), shape=(6,))
    task = toys.blobs().sample(key, ())

    def memory(make, steps, **options):
        learner = make(net, jm.xent, optax.sgd(0.1), jm.repeat(steps), unroll=False, **options)
        grad = jax.jit(lambda theta: learner.grad(key, theta, task, meta_step=0)[1])
        found: Any = grad.lower(jm.Theta(net.init(key))).compile().memory_analysis()
        return found.temp_size_in_bytes

    for make, options in ((jm.imaml, {}), (jm.reptile, {}), (jm.maml, {"order": 1})):
        assert memory(make, 40, **options) <= 1.05 * memory(make, 20, **options)
    assert memory(jm.maml, 40) > 1.3 * memory(jm.maml, 20)


def test_another_optimiser_may_solve_and_a_pattern_mask(key):
    task, net = toys.blobs().sample(key, ()), toys.net()
    adam = jm.imaml(net, jm.xent, optax.adam(0.05), jm.repeat(5))  # no eps_root is needed
    _, gradient, _ = jax.jit(adam.grad, static_argnames="meta_step")(key, adam.init(key), task, meta_step=0)
    chex.assert_tree_all_finite(gradient)
    masked = jm.imaml(net, jm.xent, jm.lambda_mask([[0, 0, 1]], optax.sgd(0.1)), jm.repeat(3))
    theta = masked.init(key)
    phi = masked.adapt(key, theta, task.support)
    chex.assert_trees_all_equal(phi.params["layer1"], theta.params["layer1"])


def test_the_pull_is_the_gradient_of_its_term(key):
    params, start = ({"p": jax.random.normal(each, (3,))} for each in jax.random.split(key))
    rule = jm.proximal(0.5)
    updates: Any = rule.update.update({"p": jnp.ones(3)}, rule.update.init(start), params)[0]
    np.testing.assert_allclose(updates["p"], 1 + 0.5 * (params["p"] - start["p"]), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, "must be at least 0, and one of strength and added above 0"),
        ({"damping": -1.0}, "must be at least 0"),
        ({"iterations": 0}, "iterations must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jm.imaml(toys.net(), jm.xent, optax.sgd(0.1), jm.repeat(1), **options)
    with pytest.raises(ValueError, match="proximal: strength must be at least 0"):
        jm.proximal(-1.0)
