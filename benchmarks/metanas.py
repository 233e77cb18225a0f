"""MetaNAS against Reptile with fixed networks: conv4, a published architecture, and the one that its meta-model comes to.

    python benchmarks/metanas.py omniglot-5w1s --choose            first: an inner rate for each kind of network
    python benchmarks/metanas.py omniglot-5w1s --seeds 0 1
    python benchmarks/metanas.py caltech-5w1s --seeds 0 1          pictures at 28 pixels, in colour
    python benchmarks/metanas.py caltech84-5w1s --channels 28 --reductions 1 3

Every network is trained by Reptile for as many meta-steps on the same classes, with batches, inner steps and an outer rate that
are the same, and tested on the same 400 episodes of unseen classes; fixed networks are as wide as it takes to have about as many
parameters as a task of MetaNAS uses. Then, of MetaNAS: what soft pruning saves and costs a task, against the same parameters
unpruned and pruned at random to the same size, where the task adapts with what is pruned left out, and where it adapts with all;
what operations that were cut for good during meta-training save; and how far alphas move. Rates are chosen on validation classes,
which are the same for all seeds, after short training in which nothing is cut. Runs and results are kept and gone on with.

References:
  Elsken, Staffler, Metzen, Hutter, Meta-Learning of Neural Architectures for Few-Shot Learning, CVPR 2020
  (https://arxiv.org/abs/1911.11090).

Differs from the paper in: a smaller network that halves its map in other cells, a tenth of the meta-steps with smaller batches,
outer rates that fall, and alphas whose inner rate is ten times that of the weights, since they would hardly move in so few
meta-steps; mixtures are annealed to 0.05 in tests too; 10 shots in training; tests adapt alphas and weights 25 times and weights
25 times more, with all five examples, and predict 75 queries together; no paths are dropped; the state of the inner optimiser is
the mean over tasks that run in parallel.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from machine import machine  # pyright: ignore[reportMissingImports]
from sets import CALTECH, TEST_KEY, TRAIN_KEY, VALID_KEY, caltech, photographs  # pyright: ignore[reportMissingImports]

import jmeta as jm
from jmeta import plot
from jmeta.architecture import GONE, mixture, weighed
from jmeta.builders import alphas
from jmeta.checkpoint import write_json
from jmeta.evaluate.cost import alternately, operations
from jmeta.evaluate.draws import interval
from jmeta.mesh import share
from jmeta.models.supernet import operation_sizes

RESULTS = Path(__file__).parent / "results" / "metanas"
PUBLISHED = {"omniglot": "metanas-omniglot-v2", "caltech": "metanas-mini-imagenet-v2"}  # what was found on such pictures
RATES = (5e-3, 1e-2)  # inner ones of the weights, to choose from
CHOICE_STEPS, CHOICE_EPISODES, CHOICE_SEED, CHOICE_WIDTHS = 500, 100, 100, {"conv4": 28, "published": 14}
TRAIN_SHOTS, INNER_STEPS, INNER_BATCH = 10, 10, 10  # once alphas learn, half of the steps are theirs
TEST_STEPS = 50  # of the weights; in half of these alphas take a step as well
ALPHA_TIMES = 10.0  # the inner rate of the alphas over that of the weights
META_RATE, ALPHA_RATE, DECAY = 1.0, 0.6, 1e-3  # the outer ones fall to 0
PARTS = 6  # of the search; between them operations are cut for good, and in the last two the alphas' outer rate falls
COLDEST, TRAIN_THRESHOLD, TEST_THRESHOLD = 0.05, 0.01, 0.05
EPISODES = 400
LEAST = 0.93  # of Reptile's conv4 on Omniglot 5w1s, without which a comparison is void
LEAST_STEPS, LEAST_CHANNELS = 3_000, 8  # likewise
PRUNE_KEY = 5  # folded into an episode's key
SPLIT_SEED = 0  # of the classes, whatever the seed of a run


@dataclasses.dataclass(frozen=True)
class Work:
    """What is compared: the data set, the supernet's size, for how many meta-steps, and of how many tasks."""

    name: str
    cells: int
    channels: int
    reductions: tuple[int, ...]
    steps: int
    batch: int

    @property
    def ways(self) -> int:
        """Classes of an episode."""
        return int(self.name.rpartition("-")[2].partition("w")[0])

    @property
    def published(self) -> str:
        """The fixed network to compare with."""
        return next(name for data, name in PUBLISHED.items() if self.name.startswith(data))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image."""
        side = 84 if self.name.startswith("caltech84") else 28
        return side, side, 1 if self.name.startswith("omniglot") else 3

    @property
    def parts(self) -> int:
        """Those of the search; a short one is not cut."""
        return PARTS if self.steps > CHOICE_STEPS else 1

    def __str__(self) -> str:
        """Its name in a result."""
        return f"{self.name}-c{self.channels}-{self.steps}"


class Problem(NamedTuple):
    """Tasks of disjoint classes."""

    train: jm.Tasks
    valid: jm.Tasks
    test: jm.Tasks


def make_problem(work: Work) -> Problem:
    """Omniglot, or Caltech-101, made smaller unless at its full 84 pixels."""
    if work.name.startswith("omniglot"):
        splits = jm.omniglot(split="customary", seed=SPLIT_SEED)
    else:
        splits = photographs(str(caltech()), SPLIT_SEED)
        if work.shape[0] == 28:
            splits = jm.Splits(*(small(images) for images in splits if images is not None))
    assert splits.valid is not None
    train = jm.episodes(splits.train, work.ways, TRAIN_SHOTS, 1)
    return Problem(train, jm.episodes(splits.valid, work.ways, 1, 15), jm.episodes(splits.test, work.ways, 1, 15))


def small(images: jm.Images) -> jm.Images:
    """84 x 84 as 28 x 28: means over 3 x 3 pixels."""
    blocks = images.pixels.reshape(-1, 28, 3, 28, 3, 3).mean((2, 4))
    return images._replace(pixels=blocks.astype(np.uint8))


def seen(steps: int, testing: bool) -> jm.Data:
    """Minibatches in training; a test's few examples all together."""
    return jm.repeat(steps) if testing else jm.minibatches(steps, INNER_BATCH)


def fixed(model: jm.Model, rate: float, testing: bool) -> jm.MetaLearner:
    """Reptile of one network."""
    data = seen(TEST_STEPS if testing else INNER_STEPS, testing)
    return jm.reptile(model, jm.xent, optax.adam(rate, b1=0.0), data, carry_state=True, unroll=False)


def searching(model: jm.Model, rate: float, turns: int, alone: int, threshold: float, testing: bool) -> jm.MetaLearner:
    """Reptile of a supernet whose alphas and weights take turns, then weights alone."""
    parts: Any = {
        "w": optax.adam(rate, b1=0.0),
        "alpha": optax.chain(optax.add_decayed_weights(DECAY), optax.adam(ALPHA_TIMES * rate, b1=0.0)),
    }
    rows = ((1, 0), (0, 1)) * turns + ((0, 1),) * alone
    turn = jm.lambda_mask(rows, optax.partition(parts, jm.top_level), labels=("alpha", "w"))
    temperature = jm.anneal(1.0, COLDEST if turns else 1.0, max(turns, 1), every=2)
    rule = jm.chain(jm.mix(temperature, threshold=threshold), turn)
    return jm.reptile(model, jm.xent, rule, seen(len(rows), testing), carry_state=True, unroll=False)


def searched(model: jm.Model, rate: float, threshold: float = TEST_THRESHOLD) -> jm.MetaLearner:
    """The learner that MetaNAS is tested with."""
    return searching(model, rate, TEST_STEPS // 2, TEST_STEPS - TEST_STEPS // 2, threshold, testing=True)


class Found(NamedTuple):
    """What was meta-learned, and the operations that are left; all if None, and for a fixed network."""

    theta: jm.Theta
    space: Any = None


def supernet(work: Work, space: Any = None) -> jm.Model:
    """The search space of all runs here, or what is left of it."""
    sizes: Any = {"cells": work.cells, "channels": work.channels, "reductions": work.reductions}
    return jm.supernet(work.ways, shape=work.shape, space=space, **sizes)


def network(name: str, work: Work, width: int) -> jm.Model:
    """A fixed one: conv4, or of a genotype, published or in a file."""
    if name == "conv4":
        return jm.conv4(work.ways, filters=width, shape=work.shape, pool=True)
    genotype = jm.PUBLISHED[name] if name in PUBLISHED.values() else jm.load_genotype(name)
    return jm.derive(genotype, work.ways, cells=work.cells, channels=width, reductions=work.reductions, shape=work.shape)


def width_of(name: str, work: Work, parameters: float) -> int:
    """The width at which a fixed network has about so many parameters."""

    def size(width: int) -> int:
        shapes = jax.eval_shape(network(name, work, width).init, jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    return min(range(4, 129, 2), key=lambda width: abs(size(width) - parameters))


def tested(name: str, work: Work, rate: float, width: int, space: Any) -> jm.MetaLearner:
    """The learner that a network is tested with."""
    return searched(supernet(work, space), rate) if name == "metanas" else fixed(network(name, work, width), rate, True)


def train(name: str, problem: Problem, work: Work, rate: float, width: int, seed: int, folder: Path) -> Found:
    """Meta-trains, or goes on, or takes what is there."""
    if name == "metanas":
        return search(problem, work, rate, seed, folder)
    outer = optax.sgd(optax.linear_schedule(META_RATE, 0.0, work.steps))
    cells = json.loads(Path(name).read_text()) if name.endswith(".json") else name
    about = {"network": cells, "rate": rate, "width": width, "seed": seed, **settings(work, name)}
    learner = fixed(network(name, work, width), rate, False)
    return Found(fitted(training_key(seed), problem, work, learner, outer, work.steps, folder, about))


def search(problem: Problem, work: Work, rate: float, seed: int, folder: Path) -> Found:
    """Meta-trains the weights, then alphas and weights in parts, between which operations are cut for good."""
    half, space = work.steps // 2, None
    ends = [0, half, *(half + (work.steps - half) * part // work.parts for part in range(1, work.parts + 1))]

    def on(part: int, learner: jm.MetaLearner, theta: jm.Theta | None) -> jm.Theta:
        about = {"network": "metanas", "rate": rate, "seed": seed, "part": part, **settings(work)}
        start, end = ends[part : part + 2]
        outer, own = outer_from(start, work.steps, ends[-min(3, len(ends) - 1)]), folder / f"part{part}"
        key = jax.random.fold_in(training_key(seed), part) if part else training_key(seed)
        return fitted(
            key,
            problem,
            work,
            jm.watched(learner, alphas),
            outer,
            end - start,
            own,
            about,
            theta,
        )

    theta = on(0, searching(supernet(work), rate, 0, INNER_STEPS, TRAIN_THRESHOLD, testing=False), None)
    for part in range(1, work.parts + 1):
        before = space
        if part > 1:
            space = jm.promising(theta.params, threshold=TRAIN_THRESHOLD, temperature=COLDEST)
        learner = searching(supernet(work, space), rate, INNER_STEPS // 2, 0, TRAIN_THRESHOLD, testing=False)
        theta = on(part, learner, theta if space is None else jm.shrink(theta, learner, space, before=before))
    together(folder, ends)
    return Found(theta, space)


def outer_from(start: int, steps: int, fall: int) -> optax.GradientTransformation:
    """The outer optimiser of a supernet from one meta-step on; the alphas' rate falls from another on."""
    rates = {
        "w": optax.linear_schedule(META_RATE, 0.0, steps),
        "alpha": optax.linear_schedule(ALPHA_RATE, 0.0, steps - fall, fall),
    }
    parts: Any = {name: optax.sgd(lambda count, rate=rate: rate(count + start)) for name, rate in rates.items()}
    return jm.on_params(optax.partition(parts, jm.top_level))


def together(folder: Path, starts: list[int]) -> None:
    """The metrics of all parts of a search as one file."""
    rows = []
    for part, start in enumerate(starts[:-1]):
        own = [json.loads(line) for line in (folder / f"part{part}" / "metrics.jsonl").read_text().splitlines()]
        rows += [{**row, "step": row["step"] + start} for row in own]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def training_key(seed: int) -> jax.Array:
    """From which a training follows."""
    return jax.random.fold_in(jax.random.key(seed), TRAIN_KEY)


def fitted(
    key: jax.Array,
    problem: Problem,
    work: Work,
    learner: jm.MetaLearner,
    outer: optax.GradientTransformation,
    steps: int,
    folder: Path,
    about: dict[str, Any],
    theta: jm.Theta | None = None,
) -> jm.Theta:
    """One run, or a part of one."""
    return jm.fit(
        key,
        learner,
        problem.train,
        outer,
        steps,
        work.batch,
        theta=theta,
        mesh=jm.task_mesh(share(work.batch, jax.device_count())),
        workdir=folder,
        resume=True,
        config=about,
        save_every=250,
        log_every=50,
    ).theta


def settings(work: Work, kind: str = "metanas") -> dict[str, Any]:
    """All that runs of one comparison share; for fixed networks without what is told of alphas."""
    names = ("TRAIN_SHOTS", "INNER_STEPS", "INNER_BATCH", "TEST_STEPS", "META_RATE", "SPLIT_SEED")
    if kind == "metanas":
        names += ("ALPHA_TIMES", "ALPHA_RATE", "DECAY", "COLDEST", "TRAIN_THRESHOLD", "TEST_THRESHOLD")
    own = {**dataclasses.asdict(work), "reductions": list(work.reductions)}
    if kind == "metanas":
        own["parts"] = work.parts
    return {**own, **{name.lower(): globals()[name] for name in names}}


def begun(path: Path, more: dict[str, Any]) -> dict[str, Any]:
    """A result to go on with, or a new one; one of other settings ends the program."""
    found = json.loads(path.read_text()) if path.exists() else {"machine": machine(), **more}
    other = [name for name in more if found.get(name) != more[name]]
    if other:
        raise SystemExit(f"{path} was made with another {', '.join(other)}; move it away, and take other --runs.")
    return found


def scored(learner: jm.MetaLearner, theta: jm.Theta, tasks: jm.Tasks, episodes: int, seed: int, key: int = TEST_KEY) -> jm.Score:
    """Its accuracy on validation or test classes."""
    key_draw = jax.random.fold_in(jax.random.key(seed), key)
    return jm.fewshot(key_draw, learner, theta, tasks, episodes, every_step=False, mesh=jm.task_mesh())


def adaptation(learner: jm.MetaLearner, problem: Problem, theta: jm.Theta) -> Callable[[], Any]:
    """Adapts to one task when called, in a program that has been compiled."""
    key = jax.random.key(0)
    adapt, support = jax.jit(learner.adapt), problem.test.draw(key).support
    jax.block_until_ready(adapt(key, theta, support))
    return lambda: adapt(key, theta, support)


def choose(work: Work, asked: argparse.Namespace) -> None:
    """Scores inner rates of each kind of network by validation classes, after short training with a seed of its own."""
    short = dataclasses.replace(work, steps=CHOICE_STEPS)
    problem = make_problem(short)
    for kind in asked.kinds:
        path, found = rates_of(work, kind)
        name, width = kinds(work)[kind], CHOICE_WIDTHS.get(kind, work.channels)
        for rate in [each for each in RATES if f"{each:g}" not in found["rates"]]:
            own = train(name, problem, short, rate, width, CHOICE_SEED, asked.runs / f"choice-{short}" / f"{name}-{rate:g}")
            learner = tested(name, short, rate, width, own.space)
            result = scored(learner, own.theta, problem.valid, CHOICE_EPISODES, CHOICE_SEED, VALID_KEY)
            found["rates"][f"{rate:g}"] = [result.mean, result.interval]
            write_json(path, found)
            print(f"{name}, inner rate {rate:g}: {result}", flush=True)


def kinds(work: Work) -> dict[str, str]:
    """The networks that rates are chosen for."""
    return {"metanas": "metanas", "conv4": "conv4", "published": work.published}


def rates_of(work: Work, kind: str) -> tuple[Path, dict[str, Any]]:
    """Where scores of inner rates are kept, and those that are there."""
    path, short = RESULTS / f"{work.name}-c{work.channels}-rates-{kind}.json", dataclasses.replace(work, steps=CHOICE_STEPS)
    found = begun(path, {"settings": settings(short, kind), "episodes": CHOICE_EPISODES, "seed": CHOICE_SEED})
    return path, {"rates": {}, **found}


def chosen(work: Work) -> Callable[[str], float]:
    """The inner rate of a network; derived ones have that of the published one."""
    found = {kind: rates_of(work, kind)[1]["rates"] for kind in kinds(work)}
    missing = [kind for kind, own in found.items() if len(own) < len(RATES)]
    if missing:
        raise SystemExit(f"the inner rates of {', '.join(missing)} are not chosen yet; run --choose first.")
    best = {kind: float(max(own, key=lambda rate: own[rate][0])) for kind, own in found.items()}
    return lambda name: best.get(name, best["published"])


def prunings(problem: Problem, work: Work, own: Found, learner: jm.MetaLearner, episodes: int, seed: int) -> Any:
    """Of the same adapted parameters: accuracy unpruned, pruned and pruned at random, sizes, and how far the alphas went.

    Also the accuracy of each episode, pruned, which for the learner of the tests is MetaNAS'; episodes are those of `scored`. What
    was cut for good in training is cut from all three, and "all" counts the weights of a supernet from which nothing was.
    """
    theta, net = own.theta, supernet(work, own.space)

    @jax.jit
    def one(key, theta, data):
        key_task, key_learn = jax.random.split(key)
        task = problem.test.sample(key_task, data)
        params = learner.adapt(key_learn, theta, task.support).params
        whole, pruned = (mixture(params["alpha"], COLDEST, threshold) for threshold in (0.0, TEST_THRESHOLD))
        by_chance = at_random(jax.random.fold_in(key, PRUNE_KEY), operation_sizes(params, space=own.space), whole, pruned)
        outputs = (net.apply({**params, "mixture": each}, task.query.x) for each in (whole, pruned, by_chance))
        size = jm.sparse_size(params, temperature=COLDEST, threshold=TEST_THRESHOLD, space=own.space)
        return jnp.stack([jm.accuracy(y, task.query.y) for y in outputs]), size, far(theta.params["alpha"], params["alpha"])

    key = jax.random.fold_in(jax.random.key(seed), TEST_KEY)
    rows = [jax.device_get(one(jax.random.fold_in(key, number), theta, problem.test.data)) for number in range(episodes)]
    scores, sizes = (np.array([row[column] for row in rows]) for column in range(2))
    spread = {"mean": float(sizes.mean()), "least": int(sizes.min()), "most": int(sizes.max())}
    moves = {name: [float(row[2][name]) for row in rows] for name in rows[0][2]}
    names = ("unpruned", "pruned", "at random")
    found = {
        **{name: interval(column) for name, column in zip(names, scores.T, strict=True)},
        "pruned - unpruned": interval(scores[:, 1] - scores[:, 0]),
        "pruned - at random": interval(scores[:, 1] - scores[:, 2]),
        "parameters": {"all": weights(supernet(work)), "left": weights(net), **spread},
        "moved within a task": {name: [statistics.mean(own), min(own), max(own)] for name, own in moves.items()},
        "episodes": episodes,
    }
    return found, scores[:, 1]


def weights(net: jm.Model) -> int:
    """How many a supernet has."""
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0))["w"]))


def far(start: Any, end: Any) -> dict[str, jax.Array]:
    """How far alphas are apart.

    The weights of operations and of pairs of inputs at the coldest temperature, summed, 2 at most, mean over edges and over nodes
    with a choice; the logits, mean over what was not cut; and the share of edges whose largest operation is another.
    """
    before, after = nodes(start), nodes(end)
    free = {"ops": list(zip(before, after, strict=True))}
    free["pairs"] = [both for both in free["ops"] if both[0]["pairs"].size > 1]

    def gap(name: str) -> jax.Array:
        softmax = [[jax.nn.softmax(node[name] / COLDEST) for node in both] for both in free[name]]
        return jnp.concatenate([jnp.abs(a - b).sum(-1).ravel() for a, b in softmax]).mean()

    both = [(a[name].ravel(), b[name].ravel()) for name, own in free.items() for a, b in own]
    logits = jnp.concatenate([jnp.where(b > GONE / 2, jnp.abs(a - b), jnp.nan) for a, b in both])
    changed = [(a["ops"].argmax(-1) != b["ops"].argmax(-1)).ravel() for a, b in free["ops"]]
    return {
        "operations": gap("ops"),
        "pairs": gap("pairs"),
        "logits": jnp.nanmean(logits),
        "edges with another operation": jnp.concatenate(changed).mean(),
    }


def decided(alpha: Any) -> dict[str, float]:
    """How much is settled: the shares of edges that one operation has more than half of, and of operations below the threshold."""
    weights = jnp.concatenate([jax.nn.softmax(node["ops"] / COLDEST) for node in nodes(alpha)])
    return {"above half": float((weights.max(-1) > 0.5).mean()), "below the threshold": float((weights < TEST_THRESHOLD).mean())}


def for_good(problem: Problem, work: Work, own: Found, rate: float) -> dict[str, Any]:
    """What it saves a task that operations were cut for good: sizes, work and time of both supernets."""
    task, both = problem.test.draw(jax.random.key(0)), {"whole": None, "cut": own.space}
    learners = {name: searched(supernet(work, space), rate) for name, space in both.items()}
    starts = {"whole": learners["whole"].init(jax.random.key(0)), "cut": own.theta}
    seconds = alternately([adaptation(learner, problem, starts[name]) for name, learner in learners.items()])
    return {
        name: {
            "parameters": weights(supernet(work, both[name])),
            "operations": operations(lambda at, learner=learner: learner.adapt(jax.random.key(0), at, task.support), starts[name]),
            "adaptation_seconds": each,
        }
        for (name, learner), each in zip(learners.items(), seconds, strict=True)
    }


def nodes(mixed: dict[str, Any]) -> list[dict[str, jax.Array]]:
    """Those of both kinds."""
    return [node for kind in ("normal", "reduce") for node in mixed[kind].values()]


def at_random(key: jax.Array, sizes: Any, whole: Any, pruned: Any) -> dict[str, Any]:
    """The unpruned mixture of operations drawn by lot until they have as many weights as pruning leaves.

    Inputs are those that pruning leaves, with their weights; operations without weights all stay. `sizes` are those of operations.
    """
    counts = [jnp.asarray(kind[node, : node + 2]) for kind in sizes.values() for node in range(len(kind))]
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


def pictures(problem: Problem, work: Work, own: Found, rate: float, seed: int, folder: Path, path: Path) -> dict[str, Any]:
    """Draws the cells of the meta-model and of two tasks and the alphas over meta-training; says how far these went."""
    theta, learner = own.theta, searched(supernet(work, own.space), rate)
    found, keys = {"meta-model": theta.params}, jax.random.split(jax.random.fold_in(jax.random.key(seed), PRUNE_KEY), (2, 2))
    for number, (key_draw, key_learn) in enumerate(keys, 1):
        found[f"task {number}"] = jax.jit(learner.adapt)(key_learn, theta, problem.test.draw(key_draw).support).params
    genotypes = {name: jm.genotype(params)._asdict() for name, params in found.items()}
    plot.cells({name: weighed(params, COLDEST) for name, params in found.items()}, path.with_name(f"{path.stem}-cells.png"))
    plot.shares(folder / "metrics.jsonl", path.with_name(f"{path.stem}-alphas.png"), COLDEST)
    start = searched(supernet(work), rate).init(training_key(seed))
    moved = {name: float(each) for name, each in far(start.params["alpha"], theta.params["alpha"]).items()}
    settled = {name: decided(params["alpha"]) for name, params in {"start": start.params, **found}.items()}
    return {"genotypes": genotypes, "moved over meta-training": moved, "decided": settled}


def compare(work: Work, seed: int, asked: argparse.Namespace) -> None:
    """Trains all, tests all, and writes what was found after each."""
    path, rate_of = RESULTS / f"{work}-seed{seed}.json", chosen(work)
    rates = {kind: rate_of(kind) for kind in kinds(work)}
    found = begun(path, {"settings": settings(work), "seed": seed, "rates": rates, "norm": "batch", "episodes": EPISODES})
    problem, runs, rate = make_problem(work), asked.runs / f"{work}-seed{seed}", rate_of("metanas")
    searched_for = train("metanas", problem, work, rate, work.channels, seed, runs / "metanas")
    if "pruning" not in found:
        learner = tested("metanas", work, rate, 0, searched_for.space)
        found["pruning"], each = prunings(problem, work, searched_for, learner, EPISODES, seed)
        np.save(runs / "metanas-test.npy", each)
        found |= pictures(problem, work, searched_for, rate, seed, runs / "metanas", path)
        write_json(path, found)
        print({name: found[name] for name in ("pruning", "moved over meta-training", "decided")}, flush=True)
    cells = runs / "genotype.json"
    if not cells.exists():
        jm.save_genotype(cells, jm.genotype(searched_for.theta.params))
    names = {"metanas": "metanas", "conv4": "conv4", work.published: work.published, "genotype": str(cells)}
    timed, found["networks"] = [], found.get("networks", {})
    for label, name in names.items():
        width = work.channels if name == "metanas" else width_of(name, work, found["pruning"]["parameters"]["mean"])
        trained = train(name, problem, work, rate_of(name), width, seed, runs / label)
        learner = tested(name, work, rate_of(name), width, trained.space)
        timed.append((label, learner, trained.theta))
        if not (runs / f"{label}-test.npy").exists():
            np.save(runs / f"{label}-test.npy", scored(learner, trained.theta, problem.test, EPISODES, seed).each)
        test = interval(np.load(runs / f"{label}-test.npy"))
        size = sum(leaf.size for leaf in jax.tree.leaves(trained.theta.params.get("w", trained.theta.params)))
        found["networks"][label] = {"inner_rate": rate_of(name), "width": width, "parameters": size, "test": test}
        write_json(path, found)
        print(f"{work}, seed {seed}, {label}: {test[0]:.4f} ± {test[1]:.4f}", flush=True)
        jax.clear_caches()  # many compiled programs come to more memory maps than a process may have
    conclude(work, found, {label: np.load(runs / f"{label}-test.npy") for label in names})
    seconds = alternately([adaptation(learner, problem, theta) for _, learner, theta in timed])
    for (label, *_), each in zip(timed, seconds, strict=True):
        found["networks"][label]["adaptation_seconds"] = each
    found["cut for good"] = for_good(problem, work, searched_for, rate)
    write_json(path, found)
    print(found["gain"], found["claims"], found["void"], flush=True)
    if "pruned afterwards" not in found:
        unaware = searched(supernet(work, searched_for.space), rate, threshold=0.0)
        found["pruned afterwards"], _ = prunings(problem, work, searched_for, unaware, EPISODES // 2, seed)
        write_json(path, found)


def conclude(work: Work, found: dict[str, Any], each: dict[str, np.ndarray]) -> None:
    """Adds what MetaNAS gains over the fixed networks, and whether it counts."""
    found["gain"] = {label: interval(each["metanas"] - each[label]) for label in each if label != "metanas"}
    own = found["pruning"]
    found["claims"] = {
        "a task uses at most half": own["parameters"]["mean"] <= 0.5 * own["parameters"]["all"],
        "at most a point is lost": own["pruned - unpruned"][0] >= -0.01,
        "better than at random": own["pruned - at random"][0] > own["pruned - at random"][1],
    }
    conv4 = found["networks"]["conv4"]["test"][0]
    reasons = {
        f"conv4 has {conv4:.3f}, below {LEAST}": work.name == "omniglot-5w1s" and conv4 < LEAST,
        f"fewer than {LEAST_STEPS} meta-steps": work.steps < LEAST_STEPS,
        f"fewer than {LEAST_CHANNELS} channels": work.channels < LEAST_CHANNELS,
    }
    found["void"] = [reason for reason, holds in reasons.items() if holds]


def main() -> None:
    """One data set, some seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["omniglot-5w1s", "omniglot-20w1s", "caltech-5w1s", "caltech84-5w1s"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=5000, help="meta-steps, of which the first half leaves the alphas")
    parser.add_argument("--batch", type=int, default=3, help="tasks of a meta-step")
    parser.add_argument("--channels", type=int, default=8, help="of the supernet")
    parser.add_argument("--cells", type=int, default=4)
    parser.add_argument("--reductions", type=int, nargs="*", default=[0, 1], help="numbers of the cells that halve the map")
    parser.add_argument("--choose", action="store_true", help="score inner rates, which the other calls then take")
    every = ["metanas", "conv4", "published"]
    parser.add_argument("--kinds", nargs="+", default=every, choices=every, help="networks to choose rates for")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "metanas")
    asked = parser.parse_args()
    if asked.name.startswith("caltech") and caltech() is None:
        parser.error(f"{asked.name} needs {CALTECH} in the folder that JMETA_DATA_DIR names")
    jm.use_cores()
    jm.use_cache()
    RESULTS.mkdir(parents=True, exist_ok=True)
    work = Work(asked.name, asked.cells, asked.channels, tuple(asked.reductions), asked.steps, asked.batch)
    if asked.choose:
        return choose(work, asked)
    for seed in asked.seeds:
        compare(work, seed, asked)


if __name__ == "__main__":
    main()
