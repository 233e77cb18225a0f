"""Resets: what they change, what they leave, and what they draw."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from jmeta.rules.zap import reset_where
from tests import toys

NET = toys.net()


def _support(labels):
    return jm.Batch(jnp.zeros((len(labels), 6)), jnp.array(labels))


def _reset(rule, params, support=None, key=None):
    return rule.reset(jax.random.key(1) if key is None else key, params, support, hyper=())


@pytest.mark.parametrize("init", ["he_normal", "official_iid", jax.nn.initializers.ones])
def test_only_the_chosen_columns_of_the_heads_kernel_change(key, init):
    params = NET.init(key)
    after = _reset(jm.zap("head", init=init), params, _support([2, 0, 2]))
    changed = (after["head"]["kernel"] != params["head"]["kernel"]).all(0)
    np.testing.assert_array_equal(changed, [True, False, True])
    after["head"]["kernel"] = after["head"]["kernel"].at[:, [0, 2]].set(params["head"]["kernel"][:, [0, 2]])
    chex.assert_trees_all_equal(after, params)


def test_padding_names_no_class(key):
    params = NET.init(key)
    support = _support([2, 0])._replace(mask=jnp.array([1.0, 0.0]))
    chex.assert_trees_all_equal(_reset(jm.zap("head"), params, support), _reset(jm.zap("head"), params, _support([2])))


def test_all_some_and_biases(key):
    params = jax.tree.map(jnp.ones_like, NET.init(key))
    everything = _reset(jm.zap("head", which="all", bias=True), params)
    assert (everything["head"]["kernel"] != 1).all() and (everything["head"]["bias"] == 0).all()
    some = _reset(jm.zap("layer1", which=0.25), params)["layer1"]["dense"]["kernel"]
    assert (some != 1).all(0).sum() == 2 and (some != 1).any(0).sum() == 2
    one = _reset(jm.zap("head", bias=True), params, _support([1]))
    np.testing.assert_array_equal(one["head"]["bias"], [1, 0, 1])


def test_traced_classes_under_jit_and_vmap(key):
    params, keys = NET.init(key), jax.random.split(key, 3)
    together = jax.jit(jax.vmap(lambda key, label: jm.zap_layer(key, params, "head", label)))(keys, jnp.arange(3))
    for number in range(3):
        alone = jm.zap_layer(keys[number], params, "head", number)
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, number=number: leaf[number], together), alone, rtol=1e-6)
    again = jm.zap_layer(keys[0], params, "head", jnp.array([True, False, False]))
    chex.assert_trees_all_equal(again, jm.zap_layer(keys[0], params, "head", 0))


def test_a_class_is_drawn_the_same_whatever_is_drawn_beside_it(key):
    params = NET.init(key)
    everything = jm.zap_layer(key, params, "head")["head"]["kernel"]
    for chosen in (1, [1, 1], [1, 2, 1, 2]):
        some = jm.zap_layer(key, params, "head", jnp.array(chosen))["head"]["kernel"]
        np.testing.assert_array_equal(some[:, 1], everything[:, 1])
        np.testing.assert_array_equal(some[:, 0], params["head"]["kernel"][:, 0])
    assert (everything[:, 1] != everything[:, 2]).all()


@pytest.mark.parametrize(
    ("init", "classes", "expected"), [("he_normal", 20, (2 / 500) ** 0.5), ("official_iid", 20, (2 / 1e4) ** 0.5)]
)
def test_standard_deviations_are_the_stated_ones(key, init, classes, expected):
    params = {"head": {"kernel": jnp.zeros((500, classes)), "bias": jnp.zeros(classes)}}
    drawn = np.asarray(jm.zap_layer(key, params, "head", init=init)["head"]["kernel"])
    assert drawn.std() == pytest.approx(expected, rel=0.05) and abs(drawn.mean()) < 0.05 * expected


def test_zapped_slots_of_an_optimiser_that_goes_on(key):
    def states(slots):
        rule = jm.chain(jm.zap("head", slots=slots), optax.sgd(0.1, momentum=0.9))
        learner = jm.maml(NET, jm.xent, rule, jm.repeat(0), carry_state=True)
        theta = learner.init(key)
        theta = theta._replace(memory={"state": jax.tree.map(jnp.ones_like, theta.memory["state"])})
        return learner.adapt(key, theta, _support([1])).memory["state"]

    assert all((leaf == 1).all() for leaf in jax.tree.leaves(states("keep")))
    zeroed = [leaf for leaf in jax.tree.leaves(states("zero")) if (leaf == 0).any()]
    assert len(zeroed) == 1
    np.testing.assert_array_equal((zeroed[0] == 0).all(0), [False, True, False])


def test_every_reset_is_a_form_of_one(key):
    params = NET.init(key)
    fresh = NET.init(jax.random.key(1))
    later = _reset(jm.later_layers(NET, "layer2"), params)
    chosen = {name: jax.tree.map(lambda _, name=name: name != "layer1", layer) for name, layer in params.items()}
    chex.assert_trees_all_equal(later, reset_where(params, chosen, fresh))
    shrunk = _reset(jm.shrink_perturb(0.6, 0.0), params)
    chex.assert_trees_all_close(shrunk, jax.tree.map(lambda p: 0.6 * p, params), rtol=1e-6)
    zeros = {"w": jnp.zeros((300, 300))}
    assert np.std(_reset(jm.shrink_perturb(0.6, 0.01), zeros)["w"]) == pytest.approx(0.01, rel=0.05)


def _shared(key):
    params = NET.init(key)
    return {**params, "layer2": params["layer1"]}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda key: jm.zap_layer(key, NET.init(key), "block9"), "'block9' is not a layer.*layer1, layer2, head"),
        (lambda key: jm.zap("block9").init(NET.init(key)), "'block9' is not a layer.*layer1, layer2, head"),
        (lambda key: jm.zap("layer1").init(_shared(key)), "holds the very arrays of layer2.*shared by reference"),
        (lambda key: jm.zap("p").init({"p": {"scale": jnp.ones(3)}}), "must have a kernel"),
        (lambda key: jm.zap(which="some"), "which must be 'support', 'all', or a fraction"),
        (lambda key: jm.zap(which=0.0), "which must be"),
        (lambda key: jm.zap(init="she_normal"), "init must be 'he_normal'"),
        (lambda key: jm.zap(slots="forget"), "slots must be"),
        (lambda key: _reset(jm.zap(), NET.init(key)), "no support set"),
        (lambda key: jm.zap_layer(key, NET.init(key), "head", jnp.ones(3)), "integers or bools.*regression"),
        (lambda key: jm.later_layers(NET, "block9"), "'block9' is not a layer.*layer1, layer2, head"),
        (lambda key: jm.shrink_perturb(1.5), "shrink must be from 0 to 1"),
    ],
)
def test_bad_input_is_named(key, make, says):
    with pytest.raises(ValueError, match=says):
        make(key)


def test_a_layer_is_found_by_its_path_or_by_a_name_with_a_slash(key):
    params = {"w": {"head": {"kernel": jnp.ones((4, 3))}}, "net/head": {"kernel": jnp.ones((4, 3))}}
    for layer, other in (("w/head", "net/head"), ("net/head", "w")):
        moved = jm.zap_layer(key, params, layer)
        chex.assert_trees_all_equal(moved[other], params[other])
        assert jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).any()), moved, params)) != [True, True]
    with pytest.raises(ValueError, match="zap: 'w/tail' is not a layer of the parameters; they have head"):
        jm.zap_layer(key, params, "w/tail")
