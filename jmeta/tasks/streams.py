"""Sequences of one class beside a remember set of all classes, and whole labelled sets: what zapping, OML and ANML learn from.

References:
  Javed, White, Meta-Learning Representations for Continual Learning, NeurIPS 2019 (https://arxiv.org/abs/1905.12588), section 4.
  Frati, Traft, Clune, Cheney, Reset It and Forget It, ECAI 2024 (https://arxiv.org/abs/2310.07996), algorithm 1.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jmeta.core import Batch, Task, Tasks
from jmeta.tasks.episodes import distinct
from jmeta.tasks.images import Images


def streams(images: Images, shots: int = 20, remember: int = 64) -> Tasks:
    """One class at a time: a sequence of its images, then these and images of any class together.

    Args:
      images: the image set; its classes keep their numbers, so that a head needs one output for each.
      shots: length of the sequence. Where a class has fewer images, all of that class's are drawn with replacement.
      remember: images drawn from the whole set, without replacement; the class of the sequence may be among them.

    Returns:
      Tasks whose support set is the sequence, x float32 `[shots, height, width, channels]` in [0, 1] and y int32 `[shots]`, all the
      same, and whose query set is the sequence followed by the remember set, `[shots + remember, ...]`.

    Raises:
      ValueError: shots is below 1, or remember below 0 or above the number of images.
    """
    if shots < 1:
        raise ValueError(f"streams: shots must be at least 1, got {shots}.")
    if not 0 <= remember <= len(images.pixels):
        raise ValueError(f"streams: remember must be from 0 to {len(images.pixels)}, the images there are, got {remember}.")
    data = jax.tree.map(jnp.asarray, (images.pixels, labels_of(images), images.start, images.count))
    most = int(images.count.max())

    def sample(key, data):
        pixels, labels, start, count = data
        key_class, key_order, key_again, key_remember = jax.random.split(key, 4)
        one = jax.random.randint(key_class, (), 0, len(start))
        scores = jnp.where(jnp.arange(most) < count[one], jax.random.uniform(key_order, (most,)), 2.0)
        without = jnp.argsort(scores)[jnp.arange(shots) % most]
        again = jax.random.randint(key_again, (shots,), 0, count[one])
        sequence = start[one] + jnp.where(count[one] >= shots, without, again)
        chosen = jnp.concatenate([sequence, distinct(key_remember, len(labels), remember)]) if remember else sequence
        whole = Batch(pixels[chosen].astype(jnp.float32) / 255, labels[chosen])
        return Task(jax.tree.map(lambda leaf: leaf[:shots], whole), whole)

    return Tasks(sample, data, classes=len(images.names))


def labelled(images: Images) -> Tasks:
    """All images with their classes' numbers, as one task: what `jmeta.supervised` draws batches from.

    Returns:
      Tasks whose support and query set are the whole set, x uint8 `[N, height, width, channels]` and y int32 `[N]`.
    """
    whole = Batch(jnp.asarray(images.pixels), jnp.asarray(labels_of(images)))
    return Tasks(lambda key, data: Task(data, data), whole, classes=len(images.names))


def labels_of(images: Images) -> np.ndarray:
    """The class number of each image, int32 `[N]`."""
    return np.repeat(np.arange(len(images.names), dtype=np.int32), images.count)
