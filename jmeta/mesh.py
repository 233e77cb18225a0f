"""The tasks of a meta-batch, spread over devices: GPUs, TPUs, or the cores of a CPU.

Each device takes its share of the tasks; parameters are replicated, and one mean of the gradients ends a meta-step. This is the job
that `jax.pmap` used to do.

References:
  JAX documentation, "Manual parallelism with shard_map" (https://docs.jax.dev/en/latest/notebooks/shard_map.html).
"""

import fnmatch
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS, PARAMS = "tasks", "params"
MOST_CORES = 16
FORCED = "xla_force_host_platform_device_count"


def use_cores(count: int | None = None) -> None:
    """Has JAX see each core of a CPU as a device, so that `task_mesh` finds them.

    Tasks spread over cores run faster than cores that share the work of one task. Call it before the first computation. Each device
    holds a copy of the data. A number that XLA_FLAGS or JAX_NUM_CPU_DEVICES names stays.

    Args:
      count: devices to make; if None the cores that this process may use, but 16 at most.

    Raises:
      ValueError: count is below 1.
      RuntimeError: JAX has computed already.
    """
    if count is not None and count < 1:
        raise ValueError(f"use_cores: count must be at least 1, got {count}.")
    if FORCED not in os.environ.get("XLA_FLAGS", "") and "JAX_NUM_CPU_DEVICES" not in os.environ:
        try:
            jax.config.update("jax_num_cpu_devices", min(usable_cores(), MOST_CORES) if count is None else count)
        except RuntimeError as error:
            raise RuntimeError(
                f"use_cores: JAX has computed already, and has its {jax.device_count()} devices. Call it first of all, before "
                "jax.random.key; in a notebook restart the kernel."
            ) from error


def usable_cores() -> int:
    """CPU cores that this process may use, as its affinity and its container's quota allow."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = Path("/sys/fs/cgroup/cpu.max")
    quota, _, period = limit.read_text().partition(" ") if limit.is_file() else ("max", "", "")
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


def processor() -> str:
    """The CPU's model, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def task_mesh(count: int | None = None, *, params: int = 1) -> Mesh | None:
    """A mesh with an axis "tasks", to give to `jmeta.fit` and `jmeta.fewshot`.

    A CPU counts as one device until `jmeta.use_cores` is called.

    Args:
      count: devices to use; all if None.
      params: devices that share one copy of the parameters, for networks that are too large for one: the mesh then has a second
        axis, "params", and `jmeta.init_sharded` lays the parameters out over it.

    Returns:
      The mesh, or None for one device, which needs none.

    Raises:
      ValueError: there are fewer devices, or params does not divide count.
    """
    devices = jax.devices()
    count = len(devices) if count is None else count
    if not 1 <= count <= len(devices):
        raise ValueError(
            f"devices: must be 1 to {len(devices)}, which is how many JAX sees, got {count}. Usual causes: a run that began on a "
            "larger machine, to be resumed with fewer --devices; a CPU, which counts as one until jmeta.use_cores() is called."
        )
    if params < 1 or count % params:
        raise ValueError(f"task_mesh: params must divide the number of devices, {count}, got {params}.")
    if count == 1:
        return None
    shape, names = ((count,), (AXIS,)) if params == 1 else ((count // params, params), (AXIS, PARAMS))
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=devices[:count])


def check_mesh(mesh: Mesh | None) -> None:
    """Refuses what is not a mesh of tasks.

    Raises:
      TypeError, ValueError: it is no mesh, or has other axes.
    """
    if mesh is None:
        return
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh: expected a jax.sharding.Mesh as jmeta.task_mesh(2) makes it, got {mesh!r}.")
    if mesh.axis_names not in ((AXIS,), (AXIS, PARAMS)) or set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(
            f"mesh: expected an axis 'tasks' of type Auto, and perhaps one 'params', got axes {mesh.axis_names} of types "
            f"{mesh.axis_types}. Usual cause: jax.make_mesh with its defaults; use jmeta.task_mesh()."
        )


def share(batch: int, devices: int) -> int:
    """The most of `devices` devices that can take equal shares of `batch` tasks.

    >>> share(32, 2), share(25, 8), share(1, 8)
    (2, 5, 1)
    """
    return max(count for count in range(1, devices + 1) if batch % count == 0)


def count_devices(mesh: Mesh | None) -> int:
    """Devices, or groups of them that share one copy of the parameters, that tasks are shared out among; 1 if None."""
    return 1 if mesh is None else mesh.shape[AXIS]


def check_batch(batch: int, mesh: Mesh | None) -> None:
    """Refuses a meta-batch that the devices cannot share equally.

    Raises:
      ValueError: it names the nearest sizes that fit.
    """
    devices = count_devices(mesh)
    below = batch - batch % devices
    if below != batch:
        fitting = " and ".join(str(size) for size in (below, below + devices) if size)
        raise ValueError(
            f"mesh: batch must be divisible by the number of devices, got batch {batch} and {devices} devices; the nearest batches "
            f"that fit: {fitting}."
        )


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Puts a copy of every array on every device of the mesh; arrays that lie on it already stay as they lie."""
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: leaf if _lies_on(leaf, mesh) else _put(leaf, everywhere), tree)


def put_like(tree: Any, like: Any, mesh: Mesh | None) -> Any:
    """Arrays that each process has whole, laid out on the mesh as those of `like` are."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    return jax.tree.map(lambda leaf, other: _put(leaf, other.sharding), tree, like)


def layout_of(tree: Any, mesh: Mesh | None) -> tuple[NamedSharding, ...] | None:
    """Where the leaves lie on a mesh on which parameters are shared out, or None."""
    return None if mesh is None or PARAMS not in mesh.axis_names else tuple(leaf.sharding for leaf in jax.tree.leaves(tree))


def _lies_on(leaf: Any, mesh: Mesh) -> bool:
    sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    return isinstance(sharding, NamedSharding) and sharding.mesh == mesh


def split(tree: Any, mesh: Mesh | None) -> Any:
    """Shares every array's leading axis of tasks out among the devices of the mesh."""
    return tree if mesh is None else _put(tree, NamedSharding(mesh, PartitionSpec(AXIS)))


def _put(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays that each process has whole, on the devices of all processes."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        own = np.asarray(leaf)
        return jax.make_array_from_callback(own.shape, sharding, lambda index: own[index])

    return jax.tree.map(put, tree)


def on_one(tree: Any, mesh: Mesh | None) -> Any:
    """The copy on this process's first device, so that what follows is computed once; parameters that are shared out stay so."""
    if mesh is None or not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
        return tree
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def init_sharded(key: jax.Array, learner: Any, mesh: Mesh, split: Mapping[str, int]) -> Any:
    """A theta for networks too large for one device: `learner.init(key)`, each device making only the parts that it keeps.

    Give it to `jmeta.fit(theta=, mesh=)`; the outer optimiser's state is laid out like it, and the compiler does the rest (GSPMD).

    Args:
      key: as for `learner.init`.
      learner: a meta-learner.
      mesh: with an axis "params", as `jmeta.task_mesh(8, params=4)` makes it.
      split: for paths of parameters, patterns such as "*/kernel", the axis that is divided; the first that fits counts. Parameters
        that none fits are copied to every device.

    Returns:
      The theta, laid out on the mesh.

    Raises:
      ValueError: the mesh has no such axis, a pattern fits no parameter, or an axis cannot be divided equally.
    """
    check_mesh(mesh)
    if mesh is None or PARAMS not in mesh.axis_names:
        raise ValueError("init_sharded: the mesh must have an axis 'params', as jmeta.task_mesh(8, params=4) makes it.")
    theta, count = jax.eval_shape(learner.init, key), mesh.shape[PARAMS]
    paths = {
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(theta.params)
    }
    for pattern in split:
        if not fnmatch.filter(paths, pattern):
            raise ValueError(f"init_sharded: {pattern!r} fits no parameter; there are {', '.join(sorted(paths))}.")

    def layout(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axis = next((split[pattern] for pattern in split if fnmatch.fnmatch(name, pattern)), None)
        if axis is None:
            return NamedSharding(mesh, PartitionSpec())
        if not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] % count:
            raise ValueError(f"init_sharded: axis {axis} of {name}, of shape {leaf.shape}, cannot be divided by {count} devices.")
        spec: list[str | None] = [None] * leaf.ndim
        spec[axis] = PARAMS
        return NamedSharding(mesh, PartitionSpec(*spec))

    everywhere = jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec()), theta)
    shardings = everywhere._replace(params=jax.tree_util.tree_map_with_path(layout, theta.params))
    return jax.jit(learner.init, out_shardings=shardings)(key)


def own_shares(make: Callable[[jax.Array], Any], keys: jax.Array, mesh: Mesh | None) -> Any:
    """Arrays `[steps, tasks, ...]` of data from the host, of which each process makes only the tasks of its own devices.

    Args:
      make: `(keys[steps, some tasks]) -> tree` of arrays with those leading axes.
      keys: `[steps, tasks]`.
      mesh: of axis "tasks".
    """
    if mesh is None or not mesh.is_multi_process:
        return jax.tree.map(jnp.asarray, make(keys))
    sharding = NamedSharding(mesh, PartitionSpec(None, AXIS))
    places = sharding.addressable_devices_indices_map(keys.shape)
    made = {str(place): make(keys[place]) for place in places.values()}  # devices that share parameters share tasks
    parts = [jax.device_put(made[str(place)], device) for device, place in places.items()]

    def join(*own):
        return jax.make_array_from_single_device_arrays((*keys.shape, *own[0].shape[2:]), sharding, list(own))

    return jax.tree.map(join, *parts)


def _of_last(leaf: jax.Array) -> jax.Array:
    """The last device's integers, bit for bit, by a sum of floats, which the compiler joins with that of the gradients."""
    if leaf.dtype.itemsize == 1:  # bools among them
        return _of_last(leaf.astype(jnp.int32)).astype(leaf.dtype)
    parts = jax.lax.bitcast_convert_type(leaf, jnp.uint16).astype(jnp.float32)
    is_last = jax.lax.axis_index(AXIS) == jax.lax.axis_size(AXIS) - 1
    total = jax.lax.psum(jnp.where(is_last, parts, 0), AXIS)
    return jax.lax.bitcast_convert_type(total.astype(jnp.uint16), leaf.dtype)


def spread(function: Callable, mesh: Mesh | None, split: tuple[bool, ...], *, mean: bool = True) -> Callable:
    """Runs a function of tasks on every device's share of them.

    Args:
      function: pure; returns a tree of means over the tasks that it was given, or of arrays with a leading axis of those tasks.
      mesh: of axis "tasks"; None, or one that shares the tasks out among one, leaves the function as it is.
      split: for each argument of `function`, whether its arrays have a leading axis of tasks to be shared out.
      mean: whether the devices' floats are averaged, and of anything else (counts) the last device's is taken; False puts their
        arrays in a row.

    Returns:
      The function, of all tasks.
    """
    if mesh is None or count_devices(mesh) == 1:
        return function

    def reduce(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jax.lax.pmean(leaf, AXIS)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(reduce(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        return _of_last(leaf)

    def on_device(*arguments):
        result = function(*arguments)
        return jax.tree.map(reduce, result) if mean else result

    specs = tuple(PartitionSpec(AXIS) if each else PartitionSpec() for each in split)
    out = PartitionSpec() if mean else PartitionSpec(AXIS)
    # Unchecked: a checked shard_map sums the gradient of whatever is replicated over devices of itself, before the mean does.
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=out, axis_names={AXIS}, check_vma=False)
