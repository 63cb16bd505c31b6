"""What a command changes in its own process: imports without torch, memory that is reused."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import sys
import types

# Parameters of glibc's mallopt: number of blocks that are mapped on their own, and bytes at the end
# of the heap from which on they are returned.
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1


def import_without_torch(*packages: str) -> None:
    """Imports packages as if torch were not installed; they use it only if it is.

    transformers would import torch with the first tokenizer, tensorboardX at once, which takes
    seconds and 0.2 GB. Only for the process of a command, because a package remembers what it
    found. Nothing happens to a package that is imported already, or where torch is.
    """
    if "torch" in sys.modules:
        return

    modules: dict[str, types.ModuleType | None] = sys.modules  # type: ignore[assignment]
    modules["torch"] = None  # importlib then finds no such package
    try:
        for name in packages:
            if name in sys.modules:
                continue
            package = importlib.import_module(name)
            if name == "transformers":  # looks for torch when it is first asked
                package.utils.is_torch_available()
    finally:
        del modules["torch"]


def run_in_caller_thread() -> None:
    """Lets CPU programs run in the thread that calls them; before JAX creates its backends.

    Without that `keep_freed_memory` has no effect. Other backends are not changed.
    """
    import jax  # slow, and --help does not need it

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_freed_memory() -> None:
    """Keeps freed memory in the process, if JAX computes on the CPU and the system has glibc.

    XLA allocates the temporaries of a CPU program at every call, and glibc returns blocks of that
    size to the system as soon as they are freed, so that each page is mapped and zeroed again: up
    to half of the time of a training step (docs/performance.md). Memory that is in use already,
    such as weights, is not affected. glibc does this for the main thread's memory only
    (`run_in_caller_thread`).
    """
    import jax

    if jax.default_backend() != "cpu":
        return
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        adjust = ctypes.CDLL(None).mallopt
        adjust(_M_MMAP_MAX, 0)
        adjust(_M_TRIM_THRESHOLD, 2**31 - 1)
