"""A meta-step of MetaNAS, jmeta's against PyTorch's: alternating calls in one process, medians and their ratio.

    python benchmarks/metanas_speed.py [--channels 8] [--tasks 2] [--turns 5] [--repeats 5] [--out results/metanas_speed.json]

Before anything is timed, both take the meta-step in float64 and must agree. Needs PyTorch.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from machine import begin, seconds_of  # pyright: ignore[reportMissingImports]
from peers import torch_cells  # pyright: ignore[reportMissingImports]

import jmeta as jm

RATE, DECAY, TEMPERATURE = 5e-3, 1e-3, 1.0
AGREE = 1e-6  # of the distances that parameters go in float64, relative to the rate


def learner_of(args: argparse.Namespace) -> jm.MetaLearner:
    """MetaNAS with all of the support set at each step and an inner optimiser that begins anew."""
    net = jm.supernet(5, cells=args.cells, channels=args.channels, reductions=tuple(args.reductions))
    parts = {
        "w": optax.adam(RATE, b1=0.0),
        "alpha": optax.chain(optax.add_decayed_weights(DECAY), optax.adam(RATE, b1=0.0)),
    }
    turns = jm.lambda_mask([[1, 0], [0, 1]] * args.turns, optax.partition(parts, jm.top_level), labels=("alpha", "w"))
    return jm.reptile(net, jm.xent, jm.chain(jm.mix(TEMPERATURE), turns), jm.repeat(2 * args.turns), unroll=False)


def jmeta_step(learner: jm.MetaLearner, theta: jm.Theta, supports: jm.Batch) -> Any:
    """The compiled mean over tasks, one after another, of the way that theta goes."""

    def mean(theta, supports):
        def one(total, support):
            phi = learner.adapt(jax.random.key(0), theta, support)
            return jax.tree.map(lambda t, a, b: t + (a - b) / len(supports.y), total, theta.params, phi.params), None

        return jax.lax.scan(one, jax.tree.map(jnp.zeros_like, theta.params), supports)[0]

    program = jax.jit(mean)
    return lambda: jax.block_until_ready(program(theta, supports))


def both(args: argparse.Namespace, dtype: Any) -> tuple[Any, Any]:
    """jmeta's meta-step and PyTorch's, ready to be called."""
    learner, tasks = learner_of(args), jm.episodes(jm.omniglot(split="background").train, 5, args.shots, 1)
    keys = jax.random.split(jax.random.key(args.seed), args.tasks)
    supports = jax.vmap(tasks.sample, (0, None))(keys, tasks.data).support
    theta = learner.init(jax.random.key(args.seed))
    supports, theta = jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, (supports, theta)
    )
    nodes = len(theta.params["alpha"]["normal"])
    tensors = torch_cells.to_tensors(theta.params, nodes)
    network = {"cells": args.cells, "nodes": nodes, "halving": tuple(args.reductions), "temperature": TEMPERATURE}
    x, y = map(np.asarray, (supports.x, supports.y))
    return jmeta_step(learner, theta, supports), torch_cells.meta_step(tensors, x, y, args.turns, RATE, DECAY, **network)


def disagreement(args: argparse.Namespace) -> float:
    """The largest difference of a distance in float64, as a part of the inner rate."""
    with jax.enable_x64(True):
        ours, theirs = both(args, jnp.float64)
        nodes = len(learner_of(args).init(jax.random.key(0)).params["alpha"]["normal"])
        expected = torch_cells.leaves(torch_cells.to_tensors(ours(), nodes))
        found = theirs()
    return max(float(np.abs(np.asarray(one) - other).max()) for one, other in zip(expected, found, strict=True)) / RATE


def main() -> None:
    """Checks, times, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"channels": 8, "cells": 4, "shots": 2, "tasks": 2, "turns": 5, "repeats": 5, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--reductions", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--platform")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "metanas_speed.json")
    args = parser.parse_args()
    machine, found = begin(args.platform, args.out)
    gap = disagreement(args)
    print(f"largest difference in float64: {gap:.1e} of the inner rate", flush=True)
    if gap > AGREE:
        raise SystemExit(f"jmeta and PyTorch differ by {gap:.1e} of the inner rate in float64, so there is nothing to compare.")
    runs = dict(zip(("jmeta", "torch loop"), both(args, jnp.float32), strict=True))
    row: dict[str, Any] = {name: {"first_call_seconds": seconds_of(run), "seconds": []} for name, run in runs.items()}
    for _ in range(args.repeats):
        for name, run in runs.items():
            row[name]["seconds"].append(seconds_of(run))
    medians = {name: float(np.median(own["seconds"])) for name, own in row.items()}
    row |= {"medians": medians, "ratio": medians["torch loop"] / medians["jmeta"], "difference_float64": gap}
    about = {name: value for name, value in vars(args).items() if name not in ("out", "platform")}
    found[f"c{args.channels}"] = {**row, "machine": machine, "work": about}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"jmeta {medians['jmeta']:.3f} s, PyTorch {medians['torch loop']:.3f} s: {row['ratio']:.2f}x")


if __name__ == "__main__":
    main()
