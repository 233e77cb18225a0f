"""Several processes that train one run together: on hosts with GPUs, on a TPU slice, or on one machine.

Each process runs the same program with its own devices; the mesh holds the devices of all. They must dispatch the same steps in the
same order, so what only one of them knows (a signal, a clock) is told to the others first. Process 0 alone writes what one writes.

References:
  JAX documentation, "Introduction to multi-controller JAX" (https://docs.jax.dev/en/latest/multi_process.html).
"""

import contextlib
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

LOST_AFTER = 30  # seconds without a sign of life after which a process counts as dead, and the others end
LEAVE_WITHIN = 60  # seconds that a process which is done waits for the others


def start_processes(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the processes of a run; to be called first in each of them, before `jmeta.use_cores` and any computation.

    On a TPU slice, under Slurm, Open MPI and in Kubernetes jobs JAX finds out all three arguments itself; with GPUs it wants a
    process for each. If a process dies, the others end within a minute; start all of them again with `resume` and they go on from
    the last checkpoint. One that is done waits a minute for the others and then ends them.

    Args:
      coordinator: "host:port" of process 0, where the others find it.
      processes: how many there are.
      process: number of this one, from 0.

    Raises:
      ValueError: some of the three are given and not all, or they do not fit, or JAX cannot find them out.
      RuntimeError: JAX has computed already, or the others were not met within five minutes.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < 3:
        raise ValueError(f"distributed: {', '.join(missing)} is missing; give all three, or none of them under a scheduler.")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ValueError(f"distributed: process must be from 0 to processes - 1, got process {process} of {processes}.")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"distributed: coordinator must be 'host:port', got {coordinator!r}.")
    limits: dict[str, Any] = {"heartbeat_timeout_seconds": LOST_AFTER, "shutdown_timeout_seconds": LEAVE_WITHIN}
    try:
        jax.distributed.initialize(coordinator, processes, process, **limits)
    except ValueError as error:
        raise ValueError(
            f"distributed: JAX cannot find out who the other processes are ({error}) Usual cause: no scheduler that it knows; give "
            "coordinator 'host:port', the number of processes, and each one's own number."
        ) from error


def spans_hosts(mesh: Mesh | None) -> bool:
    """Whether devices of other processes are in the mesh."""
    return mesh is not None and mesh.is_multi_process


def leads() -> bool:
    """Whether this process is the one that writes and prints: process 0, or the only one."""
    return jax.process_index() == 0


def check_hosts(mesh: Mesh | None) -> None:
    """Refuses a mesh that leaves out processes of the job, for what all of them must do together.

    Raises:
      ValueError: it has no device of some process.
    """
    owners = {jax.process_index()} if mesh is None else {device.process_index for device in mesh.devices.flat}
    if len(owners) < jax.process_count():
        raise ValueError(
            f"mesh: it has devices of {len(owners)} of this job's {jax.process_count()} processes, and all must take part where it "
            "spans several or a run is kept in a workdir. Use mesh=jmeta.task_mesh()."
        )


def alone(mesh: Mesh | None, act: Callable[[], Any]) -> None:
    """Process 0 acts while the others wait; if it fails, all do.

    Raises:
      RuntimeError: process 0 failed; it says why itself.
    """
    if not spans_hosts(mesh):
        act()
        return
    wait(mesh)
    error = None
    if leads():
        try:
            act()
        except Exception as raised:
            error = raised
    failed, _ = agree(mesh, int(error is not None), 0)
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("process 0 of this run failed, and says why.")


def check_same(**parts: bytes) -> None:
    """Refuses processes that would not compute the same run.

    Raises:
      ValueError: it names what differs.
    """
    sums = multihost_utils.process_allgather(np.array([zlib.crc32(part) for part in parts.values()], np.uint32))
    differing = [name for name, column in zip(parts, sums.T, strict=True) if len(set(column.tolist())) > 1]
    if differing:
        raise ValueError(
            f"fit: the processes of this run differ in {', '.join(differing)}. Usual causes: arguments or data that are not the "
            "same on all, or a workdir that is not one folder for all."
        )


def wait(mesh: Mesh | None) -> None:
    """Until all processes are here."""
    if spans_hosts(mesh):
        multihost_utils.sync_global_devices("jmeta")


def agree(mesh: Mesh | None, stop: int, pace: int) -> tuple[int, int]:
    """A stop that any process wants, and the pace of process 0."""
    if not spans_hosts(mesh):
        return stop, pace
    all_of_them = multihost_utils.process_allgather(np.array([stop, pace]))
    return int(all_of_them[:, 0].max()), int(all_of_them[0, 1])


def whole(leaf: jax.Array) -> np.ndarray:
    """An array with the shares that other processes have of it."""
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


@contextlib.contextmanager
def naming_the_lost(mesh: Mesh | None, folder: Path | None) -> Iterator[None]:
    """Says what a failure between processes most likely is. Where JAX notices first, it ends the process with its own words."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not spans_hosts(mesh) or "RESOURCE_EXHAUSTED" in str(error):
            raise
        resume = "" if folder is None else f"; {advice(folder)}"
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(f"fit: another process of this run has died, or cannot be reached ({reason}){resume}.") from error


def advice(folder: Path) -> str:
    """How a run of several processes goes on after one has died."""
    return f"start all of them again with resume=True (jmeta train --resume {folder} --distributed) to go on where it was saved"


def leave(code: int) -> NoReturn:
    """Ends this process, at once where others would wait for it: they end when they miss it."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
