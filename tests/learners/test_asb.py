"""ASB, Meta-ASB, OML and ANML on streams."""

import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from tests import toys

NET = toys.net()


def _task(key, shots=4, remember=5):
    key_one, key_all = jax.random.split(key)
    sequence = jm.Batch(jax.random.normal(key_one, (shots, 6)), jnp.full(shots, 2))
    rest = jm.Batch(jax.random.normal(key_all, (remember, 6)), jnp.arange(remember) % 3)
    return jm.Task(sequence, jax.tree.map(lambda *parts: jnp.concatenate(parts), sequence, rest))


def _asb(rate, through, zapped=True, **options):
    rule = jm.chain(jm.zap("head"), optax.sgd(rate)) if zapped else optax.sgd(rate)
    return jm.asb(NET, jm.xent, rule, jm.one_by_one(4), through=through, **options)


def _by_hand(params, batch, rate):
    for number in range(len(batch.y)):
        one = jax.tree.map(lambda leaf, number=number: leaf[number : number + 1], batch)
        gradient = jax.grad(lambda p, one=one: jm.xent(NET.apply(p, one.x), one.y))(params)
        params = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
    return params


def test_at_rate_0_both_take_the_same_step(key):
    theta, task = _asb(0.0, False).init(key), _task(key)
    for through in (False, True):
        base, _, _ = _asb(0.0, through).grad(key, theta, task, meta_step=0)
        expected = jm.zap_layer(key, theta.params, "head", 2)["head"]["kernel"][:, :2]
        np.testing.assert_array_equal(base.params["head"]["kernel"][:, :2], expected)
        assert (base.params["head"]["kernel"][:, 2] != theta.params["head"]["kernel"][:, 2]).all()
    one, other = (_asb(0.0, through).grad(key, theta, task, meta_step=0) for through in (False, True))
    chex.assert_trees_all_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("unroll", [True, False])
def test_asb_is_an_episode_written_by_hand(key, unroll):
    learner, task = _asb(0.1, False, zapped=False, unroll=unroll), _task(key)
    theta = learner.init(key)
    base, gradient, info = jax.jit(lambda theta: learner.grad(key, theta, task, meta_step=0))(theta)
    after = _by_hand(theta.params, task.support, 0.1)
    chex.assert_trees_all_close(base.params, after, rtol=1e-5, atol=1e-6)
    loss, expected = jax.value_and_grad(lambda p: jm.xent(NET.apply(p, task.query.x), task.query.y))(after)
    chex.assert_trees_all_close((gradient.params, info["loss"]), (expected, loss), rtol=1e-5, atol=1e-6)
    assert base.memory == theta.memory and gradient.memory == ()


def test_zapped_asb_takes_adams_step_from_where_its_sequence_ended(key):
    """Through `fit`: the column of the class drawn anew, four steps of an image each, then one of Adam on all of them."""
    learner, task = _asb(0.1, False), _task(key)
    theta, adam = learner.init(key), optax.adam(1e-2)
    tasks = jm.Tasks(lambda key, data: data, task)
    done = jm.fit(key, learner, tasks, adam, steps=1, batch=1, theta=theta, progress=False).last.params
    key_learn = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 0), 0))[1]  # of the first task of the first step
    begun = jm.zap_layer(_zap_key(key_learn), theta.params, "head", 2)
    after = _by_hand(begun, task.support, 0.1)
    gradient = jax.grad(lambda p: jm.xent(NET.apply(p, task.query.x), task.query.y))(after)
    updates, _ = adam.update(gradient, adam.init(after))
    chex.assert_trees_all_close(done, optax.apply_updates(after, updates), rtol=1e-4, atol=1e-5)


def _zap_key(key):
    """The key that a task's key becomes on its way to the zap of a chain."""
    return jax.random.fold_in(jax.random.split(key)[0], zlib.crc32(b"zap"))


def test_rates_that_nothing_learns_are_warned_of(key):
    with pytest.warns(UserWarning, match="asb: the meta-parameters of learned_rates stay as they start"):
        jm.asb(NET, jm.xent, jm.learned_rates(0.1), jm.one_by_one(4)).init(key)


def test_meta_asb_differentiates_through_the_sequence(key):
    with jax.enable_x64(True):
        learner, task = (
            _asb(0.1, True, zapped=False),
            jax.tree.map(lambda x: x.astype(float) if x.dtype == "float32" else x, _task(key)),
        )
        theta = jax.tree.map(lambda leaf: leaf.astype(float), learner.init(key))
        base, gradient, _ = learner.grad(key, theta, task, meta_step=0)
        chex.assert_trees_all_equal(base, theta)

        def loss(params):
            return jm.xent(NET.apply(_by_hand(params, task.support, 0.1), task.query.x), task.query.y)

        way = jax.tree.map(lambda p: jax.random.normal(key, p.shape, p.dtype), theta.params)
        ahead, behind = (jax.tree.map(lambda p, d, side=side: p + side * 1e-5 * d, theta.params, way) for side in (1, -1))
        slope = (loss(ahead) - loss(behind)) / 2e-5
        np.testing.assert_allclose(optax.tree.vdot(gradient.params, way), slope, rtol=1e-6)
        first = _asb(0.1, True, zapped=False, order=1).grad(key, theta, task, meta_step=0)[1]
        assert abs(optax.tree.vdot(first.params, way) - slope) > 1e-3 * abs(slope)


def test_oml_moves_the_head_and_anml_all_but_its_gates(key):
    theta, task = NET.init(key), _task(key)
    phi = jm.oml(NET, jm.xent, optax.sgd(0.1), jm.one_by_one(4)).adapt(key, jm.Theta(theta, {}), task.support)
    assert [name for name in NET.layers if jax.tree.all(jax.tree.map(np.array_equal, phi.params[name], theta[name]))] == [
        "layer1",
        "layer2",
    ]
    net = jm.anml_net(3, filters=4, gate_filters=2)
    learner = jm.anml(net, jm.xent, optax.sgd(0.1), jm.one_by_one(2))
    start = learner.init(key)
    batch = jm.Batch(jax.random.uniform(key, (2, 28, 28, 1)), jnp.array([1, 1]))
    base, gradient, _ = jax.jit(lambda theta: learner.grad(key, theta, jm.Task(batch, batch), meta_step=0))(start)
    chex.assert_trees_all_equal(base, start)
    assert all(jnp.abs(gradient.params[name]["kernel"]).max() > 0 for name in ("gate", "head"))
    phi = jax.jit(learner.adapt)(key, start, batch)
    for name in net.layers:
        stayed = jax.tree.all(jax.tree.map(np.array_equal, phi.params[name], start.params[name]))
        assert stayed == name.startswith("gate")
    assert net.inputs is not None
    assert net.inputs(start.params, batch.x)["head"].shape == (2, 36)


def test_the_paper_network_has_the_papers_size():
    shapes = jax.eval_shape(jm.anml_net(1000).init, jax.random.key(0))
    assert shapes["gate"]["kernel"].shape == (1008, 2304) and shapes["head"]["kernel"].shape == (2304, 1000)


def test_fit_trains_on_streams_one_task_at_a_time(key):
    rng = np.random.default_rng(0)
    images = jm.from_arrays(rng.integers(0, 256, (12, 2, 3), np.uint8), np.arange(12) // 4)
    learner, tasks = _asb(0.01, False), jm.streams(images, shots=4, remember=5)
    start = learner.init(key)
    fit = jm.fit(key, learner, tasks, optax.adam(1e-2), 30, 1, theta=start, progress=False)
    assert fit.history["loss"][-5:].mean() < fit.history["loss"][:5].mean()
    more = jm.from_arrays(rng.integers(0, 256, (12, 2, 3), np.uint8), np.arange(12) // 3)
    for learns, wide in (
        (learner, jm.streams(more, shots=4, remember=4)),
        (jm.supervised(NET, jm.xent, jm.epochs(4)), jm.labelled(more)),
    ):
        with pytest.raises(ValueError, match="tasks have 4 classes, but the model's head has 3 outputs, too few"):
            jm.fit(key, learns, wide, optax.adam(1e-2), 1, 1, progress=False)
    with pytest.raises(ValueError, match="meta-batch must be 1"):
        jm.fit(key, learner, tasks, optax.adam(1e-2), 2, 2, progress=False)
    whole = jm.supervised(NET, jm.xent, jm.epochs(4))
    with pytest.raises(ValueError, match="batch must be 1"):
        jm.fit(key, whole, jm.labelled(images), optax.adam(1e-2), 2, 2, progress=False)


def test_statistics_of_the_support_set_serve_both(key):
    net = jm.mlp(3, hidden=(8,), shape=(6,), norm="support")
    task = _task(key)
    one, other = (jm.asb(net, jm.xent, optax.sgd(0.0), jm.one_by_one(4), through=through) for through in (False, True))
    theta = one.init(key)
    results = [each.grad(key, theta, task, meta_step=0) for each in (one, other)]
    np.testing.assert_allclose(results[0][2]["loss"], results[1][2]["loss"], rtol=1e-6)
    assert results[0][0].memory == theta.memory == results[1][0].memory


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="asb: order is 2 and the rule's update has no finite derivative"):
        jm.asb(NET, jm.xent, optax.adam(1e-3), jm.one_by_one(1), through=True)
    with pytest.raises(ValueError, match="inner optimiser begins anew"):
        jm.asb(NET, jm.xent, jm.chain(jm.zap(slots="zero"), optax.sgd(0.1)), jm.one_by_one(1))
    with pytest.raises(ValueError, match="order must be 1 or 2"):
        _asb(0.1, True, order=3)
    with pytest.raises(ValueError, match=r"no layer's name begins with 'gate'.*layer1"):
        jm.anml(NET, jm.xent, optax.sgd(0.1), jm.one_by_one(1))
    with pytest.raises(ValueError, match="no layer names"):
        jm.oml(toys.quadratic(), jm.mse, optax.sgd(0.1), jm.one_by_one(1))
