"""Rules that say how much of the inner gradient each parameter takes: none (`only`), or a learned share (`learned_rates`).

    params <- params - rate * gradient,  rate a meta-parameter for each parameter, tensor or layer, and for each step if wanted

References:
  Li, Zhou, Chen, Li, Meta-SGD, 2017 (https://arxiv.org/abs/1707.09835), equation 2: a rate for each parameter.
  Antoniou, Edwards, Storkey, How to train your MAML, ICLR 2019 (https://arxiv.org/abs/1810.09502): rates per layer and step.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jmeta.core import Rule, chain, memoise


@memoise
def only(layers: str | tuple[str, ...], rule: Rule | optax.GradientTransformation) -> Rule:
    """Adapts the named layers with `rule` and leaves the others as they are, at no cost in an unrolled loop.

    Args:
      layers: a name, or several, at the top level of the parameters.
      rule: how those layers are adapted; its resets, gates and updates change them alone.

    Returns:
      A rule.

    Raises:
      ValueError: a name is not in the parameters; raised when the rule first meets them.

    >>> rule = only("head", optax.sgd(0.1))
    >>> params = {"body": jnp.ones(2), "head": jnp.ones(1)}
    >>> updates, _ = rule.update.update(params, rule.update.init(params), params)
    >>> print(f"body {updates['body'][0]:.1f}, head {updates['head'][0]:.1f}")
    body 0.0, head -0.1
    """
    names = (layers,) if isinstance(layers, str) else tuple(layers)

    def check(params):
        unknown = [name for name in names if name not in params]
        if unknown:
            raise ValueError(f"only: layers {unknown} are not among the parameters, whose top level is {list(params)}.")

    def label(params):
        check(params)
        sides = {name: "adapted" if name in names else "frozen" for name in params}
        return {name: jax.tree.map(lambda _, side=side: side, params[name]) for name, side in sides.items()}

    inner = chain(rule)
    update = optax.partition({"adapted": inner.update, "frozen": optax.set_to_zero()}, label)

    def among(params, changed):
        check(params)
        return {**params, **{name: changed[name] for name in names}}

    return inner._replace(
        name="only",
        reset=lambda key, params, support, **context: among(params, inner.reset(key, params, support, **context)),
        gate=lambda params, **context: among(params, inner.gate(params, **context)),
        update=optax.with_extra_args_support(update),
        parts=None,
    )


@memoise
def learned_rates(
    rate: float = 0.01, *, per: Literal["parameter", "tensor", "layer"] = "parameter", steps: int | None = None
) -> Rule:
    """Gradient descent whose rates are meta-parameters.

    Args:
      rate: what every rate starts from.
      per: one rate for each parameter (Meta-SGD), for each tensor (MAML++), or for each layer at the top level.
      steps: None for the same rates at all steps, or the number of steps that have rates of their own; later steps use the last.

    Returns:
      A rule whose hyper has the tree of the parameters (of their top level for layers), with a leading axis `[steps]` if given.

    Raises:
      ValueError: `per` is none of the three, or `steps` is below 1.
    """
    if per not in ("parameter", "tensor", "layer"):
        raise ValueError(f"learned_rates: per must be 'parameter', 'tensor' or 'layer', got {per!r}.")
    if steps is not None and steps < 1:
        raise ValueError(f"learned_rates: steps must be at least 1 or None, got {steps}.")
    lead = () if steps is None else (steps,)

    def init(params):
        if per == "layer":
            return {name: jnp.full(lead, rate, jax.tree.leaves(layer)[0].dtype) for name, layer in params.items()}
        return jax.tree.map(lambda p: jnp.full(lead + (p.shape if per == "parameter" else ()), rate, p.dtype), params)

    def update(updates: Any, state: Any, params: Any = None, **context: Any):
        hyper, step = context["hyper"], context.get("step", 0)

        def scale(rates, part):
            now = rates if steps is None else rates[jnp.minimum(step, steps - 1)]
            return jax.tree.map(lambda g: -now * g, part)

        return jax.tree.map(scale, hyper, updates), state

    return Rule("learned_rates", init, update=optax.GradientTransformationExtraArgs(optax.init_empty_state, update))
