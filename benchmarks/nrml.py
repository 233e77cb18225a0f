"""NRML against MAML, also in first order: each task trains, or uses, the channels of the largest scales.

    python benchmarks/nrml.py choose --steps 500 --batch 16           Omniglot 5w1s, one seed, validation classes
    python benchmarks/nrml.py attempt --steps 500 --batch 16          the same for variants of what was chosen
    python benchmarks/nrml.py compare omniglot-5w1s --seeds 0 1 2     what was chosen, on test classes
    python benchmarks/nrml.py compare omniglot-20w1s --seeds 0 1 2 --steps 2000
    python benchmarks/nrml.py compare caltech-5w1s --seeds 0
    python benchmarks/nrml.py prune --seeds 0                         half of a slimming-trained network cut away

`choose` trains NRML in two modes at three shares of channels, and MAML at as many inner rates, each in second and in first order,
on the same tasks, and keeps the best of each by 300 validation episodes. `attempt` changes one thing at a time of the best NRML,
and of MAML what has nothing to do with routing. `compare` trains what was chosen for as many meta-steps and tests it on the same
1,000 episodes; rates are multiples of the set's in `sets.py`. Then it measures which channels tasks choose and how far they agree,
within alphabets and across. `prune` meta-trains MAML with scales drawn towards 0 by several strengths and tests each network on the
same episodes whole, with half of its channels silent, without them, and so meta-trained further. Runs and results are kept and gone
on with.

References:
  Cai et al., Neural Routing in Meta Learning, 2022 (https://arxiv.org/abs/2210.07932).
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from machine import machine  # pyright: ignore[reportMissingImports]
from sets import CALTECH, TEST_KEY, TRAIN_KEY, VALID_KEY, Set, caltech, make_set, meta_train  # pyright: ignore[reportMissingImports]

import jmeta as jm
from jmeta.checkpoint import write_json
from jmeta.evaluate.cost import alternately, operations

RESULTS = Path(__file__).parent / "results" / "nrml"
STEPS = 5  # of the inner loop: a choice of channels depends on the task from the second on
VALID_EPISODES, TEST_EPISODES = 300, 1000
ROUTING_KEY, SPREAD_KEY, START_KEY = 4, 5, 6  # folded into a seed's key
RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
METHODS = ("nrml", "maml", "fonrml", "fomaml")
STRENGTHS = (0.0, 1e-4, 1e-3)  # of slimming
CUT, MORE = 0.5, 300  # of all channels; meta-steps thereafter
CHANGES = {  # of NRML, one at a time: options of `jmeta.route`, or none where `rule` or `start` makes the change
    "signed": {"score": "signed"},
    "global": {"per": "global"},
    "task": {"refresh": "task"},
    "meta": {"keep_meta": "keep"},
    "spread": {},
    "free": {},
    "apart": {},
    "lot": {},
    "fixed": {},
}
APART = 10.0  # times the inner rate, of scales in "apart"
SPREAD_TASKS = 200
CONTROLS = ("spread", "apart")  # that MAML can be changed in as well


class Way(NamedTuple):
    """How tasks are learned.

    Attributes:
      method: one of METHODS.
      rate: the inner rate as a multiple of the set's.
      where: NRML's mode.
      keep: its share of channels.
      change: one of CHANGES, or none.
    """

    method: str
    rate: float = 1.0
    where: Any = "update"
    keep: float = 1.0
    change: str = ""

    def __str__(self) -> str:
        """Its name in a result."""
        first = f"{self.method}-{self.where}-{self.keep}" if self.routed else f"{self.method}-{self.rate}"
        return f"{first}-{self.change}" if self.change else first

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
    order = 1 if way.method.startswith("fo") else 2
    return jm.maml(problem.model, jm.xent, rule(way, way.rate * problem.rate), jm.repeat(STEPS), order=order)


def rule(way: Way, rate: float) -> Any:
    """Gradient descent, of chosen channels where the way is NRML."""
    descent = optax.sgd(rate)
    if way.change == "apart":
        descent = optax.chain(optax.masked(optax.scale(APART), are_scales), descent)
    if not way.routed:
        return descent
    options: dict[str, Any] = {name: way.keep if value == "keep" else value for name, value in CHANGES.get(way.change, {}).items()}
    routed = jm.route(way.keep, where=way.where, **options)
    changed = {"free": from_second, "lot": drawn, "fixed": fixed}.get(way.change)
    return jm.chain(routed if changed is None else changed(routed), descent)


def from_second(routed: jm.Rule) -> jm.Rule:
    """The rule but for the first step, whose choice is the same for all tasks: that trains every channel."""

    def update(updates, state, params=None, *, step=0, **more):
        chosen, state = routed.update.update(updates, state, params, step=step, **more)
        return jax.tree.map(lambda free, own: jnp.where(step == 0, free, own), updates, chosen), state

    return routed._replace(update=optax.GradientTransformationExtraArgs(routed.update.init, update))


def drawn(routed: jm.Rule) -> jm.Rule:
    """The rule with channels by lot at each step, for comparison: as if all scales were equal."""
    return by_other(routed, jnp.ones_like)


def fixed(routed: jm.Rule) -> jm.Rule:
    """The rule with the same channels at all steps of all tasks, for comparison, whatever the scales are."""
    lot = np.random.default_rng(START_KEY).permutation(256)  # no layer is larger
    return by_other(routed, lambda scale: 1 + jnp.asarray(lot[: scale.size], scale.dtype))


def by_other(routed: jm.Rule, scales: Any) -> jm.Rule:
    """The rule that chooses by `scales(scale)` in the place of each scale."""

    def update(updates, state, params=None, **more):
        other = jax.tree.map(lambda leaf, scale: scales(leaf) if scale else leaf, params, are_scales(params))
        return routed.update.update(updates, state, other, **more)

    return routed._replace(update=optax.GradientTransformationExtraArgs(routed.update.init, update))


def are_scales(tree: Any) -> Any:
    """True at the scales of normalisations."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "scale", tree)


def start(made: jm.MetaLearner, way: Way, seed: int) -> jm.Theta | None:
    """Where "spread" starts from: as all do, but for scales that differ, so that the first choice is no lot. None for others."""
    if way.change != "spread":
        return None
    key = jax.random.key(seed)
    theta = made.init(jax.random.fold_in(key, TRAIN_KEY))  # that of `fit`
    params = {**theta.params}
    for number, name in enumerate(name for name in params if "norm" in params[name]):
        scale = params[name]["norm"]["scale"]
        own = jax.random.fold_in(jax.random.fold_in(key, START_KEY), number)
        apart = jax.random.uniform(own, scale.shape, minval=0.5, maxval=1.5)
        params[name] = {**params[name], "norm": {**params[name]["norm"], "scale": apart}}
    return theta._replace(params=params)


def score(
    problem: Set, name: str, way: Way, seed: int, asked: argparse.Namespace, test: bool
) -> tuple[jm.MetaLearner, jm.Theta, jm.Score]:
    """Meta-trains, or takes what is there, and scores on validation or test classes."""
    made, folder = learner(problem, way), asked.runs / f"{asked.steps}x{problem.batch}" / f"{name}-seed{seed}" / str(way)
    about = {**way._asdict(), "inner_steps": STEPS}
    theta = meta_train(made, problem, seed, asked.steps, folder, about, theta=start(made, way, seed))
    key = jax.random.fold_in(jax.random.key(seed), TEST_KEY if test else VALID_KEY)
    tasks, episodes = (problem.test, TEST_EPISODES) if test else (problem.valid, VALID_EPISODES)
    return made, theta, jm.fewshot(key, made, theta, tasks, episodes, every_step=False, mesh=jm.task_mesh())


def make_problem(name: str, source: str | None, seed: int, batch: int | None) -> Set:
    """The set, with another meta-batch if given."""
    problem = make_set(name, source, seed)
    return problem if batch is None else problem._replace(batch=batch)


def agreement(made: jm.MetaLearner, theta: jm.Theta, way: Way, seed: int) -> Any:
    """Which channels tasks of unseen classes of Omniglot choose, by alphabet; always of five ways."""
    key = jax.random.fold_in(jax.random.key(seed), ROUTING_KEY)
    options: Any = {name: value for name, value in CHANGES.get(way.change, {}).items() if name in ("score", "per")}
    unseen = jm.omniglot(split="customary", seed=seed).test
    return jm.routing(key, made, theta, unseen, way.keep, ways=5, shots=1, **options)


def spread(made: jm.MetaLearner, theta: jm.Theta, problem: Set, seed: int) -> dict[str, float]:
    """How far adapted scales differ: between the channels of a layer (of the mean over tasks), and between tasks (of a channel)."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), SPREAD_KEY), SPREAD_TASKS)
    adapted = jax.jit(lambda theta, keys: jax.lax.map(lambda key: made.adapt(key, theta, problem.test.draw(key).support), keys))
    params = adapted(theta, keys).params
    scales = [part["norm"]["scale"] for part in params.values() if "norm" in part]  # [tasks, C]
    channels, tasks = [float(np.mean([each.mean(0).std() for each in scales])), float(np.mean([each.std(0) for each in scales]))]
    return {"channels": channels, "tasks": tasks}


def valid(ways: list[Way], path: Path, asked: argparse.Namespace, beside: tuple[Way, ...] = ()) -> None:
    """Scores ways on validation classes of Omniglot 5w1s; what is there stays.

    With others beside them, also the gains over these, and how far tasks agree on channels.
    """
    problem = make_problem("omniglot-5w1s", None, 0, asked.batch)
    fresh = {"machine": machine(), "meta_steps": asked.steps, "batch": problem.batch, "ways": {}}
    found = json.loads(path.read_text()) if path.exists() else fresh
    if found["batch"] != problem.batch:
        sys.exit(f"{path} is of meta-batches of {found['batch']} tasks, not of {problem.batch}; move it away")
    others = {other.method: score(problem, "omniglot-5w1s", other, 0, asked, test=False)[2] for other in beside}
    for way in ways:
        if str(way) not in found["ways"] and way.method in asked.methods:
            made, theta, result = score(problem, "omniglot-5w1s", way, 0, asked, test=False)
            row = {**way._asdict(), "valid": [result.mean, result.interval], "episodes": VALID_EPISODES}
            if beside:
                row["gain"] = {label: jm.paired(result, other) for label, other in others.items()}
            if beside and way.routed:
                row["routing"] = agreement(made, theta, way, 0).figures()
                row["spread"] = spread(made, theta, problem, 0)
                print(row["routing"], row["spread"], flush=True)
            found["ways"][str(way)] = row
            write_json(path, found)
            print(f"{way}: {result}", flush=True)


def attempt(asked: argparse.Namespace) -> None:
    """Scores every change of the best NRML on validation classes, and those of MAML."""
    best, maml = chosen(asked, ("nrml", "maml"))
    ways = [best, *(best._replace(change=change) for change in CHANGES)]
    ways += [maml, *(maml._replace(change=change) for change in CONTROLS)]
    valid(ways, RESULTS / f"attempts-{asked.steps}.json", asked, beside=(best, maml))


def chosen(asked: argparse.Namespace, methods: tuple[str, ...] = METHODS) -> list[Way]:
    """The best way of each method by validation classes."""
    path = RESULTS / f"choice-{asked.choice}.json"
    tried = json.loads(path.read_text())["ways"] if path.exists() else {}
    missing = [str(way) for way in WAYS if str(way) not in tried and way.method in methods]
    if missing:
        sys.exit(f"{path} lacks {', '.join(missing)}: let `nrml.py choose` end first")
    best = {row["method"]: row for row in sorted(tried.values(), key=lambda row: row["valid"][0])}
    return [Way(*(best[method][field] for field in Way._fields)) for method in methods]


def compare(seed: int, asked: argparse.Namespace) -> None:
    """Scores what was chosen on test classes, paired, and measures NRML's choices of channels."""
    path = RESULTS / f"{asked.name}-{asked.steps}-seed{seed}.json"
    source, ways = caltech() if asked.name.startswith("caltech") else None, chosen(asked)
    problem = make_problem(asked.name, source, seed, asked.batch)
    if path.exists():
        old = json.loads(path.read_text())
        same = all(value == old[way.method][field] for way in ways for field, value in way._asdict().items())
        if old["batch"] != problem.batch or not same:
            sys.exit(f"{path} is of another batch or choice; move it away")
        return
    found: dict[str, Any] = {
        "machine": machine(),
        "seed": seed,
        "meta_steps": asked.steps,
        "batch": problem.batch,
        "norm": "batch",
        "episodes": TEST_EPISODES,
    }
    scores = {}
    for way in ways:
        made, theta, result = score(problem, asked.name, way, seed, asked, test=True)
        edge = not way.routed and way.rate in (RATES[0], RATES[-1])
        found[way.method] = {**way._asdict(), "edge": edge, "accuracy": [result.mean, result.interval]}
        print(f"{asked.name}, seed {seed}, {way}: {result}", flush=True)
        if way.routed and asked.name.startswith("omniglot"):
            routed = agreement(made, theta, way, seed)
            routed.plot(path.with_name(f"{path.stem}-{way.method}-routing.png"))
            found[way.method] |= {"routing": routed.figures(), "spread": spread(made, theta, problem, seed)}
            print(routed, flush=True)
        scores[way.method] = result
    found["gain"] = {f"{one} - {other}": jm.paired(scores[one], scores[other]) for one, other in itertools.permutations(scores, 2)}
    write_json(path, found)
    print(found["gain"], flush=True)


def prune(seed: int, asked: argparse.Namespace) -> None:
    """Half of the channels of MAML's networks cut, with and without slimming: size, latency and accuracy before and after."""
    path = RESULTS / f"prune-{asked.steps}-seed{seed}.json"
    fresh = {"machine": machine(), "seed": seed, "cut": CUT, "meta_steps_after": MORE, "strengths": {}}
    found = json.loads(path.read_text()) if path.exists() else fresh
    problem, (way,) = make_problem("omniglot-5w1s", None, seed, asked.batch), chosen(asked, ("maml",))
    found |= {"meta_steps": asked.steps, "batch": problem.batch, "norm": "batch", "episodes": TEST_EPISODES}
    for strength in STRENGTHS:
        if f"{strength:g}" in found["strengths"]:
            continue
        made = learner(problem, way)
        folder = asked.runs / f"{asked.steps}x{problem.batch}" / f"prune-seed{seed}" / f"{strength:g}"
        about = {**way._asdict(), "inner_steps": STEPS, "slimming": strength}
        theta = meta_train(made, problem, seed, asked.steps, folder, about, before=jm.slimming(strength))
        found["strengths"][f"{strength:g}"] = cut(problem, way, theta, seed, folder.with_name(f"{strength:g}-cut"))
        write_json(path, found)
        print(f"slimming {strength:g}: {found['strengths'][f'{strength:g}']}", flush=True)


def cut(problem: Set, way: Way, theta: jm.Theta, seed: int, folder: Path) -> dict[str, Any]:
    """Of one network, whole, with half of its channels silent, or as many others, drawn by lot; and cut, also trained further."""
    small = jm.prune(theta, CUT, layers=problem.model.layers)
    smaller = problem._replace(model=jm.conv4(5, filters=small.filters))
    about = {**way._asdict(), "inner_steps": STEPS, "filters": small.filters}
    further = meta_train(learner(smaller, way), smaller, seed, MORE, folder, about, theta=small.theta)
    nets = {"whole": (problem, theta), "silent": (problem, small.masked), "cut": (smaller, small.theta)}
    nets |= {"trained further": (smaller, further), "silent by lot": (problem, by_lot(theta, small, np.random.default_rng(seed)))}
    rows, scores, calls, key = {}, {}, [], jax.random.fold_in(jax.random.key(seed), TEST_KEY)
    task = problem.test.draw(key)
    for name, (own, at) in nets.items():
        made = learner(own, way)
        scores[name] = jm.fewshot(key, made, at, problem.test, TEST_EPISODES, every_step=False, mesh=jm.task_mesh())
        solve = jax.jit(lambda at, task, made=made: made.predict(made.adapt(key, at, task.support), task.query.x))
        jax.block_until_ready(solve(at, task))
        calls.append(lambda solve=solve, at=at: solve(at, task))
        size = sum(leaf.size for leaf in jax.tree.leaves(at.params))
        accuracy = [scores[name].mean, scores[name].interval]
        rows[name] = {"parameters": size, "operations": operations(solve, at, task), "accuracy": accuracy}
    for name, seconds in zip(nets, alternately(calls), strict=True):
        rows[name]["seconds"] = seconds
    for name in rows:
        rows[name]["over whole"] = jm.paired(scores[name], scores["whole"])
    return {"networks": rows, "filters": small.filters}


def by_lot(theta: jm.Theta, small: Any, rng: np.random.Generator) -> jm.Theta:
    """Theta with as many channels of each layer silent as were cut, others."""
    params = {**theta.params}
    for name, kept in small.kept.items():
        here = rng.permutation(kept)
        params[name] = {
            **params[name],
            "norm": jax.tree.map(lambda leaf, here=here: jnp.where(here, leaf, 0), params[name]["norm"]),
        }
    return theta._replace(params=params)


def main() -> None:
    """One of the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["choose", "attempt", "compare", "prune"])
    parser.add_argument("name", nargs="?", default="omniglot-5w1s", choices=["omniglot-5w1s", "omniglot-20w1s", "caltech-5w1s"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200, help="meta-steps")
    parser.add_argument("--batch", type=int, help="tasks of a meta-step; the set's if not given")
    parser.add_argument("--choice", type=int, default=500, help="meta-steps of the choice that is compared")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="of the choice")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "nrml")
    asked = parser.parse_args()
    if asked.name.startswith("caltech") and caltech() is None:
        parser.error(f"{asked.name} needs {CALTECH} in the folder that JMETA_DATA_DIR names")
    jm.use_cores()
    jm.use_cache()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if asked.stage == "choose":
        return valid(WAYS, RESULTS / f"choice-{asked.steps}.json", asked)
    if asked.stage == "attempt":
        return attempt(asked)
    for seed in asked.seeds:
        (compare if asked.stage == "compare" else prune)(seed, asked)


if __name__ == "__main__":
    main()
