"""Torch files (`.bin`, `.pt`, `.pth`) of plain tensors: the only module that needs torch."""

from __future__ import annotations

import importlib.util
import pathlib
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from wings_jax.weights import text_files
from wings_jax.weights.tensors import LazyTensor, TensorMap, WeightsError

SUFFIXES = (".bin", ".pt", ".pth")


def check_torch(source: str) -> None:
    """Raises WeightsError if torch, which reads these files, is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise WeightsError(
            f"{source} has its weights in torch files: install torch to read them "
            "(pip install torch)"
        )


def open_torch(path: pathlib.Path) -> TensorMap:
    """Returns the tensors of a torch file; nothing but plain tensors is ever unpickled.

    Raises:
      WeightsError: torch is not installed, or the file is not a flat table of tensors.
    """
    text_files.check_not_pointer(path)
    check_torch(str(path))
    import torch

    # Files of torch before 1.6 are not zip archives, which alone can be mapped into memory.
    is_zip = zipfile.is_zipfile(path)

    # `weights_only` refuses every object but tensors and containers of them.
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path} holds more than tensors; it is not opened") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = (str(error).splitlines() or ["not a torch file"])[0]
        raise WeightsError(f"cannot read {path}: {reason}") from error

    if not isinstance(state, Mapping) or not all(torch.is_tensor(v) for v in state.values()):
        raise WeightsError(f"{path} does not hold a flat table of tensors")
    return {str(key): _from_torch(torch, key, value, path) for key, value in state.items()}


def _from_torch(torch: Any, key: str, value: Any, path: pathlib.Path) -> LazyTensor:
    """Returns a torch tensor as a LazyTensor; numpy has no bfloat16 of torch's kind."""
    name = str(value.dtype).removeprefix("torch.")
    if value.is_quantized or name.startswith(("float8", "float4", "q")):
        raise WeightsError(f"{key} in {path} has dtype {name}: a quantized tensor")
    if value.layout != torch.strided or value.is_complex():
        raise WeightsError(f"{key} in {path} is sparse or complex: not supported")

    is_bfloat16 = value.dtype == torch.bfloat16
    dtype = np.dtype(ml_dtypes.bfloat16 if is_bfloat16 else name)

    def load() -> np.ndarray:
        # numpy has no bfloat16: the bits pass as uint16.
        tensor = value.detach().contiguous()
        return tensor.view(torch.uint16).numpy().view(dtype) if is_bfloat16 else tensor.numpy()

    return LazyTensor(tuple(value.shape), dtype, load, str(path))
