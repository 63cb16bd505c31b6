"""Uploads an export to the Hugging Face hub, with a model card, in one commit."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from wings_jax import checkpoint
from wings_jax.errors import UserError
from wings_jax.weights import adapter, hub, model_card, peft, store, text_files
from wings_jax.weights.hub import CARD
from wings_jax.weights.tensors import WeightsError


def run_push(arguments: argparse.Namespace) -> None:
    """Uploads an exported directory or adapter; without --dry-run the hub has it afterwards.

    Raises:
      UserError: it is not an export, the id or the token is wrong, or the hub refuses.
    """
    path = pathlib.Path(arguments.path)
    kind = find_kind(path)
    files = [path] if path.is_file() else _list_files(path)
    match = hub.HUB_ID.fullmatch(arguments.repo)
    if match is None or match["revision"]:
        raise UserError(f"--repo: {arguments.repo!r} is not the id of a repository: OWNER/NAME")

    # The card is generated from the checkpoint; a text that the export has stays.
    step = checkpoint.find_step(arguments.checkpoint, flag="--checkpoint")
    existing = ""
    if path.is_dir() and (path / CARD).is_file():
        existing = text_files.read_text(path / CARD)
    name = arguments.repo.partition("/")[2]
    card = model_card.make_card(step, name=name, kind=kind, existing=existing)

    # The files of the export with the new card in place of its own.
    contents: dict[str, str | bytes] = {file.name: str(file) for file in files}
    contents[CARD] = card.encode()
    size = sum(file.stat().st_size for file in files)
    print(f"{arguments.repo}: {len(contents)} files, {size / 1e9:.3f} GB, of the format {kind}")
    if arguments.dry_run:
        print(card)
        print("dry run: nothing uploaded")
        return
    url = upload(arguments.repo, contents, is_private=arguments.private, message=arguments.message)
    print(url)


def find_kind(path: pathlib.Path) -> str:
    """Returns the format of an export. Raises UserError naming `path` for anything else."""
    if path.is_file():
        if adapter.is_adapter_file(path):
            return "adapter"
        raise UserError(f"push: {path} is not an adapter of `convert export --format adapter`")
    if not path.is_dir():
        raise UserError(f"push: {path} does not exist")

    # A checkpoint is not what others can open.
    if (path / checkpoint.SUBDIRECTORY).is_dir() or (path / "params").is_dir():
        raise UserError(
            f"push: {path} is a wings_jax checkpoint: export it first (python -m wings_jax.convert "
            "export) and push that"
        )
    if peft.is_peft(path):
        peft.open_peft(path)
        return "peft"

    # A whole model or an LLM: its config determines the format.
    try:
        config = store.read_config(path)
        store.open_tensors(path)  # all shards are there
    except WeightsError as error:
        raise UserError(f"push: {path} is not a complete export: {error}") from error

    family = str(config.get("model_type", ""))
    is_transformers = family == "wings"
    if is_transformers or family == "llava":
        return "transformers" if is_transformers else "llava"
    return "wings" if family.startswith(("wings_", "llava_")) else "llm"


def _list_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of an export. Raises UserError if there is a directory among them."""
    entries = [entry for entry in sorted(directory.iterdir()) if not entry.name.startswith(".")]
    directories = [entry.name for entry in entries if not entry.is_file()]
    if directories:
        raise UserError(
            f"push: {directory} has the directory {directories[0]}, which no export writes: push "
            "the export alone"
        )
    return [entry for entry in entries if entry.name != CARD]


def upload(
    repo: str, contents: dict[str, str | bytes], *, is_private: bool, message: str = ""
) -> str:
    """Creates a repository unless it exists, commits all files at once, and returns its page.

    Args:
      contents: name -> path of a file, or the content itself.

    Raises:
      UserError: there is no token, no permission, or no connection. Without the commit none of the
        files is visible.
    """
    import huggingface_hub
    from huggingface_hub import errors

    if huggingface_hub.get_token() is None:
        raise UserError(
            "push: there is no token for the Hugging Face hub: run `hf auth login`, or set "
            "HF_TOKEN to a token with write permission"
        )

    api = huggingface_hub.HfApi()
    failures: tuple[Any, ...] = (*errors.HfHubHTTPError.__bases__, errors.OfflineModeIsEnabled)
    # All files are in one commit: an export is on the hub completely, or not at all.
    operations = [
        huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in contents.items()
    ]
    try:
        # None: public, unless the organization has another default.
        api.create_repo(repo, private=is_private or None, exist_ok=True)
        api.create_commit(repo, operations, commit_message=message or "Upload a wings_jax export")
    except (*failures, ValueError) as error:
        raise UserError(_reason(repo, error)) from error
    return f"{huggingface_hub.constants.ENDPOINT}/{repo}"


def _reason(repo: str, error: Exception) -> str:
    """Returns why the hub did not take an upload, in one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"push: {repo}: the hub does not accept the token: run `hf auth login` again"
    if status == 403:
        return (
            f"push: {repo}: no permission to write: the token needs write access, and the account "
            f"a place in {repo.partition('/')[0]}"
        )

    # Any other error, in one line.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(lines) or type(error).__name__
    return f"push: {repo}: cannot be uploaded: {reason[:300]}"
