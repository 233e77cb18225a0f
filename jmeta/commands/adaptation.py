"""What `jmeta adapt` does, which a notebook can call too: learn the classes of pictures and classify others."""

from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jmeta import builders, checkpoint, presets
from jmeta.commands.evaluation import with_pattern
from jmeta.commands.results import ADAPT_KEY, open_run
from jmeta.core import Batch, MetaLearner, Theta
from jmeta.presets import Config
from jmeta.tasks.images import Images, from_folder, invert, is_picture, read_picture

PAPER = 127  # a border brighter than this is paper: the ink is dark


def adapt(
    run: Annotated[str, tyro.conf.Positional],
    *,
    support: str,
    query: str,
    out: str | None = None,
    ink: Literal["auto", "dark", "light"] = "auto",
    pattern: str | None = None,
) -> Path:
    """Adapts a run to your own pictures: learns the classes of one folder, and says which of them other pictures show.

    Args:
      run: folder of a run.
      support: a folder a class, with a few pictures each; at most as many classes as the run was trained for.
      query: pictures to classify, in one folder or in a folder a class (the share of right ones is then printed).
      out: JSON file to write; a new one in the run's folder if not given.
      ink: whether drawings are dark on light paper, light on dark, or to be told by the brightness of the support's borders;
        photographs are taken as they are, unless "dark" is given.
      pattern: layers that adapt at each inner step: a file of `jmeta search`, or text such as "suffix(2)*2, head".

    Returns:
      The file, with a list of `{"picture", "predicted", "probabilities"}` (and `"truth"` where known).

    Raises:
      ValueError: pictures cannot be read, or there are more classes than ways.
      FileExistsError: `out` exists.
    """
    config, learner, theta = open_run(run)
    if pattern is not None:
        config = with_pattern(config, pattern)
        learner = builders.make_learner(config, config.test_steps)
    if out is not None and Path(out).exists():
        raise FileExistsError(f"adapt: out is {out}, which exists already; give another name.")
    if config.dataset == "sinusoid":
        raise ValueError(f"adapt: {run} learned sine waves, not pictures.")
    size, _, channels = presets.SHAPES[config.dataset]
    shown = from_folder(support, size=size, channels=channels)
    if len(shown.names) > config.ways:
        raise ValueError(
            f"adapt: support has {len(shown.names)} classes, but {run} was trained for {config.ways} ways; train with more."
        )
    paths, truths = _queries(Path(query))
    asked = np.stack([read_picture(path, size, channels) for path in paths])
    drawn = config.dataset not in presets.PHOTOGRAPHS
    if ink == "dark" or (ink == "auto" and drawn and _border(shown.pixels) > PAPER):
        shown, asked = invert(shown), 255 - asked
    probabilities = predict(learner, theta, shown, asked, jax.random.key(ADAPT_KEY))
    rows = _rows(paths, truths, probabilities, shown.names)
    path = Path(out) if out else checkpoint.fresh(Path(run), "predictions", "json")
    checkpoint.write_json(path, rows)
    _print_rows(rows, config)
    return path


def predict(learner: MetaLearner, theta: Theta, support: Images, pictures: np.ndarray, key: jax.Array) -> np.ndarray:
    """Adapts to a support set and classifies pictures all together.

    Args:
      learner: a few-shot learner.
      theta: what it has meta-learned.
      support: the classes to learn.
      pictures: uint8 `[N, height, width, channels]`.
      key: for the learner's own randomness.

    Returns:
      Probabilities `[N, classes]` over the support's classes.
    """
    y = np.repeat(np.arange(len(support.names), dtype=np.int32), support.count)
    phi = jax.jit(learner.adapt)(key, theta, Batch(jnp.asarray(support.pixels / 255.0, jnp.float32), jnp.asarray(y)))
    outputs = jax.jit(learner.predict)(phi, jnp.asarray(pictures / 255.0, jnp.float32))
    return np.asarray(jax.nn.softmax(outputs[:, : len(support.names)]))


def _border(pixels: np.ndarray) -> float:
    """Median brightness of the pictures' outermost pixels, 0 to 255."""
    edges = [pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]]
    return float(np.median(np.concatenate([edge.reshape(-1) for edge in edges])))


def _queries(folder: Path) -> tuple[list[Path], list[str | None]]:
    """Pictures in a folder, or in its folders, which then name the classes."""
    if not folder.is_dir():
        raise FileNotFoundError(f"adapt: query is {folder}, which is no folder.")
    paths = sorted(path for path in (*folder.glob("*"), *folder.glob("*/*")) if is_picture(path))
    if not paths:
        raise ValueError(f"adapt: query is {folder}, which holds no pictures (png, jpg, bmp, gif, webp).")
    return paths, [None if path.parent == folder else path.parent.name for path in paths]


def _rows(paths: list[Path], truths: list[str | None], probabilities: np.ndarray, names: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for path, truth, own in zip(paths, truths, probabilities, strict=True):
        row = {"picture": str(path), "predicted": names[int(own.argmax())]}
        row |= {"truth": truth} if truth is not None else {}
        rows.append({**row, "probabilities": dict(zip(names, own.round(4).tolist(), strict=True))})
    return rows


def _print_rows(rows: list[dict[str, Any]], config: Config) -> None:
    for row in rows:
        print(f"{row['picture']}: {row['predicted']} ({max(row['probabilities'].values()):.0%})")
    judged = [row for row in rows if "truth" in row]
    if judged:
        right = sum(row["truth"] == row["predicted"] for row in judged)
        print(f"{right} of {len(judged)} right [norm: {config.norm}]")
