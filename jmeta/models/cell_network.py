"""How a network of cells is computed: every kind of operation that can run at a time runs as one, on all of its edges.

Parameters are `{"stem", "cell0", "cell1", ..., "head"}`; a cell holds how its two inputs are projected, and under its kind, for
each operation, arrays whose first axis runs over the edges that have it. So programs are short, and arrays few and large.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmeta.architecture import KINDS, PRIMITIVES
from jmeta.core import Params
from jmeta.models.cells import (
    DILATED,
    FIRST,
    CellNorm,
    apply_other,
    convolve_same,
    finish,
    first_kernel,
    halve,
    init_halving,
    init_kernel,
    init_norm,
    init_operation,
    init_projection,
    normed,
    project,
)
from jmeta.models.layers import task_conv

STEM = 3  # the stem has so many times the channels of a node, as a cell of three nodes hands on
TOGETHER = (("conv_3x3", "sep_conv_3x3"), (DILATED,), ("conv_1x5_5x1",))  # whose first kernels are of one size
LARGEST = 1000  # more nodes than any cell has, so that an edge has a number of its own


class Edge(NamedTuple):
    """One operation, from an input to a node."""

    op: str
    source: int
    node: int
    halves: bool


Edges = dict[str, tuple[Edge, ...]]  # of each kind of cell, in the order in which their parameters are stacked


class Layout(NamedTuple):
    """What a network of cells looks like.

    Attributes:
      cells: how many.
      halving: the numbers of those that halve the map.
      edges: of each kind.
      norm: by what operations are normalised.
    """

    cells: int
    halving: tuple[int, ...]
    edges: Edges
    norm: CellNorm

    def kind(self, cell: int) -> str:
        """Of a cell."""
        return KINDS[cell in self.halving]


def ordered(kind: str, edges: Iterable[tuple[str, int, int]]) -> tuple[Edge, ...]:
    """By input first, so that what becomes known at one time stands together."""
    made = (Edge(op, source, node, kind == "reduce" and source < 2) for op, source, node in edges)
    return tuple(sorted(made, key=lambda edge: (edge.source, edge.node, edge.op)))


def init_network(key: jax.Array, layout: Layout, ways: int, channels: int, inputs: int, affine: bool) -> Params:
    """The parameters of a network.

    Args:
      key: of the kernels.
      layout: what it looks like.
      ways: classes of an episode.
      channels: of a node.
      inputs: channels of an image.
      affine: whether normalisations have scales and biases; the stem's always has.
    """
    key_stem, key_head, key_cells = jax.random.split(key, 3)
    stem = STEM * channels
    params: dict[str, Any] = {"stem": {"conv": {"kernel": init_kernel(key_stem, (3, 3, inputs, stem))}, "norm": init_norm(stem)}}
    widths = stem, stem
    for number in range(layout.cells):
        keys, kind = jax.random.split(jax.random.fold_in(key_cells, number), 3), layout.kind(number)
        first = init_halving if number - 1 in layout.halving else init_projection
        params[f"cell{number}"] = {
            "input0": first(keys[0], widths[0], channels, affine),
            "input1": init_projection(keys[1], widths[1], channels, affine),
            kind: _init_cell(keys[2], layout.edges[kind], channels, affine),
        }
        widths = widths[1], channels * (1 + max(edge.node for edge in layout.edges[kind]))
    return params | {"head": {"kernel": init_kernel(key_head, (widths[1], ways)), "bias": jnp.zeros(ways)}}


def _init_cell(key: jax.Array, edges: tuple[Edge, ...], channels: int, affine: bool) -> dict[str, Any]:
    """The parameters of each operation that has some, stacked over its edges."""
    params = {}
    for number, op in enumerate(PRIMITIVES):
        mine = stacked(edges, op)
        if mine:
            places = jnp.array([edge.source * LARGEST + edge.node for edge in mine])
            keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, number)))(places)
            own = jax.vmap(lambda key, op=op: init_operation(key, op, channels, 2, affine))(keys)
            params |= {op: own} if own else {}
    return params


def stacked(edges: tuple[Edge, ...], op: str) -> list[Edge]:
    """The edges over which an operation's parameters are stacked: all of it, but an identity has some only where it halves."""
    return [edge for edge in edges if edge.op == op and (op != "skip_connect" or edge.halves)]


def apply_network(params: Params, x: jax.Array, layout: Layout, weights: dict[str, Any]) -> jax.Array:
    """The network on images `[N, H, W, C]`: logits.

    Args:
      params: of `init_network`.
      x: images.
      layout: as they were made with.
      weights: of each kind, `[nodes, inputs, operations]`.
    """
    norm, stem = layout.norm, params["stem"]
    before = last = normed(task_conv(x, stem["conv"]["kernel"], (1, 1), "SAME"), stem["norm"], norm)
    for number in range(layout.cells):
        own, kind = params[f"cell{number}"], layout.kind(number)
        first = halve if number - 1 in layout.halving else project
        maps = [first(own["input0"], before, norm), project(own["input1"], last, norm)]
        before, last = last, _apply_cell(own[kind], maps, layout.edges[kind], weights[kind], norm)
    return last.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]


def _apply_cell(params: Any, maps: list[jax.Array], edges: tuple[Edge, ...], weights: Any, norm: CellNorm) -> jax.Array:
    """The nodes of a cell, concatenated. What is known at a time goes through each kind of operation together."""
    totals: Any = 0
    for node in range(weights.shape[0]):  # complete once the inputs up to node + 1 are known
        now = [edge for edge in edges if edge.source == node + 1 or (node == 0 and edge.source == 0)]
        if now:
            rows, outputs = _operate(params, maps, edges, now, norm)
            share = np.array([[to in row.nodes for row in rows] for to in range(weights.shape[0])])
            ops, sources = ([getattr(row, field) for row in rows] for field in ("op", "source"))
            totals = totals + jnp.tensordot(jnp.asarray(weights[:, sources, ops] * share, outputs.dtype), outputs, 1)
        maps.append(totals[node])
    return jnp.concatenate(maps[2:], -1)


class _Row(NamedTuple):
    """What an output is: the number of its operation, its input, and the nodes that it goes to."""

    op: int
    source: int
    nodes: tuple[int, ...]


def _operate(
    params: Any, maps: list[jax.Array], edges: tuple[Edge, ...], now: list[Edge], norm: CellNorm
) -> tuple[list[_Row], jax.Array]:
    """The operations on some edges: what the rows of their outputs are, and the outputs `[rows, N, H, W, C]`."""
    rows, outputs, affine, stride = [], [], [], 1 + now[0].halves
    begun = _begin(params, maps, edges, now, stride)
    identities = [op == "skip_connect" and stride == 1 for op in PRIMITIVES]
    for number, op in sorted(enumerate(PRIMITIVES), key=lambda each: identities[each[0]]):  # what is not normalised comes last
        here = [edge for edge in now if edge.op == op]
        if not here:
            continue
        if (op in params or op in FIRST) and here[0] in stacked(edges, op):
            own = _own(params, edges, here)
            rows += [_Row(number, edge.source, (edge.node,)) for edge in here]
            x = begun[op] if op in begun else jnp.stack([maps[edge.source] for edge in here])
            run = functools.partial(finish, norm=norm) if op in begun else functools.partial(apply_other, stride=stride)
            affine.append(own.get("norm", {}))
            outputs.append(jax.vmap(functools.partial(run, op))(own, x))
        else:  # without parameters it is the same for all nodes
            sources = sorted({edge.source for edge in here})
            rows += [_Row(number, source, tuple(edge.node for edge in here if edge.source == source)) for source in sources]
            x = jnp.stack([maps[source] for source in sources])
            outputs.append(x if identities[number] else jax.vmap(lambda x, op=op: apply_other(op, {}, x, stride))(x))
    plain = outputs[-1:] if identities[rows[-1].op] else []
    parts = outputs[: len(outputs) - len(plain)]
    if parts:
        both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *affine) if affine else {}
        parts = [jax.vmap(lambda x, own: normed(x, own or None, norm))(jnp.concatenate(parts), both)]
    return rows, jnp.concatenate([*parts, *plain])


def check_rows(name: str, params: Any, edges: tuple[Edge, ...], op: str) -> None:
    """Refuses a cell's parameters that are stacked over other edges.

    Raises:
      ValueError: as said; `name` begins the message.
    """
    wanted, found = len(stacked(edges, op)), {leaf.shape[0] for leaf in jax.tree.leaves(params.get(op, {}))}
    if found != {wanted}:
        raise ValueError(
            f"{name}: {op} has weights of {sorted(found) or 'no'} edges, but the space has {wanted} with it. Usual cause: a "
            "supernet from which operations were pruned for good; name the space that is left (space=, before=)."
        )


def _own(params: Any, edges: tuple[Edge, ...], here: list[Edge]) -> Any:
    """The parameters of some edges of one operation, which follow each other."""
    start = stacked(edges, here[0].op).index(here[0])
    check_rows("supernet", params, edges, here[0].op)
    return jax.tree.map(lambda leaf: leaf[start : start + len(here)], params[here[0].op])


def _begin(params: Any, maps: list[jax.Array], edges: tuple[Edge, ...], now: list[Edge], stride: int) -> dict[str, jax.Array]:
    """The first convolutions of some edges, those of an input and a size as one: `{operation: [its edges, N, H, W, C]}`."""
    done: dict[str, list[jax.Array]] = {}
    for source in sorted({edge.source for edge in now}):
        x = jax.nn.relu(maps[source])
        for ops in TOGETHER:
            here = {op: [edge for edge in now if edge.op == op and edge.source == source] for op in ops}
            kernels = [first_kernel(op, _own(params, edges, group)) for op, group in here.items() if group]
            if not kernels:
                continue
            kernel = jnp.concatenate(kernels).transpose(1, 2, 3, 0, 4)  # [h, w, C, edges, C]
            y = convolve_same(x, kernel.reshape(*kernel.shape[:3], -1), stride, 2 if DILATED in ops else 1)
            each = jnp.moveaxis(y.reshape(*y.shape[:3], *kernel.shape[3:]), 3, 0)
            for op, group in here.items():
                done[op] = [*done.get(op, []), each[: len(group)]]
                each = each[len(group) :]
    return {op: jnp.concatenate(parts) for op, parts in done.items()}
