"""A meta-step of MetaNAS, jmeta's against PyTorch's: calls in turn, each in a process of its own, medians and their ratio.

    python benchmarks/metanas_speed.py [--channels 8] [--tasks 2] [--turns 5] [--repeats 5] [--out results/metanas_speed.json]

Both on the CPU. Before anything is timed, both take the meta-step in float64 and must agree. Needs PyTorch.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from machine import begin, seconds_of  # pyright: ignore[reportMissingImports]

import jmeta as jm
from jmeta.checkpoint import write_json

RATE, DECAY, TEMPERATURE = 5e-3, 1e-3, 1.0
NAMES = ("jmeta", "torch loop")
AGREE = 1e-6  # of the distances that parameters go in float64, relative to the rate


def learner_of(args: argparse.Namespace) -> jm.MetaLearner:
    """MetaNAS with all of the support set at each step and an inner optimiser that begins anew."""
    net = jm.supernet(5, cells=args.cells, channels=args.channels, reductions=tuple(args.reductions))
    parts: Any = {
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


def contender(name: str, args: argparse.Namespace, dtype: Any) -> Any:
    """Its meta-step, which returns the distances as a list of arrays in one order for all."""
    from peers import torch_cells  # pyright: ignore[reportMissingImports]

    learner, tasks = learner_of(args), jm.episodes(jm.omniglot(split="background").train, 5, args.shots, 1)
    keys = jax.random.split(jax.random.key(args.seed), args.tasks)
    supports = jax.vmap(tasks.sample, (0, None))(keys, tasks.data).support
    given = learner.init(jax.random.key(args.seed)), supports
    theta, supports = jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, given)
    nodes = len(theta.params["alpha"]["normal"])
    if name == "jmeta":
        step = jmeta_step(learner, theta, supports)
        return step, lambda moved: [np.asarray(leaf) for leaf in torch_cells.leaves(torch_cells.to_tensors(moved, nodes))]
    network = {"cells": args.cells, "nodes": nodes, "halving": tuple(args.reductions), "temperature": TEMPERATURE}
    x, y = map(np.asarray, (supports.x, supports.y))
    tensors = torch_cells.to_tensors(theta.params, nodes)
    return torch_cells.meta_step(tensors, x, y, args.turns, RATE, DECAY, **network), lambda moved: moved


def serve(args: argparse.Namespace) -> None:
    """The process of one contender: keeps what its first call returns, then for every line that it reads the seconds of a call."""
    with jax.enable_x64(args.wide):
        run, read = contender(args.serve, args, jnp.float64 if args.wide else jnp.float32)
        first = seconds_of(run)
        if args.wide:
            np.savez(args.out, *read(run()))
        print(first, flush=True)
        for _ in sys.stdin:
            print(seconds_of(run), flush=True)


def start(name: str, args: argparse.Namespace, more: tuple[str, ...] = ()) -> tuple[subprocess.Popen, float]:
    """A contender in a process of its own, and the seconds of its first call."""
    command = [sys.executable, __file__, *sys.argv[1:], "--serve", name, *more]
    process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return process, answer(process)


def answer(process: subprocess.Popen) -> float:
    """Seconds of a call."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a contender ended with status {process.wait()}: {process.args}")
    return float(line)


def call(process: subprocess.Popen) -> float:
    """Seconds of another call."""
    print(file=process.stdin, flush=True)
    return answer(process)


def disagreement(args: argparse.Namespace) -> float:
    """The largest difference of a distance in float64, as a part of the inner rate."""
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for name in NAMES:
            path = Path(folder) / f"{name}.npz"
            start(name, args, ("--wide", "--out", str(path)))[0].kill()
            with np.load(path) as arrays:
                found.append([arrays[key] for key in arrays.files])
    return max(float(np.abs(one - other).max()) for one, other in zip(*found, strict=True)) / RATE


def main() -> None:
    """Checks, times, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"channels": 8, "cells": 4, "shots": 2, "tasks": 2, "turns": 5, "repeats": 5, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--reductions", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "metanas_speed.json")
    parser.add_argument("--serve", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--wide", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        jax.config.update("jax_platforms", "cpu")
        return serve(args)
    machine, found = begin("cpu", args.out)
    gap = disagreement(args)
    print(f"largest difference in float64: {gap:.1e} of the inner rate", flush=True)
    if not gap <= AGREE:
        raise SystemExit(f"jmeta and PyTorch differ by {gap:.1e} of the inner rate in float64; nothing was timed.")
    started = {name: start(name, args) for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(args.repeats):
        for name, (process, _) in started.items():
            seconds[name].append(call(process))
    for process, _ in started.values():
        process.kill()
    medians = {name: float(np.median(own)) for name, own in seconds.items()}
    ratio = medians["torch loop"] / medians["jmeta"]
    firsts = {name: first for name, (_, first) in started.items()}
    hidden = ("out", "serve", "wide")
    about = {name: value for name, value in vars(args).items() if name not in hidden}
    row = {"seconds": seconds, "medians": medians, "ratio": ratio, "first_call_seconds": firsts, "difference_float64": gap}
    found[f"c{args.channels}"] = {**row, "machine": machine, "work": about}
    write_json(args.out, found)
    print(f"jmeta {medians['jmeta']:.3f} s, PyTorch {medians['torch loop']:.3f} s: {ratio:.2f}x")


if __name__ == "__main__":
    main()
