"""The mixture of a supernet's operations, and optimisers for its two parts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from jmeta.architecture import init_alpha, mixture


def test_the_temperature_falls_within_each_task_and_takes_two_steps_where_two_take_turns(key):
    schedule = jm.anneal(1.0, 0.1, 5, every=2)
    expected = [1.0, 1.0, 0.775, 0.775, 0.55, 0.55, 0.325, 0.325, 0.1, 0.1, 0.1, 0.1]
    np.testing.assert_allclose([schedule(step) for step in range(12)], expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(schedule)(jnp.array(3)), 0.775, rtol=1e-6)
    assert [float(jm.anneal(1.0, 0.5, 1)(step)) for step in (0, 1)] == [1.0, 0.5]
    params = {"alpha": init_alpha(key, 2), "w": {}}
    for step in (0, 9):
        gated = jm.mix(schedule, threshold=0.01).gate(params, step=step, hyper=(), key=None)
        chex.assert_trees_all_close(gated["mixture"], mixture(params["alpha"], schedule(step), 0.01))
    assert jm.mix(schedule) is jm.mix(jm.anneal(1.0, 0.1, 5, every=2))


def test_a_schedule_that_reaches_zero_is_seen():
    """What it weighs is not a number, pruned or not; a network that silently weighs nothing would go unnoticed."""
    params = jm.supernet(5, cells=1, nodes=1, channels=2).init(jax.random.key(0))
    for threshold in (0.0, 0.01):
        rule = jm.mix(optax.linear_schedule(1.0, 0.0, 2), threshold=threshold)
        for step, finite in ((1, True), (2, False)):
            gated = rule.gate(params, step=step, hyper=(), key=None)["mixture"]
            assert all(bool(jnp.isfinite(leaf).all()) == finite for leaf in jax.tree.leaves(gated))


def test_weights_alone_keep_the_mixture():
    rule = jm.only("w", jm.chain(jm.mix(0.01), optax.sgd(0.1)))
    params = jm.supernet(5, cells=1, nodes=1, channels=2).init(jax.random.key(0))
    gated = rule.gate(params, step=0, hyper=rule.init(params), key=jax.random.key(0))
    chex.assert_trees_all_equal(gated["mixture"], mixture(params["alpha"], 0.01))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jm.mix(0.0), "mix: temperature must be above 0"),
        (lambda: jm.mix(float("nan")), "mix: temperature must be above 0, got nan"),
        (lambda: jm.mix(threshold=float("nan")), "mix: threshold must be at least 0, got nan"),
        (lambda: jm.anneal(1.0, float("nan"), 3), "anneal: temperatures must be above 0, got 1.0 and nan"),
        (lambda: jm.mix().gate({"alpha": jnp.ones(3)}, step=0, hyper=(), key=None), "mix: the alphas must be those of cells"),
        (lambda: jm.mix(threshold=-0.1), "mix: threshold must be at least 0, got -0.1"),
        (
            lambda: _gated(0.15, nodes=3),
            "mix: threshold must be at least 0 and below 1/7, what each of the 7 choices weighs .* got 0.15",
        ),
        (lambda: _gated(0.05, nodes=6), "mix: threshold must be at least 0 and below 1/21, .*Usual cause: cells of more nodes"),
        (lambda: jm.anneal(1.0, 0.0, 5), "anneal: temperatures must be above 0, got 1.0 and 0.0"),
        (lambda: jm.anneal(1.0, 0.1, 0), "anneal: steps and every must be at least 1, got 0 and 1"),
        (lambda: jm.mix().gate({"head": 1}, step=0, hyper=(), key=None), "mix: the parameters have no 'alpha', but head"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _gated(threshold, nodes):
    return jm.mix(threshold=threshold).gate({"alpha": init_alpha(jax.random.key(0), nodes)}, step=0, hyper=(), key=None)


def test_an_outer_optimiser_of_the_parameters_leaves_the_rest(key):
    theta = jm.Theta({"a": jnp.ones(2), "b": jnp.ones(2)}, {"rates": jnp.ones(1)})
    parts = {"a": optax.sgd(1.0), "b": optax.adamw(0.1)}
    outer, plain = jm.on_params(optax.partition(parts, jm.top_level)), optax.partition(parts, jm.top_level)
    updates, state = outer.update(theta, outer.init(theta), theta, value=1.0, grad=theta)
    expected, expected_state = plain.update(theta.params, plain.init(theta.params), theta.params)
    chex.assert_trees_all_equal(updates, jm.Theta(expected, {"rates": jnp.zeros(1)}))
    chex.assert_trees_all_equal(state, expected_state)


def test_an_outer_optimiser_of_the_parameters_may_search_along_its_line():
    theta = jm.Theta({"a": jnp.array(3.0)}, {"rates": jnp.ones(1)})
    outer = jm.on_params(optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20)))
    loss = lambda moved, **_: (moved.params["a"] ** 2).sum() * moved.hyper["rates"].sum()
    gradient = jax.grad(loss)(theta)
    updates, _ = outer.update(gradient, outer.init(theta), theta, value=loss(theta), grad=gradient, value_fn=loss)
    assert float(loss(optax.apply_updates(theta, updates))) < 9.0
