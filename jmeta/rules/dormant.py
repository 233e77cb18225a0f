"""Resets of units that do little: dormant ones every so often (ReDo), the least useful ones at every step (continual backprop).

    ReDo                 s_i = E|h_i| / mean over k of E|h_k|;  units of s_i <= tau are renewed
    continual backprop   u_i <- decay * u_i + (1 - decay) * mean|h_i| * mean over k of |w_out_ki|;  of the units older than
                         `maturity`, a share of `replacement` is renewed at each step, those of lowest u_i first

A renewed unit has the weights that come in as a new network has them, and weights going out of 0.

References:
  Sokar, Agarwal, Castro, Evci, The Dormant Neuron Phenomenon in Deep Reinforcement Learning, ICML 2023
  (https://arxiv.org/abs/2302.12902), definition 3.1 and algorithm 1.
  Dohare et al., Loss of Plasticity in Deep Continual Learning, Nature 632, 2024 (https://doi.org/10.1038/s41586-024-07711-7).

Differs from the papers in: weights that come in are drawn as the model's own initialisation draws them. Continual backprop takes
the contribution utility, as the released code does for CIFAR, and adds nothing to the next layer's bias, which the released code
means to do but does not. Under slots="zero" all that a reset changed is forgotten, biases as well, where ReDo's code forgets what
Adam holds of kernels; a weight that was 0 and stays 0 is not changed.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jmeta.core import Model, Params, Rule, Theta, cleared, memoise
from jmeta.rules.resetting import towards
from jmeta.rules.zap import is_named, kernels, reset_where


def activity(model: Model, params: Params, x: jax.Array) -> dict[str, jax.Array]:
    """What every unit of the hidden layers puts out.

    Args:
      model: a network of named layers that tells what comes into each, one after the other.
      params: its parameters.
      x: inputs `[N, ...]`.

    Returns:
      `{layer: [M, units]}` without the last layer; M is N, or N times the places of a map.

    Raises:
      ValueError: the model has no names for its layers, does not tell what comes into them, or they do not follow each other.
    """
    if model.inputs is None or len(model.layers) < 2:
        raise ValueError(
            "activity: the model does not tell what comes into its layers. Usual cause: a hand-made Model or one of from_nnx; give "
            "it layers=(...) in forward order and inputs=, or use from_linen."
        )
    for name, after in itertools.pairwise(model.layers):
        if _kernel(params[after]).shape[-2] % _units(params[name]):
            raise ValueError(
                f"activity: {after} does not read what {name} puts out, {_units(params[name])} units, but layers must follow each "
                "other. Usual cause: a network of two branches, such as anml_net."
            )
    seen = model.inputs(params, x)
    return {name: seen[after].reshape(-1, _units(params[name])) for name, after in itertools.pairwise(model.layers)}


def renew(model: Model, key: jax.Array, params: Params, chosen: dict[str, jax.Array]) -> Params:
    """Gives units the weights of a new network, and makes what goes out of them 0.

    Args:
      model: the network.
      key: of the new weights.
      params: its parameters.
      chosen: `{layer: bool[units]}`.
    """
    fresh, params = model.init(key), dict(params)
    for name, here in chosen.items():
        params[name] = reset_where(params[name], jax.tree.map(lambda _, here=here: here, params[name]), fresh[name])
    for name, after in itertools.pairwise(model.layers):
        params[after] = _without(params[after], chosen[name])
    return params


def _without(layer: Any, gone: jax.Array) -> Any:
    """A layer whose weights from units that are gone are 0."""

    def one(path, leaf):
        if not is_named(path, "kernel"):
            return leaf
        by_unit = leaf.reshape(-1, len(gone), leaf.shape[-1])  # a flattened map has its channels last
        return jnp.where(gone[None, :, None], 0, by_unit).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(one, layer)


def _units(layer: Any) -> int:
    return _kernel(layer).shape[-1]


def _kernel(layer: Any) -> jax.Array:
    found = kernels(layer)
    if len(found) != 1:
        raise ValueError(
            f"activity: each layer must have one kernel, got a layer with {len(found)} (a residual block has several)."
        )
    return found[0]


@memoise
def redo(model: Model, tau: float = 0.0) -> Rule:
    """Renews dormant units of the hidden layers, judged by the support set, or by the step's batch under `jmeta.resetting`.

    Args:
      model: the network.
      tau: units whose mean activity is at most this share of their layer's are dormant; 0, as in the released code, takes those
        that are silent.

    Raises:
      ValueError: tau is negative; there is nothing to judge by; see `activity`.
    """
    if tau < 0:
        raise ValueError(f"redo: tau must be at least 0, got {tau}.")

    def reset(key, params, support, *, hyper):
        if support is None:
            raise ValueError("redo: there is no batch to judge units by. Usual cause: a learner that hands none on in its info.")
        return renew(model, key, params, dormant(activity(model, params, support.x), tau, support.mask))

    return Rule("redo", reset=reset)


def dormant(outputs: dict[str, jax.Array], tau: float, mask: jax.Array | None = None) -> dict[str, jax.Array]:
    """Which units of each layer are dormant: bool `[units]` from outputs `[M, units]` and a mask of examples as for `_size`."""

    def silent(h):
        mean = _size(h, mask)
        return mean <= tau * mean.mean()

    return {name: silent(h) for name, h in outputs.items()}


def _size(h: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The mean size `[units]` of outputs `[M, units]`, without those of examples whose mask `[N]` is 0; M is a multiple of N."""
    if mask is None:
        return jnp.abs(h).mean(0)
    weights = jnp.repeat(mask, len(h) // len(mask))
    return weights @ jnp.abs(h) / weights.sum()


class ContinualBackprop(NamedTuple):
    """State of `continual_backprop`: its key, the inner optimiser's state, and for each layer its units' ages and utilities and how
    much of a unit is due to be renewed."""

    key: jax.Array
    inner: Any
    ages: dict[str, jax.Array]
    utilities: dict[str, jax.Array]
    due: dict[str, jax.Array]


def continual_backprop(
    inner: optax.GradientTransformation,
    model: Model,
    *,
    replacement: float = 1e-4,
    maturity: int = 100,
    decay: float = 0.99,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """An optimiser that renews the least useful units at every step.

    Args:
      inner: the optimiser, best one that counts steps for each weight, `jmeta.adam_each(1e-3)`: what it remembers of the weights of
        renewed units becomes 0.
      model: the network.
      replacement: share of the mature units that is renewed at each step.
      maturity: steps before a unit can be renewed.
      decay: of the running mean of utilities.
      seed: of the new weights; a run of another key draws the same ones with the same seed.

    Returns:
      An optax transformation for parameters or for a `Theta`. Its update takes `info={"batch": batch}`, as the learner
      `jmeta.supervised` hands it on.

    Raises:
      ValueError: an argument is out of range; see `activity`.
    """
    if not 0 <= replacement <= 1 or maturity < 0 or not 0 <= decay < 1:
        raise ValueError(
            f"continual_backprop: replacement must be from 0 to 1, maturity at least 0 and decay in [0, 1), got {replacement}, "
            f"{maturity} and {decay}."
        )
    inner = optax.with_extra_args_support(inner)

    def init(params):
        own = _own(params)
        sizes = {name: _units(own[name]) for name in model.layers[:-1]}
        ages = {name: jnp.zeros(size, jnp.int32) for name, size in sizes.items()}
        utilities = {name: jnp.zeros(size) for name, size in sizes.items()}
        return ContinualBackprop(jax.random.key(seed), inner.init(params), ages, utilities, {name: jnp.zeros(()) for name in sizes})

    def update(updates: Any, state: Any, params: Any = None, **extra: Any):
        batch = (extra.get("info") or {}).get("batch")
        if params is None or batch is None:
            raise ValueError("continual_backprop: update needs params and info={'batch': ...}, which jmeta.supervised hands on.")
        key, key_new = jax.random.split(state.key)
        updates, after = inner.update(updates, state.inner, params, **extra)
        moved = optax.apply_updates(params, updates)
        outputs = activity(model, _own(params), batch.x)
        sizes = {name: _size(h, batch.mask) for name, h in outputs.items()}
        chosen, ages, utilities, due = _judged(model, _own(moved), sizes, state, replacement, maturity, decay)
        changed = renew(model, key_new, _own(moved), chosen)
        wanted: Any = moved._replace(params=changed) if isinstance(moved, Theta) else changed
        after = cleared(inner, after, moved, wanted)
        return towards(updates, params, moved, wanted), ContinualBackprop(key, after, ages, utilities, due)

    return optax.GradientTransformationExtraArgs(init, update)


def _own(params: Any) -> Any:
    return params.params if isinstance(params, Theta) else params


def _judged(model: Model, params: Params, sizes: dict, state: ContinualBackprop, replacement, maturity, decay) -> tuple:
    """Which units are renewed, and the ages, utilities and remainders after that."""
    chosen, ages, utilities, due = {}, {}, {}, {}
    for name, after in itertools.pairwise(model.layers):
        size, age = sizes[name], state.ages[name] + 1
        outgoing = jnp.abs(_kernel(params[after])).reshape(-1, len(size), _units(params[after])).mean((0, 2))
        utility = decay * state.utilities[name] + (1 - decay) * size * outgoing
        mature = age > maturity
        waiting = state.due[name] + replacement * mature.sum()
        count = jnp.floor(waiting)
        order = jnp.argsort(jnp.where(mature, utility / (1 - decay**age), jnp.inf))
        gone = mature & (jnp.argsort(order) < count)
        chosen[name], due[name] = gone, waiting - gone.sum()
        ages[name], utilities[name] = jnp.where(gone, 0, age), jnp.where(gone, 0, utility)
    return chosen, ages, utilities, due
