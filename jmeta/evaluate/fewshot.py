"""Few-shot accuracy: the mean over episodes of unseen classes, with its 95 % interval.

References:
  Finn, Abbeel, Levine, Model-Agnostic Meta-Learning, ICML 2017 (https://arxiv.org/abs/1703.03400): mean over 600 test episodes,
  interval 1.96 standard errors.
"""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jmeta import hosts
from jmeta.core import MetaLearner, Tasks, Theta, check_kinds, default_chunk
from jmeta.losses import accuracy
from jmeta.mesh import check_mesh, count_devices, replicate, spread

MOST_STEPS = 15  # inner steps whose means are all printed
DISPATCH = 100  # most episodes in one call of the compiled program


class Score(NamedTuple):
    """A metric over episodes.

    Attributes:
      mean: after the last inner step.
      interval: half width of the 95 % interval of the mean, 1.96 standard errors over episodes.
      by_step: `[steps + 1, 2]`, mean and interval after 0..steps inner steps; `[1, 2]` where the last alone was measured.
      episodes: how many episodes.
      transductive: whether predictions of the queries depend on each other, found by predicting one alone.
      each: the metric of each episode after the last inner step, `[episodes]`. Learners that are tested with one key meet the same
        episodes, so the differences of theirs have an interval of their own (`jmeta.paired`).
    """

    mean: float
    interval: float
    by_step: np.ndarray
    episodes: int
    transductive: bool
    each: np.ndarray

    def __str__(self) -> str:
        """`0.987 ± 0.004 (95 % interval, 600 episodes, transductive); by inner step: 0.251 0.987`."""
        kind = "transductive" if self.transductive else "not transductive"
        text = f"{self.mean:.3f} ± {self.interval:.3f} (95 % interval, {self.episodes} episodes, {kind})"
        last = len(self.by_step) - 1
        if last > MOST_STEPS:
            shown = [*(step for step in (0, 1, 2, 5, 10, 20, 50, 100) if step < last), last]
            return text + "; after inner steps: " + ", ".join(f"{step}: {self.by_step[step, 0]:.3f}" for step in shown)
        steps = " ".join(f"{mean:.3f}" for mean in self.by_step[:, 0])
        return f"{text}; by inner step: {steps}" if last else text


def paired(score: Score, other: Score) -> tuple[float, float]:
    """How much higher one learner scores than another on the same episodes.

    Args:
      score: of one, by `fewshot`.
      other: of the other, by `fewshot` with the same key and tasks.

    Returns:
      The mean difference and half its 95 % interval, 1.96 standard errors of the differences.

    Raises:
      ValueError: the numbers of episodes differ.
    """
    if score.episodes != other.episodes:
        raise ValueError(f"paired: the scores must be of the same episodes, got {score.episodes} and {other.episodes} of them.")
    return over_episodes(score.each - other.each)


def over_episodes(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half its 95 % interval."""
    return float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))


@functools.partial(jax.jit, static_argnums=range(6))
def _curves(learner, sample, metric, together, mesh, every_step, theta, data, keys, staged):
    """The metric after each step for each key, `[len(keys), steps + 1]`, or `[len(keys), 1]` after the last."""

    def one(theta, data, key, own):
        key_task, key_learn = jax.random.split(key)
        task = sample(key_task, data if staged is None else own)
        if every_step:
            outputs = learner.curve(key_learn, theta, task)
        else:
            outputs = learner.predict(learner.adapt(key_learn, theta, task.support), task.query.x)[None]
        extra = () if task.query.mask is None else (task.query.mask,)
        return jax.vmap(lambda y: metric(y, task.query.y, *extra))(outputs)

    def episodes(theta, data, keys, staged):
        size = together if together > 1 else None
        return jax.lax.map(lambda each: one(theta, data, *each), (keys, staged), batch_size=size)

    return spread(episodes, mesh, (False, False, True, True), mean=False)(theta, data, keys, staged)


@functools.partial(jax.jit, static_argnums=range(2))
def _gap(learner, sample, theta, key, data):
    """Largest change of a prediction when a query is predicted alone, relative to the largest output."""
    key_task, key_learn = jax.random.split(key)
    task = sample(key_task, data)
    phi = learner.adapt(key_learn, theta, task.support)
    together = learner.predict(phi, task.query.x)
    alone = learner.predict(phi, jax.tree.map(lambda x: x[:1], task.query.x))
    return jnp.abs(together[:1] - alone).max() / jnp.maximum(jnp.abs(together).max(), 1e-30)


def fewshot(
    key: jax.Array,
    learner: MetaLearner,
    theta: Theta,
    tasks: Tasks,
    episodes: int = 600,
    *,
    metric: Callable[..., jax.Array] | None = None,
    every_step: bool = True,
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> Score:
    """Adapts to fresh episodes and measures the queries after every inner step.

    Args:
      key: the same key gives the same episodes.
      learner: may differ from the one that trained theta, in steps for instance.
      theta: what was meta-learned.
      tasks: episodes of classes that training did not see.
      episodes: how many; 600 is customary.
      metric: `(outputs, y) -> scalar`, or `(outputs, y, mask)`; accuracy if None.
      every_step: False measures after the last inner step alone, which is faster; `by_step` then has that row alone.
      chunk: episodes evaluated together on a device; chosen by device and network if None.
      mesh: devices that the episodes are spread over, as `jmeta.task_mesh()` makes it; None uses one.

    Returns:
      A `Score`; print it.

    Raises:
      ValueError: fewer than 2 episodes, which have no interval.
      TypeError: key, learner, theta or tasks is none.
    """
    check_kinds("fewshot", key, learner, tasks, theta)
    if episodes < 2:
        raise ValueError(f"fewshot: episodes must be at least 2 for an interval, got {episodes}.")
    check_mesh(mesh)
    keys = episode_keys(key, episodes, count_devices(mesh))
    together = chunk or default_chunk(theta.params, keys.shape[1] // count_devices(mesh))
    program = learner, tasks.sample, metric or accuracy, together, mesh, every_step
    run = functools.partial(_curves, *program, *replicate((theta, tasks.data), mesh))
    curves = [hosts.whole(run(part, staged)) for part, staged in ahead(tasks, keys)]
    values = np.concatenate(curves)[:episodes].astype(np.float64)
    by_step = np.array([over_episodes(each) for each in values.T])
    first = jax.tree.map(lambda leaf: leaf[0], _stage(tasks, keys[0, :1])) if tasks.stage else tasks.data
    gap = float(_gap(learner, tasks.sample, theta, keys[0, 0], first))
    return Score(float(by_step[-1, 0]), float(by_step[-1, 1]), by_step, episodes, gap > 1e-3, values[:, -1])


def _stage(tasks: Tasks, keys: jax.Array) -> Any:
    """The host-resident images of each episode, `[len(keys), ...]`, or None where the data is on the device."""
    return None if tasks.stage is None else tasks.stage(jax.vmap(lambda key: jax.random.split(key)[0])(keys))


def episode_keys(key: jax.Array, episodes: int, devices: int) -> jax.Array:
    """A row of keys a dispatch, `[dispatches, size]`, of equal shares for the devices; the last may have some over."""
    size = -(-min(episodes, DISPATCH) // devices) * devices
    numbers = jnp.arange(-(-episodes // size) * size).reshape(-1, size)
    return jax.vmap(jax.vmap(functools.partial(jax.random.fold_in, key)))(numbers)


def ahead(tasks: Tasks, keys: jax.Array) -> Iterator[tuple[jax.Array, Any]]:
    """Each row of keys with its images, which a thread fetches while those of the row before are evaluated."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(_stage, tasks, keys[0])
        for number, part in enumerate(keys):
            staged = waiting.result()
            if number + 1 < len(keys):
                waiting = pool.submit(_stage, tasks, keys[number + 1])
            yield part, staged
