"""Learners that compare instead of adapting: what is learned from the support set is where its classes lie in a feature space.

    protonet   logits = -distance(f(x), mean of f over the class)
    matching   logits = log sum over the class of softmax_i(cosine(f(x), f(x_i)))
    ridge      logits = scale f(x) W + shift,   W = F' (F F' + lambda I)^-1 Y

References:
  Snell, Swersky, Zemel, Prototypical Networks for Few-shot Learning, NeurIPS 2017 (https://arxiv.org/abs/1703.05175), equation 2.
  Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra, Matching Networks for One Shot Learning, NeurIPS 2016
  (https://arxiv.org/abs/1606.04080), equations 1 and 2, without the embeddings that look at the whole support set.
  Bertinetto, Henriques, Torr, Vedaldi, Meta-learning with differentiable closed-form solvers, ICLR 2019
  (https://arxiv.org/abs/1805.08136): R2D2.

Differs from the papers in: with norm "batch", support set and queries are normalised each by their own statistics; the papers'
codes put both into one batch.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jmeta.core import Batch, MetaLearner, Model, Theta, memoise, query_grad
from jmeta.losses import xent

ABSENT = -1e9  # the logit of a class that has no example


class Compared(NamedTuple):
    """What such a learner takes from a support set.

    Attributes:
      theta: as it was.
      known: of each class or example, or weights; what the learner's own prediction needs.
      stats: normalisation statistics of the support set, for norm "support".
    """

    theta: Theta
    known: Any
    stats: Any


def _comparing(model: Model, loss: Callable, learn: Callable, judge: Callable, init_hyper: Any = ()) -> MetaLearner:
    """A learner of `learn(hyper, features, batch) -> known` and `judge(hyper, known, features) -> logits`."""

    def embed(theta, x, stats=None):
        return model.apply(theta.params, x) if stats is None else model.apply(theta.params, x, stats)

    def init(key):
        return Theta(model.init(key), jax.tree.map(jnp.asarray, init_hyper))

    def adapt(key, theta, support):
        stats = None if model.stats is None else model.stats(theta.params, support.x)
        return Compared(theta, learn(theta.hyper, embed(theta, support.x), support), stats)

    def predict(phi, x):
        return judge(phi.theta.hyper, phi.known, embed(phi.theta, x, phi.stats))

    def curve(key, theta, task):
        return predict(adapt(key, theta, task.support), task.query.x)[None]

    return MetaLearner(init, adapt, predict, curve, query_grad(adapt, predict, loss))


def _members(support: Batch, ways: int) -> jax.Array:
    """Which class each example is of, `[N, ways]`; zeros where it is padding."""
    members = jax.nn.one_hot(support.y, ways)
    return members if support.mask is None else members * support.mask[:, None]


def _known(members: jax.Array, logits: jax.Array) -> jax.Array:
    """Logits of queries, those of classes without an example so low that none is taken for one."""
    return jnp.where(members.sum(0) > 0, logits, ABSENT)


def _check_ways(name: str, ways: int) -> None:
    if not isinstance(ways, int) or ways < 1:
        raise ValueError(f"{name}: ways must be an int of at least 1, got {ways!r}.")


@memoise
def protonet(
    model: Model, loss: Callable[..., jax.Array] = xent, *, ways: int, distance: Literal["euclidean", "cosine"] = "euclidean"
) -> MetaLearner:
    """Prototypical networks. Nothing is adapted: there are no inner steps.

    Args:
      model: the embedding, from `[N, ...]` to features `[N, D]`, such as `jm.conv4(None)`.
      loss: of the queries' logits.
      ways: classes of an episode. The paper trains with more of them than it tests with: theta serves learners of any.
      distance: squared Euclidean, or one minus the cosine.

    Returns:
      A meta-learner.

    Raises:
      ValueError: ways is below 1, or the distance unknown.

    >>> from jmeta.models.backbones import conv4
    >>> trained, tested = (protonet(conv4(None), ways=ways) for ways in (60, 5))
    """
    _check_ways("protonet", ways)
    if distance not in ("euclidean", "cosine"):
        raise ValueError(f"protonet: distance must be 'euclidean' or 'cosine', got {distance!r}.")

    def learn(hyper, features, support):
        members = _members(support, ways)
        return members.T @ features / jnp.maximum(members.sum(0), 1)[:, None], members

    def judge(hyper, known, features):
        prototypes, members = known
        if distance == "cosine":
            return _known(members, _cosines(features, prototypes) - 1)
        return _known(members, -((features[:, None] - prototypes) ** 2).sum(-1))

    return _comparing(model, loss, learn, judge)


def _cosines(one: jax.Array, other: jax.Array) -> jax.Array:
    """Of each row with each other row, `[N, M]`."""

    def unit(rows):
        return rows * jax.lax.rsqrt((rows**2).sum(-1, keepdims=True) + 1e-12)

    return unit(one) @ unit(other).T


@memoise
def matching(model: Model, loss: Callable[..., jax.Array] = xent, *, ways: int, temperature: float = 1.0) -> MetaLearner:
    """Matching networks: each query attends to the support examples. Nothing is adapted: there are no inner steps.

    Args:
      model: the embedding, from `[N, ...]` to features `[N, D]`, such as `jm.conv4(None)`.
      loss: of the queries' logits, which are log-probabilities.
      ways: classes of an episode.
      temperature: that cosines are divided by; 1 in the paper.

    Raises:
      ValueError: ways is below 1, or the temperature not above 0.
    """
    _check_ways("matching", ways)
    if temperature <= 0:
        raise ValueError(f"matching: temperature must be above 0, got {temperature}.")

    def learn(hyper, features, support):
        return features, _members(support, ways)

    def judge(hyper, known, features):
        examples, members = known
        there = jnp.where(members.sum(1) > 0, 0.0, -jnp.inf)
        attention = jax.nn.softmax(_cosines(features, examples) / temperature + there)
        return jnp.log(attention @ members + 1e-12)

    return _comparing(model, loss, learn, judge)


@memoise
def ridge(model: Model, loss: Callable[..., jax.Array] = xent, *, ways: int, strength: float = 1.0) -> MetaLearner:
    """R2D2: the head is solved for by ridge regression. Nothing else is adapted: there are no inner steps.

    Args:
      model: the embedding, from `[N, ...]` to features `[N, D]`, such as `jm.conv4(None)`.
      loss: of the queries' logits.
      ways: classes of an episode.
      strength: lambda to start from; it is meta-learned, as are the scale and the shift of logits.

    Returns:
      A meta-learner whose `theta.hyper` is `{"ridge": {"log_strength", "scale", "shift"}}`.

    Raises:
      ValueError: ways is below 1, or the strength not above 0.
    """
    _check_ways("ridge", ways)
    if strength <= 0:
        raise ValueError(f"ridge: strength must be above 0, got {strength}.")

    def learn(hyper, features, support):
        features = _with_ones(features)
        if support.mask is not None:
            features = features * support.mask[:, None]
        gram = features @ features.T + jnp.exp(hyper["ridge"]["log_strength"]) * jnp.eye(len(features))
        members = _members(support, ways)
        return features.T @ jax.scipy.linalg.solve(gram, members, assume_a="pos"), members

    def judge(hyper, known, features):
        weights, members = known
        return _known(members, hyper["ridge"]["scale"] * (_with_ones(features) @ weights) + hyper["ridge"]["shift"])

    start = {"ridge": {"log_strength": jnp.log(strength), "scale": 1.0, "shift": 0.0}}
    return _comparing(model, loss, learn, judge, start)


def _with_ones(features: jax.Array) -> jax.Array:
    return jnp.concatenate([features, jnp.ones_like(features[:, :1])], -1)
