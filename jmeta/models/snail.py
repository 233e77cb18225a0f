"""SNAIL's blocks, on sequences and on one more element at the end of a sequence that is known; and its network for images.

    dense       x -> concat(x, tanh(xf) sigmoid(xg)),  xf, xg = causal convolutions of x with kernel 2 and dilation R
    temporal    dense blocks of dilations R0, 2 R0, 4 R0, ..., ceil(log2 T) of them
    attention   x -> concat(x, softmax(q k' / sqrt(K)) v), over the keys up to each place

What is known of a sequence is computed once, however many different elements are asked about behind it: a causal block's output at
the end depends on the sequence's elements alone, not on what else is asked.

References:
  Mishra, Rohaninejad, Chen, Abbeel, A Simple Neural Attentive Meta-Learner, ICLR 2018 (https://arxiv.org/abs/1707.03141), sections
  3 and 5.1.

Differs from the paper in: the embedding's batch normalisation takes its statistics of one episode's support set or queries.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmeta.core import Model, memoise
from jmeta.models.cells import init_kernel

FAR = -1e30  # a logit that weighs nothing, also where it is all there is


def init_dense(key: jax.Array, inputs: int, features: int) -> dict[str, Any]:
    """The parameters of a dense block that adds so many features."""
    keys = jax.random.split(key)
    return {name: _affine(own, (2, inputs, features)) for name, own in zip(("filter", "gate"), keys, strict=True)}


def _affine(key: jax.Array, shape: tuple[int, ...]) -> dict[str, jax.Array]:
    return {"kernel": init_kernel(key, shape), "bias": jnp.zeros(shape[-1])}


def dense_block(params: Any, x: jax.Array, dilation: int, mask: jax.Array | None = None) -> jax.Array:
    """Adds gated features of each element and of the one `dilation` places before it.

    Args:
      params: of `init_dense`.
      x: a sequence `[T, C]`.
      dilation: how far back it looks.
      mask: `[T]`, 0 for elements in front that are padding: they look as what lies before the sequence does.

    Returns:
      `[T, C + D]`.
    """
    seen = x if mask is None else x * mask[:, None]
    past = jnp.concatenate([jnp.zeros_like(seen[:dilation]), seen[:-dilation]])[: len(x)]
    return _gated(params, past, x)


def _gated(params: Any, past: jax.Array, now: jax.Array) -> jax.Array:
    """The block's output where the convolutions see these two."""
    parts = {name: past @ own["kernel"][0] + now @ own["kernel"][1] + own["bias"] for name, own in params.items()}
    return jnp.concatenate([now, jnp.tanh(parts["filter"]) * jax.nn.sigmoid(parts["gate"])], -1)


def dilations(length: int, first: int = 2) -> list[int]:
    """Those of a temporal block for sequences of that length.

    >>> dilations(26)
    [2, 4, 8, 16, 32]
    """
    return [first * 2**number for number in range(math.ceil(math.log2(length)))]


def init_attention(key: jax.Array, inputs: int, keys: int, values: int) -> dict[str, Any]:
    """The parameters of an attention block."""
    sizes = {"query": keys, "key": keys, "value": values}
    drawn = jax.random.split(key, 3)
    return {name: _affine(own, (inputs, size)) for own, (name, size) in zip(drawn, sizes.items(), strict=True)}


def attention_block(params: Any, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Adds to each element what it reads from itself and those before it.

    Args:
      params: of `init_attention`.
      x: a sequence `[T, C]`.
      mask: `[T]`, 0 for elements that are padding, which are not read.

    Returns:
      `[T, C + V]`.
    """
    places = jnp.arange(len(x))
    open_to = places[:, None] >= places
    if mask is not None:
        open_to = open_to & (mask > 0)
    query, key, value = (_apply(params[name], x) for name in ("query", "key", "value"))
    logits = jnp.where(open_to, query @ key.T / math.sqrt(key.shape[-1]), FAR)
    return jnp.concatenate([x, jax.nn.softmax(logits) @ value], -1)


def _apply(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"]


class Sequential(NamedTuple):
    """A network for sequences of labelled examples.

    Attributes:
      init: `(key) -> params`.
      remember: `(params, x[T, ...], y[T], mask[T]) -> known`, the work on the examples, of which those whose mask is 0 stand first.
      answer: `(params, known, x[N, ...]) -> logits [N, ways]`, each as if it alone followed the examples.
      most: examples that it is made for.
      ways: classes.
    """

    init: Callable[[jax.Array], Any]
    remember: Callable[..., Any]
    answer: Callable[..., jax.Array]
    most: int
    ways: int


@memoise
def snail_net(
    embedding: Model,
    ways: int,
    *,
    features: int = 64,
    most_shots: int = 5,
    first_dilation: int = 2,
    attention: tuple[tuple[int, int], ...] = ((64, 32), (256, 128), (512, 256)),
    filters: int = 128,
) -> Sequential:
    """Attention blocks with temporal blocks between them, behind an embedding of each image.

    Args:
      embedding: from images `[N, ...]` to features `[N, D]`: `jm.conv4(64, pool=True, norm="support")` for Omniglot,
        `jm.resnet12(384, widths=(64, 96, 128, 256))` for 84 x 84 in colour.
      ways: classes of an episode.
      features: that the embedding makes of an image.
      most_shots: of the episodes; the temporal blocks look back over `ways * most_shots + 1` places.
      first_dilation: of the temporal blocks. With the paper's 2 they see only every other place; 1 sees all.
      attention: key and value sizes of the attention blocks.
      filters: that each dense block adds.

    Returns:
      A `Sequential`, for `jmeta.snail`.

    Raises:
      ValueError: a number is below 1, or there is no attention block.
    """
    numbers = {"ways": ways, "features": features, "most_shots": most_shots, "first_dilation": first_dilation, "filters": filters}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"snail_net: {name} must be at least 1, got {value}.")
    if not attention or min(min(sizes) for sizes in attention) < 1:
        raise ValueError(f"snail_net: attention must name at least one pair of sizes, each at least 1, got {attention}.")
    most = ways * most_shots
    steps = dilations(most + 1, first_dilation)

    @jax.jit
    def init(key):
        key_embedding, key_head, *keys = jax.random.split(key, 2 + 2 * len(attention))
        params, width = {"embedding": embedding.init(key_embedding)}, features + ways
        for number, sizes in enumerate(attention, 1):
            params[f"attention{number}"] = init_attention(keys[2 * number - 2], width, *sizes)
            width += sizes[1]
            if number < len(attention):
                each = jax.random.split(keys[2 * number - 1], len(steps))
                params[f"temporal{number}"] = {
                    f"dense{place}": init_dense(own, width + place * filters, filters) for place, own in enumerate(each)
                }
                width += len(steps) * filters
        return {**params, "head": _affine(key_head, (width, ways))}

    def embed(params, x, stats):
        found = embedding.apply(params["embedding"], x) if stats is None else embedding.apply(params["embedding"], x, stats)
        if found.shape[-1] != features:
            raise ValueError(f"snail_net: features is {features}, but the embedding makes {found.shape[-1]} of an image.")
        return found

    def remember(params, x, y, mask):
        stats = None if embedding.stats is None else embedding.stats(params["embedding"], x)
        s = jnp.concatenate([embed(params, x, stats), jax.nn.one_hot(y, ways)], -1)
        known = {"stats": stats, "mask": mask}
        for number in range(1, len(attention) + 1):
            own = params[f"attention{number}"]
            known[f"attention{number}"] = _apply(own["key"], s), _apply(own["value"], s)
            s = attention_block(own, s, mask)
            for place, dilation in enumerate(steps if number < len(attention) else ()):
                seen = s * mask[:, None]
                known[f"temporal{number}/{place}"] = seen[-dilation] if dilation <= len(s) else jnp.zeros_like(s[0])
                s = dense_block(params[f"temporal{number}"][f"dense{place}"], s, dilation, mask)
        return known

    def answer(params, known, x):
        q = embed(params, x, known["stats"])
        q = jnp.concatenate([q, jnp.zeros((len(q), ways), q.dtype)], -1)
        for number in range(1, len(attention) + 1):
            keys, values = known[f"attention{number}"]
            q = _read(params[f"attention{number}"], keys, values, known["mask"], q)
            for place in range(len(steps) if number < len(attention) else 0):
                past = jnp.broadcast_to(known[f"temporal{number}/{place}"], q.shape)
                q = _gated(params[f"temporal{number}"][f"dense{place}"], past, q)
        return _apply(params["head"], q)

    return Sequential(init, remember, answer, most, ways)


def _read(params: Any, keys: jax.Array, values: jax.Array, mask: jax.Array, q: jax.Array) -> jax.Array:
    """An attention block at elements `q[N, C]` that each alone follow a sequence of these keys and values."""
    query, key, value = (_apply(params[name], q) for name in ("query", "key", "value"))
    behind = jnp.where(mask > 0, query @ keys.T, FAR * math.sqrt(keys.shape[-1]))
    logits = jnp.concatenate([behind, (query * key).sum(-1, keepdims=True)], -1) / math.sqrt(keys.shape[-1])
    weights = jax.nn.softmax(logits)
    return jnp.concatenate([q, weights[:, :-1] @ values + weights[:, -1:] * value], -1)
