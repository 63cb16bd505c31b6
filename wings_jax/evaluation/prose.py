"""Ordinary English for a model to read: a file, or what the installed packages bring along.

`tensorflow_datasets` carries a description in Markdown of every data set it knows, written by
people for people. Without its markup, tables, lists and formulas that is some nine thousand words,
and it is there wherever this package runs. It is public, so an LLM may have seen some of it in its
pretraining: what changed from a base says more than a number alone, and for the latter there is a
text of one's own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import pathlib
import re
import textwrap
from collections.abc import Iterable, Sequence

from wings_jax.errors import UserError
from wings_jax.evaluation import tasks

PASSAGE = 900  # characters of a passage at most: about 200 tokens, whatever the tokenizer
LEAST = 40  # characters of one, unless there is but one
WORDS = 25  # of a paragraph of prose, at least
PACKAGE = "tensorflow_datasets"

# What Markdown has and prose has not, and what is left of it; in this order.
MARKUP = tuple(
    (re.compile(pattern, re.MULTILINE | re.DOTALL), left)
    for pattern, left in (
        (r"^ *(```|~~~).*?(?:^ *\1|\Z)", "\n\n"),
        (r"<!--.*?-->", ""),
        (r"<(pre|script|style|table)\b.*?</\1>", "\n\n"),
        (r"^ *\* [^\n]*(\n +[^\n]+)*", "\n"),  # lists, before the stars of emphasis go
        (r"</?[a-zA-Z][^<>]*>", ""),
        (r"^ *#[^\n]*$", "\n"),
        (r"!\[[^\]]*\]\([^)]*\)", ""),
        (r"\[([^\[\]]*)\](?:\([^()]*\)|\[[^\[\]]*\])", r"\1"),
        (r"\s*\(?\b(?:https?://|www\.)[^\s)]+\)?", ""),
        (r"\*+|`+", ""),
    )
)
LIST = re.compile(r"^\s*([-+|>=]|\d+[.)]\s|    )", re.MULTILINE)  # or a table, a quotation, code
SYMBOLS = re.compile(r"[\[\]{}<>|\\$@#=_^~]")  # formulas, addresses, names in programs
ENDING = re.compile(r"[.!?][\"')]?$")


@dataclasses.dataclass(frozen=True)
class Text:
    """Passages, and where they come from, for people."""

    source: str
    passages: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Returns the checksum of the passages, by which numbers of one text are known as such."""
        return hashlib.sha256("\n\n".join(self.passages).encode()).hexdigest()

    def some(self, limit: int | None) -> Text:
        """Returns so many of the passages, spread over the text."""
        chosen = tasks.spread(len(self.passages), limit)
        return Text(self.source, tuple(self.passages[index] for index in chosen))


def installed() -> Text:
    """Returns the descriptions of data sets in `tensorflow_datasets`, which is not imported.

    Raises:
      UserError: the package is not installed, or has no descriptions.
    """
    found = importlib.util.find_spec(PACKAGE)
    places = list(found.submodule_search_locations or ()) if found else []
    files = sorted(pathlib.Path(places[0]).glob("datasets/*/README.md")) if places else []
    if not files:
        raise UserError(f"--text is missing, and {PACKAGE} with its descriptions is not installed")
    seen: set[str] = set()
    passages: list[str] = []
    for file in files:
        fresh = [p for p in paragraphs(file.read_text(encoding="utf-8")) if p not in seen]
        seen.update(fresh)
        passages += cut(fresh)
    return Text(f"descriptions of {PACKAGE} {_version()}", tuple(passages))


def _version() -> str:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:  # a nightly build has another name
        return "of unknown version"


def read_text(path: pathlib.Path) -> Text:
    """Returns a UTF-8 text file; empty lines part its paragraphs, other white space is one space.

    Raises:
      UserError: it cannot be read, is not UTF-8, or holds fewer than LEAST characters.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--text: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--text: {path}: not UTF-8 at byte {error.start}") from error
    found = [one for one in map(_joined, _blocks(text)) if one]
    count = sum(map(len, found))
    if count < LEAST:
        raise UserError(f"--text: {path}: {count} characters are too few; take {LEAST} or more")
    return Text(str(path), tuple(cut(found)))


def paragraphs(markdown: str) -> list[str]:
    """Returns the paragraphs of prose in a Markdown text, without markup, each in one line."""
    for pattern, left in MARKUP:
        markdown = pattern.sub(left, markdown)
    found = [_joined(block) for block in _blocks(markdown) if not LIST.search(block)]
    return [one for one in found if is_prose(one)]


def is_prose(paragraph: str) -> bool:
    """Returns whether a paragraph is of whole sentences of words."""
    is_long = len(paragraph.split()) >= WORDS
    return is_long and bool(ENDING.search(paragraph)) and not SYMBOLS.search(paragraph)


def cut(found: Iterable[str], longest: int = PASSAGE) -> list[str]:
    """Returns passages of whole paragraphs of about `longest` characters together.

    A paragraph that is longer by itself is cut between words; a rest of a few characters stays with
    the passage before it.
    """
    passages: list[str] = []
    for paragraph in found:
        for piece in textwrap.wrap(paragraph, longest, break_on_hyphens=False):
            is_rest = len(piece) < LEAST  # too little to stand alone
            if passages and (is_rest or len(passages[-1]) + 2 + len(piece) <= longest):
                passages[-1] += f"\n\n{piece}"
            else:
                passages.append(piece)
    return passages


def _blocks(text: str) -> Sequence[str]:
    return re.split(r"\n\s*\n", text)


def _joined(block: str) -> str:
    return " ".join(block.split())
