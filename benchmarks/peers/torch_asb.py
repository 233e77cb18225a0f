"""ASB in PyTorch: one image after another by SGD, then a batch by Adam.

Two ways, with the same numbers:

- `loop`: eager, `backward()` and optimisers that work in place;
- `compile`: a `torch.compile`d gradient and step of SGD for single images, a compiled gradient for the batch, and Adam in place.

Images are NCHW in memory, which is faster here than channels-last.
"""

from collections.abc import Callable

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch.func import grad  # pyright: ignore[reportMissingImports]
from work import ADAM_RATE  # pyright: ignore[reportMissingImports]

from peers import Arrays, Contender  # pyright: ignore[reportMissingImports]
from peers.torch_maml import EPSILON, Params, to_arrays, to_episodes, to_params, waiting  # pyright: ignore[reportMissingImports]


def conv3(params: Params, x: torch.Tensor) -> torch.Tensor:
    """Logits of conv3 for images `[n, channels, size, size]`."""
    for number in range(1, 4):
        name = f"block{number}"
        x = F.conv2d(x, params[f"{name}/conv/kernel"], params[f"{name}/conv/bias"])
        scale, bias = params[f"{name}/norm/scale"], params[f"{name}/norm/bias"]
        x = F.instance_norm(x, weight=scale, bias=bias, eps=EPSILON)
        x = F.relu(F.max_pool2d(x, 2) if number < 3 else x)
    return x.permute(0, 2, 3, 1).flatten(1) @ params["head/kernel"] + params["head/bias"]


def mean_loss(params: Params, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(conv3(params, x), y)


def eager(params: Params, rate: float) -> Callable:
    """`episodes -> params` after all episodes, one after another."""

    def step(optimiser, x, y):
        optimiser.zero_grad()
        mean_loss(own, x, y).backward()
        optimiser.step()

    own = {name: p.clone().requires_grad_() for name, p in params.items()}

    def run(episodes):
        for name, p in own.items():
            p.data.copy_(params[name])
        leaves = list(own.values())
        inner, outer = torch.optim.SGD(leaves, lr=rate), torch.optim.Adam(leaves, lr=ADAM_RATE, fused=True)
        for sequence_x, sequence_y, batch_x, batch_y in zip(*episodes, strict=True):
            for x, y in zip(sequence_x.split(1), sequence_y.split(1), strict=True):
                step(inner, x, y)
            step(outer, batch_x, batch_y)
        return own

    return run


def compiled(params: Params, rate: float) -> Callable:
    """As `eager`."""

    def stepped(params, x, y):
        grads = grad(mean_loss)(params, x, y)
        return {name: p - rate * grads[name] for name, p in params.items()}

    step = torch.compile(stepped, dynamic=False)
    gradient = torch.compile(grad(mean_loss), dynamic=False)

    def run(episodes):
        own = {name: p.clone() for name, p in params.items()}
        leaves = [torch.nn.Parameter(p) for p in own.values()]
        outer = torch.optim.Adam(leaves, lr=ADAM_RATE, fused=True)
        for sequence_x, sequence_y, batch_x, batch_y in zip(*episodes, strict=True):
            for x, y in zip(sequence_x.split(1), sequence_y.split(1), strict=True):
                own = step(own, x, y)
            grads = gradient(own, batch_x, batch_y)
            for leaf, name in zip(leaves, own, strict=True):
                leaf.data, leaf.grad = own[name], grads[name]
            outer.step()
            own = {name: leaf.data for name, leaf in zip(own, leaves, strict=True)}
        return own

    return run


def contenders(work, params: Arrays, episodes: tuple[np.ndarray, ...]) -> dict[str, Contender]:
    """Both ways."""
    own = {name: p.contiguous() for name, p in to_params(params).items()}
    given = to_episodes(episodes)
    given = given._replace(**{name: leaf.contiguous() for name, leaf in given._asdict().items()})
    runs = {"torch loop": eager(own, work.rate), "torch compile": compiled(own, work.rate)}
    return {name: Contender(waiting(run, given), to_arrays) for name, run in runs.items()}
