"""Lambda patterns: what stands still, what moves, and what it costs."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from jmeta.evaluate import fewshot
from jmeta.evaluate.cost import operations
from tests import toys

NET = toys.net()
OPTIMISERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.01, eps_root=1e-8),
    "decayed": optax.adamw(0.01, eps_root=1e-8, weight_decay=0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)),
    "scheduled": optax.sgd(optax.linear_schedule(0.1, 0.01, 3)),
    "learned": jm.learned_rates(0.1),
    "noisy": jm.chain(toys.noisy(), optax.sgd(0.1)),
    "parts": jm.chain(optax.clip(1.0), jm.learned_rates(0.1, per="layer", steps=2)),
}


def _learner(rule, steps=3, **options):
    return jm.maml(NET, jm.xent, rule, jm.repeat(steps), **options)


def _all(key, learner, theta=None):
    """The adapted parameters, the meta-gradient and the curve."""
    theta, task = _wide(theta or learner.init(key)), _wide(toys.blobs().sample(key, ()))

    @jax.jit
    def run(theta):
        _, gradient, info = learner.grad(key, theta, task, meta_step=0)
        return learner.adapt(key, theta, task.support).params, gradient, info, learner.curve(key, theta, task)

    return run(theta)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("optimiser", OPTIMISERS.values(), ids=list(OPTIMISERS))
def test_all_ones_is_plain_bit_for_bit(key, optimiser, order):
    masked = jm.lambda_mask(jm.pattern(NET, "full"), optimiser)
    chex.assert_trees_all_equal(*(_all(key, _learner(rule, steps=2, order=order)) for rule in (masked, optimiser)))


def test_head_is_anil(key):
    anil = jm.anil(NET, jm.xent, optax.sgd(0.1), jm.repeat(3))
    chex.assert_trees_all_equal(_all(key, _learner(jm.lambda_mask(jm.pattern(NET, "head"), optax.sgd(0.1)))), _all(key, anil))


def test_body_is_boil(key):
    boil = jm.boil(NET, jm.xent, optax.sgd(0.1), jm.repeat(3))
    chex.assert_trees_all_equal(_all(key, _learner(jm.lambda_mask(jm.pattern(NET, "body"), optax.sgd(0.1)))), _all(key, boil))


PATTERNS = {
    "layer2": [[0, 1, 0]],
    "never the same": [[1, 0, 0], [0, 0, 1], [0, 1, 0]],
    "a step skipped": [[0, 1, 1], [0, 0, 0], [0, 0, 1]],
    "real": [[0.5, 0, 1], [0, 2, 0.25], [0, 0, -1]],
}
CASES = [
    *(("adam", name, True) for name in PATTERNS),
    *((name, "never the same", True) for name in ("sgd", "momentum", "decayed", "learned")),
    *(("adam", name, False) for name in ("never the same", "a step skipped")),
]


@pytest.mark.parametrize("optimiser, rows, unroll", CASES)
def test_static_and_traced_patterns_agree_and_frozen_layers_are_bit_identical(key, optimiser, rows, unroll):
    optimiser, rows = OPTIMISERS[optimiser], PATTERNS[rows]

    theta = _learner(optimiser).init(key)

    def run(rows):
        return _all(key, _learner(jm.lambda_mask(rows, optimiser), unroll=unroll), theta)

    with jax.enable_x64(True):
        static, traced = run(rows), jax.jit(run)(jnp.array(rows, float))
        params = _wide(theta.params)
    chex.assert_trees_all_close(traced, static, rtol=1e-6, atol=1e-9)
    for name, column in zip(NET.layers, zip(*rows, strict=True), strict=True):
        for result in (static, traced):
            assert _equal(result[0][name], params[name]) != any(column)


def test_columns_of_plain_zeros_beside_traced_numbers_cost_nothing(key):
    """As a search scores its patterns: what no pattern of a group moves is not in the program."""
    optimiser, rows = OPTIMISERS["adam"], jnp.array([[1.0, 0], [0, 1.0]])
    theta, support = _learner(optimiser).init(key), toys.blobs().sample(key, ()).support

    def adapt(rows, moving):
        partly = tuple((0,) * (3 - moving) + tuple(row[-moving:]) for row in jnp.pad(rows, ((0, 0), (1, 0))))
        return _learner(jm.lambda_mask(partly, optimiser)).adapt(key, theta, support).params

    known = _learner(jm.lambda_mask([[0, 1, 0], [0, 0, 1]], optimiser)).adapt(key, theta, support).params
    chex.assert_trees_all_close(jax.jit(lambda rows: adapt(rows, 2))(rows), known, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(jax.jit(lambda rows: adapt(rows, 2))(rows)["layer1"], theta.params["layer1"])
    fewer, more = (operations(lambda rows, moving=moving: adapt(rows, moving), rows) for moving in (2, 3))
    assert fewer < 0.9 * more


def test_real_numbers_scale_the_update(key):
    adam = optax.adam(0.01, eps_root=1e-8)
    for optimiser, halved in ((optax.sgd(0.1), optax.sgd(0.05)), (adam, jm.chain(adam, optax.scale(0.5)))):
        half = jm.lambda_mask([[0.5, 0.5, 0.5]], optimiser)
        chex.assert_trees_all_equal(*(_all(key, _learner(rule, steps=2)) for rule in (half, halved)))


def test_the_optimisers_memory_of_a_frozen_layer_stands_still():
    """Two layers take turns: each moves by Adam's first steps, as if the other's turns had not been."""
    adam: Any = optax.adam(1e-3, b1=0.0)
    params = {"alpha": jnp.ones(2), "w": jnp.ones(3)}
    rule: Any = jm.lambda_mask([[1, 0], [0, 1]] * 2, adam, labels=("alpha", "w"))
    state, alone = rule.update.init(params), adam.init(params["alpha"])
    grads = jax.tree.map(lambda leaf: 0.3 * leaf, params)
    for step in range(4):
        before = state
        updates, state = rule.update.update(grads, state, params, step=step, phase=rule.phase(step))
        still, moving = ("w", "alpha") if step % 2 == 0 else ("alpha", "w")
        np.testing.assert_array_equal(updates[still], 0)
        np.testing.assert_allclose(updates[moving], -1e-3, rtol=1e-4)
        if moving == "alpha":
            expected, alone = adam.update(grads["alpha"], alone)
            np.testing.assert_array_equal(updates["alpha"], expected)
        assert sum(not _equal(old, new) for old, new in zip(before[0].values(), state[0].values(), strict=True)) == 1


def _equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize("unroll", [True, False], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("order", [1, 2])
def test_frozen_layers_keep_their_outer_gradient(key, order, unroll):
    """Against finite differences in order 2; in order 1 the head's inner gradient is a constant, so only the last pass counts."""
    with jax.enable_x64(True):
        learner = _learner(jm.lambda_mask(jm.pattern(NET, "head"), optax.sgd(0.1)), order=order, unroll=unroll)
        theta, task = map(_wide, (learner.init(key), toys.blobs().sample(key, ())))
        gradients = jax.jit(lambda theta: learner.grad(key, theta, task, meta_step=0)[1])(theta)
        gradient = gradients.params["layer1"]["dense"]["kernel"]
        phi = jax.jit(learner.adapt)(key, theta, task.support)

        @jax.jit
        def loss(kernel):
            moved = {**theta.params, "layer1": {"dense": {**theta.params["layer1"]["dense"], "kernel": kernel}}}
            if order == 1:
                return jm.xent(NET.apply({**moved, "head": phi.params["head"]}, task.query.x), task.query.y)
            adapted = learner.adapt(key, theta._replace(params=moved), task.support)
            return jm.xent(learner.predict(adapted, task.query.x), task.query.y)

        kernel = theta.params["layer1"]["dense"]["kernel"]
        direction = jax.random.normal(key, kernel.shape)
        slope = (loss(kernel + 1e-6 * direction) - loss(kernel - 1e-6 * direction)) / 2e-6
        assert float(jnp.abs(gradient).max()) > 1e-3
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-5)


def _wide(tree):
    """In the widest type of floats in force."""
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.result_type(float)) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )


def test_steps_beyond_the_last_row_repeat_it(key):
    short, long = ([[1, 1, 1], *[[0, 0, 1]] * count] for count in (1, 4))
    results = [_all(key, _learner(jm.lambda_mask(rows, optax.sgd(0.1)), steps=5)) for rows in (short, long)]
    chex.assert_trees_all_equal(*results)


def test_a_theta_with_meta_parameters_serves_masked_and_plain_learners(key):
    rule = jm.chain(jm.learned_rates(0.1), optax.clip(1.0))
    plain, masked = _learner(rule), _learner(jm.lambda_mask(jm.pattern(NET, "head"), rule))
    chex.assert_trees_all_equal_structs(plain.init(key), masked.init(key))
    theta, task = plain.init(key), toys.blobs().sample(key, ())
    moved = masked.adapt(key, theta, task.support).params
    assert _equal(moved["layer1"], theta.params["layer1"]) and not _equal(moved["head"], theta.params["head"])


CONV = jm.conv4(5, filters=16, shape=(28, 28, 1))
PIXELS = np.random.default_rng(0).normal(size=(2, 10, 28, 28, 1)).astype("float32")
TASK = jm.Task(*(jm.Batch(jnp.asarray(x), jnp.arange(10) % 5) for x in PIXELS))
SHARES = {"head": 0.09, "suffix(2)": 0.12}


def _cost(text, steps, what="adapt"):
    learner = jm.maml(CONV, jm.xent, jm.lambda_mask(jm.pattern(CONV, text), optax.sgd(0.1)), jm.repeat(steps))
    theta = jax.eval_shape(learner.init, jax.random.key(0))
    if what == "adapt":
        return operations(learner.adapt, jax.random.key(0), theta, TASK.support)
    return operations(lambda theta: learner.grad(jax.random.key(0), theta, TASK, meta_step=0)[1], theta)


@pytest.mark.parametrize("steps", [5, 30])
@pytest.mark.parametrize("text, share", SHARES.items())
def test_frozen_work_is_not_in_the_program(text, share, steps):
    """Unrolled and scanned; 5 passes of which 4 vanish and 10 backward ones that do, so more steps save more."""
    assert _cost(text, steps) <= share * _cost("full", steps)


@pytest.mark.parametrize("steps", [5, 30])
@pytest.mark.parametrize("text, share", SHARES.items())
def test_nor_is_it_in_an_evaluation_of_many_episodes(text, share, steps):
    """Of adaptation alone: what the queries cost is the same for all patterns."""

    def cost(text):
        learner = jm.maml(CONV, jm.xent, jm.lambda_mask(jm.pattern(CONV, text), optax.sgd(0.1)), jm.repeat(steps))
        theta, keys = learner.init(jax.random.key(0)), jax.random.split(jax.random.key(0), 600)

        def evaluate(theta, task, keys):
            return fewshot._curves(learner, lambda key, task: task, jm.accuracy, 1, None, False, theta, task, keys, None)

        return operations(evaluate, theta, TASK, keys)

    queries = 600 * operations(CONV.apply, CONV.init(jax.random.key(0)), TASK.query.x)
    assert cost(text) - queries == pytest.approx(600 * _cost(text, steps))
    assert cost(text) - queries <= share * (cost("full") - queries)


def test_frozen_work_is_not_in_the_meta_gradient_either():
    assert _cost("head", 5, "grad") < 0.35 * _cost("full", 5, "grad")
    assert _cost("head", 30, "grad") < 0.1 * _cost("full", 30, "grad")


def test_skipped_steps_cost_nothing():
    assert _cost("full, none*4", 5) == _cost("full", 1)
    assert _cost("full, none*29", 30) == _cost("full", 1)


def test_weight_gradients_of_frozen_layers_are_not_computed():
    """With the first layer moving, the backward pass is whole, but for the other layers' weights."""
    full, first = _cost("full", 1), _cost("block1", 1)
    assert 0.6 * full < first < 0.75 * full


def test_the_compiler_sees_the_same_program(key, optimised):
    """What XLA counts in the compiled program falls likewise, where nothing is in loops, which it counts once."""
    net = jm.mlp(5, hidden=(64, 64, 64), shape=(784,))
    x = TASK.support.x

    def flops(text):
        learner = jm.maml(net, jm.xent, jm.lambda_mask(jm.pattern(net, text), optax.sgd(0.1)), jm.repeat(5))
        theta = learner.init(key)
        program = jax.jit(learner.adapt).lower(key, theta, TASK.support._replace(x=x)).compile()
        return program.cost_analysis()["flops"], operations(learner.adapt, key, theta, TASK.support)

    (full, counted), (head, head_counted) = flops("full"), flops("head")
    assert full / counted == pytest.approx(1, abs=0.15)
    assert head / full == pytest.approx(head_counted / counted, abs=0.05)


def test_a_carried_state_of_another_pattern_is_refused(key):
    adam, task = optax.adam(0.01, eps_root=1e-8), toys.blobs().sample(key, ())
    plain, masked = (_learner(rule, carry_state=True) for rule in (adam, jm.lambda_mask([[1, 0, 1], [0, 1, 1]], adam)))
    with pytest.raises(ValueError, match="carries a state of another inner optimiser"):
        masked.adapt(key, plain.init(key), task.support)


def test_what_is_made_of_a_traced_pattern_is_not_remembered():
    made = []

    @jax.jit
    def run(rows):
        for _ in range(2):
            made.append(_learner(jm.lambda_mask(rows, optax.sgd(0.1))))
        return rows

    run(jnp.ones((2, 3)))
    assert made[0] is not made[1]
    assert _learner(jm.lambda_mask(jm.pattern(NET, "head"), RATE)) is _learner(jm.lambda_mask(jm.pattern(NET, "head"), RATE))


RATE = optax.sgd(0.1)
BAD = {
    "shape": (lambda: jm.lambda_mask([[1, 0]], optax.sgd(0.1), labels=("a", "b", "c")), r"column for each of a, b, c"),
    "nothing": (lambda: jm.lambda_mask([[0, 0]], optax.sgd(0.1), labels=("a", "b")), "a, b.*updates nothing"),
    "no update": (lambda: jm.lambda_mask([[1, 1]], toys.noisy()), "optimizer has no update"),
    "sparse": (lambda: jm.sparse(float("nan")), "finite"),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=list(BAD))
def test_bad_masks_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_pattern_of_another_network_is_refused_with_the_layers_names(key):
    task = toys.blobs().sample(key, ())
    for rows, names in (([[1, 0]], "layer1, layer2, head"), (jm.pattern(("a", "b", "c"), "full"), "a, b, c.*layer1, layer2, head")):
        learner = _learner(jm.lambda_mask(rows, optax.sgd(0.1)))
        with pytest.raises(ValueError, match=names):
            learner.adapt(key, learner.init(key), task.support)
    bare = jm.maml(NET._replace(layers=()), jm.xent, jm.lambda_mask([[1, 0, 1]], optax.sgd(0.1)), jm.repeat(1))
    with pytest.raises(ValueError, match="no layer names"):
        bare.adapt(key, bare.init(key), task.support)


def test_adam_without_eps_root_is_refused_also_where_it_comes_later(key):
    with pytest.raises(ValueError, match="eps_root"):
        _learner(jm.lambda_mask([[0, 0, 0], [1, 1, 1]], optax.adam(0.01)), steps=2)


def test_sparse_masks_by_sign_and_its_gradient_passes_straight_through(key):
    rule = jm.chain(optax.sgd(0.1), jm.sparse())
    learner, task = _learner(rule, steps=1), toys.blobs().sample(key, ())
    theta = learner.init(key)
    alpha = jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape), theta.hyper["sparse"])
    theta = theta._replace(hyper={"sparse": alpha})
    grads = jax.grad(lambda params: jm.xent(NET.apply(params, task.support.x), task.support.y))(theta.params)
    expected = jax.tree.map(lambda p, g, a: jnp.where(a >= 0, p - 0.1 * g, p), theta.params, grads, alpha)
    chex.assert_trees_all_close(learner.adapt(key, theta, task.support).params, expected, rtol=1e-6)
    outer = jax.grad(lambda params: jm.xent(NET.apply(params, task.query.x), task.query.y))(expected)
    found = learner.grad(key, theta, task, meta_step=0)[1].hyper["sparse"]
    chex.assert_trees_all_close(found, jax.tree.map(lambda o, g: -0.1 * o * g, outer, grads), rtol=1e-4, atol=1e-8)


def test_sparse_starts_as_plain(key):
    plain, sparse = _learner(optax.sgd(0.1)), _learner(jm.chain(optax.sgd(0.1), jm.sparse()))
    task = toys.blobs().sample(key, ())
    chex.assert_trees_all_close(*(each.adapt(key, each.init(key), task.support).params for each in (plain, sparse)), rtol=1e-6)


def test_a_state_that_goes_on_is_that_of_its_layers(key):
    """Other groups of layers, also as many, cannot take it for theirs."""

    def learner(rows, labels=None):
        rule = jm.lambda_mask(rows, optax.adam(0.01, b1=0.0), labels=labels)
        return jm.reptile(toys.net(), jm.xent, rule, jm.repeat(2), carry_state=True)

    names = ("layer1", "layer2", "head")
    trained = learner([[1, 0, 0], [0, 1, 1]], names)
    theta, support = trained.init(key), toys.blobs().sample(key, ()).support
    trained.adapt(key, theta, support)
    for other in (learner([[1, 1, 0], [0, 0, 1]], names), learner([[1, 0, 0], [0, 1, 1]], names[::-1])):
        with pytest.raises(ValueError, match="carry_state: theta carries a state of another inner optimiser"):
            other.adapt(key, theta, support)


def test_columns_may_be_layers_further_down():
    """By paths, with the numbers that the same layers have at the top."""
    adam: Any = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2))
    rows = [[1, 0, 1], [0, 0.5, 0], [1, 1, 0]]
    flat = {"alpha": jnp.ones(2), "body": jnp.ones((2, 2)), "head": jnp.ones(1)}
    deep = {"alpha": flat["alpha"], "w": {"body": flat["body"], "head": flat["head"]}}
    rules: Any = [jm.lambda_mask(rows, adam, labels=("alpha", *below)) for below in (("body", "head"), ("w/body", "w/head"))]
    states = [rule.update.init(params) for rule, params in zip(rules, (flat, deep), strict=True)]
    for step in range(4):
        made = []
        for number, (rule, params) in enumerate(zip(rules, (flat, deep), strict=True)):
            grads = jax.tree.map(lambda leaf, step=step: leaf * (0.3 + step), params)
            updates, states[number] = rule.update.update(grads, states[number], params, step=step, phase=rule.phase(step))
            made.append(updates)
        assert _equal(made[0], {"alpha": made[1]["alpha"], **made[1]["w"]})
    traced: Any = jm.lambda_mask(jnp.array(rows), optax.sgd(0.1), labels=("alpha", "w/body", "w/head"))
    updates = traced.update.update(deep, traced.update.init(deep), deep, step=1)[0]
    np.testing.assert_allclose(updates["w"]["body"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["w"]["head"], 0)
    only: Any = jm.only("w/head", optax.sgd(0.1))
    updates = only.update.update(deep, only.update.init(deep), deep)[0]
    np.testing.assert_array_equal(updates["w"]["body"], 0)
    np.testing.assert_allclose(updates["w"]["head"], -0.1, rtol=1e-6)


@pytest.mark.parametrize("labels", [("alpha", "w/body"), ("alpha", "w", "w/head"), ("alpha", "w/body", "w/tail")])
def test_columns_must_hold_every_parameter_once(labels):
    params = {"alpha": jnp.ones(2), "w": {"body": jnp.ones(2), "head": jnp.ones(1)}}
    rule: Any = jm.lambda_mask([[1] * len(labels)], optax.sgd(0.1), labels=labels)
    with pytest.raises(ValueError, match="Usual cause: a pattern made for another network"):
        rule.update.update(params, rule.update.init(params), params, phase=rule.phase(0))
