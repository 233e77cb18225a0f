"""Sequences of one class, remember sets, and epochs without replacement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmeta as jm

COUNTS = (3, 5, 4)


def _images():
    labels = np.repeat(np.arange(3), COUNTS)
    return jm.from_arrays(np.arange(12, dtype=np.uint8).reshape(12, 1, 1), labels)


def _numbers(batch):
    return np.asarray(batch.x * 255).round().astype(int).ravel()


def test_a_sequence_is_of_one_class_and_precedes_the_remember_set(key):
    tasks = jm.streams(_images(), shots=3, remember=6)
    seen = set()
    for each in jax.random.split(key, 30):
        task = jax.jit(tasks.sample)(each, tasks.data)
        numbers, labels = _numbers(task.query), np.repeat(np.arange(3), COUNTS)
        np.testing.assert_array_equal(labels[numbers], task.query.y)
        assert len(set(np.asarray(task.support.y))) == 1 and len(set(numbers[:3])) == 3
        assert len(set(numbers[3:])) == 6
        np.testing.assert_array_equal(_numbers(task.support), numbers[:3])
        seen.add(int(task.support.y[0]))
    assert seen == {0, 1, 2}


def test_longer_sequences_than_a_class_has_images_draw_again(key):
    tasks = jm.streams(_images(), shots=5, remember=0)
    for each in jax.random.split(key, 30):
        task = tasks.sample(each, tasks.data)
        numbers, label = _numbers(task.support), int(task.support.y[0])
        assert (np.repeat(np.arange(3), COUNTS)[numbers] == label).all()
        assert label != 1 or len(set(numbers)) == 5


def test_an_epoch_shows_every_example_once_in_a_new_order(key):
    batches = jm.epochs(5)
    source = jm.Batch(jnp.arange(12.0), jnp.arange(12))
    epochs = []
    for epoch in range(2):
        parts = [batches.at(key, source, 3 * epoch + number, None) for number in range(3)]
        shown = np.concatenate([np.asarray(part.y)[np.asarray(part.mask) > 0] for part in parts])
        assert sorted(shown) == list(range(12)) and [int(part.mask.sum()) for part in parts] == [5, 5, 2]
        epochs.append(list(shown))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("data", [jm.epochs(12), jm.minibatches(1, 12)], ids=["epochs", "minibatches"])
def test_a_whole_set_is_scaled_as_it_is_drawn(key, data):
    tasks, net = jm.labelled(_images()), jm.mlp(3, hidden=(), shape=(1,))
    learner, task = jm.supervised(net, jm.xent, data), tasks.sample(key, tasks.data)
    assert task.support.x.dtype == jnp.uint8
    theta = learner.init(key)
    batch = learner.grad(key, theta, task, meta_step=0)[2]["batch"]
    np.testing.assert_array_equal(np.sort(_numbers(batch)), np.arange(12))
    scaled = net.apply(theta.params, task.query.x / 255.0)
    np.testing.assert_allclose(learner.curve(key, theta, task)[0], scaled, rtol=1e-6)
    np.testing.assert_allclose(learner.predict(theta, task.query.x), scaled, rtol=1e-6)


def test_bad_input_is_named():
    for wrong in ({"shots": 0}, {"remember": 13}, {"remember": -1}):
        with pytest.raises(ValueError, match=f"streams: {next(iter(wrong))}"):
            jm.streams(_images(), **wrong)
    with pytest.raises(ValueError, match="epochs: size"):
        jm.epochs(0)
