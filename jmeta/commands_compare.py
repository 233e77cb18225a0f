"""`jmeta compare --learners ...`: learners trained in turn on the same tasks, and one table of them."""

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jmeta import builders, checkpoint, commands, plot, presets, runs
from jmeta.core import Tasks, Theta
from jmeta.evaluate.fewshot import fewshot
from jmeta.mesh import task_mesh
from jmeta.presets import PHOTOGRAPHS, Config
from jmeta.train import batch_gradient, fit

PROBED = 3.0  # seconds of meta-steps from which the number that fits a budget is told
TIMED = 21  # adaptations, of which the median counts


def compare(
    *,
    learners: tuple[str, ...],
    out: str,
    preset: str = "omniglot-5w1s",
    seeds: tuple[int, ...] = (0,),
    steps: int | None = None,
    minutes: float | None = None,
    shift: tuple[Literal["glyphs", "omniglot", "colour84", "grey28"], ...] = (),
    source: str | None = None,
    photographs: str | None = None,
    split: Literal["customary", "background"] = "customary",
    classes: tuple[int, int, int] = Config.classes,
    without: tuple[str, ...] = (),
) -> Path:
    """Trains learners in turn, each by its preset, tests them on the same episodes, and draws up one table.

    Called again with the same folder, it goes on where it stopped, also within a training.

    Args:
      learners: names such as maml, reptile, protonet; `LEARNER-PRESET` must be a preset.
      out: folder of the runs, of `compare.json` with all figures, and of `compare.png`.
      preset: the rest of the presets' name, such as omniglot-20w1s.
      seeds: of the runs.
      steps: meta-steps of each run; those of its preset if neither these nor minutes are given.
      minutes: of training that each run gets instead, compilation left out: meta-steps are counted out beforehand.
      shift: other data sets to test on as well, such as glyphs.
      source: where Omniglot lies; looked up or downloaded if not given.
      photographs: where those of colour84 and grey28 lie (see `jmeta.photographs`).
      split: of Omniglot's classes, customary or background.
      classes: of photographs, to train on, to validate on and to test on.
      without: classes of photographs to leave out.

    Returns:
      `compare.json`.

    Raises:
      ValueError: a learner has no such preset, both steps and minutes are given, photographs are not given that are needed, or
        another data set has no images of the size that the preset's have.
      FileNotFoundError: there is nothing where the photographs should be.
    """
    if steps is not None and minutes is not None:
        raise ValueError("compare: give --steps or --minutes, not both.")

    def on(dataset: str, config: Config) -> Any:
        """The config on a data set, with what that set alone is told by."""
        own: Any = {"source": photographs, "classes": classes, "without": without}
        own = own if dataset in PHOTOGRAPHS else {"source": source, "split": split} if dataset == "omniglot" else {}
        return dataclasses.replace(config, dataset=dataset, **own)

    configs: dict[str, Any] = {name: presets.preset(f"{name}-{preset}") for name in learners}
    for config in configs.values():
        _check(config.dataset, shift, photographs)
    unseen: Any = {(each, seed): builders.make_splits(on(each, Config(seed=seed))) for each in shift for seed in seeds}
    others = {
        (name, seed): {each: builders.unseen(config, unseen[each, seed].test) for each in shift}
        for name, config in configs.items()
        for seed in seeds
    }
    folder, rows = Path(out), []
    folder.mkdir(parents=True, exist_ok=True)
    for name, config in configs.items():
        config = on(config.dataset, config)
        if steps is not None or minutes is not None:
            config = dataclasses.replace(config, steps=steps or _affordable(f"{name}-{preset}", config, minutes or 0, folder))
        for seed in seeds:
            run = folder / f"{name}-{preset}-seed{seed}"
            row = _one(name, dataclasses.replace(config, seed=seed), run, others[name, seed])
            rows.append(row)
            checkpoint.write_json(folder / "compare.json", rows)
            print(_line(row), flush=True)
    plot.compared(rows, folder / "compare.png")
    return folder / "compare.json"


def _check(dataset: str, shift: tuple[str, ...], photographs: str | None) -> None:
    shape = presets.SHAPES.get(dataset)
    for other in shift:
        if presets.SHAPES[other] != shape:
            own = "no images" if shape is None else f"images of shape {shape}"
            raise ValueError(f"compare: shift is {other}, of shape {presets.SHAPES[other]}, but {dataset} has {own}.")
    for each in {dataset, *shift} & set(PHOTOGRAPHS):
        if photographs is None:
            raise ValueError(f"compare: {each} needs --photographs, an .npz file or a folder of pictures a class.")
        if not Path(photographs).exists():
            raise FileNotFoundError(f"compare: photographs is {photographs}, but there is nothing.")


def _affordable(preset: str, config: Config, minutes: float, folder: Path) -> int:
    """The meta-steps that fit into so many minutes, measured once and kept."""
    path, name = folder / "budget.json", f"{preset}, {minutes:g} minutes"
    known = json.loads(path.read_text()) if path.is_file() else {}
    if name not in known:
        problem, mesh = builders.make_problem(config), commands.mesh_of(config, None)
        long = dataclasses.replace(config, steps=1_000_000_000)  # so that no rate falls meanwhile
        learner, outer = builders.make_learner(long), builders.make_outer(long)
        key, count, spent = jax.random.key(0), 1, 0.0
        while spent < PROBED:
            count, start = 2 * count, time.perf_counter()
            jax.block_until_ready(fit(key, learner, problem.train, outer, count, config.batch, mesh=mesh, progress=False).last)
            spent = time.perf_counter() - start
        checkpoint.write_json(path, {**known, name: max(1, int(60 * minutes / spent * count))})
    return json.loads(path.read_text())[name]


def _one(name: str, config: Config, folder: Path, shift: dict[str, Tasks]) -> dict[str, Any]:
    """Trains or goes on, and measures, also on tasks of other data sets."""
    if not (folder / "result.json").is_file():
        commands.train(config, folder, name=name, resume=(folder / "run.json").is_file())
    result, (learner, theta, _) = json.loads((folder / "result.json").read_text()), runs.load(folder)
    problem = builders.make_problem(config)
    support = problem.test.draw(jax.random.key(0)).support
    adapt = jax.jit(learner.adapt)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    others = {}
    for dataset, tasks in shift.items():
        key = jax.random.fold_in(jax.random.key(config.seed), commands.TEST_KEY)
        score = fewshot(key, learner, theta, tasks, config.test_episodes, every_step=False, mesh=task_mesh())
        others[dataset] = [score.mean, score.interval]
    return {
        "learner": name,
        "seed": config.seed,
        "meta_steps": config.steps,
        "mean": result["mean"],
        "interval95": result["interval95"],
        "shift": others,
        "episodes": result["episodes"],
        "transductive": result["transductive"],
        "norm": result["norm"],
        "minutes": result["minutes"],
        "meta_step_seconds": config.batch / last["tasks_per_second"],
        "adaptation_seconds": _median_seconds(lambda: adapt(jax.random.key(0), theta, support)),
        "meta_step_mib": _memory(config, problem, theta) / 2**20,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves((theta.params, theta.hyper))),
        "versions": result["versions"],
        "config": result["config"],
    }


def _median_seconds(run: Any) -> float:
    seconds = []
    for _ in range(TIMED):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _memory(config: Config, problem: builders.Problem, theta: Theta) -> float:
    """Bytes of temporary arrays in the compiled meta-gradient of one task, NaN where the device does not tell."""
    key, train = jax.random.key(0), problem.train
    gradient = jax.jit(batch_gradient(builders.make_learner(config), train.sample, 1, 1), static_argnums=4)
    data = train.data if train.stage is None else train.stage(key[None])
    compiled = gradient.lower(key, theta, data, jnp.int32(0), train.stage is not None).compile()
    found = compiled.memory_analysis()
    return float("nan") if found is None else float(found.temp_size_in_bytes)


def _line(row: dict[str, Any]) -> str:
    """One row for people."""
    shifted = "".join(f", {name} {100 * mean:.1f} ± {100 * half:.1f}" for name, (mean, half) in row["shift"].items())
    return (
        f"{row['learner']}, seed {row['seed']}, {row['meta_steps']:,} meta-steps in {row['minutes']:.1f} minutes: "
        f"{100 * row['mean']:.1f} ± {100 * row['interval95']:.1f} %{shifted} ({row['episodes']} episodes, norm {row['norm']}); "
        f"{1e3 * row['meta_step_seconds']:.1f} ms a meta-step, {1e3 * row['adaptation_seconds']:.2f} ms to adapt, "
        f"{row['meta_step_mib']:.1f} MiB a task, {row['parameters']:,} parameters"
    )
