"""What `convert export` runs for the formats that hold no LLM: an adapter, or LoRA for peft."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Mapping

from wings_jax import checkpoint, files
from wings_jax.errors import UserError
from wings_jax.formatting import format_names
from wings_jax.weights import (
    adapter,
    adapter_export,
    command_output,
    digests,
    peft,
    safetensors_file,
    starting,
    store,
)
from wings_jax.weights.rules import group_name
from wings_jax.weights.stored_params import StoredArray
from wings_jax.weights.tensors import WeightsError

Params = Mapping[str, StoredArray]


def export_adapter(arguments: argparse.Namespace, step: pathlib.Path, params: Params) -> None:
    """Writes what training added to a frozen LLM and tower as one file."""
    if arguments.merge_lora:
        raise UserError("--merge-lora: an adapter holds LoRA beside the LLM, which stays as it is")

    config, arch, number = checkpoint.read_meta(step)
    dtype = command_output.DTYPES[arguments.dtype or "stored"]
    tensors = adapter_export.as_adapter(params, arch, dtype=dtype)
    # With a base the values are compared below, without one the recorded rates decide.
    if not arguments.base:
        for note in adapter_export.check_recorded(step):
            print(f"note: {note}")

    # The digests of the LLM and the tower, which are compared with the base's if it is given.
    frozen = {path: array for path, array in params.items() if adapter.is_base(path)}
    own = digests.digest_tensors(digests.split_tensors(frozen))
    if arguments.base:
        base = checkpoint.find_step(arguments.base, flag="--base")
        adapter_export.check_unchanged(base, own)

    tokenizer = checkpoint.open_tokenizer(checkpoint.read_tokenizer_files(step))
    metadata = adapter.make_metadata(config, arch, number, own, tokenizer)

    size = sum(tensor.nbytes for tensor in tensors.values())
    whole = sum(array.nbytes for array in params.values())
    print(
        f"{step}: {len(tensors)} tensors, {size / 1e6:.2f} MB; the whole model has "
        f"{whole / 1e6:.2f} MB"
    )
    if arguments.dry_run:
        print("dry run: nothing written")
        return

    output = command_output.require_output(arguments)
    if output.exists():
        raise UserError(f"{output} exists already; give another output or remove it")
    with command_output.progress("writing", size) as on_write:
        safetensors_file.write_safetensors(output, tensors, on_write, metadata=metadata)
    print(output)


def export_peft(arguments: argparse.Namespace, step: pathlib.Path, params: Params) -> None:
    """Writes LoRA alone as a directory that the peft package loads."""
    if arguments.merge_lora:
        raise UserError("--merge-lora: --format peft holds LoRA alone")
    _, arch, _ = checkpoint.read_meta(step)
    dtype = command_output.DTYPES[arguments.dtype or "stored"]
    tensors, config = peft.as_peft(params, arch, dtype=dtype)

    # Projector, learners, router and prefix have no place in it.
    parts = [path for path in params if adapter.is_part(path)]
    is_lora = [path for path in parts if starting.is_adapter(path) and "/prefix/" not in path]
    groups = sorted({group_name(path) for path in parts if path not in is_lora})
    print(f"left out: {format_names(groups, 6)}" if groups else "nothing is left out")

    size = sum(tensor.nbytes for tensor in tensors.values())
    print(f"{step}: {len(tensors)} tensors, {size / 1e6:.2f} MB")
    # LoRA for an LLM that training changed is still exported, with a note.
    try:
        notes = adapter_export.check_recorded(step)
    except WeightsError as error:
        notes = [f"LoRA is for the LLM in this checkpoint, not for one before it: {error}"]
    for note in notes:
        print(f"note: {note}")
    if arguments.dry_run:
        print("dry run: nothing written")
        return

    output = command_output.require_output(arguments)
    with files.new_directory(output, need_bytes=size) as temporary:
        with command_output.progress("writing", size) as on_write:
            file = temporary / peft.WEIGHT_FILES[0]
            safetensors_file.write_safetensors(file, tensors, on_write)
        files.write_text(temporary / store.ADAPTER_CONFIG, store.dump_json(config))
    print(output)


# Format -> what writes it.
EXPORTS: Mapping[str, Callable[[argparse.Namespace, pathlib.Path, Params], None]] = {
    "adapter": export_adapter,
    "peft": export_peft,
}
