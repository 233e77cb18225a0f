"""Mistakes that newcomers make, and what they are told."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from tests import toys

SGD = optax.sgd(0.1)


class _Flax(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


def _learner(net=None):
    return jm.maml(net or toys.net(), jm.xent, SGD, jm.repeat(1))


def _adapt(x, y, net=None):
    learner = _learner(net)
    return learner.adapt(jax.random.key(0), learner.init(jax.random.key(0)), jm.Batch(x, y))


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (
            lambda: _adapt(jnp.ones((3, 6)), jnp.eye(3)),
            ValueError,
            r"y must be integer labels of shape \(3,\), got float32 \(3, 3\).*one-hot",
        ),
        (lambda: _adapt(jnp.ones((3, 6)), jnp.arange(2)), ValueError, "integer labels.*labels of other examples"),
        (
            lambda: _adapt(jnp.ones((3, 6)), jnp.arange(1, 4)),
            ValueError,
            "from 0 to 2, one for each output, got 1 to 3.*start at 1",
        ),
        (lambda: jm.maml(toys.net(), jm.xent, SGD, 5), TypeError, r"data: .*jm.repeat\(5\).*got 5"),  # pyright: ignore
        (lambda: jm.maml(_Flax(), jm.xent, SGD, jm.repeat(1)), TypeError, "model: .*got _Flax.*from_linen"),  # pyright: ignore
        (lambda: jm.reptile(_Flax(), jm.xent, SGD, jm.repeat(1)), TypeError, "model: .*got _Flax"),  # pyright: ignore
        (lambda: jm.from_arrays(np.zeros((2, 3, 28, 28), np.uint8), [0, 1]), ValueError, "expected channels last.*transpose"),
        (
            lambda: _adapt(jnp.ones((3, 84, 84, 3)), jnp.arange(3), jm.conv4(3)),
            ValueError,
            r"x has shape \(3, 84, 84, 3\), the network was made for \('N', 28, 28, 1\).*channels first",
        ),
    ],
)
def test_they_are_named(make, kind, says):
    with pytest.raises(kind, match=says):
        make()


def test_what_fit_returns_is_no_theta(key):
    learner = _learner()
    fitted = jm.fit(key, learner, toys.blobs(), optax.adam(1e-3), steps=1, batch=2, progress=False)
    with pytest.raises(TypeError, match=r"fewshot: theta must be a jmeta.Theta, got Fit.*take fit\(...\).theta"):
        jm.fewshot(key, learner, fitted, toys.blobs(), 5)  # pyright: ignore[reportArgumentType]


def test_more_ways_than_outputs(key):
    with pytest.raises(FloatingPointError, match="more ways than the network has outputs"):
        jm.fit(key, _learner(), toys.blobs(ways=4), optax.adam(1e-3), steps=1, batch=2, progress=False)


def test_a_folder_of_data_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("JMETA_DATA_DIR", str(tmp_path / "mistyped"))
    with pytest.raises(FileNotFoundError, match=r"JMETA_DATA_DIR: it names .*mistyped, which is no folder"):
        jm.omniglot()


def test_cores_after_the_first_computation(monkeypatch):
    jnp.ones(1).block_until_ready()
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    with pytest.raises(RuntimeError, match=r"use_cores: JAX has computed already.*restart the kernel"):
        jm.use_cores(jax.device_count() + 1)


def test_labels_of_padding_may_be_any():
    outputs, y, mask = jnp.zeros((2, 3)), jnp.array([1, -1]), jnp.array([1.0, 0.0])
    with pytest.raises(ValueError, match="from 0 to 2, one for each output, got -1 to 1"):
        jm.xent(outputs, y)
    assert jnp.allclose(jm.xent(outputs, y, mask), jm.xent(outputs[:1], y[:1]))


def test_what_is_printed_is_short():
    images = jm.from_arrays(np.zeros((4, 28, 28), np.uint8), [0, 0, 1, 1])
    assert repr(images) == "Images(2 classes, 4 images of 28 x 28 x 1)"
    tasks = jm.episodes(images, 2, 1, 1)
    assert "uint8" in repr(tasks) and len(repr(tasks)) < 1000


def test_a_preset_that_is_near():
    with pytest.raises(ValueError, match="nearest is 'zap-asb-omniglot'"):
        jm.presets.preset("zap-asb-omniglott", ("zap-asb-omniglot",))
