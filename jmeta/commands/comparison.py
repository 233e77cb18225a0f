"""`jmeta compare --learners ...`: learners trained in turn on tasks of the same classes, and one table of them."""

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jmeta import builders, checkpoint, plot, presets, runs
from jmeta.commands import training
from jmeta.commands.results import TEST_KEY
from jmeta.core import MetaLearner, Tasks, Theta
from jmeta.evaluate.fewshot import fewshot
from jmeta.mesh import task_mesh
from jmeta.presets import PHOTOGRAPHS, Config
from jmeta.train import batch_gradient, fit

PROBED = 3.0  # seconds of meta-steps from which their pace is told
TIMED = 21  # adaptations, of which the median counts
ENDLESS = 1_000_000_000  # meta-steps of a run that is only paced, so that no rate falls meanwhile
TABLE = ("learner", "seed", "meta-steps", "minutes", "test", "shift", "ms a meta-step", "ms to adapt", "MiB a task", "parameters")


def compare(
    *,
    learners: tuple[str, ...],
    out: str,
    preset: str = "omniglot-5w1s",
    seeds: tuple[int, ...] = (0,),
    steps: int | None = None,
    minutes: float | None = None,
    batch: int | None = None,
    shift: tuple[Literal["glyphs", "omniglot", "colour84", "grey28"], ...] = (),
    source: str | None = None,
    photographs: str | None = None,
    split: Literal["customary", "background"] = "customary",
    classes: tuple[int, int, int] = Config.classes,
    without: tuple[str, ...] = (),
) -> Path:
    """Trains learners in turn, each by its preset, tests them on the same episodes, and draws up one table.

    Called again with the same folder, it goes on where it stopped, also within a training. Training episodes, and the network where
    a method needs another, are those of each preset; every row keeps its whole configuration.

    Args:
      learners: names such as maml, reptile, protonet; `LEARNER-PRESET` must be a preset.
      out: folder of the runs, of `compare.json` with all figures, and of `compare.md` and `compare.png`.
      preset: the rest of the presets' name, such as omniglot-20w1s.
      seeds: of the runs.
      steps: meta-steps of each run; those of its preset if neither these nor minutes are given. A warm-up keeps its share.
      minutes: of training that each run gets instead, compilation, validation and tuning left out: meta-steps are counted out
        beforehand.
      batch: tasks of a meta-step; those of each preset if not given.
      shift: other data sets to test on as well, such as glyphs.
      source: where Omniglot lies; looked up or downloaded if not given.
      photographs: where those of colour84 and grey28 lie (see `jmeta.photographs`).
      split: of Omniglot's classes, customary or background.
      classes: of photographs, to train on, to validate on and to test on.
      without: classes of photographs to leave out.

    Returns:
      `compare.json`.

    Raises:
      ValueError: a learner has no such preset or cannot be trained so, both steps and minutes are given or one is not above 0,
        photographs are not given that are needed, another data set has no images of the size that the preset's have, or a run in
        the folder was made by other arguments.
      FileNotFoundError: there is nothing where the photographs should be.
    """
    _check_numbers(learners, seeds, steps, minutes, batch)

    def on(dataset: str, config: Config) -> Any:
        """The config on a data set, with what that set alone is told by."""
        own: Any = {"source": photographs, "classes": classes, "without": without}
        own = own if dataset in PHOTOGRAPHS else {"source": source, "split": split} if dataset == "omniglot" else {}
        return dataclasses.replace(config, dataset=dataset, **own)

    configs: dict[str, Config] = {name: presets.preset(f"{name}-{preset}") for name in learners}
    for name, config in configs.items():
        _check_shift(config.dataset, shift, photographs)
        config = on(config.dataset, config if batch is None else dataclasses.replace(config, batch=batch))
        configs[name] = config if steps is None else _sized(config, steps)
    unseen: Any = {(each, seed): builders.make_splits(on(each, Config(seed=seed))) for each in shift for seed in seeds}
    others = {
        (name, seed): {each: builders.unseen(config, unseen[each, seed].test) for each in shift}
        for name, config in configs.items()
        for seed in seeds
    }
    for config in configs.values():
        training.check(dataclasses.replace(config, seed=seeds[0]))
    folder, rows = Path(out), []
    folder.mkdir(parents=True, exist_ok=True)
    for name, config in configs.items():
        if minutes is not None:
            config = _affordable(f"{name}-{preset}", config, minutes, folder)
        for seed in seeds:
            run = folder / f"{name}-{preset}-seed{seed}"
            rows.append(_one(name, dataclasses.replace(config, seed=seed), run, others[name, seed]))
            checkpoint.write_json(folder / "compare.json", rows)
            (folder / "compare.md").write_text(_table(rows))
            print(_table(rows[-1:]).splitlines()[-1], flush=True)
    print(_table(rows))
    plot.compared(rows, folder / "compare.png")
    return folder / "compare.json"


def _check_numbers(
    learners: tuple[str, ...], seeds: tuple[int, ...], steps: int | None, minutes: float | None, batch: int | None
) -> None:
    if steps is not None and minutes is not None:
        raise ValueError("compare: give --steps or --minutes, not both.")
    for name, number in {"steps": steps, "minutes": minutes, "batch": batch}.items():
        if number is not None and number <= 0:
            raise ValueError(f"compare: {name} must be above 0, got {number}.")
    for name, given in {"learners": learners, "seeds": seeds}.items():
        if not given or len(set(given)) < len(given):
            raise ValueError(f"compare: {name} must be at least one, each once, got {given}.")


def _check_shift(dataset: str, shift: tuple[str, ...], photographs: str | None) -> None:
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


def _sized(config: Config, steps: int) -> Config:
    """The config with so many meta-steps, of which a warm-up has the share that it has in the preset."""
    return dataclasses.replace(config, steps=steps, warmup=config.warmup * steps // config.steps)


def _affordable(preset: str, config: Config, minutes: float, folder: Path) -> Config:
    """The config with the meta-steps that fit into so many minutes, counted out once and kept, and tuned where that many are."""
    path, name = folder / "budget.json", f"{preset}, {minutes:g} minutes, {config.batch} tasks"
    known = json.loads(path.read_text()) if path.is_file() else {}
    if name not in known:
        problem, mesh = builders.make_problem(config), training.mesh_of(config, None)
        fitting = _sized(config, _fitting(config, problem, minutes))
        tuned, chunk = training.tuned(fitting, problem, mesh)
        tuned = dataclasses.replace(tuned, chunk=chunk)
        if tuned != fitting:
            tuned = _sized(tuned, _fitting(tuned, problem, minutes))
        checkpoint.write_json(path, {**known, name: {"steps": tuned.steps, "chunk": tuned.chunk, "unroll": tuned.unroll}})
    found = json.loads(path.read_text())[name]
    return dataclasses.replace(_sized(config, found["steps"]), chunk=found["chunk"], unroll=found["unroll"])


def _fitting(config: Config, problem: builders.Problem, minutes: float) -> int:
    """Meta-steps that fit into so many minutes."""
    return max(1, int(60 * minutes / _pace(config, problem)))


def _pace(config: Config, problem: builders.Problem) -> float:
    """Seconds of a meta-step once it is compiled, the mean over those of a warm-up and the others."""
    warm = config.warmup / config.steps
    phases = {ENDLESS - 1: warm, 0: 1 - warm}
    return sum(
        share * _seconds(dataclasses.replace(config, steps=ENDLESS, warmup=warmup), problem)
        for warmup, share in phases.items()
        if share
    )


def _seconds(config: Config, problem: builders.Problem) -> float:
    """Seconds of a meta-step of a run, compilation left out."""
    learner, outer, mesh = builders.make_learner(config), builders.make_outer(config), training.mesh_of(config, None)
    how: dict[str, Any] = {"chunk": config.chunk, "mesh": mesh, "progress": False}

    def run(count: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(fit(jax.random.key(0), learner, problem.train, outer, count, config.batch, **how).last)
        return time.perf_counter() - start

    run(1)
    count, spent = 1, run(1)
    while spent < PROBED:
        count *= 2
        spent = run(count)
    return spent / count


def _one(name: str, config: Config, folder: Path, shift: dict[str, Tasks]) -> dict[str, Any]:
    """Trains or goes on, and measures what is not measured yet, also on tasks of other data sets."""
    _check_kept(config, folder)
    if not (folder / "result.json").is_file():
        training.train(config, folder, name=name, resume=(folder / "run.json").is_file())
    path, (learner, theta, _) = folder / "compared.json", runs.load(folder)
    if not path.is_file():
        checkpoint.write_json(path, {"learner": name, "shift": {}, **_measured(config, folder, learner, theta)})
    row = json.loads(path.read_text())
    key = jax.random.fold_in(jax.random.key(config.seed), TEST_KEY)
    for dataset in [each for each in shift if each not in row["shift"]]:
        score = fewshot(key, learner, theta, shift[dataset], config.test_episodes, every_step=False, mesh=task_mesh())
        row["shift"][dataset] = [score.mean, score.interval]
        checkpoint.write_json(path, row)
    return {**row, "shift": {each: row["shift"][each] for each in shift}}


def _check_kept(config: Config, folder: Path) -> None:
    """Refuses a run that was made by other arguments; what only orders sums may differ."""
    if not (folder / "run.json").is_file():
        return
    stored = presets.from_dict(checkpoint.read_run(folder)["config"], folder)
    kept, wanted = (dataclasses.asdict(each) for each in (stored, builders.with_genotype(config)))
    other = [each for each in wanted if each not in ("chunk", "unroll") and kept[each] != wanted[each]]
    if other:
        differs = ", ".join(f"{each} {kept[each]} and not {wanted[each]}" for each in other)
        raise ValueError(f"compare: {folder} was made with {differs}. Usual cause: other arguments, same --out; give a new folder.")


def _measured(config: Config, folder: Path, learner: MetaLearner, theta: Theta) -> dict[str, Any]:
    """A row of the table, without tests on other data sets."""
    result, problem, begun = (
        json.loads((folder / "result.json").read_text()),
        builders.make_problem(config),
        checkpoint.read_run(folder),
    )
    config = dataclasses.replace(config, chunk=begun["chunk"], unroll=begun["config"]["unroll"])
    support = problem.test.draw(jax.random.key(0)).support
    adapt = jax.jit(learner.adapt)
    kept = ("metric", "mean", "interval95", "episodes", "transductive", "norm", "minutes", "versions", "config")
    return {
        "seed": config.seed,
        "meta_steps": config.steps,
        **{name: result[name] for name in kept},
        **_one_at_a_time(config, problem, theta),
        "meta_step_seconds": _pace(config, problem),
        "adaptation_seconds": _median_seconds(lambda: adapt(jax.random.key(0), theta, support)),
        "meta_step_mib": _memory(config, problem, theta) / 2**20,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves((theta.params, theta.hyper))),
    }


def _one_at_a_time(config: Config, problem: builders.Problem, theta: Theta) -> dict[str, Any]:
    """Of reptile, whose paper gives both: the score where no query is normalised by the others."""
    if config.method != "reptile":
        return {}
    learner = builders.make_learner(dataclasses.replace(config, transductive=False), config.test_steps)
    key = jax.random.fold_in(jax.random.key(config.seed), TEST_KEY)
    score = fewshot(key, learner, theta, problem.test, config.test_episodes, every_step=False, mesh=task_mesh())
    return {"one_at_a_time": [score.mean, score.interval]}


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


def _table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row a run, and what all of them share."""

    def alone(row: dict[str, Any]) -> str:
        found = row.get("one_at_a_time")
        return f", one at a time {_score(row['metric'], *found)}" if found else ""

    lines = [f"| {' | '.join(TABLE)} |", "|" + "---|" * len(TABLE)]
    for row in rows:
        cells = [
            row["learner"],
            str(row["seed"]),
            f"{row['meta_steps']:,}",
            f"{row['minutes']:.1f}",
            _score(row["metric"], row["mean"], row["interval95"]) + alone(row),
            ", ".join(f"{name} {_score(row['metric'], *score)}" for name, score in row["shift"].items()) or "-",
            f"{1e3 * row['meta_step_seconds']:.1f}",
            f"{1e3 * row['adaptation_seconds']:.2f}",
            f"{row['meta_step_mib']:.1f}",
            f"{row['parameters']:,}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    shared = {f"{row['metric']} on {row['episodes']} episodes, 95 % intervals, norm {row['norm']}" for row in rows}
    return "\n".join([*(f"{line}\n" for line in sorted(shared)), *lines]) + "\n"


def _score(metric: str, mean: float, half: float) -> str:
    return f"{100 * mean:.1f} ± {100 * half:.1f} %" if metric == "accuracy" else f"{mean:.3f} ± {half:.3f}"
