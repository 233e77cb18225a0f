"""Sequential transfer: a trained network learns new classes one after another, one image at a time, and is tested on all of them.

    R[i, j] = accuracy on class j after the classes up to checkpoint i

The learning rate is chosen on draws of its own, and the figures are of fresh draws (two stages).

References:
  Frati, Traft, Clune, Cheney, Reset It and Forget It, ECAI 2024 (https://arxiv.org/abs/2310.07996): the protocol.
  Beaulieu et al., Learning to Continually Learn, ECAI 2020 (https://arxiv.org/abs/2002.09571): a rate chosen on draws of its own.
  Lopez-Paz, Ranzato, Gradient Episodic Memory for Continual Learning, NeurIPS 2017 (https://arxiv.org/abs/1706.08840), equations 2
  to 4: the matrix R, backward and forward transfer.
  Chaudhry, Dokania, Ajanthan, Torr, Riemannian Walk for Incremental Learning, ECCV 2018 (https://arxiv.org/abs/1801.10112):
  forgetting.

Differs from the papers in: R is taken at chosen checkpoints and not after every class, and transfers and forgetting with it.
Intervals are over draws, by Student's t.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jmeta import plot
from jmeta.core import Batch, Model, Theta, default_chunk, evaluate_loss
from jmeta.evaluate import draws as drawing
from jmeta.tasks.images import Images

RATES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
FROZEN_RATES = (5.6e-3, 3.2e-3, 1.8e-3, 1e-3, 5.6e-4, 3.2e-4, 1.8e-4)  # a factor of 3 beside the best can cost half the accuracy


class Continual(NamedTuple):
    """What `continual` measures.

    Attributes:
      matrix: `[draws, checkpoints, classes]`, accuracy on the test images of each class, in the order in which they are learned.
      train_matrix: the same on the images learned from.
      checkpoints: how many classes had been learned at each.
      rate: the learning rate that was chosen.
      tried: for each rate the mean final accuracy over the draws of the choice, and its 95 % interval.
    """

    matrix: np.ndarray
    train_matrix: np.ndarray
    checkpoints: tuple[int, ...]
    rate: float
    tried: dict[float, tuple[float, float]]

    @property
    def final(self) -> tuple[float, float]:
        """Mean accuracy over all classes at the end, and its 95 % interval over draws."""
        return drawing.interval(self.matrix[:, -1].mean(-1))

    @property
    def running(self) -> np.ndarray:
        """`[draws, checkpoints]`: mean accuracy over the classes learned so far; NaN before the first."""
        learned = self._learned()
        sums = (self.matrix * learned).sum(-1)
        return np.where(learned.any(-1), sums / np.maximum(learned.sum(-1), 1), np.nan)

    @property
    def forgetting(self) -> tuple[float, float]:
        """How far a class is below its best between its learning and the last checkpoint, mean over the classes known before that.

        NaN where no class was known before the last checkpoint.
        """
        learned = self._learned()[:-1]
        earlier = learned.any(0)
        if not earlier.any():
            return np.nan, np.nan
        best = np.where(learned, self.matrix[:, :-1], -np.inf).max(1)
        return drawing.interval((best - self.matrix[:, -1])[:, earlier].mean(-1))

    @property
    def backward(self) -> tuple[float, float]:
        """Change of a class's accuracy from the first checkpoint that knows it to the last; negative where it is forgotten."""
        first = self._learned().argmax(0)
        then = np.take_along_axis(self.matrix, np.broadcast_to(first, self.matrix[:, :1].shape), 1)[:, 0]
        earlier = first < len(self.checkpoints) - 1
        return drawing.interval((self.matrix[:, -1] - then)[:, earlier].mean(-1)) if earlier.any() else (np.nan, np.nan)

    @property
    def forward(self) -> tuple[float, float]:
        """Gain on a class, at the last checkpoint before it is learned, over the untrained head: mean over classes that have one.

        NaN unless 0 is among the checkpoints and others before the last.
        """
        last = (~self._learned()).sum(0) - 1
        if self.checkpoints[0] != 0 or not (last > 0).any():
            return np.nan, np.nan
        before = np.take_along_axis(self.matrix, np.broadcast_to(last, self.matrix[:, :1].shape), 1)[:, 0]
        return drawing.interval((before - self.matrix[:, 0])[:, last > 0].mean(-1))

    def _learned(self) -> np.ndarray:
        """bool `[checkpoints, classes]`."""
        return np.arange(self.matrix.shape[-1]) < np.array(self.checkpoints)[:, None]

    def __str__(self) -> str:
        """The final accuracy, what was forgotten, and the rate."""
        draws, _, classes = self.matrix.shape
        forgotten = f", {drawing.shown(self.forgetting)} forgotten" if np.isfinite(self.forgetting[0]) else ""
        about = f"({drawing.counted(draws)}); {drawing.chosen(self.rate, self.tried)}"
        return f"{drawing.shown(self.final)} over {classes} classes{forgotten} {about}"

    def plot(self, path: str | Path) -> Path:
        """Draws R, the mean over draws, as an image; writes a PNG."""
        plot.matrix(self.matrix.mean(0), self.checkpoints, Path(path))
        return Path(path)


def continual(
    key: jax.Array,
    model: Model,
    loss: Callable[..., jax.Array],
    theta: Theta,
    images: Images,
    optimizer: Callable[[Any], optax.GradientTransformation] = optax.adam,
    *,
    classes: int,
    shots: int = 15,
    queries: int = 5,
    frozen: bool = False,
    rates: Sequence[float] | None = None,
    further: Sequence[float] = (),
    draws: int = 10,
    select: int | None = None,
    checkpoints: Sequence[int] | None = None,
    init: Any = "he_normal",
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> Continual:
    """Learns classes in sequence, from one image a step, and measures all of them at checkpoints.

    Every draw takes classes, their order, and their images anew, and a fresh head.

    Args:
      key: of the draws.
      model: the network, whose predictions do not depend on each other (no `norm="batch"`).
      loss: `(outputs, y) -> scalar`.
      theta: what was trained.
      images: classes that training did not see.
      optimizer: takes a rate, which is traced; as `optax.adam` or `optax.sgd`.
      classes: how many are learned.
      shots: images of a class learned from, each once.
      queries: other images of a class, tested on.
      frozen: whether the head alone learns, on features that are computed once; its input is then fixed.
      rates: tried on `select` draws each; if None five from 1e-2 to 1e-4, or seven closer ones if frozen.
      further: rates of which the next higher or lower is tried as well while the best so far is the highest or the lowest.
      draws: fresh ones that are reported.
      select: draws for the choice of the rate; as many as `draws` if None.
      checkpoints: numbers of classes after which all are tested; if None 0, 1 and ten more up to the last.
      init: of the head; see `jmeta.zap_layer`. Its biases start from 0.
      chunk: runs computed together on a device; chosen by device and network if None.
      mesh: devices that the runs are spread over.

    Returns:
      A `Continual`; print it.

    Raises:
      ValueError: more classes than there are, too few images of a class, a head with fewer outputs than classes, a model whose
        predictions depend on each other, one whose last layer is not linear if frozen, or another argument out of range.
    """
    select = draws if select is None else select
    rates = (FROZEN_RATES if frozen else RATES) if rates is None else rates
    steps = _checkpoints(classes, checkpoints)
    drawing.check("continual", model, theta.params, images, classes, shots, queries, frozen, rates, draws, select)
    run, scout = (
        drawing.runner(_run, model, loss, optimizer, classes, shots, queries, frozen, init, each) for each in (steps, (classes,))
    )
    together = chunk or (1 if jax.default_backend() == "cpu" else default_chunk(theta.params, len(rates) * select))
    measured = drawing.two_stages(
        key,
        run,
        (theta.params, drawing.on_device(images)),
        rates,
        draws,
        select,
        lambda found: found[0][:, -1].mean(-1),
        together,
        mesh,
        scout=scout,
        further=tuple(further),
    )
    (test, train), rate, tried = measured
    return Continual(test, train, steps, rate, tried)


def _checkpoints(classes: int, given: Sequence[int] | None) -> tuple[int, ...]:
    if given is None:
        return tuple(sorted({0, 1, *np.linspace(1, classes, 11).round().astype(int).tolist()}))
    found = tuple(given)
    if not found or list(found) != sorted(set(found)) or found[0] < 0 or found[-1] != classes:
        raise ValueError(f"continual: checkpoints must rise from 0 or more to classes, {classes}, got {found}.")
    return found


def _run(model, loss, optimizer, classes, shots, queries, frozen, init, checkpoints, shared, key, rate):
    """One draw at one rate: accuracies on test and training images, `[checkpoints, classes]` each."""
    params, data = shared
    key_draw, key_head = jax.random.split(key)
    pixels = drawing.draw(key_draw, data, classes, shots + queries)
    forward, params, examples = drawing.begin(model, params, key_head, pixels, frozen, init)
    update = optimizer(rate)

    def step(number, carry):
        params, state = carry
        label, place = number // shots, number % shots
        one = Batch(examples[label, place][None], label[None])
        gradient = jax.grad(lambda p: evaluate_loss(loss, forward(p, one.x), one))(params)
        updates, state = update.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def until(carry, bounds):
        first, last = bounds
        carry = jax.lax.fori_loop(first * shots, last * shots, step, carry)
        right = drawing.right(forward, carry[0], examples)
        return carry, (right[:, shots:].mean(1), right[:, :shots].mean(1))

    bounds = jnp.array(list(itertools.pairwise((0, *checkpoints))))
    return jax.lax.scan(until, (params, update.init(params)), (bounds[:, 0], bounds[:, 1]))[1]
