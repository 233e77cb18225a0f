"""Presets of pre-training for continual and transfer learning: i.i.d., ASB, Meta-ASB, OML and ANML, zapped or not.

References:
  Frati, Traft, Clune, Cheney, Reset It and Forget It, ECAI 2024 (https://arxiv.org/abs/2310.07996): the released configurations for
  Omniglot.
  Javed, White, Meta-Learning Representations for Continual Learning, NeurIPS 2019 (https://arxiv.org/abs/1905.12588).
  Beaulieu et al., Learning to Continually Learn, ECAI 2020 (https://arxiv.org/abs/2002.09571).

Differs from the papers in: OML has the network of the others with one linear head, which its authors found to do as well.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jmeta import checkpoint
from jmeta.core import MetaLearner, Model, Tasks, Theta, chain, memoise
from jmeta.learners.asb import anml, asb, oml
from jmeta.learners.supervised import supervised
from jmeta.losses import xent
from jmeta.models.anml import anml_net
from jmeta.models.backbones import conv3
from jmeta.rules.resetting import resetting
from jmeta.rules.zap import zap
from jmeta.tasks.feeds import epoch_steps, epochs, one_by_one
from jmeta.tasks.glyphs import glyphs
from jmeta.tasks.images import Images, split_images
from jmeta.tasks.omniglot import omniglot
from jmeta.tasks.streams import labelled, streams
from jmeta.train import fit


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """All that a run of pre-training depends on: names and numbers alone."""

    method: Literal["iid", "asb", "meta-asb", "oml", "anml"] = "asb"
    """How the network is trained."""
    zap: bool = True
    """Whether the head's weights of a class are drawn anew before its sequence (all of them between epochs, for iid)."""
    dataset: Literal["omniglot", "glyphs"] = "omniglot"
    """Omniglot's background and evaluation sets, or glyphs, which are rendered."""
    source: str | None = None
    """Where Omniglot lies; looked up or downloaded if not given."""
    images: int = 15
    """Images of a class that are trained on."""
    filters: int = 256
    """Channels of each convolution."""
    gate_filters: int = 112
    """The same of anml's neuromodulating network."""
    inner_rate: float = 1e-3
    """Rate of the sequence's steps."""
    outer_rate: float = 1e-3
    """Adam's rate."""
    sequence: int = 20
    """Images of a sequence, of one class."""
    remember: int = 64
    """Images of any class beside it."""
    size: int = 256
    """Images of a batch, for iid."""
    zap_every: int = 1
    """Epochs between two zaps, for iid."""
    steps: int = 9_000
    """Sequences; for iid batches."""
    test_classes: int = 50
    """Unseen classes learned one after another in the final test, on frozen features."""
    test_draws: int = 5
    """Draws of them."""
    seed: int = 0
    """Seed of the initial parameters, the tasks and the splits."""
    save_every: int = 500
    """Steps between two checkpoints."""


_META = Pretrain(method="meta-asb", inner_rate=0.1, steps=25_000)
PRESETS: dict[str, Pretrain] = {
    "zap-iid-omniglot": Pretrain(method="iid", steps=570),
    "iid-omniglot": Pretrain(method="iid", zap=False, steps=570),
    "zap-asb-omniglot": Pretrain(),
    "asb-omniglot": Pretrain(zap=False),
    "zap-meta-asb-omniglot": _META,
    "meta-asb-omniglot": dataclasses.replace(_META, zap=False),
    "oml-omniglot": dataclasses.replace(_META, method="oml", inner_rate=0.03, outer_rate=1e-4, images=20),
    "anml-omniglot": dataclasses.replace(_META, method="anml", images=20),
    "zap-asb-glyphs": Pretrain(dataset="glyphs", filters=32, steps=1_000, test_classes=10),
}


def from_dict(stored: Any) -> Pretrain | None:
    """The configuration kept with a run; None if it is of another kind."""
    names = {field.name for field in dataclasses.fields(Pretrain)}
    return Pretrain(**stored) if isinstance(stored, dict) and {"sequence", "remember"} <= set(stored) <= names else None


def make_images(config: Pretrain) -> tuple[Images, Images]:
    """Classes to train on, with as many images of each as the configuration says, and others to test on."""
    splits = glyphs(seed=config.seed) if config.dataset == "glyphs" else omniglot(config.source, split="background", rotate=False)
    return split_images(splits.train, [config.images], config.seed)[0], splits.test


@memoise
def make_model(config: Pretrain, classes: int) -> Model:
    """The network of a configuration, with an output for each class."""
    if config.method == "anml":
        return anml_net(classes, filters=config.filters, gate_filters=config.gate_filters)
    return conv3(classes, filters=config.filters)


@memoise
def make_learner(config: Pretrain, classes: int) -> MetaLearner:
    """The learner of a configuration."""
    model = make_model(config, classes)
    if config.method == "iid":
        return supervised(model, xent, epochs(config.size, seed=config.seed))
    steps = optax.sgd(config.inner_rate)
    rule, data = chain(zap("head"), steps) if config.zap else chain(steps), one_by_one(config.sequence)
    if config.method in ("oml", "anml"):
        return {"oml": oml, "anml": anml}[config.method](model, xent, rule, data)
    return asb(model, xent, rule, data, through=config.method == "meta-asb")


def make_tasks(config: Pretrain, images: Images) -> Tasks:
    """What is trained on."""
    return labelled(images) if config.method == "iid" else streams(images, config.sequence, config.remember)


def make_outer(config: Pretrain, examples: int) -> optax.GradientTransformation:
    """Adam; for iid with its zaps between epochs."""
    adam = optax.adam(config.outer_rate)
    if config.method != "iid" or not config.zap:
        return adam
    every = config.zap_every * epoch_steps(examples, config.size)
    return resetting(adam, zap("head", which="all", init="official_iid"), every, until=config.steps, seed=config.seed)


def train(key: jax.Array, config: Pretrain, images: Images, folder: Path, *, resume: bool) -> Theta:
    """Pre-trains in a folder, or goes on there; arguments and errors as for `jmeta.fit`."""
    return fit(
        key,
        make_learner(config, len(images.names)),
        make_tasks(config, images),
        make_outer(config, len(images.pixels)),
        config.steps,
        1,
        workdir=folder,
        resume=resume,
        config=config,
        labels=images.names,
        save_every=config.save_every,
    ).theta


def read(run: str | Path) -> tuple[Pretrain, Model, MetaLearner, Theta]:
    """A run of pre-training.

    Raises:
      ValueError: it is of another kind.
    """
    described = checkpoint.read_run(run)
    config = from_dict(described["config"])
    if config is None:
        raise ValueError(
            f"eval: {run} is no run of pre-training, so it has no --protocol; `jmeta presets` lists zap-asb-omniglot etc."
        )
    classes = len(described["labels"])
    learner = make_learner(config, classes)
    theta = checkpoint.read_theta(Path(run).absolute(), jax.eval_shape(learner.init, jax.random.key(0)))
    return config, make_model(config, classes), learner, jax.tree.map(jnp.asarray, theta)
