"""Presets and what is made of them."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

import jmeta as jm
from jmeta import builders, presets, pretrain
from jmeta.presets import PRESETS, Config
from jmeta.rules.resetting import Resetting
from jmeta.tasks.images import from_arrays, split_images


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="nearest is 'maml-omniglot-5w1s'"):
        presets.preset("mml-omniglot-5w1")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_a_learner_and_survives_json(name):
    config = presets.preset(name)
    theta = jax.eval_shape(builders.make_learner(config).init, jax.random.key(0))
    layers = theta.params.get("w", theta.params)
    if config.method in ("protonet", "matching", "ridge"):
        assert "head" not in layers
    else:
        assert layers["head"]["bias"].shape == ((1,) if config.dataset == "sinusoid" else (config.ways,))
    assert presets.from_dict(json.loads(json.dumps(dataclasses.asdict(config))), "here") == config


def test_methods_differ_where_they_should(key):
    def learner(method):
        return builders.make_learner(Config(method=method, filters=4))

    assert learner("meta-sgd").init(key).hyper
    assert learner("maml") is not learner("anil")
    with pytest.raises(ValueError, match="learner="):
        presets.from_dict({"rate": 1}, "here")


def test_a_pattern_in_the_configuration_masks_the_inner_loop(key):
    images = jax.random.normal(key, (5, 28, 28, 1))
    support = jm.Batch(images, jax.numpy.arange(5))
    for method, moved in (("maml", {"head"}), ("meta-sgd", {"head"}), ("sparse", {"head"})):
        learner = builders.make_learner(Config(method=method, filters=4, pattern="head"))
        theta = learner.init(key)
        phi = learner.adapt(key, theta, support)
        same = jax.tree.map(lambda a, b: bool((a == b).all()), phi.params, theta.params)
        assert {name for name, layer in same.items() if not all(jax.tree.leaves(layer))} == moved
    with pytest.raises(ValueError, match="method anil is a pattern itself"):
        builders.make_learner(Config(method="anil", filters=4, pattern="head"))
    for method in ("protonet", "snail"):
        with pytest.raises(ValueError, match=f"pattern: method {method} adapts nothing"):
            builders.make_learner(Config(method=method, inner_steps=0, pattern="head"))
    with pytest.raises(ValueError, match="method protonet has no inner steps; inner_steps and test_steps must be 0, got 1"):
        builders.make_learner(Config(method="protonet"))
    with pytest.raises(ValueError, match="'tail' is neither a layer"):
        builders.make_learner(Config(filters=4, pattern="tail"))


def test_precision_and_unroll_reach_the_learner(key):
    config = Config(filters=4, inner_steps=4)
    images = jax.numpy.zeros((5, 28, 28, 1))
    task = jm.Task(*[jm.Batch(images, jax.numpy.arange(5))] * 2)

    def program(**changed):
        learner = builders.make_learner(dataclasses.replace(config, **changed))
        return str(jax.make_jaxpr(lambda theta: learner.grad(key, theta, task, meta_step=0))(learner.init(key)))

    assert "scan[" not in program() and "scan[" in program(unroll=False)
    assert "bf16" not in program() and "bf16" in program(precision="bfloat16")


def test_omniglot_presets_draw_from_the_real_data(omniglot_npz):
    config = dataclasses.replace(presets.preset("maml-omniglot-20w1s"), source=str(omniglot_npz))
    problem = builders.make_problem(config)
    assert len(problem.labels) == 4400 and problem.valid is not None
    task = problem.test.sample(jax.random.key(0), problem.test.data)
    assert task.support.x.shape == (20, 28, 28, 1) and task.query.x.shape == (300, 28, 28, 1)
    ink = float((task.query.x > 0.5).mean())
    assert 0.01 < ink < 0.2
    with pytest.raises(ValueError, match="ways is 424"):
        builders.make_problem(dataclasses.replace(config, ways=424))


@pytest.fixture
def photographs(tmp_path):
    """Twelve classes of four pictures, each of one colour."""
    pixels = np.broadcast_to(np.arange(48, dtype=np.uint8)[:, None, None, None] * 5, (48, 90, 90, 3))
    np.savez(tmp_path / "photographs.npz", images=pixels, labels=np.arange(48) // 4)
    return str(tmp_path / "photographs.npz")


def test_colour_presets_draw_from_photographs(photographs):
    few = {"classes": (5, 2, 4), "without": ("11",), "ways": 2, "queries": 2, "test_queries": 2}
    config = dataclasses.replace(presets.preset("maml-colour84-5w1s"), source=photographs, **few)
    problem = builders.make_problem(config)
    assert len(problem.labels) == 5 and "11" not in problem.labels and problem.valid is not None
    task = problem.test.sample(jax.random.key(0), problem.test.data)
    assert task.support.x.shape == (2, 84, 84, 3) and task.query.x.shape == (4, 84, 84, 3)
    theta = jax.eval_shape(builders.make_learner(config).init, jax.random.key(0))
    assert theta.params["head"]["kernel"].shape == (5 * 5 * 32, 2)  # pooled four times
    grey = builders.make_problem(dataclasses.replace(config, dataset="grey28"))
    assert grey.test.sample(jax.random.key(0), grey.test.data).support.x.shape == (2, 28, 28, 1)
    with pytest.raises(ValueError, match="source: dataset colour84 needs one"):
        builders.make_problem(dataclasses.replace(config, source=None))
    with pytest.raises(ValueError, match="classes, without: these are for photographs, but the dataset is glyphs"):
        builders.make_problem(dataclasses.replace(config, dataset="glyphs"))


def test_a_meta_gradient_is_clipped_where_that_is_asked_for():
    gradient = jm.Theta({"w": np.array([-30.0, 4.0]), "alpha": np.array([20.0])})

    def first(**options):
        outer = builders.make_outer(Config(**options))
        return outer.update(gradient, outer.init(gradient))

    np.testing.assert_allclose(first(clip=10.0, method="reptile", outer_rate=1.0)[0].params["w"], [10.0, -4.0])
    moved = first(clip=10.0, method="metanas", outer_rate=1.0, alpha_rate=0.5)[0].params
    np.testing.assert_allclose(np.concatenate([moved["w"], moved["alpha"]]), [10.0, -4.0, -5.0])
    means = [optax.tree.get(first(**limit)[1], "mu").params["w"] for limit in ({"clip": 10.0}, {})]
    np.testing.assert_allclose(means, [[-1.0, 0.4], [-3.0, 0.4]], rtol=1e-5)  # Adam's mean takes a tenth
    with pytest.raises(ValueError, match="train: clip must be above 0, got 0"):
        first(clip=0)


def test_alphas_have_an_inner_rate_of_their_own():
    key = jax.random.key(0)
    support = jm.Batch(jax.random.uniform(key, (5, 28, 28, 1)), np.arange(5))

    def steps(times):
        config = Config(method="metanas", cells=1, reductions=(0,), filters=2, inner_rate=1e-3, alpha_times=times, unroll=False)
        learner = builders.make_learner(config, 2)
        theta = learner.init(key)
        phi = jax.jit(learner.adapt)(key, theta, support)
        moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), phi.params, theta.params)
        return max(jax.tree.leaves(moved["alpha"]))

    assert steps(1.0) == pytest.approx(1e-3, rel=1e-2)  # a single step, of Adam
    assert steps(10.0) == pytest.approx(1e-2, rel=1e-2)


@pytest.mark.parametrize("name", pretrain.PRESETS)
def test_every_pretraining_preset_makes_its_learner_and_optimiser(name):
    config = dataclasses.replace(pretrain.PRESETS[name], filters=2, gate_filters=2, images=4, sequence=2, remember=3, size=5)
    images = from_arrays(np.zeros((20, 28, 28), np.uint8), np.arange(20) // 5)
    train = split_images(images, [config.images], 0)[0]
    learner, outer = pretrain.make_learner(config, 4), pretrain.make_outer(config, 16)
    tasks, theta = pretrain.make_tasks(config, train), jax.eval_shape(learner.init, jax.random.key(0))
    task = jax.eval_shape(tasks.sample, jax.random.key(0), tasks.data)
    base, gradient, info = jax.eval_shape(
        lambda theta, task: learner.grad(jax.random.key(0), theta, task, meta_step=0), theta, task
    )
    state = jax.eval_shape(outer.init, gradient)
    extra = optax.with_extra_args_support(outer)
    updates, _ = jax.eval_shape(lambda g, s, p, info: extra.update(g, s, p, info=info), gradient, state, base, info)
    assert jax.tree.structure(updates) == jax.tree.structure(gradient)
    assert isinstance(state, Resetting) == (config.method == "iid" and config.zap)
    assert pretrain.from_dict(dataclasses.asdict(config)) == config
