"""What the tests share."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)  # for the tests of meshes; all else runs on the first
jax.config.update("jax_disable_most_optimizations", True)  # most of a test's time is tracing and compilation
jax.config.update("jax_traceback_in_locations_limit", 0)
if jax.__version_info__ < (0, 12):  # unknown later
    with pytest.MonkeyPatch.context() as patch:  # for this process alone: the command line runs as a user runs it
        patch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false")
        jax.devices()


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
