"""CAVIA: tasks are learned by a few context numbers, an input of the network, and all else is shared.

    context = 0;  context <- context - alpha grad_context L_support    (steps times)
    theta <- theta - beta mean over tasks of grad_theta L_query

References:
  Zintgraf, Shiarli, Kurin, Hofmann, Whiteson, Fast Context Adaptation via Meta-Learning, ICML 2019
  (https://arxiv.org/abs/1810.03642), algorithm 1.

Differs from the paper in: images get the context as channels that are the same everywhere; the paper modulates the features of one
layer (FiLM).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jmeta.core import Data, MetaLearner, Model, Rule, chain, memoise
from jmeta.learners.maml import maml
from jmeta.rules.scale import only


@memoise
def with_context(make: Callable[[tuple[int, ...]], Model], shape: tuple[int, ...], size: int) -> Model:
    """A network that sees, beside each input, numbers which are parameters: the layer "context".

    Args:
      make: `(shape) -> Model`, the network for inputs of a shape, such as `lambda shape: jm.mlp(1, shape=shape)`.
      shape: of one input without context.
      size: how many numbers; they are appended to the inputs' last axis, for images as constant channels.

    Returns:
      A model whose layers are "context" and the network's own.

    Raises:
      ValueError: size is below 1, or the network has a layer "context" itself.

    >>> from jmeta.models.backbones import mlp
    >>> with_context(lambda shape: mlp(1, shape=shape), (1,), 5).layers
    ('context', 'layer1', 'layer2', 'head')
    """
    if size < 1:
        raise ValueError(f"with_context: size must be at least 1, got {size}.")
    model = make((*shape[:-1], shape[-1] + size))
    if "context" in model.layers:
        raise ValueError("with_context: the network has a layer 'context' already.")

    def beside(params, x):
        context = jnp.broadcast_to(params["context"], (*x.shape[:-1], size)).astype(x.dtype)
        return {name: layer for name, layer in params.items() if name != "context"}, jnp.concatenate([x, context], -1)

    def init(key):
        return {"context": jnp.zeros(size), **model.init(key)}

    def apply(params, x, stats=None):
        own, x = beside(params, x)
        return model.apply(own, x) if stats is None else model.apply(own, x, stats)

    stats: Any = None if model.stats is None else lambda params, x: model.stats(*beside(params, x))  # type: ignore[misc]
    return Model(init, apply, ("context", *model.layers), stats)


@memoise
def cavia(
    model: Model, loss: Callable[..., jax.Array], rule: Rule | optax.GradientTransformation, data: Data, **options: Any
) -> MetaLearner:
    """CAVIA: MAML whose inner loop adapts the context alone, from 0 in each task. Arguments as for `maml`.

    Args:
      model: of `with_context`.
      loss: as for `maml`.
      rule: how the context is adapted.
      data: as for `maml`.
      **options: as for `maml`.

    Raises:
      ValueError: the model has no layer "context".
    """
    if "context" not in model.layers:
        raise ValueError(f"cavia: the model has no layer 'context', but {', '.join(model.layers)}; make it by jm.with_context.")

    def reset(key, params, support, *, hyper):
        return {**params, "context": jnp.zeros_like(params["context"])}

    return maml(model, loss, chain(Rule("context", reset=reset), only("context", rule)), data, **options)
