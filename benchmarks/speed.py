"""Time and memory of MAML: jmeta and every peer that is installed, on the same weights and the same episodes.

    python benchmarks/speed.py                                        every row
    python benchmarks/speed.py --rows omniglot-5w1s --orders 2        one row
    python benchmarks/speed.py --platform cuda                        on a GPU, with a PyTorch for CUDA

For each row, every contender is first tried alone in a process of its own, which gives the time of its first call (compilation)
and its peak memory, and keeps one that takes too long from stopping the others. Then losses and meta-gradients must agree, in
float64 to 1e-6: in float32 a ReLU whose input lies within rounding of 0 opens on one side and not on the other, which can move the
mean over the tasks by a percent. Then all take turns in one process, in float32. Sampling the episodes is timed in evaluation
alone, and there for jmeta alone. Nothing else should run meanwhile: the load average beforehand is kept with the result.
"""

import argparse
import functools
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from chart import draw  # pyright: ignore[reportMissingImports]
from flax.traverse_util import flatten_dict
from machine import bandwidth, machine, matrix_rate, seconds_of  # pyright: ignore[reportMissingImports]
from peers import Arrays, Contender  # pyright: ignore[reportMissingImports]
from work import ROWS, Work, learner_of, operations, sample, shortest, tasks_of  # pyright: ignore[reportMissingImports]

import jmeta as jm
from jmeta.checkpoint import write_json
from jmeta.core import default_chunk
from jmeta.mesh import count_devices, replicate, share, spread
from jmeta.train import batch_gradient

TOLERANCE = 1e-6
REST = 0.3  # seconds before each timed call, in which the threads of the one before it stop spinning
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
    parser.add_argument("--orders", nargs="+", type=int, default=[2, 1], choices=(1, 2), help="of meta-gradients")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--tasks", type=int, help="tasks of a meta-batch; each row has its own if not given")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for a contender alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--platform", help="jax's platform, such as cpu or cuda; jax's choice if not given")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    return parser.parse_args()


def jmeta_contender(work: Work, theta: jm.Theta, batch: jm.Task, seed: int) -> Contender:
    """As `jmeta train` and `jmeta eval` compute it: tasks spread over the devices, and the chunk that `fit` would choose."""
    mesh = jm.task_mesh(share(work.tasks, jax.device_count()))
    make = {"train": _gradient, "adapt": _adaptation, "evaluate": _evaluation}[work.kind]
    run = make(work, learner_of(work), mesh, theta, batch, seed)
    return Contender(lambda: jax.block_until_ready(run()), lambda result: jax.tree.map(np.asarray, flatten_dict(result, sep="/")))


def _gradient(work: Work, learner: jm.MetaLearner, mesh: Any, theta: jm.Theta, batch: jm.Task, seed: int) -> Callable:
    """The mean meta-gradient and loss."""
    chunk = default_chunk(theta.params, work.tasks // count_devices(mesh))
    gradient = jax.jit(batch_gradient(learner, lambda key, task: task, work.tasks, chunk, mesh), static_argnames="staged")
    key, theta, batch = replicate((jax.random.key(0), theta, batch), mesh)

    def run():
        _, grads, info = gradient(key, theta, batch, 0, staged=True)
        return {**grads.params, "loss": info["loss"]}

    return run


def _adaptation(work: Work, learner: jm.MetaLearner, mesh: Any, theta: jm.Theta, batch: jm.Task, seed: int) -> Callable:
    """The mean of the adapted parameters."""

    def mean(key, theta, supports):
        def add(total, support):
            return jax.tree.map(jnp.add, total, learner.adapt(key, theta, support).params), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, theta.params), supports)
        return jax.tree.map(lambda leaf: leaf / len(supports.y), total)

    program = jax.jit(spread(mean, mesh, (False, False, True)))
    arguments = replicate((jax.random.key(0), theta, batch.support), mesh)
    return lambda: program(*arguments)


def _evaluation(work: Work, learner: jm.MetaLearner, mesh: Any, theta: jm.Theta, batch: jm.Task, seed: int) -> Callable:
    """`jm.fewshot`, which draws the episodes itself."""
    tasks, key = tasks_of(work), jax.random.key(seed)
    evaluate = functools.partial(jm.fewshot, key, learner, theta, tasks, work.tasks, every_step=False, mesh=mesh)
    return lambda: {"accuracy": np.array(evaluate().mean)}


def contender(name: str, work: Work, theta: jm.Theta, batch: jm.Task, seed: int) -> Contender:
    """The contender of that name.

    Raises:
      ImportError: a peer is not installed.
    """
    if name == "jmeta":
        return jmeta_contender(work, theta, batch, seed)
    module, options = PEERS[name]
    params = jax.tree.map(np.asarray, flatten_dict(theta.params, sep="/"))
    episodes = tuple(map(np.asarray, (batch.support.x, batch.support.y, batch.query.x, batch.query.y)))
    return importlib.import_module(f"peers.{module}").contenders(work, params, episodes, **options)[name]


def alone(name: str, work: Work, seed: int) -> dict[str, float]:
    """What one contender needs by itself: seconds of its first two calls, and memory that the second takes at most.

    The memory is the process's, or on a GPU the device's, above what was there before the first call.
    """
    theta, batch = sample(work, seed)
    run = contender(name, work, theta, batch, seed).run
    before = _memory("VmRSS")
    first = seconds_of(run)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # Linux then takes its note of the peak anew
    second = seconds_of(run)
    return {"first_call_seconds": first, "second_call_seconds": second, "peak_mib": _peak(name, before)}


def _memory(field: str) -> float:
    """KiB that Linux notes for this process under that name, nan elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((float(line.split()[1]) for line in lines if line.startswith(field + ":")), float("nan"))


def _peak(name: str, before: float) -> float:
    """MiB."""
    if jax.default_backend() != "gpu":
        return (_memory("VmHWM") - before) / 1024
    if name.startswith("jax") or name == "jmeta":
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", float("nan")) / 2**20
    return importlib.import_module("torch").cuda.max_memory_allocated() / 2**20


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
    """Largest relative difference of any array.

    It is relative to that array's norm, or to 1 % of the norm of all where that is more: biases in front of a batch-norm have a
    gradient of 0, of which either side makes rounding errors.
    """
    norms = {name: float(np.linalg.norm(g)) for name, g in theirs.items()}
    floor = 0.01 * float(np.linalg.norm(list(norms.values())))
    return max(float(np.linalg.norm(ours[name] - g)) / max(norms[name], floor) for name, g in theirs.items())


def check(names: list[str], work: Work, seed: int) -> dict[str, float]:
    """The peers' differences from jmeta in float64, relative to the peer, on episodes drawn in that mode.

    Raises:
      SystemExit: one disagrees.
    """
    with jax.enable_x64(True):
        theta, batch = map(_widen, sample(work, seed))
        results = {}
        for name in names:
            each = contender(name, work, theta, batch, seed)
            results[name] = each.read(each.run())
    found = {name: disagreement(results["jmeta"], theirs) for name, theirs in results.items() if name != "jmeta"}
    wrong = {name: each for name, each in found.items() if not each < TOLERANCE}
    if wrong:
        sys.exit(f"jmeta and its peers disagree, relative differences {wrong}; nothing was timed.")
    return found


def _widen(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype("float64") if leaf.dtype == "float32" else leaf, tree)


def race(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Times the contenders in turn, `repeats` rounds of them after one that does not count."""
    seconds = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            time.sleep(REST)
            taken = seconds_of(run)
            if number:
                seconds[name].append(taken)
    return {name: {"median": statistics.median(each), "fastest": min(each), "slowest": max(each)} for name, each in seconds.items()}


def measure(row: str, work: Work, args: argparse.Namespace) -> dict[str, Any]:
    """One row: who runs, whether they agree, how long they take."""
    contenders = {name: try_alone(name, row, work, args) for name in ["jmeta", *args.peers]}
    names = [name for name, found in contenders.items() if "missing" not in found]
    if "jmeta" not in names:
        sys.exit(f"jmeta itself fails: {contenders['jmeta']['missing']}")
    for name, found in check(names, work, args.seed).items():
        contenders[name]["difference"] = found
    theta, batch = sample(work, args.seed)
    runs = {name: contender(name, work, theta, batch, args.seed).run for name in names}
    for name, seconds in race(runs, args.repeats).items():
        contenders[name]["seconds"] = seconds
    ours = contenders["jmeta"]["seconds"]["median"]
    return {
        "work": work._asdict(),
        "operations": operations(work),
        "contenders": contenders,
        "tasks_per_second": work.tasks / ours,
        "ratios": {name: contenders[name]["seconds"]["median"] / ours for name in names if name != "jmeta"},
    }


def shares(row: dict[str, Any]) -> dict[str, float]:
    """Of a row, the share of the matrix product's rate that jmeta reaches, and that of the roofline (`work.shortest`)."""
    seconds = row["contenders"]["jmeta"]["seconds"]["median"]
    least = shortest(Work(**row["work"]), row["matrix_rate"], row["bandwidth"])
    return {"share_of_rate": row["operations"] / seconds / row["matrix_rate"], "share_of_roofline": least / seconds}


def report(name: str, row: dict[str, Any]) -> None:
    """Prints one row for people."""
    of_rate, of_roofline = (f"{100 * row[name]:.0f} %" for name in ("share_of_rate", "share_of_roofline"))
    machine = f"{row['matrix_rate'] / 1e9:.0f} GFLOP/s of a large matrix product and {row['bandwidth'] / 1e9:.0f} GB/s of a copy"
    print(f"{name}: {row['operations'] / 1e9:.2f} GFLOP; jmeta at {of_rate} of the rate, {of_roofline}")
    print(f"  of the roofline, with {machine}; {row['tasks_per_second']:.0f} tasks/s")
    for peer, found in row["contenders"].items():
        if "missing" in found:
            print(f"  {peer:14} not run: {found['missing']}")
            continue
        seconds = found["seconds"]
        line = f"{1e3 * seconds['median']:8.1f} ms ({1e3 * seconds['fastest']:.1f} to {1e3 * seconds['slowest']:.1f})"
        ratio = f", {row['ratios'][peer]:.2f} times jmeta's" if peer in row["ratios"] else ""
        print(f"  {peer:14} {line}{ratio}; first call {found['first_call_seconds']:.1f} s, {found['peak_mib']:.0f} MiB", flush=True)


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
    rates = {"matrix_rate": matrix_rate(), "bandwidth": bandwidth()}
    common = {"machine": machine(), "seed": args.seed, "repeats": args.repeats, **rates}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(args.out.read_text()) if args.out.exists() else {}
    for row in args.rows:
        for order in args.orders if ROWS[row].kind == "train" else [1]:
            name = f"{row}, order {order}" if ROWS[row].kind == "train" else row
            rows[name] = {**common, **measure(row, work_of(row, order), args)}
            rows[name] |= shares(rows[name])
            report(name, rows[name])
            write_json(args.out, rows)
    draw(rows, args.out.with_suffix(".png"))


def _work(row: str, order: int, tasks: int | None) -> Work:
    work = ROWS[row]._replace(order=order)
    return work if tasks is None else work._replace(tasks=tasks)


if __name__ == "__main__":
    main()
