"""A user's own Flax network as a `Model`."""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors

from jmeta.core import Model, memoise

_ADVICE = (
    "The inner loop differentiates a pure function of parameters alone: use normalisation without running averages (GroupNorm, "
    "LayerNorm, or jmeta's BatchNorm, which uses the batch at hand) and leave dropout out or make it deterministic."
)


def linen_model(module: nn.Module, example: jax.Array, layers: tuple[str, ...], *, support_stats: bool = False) -> Model:
    """A Linen module without state as a `Model` whose layers are named.

    Args:
      module: called as `module.apply(variables, x)`.
      example: an input `[N, ...]` to initialise from.
      layers: names of the parameters' top level in forward order.
      support_stats: whether `Model.stats` is offered.
    """

    @jax.jit  # or the forward pass would run too, operation by operation
    def make(key):
        return module.init(key, example)["params"]

    def init(key):
        params = make(key)
        return {name: params[name] for name in layers}  # `jit` sorts them by name

    def apply(params, x, stats=None):
        variables = {"params": params} if stats is None else {"params": params, "stats": stats}
        try:
            return cast(jax.Array, module.apply(variables, x))
        except errors.ScopeParamShapeError as error:
            raise ValueError(
                f"model: x has shape {x.shape}, the network was made for {('N', *example.shape[1:])} ({error}). Usual causes: "
                "shape=(height, width, channels) not given to the network, or channels first."
            ) from error

    def stats(params, x):
        return module.apply({"params": params}, x, mutable=["stats"])[1]["stats"]

    def inputs(params, x):
        seen = {}

        def record(call, args, kwargs, context):
            if len(context.module.path) == 1 and context.method_name == "__call__":
                seen.setdefault(context.module.path[0], args[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(record):
            apply(params, x)
        return {name: seen[name] for name in layers if name in seen}

    return Model(init, apply, layers, stats if support_stats else None, inputs)


@memoise
def from_linen(module: nn.Module, example: jax.ShapeDtypeStruct | Any) -> Model:
    """A user's Flax Linen module as a `Model`.

    Args:
      module: a module called with one argument x.
      example: an input `[N, ...]`, or its `jax.ShapeDtypeStruct`, to initialise from.

    Returns:
      A model whose layers are the parameters' top-level names in the order in which the submodules are called.

    Raises:
      ValueError: the module has mutable collections (batch statistics), or draws random numbers when applied (dropout).

    >>> model = from_linen(nn.Dense(3), jax.ShapeDtypeStruct((1, 2), "float32"))
    >>> model.layers
    ('bias', 'kernel')
    """
    example = jax.numpy.zeros(example.shape, example.dtype)
    name = type(module).__name__
    called = []

    def record(call, args, kwargs, context):
        called.extend(context.module.path[:1])
        return call(*args, **kwargs)

    try:
        with nn.intercept_methods(record):
            shapes = jax.eval_shape(module.init, jax.random.key(0), example)
    except errors.FlaxError as error:
        raise ValueError(f"from_linen: {name} cannot be initialised with parameters alone ({error}). {_ADVICE}") from error
    extra = sorted(set(shapes) - {"params"})
    if extra:
        raise ValueError(f"from_linen: {name} has mutable collections {extra} besides its parameters. {_ADVICE}")
    try:
        jax.eval_shape(module.apply, shapes, example)
    except errors.InvalidRngError as error:
        raise ValueError(f"from_linen: {name} draws random numbers when it is applied. {_ADVICE}") from error
    layers = dict.fromkeys([*(layer for layer in called if layer in shapes["params"]), *shapes["params"]])
    return linen_model(module, example, tuple(layers))


def from_nnx(make: Callable[[Any], Any], example: jax.ShapeDtypeStruct | Any) -> Model:
    """A user's Flax NNX module as a `Model`.

    Args:
      make: `(rngs: nnx.Rngs) -> module`, a function and not a module, since every `Model.init(key)` makes one.
      example: an input `[N, ...]`, or its `jax.ShapeDtypeStruct`, on which the module is tried.

    Returns:
      A model whose parameters are a plain dict of arrays and whose layers are its top-level names in attribute order.

    Raises:
      ValueError: the module has variables besides `nnx.Param` (batch statistics, dropout's random stream), or changes when called.
    """
    from flax import nnx

    attributes = []

    def build():
        module = make(nnx.Rngs(params=0))
        attributes.extend(vars(module))  # in their order here; eval_shape returns them sorted
        return module

    graph, state = nnx.split(nnx.eval_shape(build))
    extra = sorted({v.type.__name__ for _, v in nnx.to_flat_state(state) if not issubclass(v.type, nnx.Param)})
    if extra:
        raise ValueError(f"from_nnx: the module has variables {extra} besides its parameters. {_ADVICE}")

    def init(key):
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(params=key))))

    def apply(params, x, stats=None):
        new = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(new, params)
        return nnx.merge(graph, new)(x)

    params = nnx.to_pure_dict(state)
    jax.eval_shape(apply, params, jax.ShapeDtypeStruct(example.shape, example.dtype))
    return Model(init, apply, tuple(name for name in attributes if name in params))


def mixed(model: Model, dtype: Any = jnp.bfloat16) -> Model:
    """A model whose products are computed in a narrower type, for the matrix units of GPUs and TPUs.

    Parameters and inputs are cast on every call; parameters, their gradients and inner updates stay as they are, and so do the
    sums of jmeta's and Flax's normalisation layers.

    Args:
      model: a network, with floating parameters.
      dtype: a floating type. float16 has too narrow a range for gradients without a scaled loss, so bfloat16 is the default.

    Returns:
      A model with the same parameters and layers, whose outputs and statistics have the parameters' type.

    Raises:
      ValueError: dtype is no floating type.

    >>> from jmeta.models.backbones import mlp
    >>> model = mixed(mlp(1))
    >>> model.apply(model.init(jax.random.key(0)), jnp.ones((5, 1))).dtype
    dtype('float32')
    """
    try:
        narrow = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"mixed: dtype must be a floating type such as jnp.bfloat16, got {dtype!r}.") from error
    if not jnp.issubdtype(narrow, jnp.floating):
        raise ValueError(
            f"mixed: dtype must be a floating type such as jnp.bfloat16, got {narrow}. Usual cause: a type for quantised networks, "
            "whose rounding has no gradient."
        )
    return _mixed(model, narrow)


@memoise
def _mixed(model: Model, dtype: Any) -> Model:
    def to(dtype, tree):
        return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf, tree)

    def wide(params):
        return jnp.result_type(*[leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)])

    def apply(params, x, stats=None):
        given = () if stats is None else (stats,)
        return to(wide(params), model.apply(to(dtype, params), to(dtype, x), *given))

    def narrowly(function):
        return None if function is None else lambda params, x: to(wide(params), function(to(dtype, params), to(dtype, x)))

    return Model(model.init, apply, model.layers, narrowly(model.stats), narrowly(model.inputs))
