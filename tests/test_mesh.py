"""Tasks over devices: the same numbers on two as on one."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from jmeta import mesh as meshes
from jmeta.train import batch_gradient
from tests import toys

TASKS = toys.blobs()
OUTER = optax.adam(1e-2)


@pytest.fixture
def mesh():
    return jm.task_mesh(2)


def _learner(**options):
    return jm.maml(toys.net(), jm.xent, optax.sgd(0.1, momentum=0.9), jm.repeat(2), **options)


@pytest.mark.parametrize("staged", [False, True], ids=["shared data", "data of each task"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_two_devices_give_the_same_meta_gradient(key, mesh, chunk, staged):
    with jax.enable_x64(True):
        learner = _learner()
        theta = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), learner.init(key))
        sample, data = TASKS.sample, ()
        if staged:
            data = jax.vmap(TASKS.sample, (0, None))(jax.random.split(key, 8), ())
            sample = lambda key, task: task
        one, two = (
            jax.jit(batch_gradient(learner, sample, 8, chunk, each), static_argnums=4)(key, theta, data, 0, staged)
            for each in (None, mesh)
        )
    chex.assert_trees_all_close(one[:2], two[:2], rtol=1e-12, atol=1e-14)
    chex.assert_trees_all_close(one[2], two[2], rtol=1e-6)  # accuracy is float32


LEARNERS = {
    "maml": lambda: _learner(),
    "a state that is carried": lambda: jm.maml(
        toys.net(), jm.xent, optax.adam(1e-2, eps_root=1e-8), jm.repeat(1), carry_state=True
    ),
    "imaml": lambda: jm.imaml(toys.net(), jm.xent, optax.sgd(0.1), jm.repeat(2)),
    "reptile": lambda: jm.reptile(toys.net(), jm.xent, optax.adam(1e-2, b1=0.0), jm.minibatches(2, 4), carry_state=True),
    "protonet": lambda: jm.protonet(toys.features(), ways=3),
    "matching": lambda: jm.matching(toys.features(), ways=3),
    "ridge": lambda: jm.ridge(toys.features(), ways=3),
    "snail": lambda: jm.snail(jm.snail_net(toys.features(), 3, features=4, most_shots=2, attention=((4, 4), (4, 4)), filters=4)),
    "routing": lambda: jm.maml(toys.normed(), jm.xent, jm.chain(jm.route(0.5, keep_meta=0.5), optax.sgd(0.1)), jm.repeat(1)),
    "zap": lambda: jm.maml(toys.net(), jm.xent, jm.chain(jm.zap("head"), optax.sgd(0.1)), jm.repeat(1)),
}
COLLECTIVE = r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)(?:-start)?\("


@pytest.mark.parametrize("name", LEARNERS)
def test_a_meta_step_has_one_all_reduce_and_no_other_collective(key, mesh, optimised, name):
    learner = LEARNERS[name]()
    theta = learner.init(key)
    gradient = jax.jit(batch_gradient(learner, TASKS.sample, 4, 2, mesh))
    program = gradient.lower(*meshes.replicate((key, theta, TASKS.data), mesh), 0).compile()
    assert re.findall(COLLECTIVE, str(program.as_text())) == ["all-reduce"]


def test_training_on_two_devices_is_training_on_one(key, mesh):
    learner = _learner(carry_state=True)
    watch = jm.Validation(learner, TASKS, episodes=20, every=10)
    one, two = (jm.fit(key, learner, TASKS, OUTER, 30, 8, mesh=each, validate=watch, progress=False) for each in (None, mesh))
    chex.assert_trees_all_close(one, two, rtol=1e-3, atol=1e-4)
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves((two.theta, two.last, two.state)))


def test_host_resident_images_are_spread_too(key, mesh):
    images = jm.from_arrays(np.asarray(jax.random.randint(key, (60, 6, 6, 1), 0, 256), np.uint8), np.arange(60) // 6)
    learner = jm.maml(jm.mlp(3, hidden=(8,), shape=(6, 6, 1)), jm.xent, optax.sgd(0.1), jm.repeat(1))
    kinds = [jm.episodes(images, 3, 1, 2, **budget) for budget in ({}, {"device_budget": 0})]
    assert kinds[0].stage is None and kinds[1].stage is not None
    losses = [jm.fit(key, learner, tasks, OUTER, 12, 4, mesh=mesh, progress=False).history["loss"] for tasks in kinds]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    theta = learner.init(key)
    scores = [jm.fewshot(key, learner, theta, tasks, 10, mesh=each).mean for tasks in kinds for each in (None, mesh)]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-6)


def test_a_run_on_two_devices_is_resumed_bit_for_bit(key, mesh, tmp_path):
    def run(folder, steps, mesh):
        return jm.fit(key, _learner(), TASKS, OUTER, steps, 8, mesh=mesh, workdir=tmp_path / folder, resume=True, progress=False)

    whole = run("whole", 20, mesh)
    run("parts", 7, mesh)
    chex.assert_trees_all_equal(whole.last, run("parts", 20, mesh).last)
    with pytest.warns(UserWarning, match="began with 2 devices and goes on with 1"):
        run("parts", 21, None)


def test_a_run_is_resumed_on_more_devices(key, mesh, tmp_path):
    _fit(key, None, workdir=tmp_path / "run", steps=2, resume=True, chunk=8)
    with pytest.warns(UserWarning, match="began with 1 devices and goes on with 2"):
        done = _fit(key, mesh, workdir=tmp_path / "run", steps=4, resume=True)
    chex.assert_trees_all_close(done.theta, _fit(key, None, steps=4).theta, rtol=1e-4, atol=1e-5)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(done.theta))


def _fit(key, mesh, *, steps=3, learner=None, outer=OUTER, **options):
    return jm.fit(key, learner or _learner(), TASKS, outer, steps, 8, mesh=mesh, progress=False, **options)


def test_same_objects_are_traced_once_on_two_devices(key, mesh):
    seen, plain = [], _learner()

    def grad(*arguments, **named):
        seen.append(1)
        return plain.grad(*arguments, **named)

    learner = plain._replace(grad=grad)
    counts = [len(seen) for _ in range(2) if _fit(key, mesh, learner=learner)]
    assert counts[0] == counts[1] > 0


def test_an_optimiser_may_keep_the_parameters_in_its_state(key, mesh):
    for each in (None, mesh):
        history = _fit(key, each, outer=optax.contrib.prodigy(), steps=20).history
        assert np.isfinite(history["loss"]).all()


@pytest.mark.parametrize("chunk", [1, None])
def test_two_devices_score_as_one(key, mesh, chunk):
    learner = _learner()
    theta = learner.init(key)
    for episodes in (5, 130):
        one, two = (jm.fewshot(key, learner, theta, TASKS, episodes, chunk=chunk, mesh=each) for each in (None, mesh))
        np.testing.assert_allclose(one.by_step, two.by_step, rtol=1e-6)
        assert str(one) == str(two)


def test_floats_are_averaged_and_all_else_is_the_last_devices(key, mesh):
    def last(part, keys):
        large = part[-1] * 100_000_007 - 2**30
        return {"mean": part.mean(dtype=jnp.float32), "count": large, "odd": part[-1] % 2 == 1, "key": keys[-1]}

    keys = jax.random.split(key, 4)
    one, two = (jax.jit(meshes.spread(last, each, (True, True)))(jnp.arange(4), keys) for each in (None, mesh))
    assert float(two["mean"]) == 1.5 and int(two["count"]) == 300_000_021 - 2**30 and bool(two["odd"])
    assert [leaf.dtype for leaf in two.values()] == [leaf.dtype for leaf in one.values()] and two["key"] == keys[-1]


def test_parameters_are_shared_out_too(key, tmp_path):
    """Each device keeps half of every kernel, of its moments too, in training, in checkpoints' resumption and in tests."""
    mesh, learner = jm.task_mesh(2, params=2), _learner()
    assert mesh is not None and dict(mesh.shape) == {"tasks": 1, "params": 2}
    theta = jm.init_sharded(key, learner, mesh, {"*/dense/kernel": 1})
    chex.assert_trees_all_close(theta, learner.init(key), atol=1e-6)
    watch = {"validate": jm.Validation(learner, TASKS, episodes=20, every=3)}
    for steps in (3, 6):
        done = _fit(key, mesh, steps=steps, theta=theta, workdir=tmp_path / "run", resume=True, learner=learner, **watch)
    plain = _fit(key, None, steps=6, learner=learner, **watch)
    chex.assert_trees_all_close(done[:3], plain[:3], rtol=1e-4, atol=1e-5)
    for params in (done.theta.params, done.last.params, done.state[0].mu.params, done.state[0].nu.params):
        for layer in ("layer1", "layer2"):
            kernel = params[layer]["dense"]["kernel"]
            assert {shard.data.shape for shard in kernel.addressable_shards} == {(kernel.shape[0], 4)}
        assert params["head"]["kernel"].is_fully_replicated


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ({"block1/*": 0}, r"'block1/\*' fits no parameter; there are head/bias, head/kernel, layer1/dense/bias"),
        ({"head/*": 0}, r"axis 0 of head/bias, of shape \(3,\), cannot be divided by 2 devices"),
        ({"*/kernel": 2}, "axis 2 of .*kernel, .*cannot be divided"),
    ],
)
def test_bad_layouts_are_refused(key, split, says):
    with pytest.raises(ValueError, match=says):
        jm.init_sharded(key, _learner(), jm.task_mesh(2, params=2), split)


def test_bad_meshes_are_refused(key, mesh):
    assert jm.task_mesh(1) is None
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"must be 1 to 2, .*got {count}"):
            jm.task_mesh(count)
    with pytest.raises(ValueError, match="params must divide the number of devices, 2, got 3"):
        jm.task_mesh(2, params=3)
    with pytest.raises(ValueError, match="the mesh must have an axis 'params'"):
        jm.init_sharded(key, _learner(), mesh, {})
    with pytest.raises(TypeError, match="expected a jax"):
        _fit(key, 2)
    with pytest.raises(ValueError, match="expected an axis 'tasks' of type Auto, and perhaps one 'params', got axes"):
        _fit(key, jax.make_mesh((2,), ("data",)))
    with pytest.raises(ValueError, match="use_cores: count must be at least 1"):
        jm.use_cores(0)
    with pytest.raises(ValueError, match="got batch 5 and 2 devices; the nearest batches that fit: 4 and 6"):
        jm.fit(key, _learner(), TASKS, OUTER, 2, 5, mesh=mesh)
    with pytest.raises(ValueError, match="got batch 8, 4 on each of 2 devices, and chunk 8"):
        jm.fit(key, _learner(), TASKS, OUTER, 2, 8, mesh=mesh, chunk=8)
    with pytest.raises(ValueError, match="neither workdir nor validate nor mesh"):
        jax.vmap(lambda key: jm.fit(key, _learner(), TASKS, OUTER, 2, 4, mesh=mesh).theta)(jax.random.split(key, 2))
