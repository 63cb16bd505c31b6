"""A chat in the terminal.

    python -m wings_jax.chat --checkpoint runs/stage2

Answers are shown as they are written; Ctrl-C stops the answer, not the chat. What was read or
said before is not read again.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import pathlib
import time

from wings_jax import cli
from wings_jax.errors import UserError
from wings_jax.inference import flags as flags_lib
from wings_jax.inference.chat import Chat

HELP = """\
/image FILE   attach a picture to the next question (again for several)
/undo         take back the last question and its answer
/reset        begin anew
/save FILE    write the conversation as LLaVA JSON
/help         this text
/quit         leave (so does Ctrl-D)"""


class Terminal:
    """The chat's commands; each is a method that gets what follows it on the line."""

    def __init__(self, chat: Chat):
        self.chat = chat
        self.paths: list[str] = []
        self.waiting: list[str] = []
        self.commands = {
            "/image": self.image,
            "/undo": self.undo,
            "/reset": self.reset,
            "/save": self.save,
            "/help": lambda _: print(HELP),
        }

    def read(self, line: str) -> None:
        """Does what a line says."""
        name, _, rest = line.strip().partition(" ")
        if not name:
            return
        if not name.startswith("/"):
            self.ask(line)
        elif name in self.commands:
            self.commands[name](rest.strip())
        else:
            raise UserError(f"{name} is no command; /help lists them")

    def ask(self, text: str) -> None:
        """Prints the answer as it is written; Ctrl-C ends it."""
        started, first = time.perf_counter(), 0.0
        answer = self.chat.ask(text, self.waiting)
        try:
            for piece in answer:
                first = first or time.perf_counter() - started
                print(piece, end="", flush=True)
            note = ""
        except KeyboardInterrupt:
            answer.close()
            note = " (stopped)"
        self.paths += self.waiting
        self.waiting = []
        print(
            f"\n\033[2m[{self.chat.read} slots read, first word after {first:.2f} s]{note}\033[0m"
        )

    def image(self, path: str) -> None:
        """Attaches a picture to the next question."""
        if not path:
            raise UserError("/image needs a file")
        self.chat.check_image(path)
        self.waiting.append(path)
        print(f"attached: {', '.join(self.waiting)}")

    def undo(self, _: str) -> None:
        """Takes back the last question and its answer."""
        self.chat.undo()
        self.paths = self.paths[: len(self.chat.images)]

    def reset(self, _: str) -> None:
        """Begins anew."""
        self.chat.reset()
        self.paths, self.waiting = [], []

    def save(self, path: str) -> None:
        """Writes the conversation as a record of LLaVA JSON."""
        if not path:
            raise UserError("/save needs a file")
        file = pathlib.Path(path)
        if file.exists():
            raise UserError(f"/save: {file} exists")
        record = {"id": file.stem, "image": self.paths, "conversations": self.chat.turns}
        try:
            file.write_text(json.dumps([record], ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"/save: {file}: {error.strerror}") from error
        print(f"saved: {file}")


def main() -> None:
    """Chats until the end of input."""
    parser = argparse.ArgumentParser(prog="wings_jax.chat", description="A chat in the terminal.")
    flags_lib.add_flags(parser)
    flags = parser.parse_args()
    generator = flags_lib.open_generator(flags, rows=1)
    terminal = Terminal(generator.chat(system=flags.system))
    with contextlib.suppress(ImportError):  # line editing and a history, where there is any
        importlib.import_module("readline")
    print(HELP)
    while True:
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
        try:
            terminal.read(line)
        except UserError as error:
            print(error)


if __name__ == "__main__":
    cli.run_main("wings_jax.chat", main)
