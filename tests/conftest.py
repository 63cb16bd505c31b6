"""The suite runs on a CPU that shows itself as 8 devices, so that meshes can be tested anywhere."""

import gc
import os

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
_COUNT = "--xla_force_host_platform_device_count=8"
if _COUNT not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_COUNT}".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled():
    """Drops what a file compiled: a process that keeps the programs of the whole suite runs out of
    memory maps (65,530 by Linux' default), which XLA answers with a segmentation fault."""
    yield
    import jax  # not before the variables above are set

    jax.clear_caches()
    gc.collect()
