"""Tensors of a checkpoint that are read only when needed, and the error of unusable weights."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from wings_jax.errors import UserError


class WeightsError(UserError):
    """Weights that do not fit or cannot be read; the message names keys, paths, shapes, files."""


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """An array that is read on demand: `np.asarray(tensor)` reads it.

    shape    known without reading
    dtype    known without reading
    load     returns the array; called once per conversion to an array, nothing is cached
    origin   the file (or parameter path) that it comes from, for messages
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]
    origin: str = ""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.load()
        return array if dtype is None else array.astype(dtype, copy=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the array in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


# Hugging Face key -> tensor.
TensorMap = dict[str, LazyTensor]


# Keys that GPTQ, AWQ, bitsandbytes and FP8 files have beside, or in place of, `.weight`.
_QUANTIZED_KEY = re.compile(
    r".*\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|quant_state.*|weight_scale(_inv)?"
    r"|weight_packed|input_scale)"
)


def check_not_quantized(tensors: Mapping[str, LazyTensor], source: str) -> None:
    """Raises WeightsError naming a tensor if a checkpoint is quantized.

    Integers would be read as if they were the weights themselves.
    """
    for key, tensor in tensors.items():
        # Weights are floating-point numbers in every format that is not quantized.
        is_integer = key.endswith((".weight", ".bias")) and tensor.dtype.kind in "iub"
        if is_integer or _QUANTIZED_KEY.fullmatch(key):
            raise WeightsError(
                f"{source} is quantized ({key} has dtype {tensor.dtype.name}): import the model "
                "that it was made from"
            )


CHUNK = 1 << 18  # elements that are checked at a time; they stay in the processor's cache


def check_finite(key: str, array: np.ndarray, source: str) -> None:
    """Raises WeightsError if a floating-point array holds NaN or infinity."""
    is_bfloat16 = array.dtype == ml_dtypes.bfloat16
    if not is_bfloat16 and array.dtype.kind != "f":
        return

    # The exponent is all ones exactly for NaN and infinity; far cheaper than a conversion.
    flat = array.reshape(-1)
    flat = flat.view(np.uint16) if is_bfloat16 else flat
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK]
        is_finite = (part & 0x7F80).max() != 0x7F80 if is_bfloat16 else np.isfinite(part).all()
        if not is_finite:
            raise WeightsError(f"{key} of {source} holds NaN or infinity")
