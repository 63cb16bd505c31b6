"""Tensors in files: safetensors in and out without torch, one tensor in memory at a time.

The safetensors library maps whole files or needs whole shards in memory; an 8B checkpoint is
read and written here by seeking, so that the peak stays at one tensor. The format is 8 bytes of
header length, a JSON header (name -> dtype, shape, offsets) and the raw little-endian data.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import struct
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from wings_jax.weights import rules

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.(safetensors|bin)")
MAX_HEADER = 100 * 2**20
PICKLES = ("*.bin", "*.pt", "*.pth")

Tensors = dict[str, rules.Tensor]


def open_file(path: str | os.PathLike) -> Tensors:
    """Returns the tensors of one file, unread.

    Raises:
      WeightsError: not a safetensors file, or shorter than its header says.
    """
    path = pathlib.Path(path)
    if path.suffix in {pathlib.PurePath(p).suffix for p in PICKLES}:
        return _open_pickle(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else MAX_HEADER + 1
            if length > min(MAX_HEADER, size - 8):
                raise rules.WeightsError(f"{path} is not a safetensors file, or is cut short")
            header = json.loads(file.read(length))
    except OSError as error:
        raise rules.WeightsError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, rules.WeightsError):
            raise
        raise rules.WeightsError(f"{path} has a header that is not JSON") from error
    return _entries(path, header, start=8 + length, size=size)


def _entries(path: pathlib.Path, header: Mapping, *, start: int, size: int) -> Tensors:
    tensors = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise rules.WeightsError(f"{key} in {path} has dtype {entry['dtype']}, not supported")
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if start + end > size:
            raise rules.WeightsError(f"{path} is cut short: {key} ends past the end of the file")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise rules.WeightsError(f"{key} in {path}: shape {list(shape)} does not fit its bytes")
        load = _reader(path, dtype, shape, start + begin)
        tensors[key] = rules.Tensor(shape, dtype, load, str(path))
    return tensors


def _reader(path: pathlib.Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> Callable:
    def load() -> np.ndarray:
        count = math.prod(shape)
        # bfloat16 is no native dtype of numpy, whose fromfile then needs an integer of its width.
        raw = np.fromfile(path, np.uint8, count=count * dtype.itemsize, offset=offset)
        if raw.size != count * dtype.itemsize:
            raise rules.WeightsError(f"{path} is cut short")
        return raw.view(dtype).reshape(shape)

    return load


def _open_pickle(path: pathlib.Path) -> Tensors:
    """Returns the tensors of a torch file; only plain tensors are ever unpickled."""
    try:
        import torch
    except ImportError as error:
        raise rules.WeightsError(f"{path} is a torch file: install torch to read it") from error
    import pickle

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise rules.WeightsError(f"{path} holds more than tensors; it is not opened") from error
    except (OSError, RuntimeError, EOFError) as error:
        first = (str(error).splitlines() or ["not a torch file"])[0]
        raise rules.WeightsError(f"cannot read {path}: {first}") from error
    if not isinstance(state, Mapping) or not all(torch.is_tensor(v) for v in state.values()):
        raise rules.WeightsError(f"{path} does not hold a flat table of tensors")
    return {key: _from_torch(torch, value, path) for key, value in state.items()}


def _from_torch(torch, value, path: pathlib.Path) -> rules.Tensor:
    is_bf16 = value.dtype == torch.bfloat16
    dtype = np.dtype(ml_dtypes.bfloat16) if is_bf16 else np.dtype(str(value.dtype).split(".")[-1])

    def load() -> np.ndarray:
        plain = value.detach().contiguous()
        return plain.view(torch.uint16).numpy().view(dtype) if is_bf16 else plain.numpy()

    return rules.Tensor(tuple(value.shape), dtype, load, str(path))


def open_tensors(path: str | os.PathLike) -> Tensors:
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
        raise rules.WeightsError(f"{path} does not exist")
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (path / index).is_file():
            return _open_index(path / index)
    for patterns in (("*.safetensors",), PICKLES):
        files = sorted(file for pattern in patterns for file in path.glob(pattern))
        files = [file for file in files if file.name != "training_args.bin"]
        if files:
            _check_shards(files)
            return _merge(files)
    raise rules.WeightsError(f"{path} holds no weights (no *.safetensors, no *.bin)")


def _open_index(index: pathlib.Path) -> Tensors:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise rules.WeightsError(f"{index} is not a weight index") from error
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise rules.WeightsError(f"{index.parent} lacks the shard {rules.format_keys(missing)}")
    tensors = _merge(files)
    lost = [key for key in weight_map if key not in tensors]
    if lost:
        raise rules.WeightsError(f"{index} promises {rules.format_keys(lost)}, no shard has it")
    return tensors


def _check_shards(files: list[pathlib.Path]) -> None:
    here = {file.name for file in files}
    for file in files:
        match = SHARD.fullmatch(file.name)
        if not match:
            continue
        total = int(match["total"])
        ends = f"-of-{match['total']}{file.suffix}"
        wanted = {f"{match['stem']}-{n:05d}{ends}" for n in range(1, total + 1)}
        if wanted - here:
            raise rules.WeightsError(
                f"{file.parent} lacks the shard {rules.format_keys(wanted - here)}"
            )


def _merge(files: list[pathlib.Path]) -> Tensors:
    tensors: Tensors = {}
    for file in files:
        opened = open_file(file)
        twice = [key for key in opened if key in tensors]
        if twice:
            other = tensors[twice[0]].origin
            raise rules.WeightsError(f"{rules.format_keys(twice, 2)} is in both {other} and {file}")
        tensors.update(opened)
    return tensors


def write_file(
    path: str | os.PathLike,
    tensors: Mapping[str, rules.Tensor],
    on_write: Callable[[str, int], None] = lambda key, size: None,
) -> None:
    """Writes one safetensors file, tensor by tensor, under a passing name until it is whole."""
    path = pathlib.Path(path)
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, tensor in tensors.items():
        end = offset + tensor.nbytes
        name = NAMES[tensor.dtype]
        shape = list(tensor.shape)
        header[key] = {"dtype": name, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    passing = path.with_name(path.name + ".partial")
    with passing.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, tensor in tensors.items():
            array = np.ascontiguousarray(np.asarray(tensor))
            if array.nbytes != tensor.nbytes:
                raise rules.WeightsError(f"{key} changed its size while {path} was written")
            file.write(array.reshape(-1).view(np.uint8).data)
            on_write(key, array.nbytes)
    passing.rename(path)


def write_shards(
    directory: str | os.PathLike,
    tensors: Mapping[str, rules.Tensor],
    *,
    stem: str = "model",
    max_bytes: int = 5 * 10**9,
    on_write: Callable[[str, int], None] = lambda key, size: None,
) -> list[pathlib.Path]:
    """Writes `model.safetensors`, or shards with an index where they exceed `max_bytes` a file.

    Returns the files written.
    """
    directory = pathlib.Path(directory)
    shards: list[dict[str, rules.Tensor]] = [{}]
    filled = 0
    for key, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        file = directory / f"{stem}.safetensors"
        write_file(file, shards[0], on_write)
        return [file]
    files = []
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = directory / f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(file, shard, on_write)
        weight_map.update(dict.fromkeys(shard, file.name))
        files.append(file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = directory / f"{stem}.safetensors.index.json"
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    index.write_text(json.dumps(content, indent=2) + "\n")
    return [*files, index]


def read_config(directory: str | os.PathLike, name: str = "config.json") -> dict:
    """Returns the `config.json` (or another JSON file) of a directory.

    Raises:
      WeightsError: it is missing or not JSON.
    """
    file = pathlib.Path(directory) / name
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise rules.WeightsError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise rules.WeightsError(f"{file} is not JSON: {error}") from error


def write_config(directory: str | os.PathLike, config: Mapping) -> None:
    """Writes `config.json`."""
    (pathlib.Path(directory) / "config.json").write_text(dump_json(config))


def dump_json(content: Mapping) -> str:
    """Returns `content` as indented JSON with a final newline."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
