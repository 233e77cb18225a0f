"""The networks of the few-shot literature: an MLP, conv4, ResNet-12, and the conv3 of continual learning.

References:
  Finn, Abbeel, Levine, Model-Agnostic Meta-Learning, ICML 2017 (https://arxiv.org/abs/1703.03400), section 5: mlp and conv4.
  Oreshkin, Rodriguez, Lacoste, TADAM, NeurIPS 2018 (https://arxiv.org/abs/1805.10123): the residual network of 12 layers.
  Frati, Traft, Clune, Cheney, Reset It and Forget It, ECAI 2024 (https://arxiv.org/abs/2310.07996): conv3.

Differs from the papers in: the MAML code's normalisation has no scale and epsilon 1e-3, and leaves its bias out of adaptation; here
scale and bias are adapted with the rest and epsilon is 1e-5. ResNet-12 has no DropBlock. Biases of conv3 start from 0.
"""

import flax.linen as nn
import jax.numpy as jnp

from jmeta.core import Model, memoise
from jmeta.models.adapters import linen_model
from jmeta.models.layers import NORMS, Norm, conv_norm, max_pool, normalise


class _Block(nn.Module):
    """Convolution 3 x 3, normalisation, ReLU, and half the size by stride or by max-pooling."""

    features: int
    norm: Norm
    pool: bool

    @nn.compact
    def __call__(self, x):
        x = conv_norm(self.norm, x, self.features, stride=1 if self.pool else 2)
        return nn.relu(max_pool(x) if self.pool else x)  # either order gives the same; this one touches less


class _Conv4(nn.Module):
    ways: int | None
    filters: tuple[int, ...]
    norm: Norm
    pool: bool

    @nn.compact
    def __call__(self, x):
        for number, features in enumerate(self.filters, 1):
            x = _Block(features, self.norm, self.pool, name=f"block{number}")(x)
        x = x.reshape(x.shape[0], -1) if self.pool else x.mean((1, 2))
        return x if self.ways is None else nn.Dense(self.ways, name="head")(x)


class Unpadded(nn.Module):
    """Convolution 3 x 3 without padding, normalisation, ReLU, and max-pooling if asked for."""

    features: int
    norm: Norm
    pool: bool

    @nn.compact
    def __call__(self, x):
        """From `[N, H, W, C]` to a map smaller by 2 and, pooled, by half."""
        x = conv_norm(self.norm, x, self.features, pad="VALID", init=nn.initializers.he_normal())
        return nn.relu(max_pool(x) if self.pool else x)


class _Conv3(nn.Module):
    classes: int
    filters: int
    norm: Norm

    @nn.compact
    def __call__(self, x):
        for number in range(1, 4):
            x = Unpadded(self.filters, self.norm, number < 3, name=f"block{number}")(x)
        return torch_dense(self.classes, "head")(x.reshape(x.shape[0], -1))


def torch_dense(features: int, name: str) -> nn.Dense:
    """A linear layer whose weights start as PyTorch's do, uniform within 1 / sqrt(inputs)."""
    return nn.Dense(features, kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), name=name)


class _Layer(nn.Module):
    features: int
    norm: Norm

    @nn.compact
    def __call__(self, x):
        return nn.relu(normalise(self.norm, nn.Dense(self.features, name="dense")(x)))


class _Mlp(nn.Module):
    outputs: int
    hidden: tuple[int, ...]
    norm: Norm

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        for number, features in enumerate(self.hidden, 1):
            x = _Layer(features, self.norm, name=f"layer{number}")(x)
        return nn.Dense(self.outputs, name="head")(x)


class _Residual(nn.Module):
    """Three 3 x 3 convolutions beside a 1 x 1 shortcut, then max-pooling."""

    features: int
    norm: Norm

    @nn.compact
    def __call__(self, x):
        y = x
        for number in range(1, 4):
            y = _ConvNorm(self.features, 3, self.norm, name=f"conv{number}")(y)
            y = nn.leaky_relu(y, 0.1) if number < 3 else y
        shortcut = _ConvNorm(self.features, 1, self.norm, name="shortcut")(x)
        return max_pool(nn.leaky_relu(y + shortcut, 0.1))


class _ConvNorm(nn.Module):
    features: int
    size: int
    norm: Norm

    @nn.compact
    def __call__(self, x):
        return conv_norm(self.norm, x, self.features, self.size, use_bias=False)


class _ResNet12(nn.Module):
    ways: int
    widths: tuple[int, ...]
    norm: Norm

    @nn.compact
    def __call__(self, x):
        for number, features in enumerate(self.widths, 1):
            x = _Residual(features, self.norm, name=f"block{number}")(x)
        return nn.Dense(self.ways, name="head")(x.mean((1, 2)))


def check(name: str, sizes: dict[str, int], norm: str, shape: tuple[int, ...], rank: int | None) -> None:
    """Refuses sizes below 1, norms that are not there, and shapes of another rank."""
    for argument, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: {argument} must be at least 1, got {size}.")
    if norm not in NORMS:
        raise ValueError(f"{name}: norm must be one of {', '.join(NORMS)}, got {norm!r}.")
    if rank is not None and len(shape) != rank:
        raise ValueError(f"{name}: shape must be (height, width, channels), got {shape}.")


def build(module: nn.Module, shape: tuple[int, ...], layers: tuple[str, ...], norm: Norm) -> Model:
    """A module for inputs of that shape as a model."""
    return linen_model(module, jnp.zeros((2, *shape), jnp.float32), layers, support_stats=norm == "support")


@memoise
def mlp(outputs: int, *, hidden: tuple[int, ...] = (40, 40), shape: tuple[int, ...] = (1,), norm: Norm = "none") -> Model:
    """A multi-layer perceptron with ReLU; the default is MAML's network for sine waves.

    Args:
      outputs: number of outputs.
      hidden: features of each hidden layer.
      shape: shape of one input, flattened.
      norm: see `jmeta.models.layers.normalise`.

    Returns:
      A model with layers layer1, ..., head, from `[N, *shape]` to `[N, outputs]`.

    >>> mlp(1).layers
    ('layer1', 'layer2', 'head')
    """
    check("mlp", {"outputs": outputs, **{f"hidden[{i}]": size for i, size in enumerate(hidden)}}, norm, shape, None)
    if norm == "instance":
        raise ValueError("mlp: norm 'instance' would leave nothing of single values; use 'layer' or 'group'.")
    names = tuple(f"layer{number}" for number in range(1, len(hidden) + 1))
    return build(_Mlp(outputs, tuple(hidden), norm), shape, (*names, "head"), norm)


@memoise
def conv4(
    ways: int | None,
    *,
    filters: int | tuple[int, ...] = 64,
    pool: bool = False,
    shape: tuple[int, int, int] = (28, 28, 1),
    norm: Norm = "batch",
) -> Model:
    """Four blocks of convolution, normalisation and ReLU, and a linear head.

    Args:
      ways: classes of an episode; None for no head, features `[N, D]` alone, for learners that compare.
      filters: channels of each block, or of the four; the papers use 64 for Omniglot and 32 for mini-ImageNet.
      pool: False halves the size by stride 2 and averages the last map (Omniglot); True max-pools and flattens it (mini-ImageNet).
      shape: height, width and channels of an image.
      norm: see `jmeta.models.layers.normalise`.

    Returns:
      A model with layers block1 to block4 and head, from `[N, height, width, channels]` to logits `[N, ways]`.

    Raises:
      ValueError: a size is below 1, the norm is unknown, or pooled images would vanish.

    >>> import jax
    >>> model = conv4(5)
    >>> model.apply(model.init(jax.random.key(0)), jnp.zeros((2, 28, 28, 1))).shape
    (2, 5)
    """
    each = (filters,) * 4 if isinstance(filters, int) else tuple(filters)
    if len(each) != 4:
        raise ValueError(f"conv4: filters must be a number or one for each of the four blocks, got {filters}.")
    check("conv4", {"ways": 1 if ways is None else ways, "filters": min(each)}, norm, shape, 3)
    if pool and min(shape[:2]) < 16:
        raise ValueError(f"conv4: shape {shape} is pooled away by four halvings; images need at least 16 pixels a side.")
    names = ("block1", "block2", "block3", "block4", *(() if ways is None else ("head",)))
    return build(_Conv4(ways, each, norm, pool), shape, names, norm)


@memoise
def conv3(classes: int, *, filters: int = 256, shape: tuple[int, int, int] = (28, 28, 1), norm: Norm = "instance") -> Model:
    """Three blocks of unpadded convolution, normalisation and ReLU, the first two max-pooled, and a linear head on the last map.

    It is the network that zapping, OML and ANML pre-train on Omniglot. For 84 x 84 in colour the paper has four padded blocks, all
    pooled, which but for the initial weights is `conv4(classes, filters=256, pool=True, shape=(84, 84, 3), norm="instance")`.

    Args:
      classes: outputs of the head, at least one for each class of the image set.
      filters: channels of each block; the papers use 256.
      shape: height, width and channels of an image.
      norm: see `jmeta.models.layers.normalise`.

    Returns:
      A model with layers block1 to block3 and head, from `[N, height, width, channels]` to logits `[N, classes]`.

    Raises:
      ValueError: a size is below 1, the norm is unknown, or images would vanish.

    >>> import jax
    >>> params = conv3(1000).init(jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(params))
    3489256
    """
    check("conv3", {"classes": classes, "filters": filters}, norm, shape, 3)
    if min(shape[:2]) < 18:
        raise ValueError(f"conv3: shape {shape} vanishes in three unpadded blocks; images need at least 18 pixels a side.")
    return build(_Conv3(classes, filters, norm), shape, ("block1", "block2", "block3", "head"), norm)


@memoise
def resnet12(
    ways: int,
    *,
    widths: tuple[int, ...] = (64, 160, 320, 640),
    shape: tuple[int, int, int] = (84, 84, 3),
    norm: Norm = "batch",
) -> Model:
    """Four residual blocks of three convolutions each, global average pooling and a linear head.

    Args:
      ways: classes of an episode.
      widths: channels of each block.
      shape: height, width and channels of an image.
      norm: see `jmeta.models.layers.normalise`.

    Returns:
      A model with layers block1, ..., head, from `[N, height, width, channels]` to logits `[N, ways]`.
    """
    if len(shape) == 3 and min(shape[:2]) < 2 ** len(widths):
        raise ValueError(f"resnet12: shape {shape} is pooled away; {len(widths)} blocks need {2 ** len(widths)} pixels a side.")
    check("resnet12", {"ways": ways, **{f"widths[{i}]": size for i, size in enumerate(widths)}}, norm, shape, 3)
    names = tuple(f"block{number}" for number in range(1, len(widths) + 1))
    return build(_ResNet12(ways, tuple(widths), norm), shape, (*names, "head"), norm)
