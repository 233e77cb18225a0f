"""Resets between the steps of an outer optimiser, and an Adam that can be reset weight by weight.

References:
  Frati, Traft, Clune, Cheney, Reset It and Forget It, ECAI 2024 (https://arxiv.org/abs/2310.07996): zaps between epochs.
  Kingma, Ba, Adam: A Method for Stochastic Optimization, ICLR 2015 (https://arxiv.org/abs/1412.6980), algorithm 1.
  Dohare et al., Loss of Plasticity in Deep Continual Learning, Nature 632, 2024 (https://doi.org/10.1038/s41586-024-07711-7): a
  count of steps for each weight.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jmeta.core import Rule, Theta, chain, cleared


class Resetting(NamedTuple):
    """State of `resetting`: what it draws from, steps taken, and the state of the optimiser inside."""

    key: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    inner: Any


def resetting(
    outer: optax.GradientTransformation,
    reset: Rule,
    every: int,
    slots: Literal["keep", "zero"] = "keep",
    *,
    until: int | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """An optimiser after whose every `every`-th step a rule resets the parameters.

    Args:
      outer: any optax optimiser.
      reset: a rule with a reset, such as `jmeta.zap("head", which="all")`; as its support set it gets the batch of the step, where
        the learner hands one on in `info`, as `jmeta.supervised` does.
      every: steps between two resets; for zaps between epochs, the steps of an epoch times the epochs, with `until`.
      slots: whether what the optimiser remembers of the parameters that a reset changes stays or becomes 0. What is counted for all
        parameters together, as Adam's step, stays; `adam_each` counts for each.
      until: the step at which training ends, after which nothing is reset; None resets then as well.
      seed: of the resets; a run of another key has the same ones with the same seed.

    Returns:
      An optax transformation for parameters or for a `Theta`, whose `params` it resets. Its state holds its key.

    Raises:
      ValueError: an argument is out of range; or slots is "keep" for a reset that was made with slots="zero".

    >>> from jmeta.rules.zap import shrink_perturb
    >>> outer = resetting(optax.sgd(0.1), shrink_perturb(0.5, 0.0), every=2)
    >>> params, state = jnp.ones(1), outer.init(jnp.ones(1))
    >>> for _ in range(2):
    ...     updates, state = outer.update(jnp.zeros(1), state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params.tolist()
    [0.5]
    """
    if every < 1 or (until is not None and until < 0):
        raise ValueError(f"resetting: every must be at least 1 and until at least 0, got {every} and {until}.")
    if slots not in ("keep", "zero"):
        raise ValueError(f"resetting: slots must be 'keep' or 'zero', got {slots!r}.")
    inner, rule = optax.with_extra_args_support(outer), chain(reset)
    if rule.clears and slots == "keep":
        raise ValueError("resetting: the rule asks for slots='zero'; give it to resetting, whose optimiser it is about.")

    def init(params):
        rule.init(params.params if isinstance(params, Theta) else params)
        return Resetting(jax.random.key(seed), jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any):
        if params is None:
            raise ValueError("resetting: update needs params, as in outer.update(gradient, state, params).")
        updates, after = inner.update(updates, state.inner, params, **extra)
        count = state.count + 1
        due = (count % every == 0) & (True if until is None else count < until)

        def anew(_):
            moved = optax.apply_updates(params, updates)
            changed = _reset(rule, jax.random.fold_in(state.key, count), moved, extra)
            slots_after = cleared(inner, after, moved, changed) if slots == "zero" else after
            return towards(updates, params, moved, changed), slots_after

        updates, after = jax.lax.cond(due, anew, lambda _: (updates, after), None)
        return updates, Resetting(state.key, count, after)

    return optax.GradientTransformationExtraArgs(init, update)


def _reset(rule: Rule, key: jax.Array, params: Any, extra: dict) -> Any:
    batch = (extra.get("info") or {}).get("batch")
    if isinstance(params, Theta):
        return params._replace(params=rule.reset(key, params.params, batch, hyper=params.hyper))
    return rule.reset(key, params, batch, hyper={})


def towards(updates: Any, params: Any, moved: Any, wanted: Any) -> Any:
    """The updates that lead to what a reset made; the optimiser's own, bit for bit, where it changed nothing.

    Args:
      updates: the optimiser's.
      params: what they are added to.
      moved: their sum.
      wanted: what the reset made of it.
    """

    def one(update, old, new, best):
        return jnp.where(best == new, update, best - old)

    return jax.tree.map(one, updates, params, moved, wanted)


class AdamEach(NamedTuple):
    """State of `adam_each`: for each weight its count of steps and its two moments."""

    counts: Any
    mu: Any
    nu: Any


def adam_each(
    rate: optax.ScalarOrSchedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Adam that counts steps for each weight, so that a weight whose slots become 0 begins as if it were new.

    Where nothing is reset it takes the steps of `optax.adam`.

    Args:
      rate: step size, or a schedule of it.
      b1: decay of the first moment.
      b2: decay of the second.
      eps: added to the root of the second.
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AdamEach(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.int32), params), zeros, zeros)

    def update(updates, state, params=None):
        counts = jax.tree.map(lambda count: count + 1, state.counts)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(updates, state.nu, b2, 2)

        def direction(count, m, v):
            return (m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps)).astype(m.dtype)

        return jax.tree.map(direction, counts, mu, nu), AdamEach(counts, mu, nu)

    return optax.with_extra_args_support(
        optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(rate))
    )
