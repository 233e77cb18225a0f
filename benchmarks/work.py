"""The work that `speed.py` times: networks, episodes, and the floating-point operations that they need, counted from shapes."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jmeta as jm


class Work(NamedTuple):
    """MAML on one kind of episode.

    Attributes:
      network: "mlp" of 40-40, "conv4" with stride 2 and a mean over the last map, or "pooled", conv4 with max-pooling.
      shape: of one input.
      filters: channels of each convolution.
      ways, shots, queries: of an episode; queries for each class. For sine waves, points of the support and of the query set.
      steps: inner steps.
      tasks: of a meta-batch.
      rate: inner rate, for a mean loss.
      order: 1 or 2.
    """

    network: Literal["mlp", "conv4", "pooled"]
    shape: tuple[int, ...]
    filters: int
    ways: int
    shots: int
    queries: int
    steps: int
    tasks: int
    rate: float
    order: int = 2


ROWS = {
    "sinusoid": Work("mlp", (1,), 40, 1, 10, 10, 1, 25, 0.01),
    "omniglot-5w1s": Work("conv4", (28, 28, 1), 64, 5, 1, 15, 1, 32, 0.4),
    "omniglot-20w1s": Work("conv4", (28, 28, 1), 64, 20, 1, 15, 5, 16, 0.1),
    "colour84-5w5s": Work("pooled", (84, 84, 3), 32, 5, 5, 15, 5, 4, 0.01),
}


def learner_of(work: Work) -> jm.MetaLearner:
    """MAML with the network of that work."""
    if work.network == "mlp":
        model, loss = jm.mlp(1), jm.mse
    else:
        height, width, channels = work.shape
        pool = work.network == "pooled"
        model, loss = jm.conv4(work.ways, filters=work.filters, shape=(height, width, channels), pool=pool), jm.xent
    return jm.maml(model, loss, optax.sgd(work.rate), jm.repeat(work.steps), order=work.order)


def tasks_of(work: Work) -> jm.Tasks:
    """Sine waves; Omniglot, or glyphs where it cannot be had; or noise, for the colour images."""
    if work.network == "mlp":
        return jm.sinusoid(work.shots, work.queries)
    if work.network == "pooled":
        return jm.Tasks(lambda key, data: _noise(key, work))
    try:
        images = jm.omniglot().train
    except (FileNotFoundError, ConnectionError) as error:
        print(f"glyphs instead of Omniglot: {error}")
        images = jm.glyphs().train
    return jm.episodes(images, work.ways, work.shots, work.queries)


def _noise(key: jax.Array, work: Work) -> jm.Task:
    def batch(key, each):
        labels = jnp.repeat(jnp.arange(work.ways), each)
        return jm.Batch(jax.random.normal(key, (len(labels), *work.shape)), labels)

    return jm.Task(*map(batch, jax.random.split(key), (work.shots, work.queries)))


def sample(work: Work, seed: int) -> tuple[jm.Theta, jm.Task]:
    """Weights, and a meta-batch whose arrays have a leading axis `[tasks]`."""
    tasks, key = tasks_of(work), jax.random.key(seed)
    batch = jax.jit(jax.vmap(tasks.sample, (0, None)))(jax.random.split(key, work.tasks), tasks.data)
    return learner_of(work).init(key), batch


def _products(work: Work) -> list[int]:
    """Multiplications of one example's way through each layer, from the first layer to the head."""
    if work.network == "mlp":
        return [40, 40 * 40, 40]
    side, channels, counts = work.shape[0], work.shape[-1], []
    for _ in range(4):
        stride = 1 if work.network == "pooled" else 2
        outputs = -(-side // stride)
        counts.append(outputs**2 * 9 * channels * work.filters)
        side, channels = side // 2 if work.network == "pooled" else outputs, work.filters
    features = side**2 * channels if work.network == "pooled" else channels
    return [*counts, features * work.ways]


def operations(work: Work) -> int:
    """Floating-point operations of a meta-gradient's matrix products, all else left out.

    A layer's way forward is one product, its way back two: the gradients of weights and of inputs. Each product has two factors, so
    differentiating an inner step once more takes twice its three. The first layer's inputs need no gradient.
    """
    first, *others = _products(work)
    again = work.order == 2
    inner = (4 if again else 2) * first + (9 if again else 3) * sum(others)
    outer = 2 * first + 3 * sum(others)
    sets = work.shots * work.ways, work.queries * work.ways
    return 2 * work.tasks * (work.steps * sets[0] * inner + sets[1] * outer)
