"""Parameters of a checkpoint that stay on disk until they are read, one at a time."""

from __future__ import annotations

import math
import pathlib
import threading
from typing import Any

import jax
import numpy as np

from wings_jax import checkpoint


class StoredArray:
    """A parameter of a checkpoint: shape and dtype are known, `np.asarray` and indexing read it.

    A step keeps the last few arrays that were read, so that the layers of a stacked parameter,
    read one after another, read its file once.
    """

    def __init__(self, step: StoredStep, path: str, shape: tuple[int, ...], dtype: np.dtype):
        self._step, self._path = step, path
        self.shape, self.dtype = shape, dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the array in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self._step.read(self._path)
        return array if dtype is None else array.astype(dtype, copy=False)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._step.read(self._path)[index]


class StoredStep:
    """The parameters of one step; at most two are in memory, for a reader and one ahead of it."""

    def __init__(self, directory: pathlib.Path):
        # Parameters are read into this host's memory, whatever mesh wrote them.
        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        self._directory = directory
        self._targets = {
            path: jax.ShapeDtypeStruct(meta.shape, meta.dtype, sharding=host)
            for path, meta in checkpoint.read_shapes(directory).items()
        }

        self._lock = threading.Lock()
        self._arrays: dict[str, np.ndarray] = {}

    def params(self) -> dict[str, StoredArray]:
        """Returns path -> array."""
        return {
            path: StoredArray(self, path, tuple(target.shape), np.dtype(target.dtype))
            for path, target in self._targets.items()
        }

    def read(self, path: str) -> np.ndarray:
        """Returns one parameter in this host's memory, compared with its checksum.

        Raises:
          DamagedCheckpointError: it cannot be read, or differs from its checksum.
        """
        with self._lock:
            if path not in self._arrays:
                # The array that was read first is dropped first.
                while len(self._arrays) > 1:
                    del self._arrays[next(iter(self._arrays))]

                targets = {path: self._targets[path]}
                array = checkpoint.read_params(self._directory, targets)[path]
                self._arrays[path] = np.asarray(array)
            return self._arrays[path]


def open_params(step: pathlib.Path) -> dict[str, StoredArray]:
    """Returns path -> array of a step's parameters, none of which is read yet."""
    return StoredStep(step).params()
