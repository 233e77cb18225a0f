"""Pictures of runs: learning curves, scores against inner steps, episodes, fronts, channels and cells."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.special import stdtrit

from jmeta.architecture import KINDS, PRIMITIVES, from_named, mixture

MOST_TICKS = 16  # of inner steps that are all named


def _figure(width: float, height: float, **panels: Any) -> tuple[Any, Any]:
    """A figure on a canvas of its own, which needs neither a display nor pyplot's state, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**panels)


def learning_curve(metrics: Path, path: Path) -> None:
    """Draws the training measure and the validation score against meta-steps.

    Args:
      metrics: a run's `metrics.jsonl`.
      path: the PNG to write.
    """
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    name = "accuracy" if any("accuracy" in row for row in rows) else "loss"
    figure, axes = _figure(6, 4)
    axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=f"training {name}")
    valid = [row for row in rows if "valid_score" in row]
    if valid:
        middle, half = (np.array([row[key] for row in valid]) for key in ("valid_score", "valid_interval"))
        axes.errorbar([row["step"] for row in valid], middle, half, fmt="o-", label="validation, 95 % interval")
    axes.set(xlabel="meta-steps", ylabel=name)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def by_inner_step(result: dict[str, Any], path: Path) -> None:
    """Draws the test score after each inner step.

    Args:
      result: a run's `result.json`.
      path: the PNG to write.
    """
    middle, half = np.array(result["by_step"]).T
    figure, axes = _figure(6, 4)
    axes.errorbar(range(len(middle)), middle, half, fmt="o-")
    axes.set(xlabel="inner steps", ylabel=f"test {result['metric']}, 95 % interval")
    if len(middle) <= MOST_TICKS:
        axes.set_xticks(range(len(middle)))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def episode(support: np.ndarray, query: np.ndarray, truth: np.ndarray, predicted: np.ndarray, path: Path) -> None:
    """Draws an episode: a row a class, its support images, then its queries, framed green where right and red where wrong.

    Args:
      support: `[ways, shots, height, width, channels]` in [0, 1].
      query: `[ways, queries, height, width, channels]` in [0, 1].
      truth: labels `[ways, queries]`.
      predicted: labels `[ways, queries]`.
      path: the PNG to write.
    """
    rows = [[_framed(image, (0.5, 0.5, 0.5)) for image in row] for row in support]
    gap = np.ones((rows[0][0].shape[0], 6, 3))
    for row, images, labels, guesses in zip(rows, query, truth, predicted, strict=True):
        colours = [(0, 0.6, 0) if label == guess else (0.9, 0, 0) for label, guess in zip(labels, guesses, strict=True)]
        row += [gap, *(_framed(image, colour) for image, colour in zip(images, colours, strict=True))]
    picture = np.concatenate([np.concatenate(row, 1) for row in rows])
    figure, axes = _figure(picture.shape[1] / 60, picture.shape[0] / 60 + 0.5)
    axes.imshow(picture)
    axes.set_title(f"support | queries, {np.mean(truth == predicted):.0%} right", fontsize=9)
    axes.axis("off")
    figure.savefig(path, dpi=120)


def _framed(image: np.ndarray, colour: tuple[float, float, float]) -> np.ndarray:
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    framed = np.empty((image.shape[0] + 4, image.shape[1] + 4, 3))
    framed[:] = colour
    framed[2:-2, 2:-2] = image
    return framed


def pareto(points: list, front: list, marks: dict[str, tuple[float, float]], by: str, path: Path) -> None:
    """Draws the score of many candidates against their cost, and the front of those that none surpasses in both.

    Args:
      points: `(cost, score, half width of the 95 % interval)` of each; those of infinite cost are left out.
      front: the same of the front's, in order of cost.
      marks: names for some points, `(cost, score)`.
      by: what the cost is, "latency", "throughput" or "operations".
      path: the PNG to write.
    """
    figure, axes = _figure(6, 4)
    cost, score, half = np.array([each for each in points if np.isfinite(each[0])]).T
    axes.errorbar(cost, score, half, fmt=".", color="0.6", elinewidth=0.5)
    cost, score, _ = np.array(front).T
    axes.step(cost, score, where="post", color="C0", marker="o", label="front")
    for number, (name, place) in enumerate(marks.items(), 1):
        axes.plot(*place, "*", color=f"C{number}", markersize=12, label=name)
    labels = {"latency": "seconds to adapt to one task", "throughput": "seconds a task, many together"}
    axes.set(xscale="log", xlabel=labels.get(by, "operations"), ylabel="accuracy, 95 % interval")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def matrix(accuracy: np.ndarray, checkpoints: Sequence[int], path: Path) -> None:
    """Draws the accuracy on each class at each checkpoint as an image, black for 0 and white for 1.

    Args:
      accuracy: `[checkpoints, classes]`.
      checkpoints: classes learned at each.
      path: the PNG to write.
    """
    figure, axes = _figure(6, 4)
    picture = axes.imshow(accuracy, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set(xlabel="class, in the order of learning", ylabel="classes learned")
    axes.set_yticks(range(len(checkpoints)), [str(each) for each in checkpoints])
    figure.colorbar(picture, label="accuracy")
    figure.savefig(path, dpi=120)


def routing(
    groups: Sequence[str], often: np.ndarray, sizes: dict[str, int], overlap: np.ndarray, figures: dict[str, Any], path: Path
) -> None:
    """Draws how often each group of classes chooses each channel, and the share of channels that tasks have in common.

    The last panel has the means over groups with 95 % intervals, beside what choices by chance have in common.

    Args:
      groups: their names.
      often: `[groups, channels]` from 0 to 1, layer beside layer.
      sizes: channels of each layer.
      overlap: `[groups, groups]`.
      figures: of `Routing.figures`.
      path: the PNG to write.
    """
    figure, (left, right, last) = _figure(18, 2 + 0.2 * len(groups), ncols=3, width_ratios=(2, 1, 0.7))
    shown = left.imshow(often, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    edges = np.cumsum([0, *sizes.values()])
    left.set_yticks(range(len(groups)), groups, fontsize=7)
    left.set_xticks((edges[:-1] + edges[1:]) / 2, list(sizes), fontsize=7)
    for edge in edges[1:-1]:
        left.axvline(edge - 0.5, color="C0")
    left.set_title("share of a group's tasks that choose a channel", fontsize=9)
    figure.colorbar(shown, ax=left)
    shown = right.imshow(overlap, cmap="viridis", interpolation="nearest", vmin=min(figures["chance"], overlap.min()), vmax=1)
    right.set_xticks(range(len(groups)), groups, rotation=90, fontsize=7)
    right.set_yticks(range(len(groups)), groups, fontsize=7)
    right.set_title("channels in common (diagonal: other classes)", fontsize=9)
    figure.colorbar(shown, ax=right)
    means = [name for name in figures if name in ("same classes", "same group", "other groups")]
    last.errorbar(range(len(means)), *zip(*(figures[name] for name in means), strict=True), fmt="o", capsize=4)
    last.axhline(figures["chance"], color="gray", linestyle="--", label="by chance")
    last.set_xticks(range(len(means)), means, fontsize=8)
    last.set_title("mean over groups, 95 % interval", fontsize=9)
    last.legend(fontsize=8)
    last.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def cells(architectures: Mapping[str, Mapping[str, Sequence]], path: Path) -> None:
    """Draws the cells of architectures as graphs, those of one beside each other.

    Args:
      architectures: for each name `{"normal": nodes, "reduce": nodes}`, a node being a list of `(operation, input)`, or of
        `(operation, input, weight)`: what weighs little is faint.
      path: the PNG to write.
    """
    figure, panels = _figure(14, 4 * len(architectures), nrows=len(architectures), ncols=2, squeeze=False)
    for row, (name, kinds) in zip(panels, architectures.items(), strict=True):
        for axes, (kind, nodes) in zip(row, kinds.items(), strict=True):
            _cell(axes, nodes)
            axes.set_title(f"{name}, {kind} cell", fontsize=9)
    figure.savefig(path, dpi=120)


def _cell(axes: Any, nodes: Sequence[Sequence[tuple]]) -> None:
    """One cell, from the two before it on the left to its output on the right."""
    places = [(0.0, 1.2), (0.0, -1.2), *((number + 1.0, 0.0) for number in range(len(nodes) + 1))]
    names = ["k-2", "k-1", *map(str, range(len(nodes))), "k"]
    for number, choices in enumerate(nodes, 2):
        for operation, source, *weights in choices:
            label, strength = f"{operation} {weights[0]:.2f}" if weights else operation, weights[0] if weights else 1.0
            bend = {0: -0.2, 1: 0.2}.get(source, -0.5 if number - source > 1 else 0.0)
            _arrow(axes, places[source], places[number], bend, f"C{PRIMITIVES.index(operation)}", label, strength)
        _arrow(axes, places[number], places[-1], 0.5 if number < len(nodes) + 1 else 0.0, "0.7", "")
    for (x, y), name in zip(places, names, strict=True):
        axes.text(x, y, name, ha="center", va="center", fontsize=9, bbox={"boxstyle": "round", "fc": "white"})
    axes.set(xlim=(-0.4, len(nodes) + 1.4), ylim=(-1.6, 1.6), aspect="equal")
    axes.axis("off")


def _arrow(
    axes: Any,
    start: tuple[float, float],
    end: tuple[float, float],
    bend: float,
    colour: str,
    label: str,
    strength: float = 1.0,
) -> None:
    """A bent arrow, whose label stands where it is half way; faint where its strength is small, from 0 to 1."""
    style = {"arrowstyle": "->", "color": colour, "shrinkA": 12, "shrinkB": 12, "connectionstyle": f"arc3,rad={bend}"}
    style["alpha"] = 0.2 + 0.8 * strength
    axes.annotate("", xy=end, xytext=start, arrowprops=style)
    (x, y), (to_x, to_y) = start, end
    place = (x + to_x + bend * (to_y - y)) / 2, (y + to_y - bend * (to_x - x)) / 2
    axes.text(*place, label, fontsize=7, ha="center", va="center", color=colour, bbox={"fc": "white", "ec": "none", "pad": 1})


def shares(metrics: Path, path: Path, temperature: float) -> None:
    """Draws what each operation weighs in each kind of cell over meta-training, and how far every edge and node has chosen.

    Args:
      metrics: a run's `metrics.jsonl`, with all alphas as `jmeta.architecture.named` names them.
      path: the PNG to write.
      temperature: at which alphas weigh so much.

    Raises:
      ValueError: the metrics hold no alphas.
    """
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps, mixed = [row["step"] for row in rows], jax.vmap(lambda alpha: mixture(alpha, temperature))(from_named(rows))
    figure, panels = _figure(17, 8, ncols=3, nrows=2)
    for line, kind in zip(panels, KINDS, strict=True):
        nodes = mixed[kind].values()
        weights = np.concatenate([node["ops"] for node in nodes], 1)  # [rows, edges, operations]
        drawn = {
            "each operation, means over edges": dict(zip(PRIMITIVES, weights.mean(1).T, strict=True)),
            "the largest operation of each edge": dict(enumerate(weights.max(-1).T)),
            "the inputs of each node": {
                f"input {source} of node {number}": node["inputs"][:, source]
                for number, node in enumerate(nodes)
                for source in range(node["inputs"].shape[1])
            },
        }
        for axes, (title, curves) in zip(line, drawn.items(), strict=True):
            for label, curve in curves.items():
                axes.plot(steps, curve, label=label)
            axes.set(xlabel="meta-steps", ylabel=f"weight at temperature {temperature:g}", title=f"{kind} cells: {title}")
            axes.grid(alpha=0.3)
            if isinstance(next(iter(curves)), str):
                axes.legend(fontsize=6)
    figure.savefig(path, dpi=120)


def compared(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws what tests of learners measure against the time in which they adapt to a task, with 95 % intervals.

    Args:
      rows: of `jmeta compare --learners`.
      path: the PNG to write.
    """
    figure, axes = _figure(7, 5)
    metric = rows[0]["metric"]
    times = 100 if metric == "accuracy" else 1
    for number, name in enumerate(dict.fromkeys(row["learner"] for row in rows)):
        mine = [row for row in rows if row["learner"] == name]
        columns = (
            [factor * row[field] for row in mine]
            for field, factor in (("adaptation_seconds", 1e3), ("mean", times), ("interval95", times))
        )
        time, mean, half = columns
        axes.errorbar(time, mean, half, fmt="o", color=f"C{number % 10}", label=name)
    axes.set(xscale="log", xlabel="milliseconds to adapt to one task", ylabel=f"{metric} on unseen tasks{', %' * (times == 100)}")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def by_classes(curves: dict[str, tuple[Sequence[int], np.ndarray]], path: Path) -> None:
    """Draws the accuracy on the classes seen so far against their number, with 95 % bands over draws.

    Args:
      curves: for each method its checkpoints and the accuracies `[draws, checkpoints]`, as `Continual.running` has them.
      path: the PNG to write.
    """
    bands(curves, path, "classes learned", "accuracy on them, 95 % bands")


def bands(curves: dict[str, tuple[Sequence[int], np.ndarray]], path: Path, xlabel: str, ylabel: str) -> None:
    """Draws the means of accuracies with the 95 % intervals around them, by Student's t.

    Args:
      curves: for each name its places and the accuracies `[runs, places]`; places where all are NaN are left out.
      path: the PNG to write.
      xlabel: what the places are.
      ylabel: what the accuracies are.
    """
    figure, axes = _figure(6, 4)
    for number, (name, (checkpoints, values)) in enumerate(curves.items()):
        there = ~np.isnan(values).all(0)
        x, y = np.array(checkpoints)[there], values[:, there]
        half = stdtrit(len(y) - 1, 0.975) * y.std(0, ddof=1) / np.sqrt(len(y)) if len(y) > 1 else np.zeros(len(x))
        axes.plot(x, y.mean(0), color=f"C{number}", label=name)
        axes.fill_between(x, y.mean(0) - half, y.mean(0) + half, color=f"C{number}", alpha=0.2, linewidth=0)
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
