"""Resets: parts of a network are drawn anew, so that it learns to learn them again.

    params <- where(chosen, shrink * params + noise * fresh, params)

    zap              the head's weights of some classes, or of all, drawn anew
    later_layers     every layer from one on, as a new network has them
    shrink_perturb   every parameter shrunk, with noise added

All are rules that reset as a task begins; `jmeta.resetting` applies them every so many steps of an outer optimiser.

References:
  Frati, Traft, Clune, Cheney, Reset It and Forget It: Relearning Last-Layer Weights Improves Continual and Transfer Learning, ECAI
  2024 (https://arxiv.org/abs/2310.07996): `zap`; its released code calls it lobotomize.
  Zhou, Vani, Larochelle, Courville, Fortuitous Forgetting in Connectionist Networks, ICLR 2022
  (https://arxiv.org/abs/2202.00155): `later_layers`.
  Ash, Adams, On Warm-Starting Neural Network Training, NeurIPS 2020 (https://arxiv.org/abs/1910.08475): `shrink_perturb`.

Differs from the papers in: `later_layers` draws what the model's own initialisation draws.
"""

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jmeta.core import Model, Params, Rule, memoise
from jmeta.rules.layers import layer_of, with_layers

Init = Literal["he_normal", "official_iid"] | Callable[..., jax.Array]


def reset_where(params: Params, chosen: Any, fresh: Any, *, shrink: float = 0.0, noise: float = 1.0) -> Params:
    """`where(chosen, shrink * params + noise * fresh, params)`, the form of every reset here.

    Args:
      params: a tree of arrays.
      chosen: a tree of its structure, of bools or of arrays of bools that broadcast to the parameters.
      fresh: a tree of its structure, of arrays that broadcast to the parameters.
      shrink: what remains of the old values.
      noise: how much of the fresh ones is added.

    >>> old, fresh = {"w": jnp.ones(3)}, {"w": jnp.zeros(3)}
    >>> reset_where(old, {"w": jnp.arange(3) == 1}, fresh)["w"].tolist()
    [1.0, 0.0, 1.0]
    """

    def one(p, here, new):
        return jnp.where(here, shrink * p + noise * new, p).astype(p.dtype)

    return jax.tree.map(one, params, chosen, fresh)


@memoise
def zap(
    layer: str = "head",
    *,
    init: Init = "he_normal",
    which: Literal["support", "all"] | float = "support",
    bias: bool = False,
    slots: Literal["keep", "zero"] = "keep",
) -> Rule:
    """Draws a layer's weights anew as a task begins: those of its classes, of all, or of some by chance.

    Args:
      layer: a name at the top level of the parameters, usually the last, or a path such as "w/head".
      init: how weights are drawn; see `zap_layer`.
      which: "support" for the classes that the support set's labels name, "all", or the fraction of units that are drawn by lot.
      bias: whether their biases become 0 as well; the paper leaves them.
      slots: whether what an inner optimiser that goes on from task to task (`carry_state`) remembers of them stays or becomes 0;
        `jmeta.resetting` has slots of its own, for the outer one. What that remembers of a class that ASB zaps stays, as in the
        paper.

    Returns:
      A rule.

    Raises:
      ValueError: an argument is none of those; the layer is not there, has no kernel, or shares its arrays with another. The latter
        are raised when the rule first meets the parameters.

    >>> rule = zap("head")
    >>> rule.name
    'zap'
    """
    _check_init(init)
    fraction = which if isinstance(which, int | float) and not isinstance(which, bool) else None
    if (fraction is None and which not in ("support", "all")) or (fraction is not None and not 0 < fraction <= 1):
        raise ValueError(f"zap: which must be 'support', 'all', or a fraction above 0 up to 1, got {which!r}.")
    if slots not in ("keep", "zero"):
        raise ValueError(f"zap: slots must be 'keep' or 'zero', got {slots!r}.")

    def check(params):
        _check_layer(params, layer)
        return ()

    def reset(key, params, support, *, hyper):
        units = _units(_check_layer(params, layer))
        if fraction is not None:
            key, key_lot = jax.random.split(key)
            return zap_layer(key, params, layer, _lot(key_lot, units, fraction), init=init, bias=bias)
        if which == "all":
            return zap_layer(key, params, layer, init=init, bias=bias)
        if support is None:
            raise ValueError("zap: which is 'support', but there is no support set here; give which='all' or a fraction.")
        seen = support.y if support.mask is None else jnp.where(support.mask, support.y, units)  # padding names no class
        return zap_layer(key, params, layer, seen, init=init, bias=bias)

    return Rule("zap", check, reset, clears=slots == "zero")


def zap_layer(
    key: jax.Array, params: Params, layer: str, chosen: Any = None, *, init: Init = "he_normal", bias: bool = False
) -> Params:
    """The reset of `zap` as a plain function.

    Args:
      key: of what is drawn.
      params: a network's parameters.
      layer: a name at their top level, or a path.
      chosen: units, which are a head's classes: integers `[N]` or one, which may be traced, or bools `[units]`; None for all.
      init: "he_normal" draws from N(0, 2 / D), where D is the number of weights of a unit. "official_iid" draws from
        N(0, 2 / (n D)), where n is the number of units chosen, as the paper's released code does when it resets many at once. Or a
        function of key, shape and type, as those of `jax.nn.initializers`.
      bias: whether their biases become 0 as well.

    Returns:
      The parameters; all but the chosen units of that layer's kernels, and biases if asked for, are as they were.

    Raises:
      ValueError: as for `zap`.
    """
    _check_init(init)
    layer_params = _check_layer(params, layer)
    units = _units(layer_params)
    here, columns = _marked(chosen, units), _columns(chosen, units)

    def one(path, leaf):
        if is_named(path, "kernel"):
            return here
        return here & bias if is_named(path, "bias") else jnp.zeros((), bool)

    def draw(path, leaf):
        if not is_named(path, "kernel"):
            return jnp.zeros((), leaf.dtype)
        own = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        if callable(init):
            return init(own, leaf.shape, leaf.dtype)
        rows = here.sum() if init == "official_iid" else 1
        keys = jax.vmap(functools.partial(jax.random.fold_in, own))(columns)
        drawn = jax.vmap(lambda key: jax.random.normal(key, leaf.shape[:-1], leaf.dtype), out_axes=-1)(keys)
        drawn = drawn * jnp.sqrt(2 / (rows * math.prod(leaf.shape[:-1]))).astype(leaf.dtype)
        return drawn if len(columns) == units else jnp.zeros_like(leaf).at[..., columns].set(drawn)

    masks, fresh = (jax.tree_util.tree_map_with_path(each, layer_params) for each in (one, draw))
    return with_layers(params, {layer: reset_where(layer_params, masks, fresh)})


@memoise
def later_layers(model: Model, first: str) -> Rule:
    """Draws every layer from `first` on anew, as the model's own initialisation does (later-layer forgetting).

    Args:
      model: the network, whose layers are named.
      first: the lowest layer that is reset.

    Raises:
      ValueError: the layer is not among the model's.
    """
    if first not in model.layers:
        raise ValueError(f"later_layers: {first!r} is not a layer of the model; it has {', '.join(model.layers) or 'no names'}.")
    names = model.layers[model.layers.index(first) :]

    def reset(key, params, support, *, hyper):
        chosen = {name: jax.tree.map(lambda _, name=name: name in names, layer) for name, layer in params.items()}
        return reset_where(params, chosen, model.init(key))

    return Rule("later_layers", reset=reset)


@memoise
def shrink_perturb(shrink: float = 0.6, noise: float = 0.01) -> Rule:
    """Shrinks every parameter and adds noise: `params <- shrink * params + N(0, noise ** 2)`.

    Args:
      shrink: factor of the old values, from 0 to 1.
      noise: standard deviation of what is added.

    Raises:
      ValueError: shrink is outside [0, 1] or noise below 0.
    """
    if not 0 <= shrink <= 1 or noise < 0:
        raise ValueError(f"shrink_perturb: shrink must be from 0 to 1 and noise at least 0, got {shrink} and {noise}.")

    def reset(key, params, support, *, hyper):
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        fresh = tree.unflatten([jax.random.normal(own, p.shape, p.dtype) for own, p in zip(keys, leaves, strict=True)])
        return reset_where(params, jax.tree.map(lambda _: True, params), fresh, shrink=shrink, noise=noise)

    return Rule("shrink_perturb", reset=reset)


def _check_init(init: Any) -> None:
    if not callable(init) and init not in ("he_normal", "official_iid"):
        raise ValueError(f"zap: init must be 'he_normal', 'official_iid' or a function of key, shape and type, got {init!r}.")


def _check_layer(params: Params, layer: str) -> Params:
    """The parameters of the layer."""
    own = layer_of(params, layer, "zap")
    _units(own)
    mine = [id(leaf) for leaf in jax.tree.leaves(own)]
    everywhere = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), id(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    sharing = [path for path, other in everywhere if other in mine and not path.startswith(f"{layer}/")]
    if sharing:
        raise ValueError(
            f"zap: {layer!r} holds the very arrays of {', '.join(sharing)}, and a reset would part them. Usual cause: a layer "
            "shared by reference; keep shared weights under one name."
        )
    return own


def _units(layer: Any) -> int:
    """How many units a layer has: the last axis of its kernels."""
    found = [kernel.shape[-1] for kernel in kernels(layer)]
    if not found or len(set(found)) > 1:
        raise ValueError(f"zap: the layer must have a kernel, or kernels of as many units each, got {len(found)}: {found}.")
    return found[0]


def kernels(layer: Any) -> list[jax.Array]:
    """The arrays of a layer that are called "kernel"."""
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(layer) if is_named(path, "kernel")]


def is_named(path: tuple, name: str) -> bool:
    """Whether a path into a tree ends at an entry of that name."""
    return bool(path) and getattr(path[-1], "key", None) == name


def _marked(chosen: Any, units: int) -> jax.Array:
    """bool `[units]`."""
    if chosen is None:
        return jnp.ones(units, bool)
    chosen = jnp.asarray(chosen)
    if chosen.dtype == bool:
        return chosen
    if not jnp.issubdtype(chosen.dtype, jnp.integer):
        raise ValueError(f"zap: classes must be integers or bools, got {chosen.dtype}. Usual cause: the targets of a regression.")
    return (chosen.reshape(-1, 1) == jnp.arange(units)).any(0)


def _columns(chosen: Any, units: int) -> jax.Array:
    """Units for which weights are drawn: those named where they are few, since to draw a whole head takes long; or all."""
    named = chosen is not None and jnp.asarray(chosen).dtype != bool and jnp.size(chosen) < units
    return jnp.ravel(jnp.asarray(chosen)) if named else jnp.arange(units)


def _lot(key: jax.Array, units: int, fraction: float) -> jax.Array:
    """That fraction of the units, one at least, as bools `[units]`."""
    return jax.random.permutation(key, units) < max(1, round(fraction * units))
