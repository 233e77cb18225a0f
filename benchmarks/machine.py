"""What the machine is, and what it reaches."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jmeta.mesh import processor, use_cores

SIDE = 2048  # of the matrices whose product measures the machine
COPIED = 2**28  # bytes of the array whose copy does
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "higher", "torchopt", "numpy")


def seconds_of(run: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def matrix_rate() -> float:
    """Floating-point operations a second of a large matrix product in float32, the best of ten: what the machine reaches."""
    matrix = jax.random.normal(jax.random.key(0), (SIDE, SIDE))
    product = jax.jit(jnp.matmul)
    seconds = [seconds_of(lambda: product(matrix, matrix).block_until_ready()) for _ in range(11)]
    return 2 * SIDE**3 / min(seconds[1:])


def bandwidth() -> float:
    """Bytes a second, read and written, of adding 1 to a large array, the best of ten."""
    array = jnp.zeros(COPIED // 4)
    add = jax.jit(lambda array: array + 1, donate_argnums=0)
    seconds = []
    for _ in range(11):
        start = time.perf_counter()
        array = add(array).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * COPIED / min(seconds[1:])


def results(path: Path) -> dict[str, Any]:
    """What an earlier call wrote into a JSON file; nothing where there is none.

    Raises:
      SystemExit: the file holds something else, to which nothing must be added.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        fits = isinstance(found, dict) and all("machine" in row for row in found.values())
    except (ValueError, TypeError):
        fits = False
    if not fits:
        sys.exit(f"--out is {path}, which exists and holds no results of a benchmark; give another name.")
    return found


def begin(platform: str | None, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every benchmark begins with: the platform and the cores are set; returns the machine, and the results so far."""
    if platform:
        jax.config.update("jax_platforms", platform)
    use_cores()
    found = results(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    return machine(), found


def machine() -> dict[str, Any]:
    """Processor, cores, device, load average of the last minute, and versions."""
    installed = {dist.name.lower() for dist in metadata.distributions()}
    packages = [name for name in PACKAGES if name in installed]
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "load_before": os.getloadavg()[0],
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
    }
