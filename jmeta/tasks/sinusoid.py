"""Regression on sine waves of random amplitude and phase.

y = amplitude * sin(x - phase), amplitude ~ U[0.1, 5], phase ~ U[0, pi], x ~ U[-5, 5].

References:
  Finn, Abbeel, Levine, Model-Agnostic Meta-Learning, ICML 2017 (https://arxiv.org/abs/1703.03400), section 5.1.
"""

import jax
import jax.numpy as jnp

from jmeta.core import Batch, Task, Tasks, memoise


@memoise
def sinusoid(shots: int = 10, queries: int | None = None) -> Tasks:
    """Tasks of one sine wave each.

    Args:
      shots: points of the support set.
      queries: points of the query set; as many as shots if None.

    Returns:
      Tasks whose batches have x and y of shape `[points, 1]`.

    >>> task = sinusoid(shots=5).sample(jax.random.key(0), ())
    >>> task.support.x.shape, task.query.y.shape
    ((5, 1), (5, 1))
    """
    points = shots, shots if queries is None else queries
    if min(points) < 1:
        raise ValueError(f"sinusoid: shots and queries must be at least 1, got {points[0]} and {points[1]}.")

    def sample(key, data):
        drawn = jax.random.uniform(key, (2 + sum(points), 1))  # at once, since each draw costs much beside so small a task
        amplitude, phase, x = 0.1 + 4.9 * drawn[0], jnp.pi * drawn[1], 10.0 * drawn[2:] - 5.0
        y = amplitude * jnp.sin(x - phase)
        return Task(Batch(x[: points[0]], y[: points[0]]), Batch(x[points[0] :], y[points[0] :]))

    return Tasks(sample)
