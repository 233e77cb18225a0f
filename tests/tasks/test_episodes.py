"""Episodes on the device and from the host."""

import chex
import jax
import numpy as np
import optax
import pytest

import jmeta as jm
from jmeta.tasks.episodes import distinct


def _images(classes=7, each=6, size=8):
    """Every pixel of an image is its class, but for the first, which is its number in the class."""
    pixels = np.repeat(np.arange(classes, dtype=np.uint8), each)[:, None, None, None] * np.ones((1, size, size, 1), np.uint8)
    pixels[:, 0, 0, 0] = np.tile(np.arange(each), classes)
    return jm.from_arrays(pixels, np.repeat(np.arange(classes), each))


def _numbers(batch):
    x = np.asarray(batch.x * 255).round().astype(int)
    return x[:, 1, 1, 0], x[:, 0, 0, 0]


def test_classes_differ_and_queries_are_no_support_images(key):
    tasks = jm.episodes(_images(), ways=4, shots=2, queries=3)
    episodes = jax.jit(jax.vmap(tasks.sample, (0, None)))(jax.random.split(key, 50), tasks.data)
    seen = set()
    for index in range(50):
        task = jax.tree.map(lambda leaf, index=index: leaf[index], episodes)
        assert task.support.y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        (classes, first), (others, second) = _numbers(task.support), _numbers(task.query)
        owner = dict(zip(task.support.y.tolist(), classes.tolist(), strict=True))
        assert len(set(owner.values())) == 4
        assert others.tolist() == [owner[label] for label in task.query.y.tolist()]
        pairs = list(zip([*classes, *others], [*first, *second], strict=True))
        assert len(set(pairs)) == len(pairs) == 20
        seen |= set(pairs)
    assert len(seen) == 42


def test_classes_of_different_sizes(key):
    pixels = np.arange(11, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    images = jm.from_arrays(pixels, [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    tasks = jm.episodes(images, ways=2, shots=1, queries=2)
    many = jax.vmap(tasks.sample, (0, None))(jax.random.split(key, 200), tasks.data)
    x = (np.concatenate([many.support.x, many.query.x], 1)[:, :, 0, 0, 0] * 255).round()
    y = np.concatenate([many.support.y, many.query.y], 1)
    small = x < 3
    assert (small.sum(1) == 3).all()
    for values, labels, mine in zip(x, y, small, strict=True):
        assert len(set(labels[mine])) == 1 and len(set(values)) == 6
    assert set(x.ravel()) == set(range(11))


def _learner():
    return jm.maml(jm.mlp(3, hidden=(4,), shape=(8, 8, 1)), jm.xent, optax.sgd(0.1), jm.repeat(1))


def test_host_images_give_the_same_training_and_score(key, tmp_path):
    images, learner = _images(), _learner()
    near, far = (jm.episodes(images, 3, 1, 2, device_budget=budget) for budget in (10**9, 0))
    assert near.stage is None and far.stage is not None and far.data == ()
    fits = [jm.fit(key, learner, tasks, optax.adam(1e-2), 23, 4, progress=False) for tasks in (near, far)]
    chex.assert_trees_all_close(fits[0].theta, fits[1].theta, rtol=1e-5, atol=1e-6)
    scores = [jm.fewshot(key, learner, fits[0].theta, tasks, 130) for tasks in (near, far)]
    np.testing.assert_allclose(scores[0].by_step, scores[1].by_step, atol=1e-6)
    for steps in (13, 23):
        again = jm.fit(key, learner, far, optax.adam(1e-2), steps, 4, workdir=tmp_path / "run", resume=True, progress=False)
    chex.assert_trees_all_equal(again.theta, fits[1].theta)


def test_images_are_an_argument_of_the_program_and_no_constant():
    tasks = jm.episodes(_images(classes=50, each=50, size=28), 3, 1, 2)
    text = jax.jit(tasks.sample).lower(jax.random.key(0), tasks.data).as_text()
    assert len(text) < 100_000


@pytest.mark.parametrize(
    "numbers, message",
    [
        ((8, 1, 1), "ways is 8, but the image set has 7 classes"),
        ((3, 2, 5), r"shots \+ queries is 2 \+ 5 = 7, but class '0' has 6 images"),
        ((0, 1, 1), "ways must be at least 1"),
        ((2, 1, 0), "queries must be at least 1"),
    ],
)
def test_bad_arguments_are_named(numbers, message):
    with pytest.raises(ValueError, match=message):
        jm.episodes(_images(), *numbers)


def test_sinusoid_is_a_sine_of_the_papers_ranges(key):
    tasks = jm.sinusoid(shots=40, queries=30)
    many = jax.vmap(tasks.sample, (0, None))(jax.random.split(key, 300), ())
    assert many.support.x.shape == (300, 40, 1) and many.query.y.shape == (300, 30, 1)
    x, y = np.asarray(many.support.x[..., 0]), np.asarray(many.support.y[..., 0])
    assert x.min() >= -5 and x.max() <= 5 and x.min() < -4.9 and x.max() > 4.9
    basis = np.stack([np.sin(x), np.cos(x)], -1)
    for features, targets in zip(basis, y, strict=True):
        (a, b), *_ = np.linalg.lstsq(features, targets, rcond=None)
        np.testing.assert_allclose(features @ [a, b], targets, atol=1e-3)
        assert 0.09 < np.hypot(a, b) < 5.01 and b < 1e-3  # -amplitude * sin(phase), phase in [0, pi]


def test_distinct_numbers_are_different_and_every_order_is_equally_likely(key):
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: distinct(key, 4, 3)))(jax.random.split(key, 24_000)))
    orders, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(orders) == 24 and all(len(set(order)) == 3 for order in orders.tolist())
    assert ((counts - 1000) ** 2 / 1000).sum() < 49.7  # chi-squared of 23 degrees of freedom: once in a thousand keys
    np.testing.assert_array_equal(np.sort(distinct(key, 5, 5)), np.arange(5))
