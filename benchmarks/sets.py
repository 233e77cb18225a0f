"""Networks with their tasks, on which benchmarks train: Omniglot at 28 pixels, Caltech-101 at 84 pixels in colour."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jmeta as jm
from jmeta.mesh import share

CALTECH = "caltech101_84_31each.npz"
BATCH = {"5w1s": 32, "5w5s": 8, "20w1s": 4}  # tasks of a meta-step on Omniglot; on Caltech-101 4
TRAIN_KEY, VALID_KEY, TEST_KEY, SHIFT_KEY = range(4)  # folded into a seed's key


def caltech() -> str | None:
    """Caltech-101 where JMETA_DATA_DIR holds it."""
    place = Path(os.environ.get("JMETA_DATA_DIR", ".")) / CALTECH
    return str(place) if place.is_file() else None


class Set(NamedTuple):
    """A network, its tasks, and how it is trained.

    Attributes:
      model: the network.
      train, valid, test: tasks of disjoint classes.
      shift: tasks of another kind, or None.
      rate: of the inner steps, for a mean loss.
      batch: tasks of a meta-step.
    """

    model: jm.Model
    train: jm.Tasks
    valid: jm.Tasks
    test: jm.Tasks
    shift: jm.Tasks | None
    rate: float
    batch: int


def photographs(source: str, seed: int) -> jm.Splits:
    """Caltech-101 without its repeated faces, 64 classes to train on, 16 to choose, 20 to test."""
    return jm.photographs(source, without=("Faces_easy",), seed=seed)


def small_and_grey(images: jm.Images) -> jm.Images:
    """84 x 84 colours as 28 x 28 greys: means over 3 x 3 pixels and the channels."""
    blocks = images.pixels.reshape(-1, 28, 3, 28, 3, 3).mean((2, 4, 5))
    return images._replace(pixels=blocks.astype(np.uint8)[..., None])


def make_set(name: str, source: str | None, seed: int) -> Set:
    """The set of that name, such as "omniglot-5w1s" or "caltech-5w5s"."""
    data, _, kind = name.partition("-")
    ways, shots = (int(each) for each in kind.replace("s", "").split("w"))
    splits = photographs(str(source), seed) if data == "caltech" else jm.omniglot(split="customary", seed=seed)
    assert splits.valid is not None
    train, valid, test = (
        jm.episodes(images, ways, shots, queries) for images, queries in ((splits.train, 5), (splits.valid, 15), (splits.test, 15))
    )
    if data == "caltech":
        return Set(jm.conv4(ways, filters=32, pool=True, shape=(84, 84, 3)), train, valid, test, None, 0.01, 4)
    shift = None if source is None else jm.episodes(small_and_grey(photographs(source, seed).test), ways, shots, 15)
    return Set(jm.conv4(ways), train, valid, test, shift, 0.4, BATCH[kind])


def meta_train(
    learner: jm.MetaLearner,
    problem: Set,
    seed: int,
    meta_steps: int,
    folder: Path,
    about: dict[str, Any],
    *,
    before: Any = None,
    theta: jm.Theta | None = None,
) -> jm.Theta:
    """Meta-trains by Adam at 1e-3, or goes on, or takes what is there.

    Args:
      learner: what learns.
      problem: on what.
      seed: of all.
      meta_steps: how many.
      folder: of the run.
      about: kept with the run, and may not differ when it goes on.
      before: a transformation of meta-gradients in front of Adam.
      theta: to start from.
    """
    config = {"rate": problem.rate, **about, "batch": problem.batch, "seed": seed}
    adam = optax.adam(1e-3)
    return jm.fit(
        jax.random.fold_in(jax.random.key(seed), TRAIN_KEY),
        learner,
        problem.train,
        adam if before is None else optax.chain(before, adam),
        meta_steps,
        problem.batch,
        validate=jm.Validation(learner, problem.valid, 200, every=500),
        mesh=jm.task_mesh(share(problem.batch, jax.device_count())),
        workdir=folder,
        resume=True,
        theta=theta,
        config=config,
        save_every=250,
    ).theta
