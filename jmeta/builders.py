"""What a configuration stands for: its network, its learner, its outer optimiser and its tasks.

References:
  See `jmeta.presets`, and each method's own module.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import optax

from jmeta import losses
from jmeta.architecture import PUBLISHED, Genotype, load_genotype, named, read_genotype
from jmeta.core import Data, MetaLearner, Model, Tasks, Theta, chain, memoise
from jmeta.learners.cavia import cavia, with_context
from jmeta.learners.combine import switch, watched
from jmeta.learners.imaml import imaml
from jmeta.learners.maml import anil, boil, maml
from jmeta.learners.maml_plus_plus import step_norms, step_weights
from jmeta.learners.metric import matching, protonet, ridge
from jmeta.learners.reptile import reptile
from jmeta.learners.snail import snail
from jmeta.models.adapters import mixed
from jmeta.models.backbones import conv4, mlp, resnet12
from jmeta.models.cells import CellNorm
from jmeta.models.snail import snail_net
from jmeta.models.supernet import derive, supernet
from jmeta.presets import PHOTOGRAPHS, SHAPES, Config
from jmeta.rules.architecture import anneal, mix
from jmeta.rules.outer import on_params, top_level
from jmeta.rules.patterns import Pattern, is_traced, pattern
from jmeta.rules.route import route
from jmeta.rules.scale import lambda_mask, learned_rates, sparse
from jmeta.rules.slimming import slimming
from jmeta.tasks.episodes import episodes
from jmeta.tasks.feeds import minibatches, repeat
from jmeta.tasks.glyphs import glyphs
from jmeta.tasks.images import Images, Splits
from jmeta.tasks.omniglot import omniglot
from jmeta.tasks.photographs import photographs
from jmeta.tasks.sinusoid import sinusoid

# Temperatures of a supernet's mixture (the third for drawings alone), its soft pruning and the decay of its alphas, as in the
# paper's code.
HOTTEST, COLDEST, COLDEST_IN_TRAINING = 1.0, 0.1, 0.05
TRAIN_THRESHOLD, TEST_THRESHOLD = 0.01, 0.05
ALPHA_DECAY = 1e-3
COMPARING = ("protonet", "matching", "ridge", "snail")  # methods without inner steps
SNAIL_WIDTHS = (64, 96, 128, 256)  # of its embedding's blocks for photographs
EPOCHS = 100  # of a run of maml++, whose losses after early steps count in the first ten or fifteen


@memoise
def make_model(config: Config) -> Model:
    """The network of a configuration.

    An MLP of 40-40 for sine waves; conv4, a supernet or the cells of a genotype for images, for SNAIL on photographs a ResNet.
    """
    shape: Any = SHAPES.get(config.dataset)  # none for sine waves
    pool = config.dataset == "colour84"
    if config.dataset == "sinusoid":
        if config.genotype is not None or config.method in ("metanas", "cavia", *COMPARING):
            raise ValueError(f"train: method {config.method}{' with a genotype' * (config.genotype is not None)} is for images.")
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
    elif config.method == "cavia":
        net = functools.partial(conv4, config.ways, filters=config.filters, pool=pool, norm=config.norm)
        model = with_context(lambda shape: net(shape=(shape[0], shape[1], shape[2])), shape, config.context)
    elif config.method == "snail" and pool:
        model = resnet12(config.filters, widths=SNAIL_WIDTHS, shape=shape, norm=config.norm)
    elif config.method in COMPARING:
        outputs = config.filters if config.method == "snail" else None
        model = conv4(outputs, filters=config.filters, pool=True, shape=shape, norm=config.norm)
    else:
        model = conv4(config.ways, filters=config.filters, pool=pool, shape=shape, norm=config.norm)
    return model if config.precision == "float32" else mixed(model, config.precision)


def make_outer(config: Config) -> optax.GradientTransformation:
    """Adam, with the rate of a configuration, behind its clipping; for reptile and metanas plain steps."""

    def rate(start: float) -> Any:
        steps = max(config.steps, 1)
        falling = {
            "linear": optax.linear_schedule(start, config.least_rate, steps),
            "cosine": optax.cosine_decay_schedule(start, steps, config.least_rate / start if start else 0.0),
        }
        return falling.get(config.outer_schedule, start)

    if config.clip is not None and config.clip <= 0:
        raise ValueError(f"train: clip must be above 0, got {config.clip}; leave it out for no limit.")
    parts: Any = {"w": optax.sgd(rate(config.outer_rate)), "alpha": optax.sgd(rate(config.alpha_rate))}
    if config.method == "metanas":
        outer = on_params(optax.partition(parts, top_level))
    else:
        outer = (optax.sgd if config.method == "reptile" else optax.adam)(rate(config.outer_rate))
    before = [] if config.clip is None else [optax.clip(config.clip)]
    before += [slimming(config.slimming)] if config.slimming else []
    return optax.chain(*before, outer) if before else outer


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
    if config.method in COMPARING:
        return _make_comparing(config, steps, masked)
    model, data = make_model(config), _seen(config, steps)
    if masked is not None and data.steps and not is_traced(masked.rows) and not any(map(any, masked.rows[: data.steps])):
        raise ValueError(f"pattern: {masked} updates nothing within {data.steps} inner steps, so no task would be learned.")
    if masked is not None and config.method in ("anil", "boil", "cavia"):
        raise ValueError(f"pattern: method {config.method} is a pattern itself; use method maml with pattern head or body.")
    unroll = config.unroll if steps is None else None
    loss = losses.mse if config.dataset == "sinusoid" else losses.xent
    rule: Any = optax.sgd(config.inner_rate)
    others: dict[str, Callable[[], Any]] = {
        "meta-sgd": lambda: learned_rates(config.inner_rate),
        "sparse": lambda: chain(rule, sparse()),
        "nrml": lambda: chain(route(config.keep, keep_meta=config.keep_meta, where=config.routing), rule),
        "maml++": lambda: chain(
            step_norms(max(config.inner_steps, 1)), learned_rates(config.inner_rate, per="tensor", steps=max(config.inner_steps, 1))
        ),
        "reptile": lambda: optax.adam(config.inner_rate, b1=0.0),
    }
    rule = others.get(config.method, lambda: rule)()
    rule = rule if masked is None else lambda_mask(masked, rule)
    if config.method == "reptile":  # under a pattern the state would be of other groups of layers
        together = config.transductive or steps is None
        return reptile(model, loss, rule, data, carry_state=masked is None, unroll=unroll, transductive=together)
    if config.method == "imaml":
        return imaml(model, loss, rule, data, strength=config.strength, unroll=unroll)
    if config.method == "maml++":
        return _plus_plus(config, model, loss, rule, data, unroll)
    make = {"anil": anil, "boil": boil, "cavia": cavia}.get(config.method, maml)
    order = 1 if config.method == "fomaml" else 2
    return make(model, loss, rule, data, order=order, unroll=unroll)


def _plus_plus(config: Config, model: Model, loss: Callable, rule: Any, data: Data, unroll: bool | None) -> MetaLearner:
    """MAML++ with a rule that may be masked."""
    _check_warmup(config)
    early = 15 if config.dataset == "colour84" else 10  # epochs, as in the paper's code
    weights = step_weights(data.steps, epochs=early, epoch=max(1, config.steps // EPOCHS)) if data.steps else None
    made = [maml(model, loss, rule, data, order=order, step_weights=weights, unroll=unroll) for order in (1, 2)]
    return switch(*made, at=(config.warmup,)) if config.warmup else made[1]


def _make_comparing(config: Config, steps: int | None, masked: Pattern | None) -> MetaLearner:
    """A learner that has no inner loop, for the classes of training's episodes or of tests'.

    Raises:
      ValueError: inner steps or a pattern are asked for.
    """
    if masked is not None:
        raise ValueError(f"pattern: method {config.method} adapts nothing, so there is nothing to mask.")
    asked = config.inner_steps if steps is None else steps
    if asked:
        raise ValueError(f"train: method {config.method} has no inner steps; inner_steps and test_steps must be 0, got {asked}.")
    model, ways = make_model(config), config.ways if steps is not None else config.train_ways or config.ways
    if config.method == "snail":
        most = config.train_shots or config.shots
        return snail(snail_net(model, config.ways, features=config.filters, most_shots=most))
    return {"protonet": protonet, "matching": matching, "ridge": ridge}[config.method](model, ways=ways)


def _seen(config: Config, steps: int | None) -> Data:
    """What the inner loop sees in training, or in tests of so many steps."""
    count, size = (config.inner_steps, config.inner_batch) if steps is None else (steps, config.test_batch)
    if size is None or (steps is not None and size >= config.ways * config.shots):
        return repeat(count)
    return minibatches(count, size)


def _make_metanas(config: Config, steps: int | None, masked: Pattern | None) -> MetaLearner:
    """Reptile of a supernet; in training alphas and weights take turns after the warm-up, in tests in half of the steps.

    Raises:
      ValueError: a pattern or a genotype is given, there are no inner steps, or the warm-up never ends.
    """
    if (config.inner_steps if steps is None else steps) < 1:
        raise ValueError("train: method metanas needs at least 1 inner step, in training and in tests.")
    _check_warmup(config)
    if masked is not None:
        raise ValueError("pattern: method metanas is a pattern itself, in which alphas and weights take turns.")
    if config.genotype is not None:
        raise ValueError("genotype: method metanas searches for one; train a genotype's network by method maml or reptile.")
    model = make_model(config)
    parts: Any = {
        "w": optax.adam(config.inner_rate, b1=0.0),
        "alpha": optax.chain(optax.add_decayed_weights(ALPHA_DECAY), optax.adam(config.alpha_times * config.inner_rate, b1=0.0)),
    }

    def learner(turns: int, alone: int, threshold: float, coldest: float) -> MetaLearner:
        rows = ((1, 0), (0, 1)) * turns + ((0, 1),) * alone
        turn = lambda_mask(rows, optax.partition(parts, top_level), labels=("alpha", "w"))
        mixture = mix(anneal(HOTTEST, coldest, turns, every=2) if turns else coldest, threshold=threshold)
        data = _seen(dataclasses.replace(config, inner_steps=len(rows)), None if steps is None else len(rows))
        return reptile(model, losses.xent, chain(mixture, turn), data, unroll=config.unroll, carry_state=True)

    if steps is not None:
        return learner(steps // 2, steps - steps // 2, TEST_THRESHOLD, COLDEST)
    coldest = COLDEST if config.dataset in PHOTOGRAPHS else COLDEST_IN_TRAINING
    trained = learner(config.inner_steps, 0, TRAIN_THRESHOLD, coldest)
    if config.warmup:
        trained = switch(learner(0, config.inner_steps, TRAIN_THRESHOLD, HOTTEST), trained, at=(config.warmup,))
    return watched(trained, alphas)


def alphas(theta: Theta) -> dict[str, jax.Array]:
    """For the log, all alphas by name."""
    return named(theta.params["alpha"])


def _check_warmup(config: Config) -> None:
    if config.warmup and config.warmup >= config.steps:
        raise ValueError(
            f"train: warmup must be below steps, got {config.warmup} and {config.steps}: what follows it would never be trained. "
            "Usual cause: a preset's steps made fewer; give --warmup too."
        )


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
    if config.dataset not in PHOTOGRAPHS and (config.without or config.classes != Config.classes):
        raise ValueError(f"classes, without: these are for photographs, but the dataset is {config.dataset}.")
    if config.dataset == "glyphs":
        return glyphs(size=SHAPES["glyphs"][0], seed=config.seed)
    if config.dataset == "omniglot":
        rotate = None if config.rotate else False
        return omniglot(config.source, split=config.split, rotate=rotate, size=SHAPES["omniglot"][0], seed=config.seed)
    if config.dataset in PHOTOGRAPHS:
        if config.source is None:
            raise ValueError(f"source: dataset {config.dataset} needs one, an .npz file or a folder of pictures a class.")
        size, _, channels = SHAPES[config.dataset]
        return photographs(
            config.source, size=size, channels=channels, classes=config.classes, without=config.without, seed=config.seed
        )
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


def unseen(config: Config, images: Images) -> Tasks:
    """Episodes of tests and validation."""
    return episodes(images, config.ways, config.shots, config.test_queries)


def make_problem(config: Config) -> Problem:
    """Loads the data of a configuration and checks that its episodes can be drawn."""
    splits = make_splits(config)
    if splits is None:
        test = sinusoid(config.shots, config.test_queries)
        return Problem(sinusoid(config.shots, config.queries), None, test, (), losses.mse, "mse")

    valid = None if splits.valid is None or not config.validate_every else unseen(config, splits.valid)
    ways = config.train_ways or config.ways if config.method in COMPARING and config.method != "snail" else config.ways
    train = episodes(splits.train, ways, config.train_shots or config.shots, config.queries)
    return Problem(train, valid, unseen(config, splits.test), splits.train.names, losses.accuracy, "accuracy")
