"""English prose to measure perplexity on: a user's file, or text from the installed packages.

`tensorflow_datasets` contains a Markdown description of every data set. Without markup, tables,
lists and formulas these are some nine thousand words of prose, which are there wherever this
package runs. They are public, so an LLM may have been pretrained on some of them: the change from a
base means more than a single number. For single numbers use a text of your own (`--text`).
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
from wings_jax.evaluation.user_file import read_user_text

MAX_PASSAGE = 900  # characters: about 200 tokens, whatever the tokenizer
MIN_PASSAGE = 40  # characters, unless there is only one passage
MIN_WORDS = 25  # of a paragraph of prose
PACKAGE = "tensorflow_datasets"

# Markup that is not prose, and its replacement; applied in this order.
MARKUP = tuple(
    (re.compile(pattern, re.MULTILINE | re.DOTALL), replacement)
    for pattern, replacement in (
        (r"^ *(```|~~~).*?(?:^ *\1|\Z)", "\n\n"),
        (r"<!--.*?-->", ""),
        (r"<(pre|script|style|table)\b.*?</\1>", "\n\n"),
        (r"^ *\* [^\n]*(\n +[^\n]+)*", "\n"),  # lists, before the stars of emphasis are removed
        (r"</?[a-zA-Z][^<>]*>", ""),
        (r"^ *#[^\n]*$", "\n"),
        (r"!\[[^\]]*\]\([^)]*\)", ""),
        (r"\[([^\[\]]*)\](?:\([^()]*\)|\[[^\[\]]*\])", r"\1"),
        (r"\s*\(?\b(?:https?://|www\.)[^\s)]+\)?", ""),
        (r"\*+|`+", ""),
    )
)
LIST = re.compile(r"^\s*([-+|>=]|\d+[.)]\s|    )", re.MULTILINE)  # or a table, a quotation, code
SYMBOLS = re.compile(r"[\[\]{}<>|\\$@#=_^~]")  # of formulas, addresses, names in programs
SENTENCE_END = re.compile(r"[.!?][\"')]?$")


@dataclasses.dataclass(frozen=True)
class Text:
    """A text in passages."""

    # Where it comes from, for people.
    source: str
    # The passages, each scored on its own.
    passages: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Returns the checksum of the passages: numbers compare only where it is equal."""
        return hashlib.sha256("\n\n".join(self.passages).encode()).hexdigest()

    def subset(self, limit: int | None) -> Text:
        """Returns about `limit` of the passages, spread over the text.

        >>> Text("", ("a", "b", "c", "d")).subset(2).passages
        ('a', 'c')
        """
        chosen = tasks.spread_indices(len(self.passages), limit)
        return Text(self.source, tuple(self.passages[index] for index in chosen))


def installed_text() -> Text:
    """Returns the descriptions of data sets in `tensorflow_datasets`, without importing it.

    Raises:
      UserError: the package is not installed, or has no descriptions.
    """
    # Importing the package takes seconds; its files are enough.
    spec = importlib.util.find_spec(PACKAGE)
    directories = list(spec.submodule_search_locations or ()) if spec else []
    paths = sorted(pathlib.Path(directories[0]).glob("datasets/*/README.md")) if directories else []
    if not paths:
        raise UserError(f"--text is missing, and {PACKAGE} with its descriptions is not installed")

    # Some descriptions occur in several data sets: every paragraph counts once.
    seen: set[str] = set()
    passages: list[str] = []
    for path in paths:
        paragraphs = prose_paragraphs(path.read_text(encoding="utf-8"))
        new_paragraphs = [paragraph for paragraph in paragraphs if paragraph not in seen]
        seen.update(new_paragraphs)
        passages += split_passages(new_paragraphs)

    # The version is part of the name: descriptions change with it.
    return Text(f"descriptions of {PACKAGE} {_package_version()}", tuple(passages))


def _package_version() -> str:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:  # a nightly build has another name
        return "of unknown version"


def read_text(path: pathlib.Path) -> Text:
    """Returns a UTF-8 text file; empty lines separate paragraphs, other white space is a space.

    Raises:
      UserError: it cannot be read, is not UTF-8, or has fewer than MIN_PASSAGE characters.
    """
    text = read_user_text(path, "--text")
    paragraphs = [paragraph for paragraph in map(_join_lines, _split_blocks(text)) if paragraph]
    # One token of each passage is context, so a few characters are not enough.
    count = sum(map(len, paragraphs))
    if count < MIN_PASSAGE:
        raise UserError(f"--text: {path}: {count} characters, fewer than {MIN_PASSAGE}")
    return Text(str(path), tuple(split_passages(paragraphs)))


def prose_paragraphs(markdown: str) -> list[str]:
    """Returns the paragraphs of prose in a Markdown text, without markup, each in one line."""
    # The order matters: lists before emphasis, links before addresses.
    for pattern, replacement in MARKUP:
        markdown = pattern.sub(replacement, markdown)

    paragraphs = [
        _join_lines(paragraph)
        for paragraph in _split_blocks(markdown)
        if not LIST.search(paragraph)
    ]
    return [paragraph for paragraph in paragraphs if is_prose(paragraph)]


def is_prose(paragraph: str) -> bool:
    """Returns whether a paragraph consists of whole sentences of words."""
    is_long = len(paragraph.split()) >= MIN_WORDS
    return is_long and bool(SENTENCE_END.search(paragraph)) and not SYMBOLS.search(paragraph)


def split_passages(paragraphs: Iterable[str], longest: int = MAX_PASSAGE) -> list[str]:
    """Returns passages of whole paragraphs of about `longest` characters together.

    A longer paragraph is split between words; a rest of less than MIN_PASSAGE characters is added
    to the passage before it.

    >>> split_passages(["a" * 50, "b" * 50, "c" * 50], longest=110) == [
    ...     "a" * 50 + "\\n\\n" + "b" * 50, "c" * 50]
    True
    """
    passages: list[str] = []
    for paragraph in paragraphs:
        for piece in textwrap.wrap(paragraph, longest, break_on_hyphens=False):
            # Too short to be scored alone.
            is_rest = len(piece) < MIN_PASSAGE
            if passages and (is_rest or len(passages[-1]) + 2 + len(piece) <= longest):
                passages[-1] += f"\n\n{piece}"
            else:
                passages.append(piece)
    return passages


def _split_blocks(text: str) -> Sequence[str]:
    return re.split(r"\n\s*\n", text)


def _join_lines(block: str) -> str:
    return " ".join(block.split())
