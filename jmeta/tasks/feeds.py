"""What the inner loop sees at each step of a task: all of the support set, minibatches of it, or one example after another."""

import jax
import jax.numpy as jnp

from jmeta.core import Batch, Data, memoise


def _check_steps(name: str, steps: int) -> None:
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"{name}: steps must be an int of at least 0, got {steps!r}.")


@memoise
def repeat(steps: int) -> Data:
    """The whole support set at each of `steps` steps.

    >>> repeat(5).steps
    5
    """
    _check_steps("repeat", steps)
    return Data(steps, lambda key, source, step, act: source)


@memoise
def minibatches(steps: int, size: int) -> Data:
    """`size` examples of the support set at each step, drawn without replacement within a step.

    Args:
      steps: number of inner steps.
      size: examples a step; a support set of fewer is an error when the program is traced.
    """
    _check_steps("minibatches", steps)
    if size < 1:
        raise ValueError(f"minibatches: size must be at least 1, got {size}.")

    def at(key, source: Batch, step, act):
        examples = source.y.shape[0]
        if examples < size:
            raise ValueError(
                f"minibatches: size is {size}, but the support set has {examples} examples. Usual cause: fewer ways * shots "
                "than the size."
            )
        chosen = jax.random.permutation(key, examples)[:size]
        return jax.tree.map(lambda leaf: leaf[chosen], source)

    return Data(steps, at)


@memoise
def one_by_one(steps: int) -> Data:
    """One example of the support set at each step, in order.

    Args:
      steps: number of inner steps; a support set of fewer examples is an error when the program is traced.
    """
    _check_steps("one_by_one", steps)

    def at(key, source: Batch, step, act):
        examples = jax.tree.leaves(source)[0].shape[0]
        if examples < steps:
            raise ValueError(f"one_by_one: {steps} steps need as many examples, but the support set has {examples}.")
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, jnp.asarray(step), 1), source)

    return Data(steps, at)


@memoise
def epochs(size: int, *, seed: int = 0) -> Data:
    """`size` examples at each meta-step, every example once an epoch, in an order drawn anew for each.

    The last batch of an epoch is filled up with examples whose mask is 0. It is for `jmeta.supervised`, whose steps are meta-steps.

    Args:
      size: examples of a batch.
      seed: of the orders; a run of another key has the same ones with the same seed.

    Raises:
      ValueError: size is below 1.
    """
    if size < 1:
        raise ValueError(f"epochs: size must be at least 1, got {size}.")

    def at(key, source: Batch, step, act):
        examples = source.y.shape[0]
        epoch, number = jnp.divmod(step, epoch_steps(examples, size))
        order = jax.random.permutation(jax.random.fold_in(jax.random.key(seed), epoch), examples)
        chosen, mask = of_epoch(order, number, size)
        return Batch(source.x[chosen], source.y[chosen], mask)

    return Data(1, at)


def of_epoch(order: jax.Array, number: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The examples of an epoch's batch: their places, and a mask that is 0 where the last batch is filled up.

    Args:
      order: of the epoch's examples.
      number: of the batch.
      size: of a batch.
    """
    places = number * size + jnp.arange(size)
    return order[jnp.minimum(places, len(order) - 1)], (places < len(order)).astype(jnp.float32)


def epoch_steps(examples: int, size: int) -> int:
    """Batches of an epoch, the last of which may not be full.

    >>> epoch_steps(14_460, 256)
    57
    """
    return -(-examples // size)
