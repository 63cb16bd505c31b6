"""Weight files and directories as Hugging Face lays them out, in and out.

A directory holds `config.json` and the weights: one file, or shards with an index.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wings_jax import files
from wings_jax.formatting import format_names
from wings_jax.weights import safetensors_file, torch_file
from wings_jax.weights.tensors import LazyTensor, TensorMap, WeightsError

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.(safetensors|bin)")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def open_file(path: str | os.PathLike) -> TensorMap:
    """Returns the tensors of one file, unread.

    Raises:
      WeightsError: the file is not of a known format, or is cut short.
    """
    path = pathlib.Path(path)
    if path.suffix in torch_file.SUFFIXES:
        return torch_file.open_torch(path)
    return safetensors_file.open_safetensors(path)


def open_tensors(path: str | os.PathLike) -> TensorMap:
    """Returns the tensors of a file, or of all weight files of a directory, unread.

    A directory is read through its index, or else by all its safetensors files, or else by
    its torch files; shards that an index or their own names promise must be there.

    Raises:
      WeightsError: naming the file that is missing or broken, or the directory without any.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return open_file(path)
    if not path.is_dir():
        raise WeightsError(f"{path} does not exist")

    # An index lists the files; other weight files of the directory are ignored.
    for index in INDEX_FILES:
        if (path / index).is_file():
            return _open_index(path / index)

    # Without an index: all files of one kind, safetensors before torch.
    for suffixes in ((".safetensors",), torch_file.SUFFIXES):
        weight_files = sorted(file for file in path.iterdir() if file.suffix in suffixes)
        weight_files = [file for file in weight_files if file.name != "training_args.bin"]
        if weight_files:
            _check_shards(weight_files)
            return _open_shards(weight_files)
    raise WeightsError(f"{path} holds no weights (no *.safetensors, no *.bin)")


def _open_index(index: pathlib.Path) -> TensorMap:
    """Returns the tensors that an index lists."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{index} is not a weight index") from error

    # Every listed shard must exist, and hold the keys that it is listed with.
    shards = [index.parent / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in shards if not file.is_file()]
    if missing:
        raise WeightsError(f"{index.parent}: missing shards: {format_names(missing)}")

    tensors = _open_shards(shards)
    missing_keys = [key for key in weight_map if key not in tensors]
    if missing_keys:
        raise WeightsError(f"{index} lists {format_names(missing_keys)}, which no shard holds")
    return tensors


def _check_shards(weight_files: Sequence[pathlib.Path]) -> None:
    """Raises WeightsError if a file is shard N of M and another of the M is missing."""
    names = {file.name for file in weight_files}
    for file in weight_files:
        match = SHARD.fullmatch(file.name)
        if not match:
            continue
        ending = f"-of-{match['total']}{file.suffix}"
        numbers = range(1, int(match["total"]) + 1)
        missing = {f"{match['stem']}-{number:05d}{ending}" for number in numbers} - names
        if missing:
            raise WeightsError(f"{file.parent}: missing shards: {format_names(sorted(missing))}")


def _open_shards(shards: Sequence[pathlib.Path]) -> TensorMap:
    """Returns the tensors of several files, none of which may repeat another's key."""
    tensors: TensorMap = {}
    for file in shards:
        opened = open_file(file)
        repeated = [key for key in opened if key in tensors]
        if repeated:
            other = tensors[repeated[0]].origin
            raise WeightsError(f"{format_names(repeated, 2)} is in both {other} and {file}")
        tensors.update(opened)
    return tensors


def write_shards(
    directory: str | os.PathLike,
    tensors: Mapping[str, LazyTensor],
    *,
    stem: str = "model",
    max_bytes: int = 5 * 10**9,
    on_write: Callable[[str, int], None] = lambda key, size: None,
) -> list[pathlib.Path]:
    """Writes `model.safetensors`, or shards with an index where they exceed `max_bytes` a file.

    Returns the files written, the index last.
    """
    directory = pathlib.Path(directory)
    shards = _split_shards(tensors, max_bytes)
    if len(shards) == 1:
        file = directory / f"{stem}.safetensors"
        safetensors_file.write_safetensors(file, shards[0], on_write)
        return [file]

    # Shards are numbered from 1; the index maps every key to its file.
    written = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = directory / f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        safetensors_file.write_safetensors(file, shard, on_write)
        weight_map |= dict.fromkeys(shard, file.name)
        written.append(file)

    total = sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    index = files.write_json(directory / f"{stem}.safetensors.index.json", content)
    return [*written, index]


def _split_shards(tensors: Mapping[str, LazyTensor], max_bytes: int) -> list[dict[str, LazyTensor]]:
    """Returns the tensors in order, in groups of at most `max_bytes` (or of one tensor)."""
    shards: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for key, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled += tensor.nbytes
    return shards


def read_config(directory: str | os.PathLike, name: str = "config.json") -> dict[str, Any]:
    """Returns the content of `config.json`, or of another JSON file of a directory.

    Raises:
      WeightsError: it is missing or not JSON.
    """
    file = pathlib.Path(directory) / name
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise WeightsError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise WeightsError(f"{file} is not JSON: {error}") from error


def write_config(directory: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Writes `config.json`, its keys sorted as transformers does."""
    files.write_text(pathlib.Path(directory) / "config.json", dump_json(config))


def dump_json(content: Mapping[str, Any]) -> str:
    """Returns `content` as indented JSON with sorted keys and a final newline."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
