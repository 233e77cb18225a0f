"""A whole sequential evaluation in one compiled call: 600 unseen classes on frozen features, 9 learning rates x 10 draws.

    python benchmarks/frozen_600.py RUN          a run of `jmeta train zap-asb-omniglot` or of zapping.py

Each of the 90 runs learns 9,000 images one at a time by Adam; then a draw apart from those is measured at the best rate, in a
second call that is small beside the first. The time holds compilation.

References:
  Frati, Traft, Clune, Cheney, Reset It and Forget It, ECAI 2024 (https://arxiv.org/abs/2310.07996): the protocol and the rates.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
from machine import begin  # pyright: ignore[reportMissingImports]

import jmeta as jm
from jmeta import pretrain
from jmeta.checkpoint import write_json

SHOTS = 15  # images of a class learned from
OUT = Path(__file__).parent / "results" / "frozen_600.json"
RATES = (0.055, 0.01, 0.0055, 0.001, 7e-4, 4e-4, 1e-4, 7e-5, 4e-5)


def main() -> None:
    """Measures one run, and adds it to the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run of pre-training")
    parser.add_argument("--classes", type=int, default=600)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--platform", help="jax's platform, such as cpu or cuda; jax's choice if not given")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    machine, found = begin(asked.platform, asked.out)
    config, model, _, theta = pretrain.read(asked.run)
    unseen = pretrain.make_images(config)[1]
    how: dict[str, Any] = {
        "classes": asked.classes,
        "draws": 1,
        "select": asked.draws,
        "shots": SHOTS,
        "rates": RATES,
        "frozen": True,
        "checkpoints": [asked.classes],
    }
    start = time.perf_counter()
    result = jm.continual(jax.random.key(0), model, jm.xent, theta, unseen, mesh=jm.task_mesh(), **how)
    seconds = time.perf_counter() - start
    row = {"machine": machine, "config": dataclasses.asdict(config), "classes": asked.classes, "shots": SHOTS, "draws": asked.draws}
    row |= {"seconds": seconds, "tried": {f"{rate:g}": score for rate, score in result.tried.items()}}
    name = f"{Path(asked.run).name}, {asked.classes} classes, {len(RATES)} x {asked.draws} runs, {jax.devices()[0].device_kind}"
    write_json(asked.out, {**found, name: row})
    updates = SHOTS * asked.classes * len(RATES) * asked.draws
    print(f"{name}: {seconds:.1f} s, {updates / seconds:.0f} updates of an image a second; {result}")


if __name__ == "__main__":
    main()
