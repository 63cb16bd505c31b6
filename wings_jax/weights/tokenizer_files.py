"""The files of a Hugging Face tokenizer as text, name -> content: read, converted, downloaded."""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Iterable

from wings_jax.errors import UserError

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
# Vocabularies that transformers converts to `tokenizer.json`.
SLOW_FILES = ("tokenizer.model", "vocab.json")


def read_tokenizer_files(directory: str | os.PathLike, *, flag: str) -> dict[str, str]:
    """Returns the tokenizer files of a directory, name -> content; `tokenizer.json` is among them.

    A tokenizer without it (a SentencePiece model, such as Vicuna's, or `vocab.json`) is converted.

    Raises:
      UserError: the directory holds no tokenizer, or it cannot be converted; `flag` names the
        setting that gives another one.
    """
    directory = pathlib.Path(directory)
    if (directory / "tokenizer.json").is_file():
        return _read_text_files(directory, FILES)
    if any((directory / name).is_file() for name in SLOW_FILES):
        return _convert_tokenizer(directory, flag=flag)
    raise UserError(f"{directory} has no tokenizer; give one with {flag} DIR")


def _read_text_files(directory: pathlib.Path, names: Iterable[str]) -> dict[str, str]:
    """Returns the content of those of the files that exist."""
    return {
        name: (directory / name).read_text(encoding="utf-8")
        for name in names
        if (directory / name).is_file()
    }


def _convert_tokenizer(directory: pathlib.Path, *, flag: str) -> dict[str, str]:
    """Returns the files of a tokenizer after transformers has converted it."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{directory} has no tokenizer.json, and its tokenizer cannot be converted ({reason}); "
            f"give one with {flag} DIR"
        ) from error

    # transformers writes what it converted; the text files of that are the result.
    with tempfile.TemporaryDirectory() as converted:
        tokenizer.save_pretrained(converted)
        return _read_text_files(pathlib.Path(converted), FILES)


def download_tokenizer(hub_id: str, *, flag: str) -> pathlib.Path:
    """Returns the directory with the tokenizer files of a repository on the Hugging Face hub.

    Raises:
      UserError: naming `flag`, if the repository or its `tokenizer.json` cannot be downloaded.
    """
    from transformers.utils import cached_file

    try:
        path = cached_file(hub_id, "tokenizer.json")
        cached_file(hub_id, "tokenizer_config.json")
    except OSError as error:
        raise UserError(f"{flag}: {hub_id}: {str(error).splitlines()[0]}") from error
    return pathlib.Path(path).parent
