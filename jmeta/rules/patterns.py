"""Patterns: which layers adapt at which inner step, as names, as text, as a grid, and the families worth searching.

References:
  Khabarlak, Faster Optimization-Based Meta-Learning Adaptation Phase, 2022 (https://arxiv.org/abs/2206.05930): patterns that
  restrict which weights are updated in the adaptation phase.

Differs from the paper in: the abstract alone is known here, so how patterns are listed and searched is our own; entries may be any
real number, by which the layer's update is multiplied.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.core import Tracer

from jmeta.core import Model

MOST = 300  # patterns that are listed all; of more than that a coarser family is


class Pattern(NamedTuple):
    """Which layers adapt at which step.

    Attributes:
      rows: a row a step, of a number a layer: 0 leaves the layer as it is, 1 adapts it, another number scales its update. Steps
        beyond the last row repeat it.
      layers: the layers' names, at the top level of the parameters, in forward order.
    """

    rows: tuple[tuple[float, ...], ...]
    layers: tuple[str, ...]

    def __str__(self) -> str:
        """The pattern in the text that `pattern` reads, such as `suffix(2)*2, head*3`."""
        runs = [(_row_text(row, self.layers), len(list(run))) for row, run in itertools.groupby(self.rows)]
        return ", ".join(text if count == 1 else f"{text}*{count}" for text, count in runs)

    def grid(self) -> str:
        """A line a step and a column a layer, for people.

        >>> print(Pattern(((1, 1), (0, 1)), ("body", "head")).grid())
               body head
        step 1    #    #
        step 2    .    #
        """
        side = len(f"step {len(self.rows)}")
        lines = [" ".join([" " * side, *self.layers])]
        for number, row in enumerate(self.rows, 1):
            cells = (_cell(value).rjust(len(name)) for value, name in zip(row, self.layers, strict=True))
            lines.append(" ".join([f"step {number}".ljust(side), *cells]))
        return "\n".join(lines)


def _cell(value: float) -> str:
    return "." if value == 0 else "#" if value == 1 else f"{value:g}"


def _row_text(row: Sequence[float], layers: tuple[str, ...]) -> str:
    names = {tuple(named): name for name, named in reversed(_named(layers).items())}
    if sum(map(bool, row)) != 1 and tuple(row) in names:
        return names[tuple(row)]
    return "+".join(name if value == 1 else f"{value}:{name}" for value, name in zip(row, layers, strict=True) if value)


def _named(layers: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
    """Rows that have names, where no layer has the same; the last layer is the head."""
    count = len(layers)
    suffixes = {f"suffix({k})": (0,) * (count - k) + (1,) * k for k in range(1, count + 1)}
    ends = {"head": (0,) * (count - 1) + (1,), "body": (1,) * (count - 1) + (0,)}
    rows = {"full": (1,) * count, "none": (0,) * count, **ends, **suffixes}
    return {name: row for name, row in rows.items() if name not in layers}


def pattern(model: Model | Sequence[str], rows: str | Sequence[Any], steps: int | None = None) -> Pattern:
    """A pattern for a network.

    Args:
      model: the network, or its layers' names in forward order.
      rows: text, or numbers `[steps, layers]`. Text gives each step one of `full`, `head` (the last layer), `body` (all others),
        `suffix(k)` (the last k layers), `none`, or names of layers joined by `+`, each perhaps scaled as in `0.5:block4`; steps are
        separated by commas, and `*n` repeats one.
      steps: inner steps; the last row is repeated up to them. If None, as many as there are rows.

    Returns:
      A `Pattern`.

    Raises:
      ValueError: the numbers' shape is not `[steps, layers]`, a name is unknown, there are more rows than steps, or nothing is
        updated at all.
      TypeError: numbers that only exist while a program is traced.

    >>> str(pattern(("block1", "block2", "head"), "suffix(2)*2, head", steps=5))
    'suffix(2)*2, head*3'
    """
    layers = _layers("pattern", model)
    table = tuple(_read(rows, layers)) if isinstance(rows, str) else static_rows("pattern", rows, layers)
    if steps is not None:
        if steps < 1 or len(table) > steps:
            raise ValueError(f"pattern: there are {len(table)} rows for {steps} steps; give at most one a step, and one at least.")
        table += table[-1:] * (steps - len(table))
    return checked("pattern", Pattern(table, layers))


def _layers(name: str, model: Model | Sequence[str]) -> tuple[str, ...]:
    layers = tuple(model.layers if isinstance(model, Model) else model)
    if not layers:
        raise ValueError(
            f"{name}: the model has no layer names. Usual cause: a hand-made Model; give it layers=('...', 'head') in forward "
            "order, as they stand at the top level of its parameters."
        )
    return layers


def static_rows(name: str, rows: Any, layers: Sequence[str] | None) -> tuple[tuple[float, ...], ...]:
    """Numbers `[steps, layers]` as tuples.

    Raises:
      TypeError, ValueError: they are traced, or not of that shape.
    """
    if is_traced(rows):
        raise TypeError(
            f"{name}: the pattern's numbers must be known before a program is traced, got a tracer. Usual cause: a pattern that "
            "is an argument of a jitted or vmapped function; lambda_mask alone takes such a one."
        )
    array: Any
    try:
        array = np.asarray(rows, float)
    except (TypeError, ValueError):
        array = np.zeros(())
    wide = len(layers) if layers else array.shape[-1] if array.ndim == 2 else -1
    if array.ndim != 2 or array.shape[1] != wide or not array.size:
        columns = f"{len(layers)}], a column for each of {', '.join(layers)}" if layers else "layers]"
        got = f"shape {list(array.shape)}" if array.ndim else "rows of unequal length, or no numbers"
        raise ValueError(f"{name}: the pattern must have shape [steps, {columns}, got {got}.")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: the pattern's numbers must be finite, got {array.tolist()}.")
    return tuple(tuple(int(each) if each == int(each) else each for each in row) for row in array.tolist())


def is_traced(rows: Any) -> bool:
    """Whether a pattern's numbers, or some of them, are known to the running program alone."""
    return isinstance(rows, Tracer) or any(isinstance(each, Tracer) for row in _iterated(rows) for each in (row, *_iterated(row)))


def _iterated(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else ()


def checked(name: str, given: Pattern) -> Pattern:
    """The pattern, unless it updates nothing.

    Raises:
      ValueError: it does not.
    """
    if not any(map(any, given.rows)):
        layers = f" (its layers are {', '.join(given.layers)})" if given.layers else ""
        raise ValueError(
            f"{name}: the pattern{layers} updates nothing at any step, so no task would be learned; set some entry to 1."
        )
    return given


def _read(text: str, layers: tuple[str, ...]) -> Iterator[tuple[float, ...]]:
    for part in text.split(","):
        row, _, count = (each.strip() for each in part.partition("*"))
        if not row or (count and not re.fullmatch(r"[1-9]\d*", count)):
            raise ValueError(f"pattern: {part.strip()!r} in {text!r} is no step; write for instance 'suffix(2)*2, head*3'.")
        yield from [_row(row, layers)] * int(count or 1)


def _row(text: str, layers: tuple[str, ...]) -> tuple[float, ...]:
    if text in _named(layers):
        return _named(layers)[text]
    values = dict.fromkeys(layers, 0.0)
    for each in text.split("+"):
        scale, _, name = each.strip().rpartition(":")
        if name not in values:
            raise ValueError(
                f"pattern: {name!r} is neither a layer nor full, head, body, none or suffix(1) to suffix({len(layers)}); the "
                f"layers are {', '.join(layers)}."
            )
        try:
            values[name] = float(scale or 1)
        except ValueError:
            raise ValueError(f"pattern: {scale!r} in {text!r} is no number; write for instance 0.5:{name}.") from None
    return static_rows("pattern", [list(values.values())], layers)[0]


def patterns(model: Model | Sequence[str], steps: int, *, most: int = MOST) -> tuple[Pattern, ...]:
    """The patterns worth searching: what a step costs is set by the lowest layer that it updates.

    These are all choices of layers that stay the same at every step, and all schedules that update a suffix of the layers at each
    step, never more than at the step before. Where those are more than `most`, only schedules that change at one step.

    Args:
      model: the network, or its layers' names in forward order.
      steps: inner steps.
      most: about how many to list at most.

    Returns:
      Patterns without repeats, the full one first.

    Raises:
      ValueError: steps is below 1, or the model has no layer names.

    >>> len(patterns(("block1", "block2", "block3", "block4", "head"), steps=5))
    277
    """
    layers = _layers("patterns", model)
    if steps < 1:
        raise ValueError(f"patterns: steps must be at least 1, got {steps}.")
    count = len(layers)
    same = [(row,) * steps for row in itertools.product((1, 0), repeat=count)] if 2**count <= most else []
    schedules = itertools.combinations_with_replacement(range(count, -1, -1), steps)
    if math.comb(count + steps, steps) + len(same) > most:
        schedules = _with_one_change(count, steps, most - len(same))
    suffixes = ([(0,) * (count - k) + (1,) * k for k in lengths] for lengths in schedules)
    found = dict.fromkeys(tuple(rows) for rows in itertools.chain([((1,) * count,) * steps], suffixes, same) if any(map(any, rows)))
    return tuple(Pattern(rows, layers) for rows in found)


def _with_one_change(count: int, steps: int, most: int) -> Iterator[tuple[int, ...]]:
    """Lengths of suffixes that fall at one step at most, at as many different steps as `most` allows."""
    falls = list(itertools.combinations(range(count, -1, -1), 2))
    places = np.unique(np.linspace(1, steps - 1, max(1, min(steps - 1, (most - count) // len(falls)))).round().astype(int))
    yield from ((length,) * steps for length in range(count, 0, -1))
    yield from ((high,) * place + (low,) * (steps - place) for high, low in falls for place in places.tolist() if place < steps)


def save_pattern(path: str | Path, given: Pattern) -> Path:
    """Writes a pattern as JSON that `load_pattern` and `jmeta eval --pattern` read.

    Raises:
      FileExistsError: the file exists.
    """
    with open(path, "x") as file:
        json.dump({"layers": given.layers, "rows": given.rows}, file)
    return Path(path)


def load_pattern(path: str | Path) -> Pattern:
    """Reads a pattern from JSON: one that `save_pattern` wrote, or the best of a search.

    Raises:
      FileNotFoundError, ValueError: there is no such file, or it holds no pattern.
    """
    try:
        stored = json.loads(Path(path).read_text())
        stored = stored.get("best", stored)
        layers, rows = tuple(stored["layers"]), stored["rows"]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise ValueError(
            f"pattern: {path} holds no pattern; expected JSON with 'layers' and 'rows', or a search's result."
        ) from None
    return pattern(layers, rows)
