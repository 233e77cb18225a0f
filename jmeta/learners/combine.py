"""Learners made of learners: one that changes over meta-training, and one that logs what becomes of theta."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jmeta.core import MetaLearner, Theta, memoise


@memoise
def switch(*learners: MetaLearner, at: tuple[int, ...]) -> MetaLearner:
    """Trains with one learner after another, in one run: a warm-up, or first-order gradients before second-order ones.

    Args:
      *learners: of the same theta, inner optimiser's state included.
      at: the meta-step from which the next one trains, one number for each but the first, in rising order.

    Returns:
      A meta-learner that adapts and predicts as the last one does. A meta-step runs one of them alone, even if tasks are vmapped.

    Raises:
      ValueError: the numbers do not fit; or, when they are first traced, the learners' thetas differ.

    >>> import optax
    >>> from jmeta.learners.maml import maml
    >>> from jmeta.losses import mse
    >>> from jmeta.models.backbones import mlp
    >>> from jmeta.tasks.feeds import repeat
    >>> first, second = (maml(mlp(1), mse, optax.sgd(0.01), repeat(5), order=order) for order in (1, 2))
    >>> learner = switch(first, second, at=(1000,))
    """
    if len(learners) < 1 or len(at) != len(learners) - 1 or list(at) != sorted(at):
        raise ValueError(f"switch: at must name a meta-step for each learner but the first, in rising order, got {at}.")

    def grad(key, theta, task, *, meta_step):
        outlines = [_outline(learner, key, theta, task, meta_step) for learner in learners]
        shapes = [jax.tree.map(jnp.shape, outputs) for outputs, _ in outlines]
        if any(each != shapes[0] for each in shapes):
            raise ValueError("switch: the learners must have one theta, gradient and info. Usual cause: another inner optimiser.")
        stays = all(stays for _, stays in outlines)

        def branch(learner):
            base, gradient, info = learner.grad(key, theta, task, meta_step=meta_step)
            return (base.memory if stays else base), gradient, info

        number = sum((jnp.asarray(meta_step >= step, jnp.int32) for step in at), jnp.int32(0))
        base, gradient, info = jax.lax.switch(number, [functools.partial(branch, learner) for learner in learners])
        return (theta._replace(memory=base) if stays else base), gradient, info

    return learners[-1]._replace(init=learners[0].init, grad=grad)


def _outline(learner: MetaLearner, key: jax.Array, theta: Theta, task: Any, meta_step: Any) -> tuple[Any, bool]:
    """The shapes of what `grad` returns, and whether its base is theta itself but for its memory, as `fit` needs to know."""
    stays = []

    def look():
        base, gradient, info = learner.grad(key, theta, task, meta_step=meta_step)
        mine, given = (jax.tree.leaves(each._replace(memory=())) for each in (base, theta))
        stays.append(all(ours is theirs for ours, theirs in zip(mine, given, strict=True)))
        return base, gradient, info

    return jax.eval_shape(look), stays[0]


@memoise
def watched(learner: MetaLearner, look: Callable[[Theta], dict[str, jax.Array]]) -> MetaLearner:
    """Logs scalars of theta beside the loss, at every meta-step.

    Args:
      learner: any.
      look: `(theta) -> {name: scalar}`.

    Returns:
      The learner, whose `info` holds them as well.
    """

    def grad(key, theta, task, *, meta_step):
        base, gradient, info = learner.grad(key, theta, task, meta_step=meta_step)
        return base, gradient, {**info, **look(theta)}

    return learner._replace(grad=grad)
