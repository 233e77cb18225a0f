"""Small tasks and rules that the tests share."""

import jax
import jax.numpy as jnp
import optax

import jmeta as jm


def quadratic(dtype=jnp.float32):
    """One parameter p = 3 whose output is p, whatever the input."""
    return jm.Model(lambda key: {"p": jnp.array(3.0, dtype)}, lambda p, x: jnp.broadcast_to(p["p"], x.shape))


def half_square(outputs, y):
    return 0.5 * ((outputs - y) ** 2).mean()


def quadratic_task(dtype=jnp.float32):
    """Support target 1, query target -2."""
    return jm.Task(*(jm.Batch(jnp.zeros((1, 1), dtype), jnp.full((1, 1), target, dtype)) for target in (1.0, -2.0)))


def blobs(ways=3, shots=2, queries=4, size=6):
    """Classes are Gaussian blobs."""

    def sample(key, data):
        key_centre, *keys = jax.random.split(key, 3)
        centres = jax.random.normal(key_centre, (ways, size))

        def batch(key, each):
            y = jnp.repeat(jnp.arange(ways), each)
            return jm.Batch(centres[y] + 0.3 * jax.random.normal(key, (len(y), size)), y)

        return jm.Task(batch(keys[0], shots), batch(keys[1], queries))

    return jm.Tasks(sample)


def net(ways=3, size=6):
    return jm.mlp(ways, hidden=(8, 8), shape=(size,))


def features(size=6):
    """An embedding into four features."""
    return jm.mlp(4, hidden=(8,), shape=(size,))


def normed(ways=3, size=6, norm="layer"):
    """The same with a normalisation that has scales."""
    return jm.mlp(ways, hidden=(8, 8), shape=(size,), norm=norm)


def shifted(params, key, scale):
    """All parameters moved by one random number: cheap to compile, and enough to tell keys apart."""
    return jax.tree.map(lambda p: p + scale * jax.random.uniform(key), params)


def noisy(name="noisy", scale=0.1):
    """A rule with a random reset, and a random gate that is still where the key is None."""

    def gate(params, *, step, hyper, key):
        return params if key is None else shifted(params, key, 0.01)

    return jm.Rule(name, reset=lambda key, params, support, *, hyper: shifted(params, key, scale), gate=gate)


def shrinking():
    """A rule with one meta-parameter, which scales the parameters in every forward pass."""
    return jm.Rule(
        "shrinking",
        init=lambda params: jnp.array(0.9),
        gate=lambda params, *, step, hyper, key: jax.tree.map(lambda p: p * hyper, params),
    )


def alternating():
    """A rule with phases: gradients count at even steps alone."""

    def update(updates, state, params=None, *, phase, **_):
        return (updates if phase else jax.tree.map(jnp.zeros_like, updates)), state

    both = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    return jm.Rule("alternating", update=both, phase=lambda step: step % 2 == 0)


def clipped_meta():
    """A rule that has the last word on a task's meta-gradient."""
    return jm.Rule("clipped", meta=lambda gradient, theta, phi: jax.tree.map(lambda g: jnp.clip(g, -1e-3, 1e-3), gradient))
