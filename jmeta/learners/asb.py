"""ASB: alternate between a sequence of one class and a batch of many; Meta-ASB, OML and ANML, which learn through the sequence.

    psi = reset(theta);  phi = psi - alpha * grad L(x_k)  for k = 1 ... n, one example after another
    ASB        theta <- Adam(phi, grad L_batch(phi))              the sequence's steps stay
    Meta-ASB   theta <- Adam(psi, grad over psi of L_batch(phi))  they do not, but are differentiated through

References:
  Frati, Traft, Clune, Cheney, Reset It and Forget It, ECAI 2024 (https://arxiv.org/abs/2310.07996): ASB and Meta-ASB.
  Javed, White, Meta-Learning Representations for Continual Learning, NeurIPS 2019 (https://arxiv.org/abs/1905.12588): OML.
  Beaulieu et al., Learning to Continually Learn, ECAI 2020 (https://arxiv.org/abs/2002.09571): ANML.

Differs from the papers in: the first releases of OML and ANML took the inner gradients as constants, which `order=1` does.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jmeta.core import Data, MetaLearner, Model, Rule, chain, evaluate_loss, inner_loop, memoise
from jmeta.learners.maml import check_differentiable, warn_of_unlearned
from jmeta.losses import measure
from jmeta.rules.scale import only


@memoise
def asb(
    model: Model,
    loss: Callable[..., jax.Array],
    rule: Rule | optax.GradientTransformation,
    data: Data,
    *,
    through: bool = False,
    order: int = 2,
    unroll: bool | None = None,
    remat: bool | None = None,
) -> MetaLearner:
    """Alternating sequential and batch learning. A meta-batch holds one task, since each changes what the next starts from.

    Args:
      model: the network, whose head has as many outputs as there are classes in training.
      loss: `(outputs, y) -> scalar`.
      rule: how the sequence is learned, for instance `jm.chain(jm.zap("head"), optax.sgd(1e-3))`.
      data: what the inner loop sees, for instance `jm.one_by_one(20)`.
      through: False is ASB; True is Meta-ASB, whose gradient goes through the sequence.
      order: of that gradient: 2, or 1 to take the inner gradients as constants. ASB needs none.
      unroll: whether the inner steps are written out or scanned; see `jmeta.core.inner_loop`.
      remat: whether they are computed anew on the way back; see `jmeta.core.inner_loop`.

    Returns:
      A meta-learner whose `phi` is a `Theta`, for tasks such as `jm.streams` makes.

    Raises:
      ValueError: `order` is neither 1 nor 2, or it is 2 and the inner optimiser has no derivative at a zero gradient; or the rule
        asks for slots="zero" of an inner optimiser that goes on, of which there is none here.

    Warns:
      UserWarning: the rule has meta-parameters, such as learned rates, and `through` is False, so that nothing learns them.

    >>> from jmeta.losses import xent
    >>> from jmeta.models.backbones import mlp
    >>> from jmeta.rules.zap import zap
    >>> from jmeta.tasks.feeds import one_by_one
    >>> learner = asb(mlp(100), xent, chain(zap("head"), optax.sgd(1e-3)), one_by_one(20))
    """
    if order not in (1, 2):
        raise ValueError(f"asb: order must be 1 or 2, got {order!r}.")
    rule = chain(rule)
    if rule.clears:
        raise ValueError("asb: the rule has slots='zero', but the inner optimiser begins anew with each task; use slots='keep'.")
    if through and order == 2:
        check_differentiable("asb", rule, model, data.steps)
    if rule.private:
        raise ValueError(
            "asb: what a sequence changes goes on to the next, but the rule silences parts of the network for one task. Usual "
            "cause: jmeta.route with where='forward' and refresh='task'; use refresh='step'."
        )
    loop = inner_loop(model, loss, rule, data, order=order if through else 1, unroll=unroll, remat=remat)

    def grad(key, theta, task, *, meta_step):
        key_reset, key_follow = jax.random.split(key)

        def follow(start):
            return loop.follow(key_follow, start, task.support)[0]

        base = loop.begin(key_reset, theta, task.support)
        base, rest = (base, follow) if through else (follow(base), lambda start: start)

        def value(learned):
            phi = rest(learned._replace(memory=base.memory))
            outputs = loop.predict(phi, task.query.x)
            value = evaluate_loss(loss, outputs, task.query)
            return value, (phi, {"loss": value, **measure(outputs, task.query.y, task.query.mask)})

        (_, (phi, info)), gradient = jax.value_and_grad(value, has_aux=True)(base._replace(memory=()))
        return base._replace(memory=theta.memory), rule.meta(gradient, theta, phi), info

    def init(key):
        return loop.init(key) if through else warn_of_unlearned("asb", loop.init(key))

    return MetaLearner(init, loop.adapt, loop.predict, loop.curve, grad)


@memoise
def oml(model: Model, loss: Callable, rule: Rule | optax.GradientTransformation, data: Data, **options: Any) -> MetaLearner:
    """OML: Meta-ASB whose sequence moves the last layer alone. Arguments as for `asb`; chain a zap into the rule.

    Raises:
      ValueError: the model has no layer names.
    """
    if not model.layers:
        raise ValueError("oml: the model has no layer names, so its head is not known; give it layers=('...', 'head').")
    return asb(model, loss, only(model.layers[-1], rule), data, through=True, **options)


@memoise
def anml(model: Model, loss: Callable, rule: Rule | optax.GradientTransformation, data: Data, **options: Any) -> MetaLearner:
    """ANML: Meta-ASB whose sequence moves all but the neuromodulating layers, those whose names begin with "gate".

    Args:
      model: such as `jmeta.anml_net(classes)`.
      loss: see `asb`.
      rule: see `asb`.
      data: see `asb`.
      **options: see `asb`.

    Raises:
      ValueError: the model has no such layers.
    """
    gates = [name for name in model.layers if name.startswith("gate")]
    if not gates:
        raise ValueError(f"anml: no layer's name begins with 'gate'; the model has {', '.join(model.layers) or 'no names'}.")
    return asb(model, loss, only(tuple(name for name in model.layers if name not in gates), rule), data, through=True, **options)
