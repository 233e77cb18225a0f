"""MAML++: MAML with a loss after every step, rates and normalisations of every step's own, and first-order gradients at first.

References:
  Antoniou, Edwards, Storkey, How to train your MAML, ICLR 2019 (https://arxiv.org/abs/1810.09502), section 4.

Differs from the paper in: normalisation takes the statistics of the batch at hand alone, as the released code does in effect.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jmeta.core import Data, MetaLearner, Model, Rule, chain, memoise
from jmeta.learners.combine import switch
from jmeta.learners.maml import maml
from jmeta.rules.scale import learned_rates

LEAST = 0.03  # of a step's weight, divided by the number of steps


@dataclasses.dataclass(frozen=True)
class StepWeights:
    """The weights of the query losses after each step, called with the meta-step; see `step_weights`."""

    steps: int
    epochs: int
    epoch: int

    def __call__(self, meta_step: Any) -> jax.Array:
        """`[steps]`, whose sum is 1."""
        done = jnp.asarray(meta_step) // self.epoch
        early = jnp.maximum(1 / self.steps - done / (self.steps * self.epochs), LEAST / self.steps)
        last = jnp.zeros(self.steps).at[-1].set(1.0)
        return jnp.where(done < self.epochs, jnp.full(self.steps, early).at[-1].set(1 - (self.steps - 1) * early), last)


def step_weights(steps: int, *, epochs: int = 10, epoch: int = 500) -> StepWeights:
    """MAML++'s schedule of the multi-step loss: even weights, which move to the last step, and after some epochs that alone.

    Args:
      steps: inner steps.
      epochs: until the last step alone counts; the paper has 10 for Omniglot and 15 for mini-ImageNet.
      epoch: meta-steps of an epoch.

    Raises:
      ValueError: a number is below 1.

    >>> weights = step_weights(5, epochs=10)
    >>> for step in (0, 2500, 5000):
    ...     print(" ".join(f"{weight:.1f}" for weight in weights(step)))
    0.2 0.2 0.2 0.2 0.2
    0.1 0.1 0.1 0.1 0.6
    0.0 0.0 0.0 0.0 1.0
    """
    if min(steps, epochs, epoch) < 1:
        raise ValueError(f"step_weights: steps, epochs and epoch must be at least 1, got {steps}, {epochs} and {epoch}.")
    return StepWeights(steps, epochs, epoch)


@memoise
def step_norms(steps: int) -> Rule:
    """Gives each inner step scales and biases of its own for every normalisation; they are meta-learned and not adapted.

    What is predicted after a step uses that step's, as in the released code, and before the first step the first's. Rules that rank
    the parameters' own scales, such as `jmeta.route`, have nothing to choose by beside it: these stay as they start.

    Args:
      steps: inner steps that have some; later ones use the last's.

    Returns:
      A rule whose hyper is `{path: [steps, C]}` of each of them. The parameters' own are not used.

    Raises:
      ValueError: steps is below 1; or, when the rule first meets the parameters, no normalisation has a scale.
    """
    if steps < 1:
        raise ValueError(f"step_norms: steps must be at least 1, got {steps}.")

    def init(params):
        found = {_name(path): jnp.stack([leaf] * steps) for path, leaf in _norms(params)}
        if not found:
            raise ValueError(f"step_norms: no normalisation of {', '.join(params)} has a scale. Usual cause: norm='none'.")
        return found

    def gate(params, *, step, hyper, key):
        row = step if key is not None else jnp.maximum(step - 1, 0)  # a prediction follows its step
        now = {name: leaf[jnp.minimum(row, steps - 1)] for name, leaf in hyper.items()}
        return jax.tree_util.tree_map_with_path(lambda path, leaf: now.get(_name(path), leaf), params)

    return Rule("step_norms", init, gate=gate)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _norms(params: Any) -> list[tuple[tuple, jax.Array]]:
    """The scales of a network, and what else stands beside each."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    scaled = {path[:-1] for path, _ in leaves if getattr(path[-1], "key", None) == "scale"}
    return [(path, leaf) for path, leaf in leaves if path[:-1] in scaled]


@memoise
def maml_plus_plus(
    model: Model,
    loss: Callable[..., jax.Array],
    data: Data,
    *,
    rate: float = 0.1,
    weights: Callable[[Any], jax.Array] | None = None,
    first_order: int = 0,
    own_norms: bool = True,
    **options: Any,
) -> MetaLearner:
    """MAML++ on one network. The paper's outer optimiser is Adam, its rate falling along a cosine.

    Args:
      model: the network.
      loss: `(outputs, y) -> scalar`.
      data: what the inner loop sees.
      rate: what the learned rates, one for each tensor and step, start from.
      weights: of the losses after each step; `step_weights(data.steps)` if None.
      first_order: meta-steps at first whose gradient is that of first order; the paper has 50 epochs of 500.
      own_norms: whether each step has scales and biases of its own.
      **options: of `jmeta.maml`.

    Returns:
      A meta-learner.
    """
    rule = learned_rates(rate, per="tensor", steps=max(data.steps, 1))
    rule = chain(step_norms(max(data.steps, 1)), rule) if own_norms else chain(rule)
    weights = step_weights(max(data.steps, 1)) if weights is None else weights
    made = [maml(model, loss, rule, data, order=order, step_weights=weights, **options) for order in (1, 2)]
    return switch(*made, at=(first_order,)) if first_order else made[1]
