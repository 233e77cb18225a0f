"""Learners with an inner loop run under a lambda pattern, a zap and routing, all at once, without a line of their own.

Those that are not here (ANIL, BOIL, Meta-SGD, CAVIA, MAML++, OML, ANML) are these with rules of their own; of Meta-SGD's and
MAML++'s below. MAML++'s norms of each step leave nothing for a choice by the parameters' scales.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from tests import toys

NET = toys.normed()
KEEP = 0.4  # of 8 channels: 3
PATTERN = jm.pattern(NET, "suffix(2), head")


def _rule(inner):
    return jm.chain(jm.zap("head"), jm.route(KEEP), jm.lambda_mask(PATTERN, inner))


LEARNERS = {
    "maml": lambda rule, data: jm.maml(NET, jm.xent, rule, data),
    "fomaml": lambda rule, data: jm.maml(NET, jm.xent, rule, data, order=1),
    "multi-step loss": lambda rule, data: jm.maml(NET, jm.xent, rule, data, step_weights=(0.5, 0.5)),
    "reptile": lambda rule, data: jm.reptile(NET, jm.xent, rule, data),
    "reptile, one query at a time": lambda rule, data: jm.reptile(NET, jm.xent, rule, data, transductive=False),
    "imaml": lambda rule, data: jm.imaml(NET, jm.xent, rule, data),
    "asb": lambda rule, data: jm.asb(NET, jm.xent, rule, data),
    "meta-asb": lambda rule, data: jm.asb(NET, jm.xent, rule, data, through=True),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_runs_under_pattern_zap_and_routing(key, name):
    task = toys.blobs().sample(key, ())
    learner = LEARNERS[name](_rule(optax.sgd(0.1)), jm.repeat(2))
    theta = learner.init(key)
    scales = jax.random.normal(key, (8,))
    layer = {**theta.params["layer2"], "norm": {**theta.params["layer2"]["norm"], "scale": scales}}
    theta = theta._replace(params={**theta.params, "layer2": layer})

    phi, curve = jax.jit(lambda theta: (learner.adapt(key, theta, task.support), learner.curve(key, theta, task)))(theta)
    same = jax.tree.map(lambda new, old: np.asarray(new == old), phi.params, theta.params)
    assert all(leaf.all() for leaf in jax.tree.leaves(same["layer1"]))  # below the pattern's lowest layer
    moved = ~same["layer2"]["dense"]["kernel"].all(0)
    assert set(np.flatnonzero(moved)) <= set(np.argsort(-np.abs(np.asarray(scales)))[:3]) and moved.any()  # in the first step alone
    outputs = NET.apply(theta.params, task.query.x)
    assert np.abs(curve[0] - outputs).max() > 0.01  # the head is drawn anew as a task begins
    assert np.isfinite(curve).all()

    _, gradient, info = jax.jit(lambda theta: learner.grad(key, theta, task, meta_step=0))(theta)
    assert jax.tree.structure(gradient.params) == jax.tree.structure(theta.params) and jnp.isfinite(info["loss"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient.params["layer2"]))


@pytest.mark.parametrize("name", ["meta-sgd", "maml++"])
def test_learned_rates_run_under_them_too(key, name):
    task = toys.blobs().sample(key, ())
    rates = jm.learned_rates(0.1, per="tensor", steps=2)
    plus = jm.chain(jm.zap("head"), jm.step_norms(2), jm.lambda_mask(PATTERN, rates))
    rule = {"meta-sgd": _rule(jm.learned_rates(0.1)), "maml++": plus}[name]
    learner = jm.maml(NET, jm.xent, rule, jm.repeat(2), step_weights=jm.step_weights(2) if name == "maml++" else None)
    theta = learner.init(key)
    _, gradient, _ = jax.jit(lambda theta: learner.grad(key, theta, task, meta_step=0))(theta)
    rates = [np.abs(leaf).max() for leaf in jax.tree.leaves(gradient.hyper)]
    assert np.isfinite(rates).all() and max(rates) > 0
