"""What a program costs: the floating-point operations of its products, counted, and the time that it takes, measured."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, Literal

ONCE = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # where calls that run once keep what they call


class _Step(NamedTuple):
    """An equation of a flat program, its values numbered."""

    cost: int
    inputs: tuple[Any, ...]
    outputs: tuple[int, ...]


def operations(function: Callable, *arguments: Any) -> int:
    """Floating-point operations of the matrix products and convolutions in a function, two for each multiplication.

    Counted in its traced program as a compiler simplifies it: equal equations are computed once, and what no result depends on not
    at all. Loops count as often as they run, a `while` whose end is unknown once, of branches the dearest, and of what is spread
    over devices the share of one. What is computed anew to save memory (`jax.checkpoint`) counts anew in loops alone.

    Args:
      function: what is called.
      *arguments: arrays, or anything that has their shapes and types.

    Returns:
      The number.

    >>> import jax.numpy as jnp
    >>> operations(lambda x: (x @ x + x @ x).sum(), jnp.ones((4, 4)))
    128
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Jaxpr) -> int:
    steps: list[_Step] = []
    names: dict[Any, Any] = {var: number for number, var in enumerate([*jaxpr.constvars, *jaxpr.invars])}
    _flatten(jaxpr, names, {}, steps)
    needed, total = {_number(names, out) for out in jaxpr.outvars}, 0
    for step in reversed(steps):
        if needed.intersection(step.outputs):
            needed.update(step.inputs)
            total += step.cost
    return total


def _flatten(jaxpr: Jaxpr, names: dict[Any, Any], seen: dict[Any, tuple[int, ...]], steps: list[_Step]) -> None:
    """Appends the equations of a program, calls written out and repeats left out; `names` are the numbers of its variables."""
    for each in jaxpr.eqns:
        inputs = tuple(_number(names, atom) for atom in each.invars)
        called = _called(each)
        if called is not None:
            inner = dict(zip([*called.constvars, *called.invars], inputs, strict=True))
            _flatten(called, inner, seen, steps)
            names.update(zip(each.outvars, (_number(inner, out) for out in called.outvars), strict=True))
            continue
        what = each.primitive.name, tuple((name, _printed(value)) for name, value in sorted(each.params.items())), inputs
        if what not in seen or each.effects:
            first = 10**6 * (len(steps) + 1)
            seen[what] = tuple(range(first, first + len(each.outvars)))
            steps.append(_Step(_cost(each), inputs, seen[what]))
        names.update(zip(each.outvars, seen[what], strict=True))


def _number(names: dict[Any, Any], atom: Any) -> Any:
    return f"{atom.aval} {atom.val}" if isinstance(atom, Literal) else names[atom]


def _printed(value: Any) -> Any:
    """Something that is equal for equal parameters."""
    try:
        hash(value)
    except TypeError:
        return str(value)
    return value


def _called(equation: Any) -> Jaxpr | None:
    """The program that an equation calls exactly once, if any."""
    if equation.primitive.name in ("scan", "while", "cond"):
        return None
    found = [equation.params[name] for name in ONCE if name in equation.params]
    called = getattr(found[0], "jaxpr", found[0]) if found else None
    fits = called is not None and len(called.constvars) + len(called.invars) == len(equation.invars)
    return called if fits else None


def _cost(equation: Any) -> int:
    """Operations of one equation."""
    name, params = equation.primitive.name, equation.params
    shapes = [atom.aval.shape for atom in equation.invars]
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * equation.outvars[0].aval.size * math.prod(shapes[0][axis] for axis in contracted)
    if name == "conv_general_dilated":
        features = shapes[1][params["dimension_numbers"].rhs_spec[0]]
        return 2 * equation.outvars[0].aval.size * math.prod(shapes[1]) // features
    if name == "convolve":  # kernel [h, w, C, F]
        return 2 * equation.outvars[0].aval.size * math.prod(shapes[1][:3])
    if name == "correlate":  # y [N, H, W, F] and the kernel that results
        return 2 * math.prod(shapes[1][:3]) * equation.outvars[0].aval.size
    if name == "scan":
        return params["length"] * _count(params["jaxpr"].jaxpr)
    if name == "while":
        return _count(params["cond_jaxpr"].jaxpr) + _count(params["body_jaxpr"].jaxpr)
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in params["branches"])
    return sum(_count(getattr(found, "jaxpr", found)) for found in (params[each] for each in ONCE if each in params))


def alternately(calls: Sequence[Callable[[], Any]], rounds: int = 7, least: float = 0.02) -> list[float]:
    """Seconds that each of several calls takes, in turns, so that a machine whose speed drifts treats them alike.

    Args:
      calls: what to time; each has been called before.
      rounds: turns of each; the median counts.
      least: seconds that a turn lasts at least, of calls one after another.

    Returns:
      The seconds of one call of each.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    repeats = [max(1, math.ceil(least / max(_seconds(call, 1), 1e-9))) for call in calls]
    for _ in range(rounds):
        for own, call, count in zip(seconds, calls, repeats, strict=True):
            own.append(_seconds(call, count))
    return [statistics.median(own) for own in seconds]


def _seconds(call: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / count
