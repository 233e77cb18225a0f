"""Rules that say how much of the inner update each parameter takes, and at which step.

    only            all or nothing, by layer
    lambda_mask     params_l <- params_l - rate * pattern[step][l] * gradient_l, by layer and step
    learned_rates   params <- params - rate * gradient, rate a meta-parameter
    sparse          params <- params - rate * 1[alpha >= 0] * gradient, alpha a meta-parameter of each parameter
    proximal        gradient <- gradient + strength * (params - start)

References:
  Khabarlak, Faster Optimization-Based Meta-Learning Adaptation Phase, 2022 (https://arxiv.org/abs/2206.05930): lambda patterns.
  Li, Zhou, Chen, Li, Meta-SGD, 2017 (https://arxiv.org/abs/1707.09835), equation 2: a rate for each parameter.
  Antoniou, Edwards, Storkey, How to train your MAML, ICLR 2019 (https://arxiv.org/abs/1810.09502): rates per layer and step.
  von Oswald et al., Learning where to learn: Gradient sparsity in meta and continual learning, NeurIPS 2021
  (https://arxiv.org/abs/2110.14402): sparse-MAML, `sparse`.
  Rajeswaran, Finn, Kakade, Levine, Meta-Learning with Implicit Gradients, NeurIPS 2019 (https://arxiv.org/abs/1909.04630):
  `proximal`.

Differs from the papers in: `sparse` starts with every parameter adapted, where the paper draws alpha at random.
"""

import functools
import math
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jmeta.core import Rule, chain, memoise
from jmeta.rules.layers import layer_of, with_layers
from jmeta.rules.patterns import Pattern, checked, is_traced, static_rows


@memoise
def only(layers: str | tuple[str, ...], rule: Rule | optax.GradientTransformation) -> Rule:
    """Adapts the named layers with `rule` and leaves the others as they are, at no cost.

    Args:
      layers: a name, or several, at the top level of the parameters, or paths such as "w/head".
      rule: how those layers are adapted; its resets, gates, updates and its last word on a task's meta-gradient change them alone.

    Returns:
      A rule.

    Raises:
      ValueError: the rule silences channels for one task (`route`) and has other resets beside that; and, when the rule first meets
        the parameters, where a name is not in them.

    >>> rule = only("head", optax.sgd(0.1))
    >>> params = {"body": jnp.ones(2), "head": jnp.ones(1)}
    >>> updates, _ = rule.update.update(params, rule.update.init(params), params)
    >>> print(f"body {updates['body'][0]:.1f}, head {updates['head'][0]:.1f}")
    body 0.0, head -0.1
    """
    names = (layers,) if isinstance(layers, str) else tuple(layers)
    inner = chain(rule)
    if inner.private and [part for part in inner.parts or () if part.reset != Rule("").reset and not part.private]:
        raise ValueError(
            "only: the rule silences parts of the network for one task and has other resets beside; give each an only of its own, "
            "chain(only(layers, reset), only(layers, route(..., where='forward', refresh='task')), only(layers, optax.sgd(0.1)))."
        )

    def label(params):
        frozen = jax.tree.map(lambda _: "frozen", params)
        return with_layers(frozen, {name: jax.tree.map(lambda _: "adapted", layer_of(params, name, "only")) for name in names})

    update = optax.partition({"adapted": inner.update, "frozen": optax.set_to_zero()}, label)

    def among(params, changed):
        return with_layers(params, {name: layer_of(changed, name, "only") for name in names})

    def gate(params, **context):
        gated = inner.gate(params, **context)
        return {**among(params, gated), **{name: own for name, own in gated.items() if name not in params}}

    def meta(gradient, theta, phi):
        changed = inner.meta(gradient, theta, phi)
        return changed._replace(params=among(gradient.params, changed.params))

    return inner._replace(
        name="only",
        reset=lambda key, params, support, **context: among(params, inner.reset(key, params, support, **context)),
        gate=gate,
        update=optax.with_extra_args_support(update),
        meta=meta,
        parts=None,
    )


@memoise
def learned_rates(
    rate: float = 0.01, *, per: Literal["parameter", "tensor", "layer"] = "parameter", steps: int | None = None
) -> Rule:
    """Gradient descent whose rates are meta-parameters.

    Args:
      rate: what every rate starts from.
      per: one rate for each parameter (Meta-SGD), for each tensor (MAML++), or for each layer at the top level.
      steps: None for the same rates at all steps, or the number of steps that have rates of their own; later steps use the last.

    Returns:
      A rule whose hyper has the tree of the parameters (of their top level for layers), with a leading axis `[steps]` if given.

    Raises:
      ValueError: `per` is none of the three, or `steps` is below 1.
    """
    if per not in ("parameter", "tensor", "layer"):
        raise ValueError(f"learned_rates: per must be 'parameter', 'tensor' or 'layer', got {per!r}.")
    if steps is not None and steps < 1:
        raise ValueError(f"learned_rates: steps must be at least 1 or None, got {steps}.")
    lead = () if steps is None else (steps,)

    def init(params):
        if per == "layer":
            return {name: jnp.full(lead, rate, jax.tree.leaves(layer)[0].dtype) for name, layer in params.items()}
        return jax.tree.map(lambda p: jnp.full(lead + (p.shape if per == "parameter" else ()), rate, p.dtype), params)

    def update(updates: Any, state: Any, params: Any = None, **context: Any):
        hyper, step = context["hyper"], context.get("step", 0)

        def scale(rates, part):
            now = rates if steps is None else rates[jnp.minimum(step, steps - 1)]
            return jax.tree.map(lambda g: -now * g, part)

        return jax.tree.map(scale, hyper, updates), state

    return Rule("learned_rates", init, update=optax.GradientTransformationExtraArgs(optax.init_empty_state, update))


def lambda_mask(
    pattern: Pattern | Sequence[Any] | jax.Array,
    optimizer: Rule | optax.GradientTransformation,
    *,
    labels: tuple[str, ...] | None = None,
) -> Rule:
    """Adapts, at each step, the layers that a pattern names, and leaves the others and the optimiser's memory of them as they are.

    What stands still costs nothing: neither its gradient nor, below the lowest layer that moves, any backward pass is in the
    program, and its forward pass is computed once for all steps. Layers that move at the same steps share one state of the
    optimiser; where it counts its steps, as Adam does, it counts those.

    Args:
      pattern: a `Pattern`, or numbers `[steps, layers]`: 0 leaves a layer, 1 adapts it, another number scales its update. Steps
        beyond the last row repeat it. Numbers that are traced (an argument under `jit` or `vmap`) give the same results but save
        no work; in rows of tuples, columns of plain zeros still do.
      optimizer: how the layers are adapted. The resets and gates of a rule are not masked.
      labels: the names of the layers that the columns stand for, at the top level of the parameters or paths such as "w/head". If
        None those of the pattern, or the model's.

    Returns:
      A rule. Its meta-parameters are those of `optimizer`, under the same names.

    Raises:
      ValueError: the pattern is not `[steps, layers]` or updates nothing, or `optimizer` has no update; and, when the rule first
        meets the parameters, where the columns are not their layers.

    >>> rule = lambda_mask([[0, 1]], optax.sgd(0.1), labels=("body", "head"))
    >>> params = {"body": jnp.ones(2), "head": jnp.ones(1)}
    >>> updates, _ = rule.update.update(params, rule.update.init(params), params, phase=rule.phase(0))
    >>> print(f"body {updates['body'][0]:.1f}, head {updates['head'][0]:.1f}")
    body 0.0, head -0.1
    """
    rows = pattern.rows if isinstance(pattern, Pattern) else pattern
    names = labels or (pattern.layers if isinstance(pattern, Pattern) else None)
    if is_traced(rows):
        values = jnp.asarray(rows)
        if values.ndim != 2 or (names and values.shape[1] != len(names)):
            raise ValueError(f"lambda_mask: the pattern must have shape [steps, layers], got shape {list(values.shape)}.")
        known = (True,) * values.shape[1] if isinstance(rows, Tracer) else (_moves(column) for column in zip(*rows, strict=True))
        rows = _Traced(values, tuple(known))
    else:
        rows = static_rows("lambda_mask", rows, names)
        checked("lambda_mask", Pattern(rows, tuple(names or ())))
    return _masked_chain(rows, optimizer, None if names is None else tuple(names))


class _Traced(NamedTuple):
    """Numbers `[steps, layers]` that are known to the running program alone, and which columns may be other than 0."""

    values: jax.Array
    moves: tuple[bool, ...]


def _moves(column: Sequence[Any]) -> bool:
    return any(not isinstance(each, int | float) or each != 0 for each in column)


@memoise
def _masked_chain(rows: Any, optimizer: Rule | optax.GradientTransformation, names: tuple[str, ...] | None) -> Rule:
    """Each part of the optimiser masked by itself, so that names, and with them meta-parameters, stay what they are."""
    parts = chain(optimizer).parts or ()
    moving = [number for number, part in enumerate(parts) if part.update != Rule("").update]
    if not moving:
        raise ValueError(
            "lambda_mask: optimizer has no update. Usual cause: a rule that only resets or gates; chain it with optax.sgd."
        )
    mask: Any = _traced if isinstance(rows, _Traced) else _static
    return chain(
        *(mask(part, rows, names, number == moving[-1]) if number in moving else part for number, part in enumerate(parts))
    )


def _static(part: Rule, rows: tuple[tuple[float, ...], ...], names: tuple[str, ...] | None, last: bool) -> Rule:
    """One part of an optimiser, masked by numbers that are known. The last part's updates are scaled as well."""
    columns = [tuple(map(bool, column)) for column in zip(*rows, strict=True)]
    members = {moves: [number for number, each in enumerate(columns) if each == moves] for moves in columns}
    titles = {moves: "+".join(names[each] if names else str(each) for each in own) for moves, own in members.items()}
    group_of = [titles[moves] for moves in columns]

    def init(params):
        return {title: part.update.init(params) for title in titles.values()}

    def phase(step):
        return rows[min(step, len(rows) - 1)], part.phase(step)

    def update(updates, state, params=None, **context):
        row, own = context.pop("phase", None) or phase(context.get("step", 0))
        layers = _columns(names or context.get("layers"), len(row), updates, context.get("layers"))
        frozen = [name for name, value in zip(layers, row, strict=True) if not value]
        given = with_layers(updates, {name: _zeros(_layer(updates, name)) for name in frozen})
        new, state = _zeros(updates), dict(state)
        for group in sorted({group for value, group in zip(row, group_of, strict=True) if value}):
            mine = {name: value for name, value, each in zip(layers, row, group_of, strict=True) if each == group}
            moved: Any
            moved, changed = part.update.update(given, state[group], params, phase=own, **context)
            state[group] = _where(_slots(part, state[group], updates, mine), changed, state[group])
            new = with_layers(new, {name: _times(value if last else 1, _layer(moved, name)) for name, value in mine.items()})
        return new, state

    return part._replace(update=optax.GradientTransformationExtraArgs(init, update), phase=phase)


def _slots(part: Rule, state: Any, params: Any, mine: Collection[str]) -> Any:
    """Which leaves of an optimiser's state are of these layers, or of none: a tree of bools. All, where it does not tell."""
    others = jax.tree.map(lambda _: False, params)
    which = with_layers(others, {name: jax.tree.map(lambda _: True, _layer(params, name)) for name in mine})
    try:
        return optax.tree.map_params(part.update, lambda _, own: own, state, which, transform_non_params=lambda _: True)
    except (KeyError, TypeError, ValueError, AttributeError):  # an init that looks into the parameters
        return jax.tree.map(lambda _: True, state)


class _TracedUpdate(NamedTuple):
    """The update of one part of an optimiser, masked by numbers that are traced: every layer is a group, and all work is done.

    It has no hash, since its numbers have none, and so nothing that is made of it is remembered beyond their trace.
    """

    part: Rule
    rows: _Traced
    names: tuple[str, ...] | None
    last: bool

    def __call__(self, updates, state, params=None, *, step=0, **context):
        values, moves = self.rows
        row = values[jnp.minimum(step, values.shape[0] - 1)]
        layers = _columns(self.names or context.get("layers"), len(row), updates, context.get("layers"))
        own_of, zeros = functools.partial(_layer, updates), _zeros(updates)
        may_move = [(name, value) for name, value, may in zip(layers, row, moves, strict=True) if may]
        given = with_layers(zeros, {name: _where(v != 0, own_of(name), _layer(zeros, name)) for name, v in may_move})
        new, states = zeros, []
        for name, value, own, may in zip(layers, row, state, moves, strict=True):
            if not may:
                states.append(own)
                continue
            moved: Any
            moved, changed = self.part.update.update(given, own, params, step=step, **context)
            scaled = _times(value, _layer(moved, name)) if self.last else _layer(moved, name)
            new = with_layers(new, {name: _where(value != 0, scaled, _zeros(scaled))})
            states.append(_where(value != 0, changed, own))
        return new, tuple(states)


def _traced(part: Rule, rows: _Traced, names: tuple[str, ...] | None, last: bool) -> Rule:
    def init(params):
        return tuple(part.update.init(params) if may else () for may in rows.moves)

    return part._replace(update=optax.GradientTransformationExtraArgs(init, _TracedUpdate(part, rows, names, last)))


def _columns(names: Sequence[str] | None, count: int, params: Any, layers: Sequence[str] | None) -> Sequence[str]:
    """The layer of each column.

    Raises:
      ValueError: they are not the layers of the parameters.
    """
    if not names:
        raise ValueError(
            "lambda_mask: the model has no layer names, so the pattern's columns have no meaning. Usual cause: a hand-made Model; "
            f"give it layers=(...) in forward order, or lambda_mask labels=(...), of {', '.join(params)}."
        )
    if len(names) != count or not _covers(names, params):
        raise ValueError(
            f"lambda_mask: the pattern has {count} columns for the layers {', '.join(names)}; the parameters have {len(params)}, "
            f"{', '.join(layers or params)}. Usual cause: a pattern made for another network."
        )
    return names


def _covers(names: Sequence[str], params: Any) -> bool:
    """Whether every parameter is in one of the layers, and in no other."""
    count = jax.tree.map(lambda _: 0, params)
    try:
        for name in names:
            count = with_layers(count, {name: jax.tree.map(lambda times: times + 1, _layer(count, name))})
    except ValueError:
        return False
    return all(times == 1 for times in jax.tree.leaves(count))


def _layer(tree: Any, name: str) -> Any:
    return layer_of(tree, name, "lambda_mask")


def _zeros(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


def _times(value: Any, tree: Any) -> Any:
    return tree if isinstance(value, int | float) and value == 1 else jax.tree.map(lambda leaf: leaf * value, tree)


def _where(which: Any, moved: Any, still: Any) -> Any:
    """`moved` where `which` says so: one value, or a tree of bools, by which a leaf is taken whole."""
    if isinstance(which, jax.Array):
        return jax.tree.map(lambda new, old: jnp.where(which, new, old), moved, still)
    return jax.tree.map(lambda chosen, new, old: new if chosen else old, which, moved, still)


@memoise
def sparse(start: float = 0.01) -> Rule:
    """Learns which parameters adapt: multiplies every update by 1 where its alpha is at least 0, by 0 where it is below.

    The meta-gradient passes to alpha as if the step function were the identity (straight-through). Chain it behind the optimiser,
    `chain(optax.sgd(0.4), sparse())`. All work is done as without it, since what it freezes is only known to the program that runs.

    Args:
      start: what every alpha starts from; how far from 0 says how long the outer optimiser needs to freeze a parameter.

    Returns:
      A rule whose hyper, alpha, has the tree of the parameters.

    Raises:
      ValueError: start is not a finite number.
    """
    if not math.isfinite(start):
        raise ValueError(f"sparse: start must be a finite number, got {start}.")

    def init(params):
        return jax.tree.map(lambda p: jnp.full_like(p, start), params)

    def update(updates: Any, state: Any, params: Any = None, **context: Any):
        def mask(alpha, g):
            return g * ((alpha >= 0) + (alpha - jax.lax.stop_gradient(alpha)))

        return jax.tree.map(mask, context["hyper"], updates), state

    return Rule("sparse", init, update=optax.GradientTransformationExtraArgs(optax.init_empty_state, update))


@memoise
def proximal(strength: float) -> Rule:
    """Pulls parameters back to where the task began: adds `strength * (params - start)` to gradients. Chain it before an optimiser.

    Args:
      strength: of the term `strength / 2 |params - start|^2` that this adds to the loss, as iMAML does.

    Raises:
      ValueError: strength is below 0.
    """
    if strength < 0:
        raise ValueError(f"proximal: strength must be at least 0, got {strength}.")

    def update(updates: Any, state: Any, params: Any = None, **context: Any):
        return jax.tree.map(lambda g, p, start: g + strength * (p - start), updates, params, state), state

    return Rule("proximal", update=optax.GradientTransformationExtraArgs(lambda params: params, update))
