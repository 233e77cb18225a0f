"""Layers that are cheap when every task has weights of its own: convolution as patches times a matrix, normalisation, pooling."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax import lax

from jmeta.models.convolution import convolve, patches_of, planes_of, times_kernel

Norm = Literal["batch", "support", "group", "layer", "instance", "none"]
EPSILON = 1e-5  # added to variances, as PyTorch does
_LECUN = nn.initializers.lecun_normal()
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
    """A 2-D convolution as patches (strided slices, concatenated) times a matrix; on a CPU, for stride 1, as `convolve`.

    `vmap` over the weights of a convolution makes a grouped convolution, which no backend runs well; of this it makes a batched
    matrix product. Flax's layers take it as `conv_general_dilated=task_conv`; the arguments are those of
    `jax.lax.conv_general_dilated`.

    Args:
      lhs: images `[N, H, W, C]`.
      rhs: kernel `[h, w, C, F]`.
      window_strides: two ints.
      padding: "SAME", "VALID" or a pair of ints for each of the two dimensions.
      rhs_dilation: distances of the places that the kernel sees, two ints.

    Returns:
      `[N, H', W', F]`.

    Raises:
      NotImplementedError: dilated images or groups are asked for.
    """
    if set(lhs_dilation or (1,)) != {1} or feature_group_count != 1:
        raise NotImplementedError(
            "task_conv: dilated images and feature groups are not supported; use jax.lax.conv_general_dilated."
        )
    size, apart = rhs.shape[:2], tuple(rhs_dilation or (1, 1))
    seen = [(side - 1) * each + 1 for side, each in zip(size, apart, strict=True)]
    pads = lax.padtype_to_pads(lhs.shape[1:3], seen, window_strides, padding) if isinstance(padding, str) else padding
    (top, bottom), (left, right) = pads
    # `convolve` could not tell a checked shard_map over which devices its result varies.
    varying = any(getattr(jax.typeof(each), "vma", ()) for each in (lhs, rhs))
    plain = tuple(window_strides) == (1, 1) and apart == (1, 1) and size != (1, 1)
    if plain and jax.default_backend() == "cpu" and not varying:
        return convolve(lhs, rhs, ((top, bottom), (left, right)))
    return times_kernel(patches_of(lhs, size, window_strides, pads, apart), rhs, precision)


def max_pool(x: jax.Array, size: int = 2) -> jax.Array:
    """Maximum over windows of `size` x `size` that do not overlap; rows and columns left over are dropped (VALID).

    Where a window's largest value stands in several places, the first of them has the gradient, as in PyTorch.

    Args:
      x: `[N, H, W, C]`.
      size: side of a window.

    Returns:
      `[N, H // size, W // size, C]`.
    """
    n, height, width, channels = x.shape
    rows, columns = height // size, width // size
    x = x[:, : rows * size, : columns * size]
    return _largest(x.reshape(n, rows, size, columns, size, channels))


@jax.custom_jvp
def _largest(windows: jax.Array) -> jax.Array:
    """`windows[N, rows, size, columns, size, C]` maximised over both sizes."""
    return functools.reduce(jnp.maximum, _places(windows))


@_largest.defjvp
def _largest_jvp(primals, tangents):
    (windows,), (dwindows,) = primals, tangents
    largest, places = _largest(windows), _places(windows)
    numbers = np.arange(len(places), dtype=np.min_scalar_type(len(places)))
    first = jnp.full(largest.shape, numbers[-1])
    for number, place in reversed(list(zip(numbers, places, strict=True))):
        first = jnp.where(place == largest, number, first)
    chosen = [jnp.where(first == number, dplace, 0) for number, dplace in zip(numbers, _places(dwindows), strict=True)]
    return largest, functools.reduce(jnp.add, chosen)


def _places(windows: jax.Array) -> list[jax.Array]:
    size = windows.shape[2]
    return [windows[:, :, i, :, j] for i in range(size) for j in range(size)]


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


def _folded_batch_norm(epsilon: float, planes: jax.Array, kernel: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """`_batch_norm` of the convolution of `kernel[h, w, C, F]` with images of these planes `[h * w * C, N, H', W']`.

    The normalisation is folded into the kernel: a channel's variance is `k' V k`, where V is the covariance of the planes and k the
    channel's kernel. Where planes are fewer than channels, as in a first layer, V costs little, and no pass over the product is
    needed.
    """
    dtype = planes.dtype
    flat = planes.reshape(len(planes), -1).astype(jnp.promote_types(dtype, jnp.float32))
    centred = flat - flat.mean(1, keepdims=True)
    exactly = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)  # k' V k cancels where V is nearly singular
    covariance = exactly(centred, centred.T) / flat.shape[1]
    matrix = kernel.reshape(len(planes), -1).astype(flat.dtype)
    variance = jnp.maximum((matrix * exactly(covariance, matrix)).sum(0), 0)
    folded = matrix * (scale * lax.rsqrt(variance + epsilon))
    product = centred.astype(dtype).T @ folded.astype(dtype) + bias.astype(dtype)
    return product.reshape(*planes.shape[1:], -1)


class BatchNorm(nn.Module):
    """Normalisation by the statistics of the batch at hand; keeps no state.

    `y = (x - mean) / sqrt(variance + epsilon) * scale + bias`, over all axes but the last, biased variance. Statistics given in
    the collection "stats" are used instead of the batch's; with "stats" mutable the batch's are written there.
    """

    epsilon: float = EPSILON

    @nn.compact
    def __call__(self, x: jax.Array, kernel: jax.Array | None = None) -> jax.Array:
        """Normalises `x[..., C]`, or the convolution of a kernel with images of the planes x."""
        features = (x if kernel is None else kernel).shape[-1]
        scale = self.param("scale", nn.initializers.ones, (features,))
        bias = self.param("bias", nn.initializers.zeros, (features,))
        if kernel is not None:
            return _folded_batch_norm(self.epsilon, x, kernel, scale, bias)
        if self.is_mutable_collection("stats") and not self.is_initializing():
            axes, wide = tuple(range(x.ndim - 1)), x.astype(jnp.promote_types(x.dtype, jnp.float32))
            self.put_variable("stats", "mean", wide.mean(axes))
            self.put_variable("stats", "variance", wide.var(axes))
        elif self.has_variable("stats", "mean"):
            mean, variance = self.get_variable("stats", "mean"), self.get_variable("stats", "variance")
            return ((x - mean) * (lax.rsqrt(variance + self.epsilon) * scale) + bias).astype(x.dtype)
        return _batch_norm(self.epsilon, x, scale, bias)


class _FoldedInstanceNorm(nn.Module):
    """`nn.InstanceNorm` of the convolution of a kernel with images of the planes `[h * w * C, N, H', W']`.

    It is folded into the kernel as by `_folded_batch_norm`, for each image by itself.
    """

    @nn.compact
    def __call__(self, planes: jax.Array, kernel: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (kernel.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (kernel.shape[-1],))
        return jax.vmap(lambda own: _folded_batch_norm(EPSILON, own, kernel, scale, bias), 1)(planes)


def standardise(norm: str, x: jax.Array, scale: Any = 1.0, bias: Any = 0.0) -> jax.Array:
    """Mean 0 and variance 1 of `x[N, H, W, C]`, over axes that the name tells, times a scale plus a bias; without parameters.

    Args:
      norm: "batch" takes each channel's statistics over the batch at hand, "instance" over each example; "layer" takes those of all
        channels of an example.
      x: maps.
      scale: `[C]` or a number.
      bias: `[C]` or a number.
    """
    if norm == "batch":
        ones = jnp.ones(x.shape[-1], x.dtype)
        return _batch_norm(EPSILON, x, scale * ones, bias * ones)
    axes = (1, 2) if norm == "instance" else (1, 2, 3)
    return jax.nn.standardize(x, axes, epsilon=EPSILON) * scale + bias


def normalise(norm: Norm, x: jax.Array) -> jax.Array:
    """Applies the normalisation layer of that name, as a submodule called "norm".

    Args:
      norm: "batch" and "support" use a batch's statistics (the batch at hand, or the support set's for queries too), "group" 8
        groups of channels, "layer" all of an example's values, "instance" each channel of an example, "none" nothing.
      x: `[N, ..., C]`.
    """
    axes = tuple(range(1, x.ndim))
    if norm == "group":
        groups = next((count for count in (8, 4, 2) if x.shape[-1] % count == 0 and x.shape[-1] > count), 1)
        return nn.GroupNorm(num_groups=groups, epsilon=EPSILON, name="norm")(x)
    if norm == "layer":
        return nn.LayerNorm(epsilon=EPSILON, reduction_axes=axes, name="norm")(x)
    if norm == "instance":
        return nn.InstanceNorm(epsilon=EPSILON, name="norm")(x)
    return x if norm == "none" else BatchNorm(name="norm")(x)


class _Kernel(nn.Module):
    """The parameters of a convolution, `kernel[size, size, C, features]` and `bias[features]`."""

    features: int
    size: int
    use_bias: bool
    init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, channels: int) -> tuple[jax.Array, jax.Array | None]:
        kernel = self.param("kernel", self.init, (self.size, self.size, channels, self.features))
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None


def conv_norm(
    norm: Norm,
    x: jax.Array,
    features: int,
    size: int = 3,
    stride: int = 1,
    use_bias: bool = True,
    pad: Literal["SAME", "VALID"] = "SAME",
    init: nn.initializers.Initializer = _LECUN,
) -> jax.Array:
    """A convolution and a normalisation, as submodules called "conv" and "norm".

    Args:
      norm: see `normalise`.
      x: `[N, H, W, C]`.
      features: channels of the result.
      size: side of the kernel.
      stride: in both dimensions.
      use_bias: whether the convolution has a bias. Its value is not added where the normalisation would subtract it again.
      pad: whether the map keeps its size (for stride 1) or loses a border.
      init: of the kernel.
    """
    x, kernel, bias = promote_dtype(x, *_Kernel(features, size, use_bias, init, name="conv")(x.shape[-1]))
    sides, strides = (size, size), (stride, stride)
    if norm in ("batch", "instance") and size * size * x.shape[-1] <= features:
        padding = lax.padtype_to_pads(x.shape[1:3], sides, strides, pad)
        planes = planes_of(x, sides, padding) if stride == 1 else jnp.moveaxis(patches_of(x, sides, strides, padding), -1, 0)
        return (BatchNorm if norm == "batch" else _FoldedInstanceNorm)(name="norm")(planes, kernel)
    product = task_conv(x, kernel, strides, pad)
    if bias is not None and norm not in ("batch", "support", "instance"):
        product = product + bias
    return normalise(norm, product)
