"""The `wings` command, and what all entry points share: errors in one line, compilation cache.

    wings train --config=configs/stage1.py
    wings chat --checkpoint runs/stage2
    wings --help

`wings X` runs the entry point that `python -m wings_jax.X` runs. Only that module is imported,
so `wings --help` needs neither JAX nor transformers.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import os
import pathlib
import sys
from collections.abc import Callable, Mapping

from wings_jax.errors import UserError

# Subcommand -> its module, and one line for --help.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "train": ("wings_jax.train", "train a stage from a config"),
    "convert": ("wings_jax.convert", "import, export or inspect weights"),
    "generate": ("wings_jax.generate", "answer one request, or a file of them"),
    "chat": ("wings_jax.chat", "chat in the terminal"),
    "evaluate": ("wings_jax.evaluate", "score checkpoints on benchmarks"),
    "analyze": ("wings_jax.analyze", "measure attention shift over layers"),
    "forgetting": ("wings_jax.forgetting.__main__", "compare methods on text-only forgetting"),
    "check": ("wings_jax.data.check", "find bad samples of a data file before a run"),
    "prepare": ("wings_jax.data.prepare", "convert a data file to array_record shards"),
    "scenes": ("wings_jax.scenes.__main__", "write the embedded data set"),
}


def main() -> None:
    """Runs the subcommand that the command line names; the console script `wings`."""
    run_main("wings", dispatch)


def dispatch() -> None:
    """Imports the module of the first argument and runs its `main` on the other arguments.

    Raises:
      UserError: the first argument is not a subcommand.
    """
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(help_text())
        return
    if name == "--version":
        print(f"wings_jax {importlib.metadata.version('wings_jax')}")
        return
    if name not in COMMANDS:
        raise UserError(unknown_command(name))

    # The module's own parser and messages then have the program name that the user typed.
    program = f"wings {name}"
    sys.argv = [program, *rest]
    module = importlib.import_module(COMMANDS[name][0])
    run_main(program, module.main)


def help_text() -> str:
    """Returns the list of subcommands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: wings COMMAND [arguments]",
            "",
            "Wings, a multimodal LLM with visual and textual learners, in JAX.",
            "",
            *lines,
            "",
            "`wings COMMAND --help` lists its arguments, `wings --version` prints the version.",
        ]
    )


def unknown_command(name: str) -> str:
    """Returns the message for a subcommand that does not exist, with the nearest one.

    >>> unknown_command("evaluat")
    "'evaluat' is not a command; did you mean 'evaluate'? `wings --help` lists all commands"
    >>> unknown_command("eval")
    "'eval' is not a command; did you mean 'evaluate'? `wings --help` lists all commands"
    """
    longer = [command for command in COMMANDS if name and command.startswith(name)]
    nearest = longer or difflib.get_close_matches(name, COMMANDS, n=1)
    suggestion = f"; did you mean {nearest[0]!r}?" if nearest else ";"
    return f"{name!r} is not a command{suggestion} `wings --help` lists all commands"


def program_name(module: str) -> str:
    """Returns what the user typed to run `module`: "wings chat" or "python -m wings_jax.chat".

    It is the `prog` of a module's argument parser.

    >>> program_name("wings_jax.chat")
    'python -m wings_jax.chat'
    """
    started = sys.argv[0]
    typed = [f"wings {name}" for name, (target, _) in COMMANDS.items() if target == module]
    return started if started in typed else f"python -m {module.removesuffix('.__main__')}"


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
    """Stores compiled programs in `directory` (default ~/.cache/wings_jax/compiled).

    A compilation cache that is configured in JAX itself is not changed.
    """
    import jax  # slow, and `wings --help` does not need it

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
