"""What continual and transfer evaluation share: draws of classes and images, a fresh head, a rate chosen in a stage of its own."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy.special import stdtrit

from jmeta import hosts
from jmeta.core import Model, Params, memoise
from jmeta.mesh import check_mesh, count_devices, replicate, spread
from jmeta.rules.zap import zap_layer
from jmeta.tasks.episodes import choose
from jmeta.tasks.images import Images


def on_device(images: Images) -> tuple[jax.Array, ...]:
    """An image set as the draws want it: pixels, the classes' starts and counts, and the numbers below the largest count."""
    return (*jax.tree.map(jnp.asarray, (images.pixels, images.start, images.count)), jnp.arange(int(images.count.max())))


def draw(key: jax.Array, data: Any, classes: int, each: int) -> jax.Array:
    """Classes in random order and images of them, uint8 `[classes, each, height, width, channels]`."""
    pixels, start, count, numbers = data
    return pixels[choose(key, start, count, classes, each, len(numbers))]


def begin(
    model: Model, params: Params, key: jax.Array, pixels: jax.Array, frozen: bool, init: Any
) -> tuple[Callable[[Params, jax.Array], jax.Array], Params, jax.Array]:
    """A fresh head, and what learns: the network on images, or the head on features that are computed once.

    Returns:
      `forward(params, x[N, ...]) -> logits`, its parameters, and the examples `[classes, each, ...]`.
    """
    head = model.layers[-1]
    params = zap_layer(key, params, head, init=init, bias=True)
    x = pixels.astype(jnp.float32) / 255
    if not frozen:
        return model.apply, params, x
    inputs = model.inputs
    assert inputs is not None  # `check` saw to it
    return linear, params[head], jax.lax.map(lambda images: inputs(params, images)[head], x)


def linear(layer: Params, features: jax.Array) -> jax.Array:
    """The head of a network: `[N, features]` to logits."""
    return features @ layer["kernel"] + layer.get("bias", 0)


def right(forward: Callable, params: Params, examples: jax.Array) -> jax.Array:
    """Whether each of the examples `[classes, each, ...]` is told as its class: float32 `[classes, each]`."""

    def of_class(label_and_x):
        label, x = label_and_x
        return (forward(params, x).argmax(-1) == label).astype(jnp.float32)

    return jax.lax.map(of_class, (jnp.arange(len(examples)), examples))


@memoise
def runner(function: Callable, *program: Any) -> Callable:
    """A function of what varies, the same object for the same program, so that a second call compiles nothing.

    Args:
      function: `(*program, shared, key, rate) -> result`.
      *program: what does not vary.
    """
    return functools.partial(function, *program)


def two_stages(
    key: jax.Array,
    run: Callable,
    shared: Any,
    rates: Sequence[float],
    draws: int,
    select: int,
    judge: Callable[[Any], np.ndarray],
    together: int,
    mesh: Mesh | None,
    *,
    scout: Callable | None = None,
    further: Sequence[float] = (),
) -> tuple[Any, float, dict[float, tuple[float, float]]]:
    """Every rate on `select` draws; then the best alone on fresh draws.

    Args:
      key: of all draws.
      run: `(shared, key, rate) -> result`.
      shared: what all runs read.
      rates: to choose from; with a single one the first stage is left out.
      draws: of the second stage.
      select: of the first.
      judge: the scores `[runs]` of results with a leading axis of runs; higher is better.
      together: runs vmapped together on a device.
      mesh: devices that runs are spread over.
      scout: what runs in the first stage, if that needs less than `run`; `judge` takes its results as well.
      further: rates of which the next higher or lower one is tried while the best is the highest or the lowest so far.

    Returns:
      The results of the second stage, the rate, and for each rate its mean score in the first stage and its 95 % interval.
    """
    check_mesh(mesh)
    shared, devices = replicate(shared, mesh), count_devices(mesh)
    first, second = jax.random.split(key)
    program = functools.partial(_runs, scout or run, together, mesh, shared)
    tried, left = {}, tuple(rates) if len(rates) > 1 else ()
    while left:
        keys = jnp.tile(jax.random.split(first, select), len(left))
        scores = judge(_padded(program, keys, jnp.repeat(jnp.array(left), select), devices))
        by_rate = np.nan_to_num(np.asarray(scores, np.float64)).reshape(len(left), select)
        tried |= {rate: interval(own) for rate, own in zip(left, by_rate, strict=True)}
        left = beyond(tried, further)
    rate = max(tried, key=lambda each: tried[each][0], default=rates[0])
    program = functools.partial(_runs, run, together, mesh, shared)
    return _padded(program, jax.random.split(second, draws), jnp.full(draws, rate), devices), rate, tried


def beyond(tried: dict[float, tuple[float, float]], further: Sequence[float]) -> tuple[float, ...]:
    """The next higher or lower of some rates, where the best is the highest or the lowest that was tried; none otherwise.

    >>> beyond({3e-2: (0.5, 0.1), 1e-2: (0.4, 0.1)}, (1e-1, 3e-2, 1e-2))
    (0.1,)
    """
    best, lowest, highest = max(tried, key=lambda rate: tried[rate][0]), min(tried), max(tried)
    if lowest == highest or lowest < best < highest:
        return ()
    above, below = sorted(rate for rate in further if rate > best), sorted(rate for rate in further if rate < best)
    return tuple(above[:1] if best == highest else below[-1:])


@functools.partial(jax.jit, static_argnums=range(3))
def _runs(run, together, mesh, shared, keys, rates):
    def some(shared, keys, rates):
        size = together if together > 1 else None
        return jax.lax.map(lambda each: run(shared, *each), (keys, rates), batch_size=size)

    return spread(some, mesh, (False, True, True), mean=False)(shared, keys, rates)


def _padded(program: Callable, keys: jax.Array, rates: jax.Array, devices: int) -> Any:
    """Equal shares for the devices, some runs done twice if need be; the results on the host."""
    places = np.arange(-(-len(keys) // devices) * devices) % len(keys)
    found = program(keys[places], rates[places])
    return jax.tree.map(lambda leaf: hosts.whole(leaf)[: len(keys)], found)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half width of its 95 % interval by Student's t, since draws are few; NaN of a single value."""
    half = stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(half)


def shown(figure: tuple[float, float]) -> str:
    """A mean and its half width, if it has one."""
    mean, half = figure
    return f"{mean:.3f}" if np.isnan(half) else f"{mean:.3f} ± {half:.3f}"


def counted(draws: int) -> str:
    """What is said of the draws behind figures."""
    return f"95 % intervals, {draws} draws" if draws > 1 else "1 draw, so no interval"


def chosen(rate: float, tried: dict[float, tuple[float, float]]) -> str:
    """What is said of a rate beside a figure."""
    if not tried:
        return "solved" if np.isnan(rate) else f"rate {rate:g}"
    edge = "" if min(tried) < rate < max(tried) else ", at the edge of what was tried"
    return f"rate {rate:g} of {len(tried)}{edge}"


def check(
    name: str,
    model: Model,
    params: Params,
    images: Images,
    classes: int,
    shots: int,
    queries: int,
    frozen: bool,
    rates: Sequence[float],
    draws: int,
    select: int,
) -> None:
    """Refuses, before any work, what could not be measured.

    Raises:
      ValueError: as `continual` says.
    """
    for argument, value in {"classes": classes, "shots": shots, "queries": queries, "draws": draws, "select": select}.items():
        if value < 1:
            raise ValueError(f"{name}: {argument} must be at least 1, got {value}.")
    if len(rates) == 0 or not all(rate > 0 for rate in rates):
        raise ValueError(f"{name}: rates must be numbers above 0, got {tuple(rates)}.")
    if classes > len(images.names):
        raise ValueError(f"{name}: classes is {classes}, but the image set has {len(images.names)}. Usual cause: another split.")
    fewest = int(np.argmin(images.count))
    if shots + queries > images.count[fewest]:
        raise ValueError(
            f"{name}: shots + queries is {shots} + {queries}, but class {images.names[fewest]!r} has {images.count[fewest]} images."
        )
    if not model.layers or (frozen and model.inputs is None):
        raise ValueError(f"{name}: the model does not tell its layers and what comes into them; use from_linen or a built-in one.")
    x = jnp.asarray(images.pixels[:2], jnp.float32) / 255
    both, alone = model.apply(params, x), model.apply(params, x[:1])
    if both.shape[-1] < classes:
        raise ValueError(
            f"{name}: the head has {both.shape[-1]} outputs, too few for {classes} classes. Usual cause: a network trained on "
            "episodes; train one with an output for each class."
        )
    if float(jnp.abs(both[:1] - alone).max()) > 1e-3 * float(jnp.abs(both).max()):
        raise ValueError(f"{name}: the model's predictions depend on each other; train with norm='instance', 'group' or 'layer'.")
    if frozen and not _ends_linear(model, params, x, both):
        raise ValueError(
            f"{name}: frozen features need a last layer of kernel and bias whose outputs are the model's; {model.layers[-1]!r} "
            "is something else. Use frozen=False."
        )


def _ends_linear(model: Model, params: Params, x: jax.Array, outputs: jax.Array) -> bool:
    head = model.layers[-1]
    assert model.inputs is not None
    features = model.inputs(params, x)[head]
    if not isinstance(params[head], dict) or "kernel" not in params[head] or features.ndim != 2:
        return False
    return bool(jnp.allclose(linear(params[head], features), outputs, rtol=1e-3, atol=1e-4))
