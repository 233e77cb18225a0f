"""Routing: which channels are chosen, and that the others are left alone or silent."""

from typing import Any

import chex
import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from jmeta.rules.route import paired
from tests import toys

NET = toys.normed()
KEEP = 0.4  # of 8: 3
MODES = [(where, refresh) for where in ("update", "forward") for refresh in ("step", "task")]


def _theta(key, net=NET):
    """Scales and biases that differ, some of them negative, as after meta-training."""
    params = net.init(key)
    for number, name in enumerate(net.layers[:-1]):
        keys = jax.random.split(jax.random.fold_in(key, number))
        norm = {
            each: jax.random.normal(own, leaf.shape) for own, (each, leaf) in zip(keys, params[name]["norm"].items(), strict=True)
        }
        params = {**params, name: {**params[name], "norm": norm}}
    return jm.Theta(params)


def _learner(rule, net=NET, steps=3, **options):
    return jm.maml(net, jm.xent, jm.chain(rule, optax.sgd(0.1)), jm.repeat(steps), **options)


def _task(key):
    return toys.blobs().sample(key, ())


def _grad(key, learner, theta):
    return jax.jit(lambda theta: learner.grad(key, theta, _task(key), meta_step=0))(theta)[1:]


@pytest.mark.parametrize(("where", "refresh"), MODES)
def test_to_keep_all_is_plain_maml_bit_for_bit(key, where, refresh):
    plain = jm.maml(NET, jm.xent, optax.sgd(0.1), jm.repeat(3))
    learner = _learner(jm.route(1.0, where=where, refresh=refresh))
    chex.assert_trees_all_equal(_grad(key, learner, _theta(key)), _grad(key, plain, _theta(key)))
    phi, expected = (jax.jit(each.adapt)(key, _theta(key), _task(key).support) for each in (learner, plain))
    chex.assert_trees_all_equal(phi, expected)


@pytest.mark.parametrize(("where", "refresh"), [MODES[1], MODES[2]])
def test_to_keep_all_is_plain_maml_bit_for_bit_in_an_optimised_convolution_too(key, where, refresh, optimised):
    net = jm.conv4(3, filters=4, shape=(16, 16, 1))
    plain = jm.maml(net, jm.xent, optax.sgd(0.1), jm.repeat(2))
    task = jax.tree.map(lambda x: x, toys.blobs(size=256).sample(key, ()))
    task = jm.Task(*(part._replace(x=part.x.reshape(-1, 16, 16, 1)) for part in task))
    theta = plain.init(key)
    learner = _learner(jm.route((1.0,) * 4, where=where, refresh=refresh), net, steps=2)
    programs = [jax.jit(lambda theta, by=by: by.grad(key, theta, task, meta_step=0)[1:]) for by in (learner, plain)]
    chex.assert_trees_all_equal(*(program(theta) for program in programs))


def test_filters_of_a_convolution_stay_or_are_silent(key):
    """As of the layers above, on kernels of four axes behind batch normalisation."""
    net = jm.conv4(3, filters=4, shape=(16, 16, 1))
    theta, support = _theta(key, net), jm.Batch(jax.random.normal(key, (6, 16, 16, 1)), jnp.arange(6) % 3)
    phi = jax.jit(_learner(jm.route(0.5, refresh="task"), net, steps=2).adapt)(key, theta, support)
    chosen = {name.split("/")[0]: np.asarray(own) for name, own in jm.channels(theta.params, 0.5).items()}
    for name, own in chosen.items():
        moved = np.asarray(phi.params[name]["conv"]["kernel"] != theta.params[name]["conv"]["kernel"])
        assert not moved[..., ~own].any() and moved[..., own].any()
    gated = jm.route(0.5, where="forward").gate(theta.params, step=0, hyper=(), key=key)
    assert net.inputs is not None
    seen = net.inputs(gated, support.x)
    for name, after in zip(net.layers, net.layers[1:], strict=False):
        maps = np.abs(np.asarray(seen[after])).reshape(6, -1, 4).max((0, 1))
        assert not (maps[~chosen[name]] > 0).any() and (maps[chosen[name]] > 0).any()  # a chosen one may be dead by itself


@pytest.mark.parametrize("score", ["abs", "signed"])
def test_the_largest_scales_are_chosen(key, score):
    params = _theta(key).params
    for name, chosen in jm.channels(params, KEEP, score=score).items():
        scale = np.asarray(params[name.split("/")[0]]["norm"]["scale"])
        value = np.abs(scale) if score == "abs" else scale
        np.testing.assert_array_equal(np.sort(np.flatnonzero(chosen)), np.sort(np.argsort(-value)[:3]))
    together = jm.channels(params, KEEP, score=score, per="global")
    assert sum(int(chosen.sum()) for chosen in together.values()) == 6
    assert [int(each.sum()) for each in jm.channels(params, (0.25, 1.0)).values()] == [2, 8]


def test_all_channels_compete_and_each_layer_keeps_one():
    params = {"a": {"scale": jnp.arange(1.0, 5)}, "b": {"scale": jnp.arange(10.0, 18)}}
    found = jm.channels(params, 0.5, per="global")
    np.testing.assert_array_equal(found["a"], [False, False, False, True])
    np.testing.assert_array_equal(found["b"], np.arange(8) >= 3)
    assert [int(each.sum()) for each in jm.channels(params, 0.01, per="global").values()] == [1, 1]


def test_shares_are_taken_as_written():
    params = {"a": {"scale": jnp.arange(100.0)}}
    shares = {0.29: 29, 0.57: 57, 0.999: 99, 0.01: 1, np.float32(0.25): 25}  # 0.29 * 100 is below 29 in floating point
    for keep, count in shares.items():
        assert int(jm.channels(params, keep)["a"].sum()) == count


def test_equal_scales_are_drawn_by_lot(key):
    params = {"norm": {"scale": jnp.ones(64)}}
    keys = jax.random.split(key, 400)
    chosen = np.asarray(jax.vmap(lambda key: jm.channels(params, 0.25, key=key)["norm"])(keys))
    assert (chosen.sum(1) == 16).all()
    assert np.abs(chosen.mean(0) - 0.25).max() < 5 * (0.25 * 0.75 / 400) ** 0.5
    fixed = jm.channels(params, 0.25)["norm"]
    assert not np.array_equal(np.flatnonzero(fixed), np.arange(16))
    higher = {"norm": {"scale": jnp.ones(64).at[:8].set(2.0)}}
    assert jax.vmap(lambda key: jm.channels(higher, 0.25, key=key)["norm"])(keys)[:, :8].all()


def test_shares_are_those_of_the_layers_in_natural_order(key):
    """Of `block2` and `block10`: also in what a rule trains, and in what it uses."""
    sizes = {"block2": 0.25, "block10": 0.75}
    params = {name: {"dense": {"kernel": jnp.ones((3, 8))}, "norm": {"scale": jnp.arange(1.0, 9)}} for name in reversed(sizes)}
    chosen = jm.channels(params, tuple(sizes.values()))
    assert {name: int(own.sum()) for name, own in chosen.items()} == {"block2/norm": 2, "block10/norm": 6}
    rule = jm.route(tuple(sizes.values())).update
    trained: Any = rule.update(params, rule.init(params), params)[0]
    used: Any = jm.route(tuple(sizes.values()), where="forward").gate(params, step=0, hyper=(), key=key)
    for name, share in sizes.items():
        assert (trained[name]["dense"]["kernel"] != 0).all(0).sum() == 8 * share
        assert (used[name]["norm"]["scale"] != 0).sum() == 8 * share


def test_equal_scales_are_drawn_by_the_key_in_what_is_used_too(key):
    params, rule = NET.init(key), jm.route(KEEP, where="forward")
    one, same, other = (rule.gate(params, step=0, hyper=(), key=jax.random.key(each)) for each in (1, 1, 2))
    chex.assert_trees_all_equal(one, same)
    silent = [np.asarray(each["layer1"]["norm"]["scale"] == 0) for each in (one, other)]
    assert silent[0].sum() == silent[1].sum() == 5 and not np.array_equal(*silent)


def test_a_chosen_channel_whose_scale_is_0_is_not_silenced(key):
    """It has a bias, and learns a scale."""
    theta = _theta(key)
    norm = {"scale": jnp.zeros(8), "bias": jnp.arange(1.0, 9)}
    theta = theta._replace(params={**theta.params, "layer1": {**theta.params["layer1"], "norm": norm}})
    learner = _learner(jm.route(KEEP, where="forward", refresh="task"), steps=2)
    found = learner.adapt(key, theta, _task(key).support).params["layer1"]["norm"]["scale"]
    assert (found != 0).sum() == 3


def test_inside_only_the_normalisation_must_be_in_sight(key):
    theta, support = _theta(key), _task(key).support
    routed = jm.chain(jm.route(KEEP, refresh="task"), optax.sgd(0.1))

    def adapted(layers):
        return jm.maml(NET, jm.xent, jm.only(layers, routed), jm.repeat(2)).adapt(key, theta, support).params

    with pytest.raises(ValueError, match=r"it sees layer1/dense, but not layer1/norm.*chain\(route\(0.5\), only"):
        adapted(("layer1/dense", "head"))
    for layers in (("layer1/norm", "layer1/dense"), ("layer1/norm", "layer1/dense/kernel")):
        moved = (adapted(layers)["layer1"]["dense"]["kernel"] != theta.params["layer1"]["dense"]["kernel"]).any(0)
        np.testing.assert_array_equal(moved, jm.channels(theta.params, KEEP)["layer1/norm"])
    adapted("head")


def test_inside_only_other_resets_stand_apart(key):
    """What a task alone silences is given back to Reptile; what a reset draws anew is its own."""
    silencing, layers = jm.route(KEEP, where="forward", refresh="task"), NET.layers
    with pytest.raises(ValueError, match=r"only: the rule silences parts.*give each an only of its own"):
        jm.only(layers, jm.chain(jm.zap("head"), silencing, optax.sgd(0.1)))
    apart = jm.chain(jm.only(layers, jm.zap("head")), jm.only(layers, silencing), optax.sgd(0.0))
    gradient, _ = _grad(key, jm.reptile(NET, jm.xent, apart, jm.repeat(2)), _theta(key))
    assert jnp.abs(gradient.params["head"]["kernel"]).max() > 0.01
    chex.assert_trees_all_equal(*(jax.tree.map(scale, gradient.params["layer1"]) for scale in (jnp.zeros_like, lambda g: g)))


def test_a_new_network_gives_tasks_of_other_keys_other_filters(key):
    learner = _learner(jm.route(KEEP, refresh="task"))
    theta, keys = learner.init(key), jax.random.split(key, 2)
    one, other = (learner.adapt(each, theta, _task(key).support).params["layer1"]["dense"]["kernel"] for each in keys)
    before = theta.params["layer1"]["dense"]["kernel"]
    assert not np.array_equal((one != before).any(0), (other != before).any(0))


def _by_hand(theta, support, choices, steps=3):
    """Update routing written out, with the choices of each step."""
    params = theta.params
    for step in range(steps):
        grads = jax.grad(lambda params: jm.xent(NET.apply(params, support.x), support.y))(params)
        for name, chosen in choices(params, step).items():
            layer = name.split("/")[0]
            grads[layer]["dense"] = jax.tree.map(lambda g, chosen=chosen: g * chosen, grads[layer]["dense"])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    return params


@pytest.mark.parametrize("unroll", [True, False])
@pytest.mark.parametrize("refresh", ["step", "task"])
def test_unchosen_filters_stay_and_all_else_learns(key, refresh, unroll):
    theta, task = _theta(key), _task(key)
    learner = _learner(jm.route(KEEP, refresh=refresh), unroll=unroll)
    phi = jax.jit(learner.adapt)(key, theta, task.support)
    seen = []

    def choices(params, step):
        seen.append(jm.channels(theta.params if refresh == "task" else params, KEEP))
        return seen[-1]

    chex.assert_trees_all_close(phi.params, _by_hand(theta, task.support, choices), rtol=1e-5, atol=1e-6)
    for name in ("layer1", "layer2"):
        ever = np.any([step[f"{name}/norm"] for step in seen], 0)
        before, after = theta.params[name]["dense"], phi.params[name]["dense"]
        chex.assert_trees_all_equal(*(jax.tree.map(lambda leaf, ever=ever: leaf[..., ~ever], each) for each in (before, after)))
        assert (before["kernel"] != after["kernel"]).any(0)[ever].any()
        assert (phi.params[name]["norm"]["scale"] != theta.params[name]["norm"]["scale"])[~ever].any()
        assert ever.sum() == 3 or refresh == "step"


@pytest.mark.parametrize("refresh", ["step", "task"])
def test_unchosen_channels_are_silent(key, refresh):
    net = toys.normed(norm="batch")
    theta, task = _theta(key, net), _task(key)
    rule = jm.chain(jm.route(KEEP, where="forward", refresh=refresh))
    learner = _learner(rule, net)
    phi = jax.jit(learner.adapt)(key, theta, task.support)
    gated = rule.gate(phi.params, step=3, hyper=(), key=None)
    assert net.inputs is not None
    seen = net.inputs(gated, task.query.x)
    for name, after in (("layer1", "layer2"), ("layer2", "head")):
        chosen = np.asarray(jm.channels(phi.params, KEEP)[f"{name}/norm"])
        assert (np.asarray(seen[after])[:, ~chosen] == 0).all() and (np.asarray(seen[after])[:, chosen] != 0).any()
        before = jm.channels(theta.params, KEEP)[f"{name}/norm"]
        if refresh == "task":
            np.testing.assert_array_equal(chosen, before)
            chex.assert_trees_all_equal(
                phi.params[name]["dense"]["kernel"][:, ~before], theta.params[name]["dense"]["kernel"][:, ~before]
            )
    np.testing.assert_array_equal(learner.predict(phi, task.query.x), net.apply(gated, task.query.x))


@pytest.mark.parametrize(("where", "refresh"), MODES)
def test_the_meta_gradient_is_that_of_finite_differences_unrolled_or_scanned(key, where, refresh):
    """Within which the choice does not change: it has no gradient of its own."""
    with jax.enable_x64(True):
        theta = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), _theta(key))
        task = jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, _task(key))
        learner = _learner(jm.route(KEEP, where=where, refresh=refresh), steps=2, unroll=refresh == "step")
        gradient = jax.jit(lambda theta: learner.grad(key, theta, task, meta_step=0)[1])(theta).params
        direction = optax.tree.random_like(jax.random.key(2), theta.params, dtype=jnp.float64)

        @jax.jit
        def loss(size):
            moved = jm.Theta(jax.tree.map(lambda p, d: p + size * d, theta.params, direction))
            return jm.xent(learner.predict(learner.adapt(key, moved, task.support), task.query.x), task.query.y)

        slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
        found = sum(float((g * d).sum()) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    assert slope == pytest.approx(found, rel=1e-5)


def test_a_tasks_own_choice_masks_its_meta_gradient(key):
    theta, task = _theta(key), _task(key)
    plain, masked = (_learner(jm.route(KEEP, keep_meta=keep_meta)) for keep_meta in (1.0, 0.25))
    (whole, info), (part, same) = _grad(key, plain, theta), _grad(key, masked, theta)
    chex.assert_trees_all_equal(info, same)
    phi = masked.adapt(key, theta, task.support).params
    for name in ("layer1", "layer2"):
        chosen = jm.channels(phi, 0.25)[f"{name}/norm"]
        expected = jax.tree.map(lambda g, chosen=chosen: g * chosen, whole.params[name]["dense"])
        chex.assert_trees_all_close(part.params[name]["dense"], expected, atol=1e-7)
        chex.assert_trees_all_close(part.params[name]["norm"], whole.params[name]["norm"], atol=1e-7)
    chex.assert_trees_all_close(part.params["head"], whole.params["head"], atol=1e-7)


def test_it_composes_with_patterns_zaps_and_learned_rates(key):
    theta, task = _theta(key), _task(key)
    routed = jm.route(KEEP, refresh="task")
    frozen = jm.lambda_mask([[0, 1, 1]], optax.sgd(0.1), labels=NET.layers)
    phi = jm.maml(NET, jm.xent, jm.chain(routed, frozen), jm.repeat(3)).adapt(key, theta, task.support)
    inside = jm.lambda_mask([[0, 1, 1]], jm.chain(routed, optax.sgd(0.1)), labels=NET.layers)
    chex.assert_trees_all_close(jm.maml(NET, jm.xent, inside, jm.repeat(3)).adapt(key, theta, task.support), phi, atol=1e-6)
    alone = jm.only(("layer2", "head"), jm.chain(routed, optax.sgd(0.1)))
    chex.assert_trees_all_close(jm.maml(NET, jm.xent, alone, jm.repeat(3)).adapt(key, theta, task.support), phi, atol=1e-6)
    chex.assert_trees_all_equal(phi.params["layer1"], theta.params["layer1"])
    chosen = jm.channels(theta.params, KEEP)["layer2/norm"]
    moved = (phi.params["layer2"]["dense"]["kernel"] != theta.params["layer2"]["dense"]["kernel"]).any(0)
    np.testing.assert_array_equal(moved, chosen)
    rates = jm.maml(NET, jm.xent, jm.chain(routed, jm.learned_rates(0.1)), jm.repeat(3))
    same = rates.adapt(key, rates.init(key)._replace(params=theta.params), task.support).params
    chex.assert_trees_all_close(same, _learner(routed).adapt(key, theta, task.support).params, atol=1e-6)
    zapped = jm.maml(NET, jm.xent, jm.chain(jm.zap("head"), routed, optax.sgd(0.1)), jm.repeat(3))
    after = zapped.adapt(key, theta, task.support).params
    np.testing.assert_array_equal((after["layer2"]["dense"]["kernel"] != theta.params["layer2"]["dense"]["kernel"]).any(0), chosen)
    assert not np.allclose(after["head"]["kernel"], same["head"]["kernel"], atol=0.05)


@pytest.mark.parametrize("optimiser", [optax.sgd(0.1, momentum=0.9), optax.adamw(0.01, eps_root=1e-8)], ids=["momentum", "adamw"])
def test_behind_an_optimiser_with_a_memory_or_decay_unchosen_filters_stand_still(key, optimiser):
    theta, task = _theta(key), _task(key)
    chosen = jm.channels(theta.params, KEEP)["layer1/norm"]
    for rule, still in ((jm.route(KEEP, refresh="task"), True), (jm.route(1.0), False)):
        phi = jm.maml(NET, jm.xent, jm.chain(optimiser, rule), jm.repeat(3)).adapt(key, theta, task.support).params
        moved = (phi["layer1"]["dense"]["kernel"] != theta.params["layer1"]["dense"]["kernel"]).any(0)
        assert moved[~chosen].any() != still and moved[chosen].any()


def test_a_theta_of_another_rule_is_checked_too(key):
    learner = _learner(jm.route(0.5), toys.net())
    theta = jm.Theta(toys.net().init(key))
    with pytest.raises(ValueError, match="no normalisation with a scale"):
        jm.fewshot(key, learner, theta, toys.blobs(), 5)


def test_a_choice_kept_as_zeros_must_not_go_on_to_the_next_task():
    own = jm.chain(jm.route(0.5, where="forward", refresh="task"), optax.sgd(0.1))
    for make in (jm.asb, jm.oml):
        with pytest.raises(ValueError, match=r"silences parts of the network for one task.*refresh='step'"):
            make(NET, jm.xent, own, jm.one_by_one(2))
    with pytest.raises(ValueError, match=r"carry_state.*refresh='step'"):
        jm.maml(NET, jm.xent, own, jm.repeat(2), carry_state=True)


def test_a_choice_for_the_task_is_made_anew_where_the_state_goes_on(key):
    learner = _learner(jm.route(KEEP, refresh="task"), carry_state=True)
    theta, task = learner.init(key)._replace(params=_theta(key).params), _task(key)
    state = learner.adapt(key, theta, task.support).memory
    other = theta._replace(params=_theta(jax.random.key(5)).params)
    fresh, carried = (learner.adapt(key, other._replace(memory=memory), task.support).params for memory in (theta.memory, state))
    chex.assert_trees_all_equal(fresh, carried)


def test_so_it_is_for_layers_that_begin_later_and_beside_resets_that_clear(key):
    late = jm.lambda_mask([[0, 1, 1], [1, 1, 1]], jm.chain(jm.route(KEEP, refresh="task"), optax.sgd(0.1)), labels=NET.layers)
    clearing = jm.chain(jm.zap("head", slots="zero"), jm.route(KEEP, refresh="task"), optax.sgd(0.1, momentum=0.0))
    for rule in (late, clearing):
        learner = jm.maml(NET, jm.xent, rule, jm.repeat(3), carry_state=True)
        theta, task = learner.init(key)._replace(params=_theta(key).params), _task(key)
        state = learner.adapt(key, theta, task.support).memory
        other = theta._replace(params=_theta(jax.random.key(5)).params)
        phi = learner.adapt(key, other._replace(memory=state), task.support).params
        moved = (phi["layer1"]["dense"]["kernel"] != other.params["layer1"]["dense"]["kernel"]).any(0)
        assert moved.any() and not moved[~jm.channels(other.params, KEEP)["layer1/norm"]].any()


class _Flat(nn.Module):
    """A user's module whose layers stand side by side, two of them with as many channels."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.GroupNorm(num_groups=2)(nn.Dense(8)(x)))
        return nn.Dense(3)(x)


class _Odd(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="normal")(nn.Dense(8, name="one")(nn.Dense(8, name="two")(x)))
        return nn.Dense(3, name="head")(nn.relu(x))


def test_a_users_own_module(key):
    net = jm.from_linen(_Flat(), jnp.zeros((1, 6)))
    params = net.init(key)
    assert paired(params) == {("GroupNorm_0",): [("Dense_0",)], ("GroupNorm_1",): [("Dense_1",)]}
    phi = _learner(jm.route(0.5, refresh="task"), net, steps=1).adapt(key, jm.Theta(params), _task(key).support).params
    for name in ("Dense_0", "Dense_1"):
        assert (phi[name]["kernel"] != params[name]["kernel"]).any(0).sum() == 4


def test_pairs_that_are_given(key):
    net = jm.from_linen(_Odd(), jnp.zeros((1, 6)))
    params = net.init(key)
    with pytest.raises(ValueError, match=r"which layer normal scales is not known.*may be two, one.*pairs="):
        jm.route(0.5).init(params)
    jm.route(0.5, where="forward").init(params)
    rule = jm.route(0.5, refresh="task", pairs=(("normal", "one"),))
    phi = _learner(rule, net, steps=1).adapt(key, jm.Theta(params), _task(key).support).params
    assert (phi["one"]["kernel"] != params["one"]["kernel"]).any(0).sum() == 4
    assert (phi["two"]["kernel"] != params["two"]["kernel"]).any(0).all()


def test_lists_of_an_nnx_module(key):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.List([nnx.Linear(6, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)])
            self.head = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.body[1](self.body[0](x))))

    net = jm.from_nnx(Net, jnp.zeros((1, 6)))
    params = net.init(key)
    assert list(jm.channels(params, 0.5)) == ["body/1"]
    with pytest.raises(ValueError, match="which layer body/1 scales is not known"):
        jm.route(0.5).init(params)
    rule = jm.route(0.5, refresh="task", pairs=(("body/1", "body/0"),))
    phi = _learner(rule, net, steps=1).adapt(key, jm.Theta(params), _task(key).support).params
    assert (phi["body"][0]["kernel"] != params["body"][0]["kernel"]).any(0).sum() == 4


def test_every_network_of_jmeta_tells_its_pairs(key):
    nets = [jm.conv4(5), jm.conv3(5), jm.resnet12(5, widths=(8, 16), shape=(16, 16, 3)), jm.anml_net(5)]
    for net, count in zip(nets, (4, 3, 8, 6), strict=True):
        params = jax.eval_shape(net.init, key)
        jm.route(0.5).init(params)
        assert len(paired(params)) == count


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: jm.route(0.0), "keep must be above 0 and at most 1.*got 0.0"),
        (lambda: jm.route(1.5), "keep must be above 0 and at most 1.*got 1.5"),
        (lambda: jm.route((0.5, 0.0)), "keep must be above 0"),
        (lambda: jm.route(0.5, keep_meta=0.0), "keep_meta must be above 0"),
        (lambda: jm.route(0.5, where="backward"), "where must be 'update' or 'forward', got 'backward'"),
        (lambda: jm.route(0.5, score="size"), "score must be 'abs' or 'signed'"),
        (lambda: jm.route(0.5, refresh="never"), "refresh must be"),
        (lambda: jm.route(0.5, per="block"), "per must be"),
        (lambda: jm.route((0.5, 0.5), per="global"), "one share for all layers"),
        (lambda: jm.route("half"), "keep must be above 0"),
        (lambda: jm.route(0.5).update.update({}, ()), "route: update needs params"),
        (lambda: jm.route(0.1).init(NET.init(jax.random.key(0))), "left without channels, keep 0.1 of 8"),
        (lambda: jm.route(0.5, keep_meta=0.1).init(NET.init(jax.random.key(0))), "left without channels, keep 0.1 of 8"),
        (lambda: jm.route((0.5,)).init(NET.init(jax.random.key(0))), "1 shares for 2 normalisations"),
        (lambda: jm.route(0.5).init(toys.net().init(jax.random.key(0))), "no normalisation with a scale; it has none and arrays"),
        (lambda: jm.channels(toys.net().init(jax.random.key(0)), 0.5), "channels: the network has no normalisation.*bias, kernel"),
        (
            lambda: jm.route(0.5, pairs=(("layer1/norm", "layer2/dense"), ("bn", "conv"))).init(NET.init(jax.random.key(0))),
            "no normalisation with a scale called bn; it has layer1/norm, layer2/norm",
        ),
        (
            lambda: jm.route(0.5, pairs=(("layer1/norm", "layer1/conv"),)).init(NET.init(jax.random.key(0))),
            "which layer layer1/norm scales is not known",
        ),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()
