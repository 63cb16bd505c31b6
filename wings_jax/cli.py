"""The `wings` command, and what all entry points share: errors in one line, compilation cache.

    wings train --config=configs/stage1.py
    wings chat --checkpoint runs/stage2
    wings --help

`wings X` runs the entry point that `python -m wings_jax.X` runs. Only that module is imported,
so `wings --help` needs neither JAX nor transformers.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import difflib
import importlib
import io
import logging
import os
import pathlib
import select
import signal
import sys
from collections.abc import Callable, Mapping

import wings_jax
from wings_jax.errors import UserError

PIPE_CLOSED = 141  # exit status after SIGPIPE, as shells report it

# Subcommand -> its module, and one line for --help.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "train": ("wings_jax.train", "train a stage from a config"),
    "plan": (
        "wings_jax.plan",
        "memory, operations and time of a step, without running it",
    ),
    "convert": ("wings_jax.convert", "import, export or inspect weights"),
    "generate": ("wings_jax.generate", "answer one request, or a file of them"),
    "chat": ("wings_jax.chat", "chat in the terminal"),
    "evaluate": ("wings_jax.evaluate", "score checkpoints on benchmarks"),
    "lm-eval": ("wings_jax.evaluation.lm_eval_command", "run lm-eval with the model `wings`"),
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
    command, *arguments = sys.argv[1:] or ["--help"]

    # Flags of `wings` itself.
    if command in ("-h", "--help", "help"):
        print(help_text())
        return
    if command == "--version":
        print(f"wings_jax {wings_jax.__version__}")
        return

    if command not in COMMANDS:
        raise UserError(unknown_command(command))

    # The module's parser and messages then have the program name that the user typed.
    program = f"wings {command}"
    sys.argv = [program, *arguments]
    module = importlib.import_module(COMMANDS[command][0])
    run_main(program, module.main)


def help_text() -> str:
    """Returns the list of subcommands."""
    width = max(map(len, COMMANDS))
    commands = [f"  {name.ljust(width)}  {summary}" for name, (_, summary) in COMMANDS.items()]

    return "\n".join(
        [
            "usage: wings COMMAND [arguments]",
            "",
            "Wings, a multimodal LLM with visual and textual learners, in JAX.",
            "",
            *commands,
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
    # An abbreviation comes first, then a spelling mistake.
    completions = [command for command in COMMANDS if name and command.startswith(name)]
    candidates = completions or difflib.get_close_matches(name, COMMANDS, n=1)

    suggestion = f"; did you mean {candidates[0]!r}?" if candidates else ";"
    return f"{name!r} is not a command{suggestion} `wings --help` lists all commands"


def program_name(module: str) -> str:
    """Returns what the user typed to run `module`: "wings chat" or "python -m wings_jax.chat".

    It is the `prog` of a module's argument parser.

    >>> program_name("wings_jax.chat")
    'python -m wings_jax.chat'
    """
    program = sys.argv[0]  # as `dispatch` sets it
    subcommands = [f"wings {name}" for name, (target, _) in COMMANDS.items() if target == module]
    return program if program in subcommands else f"python -m {module.removesuffix('.__main__')}"


def run_main(program: str, main: Callable[[], None]) -> None:
    """Runs `main`; a UserError becomes one line on stderr and its exit status, Ctrl-C status 130.

    With `--debug` among the arguments a UserError's traceback is shown instead. The text of a
    KeyboardInterrupt, if it has one, is part of the line. Where the reader of stdout has gone
    (`wings ... | head`), the status is 141, as after SIGPIPE.
    """
    accept_any_text()
    _name_warnings(program)

    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Another pipe than stdout is not the end of a `| head`.
        if not _is_stdout_closed():
            raise
        sys.exit(PIPE_CLOSED)
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        _print_error(f"{program}: {error}")
        sys.exit(error.exit_status)
    except KeyboardInterrupt as interrupt:
        _print_error(f"{program}: " + ": ".join(["interrupted", *map(str, interrupt.args)]))
        sys.exit(130)
    finally:
        # Handlers run in reverse order, so this one runs before JAX destroys its backends: a
        # Ctrl-C in the middle of that would end the process with a segmentation fault.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


class _WarningHandler(logging.StreamHandler):
    """Prints warnings on stderr in the form of errors: `wings train: ...`."""


def _name_warnings(program: str) -> None:
    """Puts the program before every warning, unless a caller has configured logging itself."""
    if not logging.root.handlers:
        logging.root.addHandler(_WarningHandler())
    for handler in logging.root.handlers:
        if isinstance(handler, _WarningHandler):
            handler.setFormatter(logging.Formatter(f"{program.replace('%', '%%')}: %(message)s"))


def _is_stdout_closed() -> bool:
    """Returns whether the reader of stdout has gone; then nothing is written to it any more."""
    try:
        number = sys.stdout.fileno()
    except io.UnsupportedOperation:  # not a file
        return False
    poll = select.poll()
    poll.register(number, 0)  # errors are reported in any case
    if not poll.poll(0):
        return False

    # Python flushes once more at its end, which would print an error.
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return True


class InterruptFlag:
    """A context in which Ctrl-C sets `is_set`; only the second Ctrl-C raises KeyboardInterrupt.

    Python may raise KeyboardInterrupt between any two instructions. Inside of JAX's callbacks it
    is printed and lost, and in the middle of its work it can leave the runtime in a state in which
    the process ends with a segmentation fault. The flag is checked where nothing is in progress.
    """

    def __init__(self) -> None:
        self.is_set = False

    def __enter__(self) -> InterruptFlag:
        with contextlib.suppress(ValueError):  # not the main thread: it gets no signals
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_previous"):
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, *_: object) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True


def accept_any_text() -> None:
    """Lets input and output hold text that is not valid in their encoding, such as file names.

    Bytes that are not UTF-8 become surrogates on input, as in `sys.argv`, and are written as
    escapes.
    """
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _print_error(message: str) -> None:
    """Prints one line on stderr, after what is on stdout."""
    with contextlib.suppress(OSError):  # the reader of stdout may be gone
        sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)


def at_least(least: int) -> Callable[[str], int]:
    """Returns a type of integer flags that refuses smaller values.

    >>> at_least(1)("3")
    3
    """

    def parse_number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return int(text)

    return parse_number


def add_adapter_flag(add: Callable[..., object]) -> None:
    """Adds `--adapter` of the commands that compare models, by their parser's `add_argument`."""
    add(
        "--adapter",
        nargs="+",
        action="extend",
        default=[],
        metavar="[NAME=]FILE",
        help="adapters on the LLM and the tower of one checkpoint, in place of it",
    )


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
    """Stores compiled programs in `directory` (default ~/.cache/wings_jax/compiled).

    A compilation cache that is configured in JAX itself is not changed.
    """
    import jax  # slow, and `wings --help` does not need it

    if jax.config.values.get("jax_compilation_cache_dir"):
        return

    cache_home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    path = pathlib.Path(directory or pathlib.Path(cache_home) / "wings_jax" / "compiled")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:  # no writable home directory: compile at every start
        return

    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
