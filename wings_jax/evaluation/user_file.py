"""Text files that a user names on the command line, and text in them that is not Unicode."""

from __future__ import annotations

import pathlib

from wings_jax.errors import UserError
from wings_jax.weights import text_files


def read_user_text(path: pathlib.Path, flag: str) -> str:
    """Returns the text of a UTF-8 file, without a byte order mark.

    Raises:
      UserError: the file cannot be read, is not UTF-8, or is a pointer of git-lfs; the message
        begins with `flag`.
    """
    try:
        return text_files.read_text(path)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error


def is_unicode(text: str) -> bool:
    r"""Returns whether a text can be encoded: False where it has a lone surrogate.

    JSON can escape one half of a surrogate pair, and arguments that are not UTF-8 contain them.

    >>> is_unicode("\u2713"), is_unicode("\ud83d")
    (True, False)
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
