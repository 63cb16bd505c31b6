"""A chat in the terminal.

    wings chat --checkpoint runs/stage2
    wings chat --checkpoint runs/stage2 --system "Answer in one word." --temperature 0.7

Answers are shown while they are generated. Ctrl-C stops the answer, not the chat. The KV cache of
earlier turns is reused. `wings_jax.chat.run(model)` starts the same chat from Python.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import pathlib
import time
from typing import TYPE_CHECKING

from wings_jax import cli, process
from wings_jax.errors import UserError
from wings_jax.inference import flags as flags_lib

if TYPE_CHECKING:
    from wings_jax.inference.chat import Chat
    from wings_jax.inference.generator import Generator

MODULE = "wings_jax.chat"
HELP = """\
/image FILE   attach an image to the next question (again for several)
/undo         remove the last question and its answer
/reset        start a new conversation
/save FILE    write the conversation as LLaVA JSON
/help         this text
/quit         end the chat (so does Ctrl-D)"""


class Terminal:
    """The chat's commands; each is a method that gets the rest of its line."""

    def __init__(self, chat: Chat):
        self.chat = chat
        self.paths: list[str] = []  # of the images in the conversation
        self.attached: list[str] = []  # of the next question's images
        self.commands = {
            "/image": self.image,
            "/undo": self.undo,
            "/reset": self.reset,
            "/save": self.save,
            "/help": lambda _: print(HELP),
        }

    def handle(self, line: str) -> None:
        """Runs a command, or asks a question. Raises UserError for a mistake."""
        name, _, rest = line.strip().partition(" ")
        if not name:
            return
        if not name.startswith("/"):
            self.ask(line)
        elif name in self.commands:
            self.commands[name](rest.strip())
        else:
            raise UserError(f"{name} is not a command; /help lists them")

    def ask(self, text: str) -> None:
        """Prints the answer while it is generated; Ctrl-C ends it."""
        started, first_text = time.perf_counter(), 0.0
        answer = self.chat.ask(text, self.attached)

        note = ""
        # The first Ctrl-C ends the answer after the piece that is computed, a second one at once.
        try:
            with cli.InterruptFlag() as interrupt:
                for piece in answer:
                    first_text = first_text or time.perf_counter() - started
                    print(piece, end="", flush=True)
                    if interrupt.is_set:
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            # What was printed so far stays as the answer of this turn.
            answer.close()
            note = " (stopped)"

        # A question that was stopped before its answer is removed; its images stay attached.
        if len(self.chat.images) == len(self.paths) + len(self.attached):
            self.paths += self.attached
            self.attached = []

        # The prompt slots that were not in the KV cache already.
        slots = self.chat.computed_slots
        status = f"[{slots} prompt slots computed, first text after {first_text:.2f} s]{note}"
        print(f"\n\033[2m{status}\033[0m")

    def image(self, path: str) -> None:
        """Attaches an image to the next question."""
        if not path:
            raise UserError("/image needs a file")
        self.chat.check_image(path)
        self.attached.append(path)
        print(f"attached: {', '.join(self.attached)}")

    def undo(self, _: str) -> None:
        """Removes the last question and its answer."""
        self.chat.undo()
        # The paths of a removed question's images go with it.
        self.paths = self.paths[: len(self.chat.images)]
        print("removed the last question and its answer")

    def reset(self, _: str) -> None:
        """Starts a new conversation."""
        self.chat.reset()
        self.paths, self.attached = [], []
        print("new conversation")

    def save(self, path: str) -> None:
        """Writes the conversation as a record of LLaVA JSON."""
        from wings_jax.inference import jobs

        if not path:
            raise UserError("/save needs a file")
        file = pathlib.Path(path)
        if file.exists():
            raise UserError(f"/save: {file} exists")

        # The form of LLaVA's training files, so that a chat can be trained on.
        record = {"id": file.stem, "image": self.paths, "conversations": self.chat.turns}
        try:
            file.write_text(jobs.to_json([record], indent=1) + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: NUL in the path
            raise UserError(f"/save: {file}: {error}") from error
        print(f"saved: {file}")


def run(model: Generator, *, system: str = "") -> None:
    """Chats on standard input and output until the end of input or /quit.

    Args:
      system: the system text; by default the template's.
    """
    terminal = Terminal(model.chat(system=system))
    with contextlib.suppress(ImportError):  # line editing and a history, where there is readline
        importlib.import_module("readline")
    print(HELP)

    while True:
        # Ctrl-C at the prompt discards the line; the end of input ends the chat.
        try:
            line = input("\nyou> ")
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return

        if line.strip() in ("/quit", "/exit"):
            return

        # A mistake in a command, or Ctrl-C during an answer, does not end the chat.
        try:
            terminal.handle(line)
        except UserError as error:
            print(error)
        except KeyboardInterrupt:
            print()


def main() -> None:
    """Chats with the model of the command line."""
    parser = argparse.ArgumentParser(
        prog=cli.program_name(MODULE),
        description=f"{__doc__}\nIn the chat:\n\n{HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags_lib.add_flags(parser)
    arguments = parser.parse_args()
    process.import_without_torch("transformers")
    run(flags_lib.open_generator(arguments, rows=1), system=arguments.system)


if __name__ == "__main__":
    cli.run_main(cli.program_name(MODULE), main)
