"""What it saves to leave layers as they are: operations counted and time measured of the adaptation to one task, by pattern.

    python benchmarks/frozen.py

Omniglot's conv4 with 64 filters on 5 images of noise, with 5 inner steps, which are unrolled, and with 30, which are scanned;
beside that the operations of a meta-gradient in second order with 75 queries, and the time of one forward pass of the 5 images.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from machine import begin  # pyright: ignore[reportMissingImports]

import jmeta as jm
from jmeta.checkpoint import write_json
from jmeta.evaluate.cost import alternately, operations

OUT = Path(__file__).parent / "results" / "frozen.json"
PATTERNS = ("full", "full, head", "suffix(3)", "suffix(2)", "suffix(2)*2, head", "head")
STEPS = (5, 30)
WAYS, QUERIES, RATE = 5, 15, 0.4


def images(key: jax.Array, each: int) -> jm.Batch:
    """Noise, `each` of every class."""
    labels = jnp.repeat(jnp.arange(WAYS), each)
    return jm.Batch(jax.random.normal(key, (len(labels), 28, 28, 1)), labels)


def learner(text: str, steps: int) -> jm.MetaLearner:
    """MAML under a pattern."""
    net = jm.conv4(WAYS)
    return jm.maml(net, jm.xent, jm.lambda_mask(jm.pattern(net, text), optax.sgd(RATE)), jm.repeat(steps))


def measure(steps: int) -> dict[str, Any]:
    """Operations and seconds of each pattern, and of a forward pass."""
    key = jax.random.key(0)
    task = jm.Task(images(key, 1), images(key, QUERIES))
    learners = {text: learner(text, steps) for text in PATTERNS}
    theta = learners["full"].init(key)
    programs = {text: jax.jit(each.adapt).lower(key, theta, task.support).compile() for text, each in learners.items()}
    calls: dict[str, Callable[[], Any]] = {
        text: lambda program=program: program(key, theta, task.support) for text, program in programs.items()
    }
    forward = jax.jit(jm.conv4(WAYS).apply)
    calls["forward"] = lambda: forward(theta.params, task.support.x)
    for call in calls.values():
        jax.block_until_ready(call())
    seconds = dict(zip(calls, alternately(list(calls.values())), strict=True))

    def found(text):
        grad = learners[text].grad
        return {
            "operations": operations(learners[text].adapt, key, theta, task.support),
            "operations_of_meta_gradient": operations(lambda theta: grad(key, theta, task, meta_step=0)[1], theta),
            "seconds": seconds[text],
        }

    return {"patterns": {text: found(text) for text in PATTERNS}, "forward_seconds": seconds["forward"]}


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", help="jax's platform, such as cpu or cuda; jax's choice if not given")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    where, results = begin(args.platform, args.out)
    for steps in STEPS:
        row = measure(steps)
        full = row["patterns"]["full"]
        for text, each in row["patterns"].items():
            shares = ", ".join(f"{name} {each[name] / full[name]:.3f}" for name in ("operations", "seconds"))
            print(f"{steps} steps, {text:18s} {1e3 * each['seconds']:7.2f} ms; shares of full: {shares}", flush=True)
        results[f"{steps} steps"] = {"machine": where, **row}
        write_json(args.out, results)


if __name__ == "__main__":
    main()
