"""NRML against MAML, both also in first order: each task trains, or uses, the channels of the largest scales.

    python benchmarks/nrml.py choose                                  Omniglot 5w1s, one seed, validation classes
    python benchmarks/nrml.py compare omniglot-5w1s --seeds 0 1 2     what was chosen, on test classes
    python benchmarks/nrml.py compare omniglot-20w1s --seeds 0 1 2 --steps 2000
    python benchmarks/nrml.py compare caltech-5w1s --seeds 0

`choose` trains NRML in two modes at three shares of channels, and MAML at as many inner rates, each in second and in first order,
on the same tasks, and keeps the best of each by 300 validation episodes. `compare` trains those for as many meta-steps and tests
them on the same 1,000 episodes; rates are multiples of the set's in `sets.py`. Then it measures which channels tasks choose and how
far they agree, within alphabets and across. Runs and results are kept and gone on with.

References:
  Cai et al., Neural Routing in Meta Learning, 2022 (https://arxiv.org/abs/2210.07932).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from machine import machine  # pyright: ignore[reportMissingImports]
from sets import CALTECH, TEST_KEY, VALID_KEY, Set, caltech, make_set, meta_train  # pyright: ignore[reportMissingImports]

import jmeta as jm
from jmeta.checkpoint import write_json

RESULTS = Path(__file__).parent / "results" / "nrml"
STEPS = 5  # of the inner loop: a choice of channels depends on the task from the second on
VALID_EPISODES, TEST_EPISODES = 300, 1000
ROUTING_KEY = 4  # folded into a seed's key
RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
METHODS = ("nrml", "maml", "fonrml", "fomaml")
PAIRS = (("nrml", "maml"), ("nrml", "fomaml"), ("fonrml", "maml"), ("fonrml", "fomaml"))


class Way(NamedTuple):
    """How tasks are learned: the method, its inner rate as a multiple of the set's, NRML's mode and share of channels."""

    method: str
    rate: float = 1.0
    where: Any = "update"
    keep: float = 1.0

    def __str__(self) -> str:
        """Its name in a result."""
        return f"{self.method}-{self.where}-{self.keep}" if self.routed else f"{self.method}-{self.rate}"

    @property
    def routed(self) -> bool:
        """Whether it is NRML."""
        return self.method.endswith("nrml")


WAYS = [
    *(
        Way(method, 1.0, where, keep)
        for method in ("nrml", "fonrml")
        for where in ("update", "forward")
        for keep in (0.25, 0.5, 0.75)
    ),
    *(Way(method, rate) for method in ("maml", "fomaml") for rate in RATES),
]


def learner(problem: Set, way: Way) -> jm.MetaLearner:
    """The meta-learner of a way."""
    rule: Any = optax.sgd(way.rate * problem.rate)
    rule = jm.chain(jm.route(way.keep, where=way.where), rule) if way.routed else rule
    return jm.maml(problem.model, jm.xent, rule, jm.repeat(STEPS), order=1 if way.method.startswith("fo") else 2)


def score(
    problem: Set, name: str, way: Way, seed: int, asked: argparse.Namespace, test: bool
) -> tuple[jm.MetaLearner, jm.Theta, jm.Score]:
    """Meta-trains, or takes what is there, and scores on validation or test classes."""
    made, folder = learner(problem, way), asked.runs / str(asked.steps) / f"{name}-seed{seed}" / str(way)
    theta = meta_train(made, problem, seed, asked.steps, folder, {**way._asdict(), "inner_steps": STEPS})
    key = jax.random.fold_in(jax.random.key(seed), TEST_KEY if test else VALID_KEY)
    tasks, episodes = (problem.test, TEST_EPISODES) if test else (problem.valid, VALID_EPISODES)
    return made, theta, jm.fewshot(key, made, theta, tasks, episodes, every_step=False, mesh=jm.task_mesh())


def choose(asked: argparse.Namespace) -> None:
    """Scores every way on validation classes; what is there stays."""
    path = RESULTS / f"choice-{asked.steps}.json"
    found = json.loads(path.read_text()) if path.exists() else {"machine": machine(), "meta_steps": asked.steps, "ways": {}}
    problem = make_set("omniglot-5w1s", None, 0)
    for way in WAYS:
        if str(way) not in found["ways"] and way.method in asked.methods:
            result = score(problem, "omniglot-5w1s", way, 0, asked, test=False)[2]
            found["ways"][str(way)] = {**way._asdict(), "valid": [result.mean, result.interval], "episodes": VALID_EPISODES}
            write_json(path, found)
            print(f"{way}: {result}", flush=True)


def chosen(asked: argparse.Namespace) -> list[Way]:
    """The best way of each method by validation classes."""
    path = RESULTS / f"choice-{asked.choice}.json"
    tried = json.loads(path.read_text())["ways"] if path.exists() else {}
    missing = [str(way) for way in WAYS if str(way) not in tried]
    if missing:
        sys.exit(f"{path} lacks {', '.join(missing)}: let `nrml.py choose` end first")
    best = {row["method"]: row for row in sorted(tried.values(), key=lambda row: row["valid"][0])}
    return [Way(*(best[method][field] for field in Way._fields)) for method in METHODS]


def compare(seed: int, asked: argparse.Namespace) -> None:
    """Scores what was chosen on test classes, paired, and measures NRML's choices of channels."""
    path = RESULTS / f"{asked.name}-{asked.steps}-seed{seed}.json"
    if path.exists():
        return
    found: dict[str, Any] = {
        "machine": machine(),
        "seed": seed,
        "meta_steps": asked.steps,
        "norm": "batch",
        "episodes": TEST_EPISODES,
    }
    scores, source = {}, caltech() if asked.name.startswith("caltech") else None
    problem = make_set(asked.name, source, seed)
    for way in chosen(asked):
        made, theta, scores[way.method] = score(problem, asked.name, way, seed, asked, test=True)
        edge = not way.routed and way.rate in (RATES[0], RATES[-1])
        found[way.method] = {**way._asdict(), "edge": edge, "accuracy": [scores[way.method].mean, scores[way.method].interval]}
        print(f"{asked.name}, seed {seed}, {way}: {scores[way.method]}", flush=True)
        if way.routed and asked.name.startswith("omniglot"):
            key = jax.random.fold_in(jax.random.key(seed), ROUTING_KEY)
            unseen = jm.omniglot(split="customary", seed=seed).test
            routed = jm.routing(key, made, theta, unseen, way.keep, ways=5, shots=1)
            routed.plot(path.with_name(f"{path.stem}-{way.method}-routing.png"))
            found[way.method]["routing"] = routed.figures()
            print(routed, flush=True)
    found["gain"] = {f"{one} - {other}": jm.paired(scores[one], scores[other]) for one, other in PAIRS}
    write_json(path, found)
    print(found["gain"], flush=True)


def main() -> None:
    """One of the two stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["choose", "compare"])
    parser.add_argument("name", nargs="?", default="omniglot-5w1s", choices=["omniglot-5w1s", "omniglot-20w1s", "caltech-5w1s"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200, help="meta-steps")
    parser.add_argument("--choice", type=int, default=1200, help="meta-steps of the choice that is compared")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="of the choice")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "nrml")
    asked = parser.parse_args()
    if asked.name.startswith("caltech") and caltech() is None:
        parser.error(f"{asked.name} needs {CALTECH} in the folder that JMETA_DATA_DIR names")
    jm.use_cores()
    jm.use_cache()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if asked.stage == "choose":
        return choose(asked)
    for seed in asked.seeds:
        compare(seed, asked)


if __name__ == "__main__":
    main()
