"""Plasticity: a network learns to name the same images again and again, each time with pixels and names shuffled anew.

    python benchmarks/plasticity.py --seeds 0 1 2

Every task can be learned as well as the first, since a shuffle of all pixels takes nothing from an MLP; what falls from task to
task is the network's ability to learn. Plain Adam, at its best rate for the first task and at others, is compared with ReDo,
continual backprop and shrink-and-perturb, none of which is told when a task begins. A task's score is the accuracy on every batch
before it is learned from, the mean over the task. Intervals are over seeds, by Student's t.

References:
  Dohare et al., Loss of Plasticity in Deep Continual Learning, Nature 632, 2024 (https://doi.org/10.1038/s41586-024-07711-7): the
  stream of permuted images.
  Sokar, Agarwal, Castro, Evci, The Dormant Neuron Phenomenon in Deep Reinforcement Learning, ICML 2023
  (https://arxiv.org/abs/2302.12902): ReDo.

Differs from the papers in: images are 50 of Omniglot's classes at 14 x 14, not MNIST, seen four times a task and not once; names
are shuffled with the pixels; the optimiser of all is Adam.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from machine import begin  # pyright: ignore[reportMissingImports]

import jmeta as jm
from jmeta import plot
from jmeta.checkpoint import write_json
from jmeta.evaluate.draws import interval
from jmeta.tasks.feeds import epoch_steps, of_epoch

OUT = Path(__file__).parent / "results" / "plasticity.json"
CLASSES, SIDE, HIDDEN = 50, 14, (100, 100, 100)
SIZE, EPOCHS = 20, 4  # of a batch, of a task
BLOCK = 5  # tasks of a point of the curve
LAST = 20  # tasks that the end is judged by
EVERY = 170  # steps between two resets; a task has 200
RATE = 3e-3
OPTIMISERS: dict[str, Callable[[jm.Model, int], optax.GradientTransformation]] = {
    "Adam 1e-2": lambda model, seed: optax.adam(1e-2),
    "Adam 3e-3": lambda model, seed: optax.adam(RATE),
    "Adam 1e-3": lambda model, seed: optax.adam(1e-3),
    "ReDo, Adam 3e-3": lambda model, seed: jm.resetting(
        jm.adam_each(RATE), jm.redo(model, tau=0.1), every=EVERY, slots="zero", seed=seed
    ),
    "continual backprop, Adam 3e-3": lambda model, seed: jm.continual_backprop(
        jm.adam_each(RATE), model, replacement=1e-3, maturity=100, seed=seed
    ),
    "shrink and perturb, Adam 3e-3": lambda model, seed: jm.resetting(
        optax.adam(RATE), jm.shrink_perturb(0.8, 0.01), every=EVERY, seed=seed
    ),
}
INIT_KEY, TASK_KEY, ORDER_KEY = range(3)  # folded into a seed's key


def small_images(seed: int) -> jm.Tasks:
    """Some of Omniglot's classes at half the size, as vectors."""
    images = jm.omniglot(split="background", rotate=False).train
    chosen = np.random.default_rng(seed).choice(len(images.names), CLASSES, replace=False)
    images = jm.take_classes(images, sorted(chosen.tolist()))
    halves = images.pixels.reshape(-1, SIDE, 2, SIDE, 2).mean((2, 4)).reshape(-1, SIDE * SIDE) / 255
    batch = jm.Batch(jnp.asarray(halves, jnp.float32), jnp.repeat(jnp.arange(CLASSES), jnp.asarray(images.count)))
    return jm.Tasks(lambda key, data: jm.Task(data, data), batch, classes=CLASSES)


def shuffled(examples: int, seed: int) -> jm.Data:
    """Batches of a stream of tasks: a task's pixels and names are shuffled by the same two orders for all of its epochs."""
    each, own = epoch_steps(examples, SIZE), jax.random.key(seed)

    def at(key, source, step, act):
        task, epoch = step // (each * EPOCHS), step // each
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(own, TASK_KEY), task))
        pixels, names = jax.random.permutation(keys[0], SIDE * SIDE), jax.random.permutation(keys[1], CLASSES)
        order = jax.random.permutation(jax.random.fold_in(jax.random.fold_in(own, ORDER_KEY), epoch), examples)
        chosen, mask = of_epoch(order, step % each, SIZE)
        return jm.Batch(source.x[chosen][:, pixels], names[source.y[chosen]], mask)

    return jm.Data(1, at)


def online(name: str, tasks: int, seed: int) -> np.ndarray:
    """Accuracy of each task, `[tasks]`, on batches before they are learned from."""
    model, data = jm.mlp(CLASSES, hidden=HIDDEN, shape=(SIDE * SIDE,)), small_images(seed)
    each = epoch_steps(len(data.data.y), SIZE) * EPOCHS
    learner = jm.supervised(model, jm.xent, shuffled(len(data.data.y), seed))
    key = jax.random.fold_in(jax.random.key(seed), INIT_KEY)
    done = jm.fit(key, learner, data, OPTIMISERS[name](model, seed), tasks * each, 1, progress=False)
    return np.asarray(done.history["accuracy"]).reshape(tasks, each).mean(1)


def main() -> None:
    """All optimisers of a seed, then the next seed; results that are there are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tasks", type=int, default=200, help=f"at least {LAST}")
    parser.add_argument("--optimisers", nargs="+", choices=list(OPTIMISERS), default=list(OPTIMISERS))
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    if asked.tasks < LAST:
        parser.error(f"--tasks must be at least {LAST}, got {asked.tasks}")
    machine, found = begin(None, asked.out)
    for seed in asked.seeds:
        for name in asked.optimisers:
            row: dict[str, Any] = found.setdefault(name, {"machine": machine, "tasks": asked.tasks, "seeds": {}})
            if row["tasks"] != asked.tasks:
                parser.error(f"--tasks is {asked.tasks}, but {asked.out} has {row['tasks']} tasks of {name}; give another --out")
            if str(seed) in row["seeds"]:
                continue
            start = time.perf_counter()
            scores = online(name, asked.tasks, seed)
            row["seeds"][str(seed)] = {"accuracy": scores.tolist(), "seconds": time.perf_counter() - start}
            write_json(asked.out, found)
            print(
                f"{name}, seed {seed}: {scores[0]:.3f} on the first task, {scores[-LAST:].mean():.3f} on the last {LAST}",
                flush=True,
            )
    draw(found, asked.out.with_suffix(".png"))


def draw(found: dict[str, Any], path: Path) -> None:
    """A curve an optimiser, a point for every `BLOCK` tasks, and what is printed of its ends."""
    curves = {}
    for name, row in found.items():
        scores = np.array([each["accuracy"] for each in row["seeds"].values()])
        blocks = scores[:, : scores.shape[1] // BLOCK * BLOCK].reshape(len(scores), -1, BLOCK).mean(2)
        curves[name] = (BLOCK * np.arange(1, blocks.shape[1] + 1)).tolist(), blocks
        mean, half = interval(scores[:, -LAST:].mean(1) - scores[:, 0])
        print(f"{name}: {scores[:, 0].mean():.3f} on the first task, a change of {mean:+.3f} ± {half:.3f} on the last {LAST}")
    plot.bands(curves, path, "tasks learned", "accuracy of a task, 95 % bands")


if __name__ == "__main__":
    main()
