"""Losses and metrics: functions of outputs and targets, with an optional mask for padded examples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer


def masked_mean(values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean of `values[N, ...]` over the examples whose `mask[N]` is not 0, or over all of them without a mask."""
    if mask is None:
        return values.mean()
    weight = jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim)), values.shape)
    return (values * weight).sum() / jnp.maximum(weight.sum(), 1)


def xent(outputs: jax.Array, y: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean cross-entropy of logits `[N, classes]` against integer labels `[N]`, in nats.

    The MAML paper's code sums over the ways * shots examples and divides by the shots, which is `ways` times this mean: its
    inner rates of 0.4, 0.1 and 0.01 correspond to 2.0, 2.0 and 0.05 here.

    Raises:
      ValueError: the targets are no class labels; or, outside of compiled functions, a label has no output.

    >>> print(f"{xent(jnp.zeros((3, 2)), jnp.array([0, 1, 1])):.4f}")
    0.6931
    """
    _check_labels("xent", outputs, y, mask)
    return masked_mean(optax.softmax_cross_entropy_with_integer_labels(outputs, y), mask)


def mse(outputs: jax.Array, y: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean squared error of outputs `[N, ...]` against targets of the same shape.

    Raises:
      ValueError: the shapes differ, which broadcasting would hide.
    """
    if outputs.shape != y.shape:
        raise ValueError(
            f"mse: outputs have shape {outputs.shape}, targets {y.shape}; they must be equal. Usual cause: targets [N] for "
            "outputs [N, 1]."
        )
    return masked_mean((outputs - y) ** 2, mask)


def accuracy(outputs: jax.Array, y: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Share of examples whose largest logit `[N, classes]` is at the integer label `[N]`, from 0 to 1.

    Raises:
      ValueError: as for `xent`.
    """
    _check_labels("accuracy", outputs, y, mask)
    return masked_mean((outputs.argmax(-1) == y).astype(jnp.float32), mask)


def _check_labels(name: str, outputs: jax.Array, y: jax.Array, mask: jax.Array | None) -> None:
    """Refuses targets that are no labels of these outputs.

    Values are known outside of compiled functions alone, and those of padding may be any.
    """
    if not jnp.issubdtype(y.dtype, jnp.integer) or y.shape != outputs.shape[:-1]:
        raise ValueError(
            f"{name}: y must be integer labels of shape {outputs.shape[:-1]}, got {y.dtype} {y.shape}. Usual causes: one-hot or "
            "float labels, labels of other examples, or regression tasks; take jm.mse as their loss, and "
            "metric=jm.mse in fewshot and Validation."
        )
    if isinstance(y, Tracer) or mask is not None or not y.size:
        return
    least, most, classes = int(np.asarray(y).min()), int(np.asarray(y).max()), outputs.shape[-1]
    if least < 0 or most >= classes:
        raise ValueError(
            f"{name}: labels must be from 0 to {classes - 1}, one for each output, got {least} to {most}. Usual causes: labels "
            "that start at 1, or a network made for fewer ways."
        )


def measure(outputs: Any, y: Any, mask: jax.Array | None = None) -> dict[str, jax.Array]:
    """`{"accuracy": ...}` where the targets are class labels `[N]` for logits `[N, classes]`, else nothing."""
    is_labels = isinstance(y, jax.Array) and jnp.issubdtype(y.dtype, jnp.integer) and y.ndim + 1 == getattr(outputs, "ndim", 0)
    return {"accuracy": accuracy(outputs, y, mask)} if is_labels else {}
