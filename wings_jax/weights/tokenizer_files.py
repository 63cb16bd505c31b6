"""The files of a Hugging Face tokenizer as text, name -> content: read, converted, downloaded."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Literal

import tokenizers

from wings_jax import checkpoint
from wings_jax.errors import UserError
from wings_jax.weights import text_files

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
SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json")
SENTENCEPIECE = ("sentencepiece", "google.protobuf")
# Text on which a converted tokenizer has to give the same ids.
PROBE = "The quick brown fox: 12 + 7 = 19, naïve."
CONVERSION_ERRORS = (OSError, ValueError, ImportError, TypeError, LookupError, RuntimeError)


def read_tokenizer_files(directory: str | os.PathLike, *, flag: str) -> dict[str, str]:
    """Returns the tokenizer files of a directory, name -> content; `tokenizer.json` is among them.

    A tokenizer without it (a SentencePiece model, such as Vicuna's, or `vocab.json`) is converted.

    Raises:
      UserError: the directory holds no tokenizer, or it cannot be converted; `flag` names the
        setting that gives another one.
    """
    # `tokenizer.json` holds everything; other vocabularies are converted to it.
    directory = pathlib.Path(directory)
    if (directory / "tokenizer.json").is_file():
        return _read_existing(directory)
    # A slow tokenizer's vocabulary, in the order of preference.
    for name in SLOW_FILES:
        if (directory / name).is_file():
            text_files.check_not_pointer(directory / name)
            return _convert_tokenizer(directory, name, flag=flag)
    raise UserError(f"{directory} has no tokenizer; give one with {flag} DIR")


def _read_existing(directory: pathlib.Path) -> dict[str, str]:
    """Returns the content of those files that exist; JSON files must be JSON."""
    contents = {}
    for name in FILES:
        file = directory / name
        if not file.is_file():
            continue
        # A file that is cut short is an error here, not when it is used.
        contents[name] = text_files.read_text(file)
        if file.suffix == ".json":
            text_files.read_json(file)
    return contents


def _convert_tokenizer(directory: pathlib.Path, vocabulary: str, *, flag: str) -> dict[str, str]:
    """Returns the files of a tokenizer after transformers has converted it."""
    # transformers would ask for tiktoken here.
    missing = [name for name in SENTENCEPIECE if importlib.util.find_spec(name) is None]
    if vocabulary.endswith(".model") and missing:
        raise UserError(
            f"{directory} has {vocabulary} and no tokenizer.json: install sentencepiece and "
            f"protobuf to convert it (pip install sentencepiece protobuf), or give {flag} DIR"
        )

    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    except CONVERSION_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{directory} has no tokenizer.json, and its tokenizer cannot be converted "
            f"({reason[:200]}); give one with {flag} DIR"
        ) from error

    if vocabulary.endswith(".model"):
        _check_conversion(tokenizer, directory / vocabulary, flag=flag)

    # transformers writes what it converted; the text files of that are the result.
    with tempfile.TemporaryDirectory() as converted:
        tokenizer.save_pretrained(converted)
        return _read_existing(pathlib.Path(converted))


def _check_conversion(
    tokenizer: Callable[..., Mapping], model_file: pathlib.Path, *, flag: str
) -> None:
    """Raises UserError if a converted tokenizer gives other ids than its SentencePiece model.

    transformers picks the class by `model_type`, which may be of another kind of tokenizer.
    """
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{model_file} is not a SentencePiece model") from error
    if tokenizer(PROBE, add_special_tokens=False)["input_ids"] != pieces.encode(PROBE):
        raise UserError(
            f"{model_file} was converted to a tokenizer with other ids "
            f"({type(tokenizer).__name__}); give one with {flag} DIR"
        )


def count_tokens(contents: Mapping[str, str], source: str) -> int:
    """Returns the size of a tokenizer's vocabulary, added tokens included.

    Raises:
      UserError: transformers cannot open these files; `source` names them.
    """
    with _OpenErrors(source):
        tokenizers.Tokenizer.from_str(contents["tokenizer.json"])
        return len(checkpoint.open_tokenizer(contents))


class _OpenErrors:
    """Context manager: what transformers raises for files that it cannot open is a UserError."""

    def __init__(self, source: str):
        self._source = source

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> Literal[False]:
        # `tokenizers` raises `Exception` itself for a tokenizer.json that it cannot parse.
        if kind is not None and (kind is Exception or issubclass(kind, CONVERSION_ERRORS)):
            reason = (str(error).strip().splitlines() or [kind.__name__])[0]
            raise UserError(
                f"the tokenizer of {self._source} cannot be opened: {reason[:200]}"
            ) from error
        return False


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
    return pathlib.Path(str(path)).parent
