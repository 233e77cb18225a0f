"""Presets: a frozen configuration for each row of the results, and how a configuration becomes a learner and its tasks.

References:
  Finn, Abbeel, Levine, Model-Agnostic Meta-Learning, ICML 2017 (https://arxiv.org/abs/1703.03400), appendix A: ways, shots, inner
  and outer steps, meta-batches and networks of the `maml-omniglot` and `maml-sinusoid` presets.
  Cai et al., Neural Routing in Meta Learning, 2022 (https://arxiv.org/abs/2210.07932): the method of the `nrml-omniglot` presets,
  with 5 inner steps, since a choice of channels depends on the task from the second step on.
  Nichol, Achiam, Schulman, On First-Order Meta-Learning Algorithms, 2018 (https://arxiv.org/abs/1803.02999): the
  `reptile-omniglot` presets.
  Elsken, Staffler, Metzen, Hutter, Meta-Learning of Neural Architectures for Few-Shot Learning, CVPR 2020
  (https://arxiv.org/abs/1911.11090): `metanas-omniglot-20w1s`; the other `metanas` presets are smaller.

Differs from the paper in: inner rates are for a mean loss (see `jmeta.xent`); 5 queries a class in training and 15 in tests; tests
on unrotated classes; the outer rate of the sine waves falls along a cosine.
"""

import dataclasses
import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from jmeta import losses
from jmeta.architecture import PRIMITIVES, PUBLISHED, Genotype, load_genotype, mixture, read_genotype
from jmeta.core import Data, MetaLearner, Model, Tasks, Theta, chain, memoise
from jmeta.learners.combine import switch, watched
from jmeta.learners.maml import anil, boil, maml
from jmeta.learners.reptile import reptile
from jmeta.models.adapters import mixed
from jmeta.models.backbones import conv4, mlp
from jmeta.models.cells import CellNorm
from jmeta.models.layers import Norm
from jmeta.models.supernet import derive, supernet
from jmeta.rules.architecture import anneal, mix
from jmeta.rules.outer import on_params, top_level
from jmeta.rules.patterns import Pattern, is_traced, pattern
from jmeta.rules.route import route
from jmeta.rules.scale import lambda_mask, learned_rates, sparse
from jmeta.tasks.episodes import episodes
from jmeta.tasks.feeds import minibatches, repeat
from jmeta.tasks.glyphs import glyphs
from jmeta.tasks.images import Images, Splits
from jmeta.tasks.omniglot import omniglot
from jmeta.tasks.sinusoid import sinusoid

IMAGE_SIZE = 28
HOTTEST, COLDEST = 1.0, 0.1  # temperatures of a supernet's mixture, and, below, its soft pruning and decay, as in the paper's code
TRAIN_THRESHOLD, TEST_THRESHOLD = 0.01, 0.05
ALPHA_DECAY = 1e-3


@dataclasses.dataclass(frozen=True)
class Config:
    """All that a run of the command line depends on: names and numbers alone."""

    method: Literal["maml", "fomaml", "anil", "boil", "meta-sgd", "sparse", "nrml", "reptile", "metanas"] = "maml"
    """How tasks are learned."""
    dataset: Literal["glyphs", "omniglot", "sinusoid"] = "glyphs"
    """What is learned; glyphs are rendered, Omniglot is read or downloaded."""
    source: str | None = None
    """Where Omniglot lies (.npz, a folder of tensorflow-datasets, or of the archives); looked up or downloaded if not given."""
    split: Literal["customary", "background"] = "customary"
    """Omniglot's classes: 1100/100/423 of all in a seeded order, or 964 background and 659 evaluation classes."""
    rotate: bool = True
    """Whether Omniglot's training classes rotated by 90, 180 and 270 degrees count as classes of their own."""
    ways: int = 5
    """Classes of an episode."""
    shots: int = 1
    """Support images of a class (points of a sine wave)."""
    train_shots: int | None = None
    """The same in training, if other than in validation and tests."""
    queries: int = 5
    """Query images of a class in training (points of a sine wave)."""
    test_queries: int = 15
    """The same in validation and tests."""
    filters: int = 64
    """Channels of each convolution, or of each node of a cell."""
    genotype: str | None = None
    """Cells to train instead of conv4's blocks: a file of `jmeta derive`, a published genotype's name, or a genotype as JSON."""
    cells: int = 4
    """Cells of metanas, or of the genotype's network."""
    reductions: tuple[int, ...] | None = None
    """Numbers, from 0, of the cells that halve the map; 1 and 3 if not given."""
    norm: Norm = "batch"
    """Normalisation; with batch, queries are predicted together (transductive)."""
    pattern: str = "full"
    """Layers that adapt at each inner step, such as "suffix(2)*2, head" (the last two layers twice, then the last one)."""
    keep: float = 0.5
    """Share of each layer's channels that nrml chooses for a task."""
    routing: Literal["update", "forward"] = "update"
    """Whether nrml trains the filters of the chosen channels alone, or silences the others."""
    inner_rate: float = 0.4
    """Rate of the inner steps (their start, for meta-sgd), for a mean loss."""
    inner_steps: int = 1
    """Inner steps in training."""
    test_steps: int = 3
    """Inner steps in validation and tests; metanas adapts its alphas in half of these, but in all of training's."""
    inner_batch: int | None = None
    """Support images of an inner step in training; all if not given."""
    test_batch: int | None = None
    """The same in validation and tests."""
    outer_rate: float = 1e-3
    """Adam's rate; for reptile and metanas, the part of the way to the adapted parameters."""
    alpha_rate: float = 0.6
    """The part of the way to the adapted alphas, for metanas."""
    outer_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Whether the outer rate stays or falls to 0 over all steps."""
    warmup: int = 0
    """Meta-steps of metanas that leave the alphas as they are."""
    steps: int = 500
    """Meta-steps."""
    batch: int = 32
    """Tasks of a meta-step."""
    chunk: int | None = None
    """Tasks vmapped together; chosen by device and network if not given, by measurement in long runs."""
    unroll: bool | None = None
    """Whether the inner steps of training are unrolled; if not given up to 10 are, in long runs as measured."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network's products; bfloat16 is for GPUs and TPUs."""
    validate_every: int = 250
    """Meta-steps between two validations, where the data has validation classes; 0 for none."""
    validate_episodes: int = 200
    """Episodes of a validation."""
    test_episodes: int = 600
    """Episodes of the final test."""
    seed: int = 0
    """Seed of the initial parameters, the tasks and the splits."""
    save_every: int = 500
    """Meta-steps between two checkpoints."""


_GLYPHS = Config()
_OMNIGLOT = Config(dataset="omniglot", steps=60_000, validate_every=2_000, save_every=1_000)
_TWENTY = dataclasses.replace(_OMNIGLOT, ways=20, batch=16, inner_steps=5, test_steps=5)
_SINE = Config(
    dataset="sinusoid",
    shots=10,
    queries=10,
    test_queries=10,
    inner_rate=0.01,
    test_steps=10,
    outer_schedule="cosine",
    steps=70_000,
    batch=25,
    validate_every=0,
)

_REPTILE = dataclasses.replace(
    _OMNIGLOT,
    method="reptile",
    train_shots=10,
    inner_rate=1e-3,
    inner_steps=5,
    inner_batch=10,
    test_steps=50,
    outer_rate=1.0,
    outer_schedule="linear",
    steps=100_000,
    batch=5,
)
_METANAS = dataclasses.replace(
    _REPTILE,
    method="metanas",
    filters=28,
    train_shots=15,
    inner_rate=5e-3,
    inner_batch=20,
    test_steps=100,
    outer_schedule="constant",
    steps=30_000,
    batch=10,
    warmup=15_000,
    unroll=False,
    validate_every=0,
)

PRESETS: dict[str, Config] = {
    "maml-glyphs-5w1s": _GLYPHS,
    "maml-omniglot-5w1s": _OMNIGLOT,
    "maml-omniglot-5w5s": dataclasses.replace(_OMNIGLOT, shots=5),
    "maml-omniglot-20w1s": _TWENTY,
    "maml-omniglot-20w5s": dataclasses.replace(_TWENTY, shots=5),
    "fomaml-omniglot-5w1s": dataclasses.replace(_OMNIGLOT, method="fomaml"),
    "anil-omniglot-5w1s": dataclasses.replace(_OMNIGLOT, method="anil"),
    "boil-omniglot-5w1s": dataclasses.replace(_OMNIGLOT, method="boil"),
    "meta-sgd-omniglot-5w1s": dataclasses.replace(_OMNIGLOT, method="meta-sgd"),
    "sparse-omniglot-5w1s": dataclasses.replace(_OMNIGLOT, method="sparse"),
    "nrml-omniglot-5w1s": dataclasses.replace(_OMNIGLOT, method="nrml", inner_steps=5, test_steps=5),
    "nrml-omniglot-20w1s": dataclasses.replace(_TWENTY, method="nrml"),
    "reptile-omniglot-5w1s": _REPTILE,
    "reptile-omniglot-5w5s": dataclasses.replace(_REPTILE, shots=5),
    "reptile-omniglot-20w1s": dataclasses.replace(
        _REPTILE, ways=20, inner_steps=10, inner_batch=20, test_batch=10, inner_rate=5e-4, steps=200_000
    ),
    "metanas-omniglot-20w1s": dataclasses.replace(_METANAS, ways=20, test_batch=10),
    "metanas-omniglot-5w1s": dataclasses.replace(
        _METANAS, filters=8, reductions=(0, 2), inner_batch=10, test_steps=20, steps=3_000, batch=2, warmup=1_500
    ),
    "metanas-glyphs-5w1s": dataclasses.replace(
        _METANAS,
        dataset="glyphs",
        filters=4,
        cells=2,
        reductions=(0, 1),
        inner_batch=10,
        test_steps=20,
        steps=1_000,
        batch=2,
        warmup=500,
        save_every=500,
    ),
    "maml-sinusoid-10s": _SINE,
    "maml-sinusoid-5s": dataclasses.replace(_SINE, shots=5, queries=5, test_queries=5),
}
DEFAULT = "maml-glyphs-5w1s"


def preset(name: str) -> Config:
    """The configuration of that name.

    Raises:
      ValueError: there is none; the nearest name is given.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
    raise ValueError(f"preset: {name!r} is not known; the nearest is {near!r}. `jmeta presets` lists all.")


@memoise
def make_model(config: Config) -> Model:
    """The network of a configuration: an MLP of 40-40 for sine waves; conv4, a supernet or the cells of a genotype for images."""
    shape = (IMAGE_SIZE, IMAGE_SIZE, 1)
    if config.dataset == "sinusoid":
        model = mlp(1, norm="none")
    elif config.method == "metanas" or config.genotype is not None:
        if config.norm not in get_args(CellNorm):
            raise ValueError(
                f"train: norm must be one of {', '.join(get_args(CellNorm))} for networks of cells, got {config.norm!r}."
            )
        sizes: Any = {"cells": config.cells, "channels": config.filters, "reductions": config.reductions, "norm": config.norm}
        if config.genotype is None:
            model = supernet(config.ways, shape=shape, **sizes)
        else:
            model = derive(find_genotype(config.genotype), config.ways, shape=shape, **sizes)
    else:
        model = conv4(config.ways, filters=config.filters, shape=shape, norm=config.norm)
    return model if config.precision == "float32" else mixed(model, config.precision)


def make_outer(config: Config) -> optax.GradientTransformation:
    """Adam, with the rate of a configuration; for reptile and metanas plain steps."""

    def rate(start: float) -> Any:
        steps = max(config.steps, 1)
        falling = {"linear": optax.linear_schedule(start, 0.0, steps), "cosine": optax.cosine_decay_schedule(start, steps)}
        return falling.get(config.outer_schedule, start)

    if config.method == "metanas":
        parts = {"w": optax.sgd(rate(config.outer_rate)), "alpha": optax.sgd(rate(config.alpha_rate))}
        return on_params(optax.partition(parts, top_level))
    return (optax.sgd if config.method == "reptile" else optax.adam)(rate(config.outer_rate))


@memoise
def make_learner(config: Config, steps: int | None = None) -> MetaLearner:
    """The learner of a configuration, with other inner steps if given."""
    masked = None if config.pattern == "full" else pattern(make_model(config), config.pattern)
    return make_masked(config, steps, masked)


def maskable(config: Config) -> Config:
    """The same with a method that any pattern can be given to: ANIL and BOIL are MAML with a pattern of their own."""
    return dataclasses.replace(config, method="maml") if config.method in ("anil", "boil") else config


def make_masked(config: Config, steps: int | None, masked: Pattern | None) -> MetaLearner:
    """The learner of a configuration, with a pattern instead of its own; None adapts all layers.

    Raises:
      ValueError: the method is a pattern itself.
    """
    if config.method == "metanas":
        return _make_metanas(config, steps, masked)
    model, data = make_model(config), _seen(config, steps)
    if masked is not None and data.steps and not is_traced(masked.rows) and not any(map(any, masked.rows[: data.steps])):
        raise ValueError(f"pattern: {masked} updates nothing within {data.steps} inner steps, so no task would be learned.")
    if masked is not None and config.method in ("anil", "boil"):
        raise ValueError(f"pattern: method {config.method} is a pattern itself; use method maml with pattern head or body.")
    unroll = config.unroll if steps is None else None
    loss = losses.mse if config.dataset == "sinusoid" else losses.xent
    rule: Any = optax.sgd(config.inner_rate)
    others: dict[str, Callable[[], Any]] = {
        "meta-sgd": lambda: learned_rates(config.inner_rate),
        "sparse": lambda: chain(rule, sparse()),
        "nrml": lambda: chain(route(config.keep, where=config.routing), rule),
        "reptile": lambda: optax.adam(config.inner_rate, b1=0.0),
    }
    rule = others.get(config.method, lambda: rule)()
    rule = rule if masked is None else lambda_mask(masked, rule)
    if config.method == "reptile":
        return reptile(model, loss, rule, data, unroll=unroll, carry_state=True)
    make = {"anil": anil, "boil": boil}.get(config.method, maml)
    order = 1 if config.method == "fomaml" else 2
    return make(model, loss, rule, data, order=order, unroll=unroll)


def _seen(config: Config, steps: int | None) -> Data:
    """What the inner loop sees in training, or in tests of so many steps."""
    count, size = (config.inner_steps, config.inner_batch) if steps is None else (steps, config.test_batch)
    return repeat(count) if size is None else minibatches(count, size)


def _make_metanas(config: Config, steps: int | None, masked: Pattern | None) -> MetaLearner:
    """Reptile of a supernet; in training alphas and weights take turns after the warm-up, in tests in half of the steps.

    Raises:
      ValueError: a pattern or a genotype is given.
    """
    if masked is not None:
        raise ValueError("pattern: method metanas is a pattern itself, in which alphas and weights take turns.")
    if config.genotype is not None:
        raise ValueError("genotype: method metanas searches for one; train a genotype's network by method maml or reptile.")
    model = make_model(config)
    parts = {
        "w": optax.adam(config.inner_rate, b1=0.0),
        "alpha": optax.chain(optax.add_decayed_weights(ALPHA_DECAY), optax.adam(config.inner_rate, b1=0.0)),
    }

    def learner(turns: int, alone: int, threshold: float, coldest: float) -> MetaLearner:
        rows = ((1, 0), (0, 1)) * turns + ((0, 1),) * alone
        turn = lambda_mask(rows, optax.partition(parts, top_level), labels=("alpha", "w"))
        mixture = mix(anneal(HOTTEST, coldest, max(turns, 1), every=2), threshold=threshold)
        data = _seen(dataclasses.replace(config, inner_steps=len(rows)), None if steps is None else len(rows))
        return reptile(model, losses.xent, chain(mixture, turn), data, unroll=config.unroll, carry_state=True)

    if steps is not None:
        return learner(steps // 2, steps - steps // 2, TEST_THRESHOLD, COLDEST)
    searching = learner(config.inner_steps, 0, TRAIN_THRESHOLD, COLDEST)
    both = switch(learner(0, config.inner_steps, TRAIN_THRESHOLD, HOTTEST), searching, at=(config.warmup,))
    return watched(both if config.warmup else searching, shares)


def shares(theta: Theta) -> dict[str, jax.Array]:
    """What each operation weighs in each kind of cell at the lowest temperature, the mean over its edges, for the log."""
    mixed = mixture(theta.params["alpha"], COLDEST)
    weights = {kind: jnp.concatenate([node["ops"] for node in nodes.values()]).mean(0) for kind, nodes in mixed.items()}
    return {f"{kind}/{op}": own[number] for kind, own in weights.items() for number, op in enumerate(PRIMITIVES)}


def with_genotype(config: Config) -> Config:
    """The config with its genotype as JSON, so that a run needs no file beside it."""
    if config.genotype is None:
        return config
    return dataclasses.replace(config, genotype=json.dumps(find_genotype(config.genotype)._asdict()))


def find_genotype(given: str) -> Genotype:
    """A genotype by the name under which it was published, as JSON, or in a file.

    Raises:
      ValueError: it is none of these.
    """
    if given in PUBLISHED:
        return PUBLISHED[given]
    if given.lstrip().startswith("{"):
        return read_genotype(given, "genotype")
    if not Path(given).is_file():
        raise ValueError(f"genotype: {given!r} is neither a file, nor JSON, nor one of {', '.join(PUBLISHED)}.")
    return load_genotype(given)


def make_splits(config: Config) -> Splits | None:
    """The image classes of a configuration, None for sine waves."""
    if config.dataset == "glyphs":
        return glyphs(size=IMAGE_SIZE, seed=config.seed)
    if config.dataset == "omniglot":
        rotate = None if config.rotate else False
        return omniglot(config.source, split=config.split, rotate=rotate, size=IMAGE_SIZE, seed=config.seed)
    return None


class Problem(NamedTuple):
    """The tasks of a configuration.

    Attributes:
      train, valid, test: tasks of disjoint classes; `valid` is None where there are no classes for it.
      labels: names of the training classes.
      metric: what a test measures, and its name.
    """

    train: Tasks
    valid: Tasks | None
    test: Tasks
    labels: tuple[str, ...]
    metric: Callable[..., jax.Array]
    metric_name: str


def make_problem(config: Config) -> Problem:
    """Loads the data of a configuration and checks that its episodes can be drawn."""
    splits = make_splits(config)
    if splits is None:
        test = sinusoid(config.shots, config.test_queries)
        return Problem(sinusoid(config.shots, config.queries), None, test, (), losses.mse, "mse")

    def draw(images: Images, queries: int, shots: int = config.shots) -> Tasks:
        return episodes(images, config.ways, shots, queries)

    valid = None if splits.valid is None or not config.validate_every else draw(splits.valid, config.test_queries)
    train, test = draw(splits.train, config.queries, config.train_shots or config.shots), draw(splits.test, config.test_queries)
    return Problem(train, valid, test, splits.train.names, losses.accuracy, "accuracy")


def from_dict(stored: Any, where: str | Path) -> Config:
    """The configuration kept with a run.

    Raises:
      ValueError: the run was made from code, with a config of its own.
    """
    names = {field.name for field in dataclasses.fields(Config)}
    if isinstance(stored, dict) and "sequence" in stored:
        raise ValueError(f"run: {where} is one of pre-training; test it by `jmeta eval RUN --protocol continual` or transfer.")
    if not isinstance(stored, dict) or not set(stored) <= names or "method" not in stored:
        raise ValueError(f"run: {where} was not made by `jmeta train`, so its learner is not known; give load(..., learner=).")
    return Config(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})
