"""Makes the arrays that `tests/learners/test_maml_reference.py` compares jmeta's MAML with, by PyTorch in float64.

Run from the root of the repository with torch and numpy alone: `python -m tests.references.make_torch`.

Each file holds one task and what PyTorch makes of it, under the names

    rate, theta/<parameter>, support_x, support_y, query_x, query_y,
    steps<n>/loss, steps<n>/phi/<parameter>, steps<n>/order<k>/<parameter>

where the last is the meta-gradient, n is 1 or 3 and k is 1 or 2.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

from benchmarks.peers.torch_maml import (
    Episodes,
    Loss,
    Params,
    adapt,
    conv4_loss,
    loop,
    to_arrays,
    to_episodes,
    to_params,
)

Arrays = dict[str, np.ndarray]


def mlp_loss(params: Params, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean squared error of a ReLU network with two hidden layers, on inputs and targets `[n, 1]`."""
    for layer in ("layer1", "layer2"):
        x = F.relu(x @ params[f"{layer}/dense/kernel"] + params[f"{layer}/dense/bias"])
    return F.mse_loss(x @ params["head/kernel"] + params["head/bias"], y)


def conv4_weights(rng: np.random.Generator, filters: int, ways: int) -> Arrays:
    """Weights of every layer away from 0 and 1, so that no term of the gradient can vanish unnoticed."""
    weights, channels = {}, 1
    for block in ("block1", "block2", "block3", "block4"):
        weights[f"{block}/conv/kernel"] = rng.normal(size=(3, 3, channels, filters)) * (2 / (9 * channels)) ** 0.5
        weights[f"{block}/conv/bias"] = 0.1 * rng.normal(size=filters)
        weights[f"{block}/norm/scale"] = 1 + 0.1 * rng.normal(size=filters)
        weights[f"{block}/norm/bias"] = 0.1 * rng.normal(size=filters)
        channels = filters
    return weights | dense(rng, "head", filters, ways)


def dense(rng: np.random.Generator, name: str, inputs: int, outputs: int) -> Arrays:
    """A linear layer's kernel `[inputs, outputs]` and bias `[outputs]`."""
    kernel, bias = rng.normal(size=(inputs, outputs)) * (2 / inputs) ** 0.5, 0.1 * rng.normal(size=outputs)
    return {f"{name}/kernel": kernel, f"{name}/bias": bias}


def images(rng: np.random.Generator, ways: int, shots: int, queries: int) -> Arrays:
    """An episode of noise, 28 x 28 x 1 in bytes, which are small in a file; they count as bytes / 255."""
    task = {}
    for part, each in (("support", shots), ("query", queries)):
        task[f"{part}_x"] = rng.integers(0, 256, (ways * each, 28, 28, 1), dtype=np.uint8)
        task[f"{part}_y"] = np.repeat(np.arange(ways), each)
    return task


def wave(rng: np.random.Generator, points: int) -> Arrays:
    """A sine wave at random inputs `[points, 1]`."""
    task = {f"{part}_x": rng.uniform(-5, 5, (points, 1)) for part in ("support", "query")}
    return task | {f"{part}_y": 3 * np.sin(task[f"{part}_x"] - 1) for part in ("support", "query")}


def results(loss: Loss, theta: Params, task: Episodes, rate: float, steps: int) -> Arrays:
    """Query loss, adapted parameters and the meta-gradients of both orders for a meta-batch of one task."""
    leaves = {name: p.clone().requires_grad_() for name, p in theta.items()}
    phi = adapt(loss, leaves, task.support_x[0], task.support_y[0], rate=rate, steps=steps, order=1)
    arrays = {f"phi/{name}": a for name, a in to_arrays(phi).items()}
    for order in (1, 2):
        value, gradient = loop(loss, rate=rate, steps=steps, order=order)(theta, task)
        arrays |= {f"order{order}/{name}": a for name, a in to_arrays(gradient).items()}
        arrays["loss"] = value.numpy()
    return {f"steps{steps}/{name}": a for name, a in arrays.items()}


def write(name: str, loss: Loss, weights: Arrays, task: Arrays, episodes: Episodes, rate: float) -> None:
    """Writes `maml_<name>.npz` beside this file: what went in and what came out."""
    theta = to_params(weights)
    arrays: dict[str, Any] = {"rate": np.array(rate), **task, **{f"theta/{key}": a for key, a in weights.items()}}
    for steps in (1, 3):
        arrays |= results(loss, theta, episodes, rate, steps)
    np.savez_compressed(Path(__file__).with_name(f"maml_{name}.npz"), **arrays)


def main() -> None:
    """Writes both files."""
    rng = np.random.default_rng(0)
    task = images(rng, ways=3, shots=2, queries=3)
    batch = {name: a[None] / 255 if name.endswith("x") else a[None] for name, a in task.items()}
    write("conv4", conv4_loss, conv4_weights(rng, filters=8, ways=3), task, to_episodes(**batch), rate=0.4)

    weights = dense(rng, "layer1/dense", 1, 8) | dense(rng, "layer2/dense", 8, 8) | dense(rng, "head", 8, 1)
    task = wave(rng, points=10)
    episodes = Episodes(**{name: torch.tensor(a)[None] for name, a in task.items()})
    write("mlp", mlp_loss, weights, task, episodes, rate=0.01)


if __name__ == "__main__":
    main()
