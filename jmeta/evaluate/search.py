"""The fastest pattern of adaptation within a tolerance: accuracy on the same episodes, operations counted, time measured.

    best = argmin over patterns P with accuracy(P) >= accuracy(full) - tolerance of the time that adaptation takes

References:
  Khabarlak, Faster Optimization-Based Meta-Learning Adaptation Phase, 2022 (https://arxiv.org/abs/2206.05930).

Differs from the paper in: its abstract alone is known here. The tolerance is absolute, and the selection follows meta-training.
Choose on validation classes and report on test classes: the best of many looks better than it is.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jmeta import plot
from jmeta.checkpoint import write_json
from jmeta.core import MetaLearner, Task, Tasks, Theta, default_chunk
from jmeta.evaluate.cost import alternately, operations
from jmeta.evaluate.fewshot import ahead, episode_keys
from jmeta.log import bar
from jmeta.losses import accuracy as share_right
from jmeta.mesh import check_mesh, count_devices, processor, replicate, split, spread
from jmeta.rules.patterns import Pattern, pattern

TOGETHER = 16  # patterns in one call of the compiled program
TIMES = ("latency", "throughput")  # what is measured, and not for all
BATCH = 32  # tasks whose adaptation together gives the throughput
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
      most_accurate: the most accurate.
      front: those than which none is both cheaper and more accurate, the cheapest first (the Pareto front).
      table: all candidates, the cheapest first.
      reference: what the others are compared with, the full pattern if no other was given.
      tolerance: as given.
      episodes: as given.
      by: what counts as cost.
    """

    best: Candidate
    most_accurate: Candidate
    front: tuple[Candidate, ...]
    table: tuple[Candidate, ...]
    reference: Candidate
    tolerance: float
    episodes: int
    by: str

    def __str__(self) -> str:
        """A line for each member of the front, and what was chosen."""
        rows = [_line(each, self.reference, self.by) for each in dict.fromkeys([*self.front, self.best, self.reference])]
        chosen = f"best within {self.tolerance:g} of {self.reference.pattern}, over {self.episodes} episodes: {self.best.pattern}"
        untimed = sum(each.latency is None for each in self.table)
        left = (
            [f"({untimed} of {len(self.table)} patterns were not timed, and cannot be best)"]
            if untimed and self.by in TIMES
            else []
        )
        return "\n".join([HEADER, *rows, *left, chosen, self.best.pattern.grid()])

    def plot(self, path: str | Path) -> Path:
        """Draws accuracy against cost, with the front; writes a PNG."""
        points, front = ([(each.cost(self.by), each.accuracy, each.interval) for each in part] for part in (self.table, self.front))
        marked = {"reference": self.reference, "best": self.best}
        marks = {name: (each.cost(self.by), each.accuracy) for name, each in marked.items()}
        plot.pareto(points, front, marks, self.by, Path(path))
        return Path(path)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `best` is what `jmeta.load_pattern` reads."""
        parts = {"best": self.best, "most_accurate": self.most_accurate, "reference": self.reference}
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
    candidates, metric = _candidates(patterns, reference), metric or share_right
    task = _first_task(key, tasks)
    kept = _Kept.open(path, _fingerprint(make_learner, metric, key, theta, task, episodes, candidates[0]), _place(mesh))

    def score(wanted: Sequence[Pattern]) -> None:
        _score(key, make_learner, theta, tasks, metric, episodes, mesh, wanted, kept, progress)
        _count(lambda each: operations(make_learner(each).adapt, key, theta, task.support), wanted, kept, progress)

    score(candidates)
    for number in range(rounds):
        near = _neighbours(_compared(candidates, kept), tolerance, number)
        score(near)
        candidates += near
    chosen = _worth_timing(_compared(candidates, kept), tolerance, timed)
    if not set(chosen) <= set(kept.seconds):
        kept.seconds.clear()  # of another hour
        _time(make_learner, key, theta, tasks, chosen, mesh, kept, progress)
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


def _first_task(key: jax.Array, tasks: Tasks) -> Task:
    keys = episode_keys(key, 1, 1)
    (own, staged), *_ = ahead(tasks, keys)
    data = tasks.data if staged is None else jax.tree.map(lambda leaf: leaf[0], staged)
    return tasks.sample(jax.random.split(own[0])[0], data)


def _fingerprint(
    make_learner: Callable, metric: Callable, key: jax.Array, theta: Theta, task: Task, episodes: int, reference: Pattern
) -> str:
    """Tells apart searches whose scores must not be mixed: by program, theta and episodes."""

    def score(theta, task):
        learner = make_learner(reference)
        outputs = learner.predict(learner.adapt(key, theta, task.support), task.query.x)
        return metric(outputs, task.query.y, *(() if task.query.mask is None else (task.query.mask,)))

    program = re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(score)(theta, task)))  # addresses differ from process to process
    found = hashlib.sha256(f"{episodes} {reference} {program}".encode())
    for leaf in jax.tree.leaves((jax.random.key_data(key), theta, task)):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def _place(mesh: Mesh | None) -> str:
    """Where times are comparable."""
    device = jax.devices()[0]
    return (
        f"{processor() if device.platform == 'cpu' else device.device_kind}, {count_devices(mesh)} devices, jax {jax.__version__}"
    )


class _Kept(NamedTuple):
    """What is known so far, of which search and on which machine, and the file that keeps it."""

    path: Path | None
    fingerprint: str
    place: str
    scores: dict[Pattern, np.ndarray]
    operations: dict[Pattern, int]
    seconds: dict[Pattern, tuple[float, float]]

    @classmethod
    def open(cls, path: str | Path | None, fingerprint: str, place: str) -> "_Kept":
        """What an earlier search with that fingerprint left in the file; its times only if they are of this machine.

        Raises:
          FileNotFoundError: the file's folder is not there.
          ValueError: the file holds something else.
        """
        kept = cls(None if path is None else Path(path), fingerprint, place, {}, {}, {})
        if kept.path is None:
            return kept
        if not kept.path.absolute().parent.is_dir():
            raise FileNotFoundError(f"search: path is {path}, whose folder is not there.")
        if not kept.path.exists():
            return kept
        try:
            stored = json.loads(kept.path.read_text())
            if stored["fingerprint"] != fingerprint:
                raise ValueError
            for row in stored["patterns"]:
                each = Pattern(tuple(map(tuple, row["rows"])), tuple(stored["layers"]))
                kept.scores[each] = np.array(row["scores"])
                kept.operations.update({each: row["operations"]} if "operations" in row else {})
                kept.seconds.update({each: tuple(row["seconds"])} if "seconds" in row and stored["place"] == place else {})
        except (ValueError, KeyError, TypeError, UnicodeDecodeError):
            raise ValueError(
                f"search: path is {path}, which holds no search of this theta, these episodes and this key. Give another name, or "
                "what that search was given."
            ) from None
        return kept

    def write(self) -> None:
        if self.path is None or not self.scores:
            return
        rows = []
        for each, scores in self.scores.items():
            row: dict[str, Any] = {"rows": each.rows, "scores": scores.tolist()}
            row |= {"operations": self.operations[each]} if each in self.operations else {}
            rows.append(row | ({"seconds": self.seconds[each]} if each in self.seconds else {}))
        layers = next(iter(self.scores)).layers
        found = {"fingerprint": self.fingerprint, "place": self.place, "layers": layers, "patterns": rows}
        write_json(self.path, found)


@functools.partial(jax.jit, static_argnums=range(6))
def _scores(make_learner, layers, sample, metric, together, mesh, theta, data, rows, keys, staged):
    """The metric of each episode and pattern, `[len(keys), len(rows)]`."""

    def one(theta, data, rows, key, own):
        key_task, key_learn = jax.random.split(key)
        task = sample(key_task, data if staged is None else own)
        extra = () if task.query.mask is None else (task.query.mask,)

        def score(row):
            learner = make_learner(Pattern(row, layers))
            phi = learner.adapt(key_learn, theta, task.support)
            return metric(learner.predict(phi, task.query.x), task.query.y, *extra)

        return jax.lax.map(score, rows, batch_size=together if together > 1 else None)

    def episodes(theta, data, rows, keys, staged):
        return jax.lax.map(lambda each: one(theta, data, rows, *each), (keys, staged))

    return spread(episodes, mesh, (False, False, False, True, True), mean=False)(theta, data, rows, keys, staged)


def _score(key, make_learner, theta, tasks, metric, episodes, mesh, wanted, kept, progress) -> None:
    """Adds the scores of the patterns wanted, and keeps them after every group."""
    wanted = [each for each in wanted if each not in kept.scores]
    if not wanted:
        return
    keys, together = episode_keys(key, episodes, count_devices(mesh)), default_chunk(theta.params, TOGETHER)
    program = functools.partial(_scores, make_learner, wanted[0].layers, tasks.sample, metric, together, mesh)
    program = functools.partial(program, *replicate((theta, tasks.data), mesh))
    groups = [wanted[first : first + TOGETHER] for first in range(0, len(wanted), TOGETHER)]
    with bar(len(groups) * len(keys), 0, progress) as (advance, _):
        for number, group in enumerate(groups):
            rows = jnp.array([each.rows for each in (group * TOGETHER)[:TOGETHER]], jnp.float32)  # of one shape: one program
            parts = []
            for part, staged in ahead(tasks, keys):
                parts.append(np.asarray(program(replicate(rows, mesh), part, staged)))
                advance(number * len(keys) + len(parts), {})
            values = np.concatenate(parts)[:episodes].astype(np.float64)
            kept.scores.update(zip(group, values.T, strict=False))
            kept.write()


def _count(count: Callable[[Pattern], int], wanted: Sequence[Pattern], kept: "_Kept", progress: bool) -> None:
    """Adds the operations of the patterns wanted, and keeps them now and then."""
    with bar(len(wanted), 0, progress) as (advance, _):
        for number, each in enumerate(wanted):
            if each not in kept.operations:
                kept.operations[each] = count(each)
            advance(number + 1, {})
            if number % TOGETHER == 0 or number == len(wanted) - 1:
                kept.write()


def _time(make_learner, key, theta, tasks, wanted, mesh, kept, progress) -> None:
    """Adds latency and seconds a task of many, of all that are wanted, measured in turns."""
    supports = _supports(key, tasks, mesh)
    one = jax.tree.map(lambda leaf: leaf[0], supports)
    alone, many = (key, theta, one), (*replicate((key, theta), mesh), split(supports, mesh))
    calls: tuple[list, list] = ([], [])
    with bar(len(wanted), 0, progress) as (advance, _):
        for number, each in enumerate(wanted):
            learner = make_learner(each)
            calls[0].append(_compiled(learner.adapt, alone))
            calls[1].append(_compiled(_adapting(learner, default_chunk(theta.params, BATCH), mesh), many))
            advance(number + 1, {})
    latency, together = (alternately(each) for each in calls)
    count = len(jax.tree.leaves(supports)[0])
    for each, alone_seconds, seconds in zip(wanted, latency, together, strict=True):
        kept.seconds[each] = alone_seconds, seconds / count
    kept.write()


def _supports(key: jax.Array, tasks: Tasks, mesh: Mesh | None) -> Any:
    """The support sets of about `BATCH` tasks, `[tasks, ...]`."""
    part, staged = next(ahead(tasks, episode_keys(key, BATCH, count_devices(mesh))))
    sample = jax.vmap(lambda key, data: tasks.sample(jax.random.split(key)[0], data).support, (0, None if staged is None else 0))
    return jax.jit(sample)(part, tasks.data if staged is None else staged)


def _compiled(function: Callable, arguments: tuple) -> Callable[[], Any]:
    program = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(program(*arguments))
    return lambda: program(*arguments)


def _adapting(learner: MetaLearner, together: int, mesh: Mesh | None) -> Callable:
    """The adaptation to many tasks, of which the sum of the parameters is left, so that none of them is dropped."""

    def adapt(key, theta, supports):
        def one(support):
            return jax.tree.map(jnp.sum, learner.adapt(key, theta, support).params)

        return jax.lax.map(one, supports, batch_size=together if together > 1 else None)

    return spread(adapt, mesh, (False, False, True), mean=False)


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


def _compared(candidates: Sequence[Pattern], kept: _Kept) -> list[Candidate]:
    """The candidates, each beside the first, which is the reference."""
    found, reference = [], kept.scores[candidates[0]]
    for each in candidates:
        scores = kept.scores[each]
        latency, seconds = kept.seconds.get(each, (None, None))
        figures = (*_mean(scores), *_mean(scores - reference), kept.operations[each], latency, seconds and 1 / seconds)
        found.append(Candidate(each, *figures))
    return found


def _mean(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half its 95 % interval."""
    return float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))


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
    most_accurate = max(candidates, key=lambda each: (each.accuracy, -each.operations))
    table = tuple(sorted(candidates, key=cost))
    return Search(best, most_accurate, _front(candidates, by), table, candidates[0], tolerance, episodes, by)
