"""Seconds that a MAML meta-gradient takes: jmeta and every peer that is installed, on the same weights and the same episodes.

    python benchmarks/speed.py                                        every row, second and first order
    python benchmarks/speed.py --rows omniglot-5w1s --orders 2        one row

For each row, every contender is first tried alone in a process of its own, which gives the time of its first call (compilation)
and its peak memory, and keeps one that takes too long from stopping the others. Then losses and meta-gradients must agree, in
float64 to 1e-6: in float32 a ReLU whose input lies within rounding of 0 opens on one side and not on the other, which can move the
mean over the tasks by a percent. Then all take turns in one process, in float32. Sampling the episodes is not timed. Nothing else
should run meanwhile: the load average beforehand is kept with the result.
"""

import argparse
import functools
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from peers import Arrays, Contender  # pyright: ignore[reportMissingImports]
from work import ROWS, Work, learner_of, operations, sample  # pyright: ignore[reportMissingImports]

import jmeta as jm
from jmeta.checkpoint import write_json
from jmeta.core import default_chunk
from jmeta.mesh import count_devices, replicate, share
from jmeta.train import batch_gradient

TOLERANCE = 1e-6
REST = 0.3  # seconds before each timed call, in which the threads of the one before it stop spinning
SIDE = 2048  # of the matrices whose product measures the machine
OUT = Path(__file__).parent / "results" / "speed.json"
PEERS = {  # name: module, further arguments
    "torch loop": ("torch_maml", {}),
    "torch vmap": ("torch_maml", {}),
    "torch compile": ("torch_maml", {}),
    "higher": ("torch_modules", {"library": "higher"}),
    "torchopt": ("torch_modules", {"library": "torchopt"}),
    "jax plain": ("jax_plain", {}),
}


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--orders", nargs="+", type=int, default=[2, 1], choices=(1, 2))
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--tasks", type=int, help="tasks of a meta-batch; each row has its own if not given")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for a contender alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--platform", help="jax's platform, such as cpu or cuda; jax's choice if not given")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    return parser.parse_args()


def jmeta_contender(work: Work, theta: jm.Theta, batch: jm.Task) -> Contender:
    """The meta-gradient as `jmeta train` computes it: tasks spread over the devices, and the chunk that `fit` would choose."""
    learner, mesh = learner_of(work), jm.task_mesh(share(work.tasks, jax.device_count()))
    chunk = default_chunk(theta.params, work.tasks // count_devices(mesh))
    gradient = jax.jit(batch_gradient(learner, lambda key, task: task, work.tasks, chunk, mesh), static_argnames="staged")
    key, theta, batch = replicate((jax.random.key(0), theta, batch), mesh)

    def run():
        return jax.block_until_ready(gradient(key, theta, batch, 0, staged=True))

    def read(result):
        _, gradient, info = result
        return float(info["loss"]), jax.tree.map(np.asarray, flatten_dict(gradient.params, sep="/"))

    return Contender(run, read)


def contender(name: str, work: Work, theta: jm.Theta, batch: jm.Task) -> Contender:
    """The contender of that name.

    Raises:
      ImportError: a peer is not installed.
    """
    if name == "jmeta":
        return jmeta_contender(work, theta, batch)
    module, options = PEERS[name]
    params = jax.tree.map(np.asarray, flatten_dict(theta.params, sep="/"))
    episodes = tuple(map(np.asarray, (batch.support.x, batch.support.y, batch.query.x, batch.query.y)))
    return importlib.import_module(f"peers.{module}").contenders(work, params, episodes, **options)[name]


def alone(name: str, work: Work, seed: int) -> dict[str, float]:
    """What one contender needs by itself: seconds of its first two calls, and peak memory above what was there before."""
    theta, batch = sample(work, seed)
    run = contender(name, work, theta, batch).run
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = [_seconds(run) for _ in range(2)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"first_call_seconds": seconds[0], "second_call_seconds": seconds[1], "peak_mib": peak / 1024}


def try_alone(name: str, row: str, work: Work, args: argparse.Namespace) -> dict[str, Any]:
    """`alone`, in a process of its own; `{"missing": why}` where that fails or takes too long."""
    command = [sys.executable, __file__, "--alone", name, "--rows", row, "--orders", str(work.order), "--tasks", str(work.tasks)]
    command += ["--seed", str(args.seed)] + (["--platform", args.platform] if args.platform else [])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit, check=False)
    except subprocess.TimeoutExpired:
        return {"missing": f"two calls were not done after {args.limit:.0f} s"}
    if done.returncode:
        return {"missing": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def disagreement(ours: Arrays, theirs: Arrays) -> float:
    """Largest relative difference of any parameter's gradient.

    It is relative to that gradient's norm, or to 1 % of the norm of the whole where that is more: biases in front of a batch-norm
    have a gradient of 0, of which either side makes rounding errors.
    """
    norms = {name: float(np.linalg.norm(g)) for name, g in theirs.items()}
    floor = 0.01 * float(np.linalg.norm(list(norms.values())))
    return max(float(np.linalg.norm(ours[name] - g)) / max(norms[name], floor) for name, g in theirs.items())


def check(names: list[str], work: Work, theta: jm.Theta, batch: jm.Task) -> dict[str, dict[str, float]]:
    """The peers' differences from jmeta in float64, relative to the peer.

    Raises:
      SystemExit: one disagrees.
    """
    with jax.enable_x64(True):
        theta, batch = _widen(theta), _widen(batch)
        results = {}
        for name in names:
            each = contender(name, work, theta, batch)
            results[name] = each.read(each.run())
    loss, gradient = results["jmeta"]
    found = {
        name: {"loss": abs(loss - theirs[0]) / abs(theirs[0]), "gradient": disagreement(gradient, theirs[1])}
        for name, theirs in results.items()
        if name != "jmeta"
    }
    wrong = {name: each for name, each in found.items() if not max(each.values()) < TOLERANCE}
    if wrong:
        sys.exit(f"jmeta and its peers disagree, relative differences {wrong}; nothing was timed.")
    return found


def _widen(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype("float64") if leaf.dtype == "float32" else leaf, tree)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def race(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Times the contenders in turn, `repeats` rounds of them after one that does not count."""
    seconds = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            time.sleep(REST)
            taken = _seconds(run)
            if number:
                seconds[name].append(taken)
    return {name: {"median": statistics.median(each), "fastest": min(each), "slowest": max(each)} for name, each in seconds.items()}


def matrix_rate() -> float:
    """Floating-point operations a second of a large matrix product in float32, the best of ten: what the machine reaches."""
    matrix = jax.random.normal(jax.random.key(0), (SIDE, SIDE))
    product = jax.jit(jnp.matmul)
    seconds = [_seconds(lambda: product(matrix, matrix).block_until_ready()) for _ in range(11)]
    return 2 * SIDE**3 / min(seconds[1:])


def machine() -> dict[str, Any]:
    """Processor, cores, device, load average of the last minute, and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    installed = {dist.name.lower() for dist in metadata.distributions()}
    packages = [name for name in ("jax", "jaxlib", "flax", "optax", "torch", "higher", "torchopt", "numpy") if name in installed]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "load_before": os.getloadavg()[0],
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
    }


def measure(row: str, work: Work, args: argparse.Namespace) -> dict[str, Any]:
    """One row: who runs, whether they agree, how long they take."""
    contenders = {name: try_alone(name, row, work, args) for name in ["jmeta", *args.peers]}
    names = [name for name, found in contenders.items() if "missing" not in found]
    if "jmeta" not in names:
        sys.exit(f"jmeta itself fails: {contenders['jmeta']['missing']}")
    theta, batch = sample(work, args.seed)
    for name, found in check(names, work, theta, batch).items():
        contenders[name]["differences"] = found
    for name, seconds in race({name: contender(name, work, theta, batch).run for name in names}, args.repeats).items():
        contenders[name]["seconds"] = seconds
    ours = contenders["jmeta"]["seconds"]["median"]
    return {
        "work": work._asdict(),
        "operations": operations(work),
        "contenders": contenders,
        "tasks_per_second": work.tasks / ours,
        "ratios": {name: contenders[name]["seconds"]["median"] / ours for name in names if name != "jmeta"},
    }


def report(name: str, result: dict[str, Any]) -> None:
    """Prints one row for people."""
    rate = result["operations"] / result["contenders"]["jmeta"]["seconds"]["median"]
    of_rate = (
        f"{100 * rate / result['matrix_rate']:.0f} % of the {result['matrix_rate'] / 1e9:.0f} GFLOP/s of a large matrix product"
    )
    print(f"{name}: {result['operations'] / 1e9:.1f} GFLOP, jmeta at {of_rate}")
    for peer, found in result["contenders"].items():
        if "missing" in found:
            print(f"  {peer:14} not run: {found['missing']}")
            continue
        seconds = found["seconds"]
        line = f"{1e3 * seconds['median']:8.1f} ms ({1e3 * seconds['fastest']:.1f} to {1e3 * seconds['slowest']:.1f})"
        ratio = f", {result['ratios'][peer]:.2f} times jmeta's" if peer in result["ratios"] else ""
        print(f"  {peer:14} {line}{ratio}; first call {found['first_call_seconds']:.1f} s, {found['peak_mib']:.0f} MiB")


def main() -> None:
    """Measures, prints, and after each row writes it into the JSON file, whose other rows stay."""
    args = arguments()
    if args.platform:
        jax.config.update("jax_platforms", args.platform)
    jm.use_cores()
    work_of = functools.partial(_work, tasks=args.tasks)
    if args.alone:
        print(json.dumps(alone(args.alone, work_of(args.rows[0], args.orders[0]), args.seed)))
        return
    common = {"machine": machine(), "seed": args.seed, "repeats": args.repeats, "matrix_rate": matrix_rate()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(args.out.read_text()) if args.out.exists() else {}
    for row in args.rows:
        for order in args.orders:
            name = f"{row}, order {order}"
            rows[name] = {**common, **measure(row, work_of(row, order), args)}
            report(name, rows[name])
            write_json(args.out, rows)


def _work(row: str, order: int, tasks: int | None) -> Work:
    work = ROWS[row]._replace(order=order)
    return work if tasks is None else work._replace(tasks=tasks)


if __name__ == "__main__":
    main()
