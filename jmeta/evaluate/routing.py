"""Are the parts of a network that `jmeta.route` gives to tasks specialised? Which channels tasks choose, and how far they agree.

Three tasks are drawn for each group of classes, such as an alphabet, again and again: some classes, other drawings of the same
classes, and other classes of the group. Tasks agree by the share of their channels that they have in common.

References:
  Cai et al., Neural Routing in Meta Learning, 2022 (https://arxiv.org/abs/2210.07932): the claim that parts of a network
  specialise. How to measure it is ours.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmeta.core import Batch, MetaLearner, Theta
from jmeta.evaluate.draws import interval
from jmeta.rules.route import Per, Score, channels
from jmeta.tasks.images import Images


class Routing(NamedTuple):
    """What the tasks of several groups chose.

    Attributes:
      groups: their names.
      chosen: for each normalisation bool `[groups, draws, 3, C]`, of some classes, of other drawings of them, of other classes.
    """

    groups: tuple[str, ...]
    chosen: dict[str, np.ndarray]

    @property
    def overlap(self) -> np.ndarray:
        """Share of its channels that a task of one group has in common with one of another, `[groups, groups]`.

        On the diagonal the two tasks are of one group, but have no class in common.
        """
        flat = np.concatenate(list(self.chosen.values()), -1).astype(float)
        return np.einsum("adc,bdc->ab", flat[:, :, 0], flat[:, :, 2]) / flat[:, :, 0].sum(-1).mean() / flat.shape[1]

    @property
    def again(self) -> np.ndarray:
        """The same for two tasks of the same classes, with other drawings, `[groups]`."""
        flat = np.concatenate(list(self.chosen.values()), -1)
        return (flat[:, :, 0] & flat[:, :, 1]).sum((1, 2)) / flat[:, :, 0].sum((1, 2))

    @property
    def chance(self) -> float:
        """The share that two choices of as many channels of each layer have in common by chance."""
        sizes = [each[:, :, 0].sum(-1).mean() for each in self.chosen.values()]
        common = [size**2 / each.shape[-1] for size, each in zip(sizes, self.chosen.values(), strict=True)]
        return float(sum(common) / sum(sizes))

    def figures(self) -> dict[str, Any]:
        """Means over groups with their 95 % intervals by Student's t, and the shares by chance, for JSON."""
        overlap, count = self.overlap, len(self.groups)
        within = np.diag(overlap)
        across = (overlap.sum(0) + overlap.sum(1) - 2 * within) / (2 * (count - 1))
        rows = {
            "same classes": self.again,
            "same group": within,
            "other groups": across,
            "same minus other groups": within - across,
        }
        draws = next(iter(self.chosen.values())).shape[1]
        return {name: interval(each) for name, each in rows.items()} | {"chance": self.chance, "groups": count, "draws": draws}

    def __str__(self) -> str:
        """`channels in common: same classes 0.91 ± 0.01, same group ..., chance 0.50 (20 groups, 20 draws)`."""
        found = self.figures()
        parts = [f"{name} {found[name][0]:.3f} ± {found[name][1]:.3f}" for name in list(found)[:4]]
        about = f"chance {found['chance']:.3f} (95 % intervals over {found['groups']} groups, {found['draws']} draws of each)"
        return f"channels in common: {', '.join(parts)}, {about}"

    def plot(self, path: str | Path) -> None:
        """Draws how often each group chooses each channel, and how far groups agree."""
        from jmeta import plot as draw

        often = np.concatenate([each.mean((1, 2)) for each in self.chosen.values()], -1)
        sizes = {name: each.shape[-1] for name, each in self.chosen.items()}
        draw.routing(self.groups, often, sizes, self.overlap, Path(path))


def routing(
    key: jax.Array,
    learner: MetaLearner,
    theta: Theta,
    images: Images,
    keep: float | tuple[float, ...],
    *,
    ways: int,
    shots: int,
    draws: int = 20,
    score: Score = "abs",
    per: Per = "layer",
) -> Routing:
    """Which channels the adapted networks of tasks choose.

    A rule of `refresh="task"` chooses before it adapts: there all tasks have what `jmeta.channels` says of theta itself.

    Args:
      key: of the tasks and of the learner.
      learner: adapts theta to a task.
      theta: what was meta-learned.
      images: classes named "group/class", as Omniglot's are by alphabet; groups of fewer than `2 * ways` classes are left out.
      keep: as the rule's.
      ways: classes of a task.
      shots: support images of a class.
      draws: of each group.
      score: as the rule's.
      per: as the rule's.

    Returns:
      A `Routing`; print it.

    Raises:
      ValueError: fewer than two groups are large enough, or a class has fewer than `2 * shots` images.
    """
    groups = _groups(images, ways, shots)
    key_draw, key_learn = jax.random.split(key)
    rng = np.random.default_rng(np.asarray(jax.random.bits(key_draw, (4,))))
    rows = np.stack([_three(rng, images, own, ways, shots) for own in groups.values() for _ in range(draws)])
    y = jnp.repeat(jnp.arange(ways), shots)

    @functools.partial(jax.jit, static_argnums=0)
    def choose(adapt, theta, pixels, keys, rows):
        def one(key_and_rows):
            support = pixels[key_and_rows[1]].astype(jnp.float32) / 255
            return channels(adapt(key_and_rows[0], theta, Batch(support, y)).params, keep, score=score, per=per)

        return jax.lax.map(one, (keys, rows))

    rows = rows.reshape(-1, ways * shots)
    chosen = choose(learner.adapt, theta, images.pixels, jax.random.split(key_learn, len(rows)), rows)
    return Routing(
        tuple(groups), {name: np.asarray(each).reshape(len(groups), draws, 3, -1) for name, each in jax.device_get(chosen).items()}
    )


def _groups(images: Images, ways: int, shots: int) -> dict[str, np.ndarray]:
    """The classes of each group that is large enough."""
    group = np.array([name.rpartition("/")[0] for name in images.names])
    found = {str(name): np.flatnonzero(group == name) for name in np.unique(group) if name}
    large = {name: own for name, own in found.items() if len(own) >= 2 * ways}
    if len(large) < 2:
        sizes = ", ".join(f"{name} {len(own)}" for name, own in found.items()) or "none"
        raise ValueError(
            f"routing: images must have two groups of at least 2 * ways = {2 * ways} classes, got {sizes}. Usual cause: names "
            "unlike 'group/class', or a split that parts the groups (of Omniglot's, 'background' keeps alphabets whole)."
        )
    few = min(int(images.count[own].min()) for own in large.values())
    if few < 2 * shots:
        raise ValueError(f"routing: every class must have 2 * shots = {2 * shots} images, got one of {few}.")
    return large


def _three(rng: np.random.Generator, images: Images, own: np.ndarray, ways: int, shots: int) -> np.ndarray:
    """Rows of the images of three tasks, `[3, ways, shots]`."""
    some, others = rng.permutation(own)[: 2 * ways].reshape(2, ways)
    drawn = np.stack([images.start[each] + rng.permutation(images.count[each])[: 2 * shots] for each in some])
    else_ = np.stack([images.start[each] + rng.permutation(images.count[each])[:shots] for each in others])
    return np.stack([drawn[:, :shots], drawn[:, shots:], else_])
