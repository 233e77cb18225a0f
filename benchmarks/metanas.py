"""MetaNAS against Reptile with fixed networks: conv4, and the best of some derived architectures.

    python benchmarks/metanas.py omniglot-5w1s --seeds 0 1
    python benchmarks/metanas.py caltech-5w1s --seeds 0 1          pictures at 28 pixels, in colour

Every network is trained by Reptile for as many meta-steps on the same classes, with the same inner optimiser and batches, and
tested on the same 600 episodes of unseen classes; fixed networks have about as many parameters as a task of MetaNAS uses. Then, of
MetaNAS: what soft pruning after a task's adaptation saves and costs, against the same parameters unpruned and pruned at random to
the same size, and how far alphas move. Runs and results are kept and gone on with.

References:
  Elsken, Staffler, Metzen, Hutter, Meta-Learning of Neural Architectures for Few-Shot Learning, CVPR 2020
  (https://arxiv.org/abs/1911.11090).
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from machine import machine, seconds_of  # pyright: ignore[reportMissingImports]
from sets import CALTECH, TEST_KEY, TRAIN_KEY, VALID_KEY, caltech, photographs  # pyright: ignore[reportMissingImports]

import jmeta as jm
from jmeta import plot
from jmeta.architecture import mixture
from jmeta.builders import shares
from jmeta.checkpoint import write_json
from jmeta.evaluate.draws import interval
from jmeta.models.supernet import operation_sizes

RESULTS = Path(__file__).parent / "results" / "metanas"
CELLS, CHANNELS, REDUCTIONS = 4, 8, (0, 2)
TRAIN_SHOTS, INNER_STEPS, INNER_BATCH, TEST_STEPS = 10, 5, 10, 50  # in half of the tests' steps alphas are adapted as well
INNER_RATE, META_RATE, ALPHA_RATE, DECAY = 5e-3, 1.0, 0.6, 1e-3
COLDEST, TRAIN_THRESHOLD, TEST_THRESHOLD = 0.1, 0.01, 0.05
BATCH, EPISODES, VALID_EPISODES = 5, 600, 200
CONV4, DERIVED = 28, 14  # filters of conv4 and channels of derived networks
PRUNE_KEY = 5  # folded into a seed's key


class Problem(NamedTuple):
    """Tasks of disjoint classes, and the shape of their images."""

    train: jm.Tasks
    valid: jm.Tasks
    test: jm.Tasks
    shape: tuple[int, int, int]


def make_problem(name: str, seed: int) -> Problem:
    """Omniglot, or Caltech-101 made smaller."""
    if name.startswith("omniglot"):
        splits, shape = jm.omniglot(split="customary", seed=seed), (28, 28, 1)
    else:
        made = photographs(str(caltech()), seed)
        splits, shape = jm.Splits(*(small(images) for images in made if images is not None)), (28, 28, 3)
    assert splits.valid is not None
    train = jm.episodes(splits.train, 5, TRAIN_SHOTS, 1)
    return Problem(train, jm.episodes(splits.valid, 5, 1, 15), jm.episodes(splits.test, 5, 1, 15), shape)


def small(images: jm.Images) -> jm.Images:
    """84 x 84 as 28 x 28: means over 3 x 3 pixels."""
    blocks = images.pixels.reshape(-1, 28, 3, 28, 3, 3).mean((2, 4))
    return images._replace(pixels=blocks.astype(np.uint8))


def seen(steps: int, testing: bool) -> jm.Data:
    """Minibatches in training; a test's few examples all together."""
    return jm.repeat(steps) if testing else jm.minibatches(steps, INNER_BATCH)


def fixed(model: jm.Model, testing: bool) -> jm.MetaLearner:
    """Reptile of one network."""
    data = seen(TEST_STEPS if testing else INNER_STEPS, testing)
    return jm.reptile(model, jm.xent, optax.adam(INNER_RATE, b1=0.0), data, carry_state=True, unroll=False)


def searching(model: jm.Model, turns: int, alone: int, *, testing: bool, threshold: float) -> jm.MetaLearner:
    """Reptile of a supernet whose alphas and weights take turns, then weights alone."""
    parts: Any = {
        "w": optax.adam(INNER_RATE, b1=0.0),
        "alpha": optax.chain(optax.add_decayed_weights(DECAY), optax.adam(INNER_RATE, b1=0.0)),
    }
    rows = ((1, 0), (0, 1)) * turns + ((0, 1),) * alone
    turn = jm.lambda_mask(rows, optax.partition(parts, jm.top_level), labels=("alpha", "w"))
    temperature = jm.anneal(1.0, COLDEST if turns else 1.0, max(turns, 1), every=2)
    rule = jm.chain(jm.mix(temperature, threshold=threshold), turn)
    return jm.reptile(model, jm.xent, rule, seen(len(rows), testing), carry_state=True, unroll=False)


def learners(name: str, shape: tuple[int, int, int], meta_steps: int) -> tuple[jm.MetaLearner, jm.MetaLearner]:
    """Of a network, the one that trains and the one that is tested."""
    if name == "metanas":
        net = supernet(shape)
        warm = searching(net, 0, INNER_STEPS, testing=False, threshold=TRAIN_THRESHOLD)
        both = searching(net, INNER_STEPS, 0, testing=False, threshold=TRAIN_THRESHOLD)
        half = TEST_STEPS // 2
        tested = searching(net, half, TEST_STEPS - half, testing=True, threshold=TEST_THRESHOLD)
        return jm.watched(jm.switch(warm, both, at=(meta_steps // 2,)), shares), tested
    if name == "conv4":
        model = jm.conv4(5, filters=CONV4, shape=shape)
    else:
        genotype = jm.PUBLISHED[name] if name in jm.PUBLISHED else jm.load_genotype(name)
        model = jm.derive(genotype, 5, cells=CELLS, channels=DERIVED, reductions=REDUCTIONS, shape=shape)
    return fixed(model, False), fixed(model, True)


def supernet(shape: tuple[int, int, int]) -> jm.Model:
    """The search space of all runs here."""
    return jm.supernet(5, cells=CELLS, channels=CHANNELS, reductions=REDUCTIONS, shape=shape)


def train(name: str, problem: Problem, seed: int, asked: argparse.Namespace, folder: Path) -> jm.Theta:
    """Meta-trains, or goes on, or takes what is there."""
    learner, _ = learners(name, problem.shape, asked.steps)
    outer: Any = optax.sgd(META_RATE)
    if name == "metanas":
        outer = jm.on_params(optax.partition({"w": outer, "alpha": optax.sgd(ALPHA_RATE)}, jm.top_level))
    about = {"inner_rate": INNER_RATE, "inner_batch": INNER_BATCH, "train_shots": TRAIN_SHOTS, "batch": BATCH, "seed": seed}
    return jm.fit(
        jax.random.fold_in(jax.random.key(seed), TRAIN_KEY),
        learner,
        problem.train,
        outer,
        asked.steps,
        BATCH,
        workdir=folder,
        resume=True,
        config={"network": Path(name).stem, **about},
        save_every=250,
    ).theta


def tested(name: str, problem: Problem, theta: jm.Theta, seed: int, valid: bool) -> tuple[jm.Score, float]:
    """The score, and the median seconds in which it adapts to a task."""
    _, learner = learners(name, problem.shape, 2)
    key = jax.random.fold_in(jax.random.key(seed), VALID_KEY if valid else TEST_KEY)
    tasks, episodes = (problem.valid, VALID_EPISODES) if valid else (problem.test, EPISODES)
    score = jm.fewshot(key, learner, theta, tasks, episodes, every_step=False, mesh=jm.task_mesh())
    if valid:
        return score, float("nan")
    adapt, support = jax.jit(learner.adapt), tasks.sample(key, tasks.data).support
    seconds = [seconds_of(lambda: jax.block_until_ready(adapt(key, theta, support))) for _ in range(11)]
    return score, statistics.median(seconds[1:])


def prunings(problem: Problem, theta: jm.Theta, seed: int) -> dict[str, Any]:
    """Of the same adapted parameters: accuracy unpruned, pruned and pruned at random, sizes, and how far the alphas went."""
    net, half = supernet(problem.shape), TEST_STEPS // 2
    learner = searching(net, half, TEST_STEPS - half, testing=True, threshold=TEST_THRESHOLD)
    start = mixture(theta.params["alpha"], COLDEST)

    @jax.jit
    def one(key):
        key_task, key_learn, key_prune = jax.random.split(key, 3)
        task = problem.test.sample(key_task, problem.test.data)
        params = learner.adapt(key_learn, theta, task.support).params
        whole, pruned = (mixture(params["alpha"], COLDEST, threshold) for threshold in (0.0, TEST_THRESHOLD))
        by_chance = at_random(key_prune, params, whole, pruned)
        outputs = (net.apply({**params, "mixture": each}, task.query.x) for each in (whole, pruned, by_chance))
        moved = sum(jnp.abs(a["ops"] - b["ops"]).sum() for a, b in zip(nodes(whole), nodes(start), strict=True)) / 18
        size = jm.sparse_size(params, temperature=COLDEST, threshold=TEST_THRESHOLD)
        return jnp.stack([jm.accuracy(y, task.query.y) for y in outputs]), size, moved

    key = jax.random.fold_in(jax.random.key(seed), PRUNE_KEY)
    rows = [one(each) for each in jax.random.split(key, EPISODES)]
    scores, sizes, moves = (np.array([np.asarray(row[column]) for row in rows]) for column in range(3))
    whole = sum(leaf.size for leaf in jax.tree.leaves(theta.params["w"]))
    names = ("unpruned", "pruned", "at random")
    return {
        **{name: interval(column) for name, column in zip(names, scores.T, strict=True)},
        "pruned - unpruned": interval(scores[:, 1] - scores[:, 0]),
        "pruned - at random": interval(scores[:, 1] - scores[:, 2]),
        "parameters": {"all": whole, "mean": float(sizes.mean()), "least": int(sizes.min()), "most": int(sizes.max())},
        "moved within a task": [float(moves.mean()), float(moves.min()), float(moves.max())],
        "moved at most": 2.0,
        "episodes": EPISODES,
    }


def nodes(mixed: dict[str, Any]) -> list[dict[str, jax.Array]]:
    """Those of both kinds."""
    return [node for kind in ("normal", "reduce") for node in mixed[kind].values()]


def at_random(key: jax.Array, params: Any, whole: Any, pruned: Any) -> dict[str, Any]:
    """The unpruned mixture of operations drawn by lot until they have as many weights as pruning leaves, of its inputs."""
    counts = [jnp.asarray(kind[node, : node + 2]) for kind in operation_sizes(params).values() for node in range(len(kind))]
    there = [jnp.where(own["inputs"][:, None] > 0, count, 0) for count, own in zip(counts, nodes(pruned), strict=True)]
    left = sum((count * (own["ops"] > 0)).sum() for count, own in zip(there, nodes(pruned), strict=True))
    flat = jnp.concatenate([count.ravel() for count in there])
    order = jax.random.permutation(key, len(flat))

    def take(so_far, size):
        fits = so_far + size <= left
        return so_far + fits * size, fits

    _, fits = jax.lax.scan(take, jnp.zeros_like(left), flat[order])
    kept = jnp.zeros(len(flat), bool).at[order].set(fits)
    places = np.cumsum([count.size for count in counts])[:-1]
    masks = iter(mask.reshape(count.shape) for mask, count in zip(jnp.split(kept, places), counts, strict=True))
    return {
        kind: {name: {"ops": own["ops"] * next(masks), "inputs": pruned[kind][name]["inputs"]} for name, own in whole[kind].items()}
        for kind in ("normal", "reduce")
    }


def pictures(problem: Problem, theta: jm.Theta, start: jm.Theta, seed: int, folder: Path, path: Path) -> dict[str, Any]:
    """Draws the cells of the meta-model and of two tasks and the alphas over meta-training; says how far these went."""
    _, learner = learners("metanas", problem.shape, 2)
    found = {"meta-model": jm.genotype(theta.params)}
    for number, key in enumerate(jax.random.split(jax.random.fold_in(jax.random.key(seed), PRUNE_KEY)), 1):
        support = problem.test.sample(key, problem.test.data).support
        found[f"task {number}"] = jm.genotype(jax.jit(learner.adapt)(key, theta, support).params)
    plot.cells({name: own._asdict() for name, own in found.items()}, path.with_name(f"{path.stem}-cells.png"))
    plot.shares(folder / "metrics.jsonl", path.with_name(f"{path.stem}-alphas.png"))
    before, after = (nodes(mixture(each.params["alpha"], COLDEST)) for each in (start, theta))
    moved = sum(float(jnp.abs(a["ops"] - b["ops"]).sum()) for a, b in zip(before, after, strict=True)) / 18
    return {"genotypes": {name: own._asdict() for name, own in found.items()}, "moved over meta-training": moved}


def compare(name: str, seed: int, asked: argparse.Namespace) -> None:
    """Trains all, tests all, and writes what was found after each."""
    path = RESULTS / f"{name}-{asked.steps}-seed{seed}.json"
    found = json.loads(path.read_text()) if path.exists() else {"machine": machine(), "seed": seed, "meta_steps": asked.steps}
    problem, runs = make_problem(name, seed), asked.runs / str(asked.steps) / f"{name}-seed{seed}"
    found |= {"norm": "batch", "episodes": EPISODES, "networks": found.get("networks", {})}
    theta = train("metanas", problem, seed, asked, runs / "metanas")
    own = runs / "genotype.json"
    if not own.exists():
        jm.save_genotype(own, jm.genotype(theta.params))
    for network in ("conv4", "metanas-omniglot-v2", "metanas-mini-imagenet-v2", str(own), "metanas"):
        label = Path(network).stem if network == str(own) else network
        if label in found["networks"]:
            continue
        theta = train(network, problem, seed, asked, runs / label)
        valid, (test, seconds) = tested(network, problem, theta, seed, True)[0], tested(network, problem, theta, seed, False)
        size = sum(leaf.size for leaf in jax.tree.leaves(theta.params.get("w", theta.params)))
        figures = {"parameters": size, "adaptation_seconds": seconds}
        found["networks"][label] = {
            name: [score.mean, score.interval] for name, score in (("valid", valid), ("test", test))
        } | figures
        np.save(runs / f"{label}-test.npy", test.each)
        write_json(path, found)
        print(f"{name}, seed {seed}, {label}: {test}", flush=True)
    if "pruning" not in found:
        start = learners("metanas", problem.shape, 2)[0].init(jax.random.fold_in(jax.random.key(seed), TRAIN_KEY))
        found |= {"pruning": prunings(problem, theta, seed), **pictures(problem, theta, start, seed, runs / "metanas", path)}
        each = {label: np.load(runs / f"{label}-test.npy") for label in found["networks"]}
        derived = max(set(each) - {"conv4", "metanas"}, key=lambda label: found["networks"][label]["valid"][0])
        gains = {label: interval(each["metanas"] - each[label]) for label in ("conv4", derived)}
        write_json(path, {**found, "gain": gains})
        print(found["pruning"], gains, flush=True)


def main() -> None:
    """One data set, some seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["omniglot-5w1s", "caltech-5w1s"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=3000, help="meta-steps, of which the first half leaves the alphas")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "metanas")
    asked = parser.parse_args()
    if asked.name.startswith("caltech") and caltech() is None:
        parser.error(f"{asked.name} needs {CALTECH} in the folder that JMETA_DATA_DIR names")
    jm.use_cores()
    jm.use_cache()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in asked.seeds:
        compare(asked.name, seed, asked)


if __name__ == "__main__":
    main()
