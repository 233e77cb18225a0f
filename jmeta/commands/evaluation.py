"""What `jmeta eval` and `jmeta search` do, which a notebook can call too."""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from jmeta import builders, checkpoint
from jmeta.commands.results import SEARCH_KEY, described, norm_of, open_run, scored
from jmeta.core import Theta
from jmeta.evaluate.search import search as find
from jmeta.mesh import task_mesh
from jmeta.presets import Config
from jmeta.rules import patterns


def evaluate(
    run: Annotated[str, tyro.conf.Positional],
    *,
    episodes: int = 600,
    split: Literal["test", "valid", "train"] = "test",
    shots: int | None = None,
    steps: int | None = None,
    pattern: str | None = None,
    seed: int = 0,
    devices: int | None = None,
) -> Path:
    """Tests a run again: other episodes, shots, inner steps or pattern than at its end.

    Args:
      run: folder of a run.
      episodes: how many.
      split: of which classes.
      shots: support images a class, as in training if not given.
      steps: inner steps; if not given those of the pattern's file, or as in the run's tests.
      pattern: layers that adapt at each inner step: a file of `jmeta search`, or text such as "suffix(2)*2, head"; the run's own if
        not given.
      seed: of the episodes.
      devices: GPUs, or cores, that the episodes are spread over; all if not given.

    Returns:
      The JSON file written into the run's folder.
    """
    config, _, theta = open_run(run)
    made_for = config.train_shots or config.shots if config.method == "snail" else config.train_shots
    config = dataclasses.replace(config, shots=config.shots if shots is None else shots, train_shots=made_for)
    config = with_pattern(config, pattern)
    config = config if steps is None else dataclasses.replace(config, test_steps=steps)
    problem = builders.make_problem(config)
    tasks = getattr(problem, split)
    if tasks is None:
        raise ValueError(f"eval: the data of {run} has no validation classes (or the run used none).")
    score = scored(config, problem, theta, tasks, episodes, seed, task_mesh(devices))
    path = checkpoint.fresh(Path(run), "eval", "json")
    checkpoint.write_json(path, {**described(config, problem, score), "split": split, "seeds": [config.seed], "test_seed": seed})
    print(f"{problem.metric_name} on {split} tasks: {score} [norm: {norm_of(config)}]")
    return path


def with_pattern(config: Config, given: str | None) -> Config:
    """The config with another pattern, from a file, whose rows are then the steps, or from text; with its own if None.

    Raises:
      ValueError: it is neither, or of another network.
    """
    if given is None:
        return config
    config, layers = builders.maskable(config), builders.make_model(config).layers
    if not given.endswith(".json") and not Path(given).is_file():
        return dataclasses.replace(config, pattern=str(patterns.pattern(layers, given)))
    found = patterns.load_pattern(given)
    if found.layers != layers:
        raise ValueError(f"pattern: {given} is for the layers {', '.join(found.layers)}; the run has {', '.join(layers)}.")
    return dataclasses.replace(config, pattern=str(found), test_steps=len(found.rows))


def search(
    run: Annotated[str, tyro.conf.Positional],
    *,
    tolerance: float = 0.01,
    episodes: int = 300,
    steps: int | None = None,
    by: Literal["latency", "throughput", "operations"] = "latency",
    rounds: int = 1,
    timed: int = 24,
    seed: int = 0,
    devices: int | None = None,
) -> Path:
    """Finds which layers need to adapt at which step: the fastest pattern that loses little on validation classes.

    Others are compared with the pattern that the run was trained with.

    Leaves a JSON file for `jmeta eval --pattern` and a picture in the run's folder. Called again with the same options, it goes on
    where it was cut off.

    Args:
      run: folder of a run.
      tolerance: accuracy that may be lost; 0.01 is a point.
      episodes: how many each pattern is scored on, the same for all.
      steps: inner steps, as in the run's tests if not given.
      by: what makes a pattern the faster: the time of one task alone, of many together, or counted operations.
      rounds: times that patterns next to the best are tried too.
      timed: patterns that are timed at most.
      seed: of the episodes.
      devices: GPUs, or cores, that the episodes are spread over; all if not given.

    Returns:
      The JSON file.
    """
    config, _, theta = open_run(run)
    steps, mesh = config.test_steps if steps is None else steps, task_mesh(devices)
    problem = builders.make_problem(config)
    if problem.valid is None:
        raise ValueError(
            f"search: the data of {run} has no validation classes (or the run used none), and test classes must not choose."
        )
    model = builders.make_model(config)
    own = {"anil": "head", "boil": "body"}.get(config.method, config.pattern)
    found = find(
        jax.random.fold_in(jax.random.key(seed), SEARCH_KEY),
        functools.partial(builders.make_masked, builders.maskable(config), steps),
        theta,
        patterns.patterns(model, steps),
        problem.valid,
        tolerance=tolerance,
        episodes=episodes,
        by=by,
        rounds=rounds,
        timed=timed,
        reference=patterns.pattern(model, own),
        path=Path(run) / f"search-{steps}steps-{episodes}episodes-seed{seed}-{_digest(theta)}.scores.json",
        mesh=mesh,
    )
    path = checkpoint.fresh(Path(run), "search", "json")
    checkpoint.write_json(path, {**found.as_dict(), "norm": norm_of(config), "versions": checkpoint.versions(), "seeds": [seed]})
    found.plot(path.with_suffix(".png"))
    print(f"{found}\n[validation classes, norm: {norm_of(config)}]")
    return path


def _digest(theta: Theta) -> str:
    """Eight letters that tell thetas apart: a run may have been gone on with."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(theta):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()[:8]
