"""MAML's meta-gradient in PyTorch, as PyTorch users write and tune it.

Three ways of running a meta-batch, with the same numbers:

- `loop`: one task after another, `torch.autograd.grad(create_graph=True)` inside, `backward()` outside;
- `vmapped`: `torch.func.vmap` over tasks of `torch.func.grad`;
- `compiled`: one task after another, each a `torch.compile`d `torch.func.grad`.

Inside, images and kernels are NCHW and OIHW in shape and channels-last in memory, which is a little faster on a CPU.
"""

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch.func import grad, grad_and_value, vmap  # pyright: ignore[reportMissingImports]

from peers import Arrays, Contender  # pyright: ignore[reportMissingImports]

torch.set_num_threads(os.cpu_count() or 1)

STRIDE = 2
EPSILON = 1e-5
VMAP_CHUNK = 4  # fastest of 1, 2, 4, 8 and all 32 tasks of conv4 on a CPU with two cores

Params = dict[str, torch.Tensor]
Loss = Callable[[Params, torch.Tensor, torch.Tensor], torch.Tensor]


class Episodes(NamedTuple):
    """Support and query sets of all tasks: images `[tasks, n, channels, height, width]`, labels `[tasks, n]`."""

    support_x: torch.Tensor
    support_y: torch.Tensor
    query_x: torch.Tensor
    query_y: torch.Tensor


Run = Callable[[Params, Episodes], tuple[torch.Tensor, Params]]


def to_params(arrays: Mapping[str, np.ndarray]) -> Params:
    """Weights from jmeta's layout: kernels `[3, 3, in, out]` become `[out, in, 3, 3]`, all else stays as it is."""
    kernels = {name: torch.tensor(a.transpose(3, 2, 0, 1)) for name, a in arrays.items() if a.ndim == 4}
    kernels = {name: kernel.contiguous(memory_format=torch.channels_last) for name, kernel in kernels.items()}
    return {name: kernels[name] if name in kernels else torch.tensor(a) for name, a in arrays.items()}


def to_arrays(params: Params) -> dict[str, np.ndarray]:
    """Weights, or their gradients, back in jmeta's layout."""
    arrays = {name: p.detach().numpy() for name, p in params.items()}
    return {name: a.transpose(2, 3, 1, 0) if a.ndim == 4 else a for name, a in arrays.items()}


def to_episodes(arrays: tuple[np.ndarray, ...]) -> Episodes:
    """Episodes from images `[tasks, n, height, width, channels]`, or numbers `[tasks, n, 1]`, and their targets."""
    xs = [torch.tensor(x) if x.ndim == 3 else torch.tensor(x).movedim(-1, -3) for x in arrays[::2]]
    ys = [torch.tensor(y) if y.ndim == 3 else torch.tensor(y, dtype=torch.int64) for y in arrays[1::2]]
    return Episodes(xs[0], ys[0], xs[1], ys[1])


def pad_same(x: torch.Tensor) -> torch.Tensor:
    """Zeros around square images `[n, channels, size, size]` for a SAME 3 x 3 convolution, where XLA puts them.

    An odd one goes behind, so that 28 and 14 pixels get (0, 1) where `padding=1` would mean (1, 1).
    """
    size = x.shape[-1]
    total = (-(-size // STRIDE) - 1) * STRIDE + 3 - size
    before, after = total // 2, total - total // 2
    return F.pad(x, (before, after, before, after))


def block(params: Params, name: str, x: torch.Tensor, pool: bool) -> torch.Tensor:
    """Convolution, normalisation by this batch's statistics, ReLU, and half the size by stride or by max-pooling."""
    kernel, bias = params[f"{name}/conv/kernel"], params[f"{name}/conv/bias"]
    x = F.conv2d(x, kernel, bias, padding=1) if pool else F.conv2d(pad_same(x), kernel, bias, stride=STRIDE)
    scale, bias = params[f"{name}/norm/scale"], params[f"{name}/norm/bias"]
    x = F.relu(F.batch_norm(x, None, None, scale, bias, training=True, eps=EPSILON))
    return F.max_pool2d(x, 2) if pool else x


def conv4_loss(params: Params, x: torch.Tensor, y: torch.Tensor, pool: bool = False) -> torch.Tensor:
    """Mean cross-entropy of conv4's logits for images `[n, channels, size, size]` against labels `[n]`."""
    for number in range(1, 5):
        x = block(params, f"block{number}", x, pool)
    features = x.permute(0, 2, 3, 1).flatten(1) if pool else x.mean((2, 3))
    return F.cross_entropy(features @ params["head/kernel"] + params["head/bias"], y)


def pooled_loss(params: Params, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """As `conv4_loss`, with max-pooling."""
    return conv4_loss(params, x, y, pool=True)


def mlp_loss(params: Params, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean squared error of two hidden layers for `x[n, 1]` against `y[n, 1]`."""
    for name in ("layer1", "layer2"):
        x = F.relu(x @ params[f"{name}/dense/kernel"] + params[f"{name}/dense/bias"])
    return F.mse_loss(x @ params["head/kernel"] + params["head/bias"], y)


LOSSES = {"mlp": mlp_loss, "conv4": conv4_loss, "pooled": pooled_loss}


def adapt(loss: Loss, params: Params, x: torch.Tensor, y: torch.Tensor, *, rate: float, steps: int, order: int) -> Params:
    """Parameters after `steps` gradient steps on one support set.

    Args:
      loss: `(params, x, y) -> scalar`.
      params: tensors that require gradients.
      x: support inputs `[n, ...]`.
      y: support targets `[n, ...]`.
      rate: the inner learning rate.
      steps: inner steps.
      order: 2 keeps the graph through the inner gradients, 1 takes them as constants.
    """
    for _ in range(steps):
        grads = torch.autograd.grad(loss(params, x, y), list(params.values()), create_graph=order == 2)
        params = {name: p - rate * g for (name, p), g in zip(params.items(), grads, strict=True)}
    return params


def loop(loss: Loss, *, rate: float, steps: int, order: int) -> Run:
    """One task after another, gradients accumulating in the parameters. Arguments as for `adapt`.

    Returns:
      `(params, episodes) -> (query loss, its gradient in params)`, means over the tasks.
    """

    def run(params, episodes):
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        losses = []
        for support_x, support_y, query_x, query_y in zip(*episodes, strict=True):
            phi = adapt(loss, leaves, support_x, support_y, rate=rate, steps=steps, order=order)
            value = loss(phi, query_x, query_y) / len(episodes.query_y)
            value.backward()
            losses.append(value.detach())
        return torch.stack(losses).sum(), {name: leaf.grad for name, leaf in leaves.items()}

    return run


def vmapped(loss: Loss, *, rate: float, steps: int, order: int) -> Run:
    """`VMAP_CHUNK` tasks at a time through `torch.func.vmap`. Otherwise as `loop`."""
    tasks = vmap(_task_gradient(loss, rate, steps, order), (None, 0, 0, 0, 0), chunk_size=VMAP_CHUNK)

    def run(params, episodes):
        grads, losses = tasks(params, *episodes)
        return losses.mean(), {name: g.mean(0) for name, g in grads.items()}

    return run


def compiled(loss: Loss, *, rate: float, steps: int, order: int) -> Run:
    """One task after another through `torch.compile`, which needs a C++ compiler. Otherwise as `loop`."""
    task = torch.compile(_task_gradient(loss, rate, steps, order))

    def run(params, episodes):
        total, losses = {name: torch.zeros_like(p) for name, p in params.items()}, []
        for episode in zip(*episodes, strict=True):
            grads, value = task(params, *episode)
            total = {name: t + grads[name] for name, t in total.items()}
            losses.append(value)
        return torch.stack(losses).mean(), {name: t / len(losses) for name, t in total.items()}

    return run


def _task_gradient(loss: Loss, rate: float, steps: int, order: int):
    """`(theta, support_x, support_y, query_x, query_y) -> (gradients in theta, query loss)` of one task."""

    def query_loss(theta, support_x, support_y, query_x, query_y):
        phi = theta
        for _ in range(steps):
            grads = grad(loss)(phi, support_x, support_y)
            grads = grads if order == 2 else {name: g.detach() for name, g in grads.items()}
            phi = {name: p - rate * grads[name] for name, p in phi.items()}
        return loss(phi, query_x, query_y)

    return grad_and_value(query_loss)


def contenders(work, params: Arrays, episodes: tuple[np.ndarray, ...]) -> dict[str, Contender]:
    """PyTorch's three ways."""
    own_params, own_episodes = to_params(params), to_episodes(episodes)
    options = {"rate": work.rate, "steps": work.steps, "order": work.order}

    def contender(way):
        run = way(LOSSES[work.network], **options)
        return Contender(lambda: run(own_params, own_episodes), read)

    return {f"torch {name}": contender(way) for name, way in {"loop": loop, "vmap": vmapped, "compile": compiled}.items()}


def read(result: tuple[torch.Tensor, Params]) -> tuple[float, Arrays]:
    """Loss and gradients as NumPy has them."""
    return float(result[0]), to_arrays(result[1])
