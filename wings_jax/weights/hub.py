"""Repositories on the Hugging Face hub, and directories that stand for them."""

from __future__ import annotations

import pathlib
import re
from typing import Any

from wings_jax.errors import UserError
from wings_jax.weights import peft, store, torch_file

# The id of a repository, and perhaps a branch, tag or commit of it.
HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# Configs and tokenizers; the weight files are chosen by their names.
TEXT_SUFFIXES = (".json", ".model", ".txt", ".jinja")
CARD = "README.md"  # it declares the license


def find_directory(name: str, flag: str) -> pathlib.Path:
    """Returns the directory `name`, downloaded first if it is the id of a hub repository.

    `ID@REVISION` is a branch, tag or commit of a repository. Earlier downloads are in the
    hub's cache (`HF_HOME`), and are used without a connection too.

    Raises:
      UserError: naming `flag`, if there is neither a directory nor a repository of that name.
    """
    path = pathlib.Path(name)
    if name and path.is_dir():
        return path
    if path.exists() or not HUB_ID.fullmatch(name):
        raise UserError(f"{flag}: {name} is not a directory")
    return _download(name, flag)


def choose_hub_files(names: list[str]) -> list[str]:
    """Returns which files of a repository to download: no second copy of the weights.

    >>> choose_hub_files(["config.json", "model.safetensors", "pytorch_model.bin", "onnx/a.json"])
    ['config.json', 'model.safetensors']
    >>> choose_hub_files(["config.json", "pytorch_model.bin", "tf_model.h5"])
    ['config.json', 'pytorch_model.bin']
    >>> choose_hub_files(["README.md", "adapter_config.json", "adapter_model.safetensors"])
    ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    # Subdirectories hold other formats of the same model.
    top_level = [name for name in names if "/" not in name]
    weights = store.choose_weight_files(top_level)
    # An adapter is downloaded where there is no model.
    if not weights:
        weights = [name for name in peft.WEIGHT_FILES if name in top_level][:1]

    # Indexes of shards are left out here: the one that is used is in `weights`.
    is_text = [name for name in top_level if name.endswith(TEXT_SUFFIXES) or name == CARD]
    texts = [name for name in is_text if not name.endswith(".index.json")]
    return [*texts, *weights]


def _download(name: str, flag: str) -> pathlib.Path:
    """Returns the local copy of a repository's weights, configs and tokenizer."""
    import huggingface_hub
    from huggingface_hub import errors

    # The HTTP library differs by version; all its errors have the class that this one derives from.
    connection_errors: tuple[Any, ...] = (
        *errors.HfHubHTTPError.__bases__,
        errors.OfflineModeIsEnabled,
    )

    match = HUB_ID.fullmatch(name)
    assert match is not None  # `find_directory` has checked it
    hub_id, revision = match["id"], match["revision"]

    try:
        names = choose_hub_files(huggingface_hub.list_repo_files(hub_id, revision=revision))
    except (errors.HfHubHTTPError, ValueError) as error:
        raise hub_error(f"{flag}: {name}", hub_id, error) from error
    except connection_errors:
        names = None  # no connection: perhaps it was downloaded before

    # Files of torch are not downloaded where torch is missing.
    if names and any(file.endswith(torch_file.SUFFIXES) for file in names):
        torch_file.check_torch(f"{flag}: {name}")
    # With a list, exactly these files; without, what the cache holds.
    try:
        directory = huggingface_hub.snapshot_download(
            hub_id, revision=revision, allow_patterns=names, local_files_only=names is None
        )
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{flag}: {name} is not a directory; there is no connection to the Hugging Face "
            "hub, and it was not downloaded before"
        ) from error
    except (*connection_errors, ValueError) as error:
        raise hub_error(f"{flag}: {name}", hub_id, error) from error
    return pathlib.Path(directory)


def hub_error(start: str, hub_id: str, error: Exception) -> UserError:
    """Returns the error of a failed download, in one line that begins with `start`."""
    import huggingface_hub
    from huggingface_hub import errors

    # A message for each thing that the user can do.
    page = f"{huggingface_hub.constants.ENDPOINT}/{hub_id}"
    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{start} is gated: request access at {page}, then run `hf auth login` (or set "
            "HF_TOKEN) and try again"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{start}: the repository {hub_id} has no such revision")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"{start} is not a directory, and there is no repository {page}; if it is private, run "
            "`hf auth login` (or set HF_TOKEN) first"
        )

    # The library's messages have several lines.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(lines) or type(error).__name__
    return UserError(
        f"{start} is not a directory, and it cannot be downloaded from the Hugging Face hub: "
        f"{reason[:300]}"
    )
