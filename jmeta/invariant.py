"""What a step leaves as it is, found in its program, so that it is computed once and not at every step, or not at all.

Nothing here knows of networks or masks. `flows` asks of an update which gradients it reads and which parameters it moves; `scan` is
a `jax.lax.scan` that computes before the loop whatever depends only on what the loop does not change.

References:
  Aho, Lam, Sethi, Ullman, Compilers: Principles, Techniques, and Tools, 2nd edition, 2006, section 9.5: loop-invariant code motion.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer, eval_jaxpr
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun


class Flows(NamedTuple):
    """What an update does with gradients.

    Attributes:
      read: for each leaf, whether that gradient has a part in any update or in the state.
      moved: for each leaf, whether its update can be other than zero.
      run: the update, traced: `(gradients) -> (updates, state)`.
    """

    read: list[bool]
    moved: list[bool]
    run: Callable[[Any], tuple[Any, Any]]


def flows(update: Callable[[Any], tuple[Any, Any]], gradients: Any) -> Flows:
    """Which gradients an update reads, and which parameters it moves whatever the gradients are.

    Args:
      update: `(gradients) -> (updates, state)`, with updates of the gradients' structure.
      gradients: a tree of arrays, or of anything that has their shapes and types.

    Returns:
      What is read and moved, and the update, which is traced this once.
    """
    program, shapes = jax.make_jaxpr(update, return_shape=True)(gradients)
    jaxpr = program.jaxpr
    updates = jaxpr.outvars[: len(jax.tree.leaves(shapes[0]))]
    fixed, _ = _split(jaxpr.eqns, ())
    constant = list(_made(fixed).intersection(_variables(updates)))
    with jax.ensure_compile_time_eval():
        values = dict(zip(constant, _part(jaxpr, (), constant, fixed)(), strict=True))
    moved = [_may_move(out.val if isinstance(out, Literal) else values.get(out, 1)) for out in updates]
    _, read = _needed(jaxpr.eqns, jaxpr.outvars)

    def run(gradients):
        return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(program)(*jax.tree.leaves(gradients)))

    return Flows([var in read for var in jaxpr.invars], moved, run)


def _may_move(update: Any) -> bool:
    return isinstance(update, Tracer) or bool(np.any(np.asarray(update)))


def scan(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: jax.Array, wrap: Callable = lambda body: body) -> tuple:
    """`jax.lax.scan`, but what a step computes from unchanged values alone is computed once, before the loop.

    Args:
      body: `(carry, x) -> (carry, y)`. Leaves of the carry that it returns untouched stay out of the loop.
      carry: a tree of arrays.
      xs: `[steps]`.
      wrap: what is done to the body that remains, such as `jax.checkpoint`.

    Returns:
      The last carry and the stacked `y`.
    """
    program, (_, seen) = jax.make_jaxpr(body, return_shape=True)(carry, xs[0])
    jaxpr, (leaves, tree) = program.jaxpr, jax.tree.flatten(carry)
    before, after = jaxpr.invars[:-1], jaxpr.outvars[: len(leaves)]
    moving = [number for number, (old, new) in enumerate(zip(before, after, strict=True)) if old is not new]
    still = dict(zip(jaxpr.constvars, program.consts, strict=True))
    still |= {var: leaf for number, (var, leaf) in enumerate(zip(before, leaves, strict=True)) if number not in moving}

    fixed, _ = _split(jaxpr.eqns, ())  # arrays of zeros and the like, better written anew at every step than kept
    early, late = _split(jaxpr.eqns, still)
    outputs = [*(after[number] for number in moving), *jaxpr.outvars[len(leaves) :]]
    late, behind = _needed(late, outputs)
    again = _made(fixed)
    kept = [var for each in early for var in each.outvars if var in behind and var not in again]  # in the program's order
    once = {**still, **dict(zip(kept, _part(jaxpr, list(still), kept, early)(*still.values()), strict=True))}
    step = _part(jaxpr, [*once, *(before[number] for number in moving), jaxpr.invars[-1]], outputs, [*fixed, *late])

    def rest(moved, x):
        results = step(*once.values(), *moved, x)
        return results[: len(moving)], results[len(moving) :]

    moved, ys = jax.lax.scan(wrap(rest), [leaves[number] for number in moving], xs)
    for number, leaf in zip(moving, moved, strict=True):
        leaves[number] = leaf
    return tree.unflatten(leaves), jax.tree.unflatten(jax.tree.structure(seen), ys)


def _split(equations: Sequence[JaxprEqn], known: Collection[Var]) -> tuple[list[JaxprEqn], list[JaxprEqn]]:
    """The equations that follow from what is known, and the others."""
    found, first, rest = set(known), [], []
    for each in equations:
        follows = not each.effects and found.issuperset(_variables(each.invars))
        (first if follows else rest).append(each)
        found.update(each.outvars if follows else ())
    return first, rest


def _part(jaxpr: Jaxpr, inputs: Sequence[Var], outputs: Sequence[Any], equations: Sequence[JaxprEqn]) -> Callable[..., list]:
    """Those of a program's equations that the outputs need, as a function."""
    needed, _ = _needed(equations, outputs)
    part = jaxpr.replace(constvars=[], invars=list(inputs), outvars=list(outputs), eqns=needed)
    return functools.partial(eval_jaxpr, part, [])


def _variables(atoms: Sequence[Any]) -> list[Var]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def _made(equations: Sequence[JaxprEqn]) -> set[Var]:
    return {var for each in equations for var in each.outvars}


def _needed(equations: Sequence[JaxprEqn], wanted: Sequence[Any]) -> tuple[list[JaxprEqn], set[Var]]:
    """The equations that the wanted ones depend on or that have effects, and the variables, the wanted among them."""
    needed, variables = [], set(_variables(wanted))
    for each in reversed(equations):
        if each.effects or variables.intersection(each.outvars):
            needed.append(each)
            variables.update(_variables(each.invars))
    return needed[::-1], variables
