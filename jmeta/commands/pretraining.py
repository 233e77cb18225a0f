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
from jmeta.evaluate.continual import Continual, continual
from jmeta.evaluate.transfer import Transfer, transfer
from jmeta.losses import xent
from jmeta.mesh import task_mesh
from jmeta.pretrain import Pretrain

TEST_KEY = 1  # folded into the seed's key
NORM = "instance"


def train(config: Pretrain, workdir: str | Path | None = None, *, name: str = "run", resume: bool = False) -> Path:
    """Pre-trains, and learns unseen classes in sequence on frozen features; leaves a run as `jmeta.commands.training.train` does.

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
    most = min(len(unseen.names), len(images.names))
    if not 1 <= config.test_classes <= most or config.test_draws < 1:
        raise ValueError(
            f"train: test_classes must be from 1 to {most}, the unseen classes and the head's outputs, and test_draws at least 1, "
            f"got {config.test_classes} and {config.test_draws}."
        )
    theta = pretrain.train(jax.random.key(config.seed), config, images, folder, resume=resume)
    plot.learning_curve(folder / "metrics.jsonl", folder / "learning_curve.png")
    key = jax.random.fold_in(jax.random.key(config.seed), TEST_KEY)
    model = pretrain.make_model(config, len(images.names))
    how: dict[str, Any] = {"classes": config.test_classes, "draws": config.test_draws, "mesh": task_mesh()}
    found = continual(key, model, xent, theta, unseen, frozen=True, **how)
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
    method: Literal["finetune", "probe", "least_squares"] | None = None,
    epochs: int | None = None,
    draws: int = 10,
    rates: tuple[float, ...] | None = None,
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
      method: what learns in transfer: all layers (if not given), the head alone, or a head that is solved for.
      epochs: how often each image is seen in transfer; once if not given.
      draws: of classes and images; as many others choose the rate.
      rates: learning rates to choose from; those of `jmeta.continual` or `jmeta.transfer` if not given.
      seed: of the draws.
      devices: GPUs, or cores, that draws are spread over; all if not given.

    Returns:
      The JSON file written into the run's folder, beside which a picture of continual's accuracies lies.

    Raises:
      ValueError: an option is the other protocol's, or as `jmeta.continual` and `jmeta.transfer` say.
    """
    strange = {"continual": {"method": method, "epochs": epochs}, "transfer": {"frozen": frozen or None}}[protocol]
    if given := [f"--{name}" for name, value in strange.items() if value is not None]:
        raise ValueError(f"eval: {' and '.join(given)} is not for --protocol {protocol}.")
    config, model, _, theta = pretrain.read(run)
    unseen, key = pretrain.make_images(config)[1], jax.random.fold_in(jax.random.key(seed), TEST_KEY)
    how: dict[str, Any] = {"classes": classes, "shots": shots, "queries": queries, "draws": draws, "mesh": task_mesh(devices)}
    how |= {} if rates is None else {"rates": rates}
    about: dict[str, Any] = {"method": method or "finetune", "epochs": 1 if epochs is None else epochs}
    if protocol == "continual":
        about = {"frozen": frozen}
    found = {"continual": continual, "transfer": transfer}[protocol](key, model, xent, theta, unseen, **about, **how)
    path = checkpoint.fresh(Path(run), f"eval-{protocol}", "json")
    about |= {"protocol": protocol, "shots": shots, "queries": queries, "test_seed": seed, "config": dataclasses.asdict(config)}
    _report(found, about, path)
    return path


def compare(results: Annotated[tuple[str, ...], tyro.conf.Positional], *, out: str) -> Path:
    """Draws the accuracy on the classes learned so far, a curve for each result of `--protocol continual`.

    To train learners in turn on the same tasks instead: `jmeta compare --learners maml protonet --help`.

    Args:
      results: its JSON files; a folder of a run stands for its result.json.
      out: the PNG to write, which must not be there yet.

    Returns:
      The PNG.
    """
    files = [path / "result.json" if (path := Path(each)).is_dir() else path for each in results]
    if not files:
        raise ValueError("compare: name at least one JSON file of jmeta eval RUN --protocol continual, or a folder of a run.")
    if Path(out).suffix != ".png":
        raise ValueError(f"compare: --out must be a file's name that ends in .png, got {out}.")
    if Path(out).exists():
        raise FileExistsError(f"compare: {out} exists already; give --out another name.")
    found = [_result(path) for path in files]
    curves = {str(path): (each["checkpoints"], np.array(each["running"], float)) for path, each in zip(results, found, strict=True)}
    plot.by_classes(curves, Path(out))
    return Path(out)


def _result(path: Path) -> dict[str, Any]:
    """What `_report` wrote of `--protocol continual`."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"compare: {path} is no JSON file: {error}") from None
    if not isinstance(found, dict) or not {"running", "checkpoints"} <= set(found):
        raise ValueError(f"compare: {path} is no result of --protocol continual.")
    return found


def _report(found: Continual | Transfer, about: dict[str, Any], path: Path) -> None:
    """Writes a result that can stand alone, and a picture of continual's, and prints it."""
    shared = {"rate": found.rate, "tried": {f"{rate:g}": score for rate, score in found.tried.items()}}
    if isinstance(found, Continual):
        (mean, half), draws = found.final, len(found.matrix)
        own = {
            "classes": found.matrix.shape[-1],
            "checkpoints": found.checkpoints,
            "running": found.running.tolist(),
        }
        own |= {"forgetting": found.forgetting, "backward": found.backward, "forward": found.forward}
        own |= {"final": found.matrix[:, -1].mean(-1).tolist(), "matrix": found.matrix.mean(0).tolist()}
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
    checkpoint.write_json(path, checkpoint.without_nan({**figures, **own, **shared, **about}))
    learned = "" if "frozen" not in about else ", the head alone learned" if about["frozen"] else ", all layers learned"
    print(f"accuracy on unseen classes{learned}: {found} [norm: {NORM}]")
