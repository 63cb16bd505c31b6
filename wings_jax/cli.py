"""What all entry points have in common: errors in one line, and the compilation cache."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Callable

import jax

from wings_jax.errors import UserError


def run_main(program: str, main: Callable[[], None]) -> None:
    """Runs `main`; a UserError becomes one line on stderr and exit status 2.

    With `--debug` among the arguments its traceback is shown instead.
    """
    try:
        main()
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        sys.stdout.flush()
        print(f"{program}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def use_compilation_cache(directory: str | os.PathLike | None = None) -> None:
    """Keeps compiled programs in `directory` (default ~/.cache/wings_jax/compiled).

    A compilation cache that is configured in JAX itself is left as it is.
    """
    if jax.config.jax_compilation_cache_dir:
        return

    cache_home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    path = pathlib.Path(directory or pathlib.Path(cache_home) / "wings_jax" / "compiled")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:  # no writable home directory: compile at every start
        return

    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
