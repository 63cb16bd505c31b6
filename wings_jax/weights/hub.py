"""Repositories on the Hugging Face hub, and directories that stand for them."""

from __future__ import annotations

import pathlib
import re

from wings_jax.errors import UserError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def find_directory(name: str, flag: str) -> pathlib.Path:
    """Returns the directory `name`, downloaded first if it is the id of a hub repository.

    Raises:
      UserError: naming `flag`, if there is neither a directory nor a repository of that name.
    """
    path = pathlib.Path(name)
    if path.is_dir():
        return path
    if path.exists() or not HUB_ID.fullmatch(name):
        raise UserError(f"{flag}: {name} is not a directory")
    return _download(name, flag)


def _download(hub_id: str, flag: str) -> pathlib.Path:
    """Returns the local copy of a repository's weights, configs and tokenizer."""
    import huggingface_hub

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(hub_id, allow_patterns=list(HUB_FILES))
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{flag}: {hub_id} is not a directory, and it cannot be downloaded from the "
            f"Hugging Face hub: {reason}"
        ) from error
