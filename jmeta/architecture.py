"""Architectures of cells: what a relaxed one weighs, what a discrete one is, and how it is kept in a file.

A cell has nodes 0, 1, ...; node j sees the outputs of the two cells before (inputs 0 and 1) and of the nodes before it (inputs 2 to
j + 1). On each of its inputs it weighs operations, and it weighs the pairs of inputs that it adds up:

    node_j = sum over pairs u < v of p_uv (o_ju + o_jv),   o_ju = sum over operations of w_ju,op op(x_u)
    w_ju = softmax(a_ju / T),  p = softmax(g_j / T)

References:
  Elsken, Staffler, Metzen, Hutter, Meta-Learning of Neural Architectures for Few-Shot Learning, CVPR 2020
  (https://arxiv.org/abs/1911.11090): pairs of inputs, annealed temperature, soft pruning.
  Liu, Simonyan, Yang, DARTS: Differentiable Architecture Search, ICLR 2019 (https://arxiv.org/abs/1806.09055): the relaxation.
"""

import itertools
import json
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PRIMITIVES = (
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "conv_1x5_5x1",
    "conv_3x3",
    "sep_conv_3x3",
    "dil_conv_3x3",
)
KINDS = ("normal", "reduce")
GONE = -1e9  # the logit of an operation that was pruned for good

Open = tuple[tuple[tuple[str, ...], ...], ...]  # operations of each input of each node
Choices = tuple[tuple[tuple[str, int], ...], ...]  # (operation, input) of each node


class Space(NamedTuple):
    """Operations that are open to each input of each node, in normal cells and in those that halve the map."""

    normal: Open
    reduce: Open


class Genotype(NamedTuple):
    """A discrete architecture: for each node the operations and inputs that it adds up, in normal cells and in those that halve."""

    normal: Choices
    reduce: Choices


def full_space(nodes: int) -> Space:
    """All operations on all inputs of each of `nodes` nodes.

    >>> [len(inputs) for inputs in full_space(3).normal]
    [2, 3, 4]
    """
    edges = tuple((PRIMITIVES,) * (node + 2) for node in range(nodes))
    return Space(edges, edges)


def pairs_of(inputs: int) -> np.ndarray:
    """The pairs u < v of so many inputs, `[pairs, 2]`, in the order of their alphas."""
    return np.array(list(itertools.combinations(range(inputs), 2)))


def init_alpha(key: jax.Array, nodes: int) -> dict[str, Any]:
    """Logits near 0: `{kind: {node: {"ops": [inputs, 7], "pairs": [pairs]}}}`, drawn from N(0, 1e-6)."""

    def draw(number, shape):
        return 1e-3 * jax.random.normal(jax.random.fold_in(key, number), shape)

    numbers = itertools.count()
    return {
        kind: {
            f"node{node}": {
                "ops": draw(next(numbers), (node + 2, len(PRIMITIVES))),
                "pairs": draw(next(numbers), (len(pairs_of(node + 2)),)),
            }
            for node in range(nodes)
        }
        for kind in KINDS
    }


def named(alpha: Any) -> dict[str, jax.Array]:
    """Alphas as single numbers, by names such as "alpha/normal/node0/ops/1/conv_3x3" and "alpha/normal/node0/pairs/0"."""
    leaves = jax.tree_util.tree_leaves_with_path({"alpha": alpha})
    return {
        "/".join([*(str(key.key) for key in path), *_place(spot)]): leaf[spot]
        for path, leaf in leaves
        for spot in np.ndindex(leaf.shape)
    }


def _place(spot: tuple[int, ...]) -> list[str]:
    return [str(spot[0]), *(PRIMITIVES[op] for op in spot[1:])]


def from_named(rows: Sequence[Mapping[str, float]]) -> Any:
    """What `named` made of alphas, several times: alphas whose leaves have a leading axis `[rows]`.

    Raises:
      ValueError: there are no rows, or no alphas in them.
    """
    nodes = len({name.split("/")[2] for row in rows[:1] for name in row if name.startswith("alpha/")})
    if not nodes:
        raise ValueError("the rows hold no alphas. Usual cause: metrics of a run that is not of metanas, or that has not begun.")
    like = jax.eval_shape(lambda: init_alpha(jax.random.key(0), nodes))
    names = iter(named(jax.tree.map(lambda leaf: np.zeros(leaf.shape), like)))
    return jax.tree.map(
        lambda leaf: np.array([[row[name] for row in rows] for name in itertools.islice(names, leaf.size)]).T.reshape(
            -1, *leaf.shape
        ),
        like,
    )


def alpha_of(name: str, params: Any) -> Any:
    """The alphas in a supernet's parameters, or the alphas themselves.

    Raises:
      ValueError: it is neither; `name` begins the message.
    """
    if not isinstance(params, Mapping):
        raise ValueError(
            f"{name}: the parameters of a supernet, or its alphas, must be a dict, got {type(params).__name__}. Usual cause: a "
            "Theta; give theta.params."
        )
    alpha = params.get("alpha", params)
    check_alpha(name, alpha)
    return alpha


def check_alpha(name: str, alpha: Any, nodes: int | None = None) -> None:
    """Refuses alphas of another search space.

    Args:
      name: begins the message.
      alpha: what should be of `init_alpha`.
      nodes: of its cells; any if None.

    Raises:
      ValueError: as said.
    """
    if nodes is None:
        own = alpha.get("normal", ()) if isinstance(alpha, Mapping) else ()
        nodes = len(own) if isinstance(own, Mapping) else 0
    wanted = jax.tree.map(jnp.shape, jax.eval_shape(lambda: init_alpha(jax.random.key(0), nodes)))
    found = jax.tree.map(jnp.shape, alpha)
    if nodes < 1 or found != wanted:
        raise ValueError(
            f"{name}: the alphas must be those of cells of {max(nodes, 1)} nodes, {wanted}; got {found}. Usual cause: another "
            "search space, or parameters that are not a supernet's."
        )


def check_finite(name: str, alpha: Any) -> None:
    """Refuses alphas that are not numbers, of which nothing is the largest.

    Raises:
      ValueError: as said; `name` begins the message.
    """
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(alpha)):
        raise ValueError(f"{name}: the alphas hold values that are not finite. Usual cause: training that diverged.")


def check_temperature(name: str, temperature: float) -> None:
    """Refuses a temperature that a softmax cannot have.

    Raises:
      ValueError: as said; `name` begins the message.
    """
    if not temperature > 0:
        raise ValueError(f"{name}: temperature must be above 0, got {temperature}.")


def check_threshold(name: str, threshold: float, alpha: Any) -> None:
    """Refuses a threshold of soft pruning below 0, and one that alphas which have not moved would not pass.

    Nothing would be left to learn from.

    Raises:
      ValueError: as said; `name` begins the message.
    """
    inputs = max(len(node["ops"]) for nodes in alpha.values() for node in nodes.values())
    choices = max(len(PRIMITIVES), len(pairs_of(inputs)))
    if not 0 <= threshold < 1 / choices:
        raise ValueError(
            f"{name}: threshold must be at least 0 and below 1/{choices}, what each of the {choices} choices weighs while none is "
            f"preferred, got {threshold}. Usual cause: cells of more nodes, whose last one has more pairs of inputs; lower "
            "the threshold."
        )


def mixture(alpha: Any, temperature: Any = 1.0, threshold: float = 0.0) -> dict[str, Any]:
    """What the logits weigh: softmax at a temperature, with weights up to a threshold put to 0 and the others left as they are.

    Args:
      alpha: of `init_alpha`.
      temperature: that the logits are divided by, above 0; may be traced, and at 0 all weights are NaN.
      threshold: of the weights of operations and of pairs.

    Returns:
      `{kind: {node: {"ops": [inputs, 7], "inputs": [inputs]}}}`; an input's weight is the sum over its pairs.
    """

    def weigh(logits):
        weights = jax.nn.softmax(logits / temperature)
        return jnp.where(weights <= threshold, 0, weights) if threshold else weights  # what is not a number stays so

    def node(own):
        inputs = own["ops"].shape[0]
        member = (pairs_of(inputs)[:, :, None] == np.arange(inputs)).any(1)  # [pairs, inputs]
        return {"ops": weigh(own["ops"]), "inputs": weigh(own["pairs"]) @ member.astype(own["pairs"].dtype)}

    return {kind: {name: node(own) for name, own in nodes.items()} for kind, nodes in alpha.items()}


def genotype(alpha: Any) -> Genotype:
    """The discrete architecture of the largest logits: of each node the best pair of inputs, of each input the best operation.

    Args:
      alpha: of `init_alpha`, or the parameters of a supernet.

    Raises:
      ValueError: they are alphas of another search space, or none, or not finite.

    >>> genotype(init_alpha(jax.random.key(0), 1)).normal[0][0][0] in PRIMITIVES
    True
    """
    alpha = alpha_of("genotype", alpha)
    check_finite("genotype", alpha)

    def choose(own):
        ops, pairs = np.asarray(own["ops"]), np.asarray(own["pairs"])
        return tuple((PRIMITIVES[ops[u].argmax()], int(u)) for u in pairs_of(len(ops))[pairs.argmax()])

    return Genotype(*(tuple(choose(alpha[kind][f"node{node}"]) for node in range(len(alpha[kind]))) for kind in KINDS))


def weighed(alpha: Any, temperature: float) -> dict[str, list[list[tuple[str, int, float]]]]:
    """`genotype`, with what each operation weighs on its edge.

    Args:
      alpha: of `init_alpha`, or the parameters of a supernet.
      temperature: of the softmax over an edge's operations.

    Returns:
      `{kind: [node: [(operation, input, weight), ...]]}`.

    Raises:
      ValueError: as `genotype`, or the temperature is not above 0.
    """
    check_temperature("weighed", temperature)
    alpha = alpha_of("weighed", alpha)
    mixed = mixture(alpha, temperature)

    def weight(kind, node, op, source):
        return float(mixed[kind][f"node{node}"]["ops"][source, PRIMITIVES.index(op)])

    return {
        kind: [[(op, source, weight(kind, node, op, source)) for op, source in choices] for node, choices in enumerate(nodes)]
        for kind, nodes in genotype(alpha)._asdict().items()
    }


def check_genotype(name: str, genotype: Genotype) -> None:
    """Refuses what is no genotype, operations that are not known and inputs that are not there yet.

    Raises:
      ValueError: as said; `name` begins the message.
    """
    if not isinstance(genotype, Genotype):
        raise ValueError(
            f"{name}: the genotype must be a jm.Genotype, got {type(genotype).__name__}. Usual cause: what a JSON file holds; "
            "jm.load_genotype reads one."
        )
    for kind, nodes in zip(KINDS, genotype, strict=True):
        if not all(isinstance(each, Sequence) for each in (nodes, *(nodes if isinstance(nodes, Sequence) else ()))):
            raise ValueError(
                f"{name}: {kind} cells must be nodes of (operation, input) pairs, as jm.PUBLISHED has them, got {nodes!r}."
            )
        if not nodes or len(nodes) != len(genotype.normal):
            raise ValueError(
                f"{name}: cells need at least 1 node, as many of both kinds; got {len(genotype.normal)} and {len(nodes)}."
            )
        for node, choices in enumerate(nodes):
            if not all(isinstance(choice, Sequence) and len(choice) == 2 for choice in choices):
                raise ValueError(f"{name}: {kind} node {node} must hold (operation, input) pairs, got {choices!r}.")
            for operation, source in choices:
                if operation not in PRIMITIVES:
                    raise ValueError(f"{name}: {operation!r} in {kind} node {node} is not one of {', '.join(PRIMITIVES)}.")
                if not isinstance(source, numbers.Integral) or isinstance(source, bool) or not 0 <= source < node + 2:
                    raise ValueError(
                        f"{name}: {kind} node {node} has input {source}, but there are inputs 0 to {node + 1}. Usual cause: "
                        "nodes counted from 0; inputs 0 and 1 are the two cells before, node 0 is input 2."
                    )
            sources = [source for _, source in choices]
            if not choices or len(set(sources)) < len(sources):
                raise ValueError(f"{name}: {kind} node {node} must add up different inputs, at least one; got {sources}.")


def save_genotype(path: str | Path, genotype: Genotype) -> None:
    """Writes a genotype as JSON: `{"normal": [[["conv_3x3", 0], ...], ...], "reduce": ...}`.

    Raises:
      ValueError: the genotype is none.
      FileExistsError: the file is there already.
    """
    check_genotype("save_genotype", genotype)
    with Path(path).open("x") as file:
        json.dump(genotype._asdict(), file, indent=1)


def load_genotype(path: str | Path) -> Genotype:
    """Reads a genotype that `save_genotype` wrote.

    Raises:
      ValueError: the file holds something else, unknown operations, or inputs that cannot be.
    """
    try:
        text = Path(path).read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"load_genotype: {path} is no text: {error}.") from error
    return read_genotype(text, f"load_genotype: {path}")


def read_genotype(text: str, name: str) -> Genotype:
    """A genotype as JSON.

    Raises:
      ValueError: as `load_genotype`; `name` begins the message.
    """
    try:
        stored = json.loads(text)
        nodes = [tuple(tuple((op, source) for op, source in node) for node in stored[kind]) for kind in KINDS]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{name} is not {{"normal": [[[operation, input], ...], ...], "reduce": ...}}: {error}.') from error
    found = Genotype(*nodes)
    check_genotype(name, found)
    return found


PUBLISHED = {
    "metanas-mini-imagenet-v2": Genotype(
        (
            (("conv_1x5_5x1", 0), ("conv_3x3", 1)),
            (("conv_3x3", 0), ("sep_conv_3x3", 2)),
            (("dil_conv_3x3", 1), ("conv_1x5_5x1", 3)),
        ),
        (
            (("sep_conv_3x3", 0), ("conv_3x3", 1)),
            (("conv_3x3", 0), ("sep_conv_3x3", 2)),
            (("conv_3x3", 0), ("dil_conv_3x3", 1)),
        ),
    ),
    "metanas-omniglot-v2": Genotype(
        (
            (("dil_conv_3x3", 0), ("sep_conv_3x3", 1)),
            (("avg_pool_3x3", 0), ("sep_conv_3x3", 1)),
            (("conv_1x5_5x1", 0), ("conv_3x3", 2)),
        ),
        (
            (("skip_connect", 0), ("sep_conv_3x3", 1)),
            (("conv_3x3", 0), ("dil_conv_3x3", 1)),
            (("dil_conv_3x3", 0), ("conv_1x5_5x1", 2)),
        ),
    ),
}
