"""MAML: learn parameters from which a few gradient steps solve a task; ANIL, BOIL and Meta-SGD by their rules.

    phi = theta - alpha * grad L_support(theta)    (steps times)
    theta <- theta - beta * mean over tasks of grad_theta L_query(phi)

References:
  Finn, Abbeel, Levine, Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017
  (https://arxiv.org/abs/1703.03400), algorithm 1; first order: section 5.2.
  Raghu, Raghu, Bengio, Vinyals, Rapid Learning or Feature Reuse?, ICLR 2020 (https://arxiv.org/abs/1909.09157): ANIL.
  Oh, Yoo, Kim, Yun, BOIL: Towards Representation Change for Few-shot Learning, ICLR 2021 (https://arxiv.org/abs/2008.08882).
  Li, Zhou, Chen, Li, Meta-SGD, 2017 (https://arxiv.org/abs/1707.09835).
  Antoniou, Edwards, Storkey, How to train your MAML, ICLR 2019 (https://arxiv.org/abs/1810.09502): `step_weights`.

Differs from the papers in: the loss is what the caller gives (the MAML code's is a sum, see `jmeta.xent`); normalisation affine
parameters are adapted with the rest unless the rule leaves them out; Meta-SGD's rates start equal, not random.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jmeta.core import (
    Data,
    InnerLoop,
    MetaLearner,
    Model,
    Rule,
    Theta,
    chain,
    check_parts,
    evaluate_loss,
    given,
    inner_loop,
    memoise,
    meta_gradient,
    query_grad,
)
from jmeta.losses import measure
from jmeta.rules.scale import learned_rates, only


@memoise
def maml(
    model: Model,
    loss: Callable[..., jax.Array],
    rule: Rule | optax.GradientTransformation,
    data: Data,
    *,
    order: int = 2,
    unroll: bool | None = None,
    remat: bool | None = None,
    probe: Callable = given,
    step_weights: Callable[[jax.Array], jax.Array] | tuple[float, ...] | None = None,
    carry_state: bool = False,
) -> MetaLearner:
    """MAML with any rule as its inner optimiser.

    Args:
      model: the network.
      loss: `(outputs, y) -> scalar` of the inner steps and of the queries.
      rule: how a task is learned, for instance `optax.sgd(0.4)`.
      data: what the inner loop sees, for instance `jm.repeat(1)`.
      order: 2, or 1 for first-order MAML (FOMAML).
      unroll: whether the inner steps are written out or scanned; see `jmeta.core.inner_loop`.
      remat: whether inner steps are computed anew on the way back, to save memory; see `jmeta.core.inner_loop`.
      probe: how queries are obtained; reinforcement learning rolls out the adapted policy.
      step_weights: MAML++'s multi-step loss: the weights of the query loss after each step, `[steps]`, or a function of the meta
        step that returns them. None weighs the last step alone.
      carry_state: the inner optimiser's state goes on from task to task.

    Returns:
      A meta-learner whose `phi` is a `Theta`.

    Raises:
      TypeError: the model or the data is none.
      ValueError: `order` is neither 1 nor 2; or it is 2 and the inner optimiser has no derivative at a zero gradient; or
        `step_weights` are not one a step.

    >>> from jmeta.models.backbones import mlp
    >>> from jmeta.losses import mse
    >>> from jmeta.tasks.feeds import repeat
    >>> learner = maml(mlp(1), mse, optax.sgd(0.01), repeat(1))
    """
    if order not in (1, 2):
        raise ValueError(f"maml: order must be 1 (first-order MAML) or 2, got {order!r}.")
    check_parts(model, data)
    rule = chain(rule)
    if order == 2:
        check_differentiable("maml", rule, model, data.steps)
    if step_weights is not None and not callable(step_weights) and len(step_weights) != data.steps:
        raise ValueError(f"maml: step_weights has {len(step_weights)} weights for {data.steps} inner steps; give one a step.")
    loop = inner_loop(model, loss, rule, data, order=order, unroll=unroll, remat=remat, carry_state=carry_state)
    if step_weights is None:
        grad = query_grad(loop.adapt, loop.predict, loss, probe=probe, meta=rule.meta)
    else:
        grad = meta_gradient(_over_steps(loop, loss, probe, step_weights), rule.meta)
    return MetaLearner(loop.init, loop.adapt, loop.predict, loop.curve, grad)


def _over_steps(loop: InnerLoop, loss: Callable, probe: Callable, step_weights: Any) -> Callable:
    """The objective of MAML++'s multi-step loss: the weighted sum of the query losses after each step."""

    def objective(key, theta, task, meta_step):
        key_adapt, key_query = jax.random.split(key)

        def look(phi, step):
            query = probe(key_query, task.query, step, lambda x: loop.output(phi, x, step))
            outputs = loop.output(phi, query.x, step)
            value = evaluate_loss(loss, outputs, query)
            return value, {"loss": value, **measure(outputs, query.y, query.mask)}

        phi, (losses, infos) = loop.walk(key_adapt, theta, task.support, look)
        weights = jnp.asarray(step_weights(meta_step) if callable(step_weights) else step_weights)
        if weights.shape != losses[1:].shape:
            raise ValueError(
                f"maml: step_weights must give one weight for each of the {loop.steps} inner steps, got shape {weights.shape}. "
                "Usual cause: jm.step_weights made for another number of steps."
            )
        return (weights * losses[1:]).sum(), (phi, jax.tree.map(lambda leaf: leaf[-1], infos))

    return objective


def check_differentiable(name: str, rule: Rule, model: Model, steps: int) -> None:
    """Refuses an inner optimiser whose update has no finite derivative at a zero gradient, as Adam's square root there."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    states = jax.eval_shape(rule.update.init, shapes)
    if not any(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(states)):
        return
    phases = {rule.phase(step): step for step in reversed(range(steps))}

    def slope(zeros):
        ones = jax.tree.map(jnp.ones_like, zeros)
        finite = []
        for phase, step in phases.items():
            context = {"step": step, "phase": phase, "hyper": rule.init(zeros), "key": jax.random.key(0), "layers": model.layers}
            update = functools.partial(rule.update.update, state=rule.update.init(zeros), params=zeros, **context)
            _, tangents = jax.jvp(lambda grads, update=update: update(grads)[0], (zeros,), (ones,))
            finite += [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tangents)]
        return jnp.array(finite).all()

    with jax.ensure_compile_time_eval():
        finite = jax.jit(slope)(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))
    if not isinstance(finite, Tracer) and not finite:
        raise ValueError(
            f"{name}: order is 2 and the rule's update has no finite derivative at a zero gradient, so meta-gradients would be "
            "NaN. Usual cause: an inner Adam or RMSProp without eps_root, as in optax.adam(1e-3); give it one, "
            "optax.adam(1e-3, eps_root=1e-8), or use order=1."
        )


def warn_of_unlearned(name: str, theta: Theta) -> Theta:
    """Theta as it is; warns where a rule has meta-parameters that the learner has no gradient for."""
    if jax.tree.leaves(theta.hyper):
        warnings.warn(
            f"{name}: the meta-parameters of {', '.join(theta.hyper)} stay as they start, since {name} has no gradient for them. "
            "Usual cause: a rule made for maml, such as learned_rates.",
            stacklevel=3,
        )
    return theta


def _head(name: str, model: Model) -> str:
    if not model.layers:
        raise ValueError(
            f"{name}: the model has no layer names, so its head is not known. Usual cause: a hand-made Model; give it "
            "layers=('...', 'head') in forward order, as they stand at the top level of its parameters."
        )
    return model.layers[-1]


@memoise
def anil(model: Model, loss: Callable, rule: Rule | optax.GradientTransformation, data: Data, **options) -> MetaLearner:
    """ANIL: MAML whose inner loop adapts the last layer alone. Arguments as for `maml`.

    Raises:
      ValueError: the model has no layer names.
    """
    return maml(model, loss, only(_head("anil", model), rule), data, **options)


@memoise
def boil(model: Model, loss: Callable, rule: Rule | optax.GradientTransformation, data: Data, **options) -> MetaLearner:
    """BOIL: MAML whose inner loop adapts all but the last layer. Arguments as for `maml`.

    Raises:
      ValueError: the model has no layer names.
    """
    head = _head("boil", model)
    return maml(model, loss, only(tuple(name for name in model.layers if name != head), rule), data, **options)


@memoise
def meta_sgd(model: Model, loss: Callable, data: Data, *, rate: float = 0.01, **options) -> MetaLearner:
    """Meta-SGD: MAML with a learned inner rate for each parameter, all starting at `rate`. Other arguments as for `maml`."""
    return maml(model, loss, learned_rates(rate), data, **options)
