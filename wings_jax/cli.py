"""What all entry points have in common: errors in one line, and the compilation cache."""

from __future__ import annotations

import argparse
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


def check_text(flags: argparse.Namespace) -> None:
    """Checks that texts and paths among the flags are valid Unicode without null characters.

    An argument with other bytes than UTF-8 has lone surrogates, which no file can be written with.

    Raises:
      UserError: naming the flag.
    """
    for name, value in vars(flags).items():
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str | pathlib.PurePath):
                continue
            flag = f"--{name.replace('_', '-')}"
            shown = ascii(str(text))
            if "\0" in str(text):
                raise UserError(f"{flag}: {shown} has a null character")
            try:
                str(text).encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(f"{flag}: {shown} is not UTF-8") from error


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
