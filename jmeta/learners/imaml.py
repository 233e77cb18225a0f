"""iMAML: the meta-gradient of a regularised inner problem from its solution alone, whatever led there.

    phi = argmin over phi of L_support(phi) + lambda / 2 |phi - theta|^2
    gradient = (I + H / lambda)^-1 grad L_query(phi),   H the Hessian of L_support at phi

References:
  Rajeswaran, Finn, Kakade, Levine, Meta-Learning with Implicit Gradients, NeurIPS 2019 (https://arxiv.org/abs/1909.04630),
  equation 6 and algorithm 2.

Differs from the paper in: nothing by default. The released code solves another system, which `damping` and `added` ask for.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jmeta.core import Data, MetaLearner, Model, Rule, Theta, chain, evaluate_loss, inner_loop, memoise
from jmeta.learners.maml import warn_of_unlearned
from jmeta.losses import measure
from jmeta.rules.scale import proximal


@memoise
def imaml(
    model: Model,
    loss: Callable[..., jax.Array],
    rule: Rule | optax.GradientTransformation,
    data: Data,
    *,
    strength: float = 2.0,
    iterations: int = 5,
    damping: float = 0.0,
    added: float = 0.0,
    unroll: bool | None = None,
) -> MetaLearner:
    """Implicit MAML. Memory does not grow with the inner steps, and any optimiser may take them.

    Args:
      model: the network.
      loss: `(outputs, y) -> scalar`, or `(outputs, y, mask)` for batches with a mask.
      rule: how a task is learned; the pull towards theta is added to its gradients.
      data: what the inner loop sees; the Hessian is that of the whole support set.
      strength: lambda. The released code's tests take 0.
      iterations: of conjugate gradients.
      damping: solves `((1 + damping) I + H / (lambda + added)) x = g`; the released code has 1.
      added: see damping; the released code has 10.
      unroll: whether the inner steps are written out or scanned; see `jmeta.core.inner_loop`.

    Returns:
      A meta-learner whose `phi` is a `Theta`.

    Raises:
      ValueError: strength, damping or added is below 0, strength and added are both 0, or there are no iterations.

    Warns:
      UserWarning: the rule has meta-parameters, such as learned rates; nothing here gives them a gradient.

    >>> from jmeta.losses import xent
    >>> from jmeta.models.backbones import conv4
    >>> from jmeta.tasks.feeds import repeat
    >>> learner = imaml(conv4(5), xent, optax.sgd(0.1), repeat(16))
    """
    if min(strength, damping, added) < 0 or strength + added <= 0:
        raise ValueError(
            f"imaml: strength, damping and added must be at least 0, and one of strength and added above 0, got {strength}, "
            f"{damping} and {added}. Usual cause: strength 0 in training, where it is the denominator; 0 is for tests alone, with "
            "added above 0."
        )
    if iterations < 1:
        raise ValueError(f"imaml: iterations must be at least 1, got {iterations}.")
    rule = chain(proximal(strength), rule) if strength else chain(rule)
    loop = inner_loop(model, loss, rule, data, order=1, unroll=unroll, remat=False)

    def grad(key, theta, task, *, meta_step):
        key_reset, key_follow = jax.random.split(key)

        def begin(params):
            return loop.begin(key_reset, theta._replace(params=params), task.support).params

        begun, to_theta = jax.vjp(begin, theta.params)
        phi = jax.lax.stop_gradient(loop.follow(key_follow, theta._replace(params=begun), task.support)[0])
        moves = jax.tree.map(lambda end, start: end != start, phi.params, begun)

        def at(batch):
            def value(params):
                outputs = loop.predict(phi._replace(params=params), batch.x)
                value = evaluate_loss(loss, outputs, batch)
                return value, {"loss": value, **measure(outputs, batch.y, batch.mask)}

            return jax.grad(value, has_aux=True)

        def curved(v):
            _, product = jax.jvp(lambda params: at(task.support)(params)[0], (phi.params,), (v,))
            return jax.tree.map(lambda hv: hv / (strength + added), product)

        def moving(v):
            return jax.tree.map(lambda which, own: jnp.where(which, own, 0), moves, v)

        def system(v):
            return moving(jax.tree.map(lambda own, hv: (1 + damping) * own + hv, v, curved(v)))

        right, info = at(task.query)(phi.params)
        solved, _ = jax.scipy.sparse.linalg.cg(system, moving(right), maxiter=iterations, tol=0.0)
        still = jax.tree.map(jnp.subtract, right, curved(solved))  # what it changes by way of the others
        at_begin = jax.tree.map(jnp.where, moves, solved, still)
        gradient = Theta(to_theta(at_begin)[0], jax.tree.map(jnp.zeros_like, theta.hyper))
        return theta, rule.meta(gradient, theta, phi), info

    return MetaLearner(lambda key: warn_of_unlearned("imaml", loop.init(key)), loop.adapt, loop.predict, loop.curve, grad)
