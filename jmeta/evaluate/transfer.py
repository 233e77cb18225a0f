"""Standard transfer: a trained network is fine-tuned on a few images of new classes, all at hand together.

References:
  Frati, Traft, Clune, Cheney, Reset It and Forget It, ECAI 2024 (https://arxiv.org/abs/2310.07996): fine-tuning of all layers and
  of the last, and a last layer by least squares.

Differs from the paper in: the learning rate is chosen on draws of its own; least squares has a small penalty.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jmeta.core import Batch, Model, Theta, evaluate_loss
from jmeta.evaluate import draws as drawing
from jmeta.evaluate.continual import RATES
from jmeta.tasks.feeds import epoch_steps, of_epoch
from jmeta.tasks.images import Images

METHODS = ("finetune", "probe", "least_squares")
TOGETHER = 4_096  # images of all runs that an accelerator computes together


class Transfer(NamedTuple):
    """What `transfer` measures.

    Attributes:
      accuracy: of each draw, on test images, `[draws]`.
      train_accuracy: the same on the images learned from.
      rate: the learning rate that was chosen; NaN for least squares, which has none.
      tried: for each rate the mean accuracy over the draws of the choice, and its 95 % interval.
    """

    accuracy: np.ndarray
    train_accuracy: np.ndarray
    rate: float
    tried: dict[float, tuple[float, float]]

    def __str__(self) -> str:
        """Mean accuracy with its interval over draws, and the rate."""
        about = f"({drawing.counted(len(self.accuracy))}); {drawing.chosen(self.rate, self.tried)}"
        return f"{drawing.shown(drawing.interval(self.accuracy))} {about}"


def transfer(
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
    method: Literal["finetune", "probe", "least_squares"] = "finetune",
    epochs: int = 1,
    size: int = 256,
    rates: Sequence[float] = RATES,
    further: Sequence[float] = (),
    draws: int = 10,
    select: int | None = None,
    init: Any = "he_normal",
    ridge: float = 1e-3,
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> Transfer:
    """Learns classes from shuffled batches, and measures them.

    Args:
      key: of the draws.
      model: as for `continual`.
      loss: `(outputs, y, mask) -> scalar`, as `jmeta.xent`; the last batch of an epoch is filled up with examples whose mask is 0.
      theta: what was trained.
      images: classes that training did not see.
      optimizer: as for `continual`.
      classes: how many are learned.
      shots: images of a class learned from.
      queries: other images of a class, tested on.
      method: "finetune" moves all layers, "probe" the head alone, "least_squares" solves for the head at once.
      epochs: how often each image is seen.
      size: images of a batch.
      rates: tried on `select` draws each.
      further: as for `continual`.
      draws: as for `continual`.
      select: as for `continual`.
      init: as for `continual`.
      ridge: of least squares: penalty on the weights, as a share of the mean squared feature, above 0.
      chunk: as for `continual`.
      mesh: as for `continual`.

    Returns:
      A `Transfer`; print it.

    Raises:
      ValueError: as for `continual`; or the method is none of those.
    """
    select = draws if select is None else select
    if method not in METHODS:
        raise ValueError(f"transfer: method must be one of {', '.join(METHODS)}, got {method!r}.")
    if epochs < 1 or size < 1 or ridge <= 0:
        raise ValueError(f"transfer: epochs and size must be at least 1 and ridge above 0, got {epochs}, {size} and {ridge}.")
    frozen = method != "finetune"
    drawing.check("transfer", model, theta.params, images, classes, shots, queries, frozen, rates, draws, select)
    solved = method == "least_squares"
    if solved:
        run = drawing.runner(_solve, model, classes, shots, queries, ridge)
    else:
        run = drawing.runner(_run, model, loss, optimizer, classes, shots, queries, method == "probe", init, epochs, size)
    together = chunk or (1 if jax.default_backend() == "cpu" else max(1, min(len(rates) * select, TOGETHER // size)))
    shared = theta.params, drawing.on_device(images)
    chosen = (float("nan"),) if solved else rates
    measured = drawing.two_stages(
        key, run, shared, chosen, draws, select, lambda found: found[0], together, mesh, further=tuple(further)
    )
    (test, train), rate, tried = measured
    return Transfer(test, train, rate, tried)


def _run(model, loss, optimizer, classes, shots, queries, frozen, init, epochs, size, shared, key, rate):
    """One draw at one rate: accuracy on test and training images."""
    params, data = shared
    key_draw, key_head, key_order = jax.random.split(key, 3)
    pixels = drawing.draw(key_draw, data, classes, shots + queries)
    forward, params, examples = drawing.begin(model, params, key_head, pixels, frozen, init)
    x = examples[:, :shots].reshape(-1, *examples.shape[2:])
    update, total = optimizer(rate), classes * shots

    def epoch(carry, key):
        order = jax.random.permutation(key, total)

        def step(carry, number):
            params, state = carry
            chosen, mask = of_epoch(order, number, size)
            batch = Batch(x[chosen], chosen // shots, mask)
            gradient = jax.grad(lambda p: evaluate_loss(loss, forward(p, batch.x), batch))(params)
            updates, state = update.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, jnp.arange(epoch_steps(total, size)))

    (params, _), _ = jax.lax.scan(epoch, (params, update.init(params)), jax.random.split(key_order, epochs))
    return _measured(forward, params, examples, shots)


def _solve(model, classes, shots, queries, ridge, shared, key, _):
    """The head that is nearest to the one-hot classes, with a bias."""
    params, data = shared
    key_draw, key_head = jax.random.split(key)
    pixels = drawing.draw(key_draw, data, classes, shots + queries)
    forward, _, examples = drawing.begin(model, params, key_head, pixels, True, "he_normal")
    x = examples[:, :shots].reshape(classes * shots, -1)
    y = jax.nn.one_hot(jnp.repeat(jnp.arange(classes), shots), classes)
    centre, target = x.mean(0), y.mean(0)
    penalty = ridge * jnp.square(x - centre).mean() * len(x)
    kernel = _ridge(x - centre, y - target, penalty)
    return _measured(forward, {"kernel": kernel, "bias": target - centre @ kernel}, examples, shots)


def _ridge(x: jax.Array, y: jax.Array, penalty: jax.Array) -> jax.Array:
    """`argmin |x w - y|^2 + penalty |w|^2`, by whichever of the two forms has the smaller matrix."""
    rows, columns = x.shape
    if rows < columns:
        return x.T @ jnp.linalg.solve(x @ x.T + penalty * jnp.eye(rows), y)
    return jnp.linalg.solve(x.T @ x + penalty * jnp.eye(columns), x.T @ y)


def _measured(forward: Callable, params: Any, examples: jax.Array, shots: int) -> tuple[jax.Array, jax.Array]:
    right = drawing.right(forward, params, examples)
    return right[:, shots:].mean(), right[:, :shots].mean()
