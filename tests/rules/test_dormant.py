"""Dormant and useless units: which they are, and what becomes of them."""

from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from jmeta.rules.dormant import activity, dormant, renew
from tests import toys

NET = toys.net()


def _with_dead_unit(key, unit=3):
    params = NET.init(key)
    dense = params["layer1"]["dense"]
    dead = {"kernel": dense["kernel"].at[:, unit].set(0.0), "bias": dense["bias"].at[unit].set(-1.0)}
    return {**params, "layer1": {"dense": dead}}


def test_activity_is_what_comes_out_of_each_hidden_layer(key):
    params, x = NET.init(key), jax.random.normal(key, (5, 6))
    seen = activity(NET, params, x)
    first = jax.nn.relu(x @ params["layer1"]["dense"]["kernel"] + params["layer1"]["dense"]["bias"])
    np.testing.assert_allclose(seen["layer1"], first, rtol=1e-5, atol=1e-6)
    assert list(seen) == ["layer1", "layer2"]
    net = jm.conv3(3, filters=4)
    maps = activity(net, net.init(key), jax.random.uniform(key, (2, 28, 28, 1)))
    assert {name: h.shape for name, h in maps.items()} == {"block1": (338, 4), "block2": (50, 4), "block3": (18, 4)}


def test_redo_renews_the_dead_unit_alone_and_changes_no_output(key):
    params, x = _with_dead_unit(key), jax.random.normal(key, (20, 6))
    after = jm.redo(NET).reset(key, params, jm.Batch(x, None), hyper=())
    np.testing.assert_allclose(NET.apply(after, x), NET.apply(params, x), rtol=1e-6)
    changed = (after["layer1"]["dense"]["kernel"] != params["layer1"]["dense"]["kernel"]).any(0)
    np.testing.assert_array_equal(changed, jnp.arange(8) == 3)
    assert (after["layer2"]["dense"]["kernel"][3] == 0).all() and after["layer1"]["dense"]["bias"][3] == 0
    everything = jm.redo(NET, tau=1e3).reset(key, params, jm.Batch(x, None), hyper=())
    chex.assert_trees_all_equal(everything["layer1"], NET.init(key)["layer1"])


def test_dormant_units_are_those_of_little_activity_beside_their_layers_mean():
    """Of mean sizes 0.1, 1, 2 and 4.9, whose mean is 2, those up to tau times 2."""
    h = jnp.array([[0.2, -1.0, 2.0, 4.9], [0.0, 1.0, -2.0, -4.9]])
    for tau, expected in ((0.0, [0, 0, 0, 0]), (0.05, [1, 0, 0, 0]), (0.5, [1, 1, 0, 0]), (1.0, [1, 1, 1, 0])):
        np.testing.assert_array_equal(dormant({"layer": h}, tau)["layer"], np.array(expected, bool))


def test_utilities_and_the_choice_of_units_by_hand(key):
    """Two steps without learning: u <- 0.9 u + 0.1 mean|h| mean|w_out|, and the least u / (1 - 0.9^age) goes."""
    outer = jm.continual_backprop(optax.sgd(0.0), NET, replacement=0.125, maturity=1, decay=0.9)
    params, zeros = NET.init(key), jax.tree.map(jnp.zeros_like, NET.init(key))
    batches = [jm.Batch(jax.random.normal(jax.random.fold_in(key, step), (20, 6)), None) for step in range(2)]
    state = outer.init(params)
    for batch in batches:
        updates, state = outer.update(zeros, state, params, info={"batch": batch})
        before, params = params, cast(Any, optax.apply_updates(params, updates))
    for name, after in (("layer1", "layer2"), ("layer2", "head")):
        sizes = [np.abs(np.asarray(activity(NET, before, batch.x)[name])).mean(0) for batch in batches]
        layer = before[after].get("dense", before[after])
        outgoing = np.abs(np.asarray(layer["kernel"])).mean(1)
        utility = 0.9 * 0.1 * sizes[0] * outgoing + 0.1 * sizes[1] * outgoing
        gone = np.argmin(utility / (1 - 0.9**2))
        np.testing.assert_array_equal(state.ages[name], np.where(np.arange(8) == gone, 0, 2))
        np.testing.assert_allclose(state.utilities[name], np.where(np.arange(8) == gone, 0, utility), rtol=1e-5)


def test_examples_that_only_fill_up_a_batch_judge_no_unit(key):
    params, x = NET.init(key), jax.random.normal(key, (6, 6))
    mask = jnp.array([1.0, 1, 1, 1, 0, 0])
    full, alone = (jm.Batch(x, None, mask), jm.Batch(x[:4], None))
    renewed = [jm.redo(NET, tau=0.5).reset(key, params, batch, hyper=()) for batch in (full, alone)]
    chex.assert_trees_all_equal(*renewed)
    outer = jm.continual_backprop(optax.sgd(0.0), NET)
    zeros = jax.tree.map(jnp.zeros_like, params)
    states = [outer.update(zeros, outer.init(params), params, info={"batch": batch})[1] for batch in (full, alone)]
    chex.assert_trees_all_close(states[0].utilities, states[1].utilities, rtol=1e-5)


def test_channels_of_a_flattened_map_go_out_by_all_their_places(key):
    net = jm.conv3(3, filters=4)
    params = net.init(key)
    chosen = {name: jnp.arange(4) == (1 if name == "block3" else -1) for name in net.layers[:-1]}
    after = renew(net, key, params, chosen)
    gone = (after["head"]["kernel"] == 0).all(1)
    np.testing.assert_array_equal(gone, np.arange(36) % 4 == 1)


def test_continual_backprop_renews_old_useless_units_with_fresh_slots(key):
    outer = jm.continual_backprop(jm.adam_each(1e-3), NET, replacement=0.125, maturity=2)
    params = _with_dead_unit(key)
    state, batch = outer.init(params), jm.Batch(jax.random.normal(key, (20, 6)), jnp.arange(20) % 3)
    for step in range(3):
        gradient = jax.grad(lambda p: jm.xent(NET.apply(p, batch.x), batch.y))(params)
        updates, state = jax.jit(outer.update)(gradient, state, params, info={"batch": batch})
        before, params = params, cast(Any, optax.apply_updates(params, updates))
        if step < 2:
            np.testing.assert_array_equal(params["layer1"]["dense"]["kernel"][:, 3], before["layer1"]["dense"]["kernel"][:, 3])
    assert (params["layer1"]["dense"]["kernel"][:, 3] != 0).all() and (params["layer2"]["dense"]["kernel"][3] == 0).all()
    np.testing.assert_array_equal(state.ages["layer1"], np.where(np.arange(8) == 3, 0, 3))
    counts = state.inner[0].counts["layer1"]["dense"]["kernel"]
    np.testing.assert_array_equal(counts[0], np.where(np.arange(8) == 3, 0, 3))
    assert state.due["layer1"] == 0


def test_half_a_unit_a_step_is_one_every_other_step_and_the_rest_is_kept(key):
    outer = jm.continual_backprop(optax.sgd(0.0), NET, replacement=1 / 16, maturity=2)
    learner = jm.supervised(NET, jm.xent, jm.epochs(4))
    batch = jm.Batch(jax.random.normal(key, (8, 6)), jnp.arange(8) % 3)
    fit = jm.fit(key, learner, jm.Tasks(lambda key, data: jm.Task(data, data), batch), outer, 5, 1, progress=False)
    for name, ages in fit.state.ages.items():
        assert sorted(ages.tolist()) == [1] + [5] * 7 and fit.state.due[name] == 7 / 16


def _branched():
    net = jm.anml_net(3, filters=2, gate_filters=2)
    return activity(net, net.init(jax.random.key(0)), jnp.ones((1, 28, 28, 1)))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: activity(toys.quadratic(), {"p": jnp.ones(())}, jnp.ones((1, 1))), "does not tell what comes into its layers"),
        (lambda: _branched(), "activity: block1 does not read what gate puts out, .*Usual cause: a network of two branches"),
        (lambda: jm.redo(NET, tau=-1.0), "tau must be at least 0"),
        (lambda: jm.redo(NET).reset(jax.random.key(0), {}, None, hyper=()), "no batch to judge units by"),
        (lambda: jm.continual_backprop(optax.sgd(0.1), NET, replacement=2), "replacement must be from 0 to 1"),
        (lambda: jm.continual_backprop(optax.sgd(0.1), NET).update({}, None, None), "needs params and info"),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()
