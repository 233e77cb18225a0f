"""Using a run from code: `save` and `load`."""

from pathlib import Path
from typing import Any

import jax

from jmeta import builders, checkpoint, presets, pretrain
from jmeta.core import MetaLearner, Theta


def save(path: str | Path, config: Any, theta: Theta, labels: tuple[str, ...] = ()) -> Path:
    """Saves a theta that was trained in memory, as a run that `load` reads.

    Args:
      path: a new folder.
      config: a configuration of `jmeta train`, from which `load` can rebuild the learner, or any dataclass or dict.
      theta: what was learned.
      labels: names of the classes trained on.

    Returns:
      The folder.

    Raises:
      FileExistsError: the folder holds something.
    """
    return checkpoint.write_theta(path, theta, config, labels)


def load(run: str | Path, learner: MetaLearner | None = None) -> tuple[MetaLearner, Theta, tuple[str, ...]]:
    """Loads what a run has learned.

    Args:
      run: folder of a run, by `jmeta train`, `fit(workdir=)` or `save`.
      learner: needed for a run that `jmeta train` did not make; otherwise the learner that the run was tested with.

    Returns:
      The learner, the best theta (the last where nothing was validated) and the names of the classes trained on.

    Raises:
      FileNotFoundError: the folder is no run, or has no whole checkpoint.
      ValueError: the checkpoint is of another model or format, or the learner is not known.
    """
    described = checkpoint.read_run(run)
    if learner is None and pretrain.from_dict(described["config"]) is not None:
        _, _, learner, theta = pretrain.read(run)
        return learner, theta, tuple(described["labels"])
    if learner is None:
        config = presets.from_dict(described["config"], run)
        learner = builders.make_learner(config, config.test_steps)
    like = jax.eval_shape(learner.init, jax.random.key(0))
    theta = checkpoint.read_theta(Path(run).absolute(), like)
    return learner, jax.tree.map(jax.numpy.asarray, theta), tuple(described["labels"])
