"""Zapping: six ways of pre-training on Omniglot, then unseen classes learned one after another, and from shuffled batches.

    python benchmarks/zapping.py --filters 64 --seeds 0 1 2
    python benchmarks/zapping.py --filters 256 --steps 9000 --methods asb asb-zap --classes 10 50 100 200 600 --draws 10
    python benchmarks/zapping.py --methods anml --classes 10 50 75 100 --settings frozen

Every network of a seed learns the same unseen classes, in the same order, from the same images. The rates are chosen on draws of
their own. Networks and results are kept and gone on with, setting by setting; the pictures are drawn from all that is there.

References:
  Frati, Traft, Clune, Cheney, Reset It and Forget It, ECAI 2024 (https://arxiv.org/abs/2310.07996).
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from machine import machine  # pyright: ignore[reportMissingImports]

import jmeta as jm
from jmeta import plot, pretrain
from jmeta.checkpoint import write_json
from jmeta.evaluate.draws import interval

RESULTS = Path(__file__).parent / "results" / "zapping"
METHODS = ("iid", "iid-zap", "asb", "asb-zap", "meta-asb", "meta-asb-zap", "oml", "anml")
SETTINGS = {  # how unseen classes are learned, and the rates to choose from
    "frozen": (1e-2, 3e-3, 1e-3),
    "unfrozen": (1e-3, 3e-4, 1e-4),
    "fine-tuned": (3e-3, 1e-3, 3e-4),
}
EPOCHS, SIZE = 10, 32  # of fine-tuning
TRAIN_KEY, TEST_KEY = 0, 1


def configuration(method: str, filters: int, steps: int | None, seed: int) -> pretrain.Pretrain:
    """The preset of a method, at a width, for a number of sequences (for iid of batches), or the preset's own."""
    name = method.removesuffix("-zap")
    preset = pretrain.PRESETS[f"{'zap-' * method.endswith('-zap')}{name}-omniglot"]
    gates = max(1, preset.gate_filters * filters // preset.filters)
    own = steps if steps and name != "iid" else preset.steps
    return dataclasses.replace(preset, filters=filters, gate_filters=gates, steps=own, seed=seed)


def train(config: pretrain.Pretrain, images: jm.Images, folder: Path) -> jm.Theta:
    """Pre-trains, or goes on, or takes what is there."""
    return jm.fit(
        jax.random.fold_in(jax.random.key(config.seed), TRAIN_KEY),
        pretrain.make_learner(config, len(images.names)),
        pretrain.make_tasks(config, images),
        pretrain.make_outer(config, len(images.pixels)),
        config.steps,
        1,
        workdir=folder,
        resume=True,
        config=config,
        labels=images.names,
        save_every=config.save_every,
    ).theta


def learn(setting: str, model: jm.Model, theta: jm.Theta, unseen: jm.Images, classes: int, draws: int, seed: int) -> dict[str, Any]:
    """Unseen classes are learned in one of the settings: accuracy of each draw, and of the classes seen so far."""
    key = jax.random.fold_in(jax.random.key(seed), TEST_KEY)
    how: dict[str, Any] = {"classes": classes, "draws": draws, "rates": SETTINGS[setting], "mesh": jm.task_mesh()}
    start = time.perf_counter()
    if setting == "fine-tuned":
        found = jm.transfer(key, model, jm.xent, theta, unseen, epochs=EPOCHS, size=SIZE, **how)
        scores, own = found.accuracy, {}
    else:
        found = jm.continual(key, model, jm.xent, theta, unseen, frozen=setting == "frozen", **how)
        scores = found.matrix[:, -1].mean(-1)
        running = [[None if np.isnan(each) else each for each in row] for row in found.running.tolist()]
        own = {"checkpoints": found.checkpoints, "running": running, "forgetting": found.forgetting}
    mean, half = interval(scores)
    about = {"mean": mean, "interval95": half, "accuracy": scores.tolist(), "rate": found.rate}
    about["tried"] = {f"{rate:g}": score for rate, score in found.tried.items()}
    return {**about, **own, "seconds": time.perf_counter() - start}


def measure(method: str, config: pretrain.Pretrain, settings: list[str], classes: list[int], draws: int, runs: Path) -> None:
    """Pre-trains one network and lets it learn in every setting; what is there already stays."""
    path = RESULTS / f"{method}-{config.filters}-{config.steps}-seed{config.seed}.json"
    result = json.loads(path.read_text()) if path.exists() else {"settings": {}}
    missing = [(each, count) for each in settings for count in classes if f"{each} {count}" not in result["settings"]]
    if not missing:
        return
    images, unseen = pretrain.make_images(config)
    folder = runs / path.stem
    theta = train(config, images, folder)
    speeds = [json.loads(line)["tasks_per_second"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    about = {"method": method, "norm": "instance", "config": dataclasses.asdict(config), "machine": machine()}
    result |= about | {"seconds_per_step": 1 / statistics.median(speeds)}
    model = pretrain.make_model(config, len(images.names))
    for setting, count in missing:
        found = {**learn(setting, model, theta, unseen, count, draws, config.seed), "classes": count}
        result["settings"][f"{setting} {count}"] = found
        write_json(path, result)
        accuracy = f"{found['mean']:.3f} ± {found['interval95']:.3f}"
        print(f"{path.stem}, {setting}, {count} classes: {accuracy}, rate {found['rate']:g}", flush=True)


def draw(filters: int) -> None:
    """Accuracy on the classes seen so far, a curve a method: for each setting the largest number of classes that all have."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"*-{filters}-*-seed*.json"))]
    for setting in ("frozen", "unfrozen"):
        counts = [
            {found["classes"] for name, found in each["settings"].items() if name.startswith(f"{setting} ")} for each in results
        ]
        shared = set.intersection(*counts) if counts else set()
        if not shared:
            continue
        curves: dict[str, Any] = {}
        for each in results:
            found = each["settings"][f"{setting} {max(shared)}"]
            steps, rows = curves.get(each["method"], (found["checkpoints"], []))
            curves[each["method"]] = steps, rows + found["running"]
        ordered = {name: (curves[name][0], np.array(curves[name][1], float)) for name in METHODS if name in curves}
        plot.by_classes(ordered, RESULTS / f"{setting}-{filters}.png")


def main() -> None:
    """All methods of a seed, then the next seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS[:6]))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--filters", type=int, default=64)
    parser.add_argument("--steps", type=int, help="sequences; the preset's if not given, and for iid always")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--classes", nargs="+", type=int, default=[10, 50, 100])
    parser.add_argument("--draws", type=int, default=5, help="fresh ones that are reported; as many choose the rate")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "zapping")
    asked = parser.parse_args()
    jm.use_cores()
    jm.use_cache()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in asked.seeds:
        for method in asked.methods:
            config = configuration(method, asked.filters, asked.steps, seed)
            measure(method, config, asked.settings, asked.classes, asked.draws, asked.runs)
    draw(asked.filters)


if __name__ == "__main__":
    main()
