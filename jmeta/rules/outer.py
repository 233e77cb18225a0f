"""Optimisers for parts of what is meta-learned: labels for `optax.partition`, and outer optimisers of the parameters alone."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jmeta.core import Params


def top_level(params: Params) -> Any:
    """Labels each parameter with the name of its layer, for `optax.partition`.

    >>> top_level({"alpha": {"a": 1.0}, "w": {"b": 2.0}})
    {'alpha': {'a': 'alpha'}, 'w': {'b': 'w'}}
    """
    return {name: jax.tree.map(lambda _, name=name: name, layer) for name, layer in params.items()}


def on_params(transform: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Makes of an optimiser of parameters an outer one: what it sees and moves are the parameters of theta, whose hyper stays.

    Args:
      transform: such as `optax.partition({"alpha": optax.sgd(0.6), "w": optax.sgd(1.0)}, jm.top_level)`.

    >>> outer = on_params(optax.partition({"a": optax.sgd(1.0), "b": optax.sgd(0.5)}, top_level))
    >>> from jmeta.core import Theta
    >>> theta = Theta({"a": jnp.ones(1), "b": jnp.ones(1)})
    >>> updates, _ = outer.update(theta, outer.init(theta), theta)
    >>> {name: update.tolist() for name, update in updates.params.items()}
    {'a': [-1.0], 'b': [-0.5]}
    """
    inner = optax.with_extra_args_support(transform)

    def init(params: Any):
        return inner.init(params.params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any):
        if "grad" in extra:
            extra["grad"] = extra["grad"].params
        if "value_fn" in extra:
            whole = extra["value_fn"]
            extra["value_fn"] = lambda moved, **context: whole(params._replace(params=moved), **context)
        moved, state = inner.update(updates.params, state, None if params is None else params.params, **extra)
        return updates._replace(params=moved, hyper=jax.tree.map(jnp.zeros_like, updates.hyper)), state

    return optax.GradientTransformationExtraArgs(init, update)
