"""The supernet against one written edge by edge, its derived networks, and what pruning leaves of it."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jmeta as jm
from jmeta.architecture import PRIMITIVES, full_space, mixture, pairs_of
from jmeta.evaluate.cost import operations
from jmeta.models import cells
from tests import toys

SMALL = {"cells": 3, "nodes": 2, "channels": 2, "reductions": (1,), "shape": (9, 8, 1)}


def _small(key, **options):
    """A small supernet in float64, with alphas that differ, and two images."""
    model = jm.supernet(3, **{**SMALL, **options})
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), model.init(key))
    params["alpha"] = jax.tree.map(lambda leaf: jnp.where(leaf < -1e6, leaf, 1000 * leaf), params["alpha"])
    return model, params, jax.random.normal(key, (2, 9, 8, 1), jnp.float64)


def _standardised(x):
    return (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5)


def _conv(x, kernel, stride=1, dilation=1, groups=1):
    pads = [(dilation * (size // 2),) * 2 for size in kernel.shape[:2]]
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _separable(x, depth, point, stride=1, dilation=1):
    return _conv(_conv(jax.nn.relu(x), depth, stride, dilation, x.shape[-1]), point)


def _halved(own, x):
    x = jax.nn.relu(x)
    odd = jnp.pad(x[:, 1:, 1:], [(0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)])
    parts = [_conv(each, own[name]["kernel"], 2) for name, each in (("even", x), ("odd", odd))]
    return _standardised(jnp.concatenate(parts, -1))


def _one(op, own, x, stride):
    """An operation, as the specification of the paper's code has it."""
    kernel = {name: entry["kernel"] for name, entry in own.items()} if op != "skip_connect" else {}
    window = {
        "window_dimensions": (1, 3, 3, 1),
        "window_strides": (1, stride, stride, 1),
        "padding": ((0, 0), (1, 1), (1, 1), (0, 0)),
    }
    if op == "max_pool_3x3":
        return _standardised(lax.reduce_window(x, -jnp.inf, lax.max, **window))
    if op == "avg_pool_3x3":
        total, count = (lax.reduce_window(each, 0.0, lax.add, **window) for each in (x, jnp.ones_like(x)))
        return _standardised(total / count)
    if op == "skip_connect":
        return x if stride == 1 else _halved(own, x)
    if op == "conv_1x5_5x1":
        return _standardised(_conv(_conv(jax.nn.relu(x), kernel["row"], stride), kernel["column"]))
    y = _standardised(_separable(x, kernel["depth"], kernel["point"], stride, 2 if op == "dil_conv_3x3" else 1))
    return _standardised(_separable(y, kernel["depth2"], kernel["point2"])) if op == "sep_conv_3x3" else y


def _edge_by_edge(params, x, weights, *, cells=3, nodes=2, reductions=(1,), **_):
    """The network with a loop over cells, nodes, inputs and operations, and over the pairs of inputs."""
    w = params["w"]
    stem = _standardised(_conv(x, w["stem"]["conv"]["kernel"])) * w["stem"]["norm"]["scale"] + w["stem"]["norm"]["bias"]
    before = last = stem
    for number in range(cells):
        own, kind = w[f"cell{number}"], "reduce" if number in reductions else "normal"
        project = lambda entry, y: _standardised(_conv(jax.nn.relu(y), entry["kernel"]))
        maps = [(_halved if number - 1 in reductions else project)(own["input0"], before), project(own["input1"], last)]
        # Parameters are stacked by input, then by node.
        order = [(u, j) for u in range(nodes + 1) for j in range(nodes) if u < j + 2]
        for j in range(nodes):
            outputs = []
            for u in range(j + 2):
                stride = 2 if kind == "reduce" and u < 2 else 1
                parts = []
                for op in PRIMITIVES:
                    stacked = [edge for edge in order if op != "skip_connect" or (kind == "reduce" and edge[0] < 2)]
                    entry = _row(own[kind][op], stacked.index((u, j))) if (u, j) in stacked and op in own[kind] else {}
                    parts.append(weights[kind][j][0][u][PRIMITIVES.index(op)] * _one(op, entry, maps[u], stride))
                outputs.append(sum(parts))
            maps.append(sum(p * (outputs[u] + outputs[v]) for p, (u, v) in zip(weights[kind][j][1], pairs_of(j + 2), strict=True)))
        before, last = last, jnp.concatenate(maps[2:], -1)
    return last.mean((1, 2)) @ w["head"]["kernel"] + w["head"]["bias"]


def _row(tree, number):
    return jax.tree.map(lambda leaf: leaf[number], tree)


def _soft(alpha):
    return {
        kind: [[jax.nn.softmax(alpha[kind][f"node{j}"][name]) for name in ("ops", "pairs")] for j in range(2)] for kind in alpha
    }


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"ways": 5, "shape": (84, 84, 3)}, 462_509),
        ({"ways": 20}, 462_272),
        ({"ways": 5, "channels": 8, "shape": (84, 84, 3)}, 45_749),
    ],
)
def test_the_supernets_sizes_are_the_papers(options, size):
    shapes = jax.eval_shape(jm.supernet(**options).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["w"])) == size
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["alpha"])) == 126 + 20


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("metanas-mini-imagenet-v2", {"ways": 5, "shape": (84, 84, 3)}, 82_101),
        ("metanas-mini-imagenet-v2", {"ways": 5, "shape": (84, 84, 3), "cells": 5}, 108_169),
        ("metanas-mini-imagenet-v2", {"ways": 5, "shape": (84, 84, 3), "cells": 5, "channels": 96}, 1_160_741),
        ("metanas-omniglot-v2", {"ways": 20, "cells": 5, "channels": 96}, 1_056_116),
    ],
)
def test_the_derived_networks_sizes_are_the_papers(name, options, size):
    shapes = jax.eval_shape(jm.derive(jm.PUBLISHED[name], **options).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == size


def test_it_equals_a_network_written_edge_by_edge(key):
    with jax.enable_x64(True):
        model, params, x = _small(key)
        labels = jnp.array([0, 2])
        ours = jax.jit(jax.value_and_grad(lambda p: jm.xent(model.apply(p, x), labels)))(params)
        by_hand = lambda p: jm.xent(_edge_by_edge(p, x, _soft(p["alpha"])), labels)
        chex.assert_trees_all_close(ours, jax.jit(jax.value_and_grad(by_hand))(params), rtol=1e-9, atol=1e-11)


def test_gradients_of_the_alphas_agree_with_finite_differences(key):
    with jax.enable_x64(True):
        model, params, x = _small(key)
        rule = jm.mix(jm.anneal(1.0, 0.5, 2))

        @jax.jit
        def loss(alpha):
            gated = rule.gate({**params, "alpha": alpha}, step=1, hyper=(), key=None)
            return jm.xent(model.apply(gated, x), jnp.array([0, 2]))

        alpha = params["alpha"]
        direction = jax.tree.map(lambda leaf: jax.random.normal(jax.random.fold_in(key, leaf.size), leaf.shape), alpha)
        at = lambda step: loss(jax.tree.map(lambda a, d: a + step * d, alpha, direction))
        slope = (at(1e-5) - at(-1e-5)) / 2e-5
        np.testing.assert_allclose(slope, optax.tree.vdot(jax.grad(loss)(alpha), direction), rtol=1e-6)


def test_near_temperature_zero_it_is_its_derived_network(key):
    with jax.enable_x64(True):
        model, params, x = _small(key)
        found = jm.genotype(params)
        cold = jm.mix(1e-4).gate(params, step=0, hyper=(), key=None)
        derived = jm.derive(found, 3, **{name: value for name, value in SMALL.items() if name != "nodes"})
        plain = jm.discretise(params, found)
        chex.assert_trees_all_equal_shapes(plain, jax.eval_shape(derived.init, key))
        mixed = jax.jit(lambda mixture: model.apply({**params, "mixture": mixture}, x))
        coldest = mixed(cold["mixture"])
        np.testing.assert_allclose(jax.jit(derived.apply)(plain, x), coldest, rtol=1e-9)
        assert not np.allclose(mixed(mixture(params["alpha"], 1.0)), coldest, rtol=1e-3)


def test_pruned_for_good_it_is_smaller_and_computes_the_same(key):
    """Adam's state goes along, the program is shorter, and the logits of what is gone weigh nothing."""
    make = lambda space, **other: jm.reptile(
        jm.supernet(3, **{**SMALL, **other}, space=space),
        jm.xent,
        jm.chain(jm.mix(0.1), optax.adam(0.01, b1=0.0)),
        jm.repeat(1),
        carry_state=True,
    )
    large = make(None)
    theta = jax.jit(large.init)(key)
    alpha = jax.tree.map(lambda leaf: 300 * leaf, theta.params["alpha"])
    theta = theta._replace(params={**theta.params, "alpha": alpha})
    numbered = lambda tree: jax.tree.map(lambda leaf: jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape), tree)
    theta = theta._replace(params={**theta.params, "w": numbered(theta.params["w"])}, memory=numbered(theta.memory))
    space = jm.promising(theta.params, threshold=0.1, temperature=0.1)
    small = make(space)
    shrunk = jm.shrink(theta, small, space)
    chex.assert_trees_all_equal_shapes_and_dtypes(shrunk, jax.eval_shape(small.init, key))
    assert (
        0
        < sum(leaf.size for leaf in jax.tree.leaves(shrunk.params["w"]))
        < sum(leaf.size for leaf in jax.tree.leaves(theta.params["w"]))
    )
    slots = optax.tree.get(shrunk.memory["state"], "nu")  # numbered as the weights are, so rows must have gone together
    chex.assert_trees_all_equal(slots["w"], shrunk.params["w"])
    outer = optax.adam(0.1)
    state = jax.tree.map(lambda leaf: leaf, outer.init(theta._replace(memory=())))
    state = (state[0]._replace(mu=theta._replace(memory=())), *state[1:])
    _, moved = jm.shrink(theta, small, space, outer=outer, state=state)
    chex.assert_trees_all_equal(moved[0].mu.params["w"], shrunk.params["w"])

    theta, shrunk = (
        each._replace(params={**each.params, "w": jax.tree.map(jnp.sin, each.params["w"])}) for each in (theta, shrunk)
    )
    x = jax.random.normal(key, (2, 9, 8, 1))
    cut = jax.tree.map(lambda now, new: jnp.where(new < -1e6, new, now), theta.params["alpha"], shrunk.params["alpha"])
    expected = jax.jit(large.predict)(theta._replace(params={**theta.params, "alpha": cut}), x)
    np.testing.assert_allclose(jax.jit(small.predict)(shrunk, x), expected, rtol=1e-4, atol=1e-5)
    lines = [str(jax.make_jaxpr(learner.predict)(phi, x)).count("\n") for learner, phi in ((large, theta), (small, shrunk))]
    assert lines[1] < lines[0]

    fewer = jm.promising(shrunk.params, threshold=0.14, temperature=0.1)
    least = make(fewer)
    chex.assert_trees_all_equal_shapes(jm.shrink(shrunk, least, fewer, before=space), jax.eval_shape(least.init, key))
    for misread in (
        lambda: jm.shrink(shrunk, least, fewer),
        lambda: jm.sparse_size(shrunk.params, temperature=1.0, threshold=0.05),
        lambda: large.predict(shrunk, x),
        lambda: small.predict(theta, x),
    ):
        with pytest.raises(ValueError, match="Usual cause: a supernet from which operations were pruned for good; name the space"):
            misread()
    with pytest.raises(ValueError, match=r"shrink: the supernet has no .* any more|has weights of"):
        jm.shrink(shrunk, large, full_space(2), before=space)
    with pytest.raises(ValueError, match=r"shrink: the learner's supernet has other operations than the space"):
        jm.shrink(theta, small, fewer)
    with pytest.raises(ValueError, match=r"shrink: theta is of 3 cells, the learner's supernet has 2"):
        jm.shrink(theta, make(None, cells=2), full_space(2))
    with pytest.raises(ValueError, match=r"shrink: outer and state go together; got state alone"):
        jm.shrink(theta, small, space, state=state)


def test_meta_training_goes_on_after_pruning_for_good(key):
    """Of MetaNAS, whose inner state is kept by the group of its turn: the leaves that stay are the same, and the work is less."""
    adam: Any = {name: optax.adam(0.01, b1=0.0) for name in ("alpha", "w")}

    def make(space):
        net = jm.supernet(3, cells=2, nodes=1, channels=4, reductions=(1,), shape=(8, 8, 1), space=space)
        turns = jm.lambda_mask([[1, 0], [0, 1]], optax.partition(adam, jm.top_level), labels=("alpha", "w"))
        rule = jm.chain(jm.mix(jm.anneal(1.0, 0.1, 1, every=2), threshold=0.01), turns)
        return jm.reptile(net, jm.xent, rule, jm.repeat(2), unroll=False, carry_state=True)

    large, train = make(None), {"outer": optax.sgd(0.5), "steps": 2, "batch": 2, "progress": False}
    begin = large.init(key)
    alpha = jax.tree.map(lambda leaf: leaf, begin.params["alpha"])
    alpha["normal"]["node0"]["ops"] = jnp.zeros((2, 7)).at[0, PRIMITIVES.index("sep_conv_3x3")].set(-20.0)  # on one of two inputs
    begin = begin._replace(params={**begin.params, "alpha": alpha})
    theta = jm.fit(key, large, _tasks(), theta=begin, **train).theta
    space = jm.promising(theta.params)
    assert [len(ops) for ops in space.normal[0]] == [6, 7]
    small = make(space)
    shrunk = jm.shrink(theta, small, space)
    gone = lambda path: "['normal']['sep_conv_3x3']" in jax.tree_util.keystr(path)
    cut = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf[1:] if gone(path) else leaf, theta.memory)
    slots = [float(jnp.abs(leaf).max()) for path, leaf in jax.tree_util.tree_leaves_with_path(cut) if gone(path)]
    assert len(slots) == 16 and max(slots) > 0  # two groups, both slots of Adam, four kernels
    chex.assert_trees_all_equal(shrunk.memory, cut)
    again = jm.fit(key, small, _tasks(), theta=shrunk, **train).theta
    chex.assert_trees_all_equal_shapes_and_dtypes(again, shrunk)
    assert jm.promising(again.params) == space
    task = _tasks().sample(key, ())
    work = [operations(lambda at, by=by: by.grad(key, at, task, meta_step=0), at) for by, at in ((large, theta), (small, shrunk))]
    assert work[1] < work[0]


def test_layers_of_a_supernet_stand_still_by_a_pattern(key):
    """Rows name the alphas and each layer of the weights; what no row moves is left bit for bit."""
    net = jm.supernet(3, cells=2, nodes=1, channels=2, shape=(8, 8, 1))
    labels = ("alpha", "w/stem", "w/cell0", "w/cell1", "w/head")
    turns = jm.lambda_mask([[1, 0, 0, 0, 0], [0, 0, 0, 1, 1]], optax.adam(0.01, b1=0.0), labels=labels)
    learner = jm.reptile(net, jm.xent, jm.chain(jm.mix(), turns), jm.repeat(2), unroll=False, carry_state=True)
    theta = learner.init(key)
    phi = jax.jit(learner.adapt)(key, theta, _tasks().sample(key, ()).support)
    still = lambda params: {name: params["w"][name] for name in ("stem", "cell0")}
    chex.assert_trees_all_equal(still(phi.params), still(theta.params))
    for name in ("cell1", "head"):
        assert float(optax.tree.norm(jax.tree.map(jnp.subtract, phi.params["w"][name], theta.params["w"][name]))) > 1e-3
    assert float(optax.tree.norm(jax.tree.map(jnp.subtract, phi.params["alpha"], theta.params["alpha"]))) > 1e-3


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_a_mean_is_over_the_places_within_the_map(key, size, stride):
    x = jax.random.normal(key, (1, size, 3, 2))
    window = ((1, 3, 3, 1), (1, stride, stride, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))
    total, count = (lax.reduce_window(each, 0.0, lax.add, *window) for each in (x, jnp.ones_like(x)))
    np.testing.assert_allclose(cells._avg_pool(x, stride), total / count, rtol=1e-5, atol=1e-6)


def test_sparse_size_counts_what_a_task_uses(key):
    model = jm.supernet(3, cells=2, nodes=2, channels=2, reductions=(1,), shape=(9, 8, 1))
    params = model.init(key)
    total = sum(leaf.size for leaf in jax.tree.leaves(params["w"]))
    size = jax.jit(lambda alpha: jm.sparse_size({**params, "alpha": alpha}, temperature=1.0, threshold=0.05))
    assert int(size(params["alpha"])) == total

    alpha = jax.tree.map(jnp.copy, params["alpha"])
    column = PRIMITIVES.index("conv_1x5_5x1")
    alpha["normal"]["node0"]["ops"] = alpha["normal"]["node0"]["ops"].at[0, column].set(-20.0)
    assert int(size(alpha)) == total - 2 * 5 * 2 * 2  # kernels of 1 x 5 and 5 x 1, of 2 and 2 channels
    alpha = jax.tree.map(jnp.copy, params["alpha"])
    alpha["reduce"]["node1"]["pairs"] = jnp.array([20.0, -20.0, -20.0])  # node 1 of the second cell sees inputs 0 and 1 alone
    of_edge = 2 * 5 * 4 + (18 + 4) + 2 * (18 + 4) + (18 + 4)
    assert int(size(alpha)) == total - of_edge
    vmapped = jax.vmap(size)(jax.tree.map(lambda *leaves: jnp.stack(leaves), alpha, params["alpha"]))
    np.testing.assert_array_equal(vmapped, [total - of_edge, total])


@pytest.mark.parametrize("norm", ["batch", "instance", "layer"])
def test_each_norm_takes_its_own_statistics(key, norm):
    model = jm.derive(
        jm.Genotype(((("conv_3x3", 0), ("skip_connect", 1)),), ((("max_pool_3x3", 0), ("skip_connect", 1)),)),
        3,
        cells=2,
        channels=2,
        shape=(8, 8, 1),
        norm=norm,
    )
    params, x = model.init(key), jax.random.normal(key, (3, 8, 8, 1))
    together, alone = jax.jit(lambda: (model.apply(params, x)[:1], model.apply(params, x[:1])))()
    assert np.allclose(together, alone, atol=1e-5) == (norm != "batch")


def _tasks():
    return jm.Tasks(
        lambda key, data: jax.tree.map(lambda x: x.reshape(-1, 8, 8, 1) if x.ndim == 2 else x, toys.blobs(size=64).sample(key, ()))
    )


def test_metanas_is_a_composition(key):
    """Reptile on both, with rates of their own; alphas and weights take turns, which is a pattern; a zap is one more part."""
    net = jm.supernet(3, cells=2, nodes=1, channels=2, shape=(8, 8, 1))
    adam: Any = {name: optax.adam(0.01, b1=0.0) for name in ("alpha", "w")}
    turns = jm.lambda_mask([[1, 0], [0, 1]] * 2, optax.partition(adam, jm.top_level), labels=("alpha", "w"))
    rule = jm.chain(jm.zap("w/head", which="all"), jm.mix(jm.anneal(1.0, 0.1, 2, every=2), threshold=0.01), turns)
    learner = jm.reptile(net, jm.xent, rule, jm.minibatches(4, 4), unroll=False, carry_state=True)
    outer = jm.on_params(optax.partition({"w": optax.sgd(1.0), "alpha": optax.sgd(0.5)}, jm.top_level))
    theta = learner.init(key)
    fit = jm.fit(key, learner, _tasks(), outer=outer, steps=2, batch=2, theta=theta, progress=False)
    moved = {
        name: float(optax.tree.norm(jax.tree.map(jnp.subtract, fit.theta.params[name], theta.params[name])))
        for name in theta.params
    }
    assert all(1e-4 < distance < 100 for distance in moved.values())
    score = jm.fewshot(key, learner, fit.theta, _tasks(), 4)
    assert score.by_step.shape == (5, 2)


def test_alphas_and_weights_take_turns_at_where_they_are(key):
    """The adapted parameters against alternating steps of Adam written by hand, each at the present alphas and weights."""
    net = jm.supernet(3, cells=1, nodes=1, channels=2, shape=(8, 8, 1))
    adam, schedule = optax.adam(0.05, b1=0.0), jm.anneal(1.0, 0.1, 2, every=2)
    rule = jm.chain(jm.mix(schedule), jm.lambda_mask([[1, 0], [0, 1]] * 2, adam, labels=("alpha", "w")))
    learner = jm.reptile(net, jm.xent, rule, jm.repeat(4), unroll=False)
    theta, task = learner.init(key), _tasks().sample(key, ())

    @jax.jit
    def gradient(params, temperature):
        gated = lambda p: {**p, "mixture": mixture(p["alpha"], temperature)}
        return jax.grad(lambda p: jm.xent(net.apply(gated(p), task.support.x), task.support.y))(params)

    params, states = theta.params, {name: adam.init(theta.params[name]) for name in ("alpha", "w")}
    for step in range(4):
        name = ("alpha", "w")[step % 2]
        updates, states[name] = adam.update(gradient(params, schedule(step))[name], states[name])
        params = {**params, name: optax.apply_updates(params[name], updates)}
    chex.assert_trees_all_close(jax.jit(learner.adapt)(key, theta, task.support).params, params, atol=1e-4)


def test_tnas_is_maml_of_first_order_on_a_supernet(key):
    """Alphas and weights together in one backward pass, with rates of their own."""
    net = jm.supernet(3, cells=1, nodes=1, channels=2, shape=(8, 8, 1))
    both = optax.partition({"w": optax.sgd(0.1), "alpha": optax.sgd(30.0)}, jm.top_level)
    learner = jm.maml(net, jm.xent, jm.chain(jm.mix(), both), jm.repeat(2), order=1)
    theta, task = learner.init(key), _tasks().sample(key, ())

    def loss(params, batch):
        return jm.xent(net.apply({**params, "mixture": mixture(params["alpha"], 1.0)}, batch.x), batch.y)

    @jax.jit
    def by_hand(params):
        for _ in range(2):
            slope = jax.grad(loss)(params, task.support)
            params = {
                name: jax.tree.map(lambda p, g, rate=rate: p - rate * g, params[name], slope[name])
                for name, rate in {"w": 0.1, "alpha": 30.0}.items()
            }
        return params, jax.grad(loss)(params, task.query)

    found = lambda theta: (learner.adapt(key, theta, task.support).params, learner.grad(key, theta, task, meta_step=0)[1].params)
    phi, gradient = jax.jit(found)(theta)
    wanted = by_hand(theta.params)
    chex.assert_trees_all_close((phi, gradient), wanted, atol=1e-4)
    assert float(optax.tree.norm(gradient["alpha"])) > 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jm.supernet(5, cells=0), "supernet: cells must be at least 1, got 0"),
        (lambda: jm.supernet(5, channels=1), "channels must be at least 2, since a map is halved by two convolutions"),
        (lambda: jm.supernet(5, cells=2, reductions=(2,)), "reductions must be numbers of the 2 cells, from 0 to 1"),
        (lambda: jm.supernet(5, norm="support"), "norm must be one of batch, layer, instance, got 'support'"),
        (lambda: jm.supernet(5, nodes=2, space=full_space(3)), r"2 nodes see \[2, 3\] inputs.*nodes of \[2, 3, 4\] inputs"),
        (
            lambda: jm.promising(jm.supernet(5, cells=1, nodes=1).init(jax.random.key(0)), threshold=0.2),
            "promising: threshold must be from 0 to below 1/7",
        ),
        (lambda: _apply_others(), "supernet: the alphas must be those of cells of 2 nodes"),
        (lambda: jm.discretise(_small_params(), jm.PUBLISHED["metanas-omniglot-v2"]), "has 3 nodes a cell, the supernet 1"),
        (lambda: jm.supernet(5, reductions=(1, 1)), r"from 0 to 3 and each once, got \(1, 1\)"),
        (lambda: jm.supernet(5, reductions=1), "reductions must be a tuple of numbers of cells, such as .*, got 1"),
        (lambda: jm.supernet(5, cells=1.5), "cells must be a whole number, got 1.5"),
        (lambda: jm.supernet(5, shape=(28, 28, 0)), r"shape must be .*, each at least 1, got \(28, 28, 0\)"),
        (lambda: jm.supernet(5, space="all"), "space must be a jm.Space, such as jm.promising gives, got str"),
        (lambda: jm.supernet(5, nodes=1, space=_twice()), "each with operations of .*, once; the space's normal cells"),
        (lambda: jm.promising(_small_params(), temperature=0.0), "promising: temperature must be above 0, got 0.0"),
        (lambda: jm.promising({"alpha": _spoilt()}), "promising: the alphas hold values that are not finite"),
        (lambda: jm.genotype(_spoilt()), "genotype: the alphas hold values that are not finite"),
        (lambda: jm.genotype(jm.Theta(_small_params())), "genotype: .* must be a dict, got Theta. Usual cause: .* theta.params"),
        (lambda: jm.genotype({"alpha": {}}), "genotype: the alphas must be those of cells"),
        (
            lambda: jm.sparse_size(_small_params()["alpha"], temperature=1.0, threshold=0.01),
            "sparse_size: the parameters have no 'w', but normal, reduce. Usual cause: the alphas alone",
        ),
        (
            lambda: jm.sparse_size(_small_params(), temperature=-1.0, threshold=0.01),
            "sparse_size: temperature must be above 0, got -1.0",
        ),
        (lambda: jm.derive(jm.Genotype((5,), ((("conv_3x3", 0),),)), 5), "normal cells must be nodes of .*, got \\(5,\\)"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _small_params():
    return jm.supernet(5, cells=1, nodes=1, channels=2).init(jax.random.key(0))


def _spoilt():
    return jax.tree.map(lambda leaf: leaf * jnp.nan, _small_params()["alpha"])


def _twice():
    return jm.Space(*[((("conv_3x3", "conv_3x3"), ("skip_connect",)),)] * 2)


def _apply_others():
    model, other = (jm.supernet(3, cells=1, nodes=nodes, channels=2) for nodes in (2, 3))
    own, others = (jax.eval_shape(each.init, jax.random.key(0)) for each in (model, other))
    return jax.eval_shape(model.apply, {**own, "alpha": others["alpha"]}, jnp.zeros((1, 28, 28, 1)))
