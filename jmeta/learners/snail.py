"""SNAIL as a learner: the support set is a sequence of labelled examples in random order, each query the element that follows it.

    logits = network((x_1, y_1), ..., (x_NK, y_NK), (x, 0))

References:
  Mishra, Rohaninejad, Chen, Abbeel, A Simple Neural Attentive Meta-Learner, ICLR 2018 (https://arxiv.org/abs/1707.03141), section
  5.1: shots drawn anew for each episode of training, the loss at the last element.

Differs from the paper in: all queries of an episode are answered, each as if it alone followed the support set.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmeta.core import Batch, MetaLearner, Theta, memoise, query_grad
from jmeta.losses import xent
from jmeta.models.snail import Sequential


class Remembered(NamedTuple):
    """What SNAIL takes from a support set."""

    theta: Theta
    known: Any


@memoise
def snail(net: Sequential, loss: Callable[..., jax.Array] = xent, *, vary_shots: bool = True) -> MetaLearner:
    """SNAIL. Nothing is adapted: there are no inner steps.

    Args:
      net: such as `jm.snail_net(jm.conv4(64, pool=True, norm="support"), ways)`.
      loss: of the queries' logits.
      vary_shots: whether, in training, the shots of each episode are drawn from 1 to those that its support set has, so that one
        network serves them all.

    Returns:
      A meta-learner. Its support sets must hold as many shots as the network is made for, at most.

    >>> from jmeta.models.backbones import conv4
    >>> from jmeta.models.snail import snail_net
    >>> learner = snail(snail_net(conv4(64, pool=True, norm="support"), 5))
    """

    def adapt(key, theta, support):
        mask = jnp.ones(len(support.y)) if support.mask is None else support.mask
        if len(support.y) > net.most:
            raise ValueError(
                f"snail: the support set has {len(support.y)} examples, but the network is made for {net.most}. Usual cause: "
                "more shots than snail_net's most_shots."
            )
        order = jnp.argsort(jax.random.uniform(key, mask.shape) + (mask > 0))  # padding first, the rest in random order
        places = jnp.arange(len(order))
        behind = jnp.where(mask[order] > 0, places, len(order) - 1 - places % jnp.maximum((mask > 0).sum(), 1).astype(int))
        seen = support.x[order[behind]]  # padding shows others' images, so that it adds nothing to a batch's statistics
        return Remembered(theta, net.remember(theta.params, seen, support.y[order], mask[order]))

    def predict(phi, x):
        return net.answer(phi.theta.params, phi.known, x)

    def curve(key, theta, task):
        return predict(adapt(key, theta, task.support), task.query.x)[None]

    plain = query_grad(adapt, predict, loss)

    def grad(key, theta, task, *, meta_step):
        if not vary_shots:
            return plain(key, theta, task, meta_step=meta_step)
        key_shots, key_learn = jax.random.split(key)
        return plain(key_learn, theta, task._replace(support=_fewer(key_shots, task.support, net.ways)), meta_step=meta_step)

    return MetaLearner(lambda key: Theta(net.init(key)), adapt, predict, curve, grad)


def _fewer(key: jax.Array, support: Batch, ways: int) -> Batch:
    """The support set with a number of shots drawn from 1 to its own, the others masked."""
    examples = len(support.y)
    shots = jax.random.randint(key, (), 1, max(examples // ways, 1) + 1)
    earlier = jnp.tril(support.y[:, None] == support.y, -1).sum(1)  # examples of its class in front of each
    mask = (earlier < shots).astype(jnp.float32)
    return support._replace(mask=mask if support.mask is None else mask * support.mask)
