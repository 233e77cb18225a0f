"""Few-shot episodes: N classes drawn from an image set, K images of each to learn from and Q to be judged on.

References:
  Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra, Matching Networks for One Shot Learning, NeurIPS 2016
  (https://arxiv.org/abs/1606.04080), section 2.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jmeta.core import Batch, Task, Tasks
from jmeta.tasks.images import Images

DEVICE_BUDGET = 2 * 1024**3


def episodes(images: Images, ways: int, shots: int, queries: int = 15, *, device_budget: int = DEVICE_BUDGET) -> Tasks:
    """Episodes sampled from an image set, inside the compiled step.

    Args:
      images: the image set.
      ways: classes of an episode, drawn without replacement.
      shots: support images of a class.
      queries: query images of a class, disjoint from the support's.
      device_budget: an image set of at most so many bytes lives on the device as uint8; a larger one stays on the host, from where
        `fit` and `fewshot` fetch each episode's images ahead of time. The episodes of a key are the same.

    Returns:
      Tasks whose batches have x float32 `[ways * shots, height, width, channels]` in [0, 1] and y int32 `[ways * shots]`; images of
      a class lie next to each other.

    Raises:
      ValueError: more ways than classes, or shots + queries above the images of a class.
    """
    _check(images, ways, shots, queries)
    each = shots + queries

    most = int(images.count.max())

    def split(pixels):
        x = pixels.astype(jnp.float32) / 255
        labels = jnp.arange(ways, dtype=jnp.int32)

        def part(x):
            return Batch(x.reshape(-1, *x.shape[2:]), jnp.repeat(labels, x.shape[1]))

        return Task(part(x[:, :shots]), part(x[:, shots:]))

    if images.pixels.nbytes <= device_budget:
        data = jax.tree.map(jnp.asarray, (images.pixels, images.start, images.count))
        return Tasks(lambda key, data: split(data[0][choose(key, data[1], data[2], ways, each, most)]), data)

    start, count = jnp.asarray(images.start), jnp.asarray(images.count)
    indices = jax.jit(jax.vmap(lambda key: choose(key, start, count, ways, each, most)))

    def stage(keys):
        return images.pixels[np.asarray(indices(keys))]

    return Tasks(lambda key, data: split(data), (), stage)


def choose(key: jax.Array, start: jax.Array, count: jax.Array, ways: int, each: int, most: int) -> jax.Array:
    """Draws classes, and images of each without replacement: their places `[ways, each]`.

    Args:
      key: of the draw.
      start: place of each class's first image, `[classes]`.
      count: images of each class, `[classes]`.
      ways: classes drawn.
      each: images of a class.
      most: the largest count.
    """
    key_class, key_image = jax.random.split(key)

    def members(key, one):
        scores = jax.random.uniform(key, (most,))
        order = jnp.argsort(jnp.where(jnp.arange(most) < count[one], scores, 2.0))
        return start[one] + order[:each]

    return jax.vmap(members)(jax.random.split(key_image, ways), distinct(key_class, len(start), ways))


def distinct(key: jax.Array, total: int, count: int) -> jax.Array:
    """`count` different numbers below `total` in random order, all orders equally likely: int32 `[count]`.

    It takes time by `count`, while `jax.random.choice` sorts all `total`, which for thousands of classes costs more than the rest
    of an episode.

    References:
      Floyd's algorithm in Bentley, Floyd, Programming Pearls: A Sample of Brilliance, Communications of the ACM, 1987.
    """
    key_draw, key_order = jax.random.split(key)
    highest = jnp.arange(total - count, total, dtype=jnp.int32)
    draws = jax.random.randint(key_draw, (count,), 0, highest + 1, jnp.int32)

    def take(number, chosen):
        taken = (chosen == draws[number]).any()
        return chosen.at[number].set(jnp.where(taken, highest[number], draws[number]))

    chosen = jax.lax.fori_loop(0, count, take, jnp.full(count, -1, jnp.int32))
    return jax.random.permutation(key_order, chosen)


def _check(images: Images, ways: int, shots: int, queries: int) -> None:
    for name, number in {"ways": ways, "shots": shots, "queries": queries}.items():
        if number < 1:
            raise ValueError(f"episodes: {name} must be at least 1, got {number}.")
    if ways > len(images.names):
        raise ValueError(
            f"episodes: ways is {ways}, but the image set has {len(images.names)} classes. Usual cause: a small validation split."
        )
    fewest = int(np.argmin(images.count))
    if shots + queries > images.count[fewest]:
        raise ValueError(
            f"episodes: shots + queries is {shots} + {queries} = {shots + queries}, but class {images.names[fewest]!r} has "
            f"{images.count[fewest]} images. Lower queries, or leave out classes with few images."
        )
