"""Layers that are cheap when every task has weights of its own: convolution as patches times a matrix, normalisation, pooling."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Norm = Literal["batch", "support", "group", "layer", "instance", "none"]
NORMS = ("batch", "support", "group", "layer", "instance", "none")


def task_conv(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
    **_: Any,
) -> jax.Array:
    """A 2-D convolution as patches (strided slices, concatenated) times a matrix.

    `vmap` over the weights of a convolution makes a grouped convolution, which no backend runs well; of this it makes a batched
    matrix product. Flax's layers take it as `conv_general_dilated=task_conv`; the arguments are those of
    `jax.lax.conv_general_dilated`.

    Args:
      lhs: images `[N, H, W, C]`.
      rhs: kernel `[h, w, C, F]`.
      window_strides: two ints.
      padding: "SAME", "VALID" or a pair of ints for each of the two dimensions.

    Returns:
      `[N, H', W', F]`.

    Raises:
      NotImplementedError: dilation or groups are asked for.
    """
    if set(lhs_dilation or (1,)) != {1} or set(rhs_dilation or (1,)) != {1} or feature_group_count != 1:
        raise NotImplementedError("task_conv: dilation and feature groups are not supported; use jax.lax.conv_general_dilated.")
    height, width, channels, features = rhs.shape
    down, across = window_strides
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], (height, width), (down, across), padding)
    x = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))
    rows, columns = (x.shape[1] - height) // down + 1, (x.shape[2] - width) // across + 1
    views = [
        x[:, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * across + 1 : across]
        for i in range(height)
        for j in range(width)
    ]
    patches = jnp.concatenate(views, -1).reshape(-1, height * width * channels)
    if height * width * channels > features:  # features first: then the kernel's gradient is a product that CPUs run fast
        kernel = rhs.transpose(3, 0, 1, 2).reshape(features, -1)
        product = lax.dot_general(patches, kernel, (((1,), (1,)), ((), ())), precision=precision)
    else:
        product = jnp.matmul(patches, rhs.reshape(-1, features), precision=precision)
    return product.reshape(lhs.shape[0], rows, columns, features)


def max_pool(x: jax.Array, size: int = 2) -> jax.Array:
    """Maximum over windows of `size` x `size` that do not overlap; rows and columns left over are dropped (VALID).

    Args:
      x: `[N, H, W, C]`.
      size: side of a window.

    Returns:
      `[N, H // size, W // size, C]`.
    """
    n, height, width, channels = x.shape
    rows, columns = height // size, width // size
    x = x[:, : rows * size, : columns * size]
    return x.reshape(n, rows, size, columns, size, channels).max((2, 4))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _batch_norm(epsilon: float, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Normalises `x[..., C]` by its own statistics over all axes but the last."""
    return _batch_norm_jvp(epsilon, (x, scale, bias), (x, scale, bias))[0]


@_batch_norm.defjvp
def _batch_norm_jvp(epsilon, primals, tangents):
    """The derivative in closed form: of the output's cotangent it takes two sums, which all that its transpose makes share."""
    (x, scale, bias), (dx, dscale, dbias) = primals, tangents
    dtype = x.dtype
    x, dx = (each.astype(jnp.promote_types(dtype, jnp.float32)) for each in (x, dx))
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    inverse = lax.rsqrt(jnp.square(x - mean).mean(axes) + epsilon)
    z, gain = (x - mean) * inverse, scale * inverse
    dy = dx * gain + z * (dscale - gain * (z * dx).mean(axes)) + (dbias - gain * dx.mean(axes))
    return (z * scale + bias).astype(dtype), dy.astype(dtype)


class BatchNorm(nn.Module):
    """Normalisation by the statistics of the batch at hand; keeps no state.

    `y = (x - mean) / sqrt(variance + epsilon) * scale + bias`, over all axes but the last, biased variance. Statistics given in
    the collection "stats" are used instead of the batch's; with "stats" mutable the batch's are written there.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x[..., C]`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        if self.is_mutable_collection("stats") and not self.is_initializing():
            axes, wide = tuple(range(x.ndim - 1)), x.astype(jnp.promote_types(x.dtype, jnp.float32))
            self.put_variable("stats", "mean", wide.mean(axes))
            self.put_variable("stats", "variance", wide.var(axes))
        elif self.has_variable("stats", "mean"):
            mean, variance = self.get_variable("stats", "mean"), self.get_variable("stats", "variance")
            return ((x - mean) * (lax.rsqrt(variance + self.epsilon) * scale) + bias).astype(x.dtype)
        return _batch_norm(self.epsilon, x, scale, bias)


def normalise(norm: Norm, x: jax.Array) -> jax.Array:
    """Applies the normalisation layer of that name, as a submodule called "norm".

    Args:
      norm: "batch" and "support" use a batch's statistics (the batch at hand, or the support set's for queries too), "group" 8
        groups of channels, "layer" all of an example's values, "instance" each channel of an example, "none" nothing.
      x: `[N, ..., C]`.
    """
    axes = tuple(range(1, x.ndim))
    if norm == "group":
        groups = next(count for count in (8, 4, 2, 1) if x.shape[-1] % count == 0 and x.shape[-1] > count)
        return nn.GroupNorm(num_groups=groups, name="norm")(x)
    if norm == "layer":
        return nn.LayerNorm(reduction_axes=axes, name="norm")(x)
    if norm == "instance":
        return nn.InstanceNorm(name="norm")(x)
    return x if norm == "none" else BatchNorm(name="norm")(x)
