"""One core for a process, so that it computes in one thread."""

import os


def pin_process() -> None:
    """Lets this process and its threads run on one core, on Linux; before JAX creates a backend.

    XLA starts a thread for each core that it may run on, whatever its flags are.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
