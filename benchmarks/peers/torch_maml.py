"""MAML's meta-gradient in PyTorch, as PyTorch users write and tune it: the other side of `maml_omniglot_speed.py`.

Three ways of running a meta-batch, with the same numbers:

- `loop`: one task after another, `torch.autograd.grad(create_graph=True)` inside, `backward()` outside;
- `vmapped`: `torch.func.vmap` over tasks of `torch.func.grad`;
- `compiled`: one task after another, each a `torch.compile`d `torch.func.grad`.

Arrays go in and come out in jmeta's layout, images NHWC and kernels HWIO under names such as `block1/conv/kernel`.
Inside they are NCHW and OIHW in shape and channels-last in memory, which is a little faster on a CPU.
"""

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch.func import grad, grad_and_value, vmap  # pyright: ignore[reportMissingImports]

torch.set_num_threads(os.cpu_count() or 1)

STRIDE = 2
EPSILON = 1e-5
VMAP_CHUNK = 4  # fastest of 1, 2, 4, 8 and all 32 tasks on a CPU with two cores

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


def to_episodes(support_x: np.ndarray, support_y: np.ndarray, query_x: np.ndarray, query_y: np.ndarray) -> Episodes:
    """Episodes from images `[tasks, n, height, width, channels]` and labels `[tasks, n]`."""
    images = [torch.tensor(x).movedim(-1, -3) for x in (support_x, query_x)]
    labels = [torch.tensor(y, dtype=torch.int64) for y in (support_y, query_y)]
    return Episodes(images[0], labels[0], images[1], labels[1])


def pad_same(x: torch.Tensor) -> torch.Tensor:
    """Zeros around square images `[n, channels, size, size]` for a SAME 3 x 3 convolution, where XLA puts them.

    An odd one goes behind, so that 28 and 14 pixels get (0, 1) where `padding=1` would mean (1, 1).
    """
    size = x.shape[-1]
    total = (-(-size // STRIDE) - 1) * STRIDE + 3 - size
    before, after = total // 2, total - total // 2
    return F.pad(x, (before, after, before, after))


def conv4(params: Params, x: torch.Tensor) -> torch.Tensor:
    """Logits `[n, ways]` of images `[n, channels, size, size]`, normalised by the statistics of this batch."""
    for block in ("block1", "block2", "block3", "block4"):
        x = F.conv2d(pad_same(x), params[f"{block}/conv/kernel"], params[f"{block}/conv/bias"], stride=STRIDE)
        scale, bias = params[f"{block}/norm/scale"], params[f"{block}/norm/bias"]
        x = F.relu(F.batch_norm(x, None, None, scale, bias, training=True, eps=EPSILON))
    return x.mean((2, 3)) @ params["head/kernel"] + params["head/bias"]


def conv4_loss(params: Params, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of conv4's logits against labels `[n]`."""
    return F.cross_entropy(conv4(params, x), y)


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
