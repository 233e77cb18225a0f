"""NRML: each task trains, or uses, the channels whose normalisation has the largest scales.

    chosen = the floor(keep * C) channels of a layer with the largest score, |scale| or scale

    where="update"     update of a filter <- chosen * update              every channel is used, the chosen ones are trained
    where="forward"    scale, bias <- chosen * (scale, bias)              the other channels are silent
    keep_meta < 1      a task's meta-gradient of a filter <- chosen by phi * it, before tasks are averaged

References:
  Cai et al., Neural Routing in Meta Learning, 2022 (https://arxiv.org/abs/2210.07932), and its released code.

Differs from the paper in: its released code ranks signed scales and only updates what is chosen, its README speaks of magnitudes,
its abstract of using parts of the network; all are here. Each task's own choice masks its meta-gradient. Equal scores, as all are
in a new network, are drawn by lot, where the code takes the first channels. The code is first order; here the learner says.
"""

import math
import numbers
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmeta.core import Params, Rule, memoise

Score = Literal["abs", "signed"]
Per = Literal["layer", "global"]
Path = tuple[Any, ...]  # names; numbers in a list of an NNX module


@memoise
def route(
    keep: float | tuple[float, ...],
    *,
    keep_meta: float | tuple[float, ...] = 1.0,
    where: Literal["update", "forward"] = "update",
    score: Score = "abs",
    refresh: Literal["step", "task"] = "step",
    per: Per = "layer",
    pairs: tuple[tuple[str, str], ...] | None = None,
) -> Rule:
    """Gives each task its own part of a network: `chain(route(0.5), optax.sgd(0.1))`.

    Before the first inner step the scales are the meta-learned ones and, once these differ, the choice is the same for all tasks:
    it takes `refresh="step"` and two steps or more to depend on the task. The choice itself has no gradient. Equal scales, as those
    of a new network, are drawn by the step's key, but in predictions and for `keep_meta`, which have none, by a lot that is always
    the same: while scales are equal, where="forward" may predict with other channels than those that a step has trained.

    In front of an optimiser gradients are masked, as in the released code, and behind it updates, `chain(optax.adam(1e-3),
    route(0.5))`. That is the same for plain gradient descent; an optimiser with momentum or decay moves filters that are not chosen
    unless the rule stands behind it. Patterns and `jmeta.only` take the optimiser, with the rule beside them,
    `chain(route(0.5), only("head", optax.sgd(0.1)))`: inside `only` it reaches those layers alone, with their normalisations.

    Args:
      keep: share of the channels that are chosen, of every layer or a share for each, in the order of their names (`block2` before
        `block10`).
      keep_meta: the same for the outer loop: kernels and biases of the filters that a task's phi does not choose are left out of
        its meta-gradient.
      where: "update" trains the chosen filters (kernel and bias), "forward" silences all channels but the chosen; the filters of
        silent ones have no gradient, but for what they add to statistics taken over several channels (norm "group" or "layer").
      score: whether the scales' magnitudes or their signed values are compared.
      refresh: whether the choice is made anew at each step, or holds for a task from its beginning; inside a pattern, for a layer
        from its first step on. For where="forward" it is kept as zeros in the scales and biases, so other resets stand in front of
        the rule, and channels whose scale and bias are 0 from the start stay silent.
      per: whether channels compete within their layer or, by `keep` alone, all with each other; each layer then keeps one at least.
      pairs: normalisations, and the layers before them whose channels they scale, as `(("block1/norm", "block1/conv"), ...)`. If
        None, the layers of as many channels and the same number beside them (`Conv_0` and `GroupNorm_0`), or the only ones; give
        them where normalisations stand before layers, or only some layers have one.

    Returns:
      A rule.

    Raises:
      ValueError: an argument is none of those; and, when the rule first meets the parameters, where they have no normalisation with
        a scale, no layer can be told to be the one that it scales, a layer would be left without channels, or filters are in sight
        of the rule, but not the normalisation that scales them.

    >>> rule = route(0.5)
    >>> params = {"conv": {"kernel": jnp.ones((1, 1, 3, 4))}, "norm": {"scale": jnp.array([3.0, 1, -4, 1]), "bias": jnp.zeros(4)}}
    >>> updates, _ = rule.update.update(params, rule.update.init(params), params)
    >>> updates["conv"]["kernel"][0, 0, 0].tolist()
    [1.0, 0.0, 1.0, 0.0]
    """
    named = {"where": (where, ("update", "forward")), "refresh": (refresh, ("step", "task"))}
    inner, meta = _Choice(keep, score, per, pairs), _Choice(keep_meta, score, per, pairs)
    inner.check("route", "keep", named)
    meta.check("route", "keep_meta", {})

    def init(params):
        sizes = [len(scale) for scale in inner.scales(params, "route").values()]
        for choice in (inner, meta):
            choice.counts(sizes, "route")
        if where == "update" or keep_meta != 1:
            check_pairs(params, pairs)
        return ()

    def reset(key, params, support, *, hyper):
        init(params)  # theta may be of another rule, whose init saw other parameters
        kept = (where, refresh) != ("forward", "task") or inner.all_of_them
        return params if kept else _silent(params, inner(params, key))

    def masked(gradient, theta, phi):
        return gradient._replace(params=_by_filter(gradient.params, phi.params, meta(phi.params), pairs))

    own: dict[str, Any] = {"update": _update(inner, refresh)} if where == "update" else _forward(inner, refresh)
    rule = Rule("route", init, reset, **({} if inner.all_of_them else own))
    return rule if keep_meta == 1 else rule._replace(meta=masked)


def channels(
    params: Params,
    keep: float | tuple[float, ...],
    *,
    score: Score = "abs",
    per: Per = "layer",
    key: jax.Array | None = None,
    pairs: tuple[tuple[str, str], ...] | None = None,
) -> dict[str, jax.Array]:
    """Which channels `route` chooses for these parameters.

    Args:
      params: of a network whose normalisation has scales.
      keep: see `route`.
      score: see `route`.
      per: see `route`.
      key: by which equal scores are drawn; a lot of its own, always the same, if None.
      pairs: see `route`; only the normalisations are read.

    Returns:
      For each normalisation `{"block1/norm": bool[C], ...}`.

    Raises:
      ValueError: as for `route`.

    >>> channels({"norm": {"scale": jnp.array([3.0, 1.0, -4.0, 1.5])}}, 0.5)["norm"].tolist()
    [True, False, True, False]
    """
    choice = _Choice(keep, score, per, pairs)
    choice.check("channels", "keep", {})
    choice.counts([len(scale) for scale in choice.scales(params, "channels").values()], "channels")
    return {_text(path): chosen for path, chosen in choice(params, key).items()}


class _Choice(NamedTuple):
    """How channels are chosen; called, it gives for each normalisation `bool[C]`."""

    keep: float | tuple[float, ...]
    score: Score
    per: Per
    pairs: tuple[tuple[str, str], ...] | None

    def __call__(self, params: Params, key: jax.Array | None = None) -> dict[Path, jax.Array]:
        """Equal scores are drawn by the key, or by a lot that is always the same."""
        scales = self.scales(params)
        scores = [jax.lax.stop_gradient(jnp.abs(scale) if self.score == "abs" else scale) for scale in scales.values()]
        keys = jax.random.split(jax.random.key(0) if key is None else key, len(scores) + 1)
        counts = self.counts([len(own) for own in scores])
        if self.per == "layer":
            best = [_best(each, own, count) for each, own, count in zip(keys[1:], scores, counts, strict=True)]
        else:  # one of each layer first, then the best of all
            first = [_best(each, own, 1) for each, own in zip(keys[1:], scores, strict=True)]
            raised = [jnp.where(one, jnp.inf, own) for one, own in zip(first, scores, strict=True)]
            best = _best(keys[0], jnp.concatenate([*raised, jnp.zeros(0)]), sum(counts))
            best = jnp.split(best, np.cumsum([len(own) for own in scores])[:-1])
        return dict(zip(scales, best, strict=False))

    @property
    def all_of_them(self) -> bool:
        """Whether no channel is left out."""
        return self.keep == 1 or (isinstance(self.keep, tuple) and set(self.keep) == {1})

    def scales(self, params: Params, name: str | None = None) -> dict[Path, jax.Array]:
        """The scales of every normalisation; with the name of a function in whose stead an error is raised where there are none."""
        found = {path: scale for path, scale in _norms(params) if self.pairs is None or _text(path) in dict(self.pairs)}
        missing = sorted({norm for norm, _ in self.pairs or ()} - {_text(path) for path in found})
        if name and (missing or not found):
            there = ", ".join(_text(path) for path, _ in _norms(params)) or "none"
            leaves = jax.tree_util.tree_leaves_with_path(params)
            kinds = ", ".join(sorted({str(getattr(path[-1], "key", path[-1])) for path, _ in leaves}))
            raise ValueError(
                f"{name}: the network has no normalisation with a scale{f' called {missing[0]}' if missing else ''}; it has "
                f"{there} and arrays called {kinds}. Usual cause: norm='none', or a normalisation without affine parameters."
            )
        return found

    def counts(self, sizes: list[int], name: str = "route") -> list[int]:
        """How many channels are chosen of each layer; over all layers only their sum says something."""
        if isinstance(self.keep, tuple) and len(self.keep) != len(sizes):
            raise ValueError(
                f"{name}: keep has {len(self.keep)} shares for {len(sizes)} normalisations; give one each, or one number. Usual "
                "cause: a rule inside only, which shows it some layers alone; chain it in front."
            )
        keeps = self.keep if isinstance(self.keep, tuple) else (self.keep,) * len(sizes)
        if self.per == "global":
            total = sum(sizes)
            return [max(len(sizes), _floor(keeps[0] * total) if sizes else 0)]
        found = [_floor(share * size) for share, size in zip(keeps, sizes, strict=True)]
        empty = [(share, size) for share, size, count in zip(keeps, sizes, found, strict=True) if not count]
        if empty:
            share, size = empty[0]
            raise ValueError(f"{name}: a layer would be left without channels, keep {share} of {size}; keep at least 1/{size}.")
        return found

    def check(self, name: str, argument: str, named: dict[str, tuple[str, tuple[str, ...]]]) -> None:
        """Refuses shares outside (0, 1] and words that mean nothing."""
        shares = self.keep if isinstance(self.keep, tuple) else (self.keep,)
        if not shares or not all(isinstance(share, numbers.Real) and 0 < share <= 1 for share in shares):
            raise ValueError(f"{name}: {argument} must be above 0 and at most 1, or a tuple of such shares, got {self.keep!r}.")
        if self.per == "global" and len(shares) > 1:
            raise ValueError(f"{name}: per='global' takes one share for all layers, got {argument} {self.keep!r}.")
        named = {"score": (self.score, ("abs", "signed")), "per": (self.per, ("layer", "global")), **named}
        for each, (value, known) in named.items():
            if value not in known:
                raise ValueError(f"{name}: {each} must be {known[0]!r} or {known[1]!r}, got {value!r}.")


def _floor(value: float) -> int:
    return math.floor(round(value, 9))  # 0.29 * 100 is 28.999999999999996


def _best(key: jax.Array, scores: jax.Array, count: int) -> jax.Array:
    """`bool[C]`, the `count` largest, equal ones by lot."""
    if count == len(scores):
        return jnp.ones(count, bool)
    order = jnp.lexsort((jax.random.bits(key, scores.shape), -scores))
    return jnp.zeros(len(scores), bool).at[order[:count]].set(True)


def _update(choose: _Choice, refresh: str) -> optax.GradientTransformationExtraArgs:
    """Where the chosen filters alone are trained. A task's choice is kept as one array, with the last step that it was for."""

    def start(params):
        size = sum(len(scale) for scale in choose.scales(params).values())
        return (jnp.array(np.iinfo(np.int32).max, jnp.int32), jnp.zeros(size, bool)) if refresh == "task" else ()

    def update(updates, state, params=None, *, step=0, key=None, **_):
        if params is None:
            raise ValueError("route: update needs params, as in rule.update.update(gradient, state, params).")
        _check_seen(params, choose.pairs)
        chosen = choose(params, key)
        if refresh == "task" and chosen:
            last, kept = state
            first = jnp.split(kept, np.cumsum([len(own) for own in chosen.values()])[:-1])
            goes_on = step > last  # or another task has begun, to which the optimiser's state is carried
            chosen = {path: jnp.where(goes_on, old, own) for (path, own), old in zip(chosen.items(), first, strict=True)}
            state = jnp.asarray(step, jnp.int32), jnp.concatenate(list(chosen.values()))
        return _by_filter(updates, params, chosen, choose.pairs), state

    return optax.GradientTransformationExtraArgs(start, update)


def _forward(choose: _Choice, refresh: str) -> dict[str, Any]:
    """The rule's gate where the other channels are silent."""

    def gate(params, *, step, hyper, key):
        if refresh == "step":
            return _silent(params, choose(params, key))
        # Keeps what the task's beginning has set to 0 from coming back by its gradient.
        return _silent(params, {path: _sounds(_at(params, path)) for path in choose.scales(params)})

    return {"gate": gate, "private": refresh == "task"}


def _silent(params: Params, chosen: dict[Path, jax.Array]) -> Params:
    """The parameters without the scales and biases of channels that are not chosen."""
    for path, here in chosen.items():
        params = _with(params, path, {name: jnp.where(here, leaf, 0) for name, leaf in _at(params, path).items()})
    return params


def _sounds(norm: Mapping[str, jax.Array]) -> jax.Array:
    """The channels whose scale or bias is not 0."""
    return jnp.any(jnp.stack([leaf != 0 for leaf in norm.values()]), 0)


def _by_filter(tree: Any, params: Params, chosen: dict[Path, jax.Array], pairs: tuple[tuple[str, str], ...] | None) -> Any:
    """A tree like the parameters, 0 at the kernels and biases of filters that are not chosen."""
    layers = paired(params, pairs)
    for path, here in chosen.items():
        for layer in layers.get(path, [])[:1]:  # none where the layer is masked
            own = _at(tree, layer)
            seen = [name for name in ("kernel", "bias") if _is_seen(own.get(name))]
            own = {**own, **{name: jnp.where(here, own[name], 0) for name in seen}}
            tree = _with(tree, layer, own)
    return tree


def paired(params: Params, pairs: tuple[tuple[str, str], ...] | None = None) -> dict[Path, list[Path]]:
    """For each normalisation the layers of as many channels that it may scale: one, if all is well.

    Args:
      params: a network's.
      pairs: see `route`.
    """
    if pairs is None:
        return {path: _beside(params, path, scale) for path, scale in _norms(params)}
    layers = dict(pairs)
    given = {path: (_path(params, layers[_text(path)]), scale) for path, scale in _norms(params) if _text(path) in layers}
    return {path: [layer] for path, (layer, scale) in given.items() if _fits(_at(params, layer), scale)}


def check_pairs(params: Params, pairs: tuple[tuple[str, str], ...] | None = None) -> None:
    """Checks that each normalisation scales one layer, and no other scales it.

    Raises:
      ValueError: it does not, or cannot be told.
    """
    found = {_text(path): fitting for path, fitting in paired(params, pairs).items()}
    layers = [path for fitting in found.values() for path in fitting]
    for norm in found if pairs is None else dict(pairs):
        fitting = found.get(norm, [])
        if len(fitting) != 1 or layers.count(fitting[0]) > 1:
            there = ", ".join(_text(path) for path in fitting) or "none"
            raise ValueError(
                f"route: which layer {norm} scales is not known: of those with as many channels it may be {there}. Usual cause: "
                "names unlike Conv_0 and GroupNorm_0; give pairs=((normalisation, layer), ...), or where='forward'."
            )


def _check_seen(params: Params, pairs: tuple[tuple[str, str], ...] | None) -> None:
    """Refuses filters in sight whose normalisation is masked: all of them would be trained."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))
    masked = [path for path, leaf in leaves if isinstance(leaf, optax.MaskedNode) and all(hasattr(key, "key") for key in path)]
    for path in masked:
        *norm, name = (key.key for key in path)
        if name != "scale" or "kernel" in _at(params, tuple(norm)):
            continue
        given = [_path(params, layer) for each, layer in pairs or () if each == _text(tuple(norm))]
        layers = _around(params, tuple(norm)) if pairs is None else given
        seen = [_text(layer) for layer in layers if _is_seen(_at(params, layer).get("kernel"))]
        if seen:
            raise ValueError(
                f"route: it sees {seen[0]}, but not {_text(tuple(norm))} beside it, whose scales choose its filters. Usual cause: "
                "only('a/layer', chain(route(0.5), ...)); name the normalisation too, or chain(route(0.5), only(...))."
            )


def _is_seen(leaf: Any) -> bool:
    """Whether it is an array, neither masked nor missing."""
    return hasattr(leaf, "shape")


def _beside(params: Params, norm: Path, scale: jax.Array) -> list[Path]:
    """The layers of as many channels beside a normalisation: the one of its number, or those that have none."""
    return _around(params, norm, lambda part: _fits(part, scale))


def _around(params: Params, norm: Path, fits: Callable[[Any], bool] = lambda part: isinstance(part, Mapping)) -> list[Path]:
    """The parts beside a normalisation that fit: the one of its number, or those that have none."""
    fitting = [name for name, part in _at(params, norm[:-1]).items() if fits(part)]
    number = _number(norm[-1])
    same = [name for name in fitting if number and _number(name) == number]
    return [(*norm[:-1], name) for name in same or (name for name in fitting if not (number and _number(name)))]


def _fits(part: Any, scale: jax.Array) -> bool:
    return isinstance(part, Mapping) and getattr(part.get("kernel"), "shape", ())[-1:] == scale.shape


def _text(path: Path) -> str:
    return "/".join(map(str, path))


def _number(name: Any) -> str:
    found = re.search(r"\d+$", str(name))
    return found.group() if found else ""


def _norms(params: Any, path: Path = ()) -> Iterator[tuple[Path, jax.Array]]:
    """Every part that has a scale and no kernel, in the order of the names; parts that are masked are not seen."""
    if not isinstance(params, Mapping):
        return
    if path and "kernel" not in params and getattr(params.get("scale"), "ndim", None) == 1:
        yield path, params["scale"]
        return
    for name in sorted(params, key=_natural):
        yield from _norms(params[name], (*path, name))


def _natural(name: Any) -> list[tuple[int, str]]:
    """Sorts `block2` before `block10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(name)) if part]


def _path(params: Params, text: str) -> Path:
    """The path that is written so."""
    path = ()
    for name in text.split("/"):
        path = (*path, next((key for key in _at(params, path) if str(key) == name), name))
    return path


def _at(tree: Any, path: Path) -> Any:
    """What stands at a path; nothing where there is none."""
    for name in path:
        tree = tree.get(name, {})
    return tree


def _with(tree: Any, path: Path, value: Any) -> Any:
    """The tree with another value at a path."""
    return {**tree, path[0]: _with(tree[path[0]], path[1:], value)} if path else value
