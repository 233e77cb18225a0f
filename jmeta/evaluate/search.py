"""The fastest pattern of adaptation within a tolerance: accuracy on the same episodes, operations counted, time measured.

    best = argmin over patterns P with accuracy(P) >= accuracy(full) - tolerance of the time that adaptation takes

References:
  Khabarlak, Faster Optimization-Based Meta-Learning Adaptation Phase, 2022 (https://arxiv.org/abs/2206.05930).

Differs from the paper in: its abstract alone is known here. The tolerance is absolute, and the selection follows meta-training.
Choose on validation classes and report on test classes: the best of many looks better than it is.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jmeta import hosts, plot
from jmeta.core import MetaLearner, Tasks, Theta
from jmeta.evaluate import trials
from jmeta.evaluate.fewshot import over_episodes
from jmeta.losses import accuracy as share_right
from jmeta.mesh import check_mesh
from jmeta.rules.patterns import Pattern, pattern

TIMES = ("latency", "throughput")  # what is measured, and not for all
NEIGHBOURS = 32  # new patterns in a round


class Candidate(NamedTuple):
    """What a pattern reaches, and what it costs.

    Attributes:
      pattern: the pattern.
      accuracy, interval: mean over the episodes, and half its 95 % interval.
      difference, difference_interval: the same of the difference from the reference, episode by episode.
      operations: of the adaptation to one task, counted.
      latency: seconds of the adaptation to one task on one device; None where it was not measured.
      throughput: tasks a second, of 32 at a time on all devices; None likewise.
    """

    pattern: Pattern
    accuracy: float
    interval: float
    difference: float
    difference_interval: float
    operations: int
    latency: float | None = None
    throughput: float | None = None

    def cost(self, by: str) -> float:
        """What counts as its cost; inf where that was not measured."""
        value = {"latency": self.latency, "throughput": self.throughput and 1 / self.throughput, "operations": self.operations}[by]
        return float("inf") if value is None else float(value)


class Search(NamedTuple):
    """What a search found.

    Attributes:
      best: the cheapest candidate whose accuracy is within the tolerance of the reference's.
      sure: the cheapest that is so by the worse end of its difference's interval as well: the best of many may have been lucky.
      most_accurate: the most accurate.
      front: those than which none is both cheaper and more accurate, the cheapest first (the Pareto front).
      table: all candidates, the cheapest first.
      reference: what the others are compared with, the full pattern if no other was given.
      tolerance: as given.
      episodes: as given.
      by: what counts as cost.
    """

    best: Candidate
    sure: Candidate
    most_accurate: Candidate
    front: tuple[Candidate, ...]
    table: tuple[Candidate, ...]
    reference: Candidate
    tolerance: float
    episodes: int
    by: str

    def __str__(self) -> str:
        """A line for each member of the front, and what was chosen."""
        rows = [_line(each, self.reference, self.by) for each in dict.fromkeys([*self.front, self.best, self.sure, self.reference])]
        chosen = f"best within {self.tolerance:g} of {self.reference.pattern}, over {self.episodes} episodes: {self.best.pattern}"
        untimed = sum(each.latency is None for each in self.table)
        left = (
            [f"({untimed} of {len(self.table)} patterns were not timed, and cannot be best)"]
            if untimed and self.by in TIMES
            else []
        )
        sure = "" if self.sure == self.best else f"\nand by the worse end of the interval too: {self.sure.pattern}"
        return "\n".join([HEADER, *rows, *left, chosen + sure, self.best.pattern.grid()])

    def plot(self, path: str | Path) -> Path:
        """Draws accuracy against cost, with the front; writes a PNG."""
        points, front = ([(each.cost(self.by), each.accuracy, each.interval) for each in part] for part in (self.table, self.front))
        marked = {"reference": self.reference, "best": self.best}
        marks = {name: (each.cost(self.by), each.accuracy) for name, each in marked.items()}
        plot.pareto(points, front, marks, self.by, Path(path))
        return Path(path)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `best` is what `jmeta.load_pattern` reads."""
        parts = {name: getattr(self, name) for name in ("best", "sure", "most_accurate", "reference")}
        return {
            **{name: _as_dict(each) for name, each in parts.items()},
            "front": [_as_dict(each) for each in self.front],
            "table": [_as_dict(each) for each in self.table],
            **{name: getattr(self, name) for name in ("tolerance", "episodes", "by")},
        }


HEADER = "    faster  operations  accuracy          difference         pattern"


def _line(each: Candidate, reference: Candidate, by: str) -> str:
    faster = f"{reference.cost(by) / each.cost(by):9.2f}x"
    share = f"{each.operations / reference.operations:10.3f}x"
    return (
        f"{faster} {share}  {each.accuracy:.4f} ± {each.interval:.4f}  {each.difference:+.4f} ± {each.difference_interval:.4f}  "
        f"{each.pattern}"
    )


def _as_dict(each: Candidate) -> dict[str, Any]:
    return {
        "layers": each.pattern.layers,
        "rows": each.pattern.rows,
        "text": str(each.pattern),
        **dict(list(each._asdict().items())[1:]),
    }


def search(
    key: jax.Array,
    make_learner: Callable[[Pattern], MetaLearner],
    theta: Theta,
    patterns: Iterable[Pattern],
    tasks: Tasks,
    *,
    tolerance: float,
    episodes: int = 300,
    metric: Callable[..., jax.Array] | None = None,
    by: Literal["latency", "throughput", "operations"] = "latency",
    reference: Pattern | None = None,
    timed: int = 24,
    rounds: int = 1,
    path: str | Path | None = None,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> Search:
    """Scores patterns on a theta that is trained, and finds the fastest within a tolerance of the full one.

    All patterns meet the same episodes, in one program whose patterns are its arguments. Then the operations of each are counted as
    it runs alone, and the time of those that may be chosen is measured.

    Args:
      key: of the episodes, which are those of `fewshot` with that key.
      make_learner: `(pattern) -> MetaLearner`, for instance `lambda p: jm.maml(net, jm.xent, jm.lambda_mask(p, optax.sgd(0.4)),
        jm.repeat(5))`. Keep one function for several searches: another one compiles anew.
      theta: what was meta-learned.
      patterns: candidates, as `jmeta.patterns(net, steps)` lists them.
      tasks: validation tasks, of classes that are neither trained nor reported on.
      tolerance: how much accuracy may be lost, as a fraction: 0.01 is a point.
      episodes: how many.
      metric: `(outputs, y) -> scalar`, higher is better; accuracy if None.
      by: what makes a candidate the cheaper: time of one task alone, tasks a second of many, or counted operations.
      reference: what the others are compared with; the full pattern if None. It is always among the candidates.
      timed: candidates that are compiled and timed at most: the reference, the most accurate, the cheapest within the tolerance by
        operations, and the front. Others cannot be best.
      rounds: times that patterns which differ in one entry from one of the front's are tried too, 32 each time.
      path: JSON file that keeps what was found so far; a search that was cut off goes on from there.
      mesh: devices that the episodes are spread over.
      progress: whether to show a progress bar.

    Returns:
      A `Search`; print it.

    Raises:
      ValueError: the tolerance is negative, there are no patterns or of several networks, too few episodes, or `path` holds another
        search.
      FileNotFoundError: the folder of `path` is not there.
      TypeError: a pattern is traced or is none.
    """
    _check(tolerance, episodes, timed, rounds, by)
    check_mesh(mesh)
    if hosts.spans_hosts(mesh):
        raise ValueError("search: the mesh spans several processes, whose clocks would disagree; search in one.")
    candidates = _candidates(patterns, reference)
    trial = trials.Trial(key, make_learner, theta, tasks, metric or share_right, episodes, mesh, progress)
    kept = trials.Kept.open(path, trial, candidates[0])
    for number in range(rounds + 1):
        new = _neighbours(_compared(candidates, kept), tolerance, number) if number else candidates
        trials.score(trial, new, kept)
        trials.count(trial, new, kept)
        candidates = list(dict.fromkeys([*candidates, *new]))
    chosen = _worth_timing(_compared(candidates, kept), tolerance, timed)
    if not set(chosen) <= set(kept.seconds):
        trials.time(trial, chosen, kept)
    return _result(_compared(candidates, kept), tolerance, episodes, by)


def _check(tolerance: float, episodes: int, timed: int, rounds: int, by: str) -> None:
    if not 0 <= tolerance < 1:
        raise ValueError(
            f"search: tolerance must be from 0 to below 1, a fraction of right answers that may be lost, got {tolerance}; a point "
            "is 0.01."
        )
    if episodes < 2:
        raise ValueError(f"search: episodes must be at least 2 for an interval, got {episodes}.")
    if timed < 1 or rounds < 0:
        raise ValueError(f"search: timed must be at least 1 and rounds at least 0, got {timed} and {rounds}.")
    if by not in ("latency", "throughput", "operations"):
        raise ValueError(f"search: by must be latency, throughput or operations, got {by!r}.")


def _candidates(patterns: Iterable[Pattern], reference: Pattern | None) -> list[Pattern]:
    """The patterns without repeats, with as many rows each, the reference first."""
    given = [*patterns, *([] if reference is None else [reference])]
    wrong = [each for each in given if not isinstance(each, Pattern)]
    if wrong:
        raise TypeError(f"search: patterns must hold jmeta.Pattern, as jmeta.pattern makes them, got {wrong[0]!r}.")
    layers = {each.layers for each in given}
    if len(layers) != 1:
        raise ValueError(f"search: patterns must be of one network, got patterns of {len(layers)}: {sorted(layers)}.")
    names, steps = layers.pop(), max(len(each.rows) for each in given)
    first = pattern(names, "full") if reference is None else reference
    rows = [pattern(names, each.rows, steps).rows for each in (first, *given)]
    return [Pattern(each, names) for each in dict.fromkeys(rows)]


def _neighbours(candidates: Sequence[Candidate], tolerance: float, seed: int) -> list[Pattern]:
    """New patterns that differ in one entry from the best so far or from one of the front, some of them if there are many."""
    best, found = _result(candidates, tolerance, 0, "operations").best, {}
    for each in (best, *_front(candidates, "operations")):
        rows = np.array(each.pattern.rows)
        for place in np.ndindex(*rows.shape):
            changed = rows.copy()
            changed[place] = 0 if rows[place] else 1
            if changed.any():
                found[Pattern(tuple(tuple(row) for row in changed.tolist()), each.pattern.layers)] = None
    known = {each.pattern for each in candidates}
    new = [each for each in found if each not in known]
    order = np.random.default_rng(seed).permutation(len(new))[:NEIGHBOURS]
    return [new[number] for number in sorted(order)]


def _compared(candidates: Sequence[Pattern], kept: trials.Kept) -> list[Candidate]:
    """The candidates, each beside the first, which is the reference."""
    found, reference = [], kept.scores[candidates[0]]
    for each in candidates:
        scores = kept.scores[each]
        latency, seconds = kept.seconds.get(each, (None, None))
        figures = (
            *over_episodes(scores),
            *over_episodes(scores - reference),
            kept.operations[each],
            latency,
            seconds and 1 / seconds,
        )
        found.append(Candidate(each, *figures))
    return found


def _front(candidates: Iterable[Candidate], by: str) -> tuple[Candidate, ...]:
    """Those than which none is both cheaper and more accurate, the cheapest first."""
    front: list[Candidate] = []
    for each in sorted(candidates, key=lambda each: (each.cost(by), -each.accuracy)):
        if np.isfinite(each.cost(by)) and (not front or each.accuracy > front[-1].accuracy):
            front.append(each)
    return tuple(front)


def _worth_timing(candidates: Sequence[Candidate], tolerance: float, most: int) -> list[Pattern]:
    """The reference, the most accurate, the cheapest within the tolerance by operations, then the front, then more within it."""
    within = sorted((each for each in candidates if each.difference >= -tolerance), key=lambda each: each.operations)
    first = [candidates[0], max(candidates, key=lambda each: each.accuracy), *within[: most // 2]]
    return list(dict.fromkeys(each.pattern for each in (*first, *_front(candidates, "operations"), *within)))[:most]


def _result(candidates: Sequence[Candidate], tolerance: float, episodes: int, by: str) -> Search:
    def cost(each):
        return each.cost(by), each.operations, -each.accuracy

    best = min((each for each in candidates if each.difference >= -tolerance), key=cost)
    sure = min((each for each in candidates if each.difference - each.difference_interval >= -tolerance), key=cost)
    most_accurate = max(candidates, key=lambda each: (each.accuracy, -each.operations))
    table = tuple(sorted(candidates, key=cost))
    return Search(best, sure, most_accurate, _front(candidates, by), table, candidates[0], tolerance, episodes, by)
