"""Convolution of stride 1 as a CPU computes it best, in both orders of differentiation, and as patches under `vmap`.

The derivatives that XLA makes of a convolution run many times slower on a CPU than the convolution itself. Both are convolutions of
stride 1 again: of the images with a kernel turned by 180 degrees, of the kernel with examples for channels, which is here a sum of
products. So two bilinear functions, `convolve` and `correlate`, are closed under differentiation. Under `vmap` either becomes a
product of patches instead, since of a convolution whose kernel differs from task to task XLA makes a grouped one, which no backend
runs well.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Padding = tuple[tuple[int, int], tuple[int, int]]
LAYOUT = ("NHWC", "HWIO", "NHWC")
CACHE = 2**21  # bytes of a core's second cache, or near it


def patches_of(
    x: jax.Array, size: Sequence[int], strides: Sequence[int], padding: Sequence[tuple[int, int]], dilation: Sequence[int] = (1, 1)
) -> jax.Array:
    """What a convolution's kernel sees at each place.

    Args:
      x: images `[N, H, W, C]`.
      size: height and width of the kernel.
      strides: two ints.
      padding: a pair of ints for each of the two dimensions.
      dilation: distances of the places that the kernel sees, two ints.

    Returns:
      `[N, H', W', height * width * C]`.
    """
    x = _pad(x, ((0, 0), *padding, (0, 0)))
    (height, width), (down, across) = (((side - 1) * each + 1 for side, each in zip(size, dilation, strict=True)), strides)
    rows, columns = (x.shape[1] - height) // down + 1, (x.shape[2] - width) // across + 1
    views = [
        x[:, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * across + 1 : across]
        for i in range(0, height, dilation[0])
        for j in range(0, width, dilation[1])
    ]
    return jnp.concatenate(views, -1)


def _pad(x: jax.Array, sides: Sequence[tuple[int, int]]) -> jax.Array:
    """Puts zeros around an array; negative numbers cut it."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(low, high, 0) for low, high in sides])


def planes_of(x: jax.Array, size: Sequence[int], padding: Sequence[tuple[int, int]]) -> jax.Array:
    """`patches_of` for strides of 1, with its last axis first, `[height * width * C, N, H', W']`: cheaper for few channels."""
    x = _pad(x.transpose(3, 0, 1, 2), ((0, 0), (0, 0), *padding))
    rows, columns = x.shape[2] - size[0] + 1, x.shape[3] - size[1] + 1
    return jnp.concatenate([x[:, :, i : i + rows, j : j + columns] for i in range(size[0]) for j in range(size[1])])


def times_kernel(patches: jax.Array, kernel: jax.Array, precision: Any = None) -> jax.Array:
    """The convolution of a kernel `[h, w, C, F]` with the images of these patches `[N, H', W', h * w * C]`: `[N, H', W', F]`."""
    features = kernel.shape[-1]
    flat = patches.reshape(-1, patches.shape[-1])
    if flat.shape[-1] > features:  # features first: then the kernel's gradient is a product that CPUs run fast
        matrix = kernel.transpose(3, 0, 1, 2).reshape(features, -1)
        product = lax.dot_general(flat, matrix, (((1,), (1,)), ((), ())), precision=precision)
    else:
        product = jnp.matmul(flat, kernel.reshape(-1, features), precision=precision)
    return product.reshape(*patches.shape[:-1], features)


def convolve(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """`y[n, a, b, f] = sum over i, j, c of x[n, a + i - top, b + j - left, c] kernel[i, j, c, f]`.

    Args:
      x: images `[N, H, W, C]`.
      kernel: `[h, w, C, F]`.
      padding: rows of zeros above and below, columns left and right.

    Returns:
      `[N, H', W', F]`.
    """
    return _convolve_p.bind(x, kernel, padding=padding)


def correlate(x: jax.Array, y: jax.Array, padding: Padding) -> jax.Array:
    """`kernel[i, j, c, f] = sum over n, a, b of x[n, a + i - top, b + j - left, c] y[n, a, b, f]`, of `convolve`'s shapes."""
    return _correlate_p.bind(x, y, padding=padding)


def _convolve(x, kernel, *, padding):
    """XLA's convolution; one without padding gets a column of zeros, since its kernel for none at all is slower by a third."""
    (top, bottom), (left, right) = padding
    more = int(padding == ((0, 0), (0, 0)))
    y = lax.conv_general_dilated(x, kernel, (1, 1), ((top, bottom), (left, right + more)), dimension_numbers=LAYOUT)
    return y[:, :, : y.shape[2] - more]


def _correlate(x, y, *, padding):
    """Sums, over blocks of images that fit a core's cache, products of the images shifted by columns and `y` shifted by rows.

    That copies less than patches would: 3 + 3 times for 9. Where there are few channels, as in a first layer, planes copy least.
    """
    height, width, channels, features = _correlate_shape(x, y, padding=padding).shape
    if height * width * channels <= features:
        planes = planes_of(x, (height, width), padding).reshape(height * width * channels, -1)
        return (planes @ y.reshape(-1, features)).reshape(height, width, channels, features)
    (top, bottom), (left, right) = padding
    wide = _pad(x, ((0, 0), (0, 0), (left, right), (0, 0)))
    tall = _pad(y, ((0, 0), (height - 1 - top, height - 1 - bottom), (0, 0), (0, 0)))
    rows, columns = x.shape[1], y.shape[2]

    def part(total, block):
        wide, tall = block
        wide = jnp.concatenate([wide[:, :, j : j + columns] for j in range(width)], -1)
        tall = jnp.concatenate([tall[:, height - 1 - i : height - 1 - i + rows] for i in range(height)], -1)
        wide, tall = wide.reshape(-1, width * channels), tall.reshape(-1, height * features)
        return total + jnp.matmul(wide.T, tall, preferred_element_type=total.dtype), None

    size = rows * columns * (width * channels + height * features) * x.dtype.itemsize
    count = max(each for each in range(1, len(x) + 1) if len(x) % each == 0 and (each == 1 or each * size <= CACHE))
    blocks = jax.tree.map(lambda leaf: leaf.reshape(-1, count, *leaf.shape[1:]), (wide, tall))
    zeros = jnp.zeros((width * channels, height * features), jnp.promote_types(x.dtype, jnp.float32))
    total, _ = lax.scan(part, zeros, blocks)
    return total.astype(x.dtype).reshape(width, channels, height, features).transpose(2, 0, 1, 3)


def _convolve_patches(x, kernel, *, padding):
    return times_kernel(patches_of(x, kernel.shape[:2], (1, 1), padding), kernel)


def _correlate_patches(x, y, *, padding):
    height, width, channels, _ = _correlate_shape(x, y, padding=padding).shape
    patches = patches_of(x, (height, width), (1, 1), padding)
    features = y.shape[-1]
    product = y.reshape(-1, features).T @ patches.reshape(-1, patches.shape[-1])
    return product.reshape(features, height, width, channels).transpose(1, 2, 3, 0)


def _convolve_shape(x, kernel, *, padding):
    if x.shape[-1] != kernel.shape[2] or x.dtype != kernel.dtype:
        raise ValueError(
            f"convolve: images must have the channels and the type of the kernel, got {x.dtype}{list(x.shape)} and "
            f"{kernel.dtype}{list(kernel.shape)}."
        )
    sides = [max(0, x.shape[axis + 1] + sum(padding[axis]) - kernel.shape[axis] + 1) for axis in (0, 1)]
    return ShapedArray((x.shape[0], *sides, kernel.shape[-1]), x.dtype)


def _correlate_shape(x, y, *, padding):
    sides = [x.shape[axis + 1] + sum(padding[axis]) - y.shape[axis + 1] + 1 for axis in (0, 1)]
    return ShapedArray((*sides, x.shape[-1], y.shape[-1]), x.dtype)


def _of_images(y, kernel, padding):
    """What `convolve` hands back to its images, from `y` at its output."""
    (height, width), ((top, bottom), (left, right)) = kernel.shape[:2], padding
    rest = (height - 1 - top, height - 1 - bottom), (width - 1 - left, width - 1 - right)
    return convolve(y, kernel[::-1, ::-1].transpose(0, 1, 3, 2), rest)


def _primitive(name: str, shape: Callable, direct: Callable, by_patches: Callable) -> Primitive:
    """A function of two arrays that runs as `direct`, or under `vmap` as `by_patches`."""
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(direct, static_argnames="padding"))
    primitive.def_abstract_eval(shape)
    mlir.register_lowering(primitive, mlir.lower_fun(direct, multiple_results=False))

    def batched(arguments, axes, *, padding):
        return jax.vmap(lambda x, y: by_patches(x, y, padding=padding), axes)(*arguments), 0

    batching.primitive_batchers[primitive] = batched
    return primitive


_convolve_p = _primitive("convolve", _convolve_shape, _convolve, _convolve_patches)
_correlate_p = _primitive("correlate", _correlate_shape, _correlate, _correlate_patches)

ad.defbilinear(
    _convolve_p,
    lambda y, _, kernel, *, padding: _of_images(y, kernel, padding),
    lambda y, x, _, *, padding: correlate(x, y, padding),
)
ad.defbilinear(
    _correlate_p,
    lambda kernel, _, y, *, padding: _of_images(y, kernel, padding),
    lambda kernel, x, _, *, padding: convolve(x, kernel, padding),
)
