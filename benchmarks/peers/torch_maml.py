"""MAML in PyTorch, as PyTorch users write and tune it, on the CPU or, where jax computes on one, on a GPU.

Three ways of running the tasks, with the same numbers:

- `loop`: one task after another, `torch.autograd.grad(create_graph=True)` inside, `backward()` outside;
- `vmapped`: `torch.func.vmap` over tasks of `torch.func.grad`;
- `compiled`: one task after another, each a `torch.compile`d `torch.func.grad`.

Inside, images and kernels are NCHW and OIHW in shape and channels-last in memory, which is a little faster on a CPU.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch.func import grad, grad_and_value, vmap  # pyright: ignore[reportMissingImports]

from jmeta.mesh import usable_cores
from peers import Arrays, Contender  # pyright: ignore[reportMissingImports]

ON_GPU = jax.default_backend() == "gpu"
if ON_GPU and not torch.cuda.is_available():
    raise ImportError("this PyTorch has no CUDA, while jax computes on a GPU")
if ON_GPU:  # as jax does by itself
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
torch.set_num_threads(usable_cores())

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
STRIDE = 2
EPSILON = 1e-5
VMAP_CHUNK = 4  # on a CPU with two cores the fastest of 1, 2, 4, 8 and all 32 tasks of conv4

Params = dict[str, torch.Tensor]
Outputs = Callable[[Params, torch.Tensor], torch.Tensor]
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
    kernels = {name: torch.tensor(a.transpose(3, 2, 0, 1), device=DEVICE) for name, a in arrays.items() if a.ndim == 4}
    kernels = {name: kernel.contiguous(memory_format=torch.channels_last) for name, kernel in kernels.items()}
    return {name: kernels[name] if name in kernels else torch.tensor(a, device=DEVICE) for name, a in arrays.items()}


def to_arrays(params: Params) -> dict[str, np.ndarray]:
    """Weights, gradients or means, back in jmeta's layout."""
    arrays = {name: p.detach().cpu().numpy() for name, p in params.items()}
    return {name: a.transpose(2, 3, 1, 0) if a.ndim == 4 else a for name, a in arrays.items()}


def to_episodes(arrays: tuple[np.ndarray, ...]) -> Episodes:
    """Episodes from images `[tasks, n, height, width, channels]`, or numbers `[tasks, n, 1]`, and their targets."""
    xs = [torch.tensor(x, device=DEVICE) for x in arrays[::2]]
    xs = [x if x.ndim == 3 else x.movedim(-1, -3) for x in xs]
    ys = [torch.tensor(y, device=DEVICE, dtype=None if y.ndim == 3 else torch.int64) for y in arrays[1::2]]
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


def conv4(params: Params, x: torch.Tensor, pool: bool = False) -> torch.Tensor:
    """Logits of conv4 for images `[n, channels, size, size]`."""
    for number in range(1, 5):
        x = block(params, f"block{number}", x, pool)
    features = x.permute(0, 2, 3, 1).flatten(1) if pool else x.mean((2, 3))
    return features @ params["head/kernel"] + params["head/bias"]


def pooled(params: Params, x: torch.Tensor) -> torch.Tensor:
    """As `conv4`, with max-pooling."""
    return conv4(params, x, pool=True)


def mlp(params: Params, x: torch.Tensor) -> torch.Tensor:
    """Outputs of two hidden layers for `x[n, 1]`."""
    for name in ("layer1", "layer2"):
        x = F.relu(x @ params[f"{name}/dense/kernel"] + params[f"{name}/dense/bias"])
    return x @ params["head/kernel"] + params["head/bias"]


NETWORKS: dict[str, Outputs] = {"mlp": mlp, "conv4": conv4, "pooled": pooled}


def loss_of(network: str) -> Loss:
    """The loss of one of `NETWORKS`, `(params, x, y) -> scalar`: squared error for the MLP, cross-entropy for images."""
    outputs, error = NETWORKS[network], F.mse_loss if network == "mlp" else F.cross_entropy
    return lambda params, x, y: error(outputs(params, x), y)


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


def chunk_of(episodes: Episodes) -> int:
    """Tasks that are vmapped together: those of an MLP and of a GPU all."""
    return len(episodes.support_y) if ON_GPU or episodes.support_x.ndim == 3 else VMAP_CHUNK


def vmapped(loss: Loss, *, rate: float, steps: int, order: int) -> Run:
    """`chunk_of` tasks at a time through `torch.func.vmap`. Otherwise as `loop`."""
    task = _task_gradient(loss, rate, steps, order)

    def run(params, episodes):
        grads, losses = vmap(task, (None, 0, 0, 0, 0), chunk_size=chunk_of(episodes))(params, *episodes)
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


def use(work, task: Callable) -> Callable[[Params, Episodes], Params]:
    """What adapted parameters are used for: `task(params, support x, support y) -> phi`, over tasks one after another."""
    outputs = NETWORKS[work.network]

    def run(params, episodes):
        total = {}
        for support_x, support_y, query_x, query_y in zip(*episodes, strict=True):
            found = task(params, support_x, support_y)
            if work.kind == "evaluate":
                with torch.no_grad():
                    found = {"accuracy": (outputs(found, query_x).argmax(-1) == query_y).to(query_x.dtype).mean()}
            total = {name: total[name] + f if total else f for name, f in found.items()}
        return {name: t.detach() / len(episodes.support_y) for name, t in total.items()}

    return run


def use_vmapped(work, task: Callable) -> Callable[[Params, Episodes], Params]:
    """As `use`, `chunk_of` tasks at a time."""
    outputs = NETWORKS[work.network]

    def one(params, support_x, support_y, query_x, query_y):
        phi = task(params, support_x, support_y)
        if work.kind == "adapt":
            return phi
        return {"accuracy": (outputs(phi, query_x).argmax(-1) == query_y).to(query_x.dtype).mean()}

    together = vmap(one, (None, 0, 0, 0, 0))

    def run(params, episodes):
        total, count, chunk = {}, len(episodes.support_y), chunk_of(episodes)
        for start in range(0, count, chunk):
            found = together(params, *(leaf[start : start + chunk] for leaf in episodes))
            total = {name: total[name] + f.sum(0) if total else f.sum(0) for name, f in found.items()}
        return {name: t / count for name, t in total.items()}

    return run


def _users(work, loss: Loss) -> dict[str, Callable]:
    """The three ways of adapting without a meta-gradient."""

    def by_tape(params, x, y):
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        phi = adapt(loss, leaves, x, y, rate=work.rate, steps=work.steps, order=1)
        return {name: p.detach() for name, p in phi.items()}

    def by_function(params, x, y):
        for _ in range(work.steps):
            grads = grad(loss)(params, x, y)
            params = {name: p - work.rate * grads[name] for name, p in params.items()}
        return params

    return {
        "loop": use(work, by_tape),
        "vmap": use_vmapped(work, by_function),
        "compile": use(work, torch.compile(by_function)),
    }


def _trainers(work, loss: Loss) -> dict[str, Callable]:
    """The three ways of a meta-gradient."""

    def named(run):
        def result(params, episodes):
            value, grads = run(params, episodes)
            return {**grads, "loss": value}

        return result

    options = {"rate": work.rate, "steps": work.steps, "order": work.order}
    ways = {"loop": loop, "vmap": vmapped, "compile": compiled}
    return {name: named(way(loss, **options)) for name, way in ways.items()}


def contenders(work, params: Arrays, episodes: tuple[np.ndarray, ...]) -> dict[str, Contender]:
    """PyTorch's three ways."""
    own_params, own_episodes = to_params(params), to_episodes(episodes)
    runs = (_trainers if work.kind == "train" else _users)(work, loss_of(work.network))
    return {f"torch {name}": Contender(waiting(run, own_params, own_episodes), to_arrays) for name, run in runs.items()}


def waiting(run: Callable, *arguments) -> Callable[[], Params]:
    """`run(*arguments)`, done before it returns."""

    def done():
        result = run(*arguments)
        if ON_GPU:
            torch.cuda.synchronize()
        return result

    return done
