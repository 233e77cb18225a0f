"""How time and memory of jmeta's meta-gradient grow: with inner steps, tasks, ways and width, in first and second order.

    python benchmarks/growth.py                  all curves
    python benchmarks/growth.py --curves steps   one

Everything is Omniglot's conv4 on noise, 5 ways, 1 shot and 15 queries a class, 64 filters, 1 inner step, 4 tasks, but for what a
curve varies. Memory is what the compiled program asks for beside its arguments and results. With checkpointing ("remat") each inner
step is computed anew on the way back.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from machine import begin, seconds_of  # pyright: ignore[reportMissingImports]
from work import Work, noise  # pyright: ignore[reportMissingImports]

import jmeta as jm
from jmeta.checkpoint import write_json
from jmeta.core import default_chunk
from jmeta.mesh import count_devices, replicate, share
from jmeta.train import batch_gradient

BASE = Work("conv4", (28, 28, 1), 64, 5, 1, 15, 1, 4, 0.01)
CURVES = {"steps": (1, 2, 5, 10, 20, 50), "tasks": (1, 4, 16, 64, 256), "ways": (2, 5, 10, 20), "filters": (16, 32, 64, 128)}
VARIANTS = {  # name: order, remat, curves
    "second order": (2, False, tuple(CURVES)),
    "second order, checkpointed": (2, True, ("steps",)),
    "first order": (1, False, tuple(CURVES)),
}
OUT = Path(__file__).parent / "results" / "growth.json"


def point(work: Work, remat: bool, repeats: int) -> dict[str, float]:
    """Seconds of a meta-gradient (best of `repeats`), MiB that its program takes, seconds of its compilation."""
    model = jm.conv4(work.ways, filters=work.filters)
    learner = jm.maml(model, jm.xent, optax.sgd(work.rate), jm.repeat(work.steps), order=work.order, remat=remat)
    mesh = jm.task_mesh(share(work.tasks, jax.device_count()))
    batch = jax.vmap(functools.partial(noise, data=None, work=work))(jax.random.split(jax.random.key(1), work.tasks))
    theta = learner.init(jax.random.key(0))
    chunk = default_chunk(theta.params, work.tasks // count_devices(mesh))
    given = batch_gradient(learner, lambda key, task: task, work.tasks, chunk, mesh)
    gradient = jax.jit(functools.partial(given, staged=True))
    arguments = (*replicate((jax.random.key(1), theta, batch), mesh), jnp.array(0))
    compiled: list[Any] = []
    compilation = seconds_of(lambda: compiled.append(gradient.lower(*arguments).compile()))
    analysis = compiled[0].memory_analysis()
    calls = [seconds_of(lambda: jax.block_until_ready(compiled[0](*arguments))) for _ in range(repeats + 1)]
    return {"seconds": min(calls[1:]), "mib": analysis.temp_size_in_bytes / 2**20, "compilation_seconds": compilation}


def main() -> None:
    """Measures, prints and writes each point, and draws the curves; points of the same base that are not measured stay."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", nargs="+", default=list(CURVES), choices=list(CURVES))
    parser.add_argument("--most", type=int, help="leave out points above this")
    parser.add_argument("--tasks", type=int, default=BASE.tasks, help="where it does not vary")
    parser.add_argument("--filters", type=int, default=BASE.filters, help="where it does not vary")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--platform", help="jax's platform, such as cpu or cuda; jax's choice if not given")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    base = BASE._replace(tasks=args.tasks, filters=args.filters)
    where, found = begin(args.platform, args.out)
    for curve in args.curves:
        before = found.get(curve, {})
        known = before["variants"] if before.get("base") == base._asdict() else {}
        variants = {name: measure(curve, name, base, args, known.get(name, {})) for name in VARIANTS if curve in VARIANTS[name][2]}
        found[curve] = {"machine": where, "base": base._asdict(), "variants": variants}
        write_json(args.out, found)
    draw(found, args.out.with_suffix(".png"))


def measure(curve: str, name: str, base: Work, args: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any]:
    """The points of one variant of a curve, by size; those known that are not measured stay."""
    order, remat, _ = VARIANTS[name]
    points = dict(known)
    for size in CURVES[curve]:
        if args.most is None or size <= args.most:
            each = points[str(size)] = point(base._replace(**{curve: size}, order=order), remat, args.repeats)
            times = f"{1e3 * each['seconds']:8.1f} ms, compiled in {each['compilation_seconds']:.1f} s"
            print(f"{curve} {size:4d}, {name:28s} {times}, {each['mib']:8.1f} MiB", flush=True)
    return points


def draw(found: dict[str, Any], path: Path) -> None:
    """One column a curve: time above, memory below."""
    figure, axes = plt.subplots(2, len(found), figsize=(3.6 * len(found), 6), squeeze=False, layout="constrained")
    for column, (curve, rows) in enumerate(found.items()):
        for axis, what, label in zip(axes[:, column], ("seconds", "mib"), ("seconds", "MiB"), strict=True):
            for name, points in rows["variants"].items():
                axis.plot([int(size) for size in points], [each[what] for each in points.values()], marker="o", label=name)
            axis.set(xscale="log", yscale="log", xlabel={"steps": "inner steps"}.get(curve, curve), ylabel=label)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
