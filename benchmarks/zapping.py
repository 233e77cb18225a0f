"""Zapping: ways of pre-training on Omniglot, then unseen classes learned one after another, and from shuffled batches.

    python benchmarks/zapping.py --choose                 first: rates of pre-training, for six methods
    python benchmarks/zapping.py --steps 9000
    python benchmarks/zapping.py --cost                   what a step of each method takes, on a machine left alone
    python benchmarks/zapping.py --methods anml --classes 10 50 75 100 --settings frozen --seeds 0
    python benchmarks/zapping.py --filters 256 --classes 10 50 100 200 600 --draws 10 --rates .055 .01 .0055 .001 7e-4 4e-4 1e-4

Every network of a seed learns the same unseen classes, in the same order, from the same images. The rates are chosen on draws of
their own, which are of the same unseen classes, as in ANML's protocol. Networks and results are kept and gone on with, setting by
setting. On two cores two calls with other seeds, one a core (`taskset -c 0`), are faster than one after the other.

References:
  Frati, Traft, Clune, Cheney, Reset It and Forget It, ECAI 2024 (https://arxiv.org/abs/2310.07996).

Differs from the paper in: fine-tuning sees every image 10 times in batches of 32, where the released code sees it once in batches
of 256, which for 10 classes is a single step. Rates of pre-training are chosen for this width, each method's alone, by a shorter
pre-training of a seed of its own and by how that learns unseen classes one after another, frozen and not; these are other draws
of the very classes that are reported, so that the choice has seen them. OML and ANML have their presets' rates. Rates at which
the training accuracy on sequences falls again meanwhile are not taken: with longer pre-training it falls to that of the
sequence's own images.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from machine import machine  # pyright: ignore[reportMissingImports]
from table import ZAPPED  # pyright: ignore[reportMissingImports]

import jmeta as jm
from jmeta import checkpoint, plot, pretrain
from jmeta.checkpoint import without_nan, write_json
from jmeta.evaluate.draws import interval

RESULTS = Path(__file__).parent / "results" / "zapping"
METHODS = ("iid", "iid-zap", "asb", "asb-zap", "meta-asb", "meta-asb-zap", "oml", "anml")
RATES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
FINE_RATES = tuple(float(f"{10 ** (-quarter / 4):.2g}") for quarter in range(4, 25))  # frozen, a factor of 3 is half the accuracy
SETTINGS = {  # how unseen classes are learned, and the first rates to choose from; further ones while the best is at an edge
    "frozen": (1.8e-3, 1e-3, 5.6e-4),
    "unfrozen": (1e-3, 3e-4, 1e-4),
    "fine-tuned": (3e-3, 1e-3, 3e-4),
}
FINE_TUNING = {"epochs": 10, "size": 32}
MOST_FINE_TUNED = 50  # classes: 100 take as long as all else together
TRAIN_KEY, TEST_KEY = 0, 1  # folded into a seed's key
_IID = tuple((None, outer) for outer in (3e-2, 1e-2, 3e-3, 1e-3, 3e-4))
_PLAIN = (
    (1e-2, 1e-3),
    (3e-3, 1e-3),
    (1e-3, 1e-3),
    (3e-3, 3e-3),
    (1e-3, 3e-3),
    (3e-3, 1e-2),
    (1e-3, 1e-2),
    (3e-4, 1e-2),
    (1e-3, 3e-2),
)
_META = ((1e-1, 1e-3), (3e-2, 1e-3), (1e-2, 1e-3), (3e-2, 3e-3), (1e-2, 3e-3), (3e-2, 1e-2), (1e-2, 1e-2))
CANDIDATES: dict[str, tuple[tuple[float | None, float], ...]] = {  # inner and outer rates to choose from
    "iid": _IID,
    "iid-zap": _IID,
    "asb": _PLAIN,
    "asb-zap": _PLAIN,
    "meta-asb": _META,
    "meta-asb-zap": _META,
}
CHOICE_STEPS, CHOICE_SEED, CHOICE_CLASSES = 2_500, 100, 50
COST_STEPS, COST_TURNS = 60, 5  # steps enough for a zap of i.i.d. among them
STILL_LEARNING = 0.95  # of its best training accuracy, that a pre-training of the choice by sequences must end with


class Test(NamedTuple):
    """How unseen classes are learned: in which setting, how many, by draws and rates."""

    setting: str
    classes: int
    draws: int
    rates: tuple[float, ...]

    def __str__(self) -> str:
        """Its name in a result."""
        return f"{self.setting} {self.classes}"


def configuration(
    method: str, asked: argparse.Namespace, seed: int, rates: tuple[float | None, float] | None = None
) -> pretrain.Pretrain:
    """The preset of a method at the width, for the sequences or batches, and at the rates that are asked for."""
    name = method.removesuffix("-zap")
    preset = pretrain.PRESETS[f"{'zap-' * method.endswith('-zap')}{name}-omniglot"]
    gates = max(1, preset.gate_filters * asked.filters // preset.filters)
    steps = (asked.batches if name == "iid" else asked.steps) or preset.steps
    config = dataclasses.replace(preset, filters=asked.filters, gate_filters=gates, steps=steps, seed=seed)
    if rates is None and method not in CANDIDATES:
        return config
    inner, outer = chosen(method, asked.filters) if rates is None else rates
    return dataclasses.replace(config, inner_rate=inner or preset.inner_rate, outer_rate=outer)


def choice(filters: int) -> Path:
    """Where scores of rates are kept."""
    return RESULTS / f"rates-{filters}.json"


def chosen(method: str, filters: int) -> tuple[float | None, float]:
    """The rates with the best score."""
    scores = json.loads(choice(filters).read_text()).get(method, {}) if choice(filters).exists() else {}
    missing = [rates for rates in CANDIDATES[method] if title(rates) not in scores]
    if missing:
        sys.exit(f"the rates of {method} are not chosen yet for {filters} filters, {len(missing)} are left; run --choose first.")
    if all(row["score"] is None for row in scores.values()):
        sys.exit(f"no rates of {method} serve for {filters} filters: all of {', '.join(scores)} diverged or fell again.")
    return max(CANDIDATES[method], key=lambda rates: scores[title(rates)]["score"] or 0.0)


def title(rates: tuple[float | None, float]) -> str:
    """Of rates in files' names and results: the inner one, if there is one, and the outer."""
    return " ".join(f"{rate:g}" for rate in rates if rate)


def choose(asked: argparse.Namespace) -> None:
    """Pre-trains with all rates, and scores them: mean accuracy on unseen classes, frozen and not, each at its best rate."""
    path = choice(asked.filters)
    asked = argparse.Namespace(**{**vars(asked), "steps": CHOICE_STEPS})
    tests = [Test(setting, CHOICE_CLASSES, asked.draws, SETTINGS[setting]) for setting in ("frozen", "unfrozen")]
    for method in (method for method in asked.methods if method in CANDIDATES):
        for rates in CANDIDATES[method]:
            config = configuration(method, asked, CHOICE_SEED, rates)
            how = {"steps": config.steps, "seed": CHOICE_SEED, "classes": CHOICE_CLASSES, "draws": asked.draws}
            known = (json.loads(path.read_text()) if path.exists() else {}).get(method, {}).get(title(rates))
            if known and {name: known.get(name) for name in how} == how:
                continue
            result = json.loads(measure(f"{method} {title(rates)}", config, tests, asked.runs, RESULTS / "choice").read_text())
            row = {**scored(result, method), "machine": result["machine"], **how}
            found = json.loads(path.read_text()) if path.exists() else {}
            write_json(path, {**found, method: {**found.get(method, {}), title(rates): row}})
            print(f"{method}, rates {title(rates)}: {row['score']} of {row['of']}", flush=True)


def scored(result: dict[str, Any], method: str) -> dict[str, Any]:
    """The score of a pre-training of the choice; None if it diverged, or fell again while it learned from sequences."""
    best = {each["setting"]: max(mean for mean, _ in each["tried"].values()) for each in result["settings"].values()}
    accuracy = result.get("training_accuracy", [])
    learning = bool(best) and (method.startswith("iid") or accuracy[-1] >= STILL_LEARNING * max(accuracy))
    return {"score": statistics.mean(best.values()) if learning else None, "of": best}


def learn(test: Test, model: jm.Model, theta: jm.Theta, unseen: jm.Images, seed: int) -> dict[str, Any]:
    """Unseen classes are learned: accuracy of each draw, and of the classes seen so far."""
    key = jax.random.fold_in(jax.random.key(seed), TEST_KEY)
    how: dict[str, Any] = {"classes": test.classes, "draws": test.draws, "rates": test.rates, "mesh": jm.task_mesh()}
    start, frozen = time.perf_counter(), test.setting == "frozen"
    if test.setting == "fine-tuned":
        found = jm.transfer(key, model, jm.xent, theta, unseen, further=RATES, **FINE_TUNING, **how)
    else:
        further = FINE_RATES if frozen else RATES
        found = jm.continual(key, model, jm.xent, theta, unseen, further=further, frozen=frozen, **how)
    tried = found.tried
    if isinstance(found, jm.Transfer):
        scores, own = found.accuracy, FINE_TUNING
    else:
        scores = found.matrix[:, -1].mean(-1)
        own = {"checkpoints": found.checkpoints, "running": found.running.tolist(), "forgetting": found.forgetting}
    mean, half = interval(scores)
    about = {"mean": mean, "interval95": half, "accuracy": scores.tolist(), **test._asdict(), "machine": machine()}
    about |= {"rate": found.rate, "edge": bool(tried) and found.rate in (min(tried), max(tried))}
    about["tried"] = {f"{rate:g}": score for rate, score in sorted(tried.items())}
    return without_nan({**about, **own, "seconds": time.perf_counter() - start})


def measure(method: str, config: pretrain.Pretrain, tests: Sequence[Test], runs: Path, results: Path = RESULTS) -> Path:
    """Pre-trains one network and lets it learn in every setting; what is there already stays."""
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{method.replace(' ', '-')}-{config.filters}-{config.steps}-seed{config.seed}.json"
    folder = runs / path.stem
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"settings": {}}
    begun = checkpoint.read_run(folder)["config"] if (folder / "run.json").exists() else {}
    for place, kept in ((path, result.get("config")), (folder, begun)):
        if kept and kept != dataclasses.asdict(config):
            sys.exit(f"{place} is of another configuration, {kept}; move it away for {dataclasses.asdict(config)}")
    for test in tests:
        kept = result["settings"].get(str(test))
        if kept and (kept["draws"], tuple(kept["rates"])) != (test.draws, test.rates):
            sys.exit(f"{path} has {test} of {kept['draws']} draws and rates {kept['rates']}; move it away for others")
    missing = [test for test in tests if str(test) not in result["settings"]]
    if not missing or "diverged" in result:
        return path
    if result["settings"] and not folder.exists():
        sys.exit(f"{path} is of a network that is not in {folder}; give --runs the folder that holds it, or move the result away")
    images, unseen = pretrain.make_images(config)
    result |= {"method": method, "norm": "instance", "config": dataclasses.asdict(config)}
    result.setdefault("machine", machine())
    try:
        key = jax.random.fold_in(jax.random.key(config.seed), TRAIN_KEY)
        theta = pretrain.train(key, config, images, folder, resume=True)
    except FloatingPointError as error:
        write_json(path, {**result, "diverged": str(error)})
        print(f"{path.stem}: {error}", flush=True)
        return path
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result["seconds_per_step"] = 1 / statistics.median(row["tasks_per_second"] for row in rows)
    result["training_accuracy"] = [row["accuracy"] for row in rows]
    model = pretrain.make_model(config, len(images.names))
    for test in missing:
        found = learn(test, model, theta, unseen, config.seed)
        result["settings"][str(test)] = found
        write_json(path, result)
        rate = f"rate {found['rate']:g}{', at the edge' * found['edge']}"
        print(f"{path.stem}, {test} classes: {found['mean']:.3f} ± {found['interval95'] or 0:.3f}, {rate}", flush=True)
    return path


def draw(steps: int | None, tests: Sequence[Test], filters: int) -> None:
    """Accuracy on the classes seen so far, a curve a method with bands over seeds, for the most classes of a setting.

    All results of the width are drawn, those of sequences if they are of so many.
    """
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-seed*.json"))]
    results = [each for each in results if each["config"]["filters"] == filters]
    results.sort(key=lambda each: METHODS.index(each["method"]))
    results = [each for each in results if each["config"]["method"] == "iid" or steps in (None, each["config"]["steps"])]
    for setting in {test.setting for test in tests} - {"fine-tuned"}:
        most = max((test for test in tests if test.setting == setting), key=lambda test: test.classes)
        curves: dict[str, Any] = {}
        for each in results:
            if found := each["settings"].get(str(most)):
                rows = curves.setdefault(ZAPPED[each["method"]], (found["checkpoints"], []))[1]
                rows.append(np.array(found["running"], float).mean(0))
        picture = RESULTS / f"{setting}-{most.classes}-{filters}-{steps or 'presets'}.png"
        stacked = {name: (places, np.array(rows)) for name, (places, rows) in curves.items()}
        plot.bands(stacked, picture, "classes learned", "accuracy on them, 95 % bands over seeds")


def cost(asked: argparse.Namespace) -> None:
    """Seconds of a step of each method once it is compiled, in turns, medians."""
    where, runs = machine(), []
    for method in asked.methods:
        config = configuration(method, asked, 0)
        images, _ = pretrain.make_images(config)
        learner, tasks = pretrain.make_learner(config, len(images.names)), pretrain.make_tasks(config, images)
        outer = pretrain.make_outer(config, len(images.pixels))
        runs.append(functools.partial(jm.fit, jax.random.key(0), learner, tasks, outer, batch=1, progress=False))
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(COST_TURNS + 1):  # the first compiles
        for own, run in zip(seconds, runs, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(run(steps=COST_STEPS).last)
            own.extend([(time.perf_counter() - start) / COST_STEPS] * (turn > 0))
    found = {method: statistics.median(own) for method, own in zip(asked.methods, seconds, strict=True)}
    write_json(RESULTS / f"cost-{asked.filters}.json", {"machine": where, "seconds_per_step": found})
    print(found)


def main() -> None:
    """All methods of a seed, then the next seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS[:6]))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--filters", type=int, default=64)
    parser.add_argument("--steps", type=int, help="sequences; the preset's if not given")
    parser.add_argument("--batches", type=int, help="of iid; the preset's 570 if not given")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--classes", nargs="+", type=int, default=[10, 50, 100], help="of fine-tuning, 50 at most")
    parser.add_argument("--draws", type=int, default=5, help="fresh ones that are reported; as many choose the rate")
    parser.add_argument("--rates", nargs="+", type=float, help="the first learning rates; three a setting if not given")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "zapping")
    parser.add_argument("--choose", action="store_true", help="score rates of pre-training, which the other calls then take")
    parser.add_argument("--cost", action="store_true", help="time steps of the methods, in turns, on a machine left alone")
    asked = parser.parse_args()
    jm.use_cores()
    jm.use_cache()
    if asked.choose:
        return choose(asked)
    if asked.cost:
        return cost(asked)
    rates = {setting: tuple(asked.rates or SETTINGS[setting]) for setting in asked.settings}
    pairs = [(setting, count) for setting in asked.settings for count in asked.classes]
    pairs = [pair for pair in pairs if pair[0] != "fine-tuned" or pair[1] <= MOST_FINE_TUNED]
    tests = [Test(setting, count, asked.draws, rates[setting]) for setting, count in pairs]
    units = [(method, configuration(method, asked, seed)) for seed in asked.seeds for method in asked.methods]
    for method, config in units:
        measure(method, config, tests, asked.runs)
    draw(asked.steps, tests, asked.filters)


if __name__ == "__main__":
    main()
