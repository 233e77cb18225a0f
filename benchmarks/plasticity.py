"""Plasticity: a network learns to name the same images again and again, each time with pixels and names shuffled anew.

    python benchmarks/plasticity.py --seeds 0 1 2

Every task can be learned as well as the first, since a shuffle of all pixels takes nothing from an MLP; what falls from task to
task is the network's ability to learn. Plain Adam is compared with ReDo, continual backprop and shrink-and-perturb. Each task is
seen in one pass of shuffled batches an epoch; its score is the accuracy on every batch before it is learned from, the mean over
the task. Intervals are over seeds, by Student's t.

References:
  Dohare et al., Loss of Plasticity in Deep Continual Learning, Nature 632, 2024 (https://doi.org/10.1038/s41586-024-07711-7): the
  stream of permuted images.
  Sokar, Agarwal, Castro, Evci, The Dormant Neuron Phenomenon in Deep Reinforcement Learning, ICML 2023
  (https://arxiv.org/abs/2302.12902): ReDo.

Differs from the papers in: images are 50 of Omniglot's classes at 14 x 14, not MNIST.
"""

import argparse
import time
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
SIZE, EPOCHS = 16, 4  # of a batch, of a task
BLOCK = 20  # tasks of a point of the curve


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
    each = epoch_steps(examples, SIZE)

    def at(key, source, step, act):
        task, epoch = step // (each * EPOCHS), step // each
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), task))
        pixels, names = jax.random.permutation(keys[0], SIDE * SIDE), jax.random.permutation(keys[1], CLASSES)
        order = jax.random.permutation(jax.random.fold_in(jax.random.key(seed + 1), epoch), examples)
        chosen, mask = of_epoch(order, step % each, SIZE)
        return jm.Batch(source.x[chosen][:, pixels], names[source.y[chosen]], mask)

    return jm.Data(1, at)


def optimisers(model: jm.Model, rate: float, each: int) -> dict[str, optax.GradientTransformation]:
    """Adam, and what keeps it plastic; resets come once a task, with fresh slots."""
    return {
        "Adam": optax.adam(rate),
        "Adam, ReDo": jm.resetting(jm.adam_each(rate), jm.redo(model, tau=0.1), every=each, slots="zero"),
        "Adam, continual backprop": jm.continual_backprop(jm.adam_each(rate), model, replacement=1e-4, maturity=100),
        "Adam, shrink and perturb": jm.resetting(jm.adam_each(rate), jm.shrink_perturb(0.9, 0.01), every=each),
    }


def online(name: str, tasks: int, rate: float, seed: int) -> np.ndarray:
    """Accuracy of each task, `[tasks]`, on batches before they are learned from."""
    model, data = jm.mlp(CLASSES, hidden=HIDDEN, shape=(SIDE * SIDE,)), small_images(seed)
    examples = len(data.data.y)
    each = epoch_steps(examples, SIZE) * EPOCHS
    learner = jm.supervised(model, jm.xent, shuffled(examples, seed))
    outer = optimisers(model, rate, each)[name]
    done = jm.fit(jax.random.key(seed), learner, data, outer, tasks * each, 1, progress=False)
    return np.asarray(done.history["accuracy"]).reshape(tasks, each).mean(1)


def main() -> None:
    """All optimisers of a seed, then the next seed; results that are there are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tasks", type=int, default=400)
    parser.add_argument("--rate", type=float, default=1e-3, help="Adam's")
    parser.add_argument("--optimisers", nargs="+", help="names; all if not given")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    machine, found = begin(None, asked.out)
    names = asked.optimisers or list(optimisers(jm.mlp(CLASSES, hidden=HIDDEN, shape=(SIDE * SIDE,)), asked.rate, 1))
    for seed in asked.seeds:
        for name in names:
            row: dict[str, Any] = found.setdefault(
                f"{name}, rate {asked.rate:g}, {asked.tasks} tasks", {"machine": machine, "seeds": {}}
            )
            if str(seed) in row["seeds"]:
                continue
            start = time.perf_counter()
            scores = online(name, asked.tasks, asked.rate, seed)
            row["seeds"][str(seed)] = {"accuracy": scores.tolist(), "seconds": time.perf_counter() - start}
            write_json(asked.out, found)
            first, last = scores[:BLOCK].mean(), scores[-BLOCK:].mean()
            print(f"{name}, seed {seed}: {first:.3f} over the first {BLOCK} tasks, {last:.3f} over the last", flush=True)
    draw(found, asked.out.with_suffix(".png"))


def draw(found: dict[str, Any], path: Path) -> None:
    """A curve an optimiser, a point for every `BLOCK` tasks, and what is printed of its ends."""
    curves = {}
    for name, row in found.items():
        scores = np.array([each["accuracy"] for each in row["seeds"].values()])
        blocks = scores[:, : scores.shape[1] // BLOCK * BLOCK].reshape(len(scores), -1, BLOCK).mean(2)
        curves[name] = (BLOCK * np.arange(1, blocks.shape[1] + 1)).tolist(), blocks
        mean, half = interval(blocks[:, -1] - blocks[:, 0])
        print(f"{name}: {blocks[:, 0].mean():.3f}, then {blocks[:, -1].mean():.3f}, a change of {mean:+.3f} ± {half:.3f}")
    plot.bands(curves, path, "tasks learned", "accuracy of a task as it is learned, 95 % bands over seeds")


if __name__ == "__main__":
    main()
