"""The work that `speed.py` times: networks, episodes, and the floating-point operations that they need, counted from shapes."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jmeta as jm

ADAM_RATE = 1e-3  # of an episode of ASB


class Work(NamedTuple):
    """MAML on one kind of episode, or episodes of ASB.

    Attributes:
      kind: "train" for a meta-gradient, "adapt" for adaptation alone, "evaluate" for few-shot accuracy end to end, "asb" for
        episodes of ASB one after another, each with its step of Adam: shots are the images of the sequence, queries those of the
        remember set, ways the outputs.
      network: "mlp" of 40-40, "conv4" with stride 2 and a mean over the last map, "pooled", conv4 with max-pooling, or "conv3".
      shape: of one input.
      filters: channels of each convolution.
      ways, shots, queries: of an episode; queries for each class. For sine waves, points of the support and of the query set.
      steps: inner steps.
      tasks: of a meta-batch.
      rate: inner rate, for a mean loss.
      order: 1 or 2.
    """

    network: Literal["mlp", "conv4", "pooled", "conv3"]
    shape: tuple[int, ...]
    filters: int
    ways: int
    shots: int
    queries: int
    steps: int
    tasks: int
    rate: float
    order: int = 2
    kind: Literal["train", "adapt", "evaluate", "asb"] = "train"


_OMNIGLOT = Work("conv4", (28, 28, 1), 64, 5, 1, 15, 1, 32, 0.4)
ROWS = {
    "sinusoid": Work("mlp", (1,), 40, 1, 10, 10, 1, 25, 0.01),
    "omniglot-5w1s": _OMNIGLOT,
    "omniglot-20w1s": Work("conv4", (28, 28, 1), 64, 20, 1, 15, 5, 16, 0.1),
    "colour84-5w5s": Work("pooled", (84, 84, 3), 32, 5, 5, 15, 5, 4, 0.01),
    "adapt 1": _OMNIGLOT._replace(kind="adapt", order=1, tasks=1),
    "adapt 1000": _OMNIGLOT._replace(kind="adapt", order=1, tasks=1000),
    "evaluate 1000": _OMNIGLOT._replace(kind="evaluate", order=1, tasks=1000),
    "omniglot-5w1s-5steps": _OMNIGLOT._replace(steps=5, rate=0.1),
    "asb-64": Work("conv3", (28, 28, 1), 64, 964, 20, 64, 20, 10, 1e-3, 1, "asb"),
}


def learner_of(work: Work) -> jm.MetaLearner:
    """MAML, or ASB without its reset, with the network of that work."""
    if work.kind == "asb":
        return jm.asb(jm.conv3(work.ways, filters=work.filters), jm.xent, optax.sgd(work.rate), jm.one_by_one(work.steps))
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
        return jm.Tasks(lambda key, data: noise(key, None, work))
    asb = work.kind == "asb"
    try:
        images = jm.omniglot(split="background" if asb else "customary", rotate=not asb).train
    except (FileNotFoundError, ConnectionError) as error:
        print(f"glyphs instead of Omniglot: {error}")
        images = jm.glyphs().train
    if asb:
        return jm.streams(images, work.shots, work.queries)
    return jm.episodes(images, work.ways, work.shots, work.queries)


def noise(key: jax.Array, data: object, work: Work) -> jm.Task:
    """An episode of images of normal noise."""

    def batch(key, each):
        labels = jnp.repeat(jnp.arange(work.ways), each)
        return jm.Batch(jax.random.normal(key, (len(labels), *work.shape)), labels)

    return jm.Task(*map(batch, jax.random.split(key), (work.shots, work.queries)))


def keys_of(work: Work, seed: int) -> jax.Array:
    """The keys of the episodes, `[tasks]`: for evaluation those that `jm.fewshot` draws with."""
    key = jax.random.key(seed)
    if work.kind != "evaluate":
        return jax.random.split(key, work.tasks)
    return jax.vmap(lambda number: jax.random.split(jax.random.fold_in(key, number))[0])(jnp.arange(work.tasks))


def sample(work: Work, seed: int) -> tuple[jm.Theta, jm.Task]:
    """Weights, and a meta-batch whose arrays have a leading axis `[tasks]`."""
    tasks = tasks_of(work)
    batch = jax.jit(jax.vmap(tasks.sample, (0, None)))(keys_of(work, seed), tasks.data)
    return learner_of(work).init(jax.random.key(seed)), batch


class Layer(NamedTuple):
    """What one example costs on its way through a layer: multiplications, and numbers read and written."""

    products: int
    inputs: int
    outputs: int


def layers(work: Work) -> list[Layer]:
    """From the first layer to the head."""
    if work.network == "mlp":
        return [Layer(40, 1, 40), Layer(40 * 40, 40, 40), Layer(40, 40, 1)]
    side, channels, found = work.shape[0], work.shape[-1], []
    if work.network == "conv3":
        for number in range(3):
            outputs = side - 2
            found.append(Layer(outputs**2 * 9 * channels * work.filters, side**2 * channels, outputs**2 * work.filters))
            side, channels = outputs // 2 if number < 2 else outputs, work.filters
        return [*found, Layer(side**2 * channels * work.ways, side**2 * channels, work.ways)]
    for _ in range(4):
        stride = 1 if work.network == "pooled" else 2
        outputs = -(-side // stride)
        found.append(Layer(outputs**2 * 9 * channels * work.filters, side**2 * channels, outputs**2 * work.filters))
        side, channels = side // 2 if work.network == "pooled" else outputs, work.filters
    features = side**2 * channels if work.network == "pooled" else channels
    return [*found, Layer(features * work.ways, features, work.ways)]


def examples(work: Work) -> tuple[int, int]:
    """Examples of a task's support and query set."""
    if work.kind == "asb":
        return work.shots, work.shots + work.queries
    return work.shots * work.ways, work.queries * work.ways


def _passes(work: Work) -> list[tuple[int, int, int]]:
    """Pairs of counts, `(examples, products of the first layer, of the others)`, of all that one task does.

    A layer's way forward is one product, its way back two: the gradients of weights and of inputs, of which a first layer needs the
    first alone. Each product has two factors, so differentiating an inner step once more takes twice its products again.
    """
    support, query = examples(work)
    seen = support if work.kind == "asb" else support * work.steps
    inner = (seen, 4, 9) if work.order == 2 and work.kind == "train" else (seen, 2, 3)
    outer = {"train": (query, 2, 3), "asb": (query, 2, 3), "adapt": (0, 0, 0), "evaluate": (query, 1, 1)}[work.kind]
    return [inner, outer]


def operations(work: Work) -> int:
    """Floating-point operations of the matrix products, all else left out."""
    first, *others = (layer.products for layer in layers(work))
    return 2 * work.tasks * sum(count * (ours * first + theirs * sum(others)) for count, ours, theirs in _passes(work))


def shortest(work: Work, rate: float, bandwidth: float) -> float:
    """Seconds that the products would take if each ran at the machine's rate or, if longer, at its bandwidth (a roofline).

    A product reads two arrays and writes one, of which the weights are left out; normalisation and ReLU count as free.

    Args:
      work: what is computed.
      rate: floating-point operations a second of a large matrix product.
      bandwidth: bytes a second of a large copy, read and written.
    """
    seconds = 0.0
    for number, layer in enumerate(layers(work)):
        one = max(2 * layer.products / rate, 4 * (layer.inputs + layer.outputs) / bandwidth)
        seconds += one * sum(count * (theirs if number else ours) for count, ours, theirs in _passes(work))
    return work.tasks * seconds
