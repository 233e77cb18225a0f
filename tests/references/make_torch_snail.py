"""Makes the arrays that `tests/models/test_snail.py` compares SNAIL's blocks with, by PyTorch in float64.

Run from the root of the repository with torch and numpy alone: `python -m tests.references.make_torch_snail`.

The file holds a sequence `x [T, C]`; weights as `dense/<filter|gate>/<kernel|bias>` with kernels `[2, C, D]`, and
`attention/<query|key|value>/<kernel|bias>`; and `dense<dilation>` and `attention`, what the blocks make of the sequence.
"""

from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

LENGTH, WIDTH, FEATURES, KEYS, VALUES = 11, 6, 4, 3, 5


def dense(x: torch.Tensor, weights: dict[str, torch.Tensor], dilation: int) -> torch.Tensor:
    """Two causal convolutions as `F.conv1d` does them, and their gate."""

    def convolve(name):
        kernel = weights[f"dense/{name}/kernel"].permute(2, 1, 0)  # [D, C, 2]
        return F.conv1d(F.pad(x.T[None], (dilation, 0)), kernel, weights[f"dense/{name}/bias"], dilation=dilation)[0].T

    return torch.cat([x, torch.tanh(convolve("filter")) * torch.sigmoid(convolve("gate"))], 1)


def attention(x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """PyTorch's own causal attention."""
    query, key, value = (
        (x @ weights[f"attention/{name}/kernel"] + weights[f"attention/{name}/bias"])[None] for name in ("query", "key", "value")
    )
    return torch.cat([x, F.scaled_dot_product_attention(query, key, value, is_causal=True)[0]], 1)


def main() -> None:
    """Writes `snail.npz` beside this file."""
    rng = np.random.default_rng(0)
    shapes = {f"dense/{name}": (2, WIDTH, FEATURES) for name in ("filter", "gate")}
    shapes |= {f"attention/{name}": (WIDTH, size) for name, size in (("query", KEYS), ("key", KEYS), ("value", VALUES))}
    arrays = {f"{name}/kernel": rng.normal(size=shape) for name, shape in shapes.items()}
    arrays |= {f"{name}/bias": rng.normal(size=shape[-1]) for name, shape in shapes.items()}
    weights, x = {name: torch.tensor(array) for name, array in arrays.items()}, torch.tensor(rng.normal(size=(LENGTH, WIDTH)))
    made = {f"dense{dilation}": dense(x, weights, dilation).numpy() for dilation in (1, 2, 4, 16)}
    made["attention"] = attention(x, weights).numpy()
    np.savez_compressed(Path(__file__).with_name("snail.npz"), x=x.numpy(), **arrays, **made)


if __name__ == "__main__":
    main()
