"""The suite runs on a CPU that shows itself as 8 devices, so that meshes can be tested anywhere."""

import gc
import os

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
_COUNT = "--xla_force_host_platform_device_count=8"
if _COUNT not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_COUNT}".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The functions that torch takes from MKL's vector library for float32 and float64.
_VML = [
    "acos",
    "asin",
    "atan",
    "cos",
    "cosh",
    "erf",
    "erfc",
    "erfinv",
    "exp",
    "expm1",
    "lgamma",
    "log",
    "log10",
    "log1p",
    "log2",
    "sin",
    "sinh",
    "sqrt",
    "tan",
    "tanh",
]


@pytest.fixture(autouse=True, scope="session")
def _warm_torch():
    """Calls each of MKL's functions once in one thread. A first call in two threads at a time may
    compute one half with about 11 bits (pytorch/pytorch#188792), and a reference would be wrong."""
    try:
        import torch
    except ImportError:
        return
    for dtype in (torch.float32, torch.float64):
        for name in _VML:
            getattr(torch, name)(torch.full((1,), 0.5, dtype=dtype))


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled():
    """Drops what a file compiled: a process that keeps the programs of the whole suite runs out of
    memory maps (65,530 by Linux' default), which XLA answers with a segmentation fault."""
    yield
    import jax  # not before the variables above are set

    jax.clear_caches()
    gc.collect()
