"""Torch files (`.bin`, `.pt`, `.pth`) of plain tensors: the only module that needs torch."""

from __future__ import annotations

import pathlib
import pickle
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from wings_jax.weights.tensors import LazyTensor, TensorMap, WeightsError

SUFFIXES = (".bin", ".pt", ".pth")


def open_torch(path: pathlib.Path) -> TensorMap:
    """Returns the tensors of a torch file; nothing but plain tensors is ever unpickled.

    Raises:
      WeightsError: torch is not installed, or the file is not a flat table of tensors.
    """
    try:
        import torch
    except ImportError as error:
        raise WeightsError(f"{path} is a torch file: install torch to read it") from error

    # `weights_only` refuses every object but tensors and containers of them.
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path} holds more than tensors; it is not opened") from error
    except (OSError, RuntimeError, EOFError) as error:
        reason = (str(error).splitlines() or ["not a torch file"])[0]
        raise WeightsError(f"cannot read {path}: {reason}") from error

    if not isinstance(state, Mapping) or not all(torch.is_tensor(v) for v in state.values()):
        raise WeightsError(f"{path} does not hold a flat table of tensors")
    return {key: _from_torch(torch, value, path) for key, value in state.items()}


def _from_torch(torch: Any, value: Any, path: pathlib.Path) -> LazyTensor:
    """Returns a torch tensor as a LazyTensor; numpy has no bfloat16 of torch's kind."""
    is_bfloat16 = value.dtype == torch.bfloat16
    dtype = np.dtype(ml_dtypes.bfloat16 if is_bfloat16 else str(value.dtype).split(".")[-1])

    def load() -> np.ndarray:
        tensor = value.detach().contiguous()
        return tensor.view(torch.uint16).numpy().view(dtype) if is_bfloat16 else tensor.numpy()

    return LazyTensor(tuple(value.shape), dtype, load, str(path))
