"""Ordinary supervised learning as a meta-learner, for pre-training and as a baseline: nothing is adapted to a task.

    theta <- outer(theta, grad L_batch(theta))

References:
  Frati, Traft, Clune, Cheney, Reset It and Forget It, ECAI 2024 (https://arxiv.org/abs/2310.07996): i.i.d. pre-training.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jmeta.core import Data, MetaLearner, Model, Theta, evaluate_loss, memoise
from jmeta.losses import measure
from jmeta.tasks.feeds import epochs


def as_floats(x: jax.Array) -> jax.Array:
    """Images of uint8 in [0, 1]; anything else as it is."""
    return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x


@memoise
def supervised(model: Model, loss: Callable[..., jax.Array], data: Data | None = None) -> MetaLearner:
    """Learns from one batch at each meta-step.

    Args:
      model: the network.
      loss: `(outputs, y) -> scalar`, or `(outputs, y, mask)` for batches with a mask.
      data: which batch of the labelled set each meta-step sees; `jm.epochs(256)` if None, which goes through all of
        `jm.labelled(images)` before it sees an example again.

    Returns:
      A meta-learner whose `adapt` returns theta as it is; images of uint8 are scaled to [0, 1]. Its `info` hands the step's
      batch on to outer optimisers that want it.
    """
    batches = epochs(256) if data is None else data

    def predict(phi, x):
        return model.apply(phi.params, as_floats(x))

    def curve(key, theta, task):
        return predict(theta, task.query.x)[None]

    def grad(key, theta, task, *, meta_step):
        batch = batches.at(key, task.support, meta_step, lambda x: predict(theta, x))
        batch = batch._replace(x=as_floats(batch.x))

        def value(learned):
            outputs = model.apply(learned.params, batch.x)
            value = evaluate_loss(loss, outputs, batch)
            return value, {"loss": value, **measure(outputs, batch.y, batch.mask)}

        gradient, info = jax.grad(value, has_aux=True)(theta._replace(memory=()))
        return theta, gradient, {**info, "batch": batch}

    return MetaLearner(
        lambda key: Theta(model.init(key)),
        lambda key, theta, support: theta,
        predict,
        curve,
        grad,
    )
