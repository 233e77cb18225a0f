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

    def _flat(self) -> np.ndarray:
        return np.concatenate(list(self.chosen.values()), -1)

    @property
    def overlap(self) -> np.ndarray:
        """Share of its channels that a task of one group has in common with one of another, `[groups, groups]`.

        On the diagonal the two tasks are of one group, but have no class in common.
        """
        flat = self._flat().astype(float)
        return np.einsum("adc,bdc->ab", flat[:, :, 0], flat[:, :, 2]) / flat[:, :, 0].sum(-1).mean() / flat.shape[1]

    @property
    def again(self) -> np.ndarray:
        """The same for two tasks of the same classes, with other drawings, `[groups]`."""
        flat = self._flat()
        return (flat[:, :, 0] & flat[:, :, 1]).sum((1, 2)) / flat[:, :, 0].sum((1, 2))

    @property
    def chance(self) -> float:
        """The share that two choices of as many channels of each layer have in common by chance."""
        sizes = [each[:, :, 0].sum(-1).mean() for each in self.chosen.values()]
        common = [size**2 / each.shape[-1] for size, each in zip(sizes, self.chosen.values(), strict=True)]
        return float(sum(common) / sum(sizes))

    def figures(self) -> dict[str, Any]:
        """Means over groups and the share by chance, for JSON.

        The 95 % intervals are Student's t over groups. A pair of groups concerns both, so for them it is taken over jackknife
        pseudo-values (Efron, Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11).
        """
        overlap, count = self.overlap, len(self.groups)
        within = np.diag(overlap)
        apart = (overlap + overlap.T - 2 * np.diag(within)).sum(1) / (2 * (count - 1))  # of each group from the others
        across = (2 * (count - 1) * apart - count * apart.mean()) / (count - 2)
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
        draw.routing(self.groups, often, sizes, self.overlap, self.figures(), Path(path))


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
    pairs: tuple[tuple[str, str], ...] | None = None,
) -> Routing:
    """Which channels the adapted networks of tasks choose.

    These are the channels of the largest scales after all inner steps: where="forward" predicts with them, where="update" would
    train them next. A rule of `refresh="task"` chooses before it adapts: there all tasks have what `jmeta.channels` says of theta.

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
      pairs: as the rule's.

    Returns:
      A `Routing`; print it.

    Raises:
      ValueError: fewer than three groups are large enough, a class has fewer than `2 * shots` images, a number is below 1, the
        network has fewer outputs than ways, or keep, score, per or pairs are none that `jmeta.channels` takes.
    """
    for name, value in {"ways": ways, "shots": shots, "draws": draws}.items():
        if value < 1:
            raise ValueError(f"routing: {name} must be at least 1, got {value}.")
    groups = _groups(images, ways, shots)
    _check(learner, theta, images, ways, shots, lambda params: channels(params, keep, score=score, per=per, pairs=pairs))
    key_draw, key_learn = jax.random.split(key)
    rng = np.random.default_rng(np.asarray(jax.random.bits(key_draw, (4,))))
    rows = np.stack([_three(rng, images, own, ways, shots) for own in groups.values() for _ in range(draws)])
    rows = rows.reshape(-1, ways, shots)
    program = learner.adapt, keep, score, per, pairs
    chosen = jax.device_get(_chosen(*program, theta, images.pixels, jax.random.split(key_learn, len(rows)), rows))
    return Routing(tuple(groups), {name: each.reshape(len(groups), draws, 3, -1) for name, each in chosen.items()})


def _check(learner: MetaLearner, theta: Theta, images: Images, ways: int, shots: int, choose: Any) -> None:
    """Refuses what would be found within a compiled program, or not at all."""
    x = jax.ShapeDtypeStruct((ways * shots, *images.pixels.shape[1:]), jnp.float32)
    support = Batch(x, jax.ShapeDtypeStruct((ways * shots,), jnp.int32))
    phi = jax.eval_shape(learner.adapt, jax.random.key(0), theta, support)
    outputs = jax.eval_shape(learner.predict, phi, x).shape[-1]
    if outputs < ways:
        raise ValueError(
            f"routing: ways is {ways}, but the network has {outputs} outputs. Usual cause: one trained for fewer classes."
        )
    jax.eval_shape(choose, phi.params)


@functools.partial(jax.jit, static_argnums=range(5))
def _chosen(adapt, keep, score, per, pairs, theta, pixels, keys, rows):
    """What the tasks of these rows of images `[tasks, ways, shots]` choose, `{normalisation: bool[tasks, C]}`."""
    y = jnp.repeat(jnp.arange(rows.shape[1]), rows.shape[2])

    def one(key_and_rows):
        support = pixels[key_and_rows[1].reshape(-1)].astype(jnp.float32) / 255
        return channels(adapt(key_and_rows[0], theta, Batch(support, y)).params, keep, score=score, per=per, pairs=pairs)

    return jax.lax.map(one, (keys, rows))


def _groups(images: Images, ways: int, shots: int) -> dict[str, np.ndarray]:
    """The classes of each group that is large enough."""
    group = np.array([name.rpartition("/")[0] for name in images.names])
    found = {str(name): np.flatnonzero(group == name) for name in np.unique(group) if name}
    large = {name: own for name, own in found.items() if len(own) >= 2 * ways}
    if len(large) < 3:
        sizes = ", ".join(f"{name} {len(own)}" for name, own in found.items()) or "none"
        raise ValueError(
            f"routing: images must have three groups of at least 2 * ways = {2 * ways} classes, got {sizes}. Usual cause: names "
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
    elsewhere = np.stack([images.start[each] + rng.permutation(images.count[each])[:shots] for each in others])
    return np.stack([drawn[:, :shots], drawn[:, shots:], elsewhere])
