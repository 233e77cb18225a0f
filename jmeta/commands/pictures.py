"""What `jmeta plot` and `jmeta derive` do, which a notebook can call too."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from jmeta import builders, checkpoint, presets
from jmeta.architecture import genotype, save_genotype, weighed
from jmeta.commands.results import EPISODE_KEY, ROUTING_KEY, norm_of, open_run
from jmeta.core import MetaLearner, Theta
from jmeta.evaluate import routing as routes
from jmeta.presets import Config

ROUTED_WAYS = 5  # of the tasks whose channels are compared, at most: few alphabets have 40 classes
RETRAINED = (  # what a derived network shares with its supernet
    *("dataset", "source", "split", "rotate", "classes", "without", "ways", "shots", "seed"),
    *("genotype", "cells", "reductions", "filters", "norm", "precision"),
)


def plot(run: Annotated[str, tyro.conf.Positional], *, routing: bool = False, cells: bool = False) -> list[Path]:
    """Draws the learning curve, the score against inner steps, and one test episode with its predictions.

    Args:
      run: folder of a run.
      routing: draw instead which channels the test tasks of each alphabet choose, and how far they agree; for a run of nrml.
      cells: draw instead the cells of the meta-learned architecture and of two test tasks, and the alphas over meta-training; for
        a run of metanas.

    Returns:
      The files in the run's folder, PNG but for `routing.json` and `cells.json`; they are written anew.

    Raises:
      ValueError: both are asked for, or one for a run of another method.
      FileExistsError: `cells.json` is there and holds something else.
    """
    from jmeta import plot as draw

    if routing and cells:
        raise ValueError("plot: --routing is for runs of nrml and --cells for runs of metanas; give one of them.")
    folder = Path(run)
    config, learner, theta = open_run(run)
    if routing:
        return _plot_routing(config, learner, theta, folder)
    if cells:
        return _plot_cells(config, learner, theta, folder)
    paths = [folder / "learning_curve.png"]
    draw.learning_curve(folder / "metrics.jsonl", paths[0])
    if (folder / "result.json").is_file():
        paths.append(folder / "inner_steps.png")
        draw.by_inner_step(json.loads((folder / "result.json").read_text()), paths[-1])
    if config.dataset != "sinusoid":
        paths.append(folder / "episode.png")
        _draw_episode(config, learner, theta, paths[-1])
    return paths


def _plot_routing(config: Config, learner: MetaLearner, theta: Theta, folder: Path) -> list[Path]:
    splits = builders.make_splits(config) if config.method == "nrml" else None
    if splits is None:
        raise ValueError(f"plot: {folder} is of method {config.method}, which chooses no channels; --routing is for nrml.")
    key, ways = jax.random.fold_in(jax.random.key(config.seed), ROUTING_KEY), min(config.ways, ROUTED_WAYS)
    found = routes.routing(key, learner, theta, splits.test, config.keep, ways=ways, shots=config.shots)
    paths = [folder / "routing.json", folder / "routing.png"]
    checkpoint.write_json(paths[0], {**found.figures(), "ways": ways, "norm": norm_of(config), "versions": checkpoint.versions()})
    found.plot(paths[1])
    print(f"{found} [norm: {norm_of(config)}]")
    return paths


def _plot_cells(config: Config, learner: MetaLearner, theta: Theta, folder: Path) -> list[Path]:
    from jmeta import plot as draw

    if config.method != "metanas":
        raise ValueError(f"plot: {folder} is of method {config.method}, which has no cells to draw; --cells is for metanas.")
    tasks, found = builders.make_problem(config).test, {"meta-model": theta.params}
    for number, key in enumerate(jax.random.split(jax.random.fold_in(jax.random.key(config.seed), EPISODE_KEY)), 1):
        key_task, key_learn = jax.random.split(key)
        support = tasks.draw(key_task).support
        found[f"task {number}"] = jax.jit(learner.adapt)(key_learn, theta, support).params
    paths = [folder / "cells.json", folder / "cells.png", folder / "alphas.png"]
    if paths[0].exists() and "meta-model" not in json.loads(paths[0].read_text()):
        raise FileExistsError(f"plot: {paths[0]} holds something else, perhaps a genotype; move it away.")
    checkpoint.write_json(paths[0], {name: genotype(params)._asdict() for name, params in found.items()})
    draw.cells({name: weighed(params, builders.COLDEST) for name, params in found.items()}, paths[1])
    draw.shares(folder / "metrics.jsonl", paths[2], builders.COLDEST)
    return paths


def _draw_episode(config: Config, learner: MetaLearner, theta: Theta, path: Path) -> None:
    from jmeta import plot as draw

    key_task, key_learn = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), EPISODE_KEY))
    tasks = builders.make_problem(config).test
    task = tasks.draw(key_task)
    phi = jax.jit(learner.adapt)(key_learn, theta, task.support)
    guesses = np.asarray(jax.jit(learner.predict)(phi, task.query.x)).argmax(-1)

    def grid(leaf):
        return np.asarray(leaf).reshape(config.ways, -1, *leaf.shape[1:])

    draw.episode(grid(task.support.x), grid(task.query.x), grid(task.query.y), grid(guesses), path)


def derive(run: Annotated[str, tyro.conf.Positional], *, out: str | None = None) -> Path:
    """Writes the discrete architecture that a run of metanas came to, for `jmeta train PRESET --genotype FILE`.

    Args:
      run: folder of a run.
      out: JSON file to write; a new one in the run's folder if not given.

    Returns:
      The file.

    Raises:
      ValueError: the run is of another method.
      FileExistsError: `out` exists.
    """
    config, _, theta = open_run(run)
    if config.method != "metanas":
        raise ValueError(f"derive: {run} is of method {config.method}, which has no architecture to derive; metanas has.")
    found = genotype(theta.params)
    path = Path(out) if out else checkpoint.fresh(Path(run), "genotype", "json")
    save_genotype(path, found)
    derived = dataclasses.replace(config, method="reptile", genotype=path.read_text())
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (theta.params["w"], _shapes(derived))]
    for kind, nodes in found._asdict().items():
        for number, choices in enumerate(nodes):
            print(f"{kind} node {number}: {', '.join(f'{op} of input {source}' for op, source in choices)}")
    print(f"{sizes[1]:,} parameters at the width of the supernet, which has {sizes[0]:,}")
    print(f"{_retraining(config, path)}   trains it")
    return path


def _retraining(config: Config, path: Path) -> str:
    """The command that trains the derived network on the same classes."""
    source = "colour84" if config.dataset == "colour84" else "omniglot"
    named = f"reptile-{source}-{config.ways}w{config.shots}s"
    name = named if named in presets.PRESETS else f"reptile-{source}-5w1s"
    wanted, default = dataclasses.replace(config, genotype=str(path)), presets.preset(name)
    words = [name]
    for field in RETRAINED:
        value = getattr(wanted, field)
        if value == getattr(default, field):
            continue
        values = () if isinstance(value, bool) else value if isinstance(value, tuple) else (value,)
        words += [f"--{'no-' * (value is False)}{field}", *map(str, values)]
    return f"jmeta train {shlex.join(words)}"


def _shapes(config: Config) -> Any:
    """The shapes of a network's parameters."""
    return jax.eval_shape(builders.make_model(config).init, jax.random.key(0))
