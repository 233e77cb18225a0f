"""Reptile: move the initial parameters towards what tasks make of them; no gradient goes through the inner loop.

    phi = theta after `steps` steps of an inner optimiser on the support set
    theta <- theta - beta * mean over tasks of (theta - phi)

References:
  Nichol, Achiam, Schulman, On First-Order Meta-Learning Algorithms, 2018 (https://arxiv.org/abs/1803.02999), algorithm 2 and
  section 6: an inner Adam without momentum whose state goes on from task to task; with and without transduction.

Differs from the paper in: the state that goes on is the mean over the tasks of a meta-batch, which run in parallel; the paper's
code hands it from one task to the next. `jmeta.minibatches` draws each batch anew, where the code goes through a shuffled support
set; and a transductive test predicts the queries together, where the code adds the support set to them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jmeta.core import Data, MetaLearner, Model, Rule, Theta, chain, evaluate_loss, inner_loop, memoise, reset_alone
from jmeta.learners.maml import warn_of_unlearned
from jmeta.losses import measure


@memoise
def reptile(
    model: Model,
    loss: Callable[..., jax.Array],
    rule: Rule | optax.GradientTransformation,
    data: Data,
    *,
    unroll: bool | None = None,
    carry_state: bool = False,
    transductive: bool = True,
) -> MetaLearner:
    """Reptile with any rule as its inner optimiser. The outer optimiser of the paper is `optax.sgd`, its rate falling from 1 to 0.

    Queries take no part in training: they are measured for the log alone, so that a task's queries may be few.

    Args:
      model: the network.
      loss: `(outputs, y) -> scalar`, or `(outputs, y, mask)` for batches with a mask.
      rule: how a task is learned, for instance `optax.adam(1e-3, b1=0.)`.
      data: what the inner loop sees, for instance `jm.minibatches(5, 10)`.
      unroll: whether the inner steps are written out or scanned; see `jmeta.core.inner_loop`.
      carry_state: the inner optimiser's state goes on from task to task, as in the paper.
      transductive: True predicts all queries together; False one at a time, in one batch with the support set, which matters where
        the network normalises by the statistics of a batch.

    Returns:
      A meta-learner whose `phi` is a `Theta`.

    Warns:
      UserWarning: the rule has meta-parameters, such as learned rates; nothing here gives them a gradient.

    >>> from jmeta.losses import xent
    >>> from jmeta.models.backbones import conv4
    >>> from jmeta.tasks.feeds import minibatches
    >>> learner = reptile(conv4(5), xent, optax.adam(1e-3, b1=0.0), minibatches(5, 10), carry_state=True)
    """
    rule = chain(rule)
    plain = inner_loop(model, loss, rule, data, order=1, unroll=unroll, remat=False, carry_state=carry_state)

    def init(key):
        return warn_of_unlearned("reptile", plain.init(key))

    def follow(key, theta, support, watch=None):
        def kept(phi):
            return phi._replace(memory={**dict(phi.memory), "support": support.x})

        phi, seen = plain.follow(key, theta, support, watch and (lambda phi, step: watch(kept(phi), step)))
        return kept(phi), seen

    def output(phi, x, step):
        def alone(one):
            return plain.output(phi, jnp.concatenate([phi.memory["support"], one[None]]), step)[-1]

        return jax.vmap(alone)(x)

    loop = plain if transductive else plain._replace(follow=follow, output=output)

    def grad(key, theta, task, *, meta_step):
        key_reset, key_follow = jax.random.split(key)
        begun = loop.begin(key_reset, theta, task.support)
        phi, _ = loop.follow(key_follow, begun, task.support)
        outputs = loop.predict(phi, task.query.x)
        value = evaluate_loss(loss, outputs, task.query)
        start = reset_alone(rule, key_reset, theta.params, task.support, theta.hyper)  # what one task alone loses is no way gone
        moved = jax.tree.map(jnp.subtract, start, phi.params)
        gradient = Theta(moved, jax.tree.map(jnp.zeros_like, theta.hyper))
        base = theta._replace(memory={**theta.memory, "state": phi.memory["state"]}) if carry_state else theta
        return base, rule.meta(gradient, theta, phi), {"loss": value, **measure(outputs, task.query.y, task.query.mask)}

    return MetaLearner(init, loop.adapt, loop.predict, loop.curve, grad)
