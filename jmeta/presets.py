"""Presets: a frozen configuration for each row of the results. `jmeta.builders` makes of one a learner and its tasks.

References:
  Finn, Abbeel, Levine, Model-Agnostic Meta-Learning, ICML 2017 (https://arxiv.org/abs/1703.03400), appendix A: ways, shots, inner
  and outer steps, meta-batches and networks of the `maml-omniglot` and `maml-sinusoid` presets.
  Cai et al., Neural Routing in Meta Learning, 2022 (https://arxiv.org/abs/2210.07932): the method of the `nrml-omniglot` presets,
  with 5 inner steps, since a choice of channels depends on the task from the second step on.
  Nichol, Achiam, Schulman, On First-Order Meta-Learning Algorithms, 2018 (https://arxiv.org/abs/1803.02999): the
  `reptile-omniglot` presets.
  Rajeswaran, Finn, Kakade, Levine, Meta-Learning with Implicit Gradients, NeurIPS 2019 (https://arxiv.org/abs/1909.04630), and
  its released code; Antoniou, Edwards, Storkey, How to train your MAML, ICLR 2019 (https://arxiv.org/abs/1810.09502), and its;
  Snell, Swersky, Zemel, Prototypical Networks, NeurIPS 2017 (https://arxiv.org/abs/1703.05175); Mishra, Rohaninejad, Chen, Abbeel,
  SNAIL, ICLR 2018 (https://arxiv.org/abs/1707.03141): the presets of these names. Those of `cavia`, `matching` and `ridge` have no
  published setting for Omniglot; matching and ridge train as protonet does.
  Elsken, Staffler, Metzen, Hutter, Meta-Learning of Neural Architectures for Few-Shot Learning, CVPR 2020
  (https://arxiv.org/abs/1911.11090): `metanas-omniglot-20w1s` and `metanas-colour84`; the other `metanas` presets are smaller.

The `colour84` presets follow the same papers on mini-ImageNet: 84 x 84 in colour, 64, 16 and 20 classes; MAML's inner rate of 0.01
for a loss that is summed over 5 classes is 0.05 for a mean one. Where no published settings are known here, `boil`, `sparse`,
`nrml` and `meta-sgd` do as maml does there, and `imaml`, `cavia`, `matching` and `ridge` as on Omniglot but for network, queries
and batch.

Differs from the papers in: inner rates are for a mean loss (see `jmeta.xent`), and MAML's on Omniglot are 0.4, a fifth of the
papers' brought to one; on Omniglot 5 queries a class in training, and 15 in tests; tests on unrotated classes; the outer rate of
the sine waves falls along a cosine; metanas prunes nothing for good during training (`jmeta.shrink` does) and has no drop-path;
reptile averages the last map, where the released code flattens it; imaml's tests keep the pull towards theta, its outer Adam has
the usual epsilon and its batches of 20 ways are of 16; snail normalises by the support set alone, trains for fewer steps, and its
embedding of photographs has no dropout, no convolution to 2,048 channels and a linear layer in place of its last.
"""

import dataclasses
import difflib
from pathlib import Path
from typing import Any, Literal

from jmeta.models.layers import Norm

SHAPES = {"glyphs": (28, 28, 1), "omniglot": (28, 28, 1), "colour84": (84, 84, 3), "grey28": (28, 28, 1)}
"""Height, width and channels of the images of a data set."""
PHOTOGRAPHS = ("colour84", "grey28")

Method = Literal[
    "maml",
    "fomaml",
    "anil",
    "boil",
    "meta-sgd",
    "sparse",
    "nrml",
    "reptile",
    "metanas",
    "imaml",
    "cavia",
    "maml++",
    "protonet",
    "matching",
    "ridge",
    "snail",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """All that a run of the command line depends on: names and numbers alone."""

    method: Method = "maml"
    """How tasks are learned."""
    dataset: Literal["glyphs", "omniglot", "colour84", "grey28", "sinusoid"] = "glyphs"
    """What is learned; glyphs are rendered, Omniglot is read or downloaded, colour84 and grey28 are photographs of yours."""
    source: str | None = None
    """Where Omniglot lies (.npz, a folder of tensorflow-datasets, or of the archives); looked up or downloaded if not given. Where
    photographs lie (.npz, or folders of pictures; see `jmeta.photographs`)."""
    classes: tuple[int, int, int] = (64, 16, 20)
    """Classes of photographs to train on, to validate on and to test on, where the source has no folders train and test."""
    without: tuple[str, ...] = ()
    """Classes of photographs to leave out, such as Faces_easy of Caltech-101, which repeats its Faces."""
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
    train_ways: int | None = None
    """Classes of an episode in training, for methods that compare, if other than in validation and tests."""
    queries: int = 5
    """Query images of a class in training (points of a sine wave)."""
    test_queries: int = 15
    """The same in validation and tests."""
    filters: int = 64
    """Channels of each convolution, or of each node of a cell; for snail the features of an image."""
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
    keep_meta: float = 1.0
    """The same of the filters that nrml leaves in a task's meta-gradient."""
    slimming: float = 0.0
    """Strength with which scales of normalisations are drawn towards 0, so that `jmeta.prune` finds small ones."""
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
    alpha_times: float = 1.0
    """The inner rate of metanas' alphas over that of the weights; the paper's 1 hardly moves them in a few thousand meta-steps."""
    least_rate: float = 0.0
    """Where a falling outer rate ends."""
    clip: float | None = None
    """Limit of each entry of a meta-gradient; none if not given."""
    outer_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Whether the outer rate stays, or falls over all steps."""
    warmup: int = 0
    """Meta-steps of metanas that leave the alphas as they are; of maml++, those of first order."""
    context: int = 100
    """Numbers that cavia adapts."""
    transductive: bool = True
    """Whether tests of reptile predict all queries together, or one at a time beside the support set."""
    strength: float = 2.0
    """Of imaml's pull towards theta."""
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
_MORE: dict[str, Any] = {"batch": 16, "inner_steps": 5, "test_steps": 5}
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
    test_batch=5,
)
_LONGER: dict[str, Any] = {"inner_steps": 10, "inner_batch": 20, "test_batch": 10, "inner_rate": 5e-4, "steps": 200_000}
_IMAML = dataclasses.replace(_OMNIGLOT, method="imaml", inner_rate=0.1, inner_steps=16, test_steps=16, steps=20_000)
_CAVIA = dataclasses.replace(_OMNIGLOT, method="cavia", inner_rate=1.0, inner_steps=2, test_steps=2)
_PLUS = dataclasses.replace(
    _OMNIGLOT,
    method="maml++",
    inner_rate=0.1,
    inner_steps=5,
    test_steps=5,
    outer_schedule="cosine",
    least_rate=1e-5,
    steps=50_000,
    batch=8,
)
_COMPARE = dataclasses.replace(_OMNIGLOT, method="protonet", train_ways=60, inner_steps=0, test_steps=0, batch=1)
_SNAIL = dataclasses.replace(
    _OMNIGLOT,
    method="snail",
    norm="support",
    train_shots=5,
    queries=1,
    inner_steps=0,
    test_steps=0,
    outer_rate=1e-4,
    steps=100_000,
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
_COLOUR: dict[str, Any] = {"dataset": "colour84", "filters": 32}
_CLIPPED: dict[str, Any] = {**_COLOUR, "queries": 15, "batch": 4, "clip": 10.0}
_FIVE: dict[str, Any] = {**_CLIPPED, "inner_rate": 0.05, "inner_steps": 5, "test_steps": 10}
_COMPARED: dict[str, Any] = {**_COLOUR, "filters": 64, "queries": 15, "train_ways": 30}


def _grid(name: str, config: Config, twenty: dict[str, Any]) -> dict[str, Config]:
    """A method on Omniglot in 5 and 20 ways, with 1 and 5 shots; `twenty` is what 20 ways change."""
    wide = dataclasses.replace(config, ways=20, **twenty)
    cells = {"5w1s": config, "5w5s": dataclasses.replace(config, shots=5)}
    cells |= {"20w1s": wide, "20w5s": dataclasses.replace(wide, shots=5)}
    return {f"{name}-omniglot-{kind}": cell for kind, cell in cells.items()}


def _colour(name: str, config: Config, changed: dict[str, Any], **five: Any) -> dict[str, Config]:
    """A method on photographs in 5 ways, with 1 and 5 shots; `five` is what 5 shots change."""
    one = dataclasses.replace(config, **changed)
    return {f"{name}-colour84-5w1s": one, f"{name}-colour84-5w5s": dataclasses.replace(one, shots=5, **five)}


PRESETS: dict[str, Config] = {
    "maml-glyphs-5w1s": _GLYPHS,
    **_grid("maml", _OMNIGLOT, _MORE),
    **_grid("fomaml", dataclasses.replace(_OMNIGLOT, method="fomaml"), _MORE),
    **_grid("anil", dataclasses.replace(_OMNIGLOT, method="anil"), _MORE),
    **_grid("boil", dataclasses.replace(_OMNIGLOT, method="boil"), _MORE),
    **_grid("meta-sgd", dataclasses.replace(_OMNIGLOT, method="meta-sgd"), {"batch": 16}),
    **_grid("sparse", dataclasses.replace(_OMNIGLOT, method="sparse"), _MORE),
    **_grid("nrml", dataclasses.replace(_OMNIGLOT, method="nrml", inner_steps=5, test_steps=5), {"batch": 16}),
    **_grid("reptile", _REPTILE, _LONGER),
    **_grid("imaml", _IMAML, {"batch": 16, "inner_steps": 25, "test_steps": 25}),
    **_grid("cavia", _CAVIA, {"batch": 16}),
    **_grid("maml++", _PLUS, {}),
    **_grid("protonet", _COMPARE, {}),
    **_grid("matching", dataclasses.replace(_COMPARE, method="matching"), {}),
    **_grid("ridge", dataclasses.replace(_COMPARE, method="ridge"), {}),
    **_grid("snail", _SNAIL, {}),
    **_colour("maml", _OMNIGLOT, _FIVE, batch=2),
    **_colour("fomaml", _OMNIGLOT, {"method": "fomaml", **_FIVE}, batch=2),
    **_colour("anil", _OMNIGLOT, {"method": "anil", **_FIVE}, batch=2),
    **_colour("boil", _OMNIGLOT, {"method": "boil", **_FIVE}, batch=2),
    **_colour("sparse", _OMNIGLOT, {"method": "sparse", **_FIVE}, batch=2),
    **_colour("nrml", _OMNIGLOT, {"method": "nrml", **_FIVE}, batch=2),
    **_colour("meta-sgd", _OMNIGLOT, {"method": "meta-sgd", **_CLIPPED, "inner_rate": 0.05, "test_steps": 1}),
    **_colour("reptile", _REPTILE, {**_COLOUR, "train_shots": 15, "inner_steps": 8, "test_batch": 5}, test_batch=15),
    **_colour("imaml", _IMAML, {**_COLOUR, "queries": 15, "batch": 4}, batch=2),
    **_colour("cavia", _CAVIA, {**_COLOUR, "queries": 15, "batch": 16}, batch=8),
    **_colour("maml++", _PLUS, {**_CLIPPED, "filters": 48, "inner_rate": 0.01, "outer_schedule": "constant", "batch": 2}),
    **_colour("protonet", _COMPARE, _COMPARED, train_ways=20),
    **_colour("matching", _COMPARE, {"method": "matching", **_COMPARED}, train_ways=20),
    **_colour("ridge", _COMPARE, {"method": "ridge", **_COMPARED}, train_ways=20),
    **_colour("snail", _SNAIL, {**_COLOUR, "filters": 384}),
    **_colour("metanas", _METANAS, {**_COLOUR, "filters": 28, "inner_rate": 1e-3, "test_batch": 5}, test_batch=15),
    "metanas-omniglot-20w1s": dataclasses.replace(_METANAS, ways=20, test_batch=10),
    "metanas-omniglot-5w1s": dataclasses.replace(
        _METANAS, filters=8, reductions=(0, 1), inner_batch=10, alpha_times=10.0, test_steps=50, steps=5_000, batch=3, warmup=2_500
    ),
    "metanas-glyphs-5w1s": dataclasses.replace(
        _METANAS,
        dataset="glyphs",
        filters=4,
        cells=2,
        reductions=(0, 1),
        inner_batch=10,
        alpha_times=5.0,
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


def preset(name: str, others: tuple[str, ...] = ()) -> Config:
    """The configuration of that name.

    Args:
      name: one of PRESETS.
      others: names that may have been meant as well.

    Raises:
      ValueError: there is none; the nearest name is given.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, [*PRESETS, *others], n=1, cutoff=0.0)[0]
    raise ValueError(f"preset: {name!r} is not known; the nearest is {near!r}. `jmeta presets` lists all.")


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
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    return Config(**values)
