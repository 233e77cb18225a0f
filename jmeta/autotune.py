"""What is found out once and kept in the user's cache: how the tasks of a meta-batch run fastest, and compiled programs.

Neither changes what is computed but for the order of sums.
"""

import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jmeta.checkpoint import write_json
from jmeta.core import LONGEST_UNROLL, MetaLearner, Tasks, default_chunk
from jmeta.hosts import spans_hosts
from jmeta.mesh import check_batch, check_mesh, count_devices, processor, replicate, usable_cores
from jmeta.tasks.download import cache_dir
from jmeta.train import batch_gradient

FILE = "tune.json"
FEW_STEPS = 3  # of which a scan saves nothing
MANY_STEPS = 2 * LONGEST_UNROLL  # unrolled, more take longer to compile than they could save
GIVE_UP = 3.0  # times the best so far
CALLS, CALL_SECONDS = 10, 2.0  # most calls of a candidate, and seconds after which no further one begins
QUICK_SECONDS = 0.1  # a first call as short as this says little, and further ones cost little


class Choice(NamedTuple):
    """What `tune` found.

    Attributes:
      chunk: tasks vmapped together on a device, to give to `jmeta.fit(chunk=)`.
      unroll: whether the inner steps are unrolled, to make the learner with.
      seconds: of one meta-gradient by `(chunk, unroll)`; inf for a program that needs more memory than there is.
      source: "measured", or "cache" where an earlier call on such a machine measured.
    """

    chunk: int
    unroll: bool
    seconds: dict[tuple[int, bool], float]
    source: str

    def __str__(self) -> str:
        """`chunk 1, unrolled (measured: chunk 1 unrolled 0.151 s, chunk 16 unrolled 0.42 s)`."""
        times = ", ".join(f"{_named(*each)} {_spelled(value)}" for each, value in self.seconds.items())
        when = "measured" if self.source == "measured" else "measured before"
        return f"{_named(self.chunk, self.unroll, ', ')} ({when}: {times})"


def _named(chunk: int, unroll: bool, between: str = " ") -> str:
    return f"chunk {chunk}{between}{'unrolled' if unroll else 'scanned'}"


def _spelled(seconds: float) -> str:
    return f"{seconds:.3g} s" if math.isfinite(seconds) else "too large for the memory"


def tune(
    key: jax.Array,
    make_learner: Callable[[bool], MetaLearner],
    tasks: Tasks,
    batch: int,
    *,
    mesh: Mesh | None = None,
    chunks: Sequence[int] | None = None,
    unrolls: Sequence[bool] | None = None,
    cached: bool = True,
) -> Choice:
    """Measures how the meta-gradient of a batch of tasks runs fastest on these devices.

    First the chunks are compared, with the first of the unrolls, then the unrolls with the best chunk. Each candidate is compiled
    once, which takes most of the time, and called a few times; one whose first call takes more than 3 times the best is given up.
    `fit` and `fewshot` never tune by themselves: their numbers would depend, in the order of sums, on a clock.

    Args:
      key: of the tasks and of theta that are measured with.
      make_learner: `(unroll) -> MetaLearner`.
      tasks: what will be trained on, on the device or on the host.
      batch: tasks of a meta-step.
      mesh: devices that they will be spread over.
      chunks: candidates, divisors of each device's share of batch. If None 1 and the whole share, and on accelerators a quarter
        of the share too.
      unrolls: candidates. If None, True for up to 3 inner steps, True and False for up to 20, and False for more.
      cached: whether a choice made before for such a learner, tasks and devices is taken from the user's cache
        (`tune.json` in the folder that JMETA_CACHE_DIR names or `~/.cache/jmeta`), and a new one kept there.

    Returns:
      A `Choice`; print it.

    Raises:
      ValueError: batch, chunks or unrolls do not fit, or no candidate fits into the memory.

    >>> import jmeta as jm, optax
    >>> make = lambda unroll: jm.maml(jm.mlp(1), jm.mse, optax.sgd(0.01), jm.repeat(1), unroll=unroll)
    >>> tune(jax.random.key(0), make, jm.sinusoid(5), 4, chunks=(4,), cached=False).chunk
    4
    """
    check_mesh(mesh)
    if spans_hosts(mesh):
        raise ValueError("tune: the mesh spans several processes, whose clocks would disagree; give chunk and unroll yourself.")
    if batch < 1:
        raise ValueError(f"tune: batch must be at least 1, got {batch}.")
    check_batch(batch, mesh)
    data, staged = _data(key, tasks, batch)
    own = jax.tree.map(lambda leaf: leaf[0], data) if staged else data
    shapes = jax.eval_shape(make_learner(False).init, key), jax.eval_shape(tasks.sample, key, own)
    unrolls = _unrolls(unrolls, lambda: _steps(make_learner(False), *shapes))
    chunks = _chunks(chunks, shapes[0].params, batch // count_devices(mesh))
    entry = _described(make_learner(unrolls[0]), shapes, batch, mesh, chunks, unrolls)
    name = hashlib.sha256(json.dumps(entry).encode()).hexdigest()[:32]
    if cached and (found := _remembered(name, chunks, unrolls)):
        return _choice(found, "cache")
    theta = make_learner(unrolls[0]).init(key)
    arguments = (*replicate((key, theta, data), mesh), 0)

    def measure(chunk, unroll, best):
        gradient = batch_gradient(make_learner(unroll), tasks.sample, batch, chunk, mesh)
        return _measure(functools.partial(gradient, staged=staged), arguments, _room(mesh), best)

    choice = _choice(_search(measure, chunks, unrolls), "measured")
    if cached:
        _remember(name, {**entry, "seconds": _rows(choice.seconds)})
    return choice


def _search(measure: Callable[[int, bool, float], float], chunks: Sequence[int], unrolls: Sequence[bool]) -> dict:
    """The seconds of each chunk with the first unroll, then of the best chunk with the others."""
    seconds: dict[tuple[int, bool], float] = {}
    for chunk in chunks:
        seconds[chunk, unrolls[0]] = measure(chunk, unrolls[0], min(seconds.values(), default=math.inf))
    best = min(seconds, key=seconds.__getitem__)[0]
    for unroll in unrolls[1:]:
        seconds[best, unroll] = measure(best, unroll, min(seconds.values()))
    return seconds


def _choice(seconds: dict[tuple[int, bool], float], source: str) -> Choice:
    best = min(seconds, key=seconds.__getitem__)
    if not math.isfinite(seconds[best]):
        tried = ", ".join(_named(*each) for each in seconds)
        raise ValueError(
            f"tune: none of {tried} fits into the memory of the devices. Usual causes: too large a batch of tasks for one device, "
            "many unrolled inner steps, chunks without a small one, or other programs on the device."
        )
    return Choice(*best, seconds, source)


def _data(key: jax.Array, tasks: Tasks, batch: int) -> tuple[Any, bool]:
    """What `batch_gradient` reads, and whether that has a leading axis of tasks: host-resident images are fetched for one batch."""
    if tasks.stage is None:
        return tasks.data, False
    task_keys = jax.vmap(lambda index: jax.random.split(jax.random.fold_in(key, index))[0])(jnp.arange(batch))
    return jax.tree.map(jnp.asarray, tasks.stage(task_keys)), True


def _steps(learner: MetaLearner, theta: Any, task: Any) -> int:
    """Inner steps of a learner, by the length of its curve."""
    return jax.eval_shape(learner.curve, jax.random.key(0), theta, task).shape[0] - 1


def _unrolls(unrolls: Sequence[bool] | None, steps: Callable[[], int]) -> tuple[bool, ...]:
    if unrolls is None:
        count = steps()
        if count > LONGEST_UNROLL:
            return (False, True) if count <= MANY_STEPS else (False,)
        return (True, False) if count > FEW_STEPS else (True,)
    unrolls = tuple(dict.fromkeys(unrolls)) if isinstance(unrolls, Iterable) else (unrolls,)
    if not unrolls or not all(isinstance(each, bool) for each in unrolls):
        raise ValueError(f"tune: unrolls must be one or more of True and False, got {unrolls}.")
    return unrolls


def _chunks(chunks: Sequence[int] | None, params: Any, share: int) -> tuple[int, ...]:
    """The candidates; the default comes first, since it is the likeliest to make others be given up."""
    if chunks is None:
        quarter = (share // 4,) if share % 4 == 0 and jax.default_backend() != "cpu" else ()
        return tuple(dict.fromkeys((default_chunk(params, share), share, *quarter, 1)))
    chunks = tuple(dict.fromkeys(chunks)) if isinstance(chunks, Iterable) else (chunks,)
    if not chunks or any(not isinstance(chunk, int) or chunk < 1 or share % chunk for chunk in chunks):
        raise ValueError(f"tune: chunks must be divisors of each device's share of batch, {share} tasks, got {chunks}.")
    return chunks


def _measure(gradient: Callable, arguments: tuple, room: float, best: float) -> float:
    """Seconds of a call; inf where the program needs more memory than `room`, in bytes on a device."""
    try:
        program = jax.jit(gradient).lower(*arguments).compile()
        memory = program.memory_analysis()
        if memory is not None and memory.temp_size_in_bytes > room:
            return math.inf
        return _time(lambda: jax.block_until_ready(program(*arguments)), best)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf


def _time(call: Callable[[], Any], best: float) -> float:
    """The shortest of a few calls."""
    times: list[float] = []
    began = time.perf_counter()
    while not times or (len(times) < CALLS and time.perf_counter() - began < CALL_SECONDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if len(times) == 1 and times[0] > max(GIVE_UP * best, QUICK_SECONDS):
            break
    return min(times)


def _room(mesh: Mesh | None) -> float:
    """Bytes that a program may take on each device, inf if unknown; a CPU's devices share the machine's memory."""
    device = _first_device(mesh)
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats.get("bytes_limit", math.inf) - stats.get("bytes_in_use", 0)
    limit = Path("/sys/fs/cgroup/memory.max")
    quota = limit.read_text().strip() if limit.is_file() else "max"
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return math.inf
    return (physical if quota == "max" else min(physical, int(quota))) / count_devices(mesh)


def _first_device(mesh: Mesh | None) -> Any:
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def _described(
    learner: MetaLearner, shapes: tuple, batch: int, mesh: Mesh | None, chunks: Sequence[int], unrolls: Sequence[bool]
) -> dict[str, Any]:
    """All that a choice depends on: devices, versions, shapes, and the program of one task's gradient."""
    device = _first_device(mesh)
    kind = f"{processor()}, {usable_cores()} cores" if device.platform == "cpu" else device.device_kind
    program = jax.make_jaxpr(functools.partial(learner.grad, meta_step=0))(jax.random.key(0), *shapes)
    text = re.sub(r"0x[0-9a-f]+", "", str(program))  # addresses differ from process to process
    theta, task = ([f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(tree)] for tree in shapes)
    return {
        "device": f"{device.platform} {kind}",
        "devices": count_devices(mesh),
        "jax": jax.__version__,
        "batch": batch,
        "theta": theta,
        "task": task,
        "program": hashlib.sha256(text.encode()).hexdigest(),
        "chunks": list(chunks),
        "unrolls": list(unrolls),
    }


def _rows(seconds: dict[tuple[int, bool], float]) -> list[dict[str, Any]]:
    """As JSON, which has no inf."""
    return [
        {"chunk": chunk, "unroll": unroll, "seconds": value if math.isfinite(value) else None}
        for (chunk, unroll), value in seconds.items()
    ]


def _entries() -> dict[str, Any]:
    """What the cache holds; nothing where the file cannot be read, since all of it can be measured again."""
    try:
        stored = json.loads((cache_dir() / FILE).read_text())
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _remembered(name: str, chunks: Iterable[int], unrolls: Iterable[bool]) -> dict[tuple[int, bool], float] | None:
    """The seconds kept under that name, or None where there are none or they make no sense."""
    try:
        rows = _entries()[name]["seconds"]
        found = {(row["chunk"], row["unroll"]): math.inf if row["seconds"] is None else float(row["seconds"]) for row in rows}
    except (KeyError, TypeError, ValueError):
        return None
    known = set(itertools.product(chunks, unrolls))
    return found if found and set(found) <= known and math.isfinite(min(found.values())) else None


def _remember(name: str, entry: dict[str, Any]) -> None:
    try:
        write_json(cache_dir() / FILE, {**_entries(), name: entry})
    except OSError:  # a cache that cannot be written, or that another process is just writing
        return


def use_cache() -> bool:
    """Keeps compiled programs in the user's cache, `xla` in the folder that JMETA_CACHE_DIR names or `~/.cache/jmeta`.

    Later processes then load what they would compile, and compute the same numbers. Call it once, after `jmeta.use_cores`. A cache
    that the user has set up for JAX, or switched off, stays as it is (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE).
    JAX's own keys tell versions, options and kinds of devices apart, CPUs by their instruction sets. The folder grows by a few MiB
    for each kind of run, and may be deleted at any time.

    Returns:
      Whether that folder is in use. On a CPU it is not where compiled programs cannot be loaded again.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return False
    try:
        folder = cache_dir() / "xla"
        folder.mkdir(exist_ok=True)
    except OSError:
        return False
    if not os.access(folder, os.W_OK) or (jax.default_backend() == "cpu" and not _loads_again()):
        return False
    config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a run has 200 programs, most of them small
    return True


def _loads_again() -> bool:
    """Whether this CPU loads a compiled program without complaint.

    For some CPUs XLA compiles with tuning hints that its own loader takes for missing instructions, in lines on stderr for every
    program (https://github.com/jax-ml/jax/issues/38445).
    """
    from jax.experimental.serialize_executable import deserialize_and_load, serialize

    if sys.platform != "linux":
        return False  # loading large programs has crashed on macOS
    program = serialize(jax.jit(lambda x: x + 1).lower(1.0).compile())
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            deserialize_and_load(*program)
        except Exception:
            return False
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        said.seek(0)
        return b"machine type" not in said.read().lower()
