"""What a run of `jm.fit` spends beside its meta-gradients: on sampling the episodes, and in Python between dispatches.

    python benchmarks/overhead.py

For each kind of work these take turns, and medians of their seconds a meta-step are compared: the compiled meta-steps in one
program, the same on one fixed batch of episodes in place of fresh ones, and the sampling of one device's share alone. In Python,
`fit` dispatches, logs and looks for numbers that are not finite; the device waits meanwhile.
"""

import argparse
import cProfile
import functools
import pstats
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from machine import begin, seconds_of  # pyright: ignore[reportMissingImports]
from work import ROWS, Work, learner_of, tasks_of  # pyright: ignore[reportMissingImports]

import jmeta as jm
from jmeta.checkpoint import write_json
from jmeta.core import default_chunk
from jmeta.mesh import count_devices, replicate, share
from jmeta.train import meta_step

OUT = Path(__file__).parent / "results" / "overhead.json"
STEPS = {"sinusoid": 4000, "omniglot-5w1s": 20}
OUTER = optax.adam(1e-3)


def programs(work: Work, steps: int) -> dict[str, Callable[[], Any]]:
    """What is timed, each of `steps` meta-steps."""
    learner, tasks, key = learner_of(work), tasks_of(work), jax.random.key(0)
    mesh = jm.task_mesh(share(work.tasks, jax.device_count()))
    theta = learner.init(key)
    chunk = default_chunk(theta.params, work.tasks // count_devices(mesh))
    draw = jax.vmap(tasks.sample, (0, None))
    fixed = draw(jax.random.split(key, work.tasks), tasks.data)

    def repeat(sample, data, staged):
        step = meta_step(learner, sample, OUTER, work.tasks, chunk, mesh)

        def body(number, carry):
            return tuple(step(jax.random.fold_in(key, number), carry, data, number, staged)[0])

        return jax.lax.fori_loop(0, steps, body, (theta, OUTER.init(theta)))

    def sampling(data):
        def body(number, total):
            batch = draw(jax.random.split(jax.random.fold_in(key, number), work.tasks // count_devices(mesh)), data)
            return total + sum(leaf.sum() for leaf in jax.tree.leaves(batch))

        return jax.lax.fori_loop(0, steps, body, jnp.zeros(()))

    fresh = jax.jit(lambda data: repeat(tasks.sample, data, False))
    same = jax.jit(lambda data: repeat(lambda key, task: task, data, True))
    alone = jax.jit(sampling)
    shared = replicate((tasks.data, fixed), mesh)

    return {
        "meta-step": lambda: jax.block_until_ready(fresh(shared[0])),
        "on fixed episodes": lambda: jax.block_until_ready(same(shared[1])),
        "sampling on one device": lambda: jax.block_until_ready(alone(tasks.data)),
    }


def python_share(work: Work, steps: int) -> float:
    """The part of `fit`'s loop in which Python does not wait for the device, by the profiler, whose own cost is in it."""
    mesh = jm.task_mesh(share(work.tasks, jax.device_count()))
    fit = functools.partial(jm.fit, jax.random.key(0), learner_of(work), tasks_of(work), OUTER)
    fit(1, work.tasks, mesh=mesh, progress=False)
    with cProfile.Profile() as profile:
        fit(steps, work.tasks, mesh=mesh, progress=False)
    stats = pstats.Stats(profile).stats  # pyright: ignore[reportAttributeAccessIssue]
    spent = {name: row[3] for (_, _, name), row in stats.items() if name in ("_loop", "block_until_ready")}
    return 1 - spent["block_until_ready"] / spent["_loop"]


def measure(work: Work, steps: int, repeats: int) -> dict[str, Any]:
    """Seconds a meta-step, and the shares of sampling and of Python."""
    runs = programs(work, steps)
    times = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            taken = seconds_of(run) / steps
            if number:
                times[name].append(taken)
    seconds = {name: statistics.median(each) for name, each in times.items()}
    return {
        "work": work._asdict(),
        "steps": steps,
        "repeats": repeats,
        "seconds": seconds,
        "sampling_share": seconds["sampling on one device"] / seconds["meta-step"],
        "fresh_against_fixed": seconds["meta-step"] / seconds["on fixed episodes"] - 1,
        "python_share": python_share(work, steps),
    }


def main() -> None:
    """Measures, prints and writes every row."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--platform", help="jax's platform, such as cpu or cuda; jax's choice if not given")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    where, found = begin(args.platform, args.out)
    for row in args.rows:
        found[row] = {"machine": where, **measure(ROWS[row], STEPS[row], args.repeats)}
        each = found[row]
        shares = [f"{100 * each[name]:.1f} %" for name in ("sampling_share", "fresh_against_fixed", "python_share")]
        print(f"{row}: {1e3 * each['seconds']['meta-step']:.2f} ms a meta-step; sampling {shares[0]} alone,")
        print(f"  {shares[1]} against fixed episodes; Python {shares[2]}", flush=True)
        write_json(args.out, found)


if __name__ == "__main__":
    main()
