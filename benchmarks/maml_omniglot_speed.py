"""Seconds that a MAML meta-gradient takes, jmeta against PyTorch, on the same weights and the same Omniglot episodes.

    python benchmarks/maml_omniglot_speed.py        about 4 minutes on two cores, most of them torch.compile's

conv4 with 64 filters and stride 2, 32 tasks of 5 ways and 1 shot with 15 queries a class, one inner step, second order,
float32, on the CPU. The contenders take turns in one process. Sampling the episodes is not timed. Nothing else should
run meanwhile: the load average beforehand is kept with the result.

Before anything is timed, losses and meta-gradients must agree in float64. Their differences in float32 are written down
but prove nothing: a ReLU whose input lies within rounding of 0 opens on one side and not on the other, and one such
unit in the support set of one task can move the mean over 32 tasks by a percent or two, as with the default seed.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict

import jmeta as jm
from jmeta.checkpoint import write_json
from jmeta.core import default_chunk
from jmeta.mesh import count_devices, replicate, share
from jmeta.train import batch_gradient

TOLERANCE = 1e-6
REST = 0.3  # seconds before each timed call, in which the threads of the one before it stop spinning
OUT = Path(__file__).parent / "results" / "maml_omniglot_speed.json"

Gradient = dict[str, np.ndarray]
Differences = dict[str, dict[str, float]]  # {peer: {"loss", "gradient"}}, relative to the peer
Missing = dict[str, str]  # {peer: why}


class Contender(NamedTuple):
    """One implementation: `run()` waits for its result, of which `read(result)` makes `(loss, {name: gradient})`."""

    run: Callable[[], Any]
    read: Callable[[Any], tuple[float, Gradient]]


class Spread(NamedTuple):
    """Seconds of the timed calls."""

    median: float
    fastest: float
    slowest: float


def arguments() -> argparse.Namespace:
    """The workload, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"tasks": 32, "ways": 5, "shots": 1, "queries": 15, "filters": 64, "steps": 1, "repeats": 9, "seed": 0}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--order", type=int, default=2, choices=(1, 2))
    parser.add_argument("--rate", type=float, default=0.4, help="inner rate, for a mean loss")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


def load_images() -> tuple[str, jm.Images]:
    """Name and training classes of Omniglot, or of the glyphs where Omniglot cannot be had."""
    try:
        return "omniglot", jm.omniglot().train
    except (FileNotFoundError, ConnectionError) as error:
        print(f"glyphs instead of Omniglot: {error}")
        return "glyphs", jm.glyphs().train


def sample_episodes(images: jm.Images, args: argparse.Namespace) -> jm.Task:
    """A meta-batch of episodes, every array with a leading axis `[tasks]`."""
    tasks = jm.episodes(images, args.ways, args.shots, args.queries)
    keys = jax.random.split(jax.random.key(args.seed), args.tasks)
    return jax.jit(jax.vmap(tasks.sample, (0, None)))(keys, tasks.data)


def make_learner(args: argparse.Namespace) -> jm.MetaLearner:
    """MAML with conv4."""
    model = jm.conv4(args.ways, filters=args.filters)
    return jm.maml(model, jm.xent, optax.sgd(args.rate), jm.repeat(args.steps), order=args.order)


def make_contenders(theta: jm.Theta, batch: jm.Task, args: argparse.Namespace) -> tuple[dict[str, Contender], Missing]:
    """jmeta and the peers that can be imported, and those that cannot."""
    contenders = {"jmeta": jmeta_contender(theta, batch, args)}
    try:
        return contenders | torch_contenders(theta, batch, args), {}
    except ImportError as error:
        return contenders, {"torch": f"{type(error).__name__}: {error}"}


def jmeta_contender(theta: jm.Theta, batch: jm.Task, args: argparse.Namespace) -> Contender:
    """The meta-gradient as `jmeta train` computes it: tasks spread over the cores, and the chunk that `fit` would choose."""
    learner, mesh = make_learner(args), jm.task_mesh(share(args.tasks, jax.device_count()))
    chunk = default_chunk(theta.params, args.tasks // count_devices(mesh))
    gradient = jax.jit(batch_gradient(learner, lambda key, task: task, args.tasks, chunk, mesh), static_argnames="staged")
    key, theta, batch = replicate((jax.random.key(args.seed), theta, batch), mesh)

    def run():
        return jax.block_until_ready(gradient(key, theta, batch, 0, staged=True))

    def read(result):
        _, gradient, info = result
        return float(info["loss"]), jax.tree.map(np.asarray, flatten_dict(gradient.params, sep="/"))

    return Contender(run, read)


def torch_contenders(theta: jm.Theta, batch: jm.Task, args: argparse.Namespace) -> dict[str, Contender]:
    """PyTorch's three ways, with the same weights and episodes."""
    from peers import torch_maml

    params = torch_maml.to_params(jax.tree.map(np.asarray, flatten_dict(theta.params, sep="/")))
    arrays = (batch.support.x, batch.support.y, batch.query.x, batch.query.y)
    episodes = torch_maml.to_episodes(*map(np.asarray, arrays))
    workload = {"rate": args.rate, "steps": args.steps, "order": args.order}

    def read(result):
        return float(result[0]), torch_maml.to_arrays(result[1])

    def contender(way):
        run = way(torch_maml.conv4_loss, **workload)
        return Contender(lambda: run(params, episodes), read)

    ways = {"loop": torch_maml.loop, "vmap": torch_maml.vmapped, "compile": torch_maml.compiled}
    return {f"torch {name}": contender(way) for name, way in ways.items()}


def disagreement(ours: Gradient, theirs: Gradient) -> float:
    """Largest relative difference of any parameter's gradient.

    It is relative to that gradient's norm, or to 1 % of the norm of the whole where that is more: biases in front of a
    batch-norm have a gradient of 0, of which either side makes rounding errors.
    """
    norms = {name: float(np.linalg.norm(g)) for name, g in theirs.items()}
    floor = 0.01 * float(np.linalg.norm(list(norms.values())))
    return max(float(np.linalg.norm(ours[name] - g)) / max(norms[name], floor) for name, g in theirs.items())


def compare(contenders: dict[str, Contender]) -> tuple[Differences, Missing]:
    """Runs everything once and compares the peers' losses and gradients with jmeta's.

    Returns:
      Their relative differences, and those that do not run here.
    """
    loss, gradient = (ours := contenders["jmeta"]).read(ours.run())
    differences, missing = {}, {}
    for name in [name for name in contenders if name != "jmeta"]:
        try:
            their_loss, theirs = contenders[name].read(contenders[name].run())
        except RuntimeError as error:  # torch.compile without a C++ compiler
            missing[name] = f"{type(error).__name__}: {error}"
            continue
        in_loss = abs(loss - their_loss) / abs(their_loss)
        differences[name] = {"loss": in_loss, "gradient": disagreement(gradient, theirs)}
    return differences, missing


def check(theta: jm.Theta, batch: jm.Task, args: argparse.Namespace) -> tuple[Differences, Missing]:
    """`compare` in float64, where two programs of the same function differ by rounding alone.

    Raises:
      SystemExit: a peer runs but disagrees.
    """
    with jax.enable_x64(True):
        contenders, absent = make_contenders(widen(theta), widen(batch), args)
        differences, broken = compare(contenders)
    wrong = {name: found for name, found in differences.items() if not max(found.values()) < TOLERANCE}
    if wrong:
        sys.exit(f"jmeta and PyTorch disagree, relative differences {wrong}; nothing was timed.")
    return differences, absent | broken


def widen(tree: Any) -> Any:
    """Casts every float32 array to float64."""
    return jax.tree.map(lambda leaf: leaf.astype("float64") if leaf.dtype == "float32" else leaf, tree)


def race(contenders: dict[str, Contender], repeats: int) -> dict[str, Spread]:
    """Times the contenders in turn, `repeats` rounds of them."""
    seconds = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            time.sleep(REST)
            start = time.perf_counter()
            contender.run()
            seconds[name].append(time.perf_counter() - start)
    return {name: Spread(statistics.median(times), min(times), max(times)) for name, times in seconds.items()}


def machine() -> dict[str, Any]:
    """Processor, cores, load average of the last minute, and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    installed = {dist.name.lower() for dist in metadata.distributions()}
    packages = [name for name in ("jax", "jaxlib", "flax", "optax", "torch", "numpy") if name in installed]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
    }


def report(result: dict[str, Any]) -> None:
    """Prints the result for people."""
    for name, why in result["missing"].items():
        print(f"{name}: not run, {why}")
    for kind in ("float64", "float32"):
        for name, found in result[f"{kind}_differences"].items():
            print(f"{name:14} differs in {kind} by {found['loss']:.0e} (loss) and {found['gradient']:.0e} (gradient)")
    for name, spread in result["seconds"].items():
        print(f"{name:14} {spread['median']:.3f} s   ({spread['fastest']:.3f} to {spread['slowest']:.3f})")
    if result["speedup"]:
        print(f"jmeta is {result['speedup']:.2f} times as fast as {result['best_peer']}")


def main() -> None:
    """Compares, times, prints, and writes the JSON file."""
    args = arguments()
    jax.config.update("jax_platforms", "cpu")  # where the peers run
    jm.use_cores()
    where = machine()
    dataset, images = load_images()
    batch = sample_episodes(images, args)
    theta = make_learner(args).init(jax.random.key(args.seed))
    agreement, missing = check(theta, batch, args)
    contenders, _ = make_contenders(theta, batch, args)
    contenders = {name: each for name, each in contenders.items() if name not in missing}
    rounding, _ = compare(contenders)
    seconds = race(contenders, args.repeats)
    best = min(agreement, key=lambda name: seconds[name].median, default=None)
    result = {
        "workload": {"data": dataset, **{name: value for name, value in vars(args).items() if name != "out"}},
        "machine": where,
        "missing": missing,
        "float64_differences": agreement,
        "float32_differences": rounding,
        "seconds": {name: spread._asdict() for name, spread in seconds.items()},
        "best_peer": best,
        "speedup": seconds[best].median / seconds["jmeta"].median if best else None,
    }
    report(result)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)


if __name__ == "__main__":
    main()
