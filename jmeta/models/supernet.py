"""Networks of cells: the supernet that holds every architecture of a search space, and the plain network of one of them.

A stem, then cells, of which some halve the map; each sees the two before it and hands on its nodes, concatenated; the average of
the last map and a linear head.

References:
  Elsken, Staffler, Metzen, Hutter, Meta-Learning of Neural Architectures for Few-Shot Learning, CVPR 2020
  (https://arxiv.org/abs/1911.11090): the space, its sizes and its derived networks.
  Liu, Simonyan, Yang, DARTS: Differentiable Architecture Search, ICLR 2019 (https://arxiv.org/abs/1806.09055).

Differs from the papers in: maps of an odd side are padded where they are halved; no drop-path.
"""

import numbers
from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmeta.architecture import (
    GONE,
    KINDS,
    PRIMITIVES,
    Genotype,
    Space,
    alpha_of,
    check_alpha,
    check_finite,
    check_genotype,
    check_temperature,
    check_threshold,
    full_space,
    init_alpha,
    mixture,
)
from jmeta.core import MetaLearner, Model, Params, Theta, memoise
from jmeta.models.cell_network import Edge, Edges, Layout, apply_network, check_rows, init_network, ordered, stacked
from jmeta.models.cells import CellNorm

REDUCTIONS = (1, 3)


@memoise
def supernet(
    ways: int,
    *,
    cells: int = 4,
    nodes: int = 3,
    channels: int = 28,
    reductions: tuple[int, ...] | None = None,
    shape: tuple[int, int, int] = (28, 28, 1),
    norm: CellNorm = "batch",
    space: Space | None = None,
) -> Model:
    """The network of all architectures, whose operations are weighed by `alpha`.

    Args:
      ways: classes of an episode.
      cells: how many.
      nodes: of a cell.
      channels: of a node.
      reductions: numbers of the cells that halve the map, from 0; None for 1 and 3, as far as they are there.
      shape: height, width and channels of an image.
      norm: by what operations are normalised; they have no scales, but the stem has.
      space: operations that are left, after some were pruned for good (`jmeta.shrink`); all if None.

    Returns:
      A model with layers "alpha" and "w" (the architecture's logits and the weights), from `[N, height, width, channels]` to logits
      `[N, ways]`. Where a rule such as `jmeta.mix` has put the weights of operations under "mixture", those count; otherwise the
      softmax of the logits.

    Raises:
      ValueError: a size is below 1, a reduction is no cell, or the space has other nodes.

    >>> model = supernet(5, cells=2, channels=4)
    >>> model.apply(model.init(jax.random.key(0)), jnp.zeros((2, 28, 28, 1))).shape
    (2, 5)
    """
    space = full_space(nodes) if space is None else space
    sizes = {"ways": ways, "cells": cells, "nodes": nodes, "channels": channels}
    layout = Layout(cells, _check("supernet", sizes, reductions, shape, norm), _edges(space, nodes), norm)

    @jax.jit  # one by one, its many small draws take seconds
    def init(key):
        key_alpha, key_weights = jax.random.split(key)
        alpha = _without(init_alpha(key_alpha, nodes), space)
        return {"alpha": alpha, "w": init_network(key_weights, layout, ways, channels, shape[2], affine=False)}

    def apply(params, x, stats=None):
        check_alpha("supernet", params["alpha"], nodes)
        weights = params["mixture"] if "mixture" in params else mixture(params["alpha"])
        return apply_network(params["w"], x, layout, {kind: _as_array(weights[kind]) for kind in KINDS})

    return Model(init, apply, ("alpha", "w"))


@memoise
def derive(
    genotype: Genotype,
    ways: int,
    *,
    cells: int = 4,
    channels: int = 28,
    reductions: tuple[int, ...] | None = None,
    shape: tuple[int, int, int] = (28, 28, 1),
    norm: CellNorm = "batch",
) -> Model:
    """The plain network of one architecture, to be trained as any other.

    Args:
      genotype: of `jmeta.genotype` or a file.
      ways: classes of an episode.
      cells: how many; may be more than were searched with.
      channels: of a node; likewise.
      reductions: see `supernet`.
      shape: height, width and channels of an image.
      norm: by what operations are normalised, with scales and biases.

    Returns:
      A model with layers stem, cell0, cell1, ... and head, from `[N, height, width, channels]` to logits `[N, ways]`.

    Raises:
      ValueError: unknown operations, inputs that cannot be, a size below 1, or a reduction that is no cell.

    >>> from jmeta.architecture import PUBLISHED
    >>> model = derive(PUBLISHED["metanas-mini-imagenet-v2"], 5, shape=(84, 84, 3))
    >>> sum(leaf.size for leaf in jax.tree.leaves(model.init(jax.random.key(0))))
    82101
    """
    check_genotype("derive", genotype)
    halving = _check("derive", {"ways": ways, "cells": cells, "channels": channels}, reductions, shape, norm)
    layout = Layout(cells, halving, _chosen(genotype), norm)
    weights = {kind: _ones(edges, len(genotype.normal)) for kind, edges in layout.edges.items()}

    @jax.jit  # likewise
    def init(key):
        return init_network(key, layout, ways, channels, shape[2], affine=True)

    def apply(params, x, stats=None):
        return apply_network(params, x, layout, weights)

    return Model(init, apply, ("stem", *(f"cell{number}" for number in range(cells)), "head"))


def discretise(params: Params, genotype: Genotype, *, space: Space | None = None) -> Params:
    """The parameters of a derived network with the weights that a supernet has for the same operations.

    Args:
      params: of the supernet.
      genotype: which of its operations are kept.
      space: of the supernet, if some of its operations were pruned for good.

    Returns:
      Parameters of `derive(genotype, ...)` with the supernet's sizes, whose scales are 1 and biases 0 where the supernet has none.

    Raises:
      ValueError: these are not the parameters of a supernet, or it has no such operation.
    """
    nodes = len(_alpha_of_whole("discretise", params)["normal"])
    check_genotype("discretise", genotype)
    if len(genotype.normal) != nodes:
        raise ValueError(f"discretise: the genotype has {len(genotype.normal)} nodes a cell, the supernet {nodes}.")
    own = params["w"]
    cells = sum(name.startswith("cell") for name in own)
    halving = tuple(number for number in range(cells) if "reduce" in own[f"cell{number}"])
    channels, colours = own["cell0"]["input1"]["kernel"].shape[-1], own["stem"]["conv"]["kernel"].shape[2]
    layout = Layout(cells, halving, _chosen(genotype), "batch")
    like = init_network(jax.random.key(0), layout, own["head"]["bias"].size, channels, colours, affine=True)
    return _moved("discretise", own, like, _edges(space or full_space(nodes), nodes), _chosen(genotype))


def promising(params: Params, *, threshold: float = 0.01, temperature: float = 0.1) -> Space:
    """The operations of a supernet that are worth keeping: those whose weight at a temperature is at least the threshold.

    Args:
      params: of the supernet, or its alphas.
      threshold: below 1/7, so that every input keeps one.
      temperature: the last one of `jmeta.anneal`.

    Raises:
      ValueError: the threshold is not from 0 to below 1/7, the temperature is not above 0, or the alphas are of another search
        space or not finite.
    """
    if not 0 <= threshold < 1 / len(PRIMITIVES):
        raise ValueError(f"promising: threshold must be from 0 to below 1/{len(PRIMITIVES)}, got {threshold}.")
    check_temperature("promising", temperature)
    alpha = alpha_of("promising", params)
    check_finite("promising", alpha)

    def left(logits):
        kept = (jax.nn.softmax(logits / temperature) >= threshold) & (logits > GONE / 2)
        return tuple(tuple(op for op, keep in zip(PRIMITIVES, row, strict=True) if keep) for row in np.asarray(kept))

    return Space(*(tuple(left(alpha[kind][f"node{node}"]["ops"]) for node in range(len(alpha[kind]))) for kind in KINDS))


def shrink(
    theta: Theta,
    learner: MetaLearner,
    space: Space,
    *,
    before: Space | None = None,
    outer: optax.GradientTransformation | None = None,
    state: Any = None,
) -> Any:
    """What was meta-learned, for a supernet from which operations were pruned for good.

    Args:
      theta: of the larger one.
      learner: that of `supernet(..., space=space)`, with the rule and options that theta was trained with. What is gone has
        alphas of -1e9, which steps of Adam leave where they are; plain gradient descent with weight decay wears them off.
      space: the operations that are left, for instance `promising(theta.params)`.
      before: the space of the larger one; all operations if None.
      outer: the outer optimiser, if its state goes along.
      state: that state, `Fit.state`.

    Returns:
      A theta of `learner`, to go on from in another call of `jmeta.fit`; the state of an inner optimiser is taken over as well.
      With `outer`, `(theta, state)`.

    Raises:
      ValueError: the learner is of other sizes or of another space, the space holds operations that were gone before, or one of
        `outer` and `state` is given without the other.
    """
    if (outer is None) != (state is None):
        raise ValueError(f"shrink: outer and state go together; got {'state' if outer is None else 'outer'} alone.")
    nodes = len(space.normal)
    old, new = _edges(before or full_space(nodes), nodes), _edges(space, nodes)
    like = learner.init(jax.random.key(0))
    _check_like(theta, like, space)
    small = _moved("shrink", theta, like, old, new)
    small = small._replace(params={**small.params, "alpha": _without(small.params["alpha"], space)})
    return small if outer is None else (small, _moved("shrink", state, outer.init(like._replace(memory=())), old, new))


def sparse_size(params: Params, *, temperature: float, threshold: float, space: Space | None = None) -> jax.Array:
    """How many weights of a supernet a task uses: all but those of operations that weigh less than the threshold.

    An operation counts if its own weight and that of some pair with its input reach the threshold, as in the paper's code.

    Args:
      params: of the supernet, as adapted to a task; may be traced.
      temperature: at which the task ends, the last one of `jmeta.anneal`.
      threshold: of soft pruning.
      space: of the supernet, if some of its operations were pruned for good.

    Returns:
      A count, without the alphas.

    Raises:
      ValueError: the alphas are of another search space, the temperature is not above 0, or the threshold is below 0 or so high
        that none of several equal choices is left.
    """
    check_temperature("sparse_size", temperature)
    check_threshold("sparse_size", threshold, _alpha_of_whole("sparse_size", params))
    mixed = mixture(params["alpha"], temperature, threshold)
    total = jnp.array(sum(leaf.size for leaf in jax.tree.leaves(params["w"])))
    for kind, sizes in operation_sizes(params, space=space).items():
        total = total - (sizes * (_as_array(mixed[kind]) == 0)).sum()
    return total


def operation_sizes(params: Params, *, space: Space | None = None) -> dict[str, np.ndarray]:
    """How many weights each operation has, of all cells of a kind: `{kind: [nodes, inputs, operations]}`, 0 where there are none.

    Args:
      params: of a supernet.
      space: of the supernet, if some of its operations were pruned for good.
    """
    nodes = len(params["alpha"]["normal"])
    edges = _edges(space or full_space(nodes), nodes)
    sizes = {kind: np.zeros((nodes, nodes + 1, len(PRIMITIVES)), np.int32) for kind in KINDS}
    for cell in params["w"].values():
        for kind in set(KINDS) & set(cell):
            for op, own in cell[kind].items():
                mine = stacked(edges[kind], op)
                check_rows("sparse_size", cell[kind], edges[kind], op)
                each = sum(leaf.size for leaf in jax.tree.leaves(own)) // len(mine)
                for edge in mine:
                    sizes[kind][edge.node, edge.source, PRIMITIVES.index(op)] += each
    return sizes


def _alpha_of_whole(name: str, params: Params) -> Any:
    """The alphas of a supernet's parameters; refuses what has no weights beside them."""
    alpha = alpha_of(name, params)
    if "w" not in params:
        raise ValueError(f"{name}: the parameters have no 'w', but {', '.join(params)}. Usual cause: the alphas alone; give all.")
    return alpha


def _check(
    name: str, sizes: dict[str, int], reductions: tuple[int, ...] | None, shape: tuple[int, ...], norm: str
) -> tuple[int, ...]:
    """The cells that halve the map; refuses what cannot be."""
    for argument, size in sizes.items():
        if not isinstance(size, numbers.Integral):
            raise ValueError(f"{name}: {argument} must be a whole number, got {size!r}.")
        if size < 1 + (argument == "channels"):
            more = ", since a map is halved by two convolutions" if argument == "channels" else ""
            raise ValueError(f"{name}: {argument} must be at least {1 + bool(more)}{more}, got {size}.")
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"{name}: shape must be (height, width, channels), each at least 1, got {shape}.")
    if norm not in get_args(CellNorm):
        raise ValueError(f"{name}: norm must be one of {', '.join(get_args(CellNorm))}, got {norm!r}.")
    if reductions is not None and not isinstance(reductions, Sequence):
        raise ValueError(f"{name}: reductions must be a tuple of numbers of cells, such as (1, 3), got {reductions!r}.")
    cells = sizes["cells"]
    halving = tuple(each for each in REDUCTIONS if each < cells) if reductions is None else tuple(reductions)
    if not set(halving) <= set(range(cells)) or len(set(halving)) < len(halving):
        raise ValueError(
            f"{name}: reductions must be numbers of the {cells} cells, from 0 to {cells - 1} and each once, got {halving}."
        )
    return halving


def _check_like(theta: Theta, like: Theta, space: Space) -> None:
    """Refuses, for `shrink`, a learner whose network has other cells, or operations other than those of the space."""
    for given in (theta, like):
        _alpha_of_whole("shrink", given.params)
    cells = [sum(name.startswith("cell") for name in each.params["w"]) for each in (theta, like)]
    if cells[0] != cells[1]:
        raise ValueError(f"shrink: theta is of {cells[0]} cells, the learner's supernet has {cells[1]}; give it the same sizes.")
    gone = [
        jax.tree.map(lambda leaf: np.asarray(leaf < GONE / 2), each)
        for each in (like.params["alpha"], _without(like.params["alpha"], space))
    ]
    if not all(np.array_equal(*each) for each in zip(*map(jax.tree.leaves, gone), strict=True)):
        raise ValueError(
            "shrink: the learner's supernet has other operations than the space. Usual cause: a learner of another supernet; make "
            "it of supernet(..., space=space)."
        )


def _without(alpha: Any, space: Space) -> Any:
    """Alphas with the logits of operations that are not in the space where they weigh nothing."""

    def one(node, inputs):
        here = np.array([[op in ops for op in PRIMITIVES] for ops in inputs])
        return {**node, "ops": jnp.where(here, node["ops"], GONE)}

    return {
        kind: {f"node{number}": one(alpha[kind][f"node{number}"], inputs) for number, inputs in enumerate(nodes)}
        for kind, nodes in space._asdict().items()
    }


def _chosen(genotype: Genotype) -> Edges:
    """All that a genotype holds."""
    return {
        kind: ordered(kind, ((op, source, node) for node, choices in enumerate(nodes) for op, source in choices))
        for kind, nodes in genotype._asdict().items()
    }


def _edges(space: Space, nodes: int) -> Edges:
    """All that a space holds."""
    wanted = [node + 2 for node in range(nodes)]
    if not isinstance(space, Space):
        raise ValueError(f"supernet: space must be a jm.Space, such as jm.promising gives, got {type(space).__name__}.")
    for kind, own in space._asdict().items():
        found = [len(inputs) for inputs in own]
        unknown = {op for inputs in own for ops in inputs for op in ops} - set(PRIMITIVES)
        if found != wanted or unknown or not all(0 < len(ops) == len(set(ops)) for inputs in own for ops in inputs):
            raise ValueError(
                f"supernet: {nodes} nodes see {wanted} inputs, each with operations of {', '.join(PRIMITIVES)}, once; the space's "
                f"{kind} cells have nodes of {found} inputs{f' and {unknown}' if unknown else ''}."
            )
    return {
        kind: ordered(kind, ((op, u, j) for j, inputs in enumerate(own) for u, ops in enumerate(inputs) for op in ops))
        for kind, own in space._asdict().items()
    }


def _as_array(weights: Any) -> jax.Array:
    """What a mixture weighs, as one array `[nodes, inputs, operations]`."""
    nodes = len(weights)
    each = [weights[f"node{node}"] for node in range(nodes)]
    rows = (own["ops"] * own["inputs"][:, None] for own in each)
    return jnp.stack([jnp.pad(row, ((0, nodes + 1 - len(row)), (0, 0))) for row in rows])


def _ones(edges: tuple[Edge, ...], nodes: int) -> np.ndarray:
    """The same where each operation counts once."""
    weights = np.zeros((nodes, nodes + 1, len(PRIMITIVES)), np.float32)
    for edge in edges:
        weights[edge.node, edge.source, PRIMITIVES.index(edge.op)] = 1
    return weights


def _moved(name: str, old: Any, new: Any, before: Edges, after: Edges) -> Any:
    """The leaves of `new` with the values that `old` has in their places, edge by edge; norms that `old` has not stay."""
    known = dict(jax.tree_util.tree_leaves_with_path(old))

    def one(path, leaf):
        where, keys = jax.tree_util.keystr(path), [getattr(key, "key", None) for key in path]
        if path not in known and any(str(key).startswith("norm") and key not in KINDS for key in keys):
            return leaf
        if path not in known:
            raise ValueError(f"{name}: the supernet has no {where}. Usual cause: other sizes, or an operation that is gone.")
        found = known[path]
        of_cell = [place for place, key in enumerate(keys) if key in KINDS and str(keys[place - 1]).startswith("cell")]
        if of_cell:
            kind, op = str(keys[of_cell[0]]), str(keys[of_cell[0] + 1])
            found = found[_places(name, found, op, before[kind], after[kind])]
        if found.shape != leaf.shape:
            both = f"has shape {found.shape}, but the network to fill has {leaf.shape}"
            raise ValueError(f"{name}: {where} {both}; give it the same sizes.")
        return found

    return jax.tree_util.tree_map_with_path(one, new)


def _places(name: str, leaf: jax.Array, op: str, before: tuple[Edge, ...], after: tuple[Edge, ...]) -> np.ndarray:
    """Where the edges of an operation that are left stood."""
    check_rows(name, {op: leaf}, before, op)
    place = {(edge.source, edge.node): number for number, edge in enumerate(stacked(before, op))}
    gone = [edge for edge in stacked(after, op) if (edge.source, edge.node) not in place]
    if gone:
        raise ValueError(f"{name}: the supernet has no {op} from input {gone[0].source} to node {gone[0].node} any more.")
    return np.array([place[edge.source, edge.node] for edge in stacked(after, op)])
