"""Lambda patterns: how much faster adaptation becomes at how little loss, chosen on validation classes, reported on test classes.

    python benchmarks/lambda_patterns.py omniglot-5w1s --seeds 0 1 2
    python benchmarks/lambda_patterns.py caltech-5w5s --seeds 0 --steps 1200 --at-most .2 --rounds 0

For each seed: 5-step MAML is trained, the fastest pattern within a point of the full one is searched on 300 validation episodes
(among those of at most a third of its operations, since the paper's claim is a third of its time, or of the share that is given;
those of a fifth are usually the faster ones by three times, as times fall behind operations), and then measured on 1,000
episodes of test classes beside the full pattern, ANIL's head alone, random patterns of about the same cost, and, for Omniglot, on
photographs in grey at 28 pixels. Then, again for each seed, the same for a single step of adaptation, on that theta and after
meta-training under the pattern. All comparisons are paired: the same episodes. Runs, scores and results are kept and gone on with.

References:
  Khabarlak, Faster Optimization-Based Meta-Learning Adaptation Phase, 2022 (https://arxiv.org/abs/2206.05930).
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from machine import machine  # pyright: ignore[reportMissingImports]
from sets import (  # pyright: ignore[reportMissingImports]
    CALTECH,
    SHIFT_KEY,
    TEST_KEY,
    VALID_KEY,
    Set,
    caltech,
    make_set,
    meta_train,
)

import jmeta as jm
from jmeta.checkpoint import write_json
from jmeta.evaluate.cost import operations
from jmeta.evaluate.fewshot import over_episodes

RESULTS = Path(__file__).parent / "results" / "lambda_patterns"
STEPS = 5  # of the inner loop
TOLERANCE = 0.01
VALID_EPISODES, TEST_EPISODES = 300, 1000
RANDOMS = 5  # random patterns, of operations within a sixth of the best's


def maker(problem: Set, steps: int) -> Any:
    """`make_learner` of `jm.search`: MAML of that many inner steps."""

    def make(pattern):
        return jm.maml(problem.model, jm.xent, jm.lambda_mask(pattern, optax.sgd(problem.rate)), jm.repeat(steps))

    return make


def train(problem: Set, steps: int, pattern: jm.Pattern, seed: int, meta_steps: int, folder: Path) -> jm.Theta:
    """Meta-trains under a pattern, or goes on, or takes what is there."""
    made = maker(problem, steps)(pattern)
    about = {"pattern": str(pattern), "inner_steps": steps}
    return meta_train(made, problem, seed, meta_steps, folder, about)


def randoms(best: jm.Pattern, cost: Any, seed: int) -> list[jm.Pattern]:
    """Patterns of operations within a sixth of the best's: its steps in any order, their lowest layers, those above by chance."""
    rng, wanted, found = np.random.default_rng(seed), cost(best), {}
    for _ in range(200):
        rows = rng.permutation(np.array(best.rows))
        lowest = np.where(rows.any(1), rows.argmax(1), rows.shape[1])
        above = np.arange(rows.shape[1]) > lowest[:, None]
        chosen = above & (rng.random(rows.shape) < 0.5)
        chosen |= np.arange(rows.shape[1]) == lowest[:, None]
        each = jm.pattern(best.layers, chosen.astype(int))
        if each != best and each not in found and abs(cost(each) / wanted - 1) < 1 / 6:
            found[each] = None
        if len(found) == RANDOMS:
            break
    return list(found)


def compared(
    problem: Set, steps: int, theta: jm.Theta, tasks: jm.Tasks, key: int, seed: int, patterns: Sequence, path: Path
) -> dict:
    """The patterns on the same episodes as the full one, by their texts: accuracy, difference, operations, seconds."""
    found = jm.search(
        jax.random.fold_in(jax.random.key(seed), key),
        maker(problem, steps),
        theta,
        patterns,
        tasks,
        tolerance=1 - 1e-9,
        episodes=TEST_EPISODES,
        timed=len(patterns) + 1,
        rounds=0,
        path=path,
        mesh=jm.task_mesh(),
    )
    return {str(each.pattern): {**each._asdict(), "pattern": each.pattern.rows} for each in found.table}


def work(problem: Set, steps: int, theta: jm.Theta) -> Callable[[jm.Pattern], int]:
    """Operations of the adaptation to one task under a pattern."""
    key = jax.random.key(0)
    task = jax.eval_shape(problem.test.sample, key, problem.test.data)
    return lambda each: operations(maker(problem, steps)(each).adapt, key, theta, task.support)


def find(problem: Set, steps: int, theta: jm.Theta, seed: int, folder: Path, asked: argparse.Namespace) -> jm.Search:
    """The search on validation episodes, among all patterns for one step, among those of a share of the operations for more."""
    key = jax.random.fold_in(jax.random.key(seed), VALID_KEY)
    cost, full = work(problem, steps, theta), jm.pattern(problem.model, "full")
    wanted = [each for each in jm.patterns(problem.model, steps) if steps == 1 or cost(each) <= cost(full) * asked.at_most]
    return jm.search(
        key,
        maker(problem, steps),
        theta,
        wanted,
        problem.valid,
        tolerance=TOLERANCE,
        episodes=VALID_EPISODES,
        rounds=asked.rounds,
        path=folder / f"valid-{steps}.json",
        mesh=jm.task_mesh(),
    )


def many_steps(problem: Set, seed: int, asked: argparse.Namespace, folder: Path, picture: Path) -> dict[str, Any]:
    """Five steps: the search, drawn, and its choice among others on test classes and on photographs."""
    theta = train(problem, STEPS, jm.pattern(problem.model, "full"), seed, asked.steps, folder / "full")
    many = find(problem, STEPS, theta, seed, folder, asked)
    picture.parent.mkdir(parents=True, exist_ok=True)
    many.plot(picture)
    chance = randoms(many.best.pattern, work(problem, STEPS, theta), seed)
    head = jm.pattern(problem.model, "head", STEPS)
    wanted = list(dict.fromkeys([many.best.pattern, many.sure.pattern, many.most_accurate.pattern, head, *chance]))
    tests = {"test": (problem.test, TEST_KEY)} | ({} if problem.shift is None else {"shift": (problem.shift, SHIFT_KEY)})
    result = {
        where: compared(problem, STEPS, theta, tasks, number, seed, wanted, folder / f"{where}.json")
        for where, (tasks, number) in tests.items()
    }
    choice = {"at_most": asked.at_most, "rounds": asked.rounds, "randoms": [str(each) for each in chance]}
    return {**result, "best": str(many.best.pattern), "sure": str(many.sure.pattern), **choice, "valid": many.as_dict()}


def one_step(problem: Set, seed: int, asked: argparse.Namespace, folder: Path, picture: Path) -> dict[str, Any]:
    """A single step: the best pattern against the full one on the theta of five steps, and each after meta-training under it."""
    full = jm.pattern(problem.model, "full")
    theta = train(problem, STEPS, full, seed, asked.steps, folder / "full")
    one = find(problem, 1, theta, seed, folder, asked)
    one.plot(picture)
    best = one.most_accurate.pattern
    same = compared(problem, 1, theta, problem.test, TEST_KEY, seed, [best], folder / "one.json")
    scores = {}
    for label, pattern in {"full": full, "best": best}.items():
        own = train(problem, 1, pattern, seed, asked.steps, folder / f"one-{label}")
        path = folder / f"one-trained-{label}.json"
        compared(problem, 1, own, problem.test, TEST_KEY, seed, [best], path)
        kept = json.loads(path.read_text())["patterns"]
        scores[label] = next(np.array(row["scores"]) for row in kept if row["rows"] == [list(each) for each in pattern.rows])
    trained = {label: over_episodes(each) for label, each in {**scores, "gain": scores["best"] - scores["full"]}.items()}
    return {"best": str(best), "same_theta": same, "trained": trained}


def main() -> None:
    """Five steps of all seeds, then one step of all; a result that is there is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["omniglot-5w1s", "omniglot-5w5s", "caltech-5w5s"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=5000, help="meta-steps")
    parser.add_argument("--at-most", type=float, default=1 / 3, help="operations of a candidate, as a share of the full pattern's")
    parser.add_argument("--rounds", type=int, default=1, help="times that patterns next to the best are tried")
    parser.add_argument("--parts", nargs="+", choices=["many", "one"], default=["many", "one"], help="inner steps, many or one")
    parser.add_argument("--source", help=f"{CALTECH}; looked up in JMETA_DATA_DIR")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "lambda_patterns")
    asked = parser.parse_args()
    jm.use_cores()
    jm.use_cache()
    source = asked.source or caltech()
    if source is None and asked.name.startswith("caltech"):
        parser.error(f"--source must name {CALTECH}, or JMETA_DATA_DIR the folder that holds it")
    parts = {"many": ("", many_steps), "one": ("-one-step", one_step)}
    for ending, measure in (parts[part] for part in asked.parts):
        for seed in asked.seeds:
            path = RESULTS / f"{asked.name}-{asked.steps}-seed{seed}{ending}.json"
            if path.exists():
                continue
            folder = asked.runs / str(asked.steps) / f"{asked.name}-seed{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            found = measure(make_set(asked.name, source, seed), seed, asked, folder, path.with_suffix(".png"))
            about = {"machine": machine(), "seed": seed, "meta_steps": asked.steps, "norm": "batch", "episodes": TEST_EPISODES}
            write_json(path, {**about, **found})
            print(path, flush=True)


if __name__ == "__main__":
    main()
