"""A meta-step of MetaNAS in PyTorch: a supernet edge by edge and operation by operation, and Reptile around it.

Alphas and weights take turns by two optimisers of Adam, as the paper's code does; gradients by `torch.autograd.grad` at the present
weights and alphas. Images are NCHW.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

from jmeta.architecture import KINDS, PRIMITIVES, pairs_of

EPSILON = 1e-5


def to_tensors(params: Any, nodes: int) -> dict[str, Any]:
    """A supernet's parameters in PyTorch's layouts, those of operations by edge: `{"alpha": ..., "w": ...}`."""

    def kernel(array):
        array = np.asarray(array)
        return torch.tensor(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array)

    def plain(tree):
        return {name: plain(own) if isinstance(own, dict) else kernel(own) for name, own in tree.items()}

    weights = {}
    for name, layer in params["w"].items():
        weights[name] = plain({part: own for part, own in layer.items() if part not in KINDS})
        for kind in set(KINDS) & set(layer):
            edges = [(u, j) for u in range(nodes + 1) for j in range(nodes) if u < j + 2]
            weights[name][kind] = {
                (op, *edge): plain(take(own, number))
                for op, own in layer[kind].items()
                for number, edge in enumerate(edge for edge in edges if op != "skip_connect" or edge[0] < 2)
            }
    return {"alpha": plain(params["alpha"]), "w": weights}


def take(tree: Any, number: int) -> Any:
    """One edge's parameters."""
    return {name: take(own, number) if isinstance(own, dict) else own[number] for name, own in tree.items()}


def normed(x: torch.Tensor) -> torch.Tensor:
    """By the batch's statistics, without scale and bias."""
    return F.batch_norm(x, None, None, training=True, eps=EPSILON)


def halved(own: Any, x: torch.Tensor) -> torch.Tensor:
    """Two convolutions of 1 x 1 and stride 2."""
    x = F.relu(x)
    parts = F.conv2d(x, own["even"]["kernel"], stride=2), F.conv2d(x[:, :, 1:, 1:], own["odd"]["kernel"], stride=2)
    return normed(torch.cat(parts, 1))


def project(own: Any, x: torch.Tensor) -> torch.Tensor:
    """A convolution of 1 x 1."""
    return normed(F.conv2d(F.relu(x), own["kernel"]))


def separable(x: torch.Tensor, depth: torch.Tensor, point: torch.Tensor, stride: int = 1, dilation: int = 1) -> torch.Tensor:
    """ReLU, a convolution of each channel by itself, one of 1 x 1, and the normalisation."""
    x = F.conv2d(F.relu(x), depth, stride=stride, padding=dilation, dilation=dilation, groups=x.shape[1])
    return normed(F.conv2d(x, point))


def operate(op: str, own: Any, x: torch.Tensor, stride: int) -> torch.Tensor:
    """One operation on one edge."""
    if op == "max_pool_3x3":
        return normed(F.max_pool2d(x, 3, stride, 1))
    if op == "avg_pool_3x3":
        return normed(F.avg_pool2d(x, 3, stride, 1, count_include_pad=False))
    if op == "skip_connect":
        return x if stride == 1 else halved(own, x)
    kernels = {name: part["kernel"] for name, part in own.items()}
    if op == "conv_1x5_5x1":
        x = F.conv2d(F.relu(x), kernels["row"], stride=stride, padding=(0, 2))
        return normed(F.conv2d(x, kernels["column"], padding=(2, 0)))
    x = separable(x, kernels["depth"], kernels["point"], stride, 2 if op == "dil_conv_3x3" else 1)
    return separable(x, kernels["depth2"], kernels["point2"]) if op == "sep_conv_3x3" else x


def supernet(params: Any, x: torch.Tensor, cells: int, nodes: int, halving: tuple[int, ...], temperature: float) -> torch.Tensor:
    """Logits."""
    alpha, w = params["alpha"], params["w"]
    stem = F.conv2d(x, w["stem"]["conv"]["kernel"], padding=1)
    norm = w["stem"]["norm"]
    before = last = F.batch_norm(stem, None, None, norm["scale"], norm["bias"], training=True, eps=EPSILON)
    for number in range(cells):
        own, kind = w[f"cell{number}"], KINDS[number in halving]
        maps = [(halved if number - 1 in halving else project)(own["input0"], before), project(own["input1"], last)]
        for j in range(nodes):
            mixed = alpha[kind][f"node{j}"]
            ops, pairs = (F.softmax(mixed[name] / temperature, -1) for name in ("ops", "pairs"))
            outputs = []
            for u in range(j + 2):
                stride = 2 if kind == "reduce" and u < 2 else 1
                each = (operate(op, own[kind].get((op, u, j), {}), maps[u], stride) for op in PRIMITIVES)
                outputs.append(sum(weight * y for weight, y in zip(ops[u], each, strict=True)))
            maps.append(sum(p * (outputs[u] + outputs[v]) for p, (u, v) in zip(pairs, pairs_of(j + 2), strict=True)))
        before, last = last, torch.cat(maps[2:], 1)
    return last.mean((2, 3)) @ w["head"]["kernel"] + w["head"]["bias"]


def leaves(tree: Any) -> list[torch.Tensor]:
    """All tensors of a tree."""
    return list(itertools.chain.from_iterable(leaves(own) if isinstance(own, dict) else [own] for own in tree.values()))


def meta_step(
    params: Any, images: np.ndarray, labels: np.ndarray, turns: int, rate: float, decay: float, **network: Any
) -> Callable[[], list[np.ndarray]]:
    """The mean over tasks of how far alphas and weights move, in the order of `leaves`.

    Args:
      params: of `to_tensors`.
      images: `[tasks, N, H, W, C]`.
      labels: `[tasks, N]`.
      turns: of alphas and of weights, each.
      rate: of both.
      decay: of the alphas' weights.
      **network: cells, nodes, halving and temperature.
    """
    x, y = torch.tensor(images.transpose(0, 1, 4, 2, 3)), torch.tensor(labels.astype(np.int64))
    own = leaves(params)
    alphas, weights = leaves(params["alpha"]), leaves(params["w"])
    start = [leaf.clone() for leaf in own]
    for leaf in own:
        leaf.requires_grad_()

    def run():
        total = [torch.zeros_like(leaf) for leaf in start]
        for task_x, task_y in zip(x, y, strict=True):
            with torch.no_grad():
                for leaf, first in zip(own, start, strict=True):
                    leaf.copy_(first)
            optimisers = [
                (alphas, torch.optim.Adam(alphas, lr=rate, betas=(0.0, 0.999), weight_decay=decay)),
                (weights, torch.optim.Adam(weights, lr=rate, betas=(0.0, 0.999))),
            ]
            for _ in range(turns):
                for group, optimiser in optimisers:
                    grads = torch.autograd.grad(F.cross_entropy(supernet(params, task_x, **network), task_y), group)
                    for leaf, gradient in zip(group, grads, strict=True):
                        leaf.grad = gradient
                    optimiser.step()
            for sum_of, leaf, first in zip(total, own, start, strict=True):
                sum_of += (first - leaf.detach()) / len(x)
        return [leaf.numpy() for leaf in total]

    return run
