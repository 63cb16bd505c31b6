"""Keeps what XLA compiled between runs, so that a command's second start is quick."""

from __future__ import annotations

import os
import pathlib

import jax


def keep(folder: str | os.PathLike | None = None) -> None:
    """Keeps compiled programs in `folder`, or in ~/.cache/wings_jax; JAX's own settings win."""
    if jax.config.jax_compilation_cache_dir:
        return
    usual = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    path = pathlib.Path(folder or pathlib.Path(usual) / "wings_jax" / "compiled")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:  # a machine without a home: everything is compiled anew
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
