"""Resets between outer steps: when they come, what they leave of the optimiser, and the Adam that counts for each weight."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from jmeta.rules.resetting import Resetting
from jmeta.tasks.feeds import epoch_steps
from tests import toys

NET = toys.net()
COUNTING = jm.Rule("counting", reset=lambda key, params, support, *, hyper: jax.tree.map(lambda p: p + 1, params))


def _walk(outer, params, steps, gradient=0.0) -> tuple[Any, Any]:
    state = outer.init(params)
    for _ in range(steps):
        updates, state = outer.update(jax.tree.map(lambda p: jnp.full_like(p, gradient), params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(("epochs", "every"), [(1, 1), (4, 1), (7, 3), (6, 3), (5, 10)])
def test_zaps_between_epochs_are_as_many_as_the_paper_makes(epochs, every):
    steps = epoch_steps(10, 4)
    outer = jm.resetting(optax.sgd(0.0), COUNTING, every * steps, until=epochs * steps)
    assert _walk(outer, jnp.zeros(2), epochs * steps)[0].tolist() == [(epochs - 1) // every] * 2


def test_kept_slots_are_bit_identical_and_zeroed_ones_are_those_of_the_zap(key):
    params = NET.init(key)

    def after(slots):
        return _walk(jm.resetting(optax.adam(0.1), jm.zap("head", which=0.3), 3, slots), params, 3, 0.5)

    plain, expected = _walk(optax.adam(0.1), params, 3, 0.5)
    kept, state = after("keep")
    chex.assert_trees_all_equal(state.inner, expected)
    chosen = (kept["head"]["kernel"] != plain["head"]["kernel"]).all(0)
    assert chosen.sum() == 1
    kept["head"]["kernel"] = jnp.where(chosen, plain["head"]["kernel"], kept["head"]["kernel"])
    chex.assert_trees_all_equal(kept, plain)
    _, state = after("zero")
    moments = state.inner[0].mu["head"]["kernel"]
    np.testing.assert_array_equal((moments == 0).all(0), chosen)
    chex.assert_trees_all_equal(state.inner[0].nu["layer1"], expected[0].nu["layer1"])


def test_it_resets_a_theta_under_fit_and_keeps_its_key_in_its_state(key):
    learner = jm.supervised(NET, jm.xent, jm.epochs(4))
    batch = jm.Batch(jax.random.normal(key, (10, 6)), jnp.arange(10) % 3)
    outer = jm.resetting(optax.sgd(0.0), jm.shrink_perturb(0.5, 0.0), 2)
    start = learner.init(key)
    fit = jm.fit(key, learner, jm.Tasks(lambda key, data: jm.Task(data, data), batch), outer, 5, 1, theta=start, progress=False)
    chex.assert_trees_all_close(fit.theta.params, jax.tree.map(lambda p: p / 4, start.params), rtol=1e-6)
    assert isinstance(fit.state, Resetting) and jnp.issubdtype(fit.state.key.dtype, jax.dtypes.prng_key)
    assert set(fit.history) == {"loss", "accuracy", "gradient_norm"}


def test_adam_that_counts_for_each_weight_is_adam(key):
    params = NET.init(key)
    state = (jm.adam_each(0.1).init(params), optax.adam(0.1).init(params))
    both = [params, params]
    for step in range(4):
        gradient = jax.tree.map(lambda p, step=step: jnp.cos(p + step), params)
        for number, outer in enumerate((jm.adam_each(0.1), optax.adam(0.1))):
            updates, own = outer.update(gradient, state[number], both[number])
            both[number], state = optax.apply_updates(both[number], updates), (*state[:number], own, *state[number + 1 :])
    chex.assert_trees_all_close(*both, rtol=1e-5, atol=1e-6)


def test_a_weight_whose_slots_are_zeroed_steps_as_a_new_one():
    outer = jm.resetting(jm.adam_each(0.1), jm.zap("head", which="all"), 5, "zero")
    params = {"head": {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)}}
    params, state = _walk(outer, params, 5, 1.0)
    counts = state.inner[0].counts["head"]
    assert counts["kernel"].tolist() == [[0], [0]] and counts["bias"].tolist() == [5]
    updates: Any
    updates, _ = outer.update(jax.tree.map(lambda p: jnp.full_like(p, 3.0), params), state, params)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.1, rtol=1e-5)


def test_a_run_with_resets_goes_on_bit_for_bit(key, tmp_path):
    learner = jm.supervised(NET, jm.xent, jm.epochs(4))
    batch = jm.Batch(jax.random.normal(key, (10, 6)), jnp.arange(10) % 3)
    tasks = jm.Tasks(lambda key, data: jm.Task(data, data), batch)
    outer = jm.resetting(jm.continual_backprop(jm.adam_each(0.01), NET, maturity=1), jm.zap("head", which="all"), 2)

    def run(steps, folder):
        return jm.fit(key, learner, tasks, outer, steps, 1, workdir=tmp_path / folder, resume=True, progress=False)

    run(3, "parts")
    chex.assert_trees_all_equal(run(6, "parts").theta, run(6, "whole").theta)


def test_slots_that_cannot_be_told_apart_are_named(key):
    params = NET.init(key)
    outer = jm.resetting(optax.partition({"a": optax.adam(0.1)}, lambda tree: {name: "a" for name in tree}), COUNTING, 1, "zero")
    with pytest.raises(ValueError, match=r"cannot be told apart.*slots='keep'"):
        _walk(outer, params, 1)
    masked = jm.resetting(
        optax.masked(optax.sgd(0.1, momentum=0.9), {"layer1": True, "layer2": False, "head": True}), COUNTING, 1, "zero"
    )
    state = _walk(masked, params, 1, 1.0)[1]
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(state.inner)) and jax.tree.leaves(state.inner)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="asks for slots='zero'"):
        jm.resetting(optax.sgd(0.1), jm.zap(which="all", slots="zero"), 1)
    for wrong in ({"every": 0}, {"every": 1, "slots": "drop"}, {"every": 1, "until": -1}):
        with pytest.raises(ValueError, match="resetting: "):
            jm.resetting(optax.sgd(0.1), COUNTING, **wrong)
    outer = jm.resetting(optax.sgd(0.1), COUNTING, 1)
    with pytest.raises(ValueError, match="needs params"):
        outer.update(jnp.zeros(1), outer.init(jnp.zeros(1)))
