"""What `jmeta train` does, which a notebook can call too."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jmeta import builders, checkpoint, hosts
from jmeta.autotune import tune
from jmeta.builders import Problem
from jmeta.commands.pictures import plot
from jmeta.commands.results import SIZE_KEY, described, norm_of, scored
from jmeta.core import LONGEST_UNROLL, Theta, default_chunk
from jmeta.evaluate.fewshot import Score
from jmeta.mesh import check_batch, count_devices, share, task_mesh
from jmeta.models.supernet import sparse_size
from jmeta.presets import Config
from jmeta.train import Fit, Validation, fit

SIZED_TASKS = 20  # whose used weights are counted
# Passes through a task, forward and backward, times parameters, from which a run is tuned: conv4 makes as many in about five
# minutes on two cores, of which the autotune takes one or two. A shorter run would lose by being tuned.
TUNED_FROM = 128_000 * 112_000


def train(
    config: Config, workdir: str | Path | None = None, *, name: str = "run", resume: bool = False, devices: int | None = None
) -> Path:
    """Trains, tests on unseen classes, and leaves checkpoints, metrics.jsonl, result.json and pictures in a folder.

    Args:
      config: what to train.
      workdir: a new folder; `runs/NAME-DATE-TIME` if None.
      name: of the preset, for that folder.
      resume: go on with the run in workdir.
      devices: that the tasks of a meta-step are spread over; if None, what a resumed run began with, or all that can take equal
        shares of the meta-batch. After `jmeta.start_processes` it is all devices of all processes, and process 0 alone writes and
        prints.

    Returns:
      The folder.

    Raises:
      ValueError, FileExistsError, FloatingPointError: as `jmeta.fit` and the data say, before any long work where possible.
    """
    folder = Path(workdir) if workdir else Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    checkpoint.check_workdir(folder, resume)
    config = builders.with_genotype(config)
    kept = _kept_devices(folder) if jax.process_count() == 1 else None
    mesh = mesh_of(config, kept if devices is None else devices)
    problem = builders.make_problem(config)
    _check_test(config, problem)
    if (folder / "run.json").is_file():
        config, chunk = _as_begun(config, folder), config.chunk
    else:
        config, chunk = tuned(config, problem, mesh)
    done = _fit(config, problem, folder, resume, mesh, chunk)
    score = scored(config, problem, done.theta, problem.test, config.test_episodes, config.seed, mesh)
    hosts.alone(mesh, lambda: _conclude(config, problem, folder, score, done.theta))
    return folder


def check(config: Config) -> None:
    """Refuses what could not be trained and tested, without any training.

    Raises:
      ValueError: as said.
    """
    mesh_of(config, None)
    _check_test(config, builders.make_problem(config))


def _conclude(config: Config, problem: Problem, folder: Path, score: Score, theta: Theta) -> None:
    """Writes the result of a run, draws its pictures and prints its score."""
    result = {
        **described(config, problem, score),
        **_task_sizes(config, problem, theta),
        "seeds": [config.seed],
        "minutes": _minutes(folder, config.batch),
    }
    checkpoint.write_json(folder / "result.json", result)
    plot(str(folder))
    print(f"{problem.metric_name} on unseen tasks: {score} [norm: {norm_of(config)}]")


def _check_test(config: Config, problem: Problem) -> None:
    """Lets what a test would refuse be refused before it trains."""
    for tasks, steps in ((problem.train, None), (problem.test, config.test_steps)):
        if tasks.stage is None:
            learner = builders.make_learner(config, steps)
            task = jax.eval_shape(tasks.sample, jax.random.key(0), tasks.data)
            jax.eval_shape(
                lambda task, learner=learner: learner.curve(jax.random.key(0), learner.init(jax.random.key(0)), task), task
            )


def _minutes(folder: Path, batch: int) -> float:
    """Minutes of training, compilation and validation, over all the calls that a run took."""
    seconds, before = 0.0, 0
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        seconds += (row["step"] - before) * batch / row["tasks_per_second"]
        before = row["step"]
    return round(seconds / 60, 1)


def _kept_devices(folder: Path) -> int | None:
    """Devices of a run to be resumed; None for a new one."""
    return checkpoint.read_run(folder).get("devices", 1) if (folder / "run.json").is_file() else None


def mesh_of(config: Config, devices: int | None) -> Mesh | None:
    """The devices of a run: so many, or as many as can take equal shares of its meta-batch; with several processes, all of them."""
    chunk = config.chunk or 1
    if chunk < 1 or config.batch % chunk:
        raise ValueError(f"train: batch must be divisible by chunk, got batch {config.batch} and chunk {config.chunk}.")
    if jax.process_count() > 1:
        if devices is not None and jax.default_backend() != "cpu":
            raise ValueError(f"devices: several processes train on all their devices, got --devices {devices}; leave it out.")
        devices = jax.device_count()
    mesh = task_mesh(share(config.batch // chunk, jax.device_count()) if devices is None else devices)
    check_batch(config.batch, mesh)
    return mesh


def _as_begun(config: Config, folder: Path) -> Config:
    """The config with the unroll that the run in the folder began with; `fit` itself takes up its chunk."""
    kept = checkpoint.read_run(folder)["config"]
    if config.unroll is not None or not isinstance(kept, dict):
        return config
    return dataclasses.replace(config, unroll=kept.get("unroll"))


def tuned(config: Config, problem: Problem, mesh: Mesh | None) -> tuple[Config, int | None]:
    """The config with the fastest unroll, and the fastest chunk, of those not given; in a short run both stay as they are.

    The chunk stays out of the config: a run resumed on other devices may need another.
    """
    if config.chunk is not None and config.unroll is not None:
        return config, config.chunk
    params = jax.eval_shape(builders.make_learner(config).init, jax.random.key(0)).params
    alone = jax.process_count() == 1
    if not alone or _work(config, params) < TUNED_FROM:
        if hosts.leads():
            why = "a run this short is" if alone else "several processes are"
            print(f"{_untuned(config, params, mesh)} (default: {why} not tuned)", flush=True)
        return config, config.chunk
    print("measuring chunk and unroll ...", flush=True)
    choice = tune(
        jax.random.key(config.seed),
        lambda unroll: builders.make_learner(dataclasses.replace(config, unroll=unroll)),
        problem.train,
        config.batch,
        mesh=mesh,
        chunks=None if config.chunk is None else (config.chunk,),
        unrolls=None if config.unroll is None else (config.unroll,),
    )
    print(choice, flush=True)
    return dataclasses.replace(config, unroll=choice.unroll), choice.chunk


def _work(config: Config, params: Any) -> int:
    """Passes times parameters of a whole run."""
    return config.steps * config.batch * (config.inner_steps + 1) * sum(leaf.size for leaf in jax.tree.leaves(params))


def _untuned(config: Config, params: Any, mesh: Mesh | None) -> str:
    """What is in force where nothing is measured."""
    chunk = default_chunk(params, config.batch // count_devices(mesh)) if config.chunk is None else config.chunk
    unroll = config.inner_steps <= LONGEST_UNROLL if config.unroll is None else config.unroll
    return f"chunk {chunk}, {'unrolled' if unroll else 'scanned'}"


def _fit(config: Config, problem: Problem, folder: Path, resume: bool, mesh: Mesh | None, chunk: int | None) -> Fit:
    validate = None
    if problem.valid is not None:
        tested = builders.make_learner(config, config.test_steps)
        validate = Validation(tested, problem.valid, config.validate_episodes, config.validate_every)
    return fit(
        jax.random.key(config.seed),
        builders.make_learner(config),
        problem.train,
        builders.make_outer(config),
        config.steps,
        config.batch,
        validate=validate,
        chunk=chunk,
        mesh=mesh,
        workdir=folder,
        resume=resume,
        config=config,
        labels=problem.labels,
        save_every=config.save_every,
    )


def _task_sizes(config: Config, problem: Problem, theta: Theta) -> dict[str, Any]:
    """How many weights tests' tasks use of a supernet, for metanas."""
    if config.method != "metanas":
        return {}
    learner = builders.make_learner(config, config.test_steps)

    @jax.jit
    def size(key, support):
        params = learner.adapt(key, theta, support).params
        return sparse_size(params, temperature=builders.COLDEST, threshold=builders.TEST_THRESHOLD)

    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), SIZE_KEY), SIZED_TASKS)
    pairs = (jax.random.split(key) for key in keys)
    sizes = np.array([int(size(key_learn, problem.test.draw(key_task).support)) for key_task, key_learn in pairs])
    whole = sum(leaf.size for leaf in jax.tree.leaves(theta.params["w"]))
    figures = {"mean": float(sizes.mean()), "least": int(sizes.min()), "most": int(sizes.max())}
    return {"task_parameters": {**figures, "tasks": len(sizes), "all": whole}}
