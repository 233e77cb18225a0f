"""How a meta-gradient scales over devices: GPUs, or the cores of a CPU.

    python benchmarks/scaling.py                       strong and weak scaling of two rows, over 1, 2, 4 ... devices

Strong scaling shares the row's tasks out among more and more devices; weak scaling gives each device as many as one has to begin
with. On one device a mesh is compared with none; the program is then the same, but its arguments lie on the mesh. The programs of a
row take turns. Communication is what the mean of the gradients takes alone, as a share of the meta-gradient's time; memory is what
the program asks for on each device, arguments and results included. A CPU's device is a core only for what one thread does: XLA
lets a single device's large operations use all cores, so that "1 device" is more than one core.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from machine import begin, seconds_of  # pyright: ignore[reportMissingImports]
from work import ROWS, Work, learner_of, noise, tasks_of  # pyright: ignore[reportMissingImports]

from jmeta.checkpoint import write_json
from jmeta.core import default_chunk
from jmeta.mesh import AXIS, replicate, spread
from jmeta.train import batch_gradient

OUT = Path(__file__).parent / "results" / "scaling.json"
DEFAULT = ("sinusoid", "omniglot-5w1s")


def mesh_of(devices: int) -> jax.sharding.Mesh | None:
    """A mesh of so many devices, also of one; none for 0."""
    types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), (AXIS,), axis_types=types, devices=jax.devices()[:devices]) if devices else None


def program(work: Work, devices: int) -> tuple[Callable[[], Any], Callable[[], Any], float]:
    """A meta-gradient on so many devices (0 for no mesh), the mean of its gradients alone, and MiB on a device."""
    learner, mesh, key = learner_of(work), mesh_of(devices), jax.random.key(0)
    theta = learner.init(key)
    draw = tasks_of(work).sample if work.network == "mlp" else functools.partial(noise, work=work)
    batch = jax.vmap(draw, (0, None))(jax.random.split(key, work.tasks), None)
    chunk = default_chunk(theta.params, work.tasks // max(1, devices))
    gradient = functools.partial(batch_gradient(learner, lambda key, task: task, work.tasks, chunk, mesh), staged=True)
    key, theta, batch = replicate((key, theta, batch), mesh)
    arguments = key, theta, batch, jnp.array(0)
    compiled = jax.jit(gradient).lower(*arguments).compile()
    mean = jax.jit(spread(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), mesh, (False,)))
    sizes: Any = compiled.memory_analysis()
    held = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes
    whole, alone = functools.partial(compiled, *arguments), functools.partial(mean, theta.params)
    return lambda: jax.block_until_ready(whole()), lambda: jax.block_until_ready(alone()), held / 2**20


def measure(work: Work, most: int, repeats: int) -> dict[str, Any]:
    """Medians of seconds for every number of devices, with the row's tasks and with as many on each device."""
    counts = [2**power for power in range(most.bit_length()) if 2**power <= most]
    plans = {"strong 0": (work, 0)}
    plans |= {f"strong {count}": (work, count) for count in counts if work.tasks % count == 0}
    plans |= {f"weak {count}": (work._replace(tasks=work.tasks * count), count) for count in counts[1:]}
    made = {name: program(*plan) for name, plan in plans.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    means: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(repeats + 1):
        for name, (whole, mean, _) in made.items():
            taken, alone = seconds_of(whole), seconds_of(mean)
            if turn:
                times[name].append(taken)
                means[name].append(alone)
    rows = {}
    for name, (plan, devices) in plans.items():
        seconds = statistics.median(times[name])
        communication = statistics.median(means[name]) / seconds if devices > 1 else 0.0
        rows[name] = {"devices": devices, "tasks": plan.tasks, "seconds": seconds, "all_seconds": times[name]}
        rows[name] |= {"communication_share": communication, "mib": made[name][2]}
    ratios = [mesh / none for mesh, none in zip(times["strong 1"], times["strong 0"], strict=True)]
    return {"repeats": repeats, "rows": rows, "mesh_of_one": statistics.median(ratios) - 1}


def main() -> None:
    """Measures, prints and writes every row."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=DEFAULT, choices=[row for row in ROWS if ROWS[row].kind == "train"])
    parser.add_argument("--devices", type=int, help="at most; all if not given")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--platform", help="jax's platform, such as cpu or cuda; jax's choice if not given")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    where, found = begin(args.platform, args.out)
    for row in args.rows:
        found[row] = {"machine": where, **measure(ROWS[row], args.devices or jax.device_count(), args.repeats)}
        for name, each in found[row]["rows"].items():
            speed = each["tasks"] / each["seconds"]
            shares = f"communication {100 * each['communication_share']:.1f} %, {each['mib']:.0f} MiB a device"
            print(f"{row}, {name}: {1e3 * each['seconds']:.1f} ms, {speed:.0f} tasks a second, {shares}")
        print(f"{row}: a mesh of one device costs {100 * found[row]['mesh_of_one']:+.1f} %", flush=True)
        write_json(args.out, found)


if __name__ == "__main__":
    main()
