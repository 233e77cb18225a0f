"""ASB in PyTorch: one image after another by SGD, then a batch by Adam; eager, and with a `torch.compile`d loss.

Images are NCHW in memory, which is faster here than channels-last, and the optimisers work in place.
"""

from collections.abc import Callable

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

from peers import Arrays, Contender  # pyright: ignore[reportMissingImports]
from peers.torch_maml import EPSILON, Params, to_arrays, to_episodes, to_params, waiting  # pyright: ignore[reportMissingImports]

ADAM_RATE = 1e-3


def conv3(params: Params, x: torch.Tensor) -> torch.Tensor:
    """Logits of conv3 for images `[n, channels, size, size]`."""
    for number in range(1, 4):
        name = f"block{number}"
        x = F.conv2d(x, params[f"{name}/conv/kernel"], params[f"{name}/conv/bias"])
        scale, bias = params[f"{name}/norm/scale"], params[f"{name}/norm/bias"]
        x = F.relu(F.instance_norm(x, weight=scale, bias=bias, eps=EPSILON))
        x = F.max_pool2d(x, 2) if number < 3 else x
    return x.permute(0, 2, 3, 1).flatten(1) @ params["head/kernel"] + params["head/bias"]


def mean_loss(params: Params, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(conv3(params, x), y)


def alternation(loss: Callable, rate: float) -> Callable:
    """`(params, episodes) -> params` after all episodes, one after another."""

    def run(params, episodes):
        params = {name: p.clone().requires_grad_() for name, p in params.items()}
        leaves = list(params.values())
        inner, outer = torch.optim.SGD(leaves, lr=rate), torch.optim.Adam(leaves, lr=ADAM_RATE, fused=True)
        for sequence_x, sequence_y, batch_x, batch_y in zip(*episodes, strict=True):
            for x, y in zip(sequence_x.split(1), sequence_y.split(1), strict=True):
                _step(inner, loss(params, x, y))
            _step(outer, loss(params, batch_x, batch_y))
        return params

    return run


def _step(optimiser: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def contenders(work, params: Arrays, episodes: tuple[np.ndarray, ...]) -> dict[str, Contender]:
    """Both ways."""
    own_params = {name: p.contiguous() for name, p in to_params(params).items()}
    own_episodes = to_episodes(episodes)
    own_episodes = own_episodes._replace(**{name: leaf.contiguous() for name, leaf in own_episodes._asdict().items()})
    losses = {"torch loop": mean_loss, "torch compile": torch.compile(mean_loss)}
    runs = {name: alternation(loss, work.rate) for name, loss in losses.items()}
    return {name: Contender(waiting(run, own_params, own_episodes), to_arrays) for name, run in runs.items()}
