"""MAML and its relatives by rules."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from tests import toys


def _grad(key, learner):
    return learner.grad(key, learner.init(key), toys.blobs().sample(key, ()), meta_step=0)


def test_anil_by_rule_equals_anil_by_hand(key):
    net, task = toys.net(), toys.blobs().sample(key, ())
    learner = jm.anil(net, jm.xent, optax.sgd(0.1), jm.repeat(3))
    params = learner.init(key).params

    def by_hand(params):
        head = params["head"]
        for _ in range(3):
            grads = jax.grad(lambda h: jm.xent(net.apply({**params, "head": h}, task.support.x), task.support.y))(head)
            head = jax.tree.map(lambda p, g: p - 0.1 * g, head, grads)
        return jm.xent(net.apply({**params, "head": head}, task.query.x), task.query.y)

    value, expected = jax.value_and_grad(by_hand)(params)
    _, gradient, info = learner.grad(key, jm.Theta(params), task, meta_step=0)
    np.testing.assert_allclose(info["loss"], value, rtol=1e-6)
    chex.assert_trees_all_close(gradient.params, expected, rtol=1e-5, atol=1e-7)


def test_anil_adapts_the_head_alone_and_boil_all_but_the_head(key):
    task = toys.blobs().sample(key, ())
    for make, moving in ((jm.anil, {"head"}), (jm.boil, {"layer1", "layer2"})):
        learner = make(toys.net(), jm.xent, optax.sgd(0.1), jm.repeat(1))
        theta = learner.init(key)
        phi = learner.adapt(key, theta, task.support)
        moved = {name for name in phi.params if not _equal(phi.params[name], theta.params[name])}
        assert moved == moving


def _equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_anil_costs_less_than_maml(key, optimised):
    net, task = jm.mlp(3, hidden=(256, 256), shape=(6,)), toys.blobs().sample(key, ())

    def flops(learner):
        adapt = jax.jit(lambda theta: learner.adapt(key, theta, task.support))
        return adapt.lower(learner.init(key)).compile().cost_analysis()["flops"]

    full, head = (flops(make(net, jm.xent, optax.sgd(0.1), jm.repeat(5))) for make in (jm.maml, jm.anil))
    assert head < 0.15 * full


def test_meta_sgd_learns_its_rates(key):
    learner = jm.meta_sgd(toys.net(), jm.xent, jm.repeat(1), rate=0.1)
    theta = learner.init(key)
    chex.assert_trees_all_equal_shapes(theta.hyper["learned_rates"], theta.params)
    plain = _grad(key, jm.maml(toys.net(), jm.xent, optax.sgd(0.1), jm.repeat(1)))
    _, gradient, info = _grad(key, learner)
    np.testing.assert_allclose(info["loss"], plain[2]["loss"], rtol=1e-6)
    chex.assert_trees_all_close(gradient.params, plain[1].params, rtol=1e-5, atol=1e-7)
    assert float(optax.tree.norm(gradient.hyper)) > 0


def test_rates_asked_for_later_steps_repeat_the_last(key):
    rule = jm.learned_rates(0.1, per="tensor", steps=2)
    task = toys.blobs().sample(key, ())
    short, long = (jm.maml(toys.net(), jm.xent, rule, jm.repeat(steps)) for steps in (2, 3))
    theta = short.init(key)
    rates = jax.tree.map(lambda leaf: jnp.array([0.1, 0.3]), theta.hyper)
    theta = theta._replace(hyper=rates)
    two, three = (learner.adapt(key, theta, task.support).params for learner in (short, long))
    grads = jax.grad(lambda p: jm.xent(toys.net().apply(p, task.support.x), task.support.y))(two)
    chex.assert_trees_all_close(three, jax.tree.map(lambda p, g: p - 0.3 * g, two, grads), atol=1e-6)


def test_step_weights_on_the_last_step_equal_plain_maml(key):
    plain = jm.maml(toys.net(), jm.xent, optax.sgd(0.1), jm.repeat(3))
    for weights in ((0.0, 0.0, 1.0), lambda meta_step: jnp.array([0.0, 0.0, 1.0]) + 0.0 * meta_step):
        weighted = jm.maml(toys.net(), jm.xent, optax.sgd(0.1), jm.repeat(3), step_weights=weights)
        chex.assert_trees_all_close(_grad(key, weighted)[1:], _grad(key, plain)[1:], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: jm.maml(toys.net(), jm.xent, optax.sgd(0.1), jm.repeat(1), order=3), "order must be 1"),
        (lambda: jm.maml(toys.net(), jm.xent, optax.adam(0.1), jm.repeat(1)), "without eps_root"),
        (lambda: jm.maml(toys.net(), jm.xent, optax.rmsprop(0.1, eps_in_sqrt=False), jm.repeat(1)), "no finite derivative"),
        (lambda: jm.maml(toys.net(), jm.xent, jm.only("head", optax.adam(0.1)), jm.repeat(1)), "without eps_root"),
        (
            lambda: jm.maml(toys.net(), jm.xent, optax.sgd(0.1), jm.repeat(2), step_weights=(1.0,)),
            "1 weights for 2 inner steps",
        ),
        (lambda: jm.anil(toys.quadratic(), jm.xent, optax.sgd(0.1), jm.repeat(1)), "no layer names"),
        (lambda: jm.boil(toys.quadratic(), jm.xent, optax.sgd(0.1), jm.repeat(1)), "no layer names"),
        (lambda: jm.learned_rates(per="channel"), "per must be"),
        (lambda: jm.repeat(-1), "steps must be"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_only_names_unknown_layers(key):
    learner = jm.maml(toys.net(), jm.xent, jm.only("tail", optax.sgd(0.1)), jm.repeat(1), order=1)
    with pytest.raises(ValueError, match="tail"):
        learner.adapt(key, learner.init(key), toys.blobs().sample(key, ()).support)


@pytest.mark.parametrize("rule", [optax.adam(0.1, eps_root=1e-8), optax.rmsprop(0.1), optax.sgd(0.1, momentum=0.9)])
def test_differentiable_inner_optimisers_are_taken(key, rule):
    chex.assert_tree_all_finite(_grad(key, jm.maml(toys.net(), jm.xent, rule, jm.repeat(2)))[1])


def test_first_order_takes_any_inner_optimiser(key):
    chex.assert_tree_all_finite(_grad(key, jm.maml(toys.net(), jm.xent, optax.adam(0.1), jm.repeat(2), order=1))[1])


def test_only_confines_resets_and_gates_too(key):
    rule = jm.only("head", jm.chain(toys.noisy(), toys.shrinking(), optax.sgd(0.1)))
    learner = jm.maml(toys.net(), jm.xent, rule, jm.repeat(1))
    theta = learner.init(key)
    phi = learner.adapt(key, theta, toys.blobs().sample(key, ()).support)
    assert _equal(phi.params["layer1"], theta.params["layer1"])
    gated = jm.chain(rule).gate(theta.params, step=0, hyper=theta.hyper, key=None)
    assert _equal(gated["layer2"], theta.params["layer2"]) and not _equal(gated["head"], theta.params["head"])


def test_a_random_update_passes_the_check_of_second_order(key):
    def update(updates, state, params=None, *, key, **_):
        return jax.tree.map(lambda g: g * jax.random.uniform(key), updates), state

    both = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    rule = jm.chain(jm.Rule("random", update=both), optax.sgd(0.1, momentum=0.9))
    chex.assert_tree_all_finite(_grad(key, jm.maml(toys.net(), jm.xent, rule, jm.repeat(2)))[1])
