"""MAML through the libraries that make a `torch.nn.Module` differentiable over its own training: higher and TorchOpt.

Each is used as its own examples do: a module, an inner optimiser from the library, one task after another, `backward()` on the
query loss. A library that is not installed is left to `contenders` to name.
"""

import importlib
from collections.abc import Callable

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from peers import Arrays, Contender  # pyright: ignore[reportMissingImports]
from peers.torch_maml import Episodes, Params, loss_of, to_arrays, to_episodes, to_params, waiting  # pyright: ignore[reportMissingImports]


class Net(torch.nn.Module):
    """A network whose forward pass is its loss; its parameters' names have dashes for jmeta's slashes."""

    def __init__(self, network: str, params: Params):
        super().__init__()
        self.loss = loss_of(network)
        for name, value in params.items():
            self.register_parameter(name.replace("/", "-"), torch.nn.Parameter(value.clone()))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Mean loss of inputs `[n, ...]` against targets `[n, ...]`."""
        return self.loss({name.replace("-", "/"): p for name, p in self.named_parameters()}, x, y)

    def gradients(self) -> Params:
        """The gradients that `backward()` left, under jmeta's names."""
        return {name.replace("-", "/"): p.grad for name, p in self.named_parameters() if p.grad is not None}


def _higher(higher, net: Net, work) -> Callable[[tuple], torch.Tensor]:
    optimiser = torch.optim.SGD(net.parameters(), lr=work.rate)

    def task(episode):
        support_x, support_y, query_x, query_y = episode
        track = work.order == 2
        with higher.innerloop_ctx(net, optimiser, copy_initial_weights=False, track_higher_grads=track) as (fast, inner):
            for _ in range(work.steps):
                inner.step(fast(support_x, support_y))
            loss = fast(query_x, query_y) / work.tasks
            if track:
                loss.backward()
            else:  # in first order the gradient at the adapted parameters is that of the first ones
                for p, g in zip(net.parameters(), torch.autograd.grad(loss, list(fast.parameters())), strict=True):
                    p.grad = g if p.grad is None else p.grad + g
        return loss.detach()

    return task


def _torchopt(torchopt, net: Net, work) -> Callable[[tuple], torch.Tensor]:
    if work.order == 1:
        raise ImportError("TorchOpt's MetaSGD has no first order")
    inner = torchopt.MetaSGD(net, lr=work.rate)
    start, state = torchopt.extract_state_dict(net, by="reference"), torchopt.extract_state_dict(inner)

    def task(episode):
        support_x, support_y, query_x, query_y = episode
        for _ in range(work.steps):
            inner.step(net(support_x, support_y))
        loss = net(query_x, query_y) / work.tasks
        loss.backward()
        torchopt.recover_state_dict(net, start)
        torchopt.recover_state_dict(inner, state)
        return loss.detach()

    return task


LIBRARIES = {"higher": _higher, "torchopt": _torchopt}


def contenders(work, params: Arrays, episodes: tuple[np.ndarray, ...], library: str) -> dict[str, Contender]:
    """One library, `higher` or `torchopt`.

    Raises:
      ImportError: it is not installed, or does not do this work.
    """
    if work.kind != "train":
        raise ImportError(f"{library} is raced at meta-gradients alone")
    net = Net(work.network, to_params(params))
    task = LIBRARIES[library](importlib.import_module(library), net, work)
    own: Episodes = to_episodes(episodes)

    def run():
        net.zero_grad()
        losses = [task(episode) for episode in zip(*own, strict=True)]
        return {**net.gradients(), "loss": torch.stack(losses).sum()}

    return {library: Contender(waiting(run), to_arrays)}
