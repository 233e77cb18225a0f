"""Rules that adapt a supernet's architecture to a task: the mixture of its operations, annealed and softly pruned.

    weights = softmax(alpha / T(step)), and 0 where they are not above a threshold

With `jmeta.reptile` they make MetaNAS, with `jmeta.maml` at order 1 and plain steps on both at once T-NAS. Alphas and weights take
turns by a pattern over the two:
`jm.lambda_mask([[1, 0], [0, 1]] * 5, optimizer, labels=("alpha", "w"))`.

References:
  Elsken, Staffler, Metzen, Hutter, Meta-Learning of Neural Architectures for Few-Shot Learning, CVPR 2020
  (https://arxiv.org/abs/1911.11090): MetaNAS.
  Lian et al., Towards Fast Adaptation of Neural Architectures with Meta Learning, ICLR 2020: T-NAS, equations 5 and 6.
  Liu, Simonyan, Yang, DARTS: Differentiable Architecture Search, ICLR 2019 (https://arxiv.org/abs/1806.09055): first order.

Differs from MetaNAS' released scripts in: the gradient of the alphas is taken at the present weights and alphas; theirs came from a
copy of the network that no step changed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jmeta.architecture import check_alpha, check_temperature, check_threshold, mixture
from jmeta.core import Rule, memoise


@dataclasses.dataclass(frozen=True)
class Anneal:
    """A temperature that falls along a line within each task; called with the inner step."""

    start: float
    end: float
    steps: int
    every: int

    def __call__(self, step: Any) -> jax.Array:
        """The temperature at an inner step, which may be traced."""
        number = jnp.asarray(step) // self.every
        done = jnp.where(number < self.steps, number / max(self.steps - 1, 1), 1.0)
        return self.start - done * (self.start - self.end)


def anneal(start: float, end: float, steps: int, *, every: int = 1) -> Anneal:
    """`T(s) = start - s (start - end) / (steps - 1)`, and `end` from then on. It begins anew with each task.

    Args:
      start: the temperature of the first step.
      end: that of the last.
      steps: how many temperatures there are.
      every: inner steps of one temperature; 2 where alphas and weights take turns.

    Raises:
      ValueError: a temperature is not above 0, or steps or every below 1.

    >>> [round(float(anneal(1.0, 0.1, 5)(step)), 3) for step in range(6)]
    [1.0, 0.775, 0.55, 0.325, 0.1, 0.1]
    """
    if not (start > 0 and end > 0):
        raise ValueError(f"anneal: temperatures must be above 0, got {start} and {end}.")
    if steps < 1 or every < 1:
        raise ValueError(f"anneal: steps and every must be at least 1, got {steps} and {every}.")
    return Anneal(start, end, steps, every)


@memoise
def mix(temperature: float | Callable[[Any], Any] = 1.0, *, threshold: float = 0.0) -> Rule:
    """Weighs a supernet's operations and pairs of inputs by its alphas, in every forward pass.

    Args:
      temperature: a number, or a function of the inner step such as `jmeta.anneal(1.0, 0.1, steps=5, every=2)`, always above 0.
      threshold: weights up to it count as 0 (soft pruning), and the others are left as they are; 0.01 in the paper's training and
        0.05 in its tests. What counts as 0 is computed all the same: `jmeta.promising` and `jmeta.shrink` make programs smaller.

    Returns:
      A rule that gates; chain it with an optimiser.

    Raises:
      ValueError: the temperature is not above 0 or the threshold below 0; or, when the rule first meets the parameters, they are
        not those of a supernet, or the threshold is so high that nothing is left of choices that weigh the same.
    """
    if not callable(temperature):
        check_temperature("mix", temperature)
    if not threshold >= 0:
        raise ValueError(f"mix: threshold must be at least 0, got {threshold}.")

    def gate(params, *, step, hyper, key):
        if "alpha" not in params:
            raise ValueError(
                f"mix: the parameters have no 'alpha', but {', '.join(params)}. Usual cause: a network that is no supernet; "
                "derived ones need no mixture."
            )
        check_alpha("mix", params["alpha"])
        check_threshold("mix", threshold, params["alpha"])
        now = temperature(step) if callable(temperature) else temperature
        return {**params, "mixture": mixture(params["alpha"], now, threshold)}

    return Rule("mix", gate=gate)
