"""What the command line does, each command a function that a notebook can call too."""

import dataclasses
import functools
import hashlib
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from jmeta import builders, checkpoint, hosts, presets, pretrain, runs
from jmeta.architecture import genotype, save_genotype
from jmeta.autotune import tune
from jmeta.builders import Problem
from jmeta.core import LONGEST_UNROLL, Batch, MetaLearner, Theta, default_chunk
from jmeta.evaluate import routing as routes
from jmeta.evaluate.fewshot import Score, fewshot
from jmeta.evaluate.search import search as find
from jmeta.mesh import check_batch, count_devices, share, task_mesh
from jmeta.models.supernet import sparse_size
from jmeta.presets import Config
from jmeta.rules import patterns
from jmeta.tasks.images import Images, from_folder, invert, is_picture, read_picture
from jmeta.train import Fit, Validation, fit

BENCHMARKS = ("speed", "growth", "overhead", "frozen")
PAPER = 127  # a border brighter than this is paper: the ink is dark
ROUTED_WAYS = 5  # of the tasks whose channels are compared, at most: few alphabets have 40 classes
RETRAINED = (  # what a derived network shares with its supernet
    *("dataset", "source", "split", "rotate", "classes", "without", "ways", "shots", "seed"),
    *("genotype", "cells", "reductions", "filters", "norm", "precision"),
)
SIZED_TASKS = 20  # whose used weights are counted
TEST_KEY, EPISODE_KEY, ADAPT_KEY, SEARCH_KEY, ROUTING_KEY, SIZE_KEY = range(
    1, 7
)  # folded into the seed's key, after the training's own
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
    score = _test(config, problem, done.theta, problem.test, config.test_episodes, config.seed, mesh)
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
        **_described(config, problem, score),
        **_task_sizes(config, problem, theta),
        "seeds": [config.seed],
        "minutes": _minutes(folder, config.batch),
    }
    checkpoint.write_json(folder / "result.json", result)
    plot(str(folder))
    print(f"{problem.metric_name} on unseen tasks: {score} [norm: {_norm(config)}]")


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


def _test(config: Config, problem: Problem, theta: Theta, tasks: Any, episodes: int, seed: int, mesh: Mesh | None = None) -> Score:
    key = jax.random.fold_in(jax.random.key(seed), TEST_KEY)
    learner = builders.make_learner(config, config.test_steps)
    return fewshot(key, learner, theta, tasks, episodes, metric=problem.metric, mesh=mesh)


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


def _norm(config: Config) -> str:
    return "none" if config.dataset == "sinusoid" else config.norm


def _described(config: Config, problem: Problem, score: Score) -> dict[str, Any]:
    """A result that can stand alone: figure, interval, episodes, normalisation, device, versions, config."""
    return {
        "metric": problem.metric_name,
        "mean": score.mean,
        "interval95": score.interval,
        "by_step": score.by_step.tolist(),
        "episodes": score.episodes,
        "transductive": score.transductive,
        "norm": _norm(config),
        "versions": checkpoint.versions(),
        "config": dataclasses.asdict(config),
    }


def _read(run: str) -> tuple[Config, MetaLearner, Theta]:
    learner, theta, _ = runs.load(run)
    return presets.from_dict(checkpoint.read_run(run)["config"], run), learner, theta


def evaluate(
    run: Annotated[str, tyro.conf.Positional],
    *,
    episodes: int = 600,
    split: Literal["test", "valid", "train"] = "test",
    shots: int | None = None,
    steps: int | None = None,
    pattern: str | None = None,
    seed: int = 0,
    devices: int | None = None,
) -> Path:
    """Tests a run again: other episodes, shots, inner steps or pattern than at its end.

    Args:
      run: folder of a run.
      episodes: how many.
      split: of which classes.
      shots: support images a class, as in training if not given.
      steps: inner steps; if not given those of the pattern's file, or as in the run's tests.
      pattern: layers that adapt at each inner step: a file of `jmeta search`, or text such as "suffix(2)*2, head"; the run's own if
        not given.
      seed: of the episodes.
      devices: GPUs, or cores, that the episodes are spread over; all if not given.

    Returns:
      The JSON file written into the run's folder.
    """
    config, _, theta = _read(run)
    made_for = config.train_shots or config.shots if config.method == "snail" else config.train_shots
    config = dataclasses.replace(config, shots=config.shots if shots is None else shots, train_shots=made_for)
    config = _with_pattern(config, pattern)
    config = config if steps is None else dataclasses.replace(config, test_steps=steps)
    problem = builders.make_problem(config)
    tasks = getattr(problem, split)
    if tasks is None:
        raise ValueError(f"eval: the data of {run} has no validation classes (or the run used none).")
    score = _test(config, problem, theta, tasks, episodes, seed, task_mesh(devices))
    path = checkpoint.fresh(Path(run), "eval", "json")
    checkpoint.write_json(path, {**_described(config, problem, score), "split": split, "seeds": [config.seed], "test_seed": seed})
    print(f"{problem.metric_name} on {split} tasks: {score} [norm: {_norm(config)}]")
    return path


def _with_pattern(config: Config, given: str | None) -> Config:
    """The config with another pattern, from a file, whose rows are then the steps, or from text; with its own if None.

    Raises:
      ValueError: it is neither, or of another network.
    """
    if given is None:
        return config
    config, layers = builders.maskable(config), builders.make_model(config).layers
    if not given.endswith(".json") and not Path(given).is_file():
        return dataclasses.replace(config, pattern=str(patterns.pattern(layers, given)))
    found = patterns.load_pattern(given)
    if found.layers != layers:
        raise ValueError(f"pattern: {given} is for the layers {', '.join(found.layers)}; the run has {', '.join(layers)}.")
    return dataclasses.replace(config, pattern=str(found), test_steps=len(found.rows))


def search(
    run: Annotated[str, tyro.conf.Positional],
    *,
    tolerance: float = 0.01,
    episodes: int = 300,
    steps: int | None = None,
    by: Literal["latency", "throughput", "operations"] = "latency",
    rounds: int = 1,
    timed: int = 24,
    seed: int = 0,
    devices: int | None = None,
) -> Path:
    """Finds which layers need to adapt at which step: the fastest pattern that loses little on validation classes.

    Others are compared with the pattern that the run was trained with.

    Leaves a JSON file for `jmeta eval --pattern` and a picture in the run's folder. Called again with the same options, it goes on
    where it was cut off.

    Args:
      run: folder of a run.
      tolerance: accuracy that may be lost; 0.01 is a point.
      episodes: how many each pattern is scored on, the same for all.
      steps: inner steps, as in the run's tests if not given.
      by: what makes a pattern the faster: the time of one task alone, of many together, or counted operations.
      rounds: times that patterns next to the best are tried too.
      timed: patterns that are timed at most.
      seed: of the episodes.
      devices: GPUs, or cores, that the episodes are spread over; all if not given.

    Returns:
      The JSON file.
    """
    config, _, theta = _read(run)
    steps, mesh = config.test_steps if steps is None else steps, task_mesh(devices)
    problem = builders.make_problem(config)
    if problem.valid is None:
        raise ValueError(
            f"search: the data of {run} has no validation classes (or the run used none), and test classes must not choose."
        )
    model = builders.make_model(config)
    own = {"anil": "head", "boil": "body"}.get(config.method, config.pattern)
    found = find(
        jax.random.fold_in(jax.random.key(seed), SEARCH_KEY),
        functools.partial(builders.make_masked, builders.maskable(config), steps),
        theta,
        patterns.patterns(model, steps),
        problem.valid,
        tolerance=tolerance,
        episodes=episodes,
        by=by,
        rounds=rounds,
        timed=timed,
        reference=patterns.pattern(model, own),
        path=Path(run) / f"search-{steps}steps-{episodes}episodes-seed{seed}-{_digest(theta)}.scores.json",
        mesh=mesh,
    )
    path = checkpoint.fresh(Path(run), "search", "json")
    checkpoint.write_json(path, {**found.as_dict(), "norm": _norm(config), "versions": checkpoint.versions(), "seeds": [seed]})
    found.plot(path.with_suffix(".png"))
    print(f"{found}\n[validation classes, norm: {_norm(config)}]")
    return path


def _digest(theta: Theta) -> str:
    """Eight letters that tell thetas apart: a run may have been gone on with."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(theta):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()[:8]


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
    config, learner, theta = _read(run)
    if pattern is not None:
        config = _with_pattern(config, pattern)
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


def show_presets() -> None:
    """Lists the presets and what each sets."""
    for name, config in presets.PRESETS.items():
        print(_preset_line(name, config, Config()))
    for name, config in pretrain.PRESETS.items():
        print(_preset_line(name, config, pretrain.Pretrain()))


def _preset_line(name: str, config: Any, default: Any) -> str:
    changed = (field.name for field in dataclasses.fields(config) if getattr(config, field.name) != getattr(default, field.name))
    return f"{name:26s}" + " ".join(f"{field}={getattr(config, field)}" for field in changed)


def data(
    name: Annotated[Literal["glyphs", "omniglot", "colour84", "grey28"], tyro.conf.Positional],
    *,
    source: str | None = None,
    split: Literal["customary", "background"] = "customary",
    classes: tuple[int, int, int] = Config.classes,
    without: tuple[str, ...] = (),
    seed: int = 0,
) -> None:
    """Renders glyphs, fetches Omniglot or reads photographs, and shows what is there.

    Args:
      name: of the data set.
      source: where Omniglot lies, looked up or downloaded if not given, or the photographs (see `jmeta.photographs`).
      split: of Omniglot's classes.
      classes: of photographs, to train on, to validate on and to test on.
      without: classes of photographs to leave out.
      seed: of the split.
    """
    asked = Config(dataset=name, source=source, split=split, classes=classes, without=without, seed=seed)
    splits = builders.make_splits(asked)
    assert splits is not None
    for part, images in zip(splits._fields, splits, strict=True):
        if images is not None:
            size = f"{images.pixels.shape[1]}x{images.pixels.shape[2]}, {images.pixels.nbytes / 2**20:.0f} MiB"
            first = ", ".join(images.names[:3])
            print(f"{part:6s}{len(images.names):6d} classes {len(images.pixels):7d} images {size}; {first}, ...")


def bench(args: list[str]) -> int:
    """Runs one of the benchmarks that come with jmeta, in a process of its own.

    Args:
      args: "speed" (also if none is named), "growth", "overhead" or "frozen", and its options; results go to
        `jmeta-bench-NAME.json` here if `--out` is not among them.

    Returns:
      The exit status.
    """
    name, *rest = args if args and args[0] in BENCHMARKS else ["speed", *args]
    here = Path(__file__).parent
    folder = next(each for each in (here / "benchmarks", here.parent / "benchmarks") if (each / "speed.py").is_file())
    out = [] if any(arg.startswith("--out") for arg in rest) else ["--out", f"jmeta-bench-{name}.json"]
    return subprocess.run([sys.executable, str(folder / f"{name}.py"), *rest, *out], check=False).returncode


def derive(run: Annotated[str, tyro.conf.Positional], *, out: str | None = None) -> Path:
    """Writes the discrete architecture that a run of metanas came to, for `jmeta train PRESET --genotype FILE`.

    Args:
      run: folder of a run.
      out: JSON file to write; a new one in the run's folder if not given.

    Returns:
      The file.

    Raises:
      ValueError: the run is of another method.
      FileExistsError: `out` exists.
    """
    config, _, theta = _read(run)
    if config.method != "metanas":
        raise ValueError(f"derive: {run} is of method {config.method}, which has no architecture to derive; metanas has.")
    found = genotype(theta.params)
    path = Path(out) if out else checkpoint.fresh(Path(run), "genotype", "json")
    save_genotype(path, found)
    derived = dataclasses.replace(config, method="reptile", genotype=path.read_text())
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (theta.params["w"], _shapes(derived))]
    for kind, nodes in found._asdict().items():
        for number, choices in enumerate(nodes):
            print(f"{kind} node {number}: {', '.join(f'{op} of input {source}' for op, source in choices)}")
    print(f"{sizes[1]:,} parameters at the width of the supernet, which has {sizes[0]:,}")
    print(f"{_retraining(config, path)}   trains it")
    return path


def _retraining(config: Config, path: Path) -> str:
    """The command that trains the derived network on the same classes."""
    name = "reptile-colour84-5w1s" if config.dataset == "colour84" else "reptile-omniglot-5w1s"
    wanted, default = dataclasses.replace(config, genotype=str(path)), presets.preset(name)
    words = [name]
    for field in RETRAINED:
        value = getattr(wanted, field)
        if value == getattr(default, field):
            continue
        values = () if isinstance(value, bool) else value if isinstance(value, tuple) else (value,)
        words += [f"--{'no-' * (value is False)}{field}", *map(str, values)]
    return f"jmeta train {shlex.join(words)}"


def _shapes(config: Config) -> Any:
    """The shapes of a network's parameters."""
    return jax.eval_shape(builders.make_model(config).init, jax.random.key(0))


def plot(run: Annotated[str, tyro.conf.Positional], *, routing: bool = False, cells: bool = False) -> list[Path]:
    """Draws the learning curve, the score against inner steps, and one test episode with its predictions.

    Args:
      run: folder of a run.
      routing: draw instead which channels the test tasks of each alphabet choose, and how far they agree; for a run of nrml.
      cells: draw instead the cells of the meta-learned architecture and of two test tasks, and the alphas over meta-training; for
        a run of metanas.

    Returns:
      The files in the run's folder, PNG but for `routing.json` and `cells.json`; they are written anew.
    """
    from jmeta import plot as draw

    folder = Path(run)
    config, learner, theta = _read(run)
    if routing:
        return _plot_routing(config, learner, theta, folder)
    if cells:
        return _plot_cells(config, learner, theta, folder)
    paths = [folder / "learning_curve.png"]
    draw.learning_curve(folder / "metrics.jsonl", paths[0])
    if (folder / "result.json").is_file():
        paths.append(folder / "inner_steps.png")
        draw.by_inner_step(json.loads((folder / "result.json").read_text()), paths[-1])
    if config.dataset != "sinusoid":
        paths.append(folder / "episode.png")
        _draw_episode(config, learner, theta, paths[-1])
    return paths


def _plot_routing(config: Config, learner: MetaLearner, theta: Theta, folder: Path) -> list[Path]:
    splits = builders.make_splits(config) if config.method == "nrml" else None
    if splits is None:
        raise ValueError(f"plot: {folder} is of method {config.method}, which chooses no channels; --routing is for nrml.")
    key, ways = jax.random.fold_in(jax.random.key(config.seed), ROUTING_KEY), min(config.ways, ROUTED_WAYS)
    found = routes.routing(key, learner, theta, splits.test, config.keep, ways=ways, shots=config.shots)
    paths = [folder / "routing.json", folder / "routing.png"]
    checkpoint.write_json(paths[0], {**found.figures(), "ways": ways, "norm": _norm(config), "versions": checkpoint.versions()})
    found.plot(paths[1])
    print(f"{found} [norm: {_norm(config)}]")
    return paths


def _plot_cells(config: Config, learner: MetaLearner, theta: Theta, folder: Path) -> list[Path]:
    from jmeta import plot as draw

    if config.method != "metanas":
        raise ValueError(f"plot: {folder} is of method {config.method}, which has no cells to draw; --cells is for metanas.")
    tasks, found = builders.make_problem(config).test, {"meta-model": genotype(theta.params)}
    for number, key in enumerate(jax.random.split(jax.random.fold_in(jax.random.key(config.seed), EPISODE_KEY)), 1):
        key_task, key_learn = jax.random.split(key)
        support = tasks.draw(key_task).support
        found[f"task {number}"] = genotype(jax.jit(learner.adapt)(key_learn, theta, support).params)
    paths = [folder / "cells.json", folder / "cells.png", folder / "alphas.png"]
    checkpoint.write_json(paths[0], {name: own._asdict() for name, own in found.items()})
    draw.cells({name: own._asdict() for name, own in found.items()}, paths[1])
    draw.shares(folder / "metrics.jsonl", paths[2])
    return paths


def _draw_episode(config: Config, learner: MetaLearner, theta: Theta, path: Path) -> None:
    from jmeta import plot as draw

    key_task, key_learn = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), EPISODE_KEY))
    tasks = builders.make_problem(config).test
    task = tasks.draw(key_task)
    phi = jax.jit(learner.adapt)(key_learn, theta, task.support)
    guesses = np.asarray(jax.jit(learner.predict)(phi, task.query.x)).argmax(-1)

    def grid(leaf):
        return np.asarray(leaf).reshape(config.ways, -1, *leaf.shape[1:])

    draw.episode(grid(task.support.x), grid(task.query.x), grid(task.query.y), grid(guesses), path)
