"""Time and memory of MAML and of ASB: jmeta and every peer that is installed, on the same weights and the same episodes.

    python benchmarks/speed.py                                        every row
    python benchmarks/speed.py --rows omniglot-5w1s --orders 2        one row
    python benchmarks/speed.py --platform cuda                        on a GPU, with a PyTorch for CUDA

For each row, every contender gets a process of its own, which tells the time of its first call (compilation) and its peak memory,
and keeps one that takes too long from stopping the others. Then losses and meta-gradients must agree, in float64 to 1e-6: in
float32 a ReLU whose input lies within rounding of 0 opens on one side and not on the other, which can move the mean over the tasks
by a percent. Then the processes take turns, in float32, all others asleep. Sampling the episodes is timed in evaluation
alone, and there for jmeta alone. Nothing else should run meanwhile: the load average beforehand is kept with the result.
"""

import argparse
import functools
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from chart import draw  # pyright: ignore[reportMissingImports]
from flax.traverse_util import flatten_dict
from machine import bandwidth, machine, matrix_rate, results, seconds_of  # pyright: ignore[reportMissingImports]
from peers import Arrays, Contender  # pyright: ignore[reportMissingImports]
from work import ADAM_RATE, ROWS, Work, learner_of, operations, sample, shortest, tasks_of  # pyright: ignore[reportMissingImports]

import jmeta as jm
from jmeta.checkpoint import write_json
from jmeta.core import default_chunk
from jmeta.mesh import count_devices, replicate, share, spread
from jmeta.train import batch_gradient

TOLERANCE = 1e-6
CHECKED = 32  # tasks of the check, which in float64 takes long
REST = 0.2  # seconds before each turn, in which the threads of the one before it stop spinning
TURN = 1.0  # seconds of calls one after another that a turn lasts at least
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
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--orders", nargs="+", type=int, default=[2, 1], choices=(1, 2), help="of meta-gradients")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--tasks", type=int, help="tasks of a meta-batch; each row has its own if not given")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for a contender's first two calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--platform", help="jax's platform, such as cpu or cuda; jax's choice if not given")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    return parser.parse_args()


def jmeta_contender(work: Work, theta: jm.Theta, batch: jm.Task, seed: int) -> Contender:
    """As `jmeta train` and `jmeta eval` compute it: tasks spread over the devices, and the chunk that `fit` would choose."""
    mesh = jm.task_mesh(share(work.tasks, jax.device_count()))
    make = {"train": _gradient, "adapt": _adaptation, "evaluate": _evaluation, "asb": _alternation}[work.kind]
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


def _alternation(work: Work, learner: jm.MetaLearner, mesh: Any, theta: jm.Theta, batch: jm.Task, seed: int) -> Callable:
    """The parameters after all episodes of ASB, one after another in one program, as `jm.fit` takes them."""
    outer = optax.adam(ADAM_RATE)

    def episode(carry, task):
        theta, state = carry
        base, gradient, _ = learner.grad(jax.random.key(0), theta, task, meta_step=0)
        updates, state = outer.update(gradient.params, state, base.params)
        return (base._replace(params=optax.apply_updates(base.params, updates)), state), None

    @jax.jit
    def program(theta, batch):
        (theta, _), _ = jax.lax.scan(episode, (theta, outer.init(theta.params)), batch)
        return theta.params

    return lambda: program(theta, batch)


def contender(name: str, work: Work, theta: jm.Theta, batch: jm.Task, seed: int) -> Contender:
    """The contender of that name.

    Raises:
      ImportError: a peer is not installed, or does not do this work.
    """
    if name == "jmeta":
        return jmeta_contender(work, theta, batch, seed)
    module, options = ("torch_asb", {}) if work.kind == "asb" else PEERS[name]
    params = jax.tree.map(np.asarray, flatten_dict(theta.params, sep="/"))
    episodes = tuple(map(np.asarray, (batch.support.x, batch.support.y, batch.query.x, batch.query.y)))
    found = importlib.import_module(f"peers.{module}").contenders(work, params, episodes, **options)
    if name not in found:
        raise ImportError(f"{name} is not raced at this work")
    return found[name]


def serve(name: str, work: Work, seed: int) -> None:
    """The process of one contender: writes a line of what it needs, then for every line that it reads the seconds of a call.

    What it needs are the seconds of the first two calls and the memory that the second takes at most, of the process above what was
    there before the first, or on a GPU all that was allocated at once so far. The seconds of a call are the mean of a second of
    them in a row, as in training. What libraries print goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    theta, batch = sample(work, seed)
    run = contender(name, work, theta, batch, seed).run
    before = _memory("VmRSS")
    first = seconds_of(run)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # Linux then takes its note of the peak anew
    second = seconds_of(run)
    print(json.dumps({"first_call_seconds": first, "second_call_seconds": second, "peak_mib": _peak(name, before)}), file=answers)
    calls = max(1, math.ceil(TURN / second))
    for _ in sys.stdin:
        print(seconds_of(lambda: [run() for _ in range(calls)]) / calls, file=answers)


def _memory(field: str) -> float:
    """KiB that Linux notes for this process under that name, nan elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((float(line.split()[1]) for line in lines if line.startswith(field + ":")), float("nan"))


def _peak(name: str, before: float) -> float:
    """MiB."""
    if jax.default_backend() != "gpu":
        return (_memory("VmHWM") - before) / 1024
    if name.startswith("jax") or name == "jmeta":  # of all calls so far, and with the episodes
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", float("nan")) / 2**20
    return importlib.import_module("torch").cuda.max_memory_allocated() / 2**20


class Racer(NamedTuple):
    """A contender's process, None where it failed or took too long, and what it said first."""

    process: subprocess.Popen | None
    found: dict[str, Any]


def start(name: str, row: str, work: Work, args: argparse.Namespace) -> Racer:
    """A contender, ready in a process of its own, so that neither its threads nor its memory weigh on the others."""
    command = [sys.executable, __file__, "--serve", name, "--rows", row, "--orders", str(work.order), "--tasks", str(work.tasks)]
    command += ["--seed", str(args.seed)] + (["--platform", args.platform] if args.platform else [])
    with tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        process = subprocess.Popen(command, text=True, bufsize=1, **pipes)
        late = threading.Timer(args.limit, process.kill)
        late.start()
        line = _answer(process)
        in_time = late.is_alive()
        late.cancel()
        if line:
            return Racer(process, json.loads(line))
        process.wait()
        errors.seek(0)
        said = errors.read().strip().splitlines() or [f"ended with status {process.returncode}"]
    return Racer(None, {"missing": said[-1] if in_time else f"two calls were not done after {args.limit:.0f} s"})


def _answer(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def _call(process: subprocess.Popen) -> float:
    assert process.stdin is not None
    print(file=process.stdin, flush=True)
    answer = _answer(process)
    if not answer:
        sys.exit(f"a contender ended in the race with status {process.wait()}: {process.args}")
    return float(answer)


def disagreement(ours: Arrays, theirs: Arrays) -> float:
    """Largest relative difference of any array.

    It is relative to that array's norm, or to 1 % of the norm of all where that is more: biases in front of a batch-norm have a
    gradient of 0, of which either side makes rounding errors.
    """
    norms = {name: float(np.linalg.norm(g)) for name, g in theirs.items()}
    floor = 0.01 * float(np.linalg.norm(list(norms.values())))
    return float(np.max([np.linalg.norm(ours[name] - g) / max(norms[name], floor) for name, g in theirs.items()]))


def check(names: list[str], work: Work, seed: int) -> dict[str, float]:
    """The peers' differences from jmeta in float64, relative to the peer, on at most `CHECKED` tasks drawn in that mode.

    Raises:
      SystemExit: one disagrees.
    """
    work = work._replace(tasks=min(work.tasks, CHECKED))
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


def race(processes: dict[str, subprocess.Popen], repeats: int) -> dict[str, dict[str, float]]:
    """Times the contenders in turn, `repeats` rounds of them after one that does not count."""
    seconds = {name: [] for name in processes}
    for number in range(repeats + 1):
        for name, process in processes.items():
            time.sleep(REST)
            taken = _call(process)
            if number:
                seconds[name].append(taken)
    return {name: {"median": statistics.median(each), "fastest": min(each), "slowest": max(each)} for name, each in seconds.items()}


def measure(row: str, work: Work, args: argparse.Namespace) -> dict[str, Any]:
    """One row: who runs, whether they agree, how long they take."""
    contenders: dict[str, dict[str, Any]] = {}
    processes: dict[str, subprocess.Popen] = {}
    try:
        for name in ["jmeta", *args.peers]:
            process, contenders[name] = start(name, row, work, args)
            if process is not None:
                processes[name] = process
        if "jmeta" not in processes:
            sys.exit(f"jmeta itself fails: {contenders['jmeta']['missing']}")
        for name, found in check(list(processes), work, args.seed).items():
            contenders[name]["difference"] = found
        rates = {"matrix_rate": matrix_rate(), "bandwidth": bandwidth()}
        for name, seconds in race(processes, args.repeats).items():
            contenders[name]["seconds"] = seconds
    finally:
        for process in processes.values():
            process.kill()
    ours = contenders["jmeta"]["seconds"]["median"]
    result = {
        **rates,
        "work": work._asdict(),
        "operations": operations(work),
        "contenders": contenders,
        "tasks_per_second": work.tasks / ours,
        "ratios": {name: contenders[name]["seconds"]["median"] / ours for name in processes if name != "jmeta"},
    }
    return {**result, **shares(result)}


def shares(row: dict[str, Any]) -> dict[str, float]:
    """Of a row, the share of the matrix product's rate that jmeta reaches, and that of the roofline (`work.shortest`).

    The latter is left out for ASB, whose steps on single images read and write weights above all, which the roofline leaves out.
    """
    seconds, work = row["contenders"]["jmeta"]["seconds"]["median"], Work(**row["work"])
    found = {"share_of_rate": row["operations"] / seconds / row["matrix_rate"]}
    if work.kind == "asb":
        return found
    return {**found, "share_of_roofline": shortest(work, row["matrix_rate"], row["bandwidth"]) / seconds}


def report(name: str, row: dict[str, Any]) -> None:
    """Prints one row for people."""
    of_rate, of_roofline = (
        f"{100 * row[name]:.0f} %" if name in row else "no share" for name in ("share_of_rate", "share_of_roofline")
    )
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
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # all processes share a GPU's memory
    if args.platform:
        jax.config.update("jax_platforms", args.platform)
    jm.use_cores()
    work_of = functools.partial(_work, tasks=args.tasks)
    if args.serve:
        serve(args.serve, work_of(args.rows[0], args.orders[0]), args.seed)
        return
    common = {"machine": machine(), "seed": args.seed, "repeats": args.repeats}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = results(args.out)
    for row in args.rows:
        for order in args.orders if ROWS[row].kind == "train" else [1]:
            name = f"{row}, order {order}" if ROWS[row].kind == "train" else row
            rows[name] = {**common, **measure(row, work_of(row, order), args)}
            report(name, rows[name])
            rows = dict(sorted(rows.items(), key=lambda each: _place(each[0])))
            write_json(args.out, rows)
    draw(rows, args.out.with_suffix(".png"))


def _place(name: str) -> tuple[int, int]:
    """Where a row stands: in the order of `ROWS`, second order first."""
    row, _, order = name.partition(", order ")
    return list(ROWS).index(row), -int(order or 0)


def _work(row: str, order: int, tasks: int | None) -> Work:
    work = ROWS[row]._replace(order=order)
    return work if tasks is None else work._replace(tasks=tasks)


if __name__ == "__main__":
    main()
