"""Weight files and directories as Hugging Face lays them out, in and out.

A directory holds `config.json` and the weights: one file, or shards with an index.
"""

from __future__ import annotations

import fnmatch
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from wings_jax import files
from wings_jax.formatting import format_names
from wings_jax.weights import safetensors_file, text_files, torch_file
from wings_jax.weights.tensors import LazyTensor, TensorMap, WeightsError

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.(safetensors|bin)")
# In the order of transformers; a name with `*` is all shards of it, without their index.
CANONICAL_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model-*.bin",
)
# What a Trainer, other tools or PEFT write beside a model's weights.
NOT_A_MODEL = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|consolidated|adapter_model)[._-].*"
)
ADAPTER_CONFIG = "adapter_config.json"


def open_file(path: str | os.PathLike) -> TensorMap:
    """Returns the tensors of one file, unread.

    Raises:
      WeightsError: the file is not of a known format, or is cut short.
    """
    path = pathlib.Path(path)
    if path.suffix in torch_file.SUFFIXES:
        return torch_file.open_torch(path)
    return safetensors_file.open_safetensors(path)


def choose_weight_files(names: Iterable[str]) -> list[str]:
    """Returns which files of a directory hold the model: one, shards, or an index and its shards.

    Canonical names come first, as in transformers; what a Trainer writes beside them (optimizer
    states and the like) and variants such as `model.fp16.safetensors` are not used then.

    >>> choose_weight_files(["optimizer.pt", "model.safetensors", "pytorch_model.bin"])
    ['model.safetensors']
    >>> choose_weight_files(["mm_projector.bin", "training_args.bin"])
    ['mm_projector.bin']
    """
    # The first canonical name that occurs decides.
    names = sorted(names)
    for canonical in CANONICAL_NAMES:
        if canonical.endswith(".index.json") and canonical in names:
            stem, suffix = canonical.removesuffix(".index.json").split(".")
            shards = [n for n in names if n.startswith(f"{stem}-") and n.endswith(f".{suffix}")]
            return [canonical, *shards]
        matches = [name for name in names if fnmatch.fnmatchcase(name, canonical)]
        if matches:
            return matches

    # Other names: all files of one kind, safetensors before torch.
    for suffixes in ((".safetensors",), torch_file.SUFFIXES):
        others = [name for name in names if name.endswith(suffixes)]
        others = [name for name in others if not NOT_A_MODEL.match(name)]
        if others:
            return others
    return []


def open_tensors(path: str | os.PathLike) -> TensorMap:
    """Returns the tensors of a file, or of a directory's weight files, unread.

    The files of a directory are those of `choose_weight_files`; shards that an index or their
    own names promise must be there.

    Raises:
      WeightsError: naming the file that is missing or broken, or the directory without any.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return open_file(path)
    if not path.is_dir():
        raise WeightsError(f"{path} does not exist")

    # Only files of this directory: subdirectories hold other copies.
    names = choose_weight_files(file.name for file in path.iterdir() if file.is_file())
    if not names:
        _check_not_adapter(path)
        raise WeightsError(f"{path} holds no weights (no *.safetensors, no *.bin)")
    if names[0].endswith(".index.json"):
        return _open_index(path / names[0])

    weight_files = [path / name for name in names]
    _check_shards(weight_files)
    return _open_shards(weight_files)


def has_weights(directory: str | os.PathLike) -> bool:
    """Returns whether a directory holds the weights of a model."""
    return bool(choose_weight_files(file.name for file in pathlib.Path(directory).iterdir()))


def _check_not_adapter(directory: pathlib.Path) -> None:
    """Raises WeightsError if a directory holds an adapter in place of a model."""
    if not (directory / ADAPTER_CONFIG).is_file():
        return
    base = text_files.read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    raise WeightsError(
        f"{directory} holds a PEFT adapter ({ADAPTER_CONFIG}), not a model: import it as --peft, "
        f"with its base {base or 'model'} as --llm"
    )


def _open_index(index: pathlib.Path) -> TensorMap:
    """Returns the tensors that an index lists."""
    weight_map = text_files.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index} is not a weight index: it has no weight_map")

    for key, name in weight_map.items():
        if not isinstance(name, str) or name != pathlib.PurePath(name).name or "\0" in name:
            raise WeightsError(f"{index}: {str(name)[:40]!a} of {key[:60]!a} is not a file name")

    # Every listed shard must exist, and hold the keys that it is listed with.
    shards = [index.parent / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in shards if not file.is_file()]
    if missing:
        raise WeightsError(f"{index.parent}: missing shards: {format_names(missing)}")

    tensors = _open_shards(shards)
    missing_keys = [ascii(key)[1:-1] for key in weight_map if key not in tensors]
    if missing_keys:
        raise WeightsError(f"{index} lists {format_names(missing_keys)}, which no shard holds")
    return tensors


def _check_shards(weight_files: Sequence[pathlib.Path]) -> None:
    """Raises WeightsError if a file is shard N of M and another of the M is missing."""
    # Shards carry their number and how many there are.
    names = {file.name for file in weight_files}
    for file in weight_files:
        match = SHARD.fullmatch(file.name)
        if not match:
            continue
        # The names of all shards of this set.
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
    # One file needs no index.
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

    # The index has the bytes of all tensors, and key -> file.
    total = sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    index = files.write_json(directory / f"{stem}.safetensors.index.json", content)
    return [*written, index]


def _split_shards(tensors: Mapping[str, LazyTensor], max_bytes: int) -> list[dict[str, LazyTensor]]:
    """Returns the tensors in order, in groups of at most `max_bytes` (or of one tensor)."""
    shards: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for key, tensor in tensors.items():
        # A tensor is never divided: one that exceeds the limit has a shard of its own.
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled += tensor.nbytes
    return shards


def read_config(directory: str | os.PathLike, name: str = "config.json") -> dict[str, Any]:
    """Returns the content of `config.json`, or of another JSON file of a directory.

    Raises:
      WeightsError: it is missing, or does not hold a JSON object.
    """
    directory = pathlib.Path(directory)
    # An adapter's directory gets a message of its own.
    if not (directory / name).exists():
        _check_not_adapter(directory)
    return text_files.read_json(directory / name)


def write_config(directory: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Writes `config.json`, its keys sorted as transformers does."""
    files.write_text(pathlib.Path(directory) / "config.json", dump_json(config))


def dump_json(content: Mapping[str, Any]) -> str:
    """Returns `content` as indented JSON with sorted keys and a final newline."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
