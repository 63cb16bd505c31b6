"""Which attention kernel runs where: what 'auto' takes, and why another one cannot run."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from wings_jax.errors import UserError
from wings_jax.model.kernels import cudnn, splash, tokamax

# Kernel -> module, in the order in which 'auto' prefers them.
ACCELERATED = {"splash": splash, "tokamax": tokamax, "cudnn": cudnn}
# Kernels that run on any device.
PORTABLE = ("einsum", "chunked")

_targets: list[jax.Device] = []  # of `compiling_for`
_log = logging.getLogger(__name__)


class KernelError(UserError):
    """The chosen attention kernel cannot run on this machine."""


def check_kernel(kernel: str, dtype: jnp.dtype, *, key: str = "config.attention") -> None:
    """Checks, before anything runs, that this machine's devices can run the chosen kernel.

    Args:
      kernel: 'auto' or a kernel's name.
      dtype: of the matmuls.
      key: what the user set, for the message.

    Raises:
      KernelError: naming the kernel, and what it needs.
    """
    if kernel not in ACCELERATED:
        return

    device = target_device()
    missing = ACCELERATED[kernel].requirement(device, jnp.dtype(dtype))
    if missing:
        raise KernelError(f"{key}: {kernel} {missing}; this is {device.device_kind}")


@contextlib.contextmanager
def compiling_for(device: jax.Device) -> Iterator[None]:
    """Chooses kernels for a device that is not here, in ahead-of-time compilation."""
    _targets.append(device)
    try:
        yield
    finally:
        _targets.pop()


def best_kernel(dtype: jnp.dtype) -> str:
    """Returns the fastest kernel for large shapes on the default device, and logs it once."""
    return _best_kernel(target_device(), dtype)


def target_device() -> jax.Device:
    """Returns the device that kernels are chosen for: of `compiling_for`, else the default one."""
    return _targets[-1] if _targets else jax.devices()[0]


@functools.cache
def _best_kernel(device: jax.Device, dtype: jnp.dtype) -> str:
    # In the order of preference: the first that runs is chosen.
    missing = {}
    for name, module in ACCELERATED.items():
        reason = module.requirement(device, dtype)
        if reason is None:
            _log.info("attention on %s in %s: %s", device.device_kind, dtype, name)
            return name
        missing[name] = reason

    if device.platform != "cpu":
        reasons = "; ".join(f"{name} {reason}" for name, reason in missing.items())
        _log.warning("attention on %s in %s: chunked (%s)", device.device_kind, dtype, reasons)
    return "chunked"
