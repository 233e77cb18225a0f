"""NRML against MAML and first-order MAML: each task trains, or uses, the channels of the largest scales.

    python benchmarks/nrml.py choose                                  Omniglot 5w1s, one seed, validation classes
    python benchmarks/nrml.py compare omniglot-5w1s --seeds 0 1 2     what was chosen, on test classes
    python benchmarks/nrml.py compare omniglot-20w1s --seeds 0 1 2 --steps 2000
    python benchmarks/nrml.py compare caltech-5w1s --seeds 0

`choose` trains NRML in two modes at three shares of channels, and MAML and first-order MAML at as many inner rates, on the same
tasks, and keeps the best of each by 300 validation episodes. `compare` trains those at as many meta-steps and tests them on the
same 1,000 episodes; Omniglot's rates hold for 20 ways, on Caltech-101 all have that of `sets.py`. Then it measures which channels tasks
choose and how far they agree, within alphabets and across. Runs and results are kept and gone on with.

References:
  Cai et al., Neural Routing in Meta Learning, 2022 (https://arxiv.org/abs/2210.07932).
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from machine import machine  # pyright: ignore[reportMissingImports]
from sets import TEST_KEY, VALID_KEY, Set, caltech, make_set, meta_train  # pyright: ignore[reportMissingImports]

import jmeta as jm
from jmeta.checkpoint import write_json

RESULTS = Path(__file__).parent / "results" / "nrml"
STEPS = 5  # of the inner loop: a choice of channels depends on the task from the second on
VALID_EPISODES, TEST_EPISODES = 300, 1000
ROUTING_KEY = 4  # folded into a seed's key
RATES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)


class Way(NamedTuple):
    """How tasks are learned: the method, its inner rate, and for NRML the mode and the share of channels."""

    method: str
    rate: float
    where: Any = "update"
    keep: float = 1.0

    def __str__(self) -> str:
        """Its name in a result."""
        return f"{self.method}-{self.where}-{self.keep}" if self.method == "nrml" else f"{self.method}-{self.rate}"


WAYS = [
    *(Way("nrml", 0.4, where, keep) for where in ("update", "forward") for keep in (0.25, 0.5, 0.75)),
    *(Way(method, rate) for method in ("maml", "fomaml") for rate in RATES),
]


def learner(problem: Set, way: Way) -> jm.MetaLearner:
    """The meta-learner of a way."""
    rule: Any = optax.sgd(way.rate)
    rule = jm.chain(jm.route(way.keep, where=way.where), rule) if way.method == "nrml" else rule
    return jm.maml(problem.model, jm.xent, rule, jm.repeat(STEPS), order=1 if way.method == "fomaml" else 2)


def score(name: str, way: Way, seed: int, asked: argparse.Namespace, test: bool) -> tuple[jm.MetaLearner, jm.Theta, jm.Score]:
    """Meta-trains, or takes what is there, and scores on validation or test classes."""
    problem = make_set(name, caltech(), seed)._replace(rate=way.rate)
    made, folder = learner(problem, way), asked.runs / str(asked.steps) / f"{name}-seed{seed}" / str(way)
    theta = meta_train(made, problem, seed, asked.steps, folder, {**way._asdict(), "inner_steps": STEPS})
    key = jax.random.fold_in(jax.random.key(seed), TEST_KEY if test else VALID_KEY)
    tasks, episodes = (problem.test, TEST_EPISODES) if test else (problem.valid, VALID_EPISODES)
    return made, theta, jm.fewshot(key, made, theta, tasks, episodes, every_step=False, mesh=jm.task_mesh())


def choose(asked: argparse.Namespace) -> None:
    """Scores every way on validation classes; what is there stays."""
    path = RESULTS / f"choice-{asked.steps}.json"
    found = json.loads(path.read_text()) if path.exists() else {"machine": machine(), "meta_steps": asked.steps, "ways": {}}
    for way in WAYS:
        if str(way) not in found["ways"] and way.method in asked.methods:
            result = score("omniglot-5w1s", way, 0, asked, test=False)[2]
            found["ways"][str(way)] = {**way._asdict(), "valid": [result.mean, result.interval], "episodes": VALID_EPISODES}
            write_json(path, found)
            print(f"{way}: {result}", flush=True)


def chosen(asked: argparse.Namespace) -> list[Way]:
    """The best way of each method by validation classes."""
    tried = json.loads((RESULTS / f"choice-{asked.choice}.json").read_text())["ways"].values()
    best = {row["method"]: row for row in sorted(tried, key=lambda row: row["valid"][0])}
    return [Way(*(best[method][field] for field in Way._fields)) for method in ("nrml", "maml", "fomaml")]


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
    scores = {}
    for way in chosen(asked):
        way = way._replace(rate=0.01) if asked.name.startswith("caltech") else way
        made, theta, scores[way.method] = score(asked.name, way, seed, asked, test=True)
        found[way.method] = {**way._asdict(), "accuracy": [scores[way.method].mean, scores[way.method].interval]}
        print(f"{asked.name}, seed {seed}, {way}: {scores[way.method]}", flush=True)
        if way.method == "nrml" and asked.name.startswith("omniglot"):
            key = jax.random.fold_in(jax.random.key(seed), ROUTING_KEY)
            unseen = jm.omniglot(split="customary", seed=seed).test
            routed = jm.routing(key, made, theta, unseen, way.keep, ways=5, shots=1)
            routed.plot(path.with_name(f"{path.stem}-routing.png"))
            found["routing"] = routed.figures()
            print(routed, flush=True)
    found["gain"] = {other: jm.paired(scores["nrml"], scores[other]) for other in ("maml", "fomaml")}
    write_json(path, found)
    print(f"NRML minus: {found['gain']}", flush=True)


def main() -> None:
    """One of the two stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["choose", "compare"])
    parser.add_argument("name", nargs="?", default="omniglot-5w1s", choices=["omniglot-5w1s", "omniglot-20w1s", "caltech-5w1s"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200, help="meta-steps")
    parser.add_argument("--choice", type=int, default=1200, help="meta-steps of the choice that is compared")
    parser.add_argument("--methods", nargs="+", default=["nrml", "maml", "fomaml"], help="of the choice")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "nrml")
    asked = parser.parse_args()
    jm.use_cores()
    jm.use_cache()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if asked.stage == "choose":
        return choose(asked)
    for seed in asked.seeds:
        compare(seed, asked)


if __name__ == "__main__":
    main()
