"""What the command line does with pre-training: `jmeta train zap-asb-omniglot`, `eval RUN --protocol continual`, `compare`."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from jmeta import checkpoint, plot, pretrain
from jmeta.evaluate import draws as drawing
from jmeta.evaluate.continual import RATES, Continual, continual
from jmeta.evaluate.transfer import Transfer, transfer
from jmeta.losses import xent
from jmeta.mesh import task_mesh
from jmeta.pretrain import Pretrain
from jmeta.train import fit

TEST_KEY = 1  # folded into the seed's key
NORM = "instance"


def train(config: Pretrain, workdir: str | Path | None = None, *, name: str = "run", resume: bool = False) -> Path:
    """Pre-trains, and learns unseen classes in sequence on frozen features; leaves a run as `jmeta.commands.train` does.

    Args:
      config: what to train.
      workdir: a new folder; `runs/NAME-DATE-TIME` if None.
      name: of the preset, for that folder.
      resume: go on with the run in workdir.

    Returns:
      The folder.

    Raises:
      ValueError, FileExistsError, FloatingPointError: as `jmeta.fit` and the data say.
    """
    folder = Path(workdir) if workdir else Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    checkpoint.check_workdir(folder, resume)
    images, unseen = pretrain.make_images(config)
    if config.test_classes > len(unseen.names):
        raise ValueError(f"train: test_classes is {config.test_classes}, but there are {len(unseen.names)} unseen classes.")
    learner, outer = pretrain.make_learner(config, len(images.names)), pretrain.make_outer(config, len(images.pixels))
    done = fit(
        jax.random.key(config.seed),
        learner,
        pretrain.make_tasks(config, images),
        outer,
        config.steps,
        1,
        workdir=folder,
        resume=resume,
        config=config,
        labels=images.names,
        save_every=config.save_every,
    )
    plot.learning_curve(folder / "metrics.jsonl", folder / "learning_curve.png")
    key = jax.random.fold_in(jax.random.key(config.seed), TEST_KEY)
    model = pretrain.make_model(config, len(images.names))
    how: dict[str, Any] = {"classes": config.test_classes, "draws": config.test_draws, "mesh": task_mesh()}
    found = continual(key, model, xent, done.theta, unseen, frozen=True, **how)
    _report(found, {"protocol": "continual", "frozen": True, "config": dataclasses.asdict(config)}, folder / "result.json")
    return folder


def evaluate(
    run: Annotated[str, tyro.conf.Positional],
    *,
    protocol: Literal["continual", "transfer"],
    classes: int = 50,
    shots: int = 15,
    queries: int = 5,
    frozen: bool = False,
    method: Literal["finetune", "probe", "least_squares"] = "finetune",
    epochs: int = 1,
    draws: int = 10,
    rates: tuple[float, ...] = RATES,
    seed: int = 0,
    devices: int | None = None,
) -> Path:
    """Lets a pre-trained network learn unseen classes: one after another, or all together.

    Args:
      run: folder of a run of pre-training.
      protocol: continual learns an image at a time, class after class; transfer from shuffled batches.
      classes: how many are learned.
      shots: images of a class learned from.
      queries: other images of a class, tested on.
      frozen: whether the head alone learns, in continual.
      method: what learns in transfer: all layers, the head alone, or a head that is solved for.
      epochs: how often each image is seen in transfer.
      draws: of classes and images; as many others choose the rate.
      rates: learning rates to choose from.
      seed: of the draws.
      devices: GPUs, or cores, that draws are spread over; all if not given.

    Returns:
      The JSON file written into the run's folder, beside which a picture of continual's accuracies lies.
    """
    config, model, _, theta = pretrain.read(run)
    unseen, key = pretrain.make_images(config)[1], jax.random.fold_in(jax.random.key(seed), TEST_KEY)
    how: dict[str, Any] = {"classes": classes, "shots": shots, "queries": queries, "draws": draws, "rates": rates}
    how["mesh"] = task_mesh(devices)
    if protocol == "continual":
        found, about = continual(key, model, xent, theta, unseen, frozen=frozen, **how), {"frozen": frozen}
    else:
        found = transfer(key, model, xent, theta, unseen, method=method, epochs=epochs, **how)
        about = {"method": method, "epochs": epochs}
    path = checkpoint.fresh(Path(run), f"eval-{protocol}", "json")
    about |= {"protocol": protocol, "shots": shots, "queries": queries, "test_seed": seed, "config": dataclasses.asdict(config)}
    _report(found, about, path)
    return path


def compare(results: Annotated[tuple[str, ...], tyro.conf.Positional], *, out: str) -> Path:
    """Draws the accuracy on the classes learned so far, a curve for each result of `--protocol continual`.

    Args:
      results: its JSON files; a folder of a run stands for its result.json.
      out: the PNG to write, which must not be there yet.

    Returns:
      The PNG.
    """
    files = [path / "result.json" if (path := Path(each)).is_dir() else path for each in results]
    if not files:
        raise ValueError("compare: name at least one JSON file of jmeta eval RUN --protocol continual, or a folder of a run.")
    if Path(out).exists():
        raise FileExistsError(f"compare: {out} exists already; give --out another name.")
    found = [json.loads(path.read_text()) for path in files]
    wrong = [str(path) for path, each in zip(files, found, strict=True) if not {"running", "checkpoints"} <= set(each)]
    if wrong:
        raise ValueError(f"compare: {', '.join(wrong)}: no result of --protocol continual.")
    curves = {str(path): (each["checkpoints"], np.array(each["running"], float)) for path, each in zip(results, found, strict=True)}
    plot.by_classes(curves, Path(out))
    return Path(out)


def _report(found: Continual | Transfer, about: dict[str, Any], path: Path) -> None:
    """Writes a result that can stand alone, and a picture of continual's, and prints it."""
    shared = {"rate": found.rate, "tried": {f"{rate:g}": score for rate, score in found.tried.items()}}
    if isinstance(found, Continual):
        (mean, half), draws = found.final, len(found.matrix)
        own = {
            "classes": found.matrix.shape[-1],
            "checkpoints": found.checkpoints,
            "running": [[None if np.isnan(each) else each for each in row] for row in found.running.tolist()],
        }
        own |= {"forgetting": found.forgetting, "backward": found.backward, "matrix": found.matrix.mean(0).tolist()}
        found.plot(path.with_suffix(".png"))
    else:
        (mean, half), draws, own = drawing.interval(found.accuracy), len(found.accuracy), {}
    figures = {
        "metric": "accuracy",
        "mean": mean,
        "interval95": half,
        "draws": draws,
        "norm": NORM,
        "versions": checkpoint.versions(),
    }
    checkpoint.write_json(path, {**figures, **own, **shared, **about})
    print(f"accuracy on unseen classes: {found} [norm: {NORM}]")
