"""Network slimming: scales of normalisations are drawn towards 0, and the channels of the smallest are then cut away.

    gradient of a scale <- gradient + strength * sign(scale)

References:
  Liu, Li, Shen, Huang, Yan, Zhang, Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017
  (https://arxiv.org/abs/1708.06519), section 3, and its code.

Differs from the paper in: of `n` channels exactly `floor(n * fraction)` are cut, where its code cuts the threshold's own channel
too; every layer keeps a channel at least; equal scales are drawn by lot. Its code starts scales at 0.5, takes SGD with momentum and
fine-tunes what is left; here scales start as the network has them, and the optimiser and what follows are the user's.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmeta.core import Params, Theta
from jmeta.rules.route import channels, paired
from jmeta.rules.zap import is_named


def slimming(strength: float) -> optax.GradientTransformation:
    """Adds the gradient of `strength * sum |scale|`; chain it in front of the outer optimiser.

    Args:
      strength: the paper takes 1e-4 to 1e-5 for losses averaged over examples.

    Returns:
      An optax transformation for parameters or for a `Theta`, of which it changes the gradient of the parameters alone.

    Raises:
      ValueError: strength is negative or no finite number.

    >>> outer = optax.chain(slimming(0.01), optax.sgd(1.0))
    >>> params = {"norm": {"scale": jnp.array([2.0, -3.0]), "bias": jnp.ones(2)}}
    >>> updates, _ = outer.update(jax.tree.map(jnp.zeros_like, params), outer.init(params), params)
    >>> print(updates["norm"])
    {'bias': Array([-0., -0.], dtype=float32), 'scale': Array([-0.01,  0.01], dtype=float32)}
    """
    if not 0 <= strength < math.inf:
        raise ValueError(f"slimming: strength must be a finite number of at least 0, got {strength}.")

    def drawn(path, g, p):
        return g + strength * jnp.sign(p) if is_named(path, "scale") else g

    def update(updates: Any, params: Any = None):
        if params is None:
            raise ValueError("slimming: update needs params, as in outer.update(gradient, state, params).")
        if isinstance(params, Theta):
            return updates._replace(params=jax.tree_util.tree_map_with_path(drawn, updates.params, params.params))
        return jax.tree_util.tree_map_with_path(drawn, updates, params)

    return optax.stateless(update)


class Pruned(NamedTuple):
    """What is left of a network.

    Attributes:
      theta: the smaller one, for `jmeta.conv4(ways, filters=filters)`.
      filters: channels of each of its layers but the head.
      masked: theta at its old size, with the scales and biases of the channels that were cut at 0. It gives the same outputs, but
        not where the normalisation takes its statistics over several channels (norm "group" or "layer").
      kept: `{layer: bool[C]}` of them.
    """

    theta: Theta
    filters: tuple[int, ...]
    masked: Theta
    kept: dict[str, np.ndarray]


def prune(theta: Theta, fraction: float, *, layers: tuple[str, ...] | None = None) -> Pruned:
    """Cuts the channels of the smallest scales out of a network, such as conv4, of one layer after another.

    All channels compete with each other. Meta-parameters that mirror the parameters, as Meta-SGD's rates, are cut alike.

    Args:
      theta: what was meta-learned.
      fraction: share of all channels that is cut; each layer keeps one at least.
      layers: the network's in forward order, `model.layers`; in the order of their names if None (`block2` before `block10`).

    Returns:
      A `Pruned`.

    Raises:
      ValueError: fraction is outside [0, 1); the layers do not follow each other with a kernel and a normalisation each and a head
        at last, or are other ones; theta carries the state of an inner optimiser, or meta-parameters of channels that cannot be
        cut, as MAML++'s norms of each step.

    >>> from jmeta.models.backbones import conv4
    >>> small = prune(Theta(conv4(5).init(jax.random.key(0))), 0.5)
    >>> sum(small.filters)
    128
    >>> conv4(5, filters=small.filters).apply(small.theta.params, jnp.zeros((1, 28, 28, 1))).shape
    (1, 5)
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"prune: fraction must be from 0 to below 1, got {fraction}.")
    if jax.tree.leaves(theta.memory):
        raise ValueError("prune: theta carries the state of an inner optimiser; prune one without (theta._replace(memory=())).")
    sequence = _in_sequence(theta.params, layers)
    total = sum(theta.params[name][norm]["scale"].size for name, norm in sequence[:-1])
    chosen = channels(theta.params, 1 - math.floor(round(total * fraction, 9)) / total, per="global")
    kept = {name: np.asarray(chosen[f"{name}/{norm}"]) for name, norm in sequence[:-1]}
    masked = {**theta.params}
    for name, norm in sequence[:-1]:
        masked[name] = {
            **masked[name],
            norm: jax.tree.map(lambda leaf, here=kept[name]: jnp.where(here, leaf, 0), masked[name][norm]),
        }
    small = Theta(_cut(theta.params, sequence, kept), _cut_hyper(theta.hyper, theta.params, sequence, kept))
    return Pruned(small, tuple(int(own.sum()) for own in kept.values()), theta._replace(params=masked), kept)


def _in_sequence(params: Params, order: tuple[str, ...] | None) -> list[tuple[str, str]]:
    """Name and normalisation of each layer, in forward order; the last, the head, has none."""
    if order is not None and sorted(order) != sorted(params):
        raise ValueError(f"prune: layers must be those of the parameters, {', '.join(params)}; got {', '.join(order)}.")
    pairs = {norm: found[0] for norm, found in paired(params).items() if len(norm) == 2 and len(found) == 1}
    layers = [norm for norm, filters in pairs.items() if set(params[norm[0]]) == {norm[1], filters[1]}]
    layers = sorted(layers, key=lambda each: order.index(each[0])) if order else layers
    heads = [name for name in params if name not in dict(layers)]
    kernels = [params[name][pairs[name, norm][1]]["kernel"] for name, norm in layers]
    kernels += [params[name]["kernel"] for name in heads if "kernel" in params[name]]
    follow = all(after.shape[-2] % before.shape[-1] == 0 for before, after in itertools.pairwise(kernels))
    if not layers or len(heads) != 1 or len(kernels) != len(params) or not follow:
        raise ValueError(
            "prune: the layers must follow each other, each with one kernel and one normalisation that has a scale, and a head at "
            f"last; got {', '.join(params)}. Usual cause: a residual network, or one without normalisation."
        )
    return [*layers, (heads[0], "")]


def _cut(params: Params, layers: list[tuple[str, str]], kept: dict[str, np.ndarray]) -> Params:
    """The parameters, or a tree like them, without the channels that are not kept."""
    small, before = {}, None
    for name, _ in layers:
        here = kept.get(name)

        def one(path, leaf, before=before, here=here):
            leaf = leaf if before is None or not is_named(path, "kernel") else _from(leaf, before)
            return leaf if here is None else leaf[..., here]

        small[name] = jax.tree_util.tree_map_with_path(one, params[name])
        before = here
    return small


def _from(kernel: jax.Array, kept: np.ndarray) -> jax.Array:
    """A kernel of the channels that are kept; a flattened map has its channels last."""
    by_channel = kernel.reshape(*kernel.shape[:-2], -1, len(kept), kernel.shape[-1])[..., kept, :]
    return by_channel.reshape(*kernel.shape[:-2], -1, kernel.shape[-1])


def _cut_hyper(hyper: Any, params: Params, layers: list[tuple[str, str]], kept: dict[str, np.ndarray]) -> Any:
    """A rule's meta-parameters, of which trees of the parameters' shapes, also with axes before them, are cut."""
    if jax.tree.structure(hyper) == jax.tree.structure(params):
        mirrors = jax.tree.map(
            lambda own, p: jnp.ndim(own) >= p.ndim and own.shape[jnp.ndim(own) - p.ndim :] == p.shape, hyper, params
        )
        return _cut(hyper, layers, kept) if all(jax.tree.leaves(mirrors)) else hyper
    if isinstance(hyper, dict):
        return {name: _cut_hyper(own, params, layers, kept) for name, own in hyper.items()}
    if getattr(hyper, "ndim", 0) > 1 and hyper.shape[-1] in {len(own) for own in kept.values()}:
        raise ValueError(
            f"prune: theta has meta-parameters of shape {hyper.shape}, which seem to be of channels that are cut and cannot "
            "be cut alike. Usual cause: MAML++'s norms of each step (jmeta.step_norms), beside which the network's own scales say "
            "nothing."
        )
    return hyper
