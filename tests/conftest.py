"""What the tests share."""

import gc
import os
from pathlib import Path

# Most of a test's time is tracing and compilation. What a user meets differs by the compiler's effort alone, in the processes that
# tests start as well.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

import jax
import pytest

flags = ["--xla_cpu_parallel_codegen_split_count=1"]  # small programs compile faster in one piece
if jax.__version_info__ < (0, 12):  # unknown later
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
MOST_MAPPINGS = 25_000
jax.config.update("jax_num_cpu_devices", 2)  # for the tests of meshes; all else runs on the first


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Forgets compiled programs before they hold as many memory mappings as Linux allows a process (65,530): XLA would crash."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and len(mappings.read_bytes().splitlines()) > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(scope="session")
def omniglot_npz():
    """The real Omniglot, where it is at hand."""
    folder = os.environ.get("JMETA_DATA_DIR")
    if not folder or not (Path(folder) / "omniglot28.npz").is_file():
        pytest.skip("JMETA_DATA_DIR is not set or holds no omniglot28.npz")
    return Path(folder) / "omniglot28.npz"


@pytest.fixture
def optimised():
    """For tests of what the compiler makes of a program."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
