"""The tasks of a meta-batch, spread over devices: GPUs, TPUs, or the cores of a CPU.

Each device takes its share of the tasks; parameters are replicated, and one mean of the gradients ends a meta-step. This is the job
that `jax.pmap` used to do.

References:
  JAX documentation, "Manual parallelism with shard_map" (https://docs.jax.dev/en/latest/notebooks/shard_map.html).
"""

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "tasks"
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
        jax.config.update("jax_num_cpu_devices", min(usable_cores(), MOST_CORES) if count is None else count)


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


def task_mesh(count: int | None = None) -> Mesh | None:
    """A mesh of one axis, "tasks", to give to `jmeta.fit` and `jmeta.fewshot`.

    A CPU counts as one device until `jmeta.use_cores` is called.

    Args:
      count: devices to use; all if None.

    Returns:
      The mesh, or None for one device, which needs none.

    Raises:
      ValueError: there are fewer devices.
    """
    devices = jax.devices()
    count = len(devices) if count is None else count
    if not 1 <= count <= len(devices):
        raise ValueError(
            f"devices: must be 1 to {len(devices)}, which is how many JAX sees, got {count}. Usual causes: a run that began on a "
            "larger machine, to be resumed with fewer --devices; a CPU, which counts as one until jmeta.use_cores() is called."
        )
    return None if count == 1 else jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices[:count])


def check_mesh(mesh: Mesh | None) -> None:
    """Refuses what is not a mesh of tasks.

    Raises:
      TypeError, ValueError: it is no mesh, or has other axes.
    """
    if mesh is None:
        return
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh: expected a jax.sharding.Mesh as jmeta.task_mesh(2) makes it, got {mesh!r}.")
    if mesh.axis_names != (AXIS,) or mesh.axis_types != (AxisType.Auto,):
        raise ValueError(
            f"mesh: expected one axis 'tasks' of type Auto, got axes {mesh.axis_names} of types {mesh.axis_types}. Usual cause: "
            "jax.make_mesh with its defaults; use jmeta.task_mesh()."
        )


def share(batch: int, devices: int) -> int:
    """The most of `devices` devices that can take equal shares of `batch` tasks.

    >>> share(32, 2), share(25, 8), share(1, 8)
    (2, 5, 1)
    """
    return max(count for count in range(1, devices + 1) if batch % count == 0)


def count_devices(mesh: Mesh | None) -> int:
    """Devices of a mesh; 1 if None."""
    return 1 if mesh is None else mesh.size


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
    """Puts a copy of every array on every device of the mesh."""
    return tree if mesh is None else _put(tree, NamedSharding(mesh, PartitionSpec()))


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
    """The copy on this process's first device, so that what follows is computed once and not on every device."""
    return tree if mesh is None else jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


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
    parts = [jax.device_put(make(keys[place]), device) for device, place in places.items()]

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
      mesh: of axis "tasks"; None leaves the function as it is.
      split: for each argument of `function`, whether its arrays have a leading axis of tasks to be shared out.
      mean: whether the devices' floats are averaged, and of anything else (counts) the last device's is taken; False puts their
        arrays in a row.

    Returns:
      The function, of all tasks.
    """
    if mesh is None:
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
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
