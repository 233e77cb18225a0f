"""The operations of a cell, as DARTS' descendants search among them, for weights that differ from task to task.

Each operation but the identity ends in a normalisation by the batch at hand, with scale and bias where its parameters have them.

References:
  Liu, Simonyan, Yang, DARTS: Differentiable Architecture Search, ICLR 2019 (https://arxiv.org/abs/1806.09055): cells of operations.
  Elsken, Staffler, Metzen, Hutter, Meta-Learning of Neural Architectures for Few-Shot Learning, CVPR 2020
  (https://arxiv.org/abs/1911.11090): the seven operations here.

As in the second one's released code, "conv_3x3" is a convolution of each channel by itself and one of 1 x 1 behind it.
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jmeta.models.layers import standardise, task_conv

CellNorm = Literal["batch", "layer", "instance"]

# Kernels of an operation's convolutions, in order: name, height, width, and whether each channel is by itself.
_Kernels = tuple[tuple[str, int, int, bool], ...]
FIRST: dict[str, _Kernels] = {
    "conv_1x5_5x1": (("row", 1, 5, False),),
    "conv_3x3": (("depth", 3, 3, True), ("point", 1, 1, False)),
    "sep_conv_3x3": (("depth", 3, 3, True), ("point", 1, 1, False)),
    "dil_conv_3x3": (("depth", 3, 3, True), ("point", 1, 1, False)),
}
SECOND: dict[str, _Kernels] = {
    "conv_1x5_5x1": (("column", 5, 1, False),),
    "sep_conv_3x3": (("depth2", 3, 3, True), ("point2", 1, 1, False)),
}
DILATED = "dil_conv_3x3"


def init_operation(key: jax.Array, op: str, channels: int, stride: int, affine: bool) -> dict[str, Any]:
    """The parameters of an operation, `{}` where it has none.

    Args:
      key: of the kernels.
      op: one of `jmeta.architecture.PRIMITIVES`.
      channels: that come in and go out.
      stride: 1, or 2 to halve the map.
      affine: whether its normalisations have a scale and a bias.
    """
    if op == "skip_connect":
        return init_halving(key, channels, channels, affine) if stride == 2 else {}
    kernels = (*FIRST.get(op, ()), *SECOND.get(op, ()))
    shapes = {name: (height, width, 1 if alone else channels, channels) for name, height, width, alone in kernels}
    keys = jax.random.split(key, max(1, len(shapes)))
    params: dict[str, Any] = {
        name: {"kernel": init_kernel(own, shape)} for own, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    norms = ("norm1", "norm") if op == "sep_conv_3x3" else ("norm",)
    return params | ({norm: init_norm(channels) for norm in norms} if affine else {})


def first_kernel(op: str, params: Any) -> jax.Array:
    """An operation's first convolution as one dense kernel `[..., h, w, C, C]`."""
    return _dense(params, FIRST[op])


def _dense(params: Any, kernels: _Kernels) -> jax.Array:
    """A convolution of each channel by itself and one of 1 x 1 behind it, as one dense convolution.

    Under weights of each task's own, and for the many edges of a supernet, that runs faster by far; a wide network with few edges
    would be faster without.
    """
    first, *rest = (params[name]["kernel"] for name, *_ in kernels)
    return first.swapaxes(-1, -2) * rest[0] if rest else first


def convolve_same(x: jax.Array, kernel: jax.Array, stride: int = 1, dilation: int = 1) -> jax.Array:
    """A convolution that keeps the size of the map for stride 1."""
    sides = [(dilation * (size // 2), dilation * (size // 2)) for size in kernel.shape[:2]]
    return task_conv(x, kernel, (stride, stride), sides, rhs_dilation=(dilation, dilation))


def finish(op: str, params: Any, y: jax.Array, norm: CellNorm) -> jax.Array:
    """What an operation makes, but for its last normalisation, of the output `[N, H, W, C]` of its first convolution."""
    if op == "sep_conv_3x3":
        y = nn.relu(normed(y, params.get("norm1"), norm))
    return convolve_same(y, _dense(params, SECOND[op])) if op in SECOND else y


def apply_other(op: str, params: Any, x: jax.Array, stride: int) -> jax.Array:
    """An operation that begins without a convolution, but for its normalisation, on maps `[N, H, W, C]`, which stride 2 halves."""
    if op == "skip_connect":
        return x if stride == 1 else _halves(params, x)
    return _max_pool(x, stride) if op == "max_pool_3x3" else _avg_pool(x, stride)


def init_norm(channels: int) -> dict[str, jax.Array]:
    """The scale and bias of a normalisation."""
    return {"scale": jnp.ones(channels), "bias": jnp.zeros(channels)}


def init_kernel(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The weights of a convolution or a linear layer, as PyTorch's start: uniform within 1 / sqrt(inputs)."""
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")(key, shape)


def normed(x: jax.Array, affine: dict[str, jax.Array] | None, norm: CellNorm) -> jax.Array:
    """`x[N, H, W, C]` standardised, then scaled and shifted where there is a scale and a bias."""
    return standardise(norm, x, **(affine or {}))


def init_projection(key: jax.Array, channels: int, features: int, affine: bool) -> dict[str, Any]:
    """The parameters of a ReLU, a convolution of 1 x 1 and a normalisation."""
    params = {"kernel": init_kernel(key, (1, 1, channels, features))}
    return params | ({"norm": init_norm(features)} if affine else {})


def project(params: Any, x: jax.Array, norm: CellNorm) -> jax.Array:
    """ReLU, a convolution of 1 x 1 and a normalisation."""
    return normed(task_conv(nn.relu(x), params["kernel"], (1, 1), "VALID"), params.get("norm"), norm)


def init_halving(key: jax.Array, channels: int, features: int, affine: bool) -> dict[str, Any]:
    """The parameters of `halve`."""
    even, odd = jax.random.split(key)
    params: dict[str, Any] = {
        "even": {"kernel": init_kernel(even, (1, 1, channels, features - features // 2))},
        "odd": {"kernel": init_kernel(odd, (1, 1, channels, features // 2))},
    }
    return params | ({"norm": init_norm(features)} if affine else {})


def halve(params: Any, x: jax.Array, norm: CellNorm) -> jax.Array:
    """Half the size by two convolutions of 1 x 1 and stride 2, one on the even and one on the odd rows and columns."""
    return normed(_halves(params, x), params.get("norm"), norm)


def _halves(params: Any, x: jax.Array) -> jax.Array:
    x = nn.relu(x)
    odd = jnp.pad(x, [(0, 0), *((0, size % 2) for size in x.shape[1:3]), (0, 0)])[:, 1::2, 1::2]
    parts = (("even", x[:, ::2, ::2]), ("odd", odd))
    return jnp.concatenate([task_conv(part, params[name]["kernel"], (1, 1), "VALID") for name, part in parts], -1)


def _views(x: jax.Array, size: tuple[int, int], strides: tuple[int, int], border: float = 0.0) -> list[jax.Array]:
    """What each place of a kernel of odd sides sees, row by row; the map keeps its size for strides of 1."""
    sides = (side // 2 for side in size)
    rows, columns = (1 + (each - 1) // stride for each, stride in zip(x.shape[1:3], strides, strict=True))
    x = jnp.pad(x, [(0, 0), *((side, side) for side in sides), (0, 0)], constant_values=border)
    return [
        x[:, i : i + (rows - 1) * strides[0] + 1 : strides[0], j : j + (columns - 1) * strides[1] + 1 : strides[1]]
        for i in range(size[0])
        for j in range(size[1])
    ]


def _max_pool(x: jax.Array, stride: int) -> jax.Array:
    """Largest of 3 x 3; the first of several equal ones, row by row, has the gradient."""
    for size, strides in _lines(stride):
        x = functools.reduce(lambda largest, view: jnp.where(view > largest, view, largest), _views(x, size, strides, -jnp.inf))
    return x


def _avg_pool(x: jax.Array, stride: int) -> jax.Array:
    """Mean of 3 x 3, of the places within the map alone."""
    counts = [np.convolve(np.ones(size), np.ones(3))[1 : 1 + size : stride] for size in x.shape[1:3]]
    for size, strides in _lines(stride):
        x = sum(_views(x, size, strides))  # type: ignore[assignment]
    return x / np.outer(*counts)[:, :, None].astype(x.dtype)


def _lines(stride: int):
    """A window of 3 x 3 as one of a row and then one of a column: sizes and strides."""
    return ((1, 3), (1, stride)), ((3, 1), (stride, 1))
