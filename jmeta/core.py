"""The abstraction: a rule says how one task is learned, a meta-learner what is carried between tasks.

Both are NamedTuples of pure functions for ONE task; batching, scanning and averaging are the business of
`fit` and `fewshot`. Rules `chain` with each other and with any optax transformation.

References:
  Finn, Abbeel, Levine, Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017
  (https://arxiv.org/abs/1703.03400): the inner and the outer loop.
  Hessel et al., Optax, 2020 (https://github.com/google-deepmind/optax): the algebra that `chain` follows.
"""

import functools
import zlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmeta import invariant
from jmeta.losses import measure

Array = jax.Array
Params = Any  # a tree of arrays, {"block1": {"conv": {"kernel", "bias"}, ...}, "head": {...}}
LONGEST_UNROLL = 10
LONGEST_PERIOD = 4  # of phases that take turns, as alphas and weights do

P = ParamSpec("P")
R = TypeVar("R")


def memoise(function: Callable[P, R]) -> Callable[P, R]:
    """Returns the same object for the same hashable arguments, so that compiled programs are found again.

    Args:
      function: a pure function of its arguments that returns a model, a rule or a learner.

    Returns:
      The function with a memory of 128 results; unhashable arguments pass through unremembered.
    """
    remembered = functools.lru_cache(maxsize=128)(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            hash((args, tuple(kwargs.values())))
        except TypeError:
            return function(*args, **kwargs)
        return remembered(*args, **kwargs)

    return call


class Model(NamedTuple):
    """A network, as pure functions on one task's batch.

    Attributes:
      init: `(key) -> params`, a dict whose top level holds one entry a layer.
      apply: `(params, x[N, ...], stats=None) -> y[N, ...]`.
      layers: names of the top-level entries of `params` in forward order; empty if unknown.
      stats: `(params, x) -> stats`, the normalisation statistics of a batch, which `apply` then uses in place of
        those of its own batch; None unless the network is normalised by the support set.
      inputs: `(params, x) -> {layer: array[N, ...]}`, what comes into each layer; None if that is not known.
    """

    init: Callable[[Array], Params]
    apply: Callable[..., Array]
    layers: tuple[str, ...] = ()
    stats: Callable[[Params, Array], Any] | None = None
    inputs: Callable[[Params, Array], dict[str, Array]] | None = None


class Batch(NamedTuple):
    """Examples `x[N, ...]` with targets `y[N, ...]`; `mask[N]` is 0 where an example is padding."""

    x: Any
    y: Any
    mask: Any = None


class Task(NamedTuple):
    """A support set to learn from and a query set to be judged on. In reinforcement learning, both are the environment."""

    support: Any
    query: Any


class Tasks(NamedTuple):
    """A distribution of tasks.

    Attributes:
      sample: `(key, data) -> Task`, pure.
      data: arrays that `sample` reads, an argument of the compiled step and never a constant in it.
      stage: None where `data` lives on the device. Otherwise `(keys[n]) -> data[n, ...]` on the host, which gathers
        for each key the part of the data that `sample` needs for it.
      classes: labels are below it, where each class of an image set keeps its number and so needs an output of its own; None where
        labels are those of an episode.
    """

    sample: Callable[[Array, Any], Task]
    data: Any = ()
    stage: Callable[[Array], Any] | None = None
    classes: int | None = None

    def __repr__(self) -> str:
        """Its function and the shapes of its data."""
        shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "shape") else leaf, self.data)
        return f"Tasks({_qualified(self.sample)}, data={shapes})"

    def draw(self, key: Array) -> Task:
        """One task, wherever the data lives; outside of compiled functions."""
        data = self.data if self.stage is None else jax.tree.map(lambda leaf: leaf[0], self.stage(key[None]))
        return self.sample(key, data)


class Data(NamedTuple):
    """What the inner loop sees at each of `steps` steps.

    Attributes:
      steps: number of inner steps.
      at: `(key, source, step, act) -> Batch`; `source` is the task's support set, `act(x)` the current network, which
        only rollouts use. `step` is an int in unrolled steps and a traced int32 in scanned ones.
    """

    steps: int
    at: Callable[[Array, Any, Any, Callable[[Array], Array]], Batch]


def _no_hyper(params):
    return ()


def _no_reset(key, params, support, *, hyper):
    return params


def _no_gate(params, *, step, hyper, key):
    return params


def _no_phase(step):
    return None


def _no_meta(gradient, theta, phi):
    return gradient


_NO_UPDATE = optax.with_extra_args_support(optax.identity())


class Rule(NamedTuple):
    """How one task is learned. Every field but the name has a neutral default.

    Attributes:
      name: keys the rule's randomness and its entry in `Theta.hyper`.
      init: `(params) -> hyper`, the rule's own meta-parameters; usually `()`.
      reset: `(key, params, support, *, hyper) -> params`, once, as the task begins.
      gate: `(params, *, step, hyper, key) -> params`, before every forward pass, differentiable. `key` is None where the
        network predicts: random gates then act deterministically, as dropout does.
      update: an optax transformation for every backward pass; it may take `step`, `phase`, `hyper`, `key` and the model's
        `layers` by keyword. Gradients that it does not read are not computed, and parameters that it does not move not touched.
      phase: `(step: int) -> Hashable`, what is static about a step: steps of equal phase can share one scanned program.
      meta: `(gradient, theta, phi) -> gradient`, on a task's meta-gradient before it is averaged over tasks.
      clears: whether an inner optimiser's state that goes on from task to task (`carry_state`) becomes 0 where resets changed the
        parameters; in a chain for all of its resets, if one part asks for it.
      private: whether what the reset changes is the task's alone, so that a learner must not carry it on to the next.
      parts: the rules that a chain was made of; None in a rule that is no chain.
    """

    name: str
    init: Callable[[Params], Any] = _no_hyper
    reset: Callable[..., Params] = _no_reset
    gate: Callable[..., Params] = _no_gate
    update: optax.GradientTransformationExtraArgs = _NO_UPDATE
    phase: Callable[[int], Hashable] = _no_phase
    meta: Callable[[Any, Any, Any], Any] = _no_meta
    clears: bool = False
    private: bool = False
    parts: tuple["Rule", ...] | None = None


def _qualified(function: Any) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', '')}" if callable(function) else ""


def _lift(part: Any) -> tuple[Rule, ...]:
    """The rules in one argument of `chain`: none for an identity, several for a chain."""
    if isinstance(part, optax.GradientTransformation):
        return (
            ()
            if _qualified(part.update) == _qualified(optax.identity().update)
            else (Rule("optax", update=optax.with_extra_args_support(part)),)
        )
    if not isinstance(part, Rule):
        raise TypeError(
            f"chain: each part must be a jmeta Rule or an optax transformation, got {part!r} of type "
            f"{type(part).__name__}. Usual cause: a constructor that was not called, as in optax.sgd instead of optax.sgd(0.1)."
        )
    if part.parts is not None:
        return part.parts
    return () if part == Rule(part.name) else (part,)


def _names(rules: list[Rule]) -> list[str]:
    """Unique names, repeats suffixed: zap, sgd, zap_2."""
    seen: dict[str, int] = {}
    names = []
    for rule in rules:
        seen[rule.name] = seen.get(rule.name, 0) + 1
        names.append(rule.name if seen[rule.name] == 1 else f"{rule.name}_{seen[rule.name]}")
    return names


def _own(hyper: Any, name: str) -> Any:
    """A part's entry in the hyper of its chain, `()` where it has none."""
    return hyper[name] if hyper and name in hyper else ()


def _key_for(key: Array | None, name: str) -> Array | None:
    return None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode()))


def chain(*parts: Rule | optax.GradientTransformation) -> Rule:
    """Composes rules and optax transformations, applied left to right.

    `chain` is associative and `chain()` is its neutral element: nested chains are flattened, identities dropped, and each
    part's randomness and meta-parameters are found by its name (repeats are suffixed), not by its place.

    Args:
      *parts: rules, or optax transformations, which become rules that only update.

    Returns:
      A rule. Its `init` returns `{name: hyper}` for the parts that have meta-parameters; its other functions expect that dict.

    Raises:
      TypeError: a part is neither.

    >>> import optax
    >>> rule = chain(chain(optax.clip(1.0), optax.identity()), optax.sgd(0.1))
    >>> [part.name for part in rule.parts or ()]
    ['optax', 'optax']
    """
    rules = [rule for part in parts for rule in _lift(part)]
    named = list(zip(_names(rules), rules, strict=True))

    def init(params):
        hyper = {name: rule.init(params) for name, rule in named}
        return {name: own for name, own in hyper.items() if jax.tree.leaves(own)}

    def reset(key, params, support, *, hyper):
        for name, rule in named:
            params = rule.reset(_key_for(key, name), params, support, hyper=_own(hyper, name))
        return params

    def gate(params, *, step, hyper, key):
        for name, rule in named:
            params = rule.gate(params, step=step, hyper=_own(hyper, name), key=_key_for(key, name))
        return params

    def start(params):
        return tuple(rule.update.init(params) for rule in rules)

    def update(updates, state, params=None, *, step=0, phase=None, hyper=None, key=None, **context):
        phases = phase if phase is not None else (None,) * len(rules)
        new_state = []
        for (name, rule), own_state, own_phase in zip(named, state, phases, strict=True):
            own = {"step": step, "phase": own_phase, "hyper": _own(hyper, name), "key": _key_for(key, name)}
            updates, own_state = rule.update.update(updates, own_state, params, **own, **context)
            new_state.append(own_state)
        return updates, tuple(new_state)

    def phase(step):
        phases = tuple(rule.phase(step) for rule in rules)
        return None if all(each is None for each in phases) else phases

    def meta(gradient, theta, phi):
        for rule in rules:
            gradient = rule.meta(gradient, theta, phi)
        return gradient

    both = optax.GradientTransformationExtraArgs(start, update)
    clears, private = (any(getattr(rule, each) for rule in rules) for each in ("clears", "private"))
    return Rule("chain", init, reset, gate, both, phase, meta, clears, private, tuple(rules))


def reset_alone(rule: Rule, key: Array, params: Params, support: Any, hyper: Any) -> Params:
    """The resets of those parts of a chain alone whose changes are one task's own (`Rule.private`), by the keys of its reset."""
    parts = list(rule.parts or ())
    for name, part in zip(_names(parts), parts, strict=True):
        if part.private:
            params = part.reset(_key_for(key, name), params, support, hyper=_own(hyper, name))
    return params


class Theta(NamedTuple):
    """What is carried between tasks. A gradient learner adapted to a task (`phi`) is again a `Theta`.

    Attributes:
      params: the network's parameters.
      hyper: meta-parameters of the rules, `{rule name: ...}`.
      memory: carried but neither differentiated nor given to the outer optimiser: `{"state": inner optimiser's state}`
        where that persists, and in `phi` `{"stats": normalisation statistics of the support set}`.
    """

    params: Params
    hyper: Any = ()
    memory: Any = ()


class MetaLearner(NamedTuple):
    """What is carried between tasks and how it is learned, for ONE task.

    Attributes:
      init: `(key) -> theta`.
      adapt: `(key, theta, support) -> phi`.
      predict: `(phi, x[N, ...]) -> y[N, ...]`.
      curve: `(key, theta, task) -> y[steps + 1, N, ...]`, query outputs after 0..steps inner steps.
      grad: `(key, theta, task, *, meta_step) -> (base, gradient, info)`: the trainer steps from `base` along the mean
        `gradient` (a `Theta` without memory). `base` is `theta` itself where it does not depend on the task; where it does,
        only a meta-batch of 1 makes sense and `fit` refuses more. `info` holds scalars to log, at least `loss`; a `batch`
        among them is handed to the outer optimiser alone.
    """

    init: Callable[[Array], Any]
    adapt: Callable[[Array, Any, Any], Any]
    predict: Callable[[Any, Array], Array]
    curve: Callable[[Array, Any, Task], Array]
    grad: Callable[..., tuple[Any, Any, dict[str, Array]]]


class InnerLoop(NamedTuple):
    """The moves of a gradient learner on one task, and the parts of a `MetaLearner` that follow from them.

    Attributes:
      init: `(key) -> theta`, as in `MetaLearner`.
      begin: `(key, theta, support) -> theta`, the rule's resets.
      follow: `(key, theta, support, watch=None) -> (phi, seen)`, the steps. `watch(phi_k, k)` is called before the first
        step and after each; `seen` stacks what it returns, `[steps + 1, ...]`.
      output: `(phi, x, step) -> y`, the network as it stands after `step` steps.
      steps: how many.
    """

    init: Callable[[Array], Theta]
    begin: Callable[[Array, Theta, Any], Theta]
    follow: Callable[..., tuple[Theta, Any]]
    output: Callable[[Theta, Array, Any], Array]
    steps: int

    def walk(self, key: Array, theta: Theta, support: Any, watch: Callable | None = None) -> tuple[Theta, Any]:
        """Begins, and follows to the end: `phi`, and what `watch` saw."""
        key_reset, key_follow = jax.random.split(key)
        return self.follow(key_follow, self.begin(key_reset, theta, support), support, watch)

    def adapt(self, key: Array, theta: Theta, support: Any) -> Theta:
        """As in `MetaLearner`."""
        return self.walk(key, theta, support)[0]

    def predict(self, phi: Theta, x: Array) -> Array:
        """As in `MetaLearner`."""
        return self.output(phi, x, self.steps)

    def curve(self, key: Array, theta: Theta, task: Task) -> Array:
        """As in `MetaLearner`."""
        return self.walk(key, theta, task.support, lambda phi, step: self.output(phi, task.query.x, step))[1]


def evaluate_loss(loss: Callable[..., Array], outputs: Array, batch: Batch) -> Array:
    """Calls `loss(outputs, y)`, or `loss(outputs, y, mask)` where the batch has a mask."""
    return loss(outputs, batch.y) if batch.mask is None else loss(outputs, batch.y, batch.mask)


def check_kinds(name: str, key: Any, learner: Any, tasks: Any, theta: Any = None) -> None:
    """Refuses arguments that are something else, as where one was left out.

    Raises:
      TypeError: key is no typed key, learner no `MetaLearner`, tasks no `Tasks`, or theta neither a `Theta` nor None.
    """
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{name}: key must be a typed key as jax.random.key(0) makes it, got {type(key).__name__}.")
    for argument, value, kind in (("learner", learner, MetaLearner), ("tasks", tasks, Tasks)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: {argument} must be a jmeta.{kind.__name__}, got {type(value).__name__}.")
    if theta is not None and not isinstance(theta, Theta):
        raise TypeError(
            f"{name}: theta must be a jmeta.Theta, got {type(theta).__name__}. Usual causes: its params alone, or what fit "
            "returns; take fit(...).theta."
        )


def check_parts(model: Any, data: Any) -> None:
    """Refuses what is no network, or says nothing of what the inner steps see.

    Raises:
      TypeError: it is so.
    """
    if not isinstance(model, Model):
        raise TypeError(
            f"model: a jmeta.Model is expected, got {type(model).__name__}. Usual cause: a Flax module; "
            "jm.from_linen(module, example) or jm.from_nnx(make, example) makes a model of it."
        )
    if not isinstance(data, Data):
        raise TypeError(f"data: what the inner steps see is expected, as jm.repeat(5) for five steps, got {data!r}.")


def inner_loop(
    model: Model,
    loss: Callable[..., Array],
    rule: Rule | optax.GradientTransformation,
    data: Data,
    *,
    order: int = 2,
    unroll: bool | None = None,
    remat: bool | None = None,
    carry_state: bool = False,
) -> InnerLoop:
    """Builds the inner loop: `data.steps` steps of `rule` on the loss of the batches that `data` gives.

    Args:
      model: the network.
      loss: `(outputs, y) -> scalar`, or `(outputs, y, mask)` for batches with a mask.
      rule: how the task is learned.
      data: what is seen at each step.
      order: 2 differentiates through the inner gradients, 1 takes them as constants.
      unroll: True writes every step into the program, False scans each run of steps of equal phase, or of up to 4 phases that take
        turns, None scans runs of more than 10 steps. The numbers are the same.
      remat: whether second-order gradients compute each step anew on their way back (`jax.checkpoint`), so that memory holds
        the parameters after every step and what one step needs, for about a third more work. None does so in scanned runs.
      carry_state: the inner optimiser's state goes on from task to task, in `Theta.memory`.

    Returns:
      An `InnerLoop`.

    Raises:
      ValueError: `carry_state` is asked for under a rule whose reset is a task's alone, which that state would undo.
      TypeError: the model or the data is none.
    """
    check_parts(model, data)
    rule = chain(rule)
    if carry_state and rule.private:
        raise ValueError(
            "carry_state: the state would bring back what the rule silences for a task. Usual cause: jmeta.route with "
            "where='forward' and refresh='task'; use refresh='step'."
        )

    def init(key):
        params = model.init(key)
        return Theta(params, rule.init(params), {"state": rule.update.init(params)} if carry_state else ())

    def begin(key, theta, support):
        params, memory = rule.reset(key, theta.params, support, hyper=theta.hyper), theta.memory
        if carry_state and rule.clears:
            memory = {**memory, "state": cleared(rule.update, memory["state"], theta.params, params)}
        return theta._replace(params=params, memory=memory)

    def forward(params, hyper, x, step, key, stats=None):
        params = rule.gate(params, step=step, hyper=hyper, key=key)
        return model.apply(params, x) if stats is None else model.apply(params, x, stats)

    def output(phi, x, step):
        return forward(phi.params, phi.hyper, x, step, None, dict(phi.memory).get("stats"))

    def close(theta, params, state, support, step):
        memory = dict(theta.memory)
        if carry_state:
            memory["state"] = state
        if model.stats is not None:
            gated = rule.gate(params, step=step, hyper=theta.hyper, key=None)
            memory["stats"] = model.stats(gated, support.x)
        return theta._replace(params=params, memory=memory or ())

    step_of = _inner_step(forward, loss, rule, data, order, model.layers)

    def follow(key, theta, support, watch=None):
        state = rule.update.init(theta.params)
        if carry_state:
            state = jax.lax.stop_gradient(_carried(theta.memory["state"], state))
        advance = functools.partial(step_of, tuple(jax.random.split(key)), theta.hyper, support)

        def look(carry, step):
            params, state = carry
            return None if watch is None else watch(close(theta, params, state, support, step), step)

        anew = False if remat is None and order == 1 else remat
        (params, state), seen = _walk(advance, look, (theta.params, state), rule.phase, data.steps, unroll, anew)
        return close(theta, params, state, support, data.steps), seen

    return InnerLoop(init, begin, follow, output, data.steps)


def _inner_step(forward: Callable, loss: Callable, rule: Rule, data: Data, order: int, layers: tuple[str, ...]) -> Callable:
    """One inner step, `(keys, hyper, support, carry, step, phase) -> carry` with carry `(params, optimiser state)`."""

    def step_of(keys, hyper, support, carry, step, phase):
        params, state = carry
        key_data, key_rule = (jax.random.fold_in(key, step) for key in keys)
        key_gate, key_update = jax.random.split(key_rule)

        def update(grads):
            context = {"step": step, "phase": phase, "hyper": hyper, "key": key_update, "layers": layers}
            return rule.update.update(grads, state, params, **context)

        flow = invariant.flows(update, params)
        batch = data.at(key_data, support, step, lambda x: forward(params, hyper, x, step, key_gate))

        def step_loss(learned):
            return evaluate_loss(loss, forward(_filled(params, flow.read, learned), hyper, batch.x, step, key_gate), batch)

        grads = jax.grad(step_loss)(_chosen(params, flow.read)) if any(flow.read) else []
        if order == 1:
            grads = jax.lax.stop_gradient(grads)
        updates, state = flow.run(_filled(jax.tree.map(jnp.zeros_like, params), flow.read, grads))
        moved = optax.apply_updates(_chosen(params, flow.moved), _chosen(updates, flow.moved))
        return _filled(params, flow.moved, moved), state

    return step_of


def cleared(optimizer: optax.GradientTransformation, state: Any, before: Params, after: Params) -> Any:
    """An optimiser's state with 0 in place of what it remembers of parameters that a reset changed.

    Raises:
      ValueError: the optimiser does not tell which parts of its state belong to parameters.
    """

    def masked(value):
        return isinstance(value, optax.MaskedNode)

    def clear(slot, old, new):
        return slot if masked(slot) else jnp.where(old != new, jnp.zeros_like(slot), slot)

    try:
        return optax.tree.map_params(optimizer, clear, state, before, after, is_leaf=masked)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"slots: what the optimiser remembers of the parameters that were reset cannot be told apart ({error}). Usual cause: "
            "an optimiser whose start looks into the parameters: optax.partition, a rule for some layers alone, jmeta.resetting. "
            "Use slots='keep', and let jmeta.resetting be the outermost."
        ) from error


def _carried(state: Any, fresh: Any) -> Any:
    """The inner optimiser's state that theta carries, if it is of this optimiser."""
    shapes, wanted = (jax.tree.map(jnp.shape, each) for each in (state, fresh))
    if shapes != wanted:
        raise ValueError(
            "carry_state: theta carries a state of another inner optimiser. Usual cause: a theta that was trained under another "
            "rule or pattern; start from learner.init(key)._replace(params=theta.params)."
        )
    return state


def _chosen(tree: Any, which: list[bool]) -> list:
    """The leaves that are chosen."""
    return [leaf for leaf, chosen in zip(jax.tree.leaves(tree), which, strict=True) if chosen]


def _filled(tree: Any, which: list[bool], values: Any) -> Any:
    """The tree with other values for its chosen leaves."""
    leaves, structure = jax.tree.flatten(tree)
    left = iter(values)
    return structure.unflatten([next(left) if chosen else leaf for leaf, chosen in zip(leaves, which, strict=True)])


def _walk(
    advance: Callable, look: Callable, carry: Any, phase: Callable, steps: int, unroll: bool | None, remat: bool | None
) -> tuple[Any, Any]:
    """Takes all steps, run by run of repeating phases, unrolled or scanned; stacks what `look` sees before and after each."""
    phases = [phase(step) for step in range(steps)]
    seen = [jax.tree.map(lambda leaf: leaf[None], look(carry, 0))]
    for numbers in _repeats(phases):

        def body(carry, own, numbers=numbers):
            views = []
            for step, like in zip(own, numbers[0], strict=True):
                carry = advance(carry, step, phases[like])
                views.append(look(carry, step + 1))
            return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *views)

        if unroll or (unroll is None and numbers.size <= LONGEST_UNROLL):
            for own in numbers.tolist():
                once = functools.partial(body, own=own)  # whose steps stay numbers
                carry, views = (jax.checkpoint(once) if remat else once)(carry)
                seen.append(views)
        else:
            anew = functools.partial(jax.checkpoint, prevent_cse=False)  # a scan has no CSE to prevent
            carry, views = invariant.scan(body, carry, jnp.array(numbers), *([] if remat is False else [anew]))
            seen.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), views))
    return carry, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *seen)


def _repeats(phases: list[Hashable]) -> Iterator[np.ndarray]:
    """Splits the steps into runs `[repeats, period]`, in each of which the phases of a row are those of the others.

    >>> [run.tolist() for run in _repeats(["a", "b", "a", "b", "b", "b"])]
    [[[0, 1], [2, 3]], [[4], [5]]]
    """
    start = 0
    while start < len(phases):
        runs = [(period, _count(phases[start:], period)) for period in range(1, LONGEST_PERIOD + 1)]
        period, repeats = max(runs, key=lambda run: run[0] * run[1] if run[1] > 1 or run[0] == 1 else 0)
        yield np.arange(start, start + period * repeats).reshape(repeats, period)
        start += period * repeats


def _count(phases: list[Hashable], period: int) -> int:
    """How many times the first `period` phases come in a row."""
    times = 0
    while phases[times * period : (times + 1) * period] == phases[:period]:
        times += 1
    return times


def default_chunk(params: Params, batch: int) -> int:
    """How many tasks are best vmapped together: all of them, but one on a CPU where there are convolutions.

    A scan over tasks keeps the convolutions of each in a CPU's caches.
    """
    convolves = any(jnp.ndim(leaf) >= 4 for leaf in jax.tree.leaves(params))
    return 1 if convolves and jax.default_backend() == "cpu" else batch


def given(key: Array, query: Any, step: int, act: Callable[[Array], Array]) -> Any:
    """The default probe: the task's query set as it is. Reinforcement learning rolls the adapted policy out instead."""
    return query


def meta_gradient(objective: Callable[..., tuple[Array, tuple[Any, dict]]], meta: Callable = _no_meta) -> Callable:
    """Makes `MetaLearner.grad` of an objective that is differentiated with respect to theta.

    Args:
      objective: `(key, theta, task, meta_step) -> (value, (phi, info))`.
      meta: the rule's last word on the gradient of a task, `(gradient, theta, phi) -> gradient`.

    Returns:
      `grad(key, theta, task, *, meta_step) -> (theta, gradient, info)`. Inner optimiser state that `phi` carries goes into the
      memory of the base.
    """

    def grad(key, theta, task, *, meta_step):
        def value(learned):
            return objective(key, learned._replace(memory=theta.memory), task, meta_step)

        learned = theta._replace(memory=())
        (_, (phi, info)), gradient = jax.value_and_grad(value, has_aux=True)(learned)
        gradient = meta(gradient, theta, phi)
        if "state" not in dict(theta.memory):
            return theta, gradient, info
        return theta._replace(memory={**theta.memory, "state": phi.memory["state"]}), gradient, info

    return grad


def query_grad(
    adapt: Callable[[Array, Theta, Any], Any],
    predict: Callable[[Any, Array], Array],
    loss: Callable[..., Array],
    *,
    probe: Callable[..., Any] = given,
    meta: Callable = _no_meta,
) -> Callable:
    """`MetaLearner.grad` of the query loss after adaptation: MAML, Meta-SGD, ProtoNet, SNAIL.

    Args:
      adapt: `(key, theta, support) -> phi`.
      predict: `(phi, x) -> y`.
      loss: `(outputs, y) -> scalar`.
      probe: `(key, query, step, act) -> Batch`, how queries are obtained.
      meta: see `Rule.meta`.

    Returns:
      `grad(key, theta, task, *, meta_step) -> (theta, gradient, info)`; `info` holds the query loss and, for class labels, the
      query accuracy.
    """

    def objective(key, theta, task, meta_step):
        key_adapt, key_query = jax.random.split(key)
        phi = adapt(key_adapt, theta, task.support)
        query = probe(key_query, task.query, 0, lambda x: predict(phi, x))
        outputs = predict(phi, query.x)
        value = evaluate_loss(loss, outputs, query)
        return value, (phi, {"loss": value, **measure(outputs, query.y, query.mask)})

    return meta_gradient(objective, meta)
