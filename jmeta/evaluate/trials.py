"""Trying patterns on one theta and the same episodes: their scores, their operations, their times, and the file that keeps them."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jmeta.checkpoint import write_json
from jmeta.core import MetaLearner, Task, Tasks, Theta, default_chunk
from jmeta.evaluate.cost import alternately, operations
from jmeta.evaluate.fewshot import ahead, episode_keys
from jmeta.log import bar
from jmeta.mesh import count_devices, processor, replicate, split, spread
from jmeta.rules.patterns import Pattern

TOGETHER = 16  # patterns in one call of the compiled program
BATCH = 32  # tasks whose adaptation together gives the throughput


class Trial(NamedTuple):
    """What all patterns have in common; see `jmeta.search`."""

    key: jax.Array
    make_learner: Callable[[Pattern], MetaLearner]
    theta: Theta
    tasks: Tasks
    metric: Callable[..., jax.Array]
    episodes: int
    mesh: Mesh | None
    progress: bool


class Kept(NamedTuple):
    """What is known so far, of which search and on which machine, and the file that keeps it."""

    path: Path | None
    fingerprint: str
    place: str
    scores: dict[Pattern, np.ndarray]
    operations: dict[Pattern, int]
    seconds: dict[Pattern, tuple[float, float]]

    @classmethod
    def open(cls, path: str | Path | None, trial: Trial, reference: Pattern) -> "Kept":
        """What an earlier search of the same left in the file; its times only if they are of this machine.

        Raises:
          FileNotFoundError: the file's folder is not there.
          ValueError: the file holds something else.
        """
        kept = cls(None if path is None else Path(path), _fingerprint(trial, reference), _place(trial.mesh), {}, {}, {})
        if kept.path is None:
            return kept
        if not kept.path.absolute().parent.is_dir():
            raise FileNotFoundError(f"search: path is {path}, whose folder is not there.")
        if not kept.path.exists():
            return kept
        try:
            stored = json.loads(kept.path.read_text())
            if stored["fingerprint"] != kept.fingerprint:
                raise ValueError
            for row in stored["patterns"]:
                each = Pattern(tuple(map(tuple, row["rows"])), tuple(stored["layers"]))
                kept.scores[each] = np.array(row["scores"])
                kept.operations.update({each: row["operations"]} if "operations" in row else {})
                kept.seconds.update({each: tuple(row["seconds"])} if "seconds" in row and stored["place"] == kept.place else {})
        except (ValueError, KeyError, TypeError, UnicodeDecodeError):
            raise ValueError(
                f"search: path is {path}, which holds no search of this theta, these episodes and this key. Give another name, or "
                "what that search was given."
            ) from None
        return kept

    def write(self) -> None:
        """Writes the file, whole or not at all."""
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


def _fingerprint(trial: Trial, reference: Pattern) -> str:
    """Tells apart searches whose scores must not be mixed: by program, theta and episodes."""
    task = first_task(trial)

    def score(theta, task):
        learner = trial.make_learner(reference)
        outputs = learner.predict(learner.adapt(trial.key, theta, task.support), task.query.x)
        return trial.metric(outputs, task.query.y, *(() if task.query.mask is None else (task.query.mask,)))

    program = re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(score)(trial.theta, task)))  # addresses differ between processes
    found = hashlib.sha256(f"{trial.episodes} {reference} {program}".encode())
    for leaf in jax.tree.leaves((jax.random.key_data(trial.key), trial.theta, task)):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def _place(mesh: Mesh | None) -> str:
    """Where times are comparable."""
    device = jax.devices()[0]
    return (
        f"{processor() if device.platform == 'cpu' else device.device_kind}, {count_devices(mesh)} devices, jax {jax.__version__}"
    )


def first_task(trial: Trial) -> Task:
    """The first of the episodes."""
    own, staged = next(ahead(trial.tasks, episode_keys(trial.key, 1, 1)))
    data = trial.tasks.data if staged is None else jax.tree.map(lambda leaf: leaf[0], staged)
    return trial.tasks.sample(jax.random.split(own[0])[0], data)


@functools.partial(jax.jit, static_argnums=range(7))
def _scores(make_learner, layers, lowest, sample, metric, together, mesh, theta, data, rows, keys, staged):
    """The metric of each episode and pattern, `[len(keys), len(rows)]`; layers before the `lowest` stand still in all of them."""

    def one(theta, data, rows, key, own):
        key_task, key_learn = jax.random.split(key)
        task = sample(key_task, data if staged is None else own)
        extra = () if task.query.mask is None else (task.query.mask,)

        def score(pattern):
            learner = make_learner(Pattern(tuple((0,) * lowest + tuple(row[lowest:]) for row in pattern), layers))
            phi = learner.adapt(key_learn, theta, task.support)
            return metric(learner.predict(phi, task.query.x), task.query.y, *extra)

        return jax.lax.map(score, rows, batch_size=together if together > 1 else None)

    def episodes(theta, data, rows, keys, staged):
        return jax.lax.map(lambda each: one(theta, data, rows, *each), (keys, staged))

    return spread(episodes, mesh, (False, False, False, True, True), mean=False)(theta, data, rows, keys, staged)


def score(trial: Trial, wanted: Sequence[Pattern], kept: Kept) -> None:
    """Adds the scores of the patterns wanted, and keeps them after every group."""
    wanted = [each for each in wanted if each not in kept.scores]
    if not wanted:
        return
    keys, together = episode_keys(trial.key, trial.episodes, count_devices(trial.mesh)), default_chunk(trial.theta.params, TOGETHER)
    theta, data = replicate((trial.theta, trial.tasks.data), trial.mesh)
    groups = _groups(wanted)
    with bar(len(groups) * len(keys), 0, trial.progress) as (advance, _):
        for number, (lowest, size, group) in enumerate(groups):
            program = functools.partial(
                _scores, trial.make_learner, group[0].layers, lowest, trial.tasks.sample, trial.metric, together, trial.mesh
            )
            rows = replicate(jnp.array([each.rows for each in (group * size)[:size]], jnp.float32), trial.mesh)
            parts = []
            for part, staged in ahead(trial.tasks, keys):
                parts.append(np.asarray(program(theta, data, rows, part, staged)))
                advance(number * len(keys) + len(parts), {})
            values = np.concatenate(parts)[: trial.episodes].astype(np.float64)
            kept.scores.update(zip(group, values.T, strict=False))
            kept.write()


def _groups(wanted: Sequence[Pattern]) -> list[tuple[int, int, list[Pattern]]]:
    """Patterns that are scored by one call: their lowest layer that ever moves, the size of such groups, and they themselves.

    What stands still below that layer is left out of the program; groups of one layer have one size, and so one program.
    """
    by_lowest: dict[int, list[Pattern]] = {}
    for each in wanted:
        by_lowest.setdefault(int(np.any(each.rows, 0).argmax()), []).append(each)
    groups = []
    for lowest, own in by_lowest.items():
        size = -(-len(own) // -(-len(own) // TOGETHER))
        groups += [(lowest, size, own[first : first + size]) for first in range(0, len(own), size)]
    return groups


def count(trial: Trial, wanted: Sequence[Pattern], kept: Kept) -> None:
    """Adds the operations of the patterns wanted, and keeps them now and then."""
    support = first_task(trial).support
    with bar(len(wanted), 0, trial.progress) as (advance, _):
        for number, each in enumerate(wanted):
            if each not in kept.operations:
                kept.operations[each] = operations(trial.make_learner(each).adapt, trial.key, trial.theta, support)
            advance(number + 1, {})
            if number % TOGETHER == 0 or number == len(wanted) - 1:
                kept.write()


def time(trial: Trial, wanted: Sequence[Pattern], kept: Kept) -> None:
    """Measures latency and seconds a task of many, of all that are wanted, in turns; times of another hour are dropped."""
    key, theta, mesh = trial.key, trial.theta, trial.mesh
    supports = _supports(trial)
    one = jax.tree.map(lambda leaf: leaf[0], supports)
    alone, many = (key, theta, one), (*replicate((key, theta), mesh), split(supports, mesh))
    calls: tuple[list, list] = ([], [])
    with bar(len(wanted), 0, trial.progress) as (advance, _):
        for number, each in enumerate(wanted):
            learner = trial.make_learner(each)
            calls[0].append(_compiled(learner.adapt, alone))
            calls[1].append(_compiled(_adapting(learner, default_chunk(theta.params, BATCH), mesh), many))
            advance(number + 1, {})
    latency, together = (alternately(each) for each in calls)
    tasks = len(jax.tree.leaves(supports)[0])
    kept.seconds.clear()
    kept.seconds.update({each: (first, all_ / tasks) for each, first, all_ in zip(wanted, latency, together, strict=True)})
    kept.write()


def _supports(trial: Trial) -> Any:
    """The support sets of about `BATCH` tasks, `[tasks, ...]`."""
    tasks = trial.tasks
    part, staged = next(ahead(tasks, episode_keys(trial.key, BATCH, count_devices(trial.mesh))))
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
