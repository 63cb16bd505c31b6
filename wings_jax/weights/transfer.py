"""Applies a table of weight rules to a whole checkpoint, in both directions.

Import and export are total: a Hugging Face key that no rule reads, a path that no rule fills, or
a shape that differs stops the work before any tensor is read, with the names in the message.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from wings_jax.formatting import format_names
from wings_jax.weights import copies
from wings_jax.weights.rules import Rule, any_match
from wings_jax.weights.tensors import LazyTensor, WeightsError, check_finite

Progress = Callable[[str, int], None]
Store = Callable[[int, np.ndarray], None]
WORKERS = min(4, os.cpu_count() or 1)  # threads that read and copy tensors


class HasShape(Protocol):
    """Anything with the shape of an array, such as a LazyTensor or a torch parameter."""

    @property
    def shape(self) -> Sequence[int]:
        """The sizes of the dimensions."""
        ...


def no_progress(hf_key: str, size: int) -> None:
    """Ignores the progress of a transfer."""


@dataclasses.dataclass(frozen=True)
class TransferPlan:
    """What an import does, known before any tensor is read.

    matches          path -> (rule, the Hugging Face keys that fill it)
    unfilled_paths   paths that no tensor fills: they are newly initialized later
    unused_keys      Hugging Face keys that are ignored on purpose
    """

    matches: dict[str, tuple[Rule, list[str]]]
    unfilled_paths: list[str]
    unused_keys: list[str]


def plan_import(
    rules: Iterable[Rule],
    tensors: Mapping[str, HasShape],
    params: Mapping[str, jax.ShapeDtypeStruct],
    *,
    ignorable: Sequence[str] = (),
    fresh: Sequence[str] = (),
    source: str = "the checkpoint",
) -> TransferPlan:
    """Returns the plan that uses every key of `tensors` and fills every path of `params`.

    Args:
      tensors: Hugging Face key -> anything with a shape.
      params: path -> shape and dtype; rules for other paths are skipped.
      ignorable: regular expressions of Hugging Face keys that may stay unused.
      fresh: regular expressions of paths that may stay unfilled.
      source: file or directory, for messages.

    Raises:
      WeightsError: naming missing keys, unfilled paths, unused keys, or shapes that differ.
    """
    # Match every rule whose path the model has. The first rule of a path counts.
    matches: dict[str, tuple[Rule, list[str]]] = {}
    missing_keys: list[str] = []
    for rule in rules:
        if rule.path not in params or rule.path in matches:
            continue
        hf_keys = rule.hf_keys(params[rule.path].shape)
        missing = [hf_key for hf_key in hf_keys if hf_key not in tensors]
        if not missing:
            matches[rule.path] = (rule, hf_keys)
        elif not any_match(fresh, rule.path):
            missing_keys += missing

    # What remains on both sides.
    used_keys = {hf_key for _, hf_keys in matches.values() for hf_key in hf_keys}
    unused_keys = [hf_key for hf_key in tensors if hf_key not in used_keys]
    unfilled_paths = [path for path in params if path not in matches]
    plan = TransferPlan(matches, unfilled_paths, unused_keys)

    # Everything that remains has to be allowed by name.
    unknown_keys = [hf_key for hf_key in unused_keys if not any_match(ignorable, hf_key)]
    unexpected_paths = [path for path in unfilled_paths if not any_match(fresh, path)]

    if missing_keys:
        names = format_names(sorted(missing_keys), 6)
        hint = f"; unused keys: {format_names(sorted(unknown_keys), 3)}" if unknown_keys else ""
        raise WeightsError(f"{source}: missing keys: {names}{hint}")
    if unexpected_paths:
        names = format_names(sorted(unexpected_paths), 6)
        raise WeightsError(f"{source} holds nothing for the parameters {names}")
    if unknown_keys:
        names = format_names(sorted(unknown_keys), 6)
        raise WeightsError(f"{source}: keys that this model does not have: {names}")

    _check_shapes(plan, tensors, params, source)
    return plan


def _check_shapes(plan: TransferPlan, tensors: Mapping, params: Mapping, source: str) -> None:
    """Raises WeightsError naming the tensors whose shape is not the rule's."""
    differences = []
    for path, (rule, hf_keys) in plan.matches.items():
        expected = rule.hf_shape(params[path].shape)
        for hf_key in hf_keys:
            shape = tuple(tensors[hf_key].shape)
            if shape != expected:
                differences.append(f"{hf_key} is {list(shape)}, {path} needs {list(expected)}")

    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise WeightsError(f"{source}: shapes differ: {'; '.join(differences[:3])}{more}")


def import_tree(
    rules: Iterable[Rule],
    tensors: Mapping[str, Any],
    params: Mapping[str, jax.ShapeDtypeStruct],
    *,
    ignorable: Sequence[str] = (),
    fresh: Sequence[str] = (),
    source: str = "the checkpoint",
    on_read: Progress = no_progress,
) -> dict[str, np.ndarray | jax.Array]:
    """Returns path -> array for every path of `params` that the checkpoint fills.

    Reads a few tensors at a time straight into the final dtype: the host never holds more than
    the result and these. Where an entry of `params` carries a sharding, its array is
    placed on the devices as soon as it is complete, so the host holds one array at a time.

    Args: as for `plan_import`; on_read is called with each key and its bytes.

    Raises:
      WeightsError: as `plan_import`, and for a tensor that holds NaN or infinity.
    """
    plan = plan_import(rules, tensors, params, ignorable=ignorable, fresh=fresh, source=source)

    # One tensor: read, checked, converted to the layout of the parameter and copied to its place.
    def fill(store: Store, layer: int, rule: Rule, hf_key: str, shape) -> tuple[str, int]:
        array = np.asarray(tensors[hf_key])
        check_finite(hf_key, array, source)
        store(layer, rule.from_hf(array, shape))
        return hf_key, array.nbytes

    # Layers are read and copied side by side: reading and numpy's copies hold no lock.
    arrays: dict[str, np.ndarray | jax.Array] = {}
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        for path, (rule, hf_keys) in plan.matches.items():
            # A sharding places the array on devices; without, it stays in host memory.
            struct = params[path]
            is_on_host = getattr(struct, "sharding", None) is None
            assembly = (_HostArray if is_on_host else _DeviceArray)(struct, rule.is_stacked)
            jobs = [
                pool.submit(fill, assembly.store, layer, rule, hf_key, struct.shape)
                for layer, hf_key in enumerate(hf_keys)
            ]
            try:
                for job in jobs:
                    on_read(*job.result())
            finally:
                for job in jobs:
                    job.cancel()
            arrays[path] = assembly.finish()
    return arrays


class _HostArray:
    """An array in host memory that is filled layer by layer."""

    def __init__(self, struct: jax.ShapeDtypeStruct, is_stacked: bool):
        self.whole = np.empty(struct.shape, struct.dtype)
        self.is_stacked = is_stacked

    def store(self, layer: int, array: np.ndarray) -> None:
        """Copies one layer's array, or the whole one, to its place."""
        copies.copy_into(self.whole[layer] if self.is_stacked else self.whole, array)

    def finish(self) -> np.ndarray:
        """Returns the array."""
        return self.whole


class _DeviceArray:
    """An array at its sharding that is filled layer by layer; this host fills its own shards."""

    def __init__(self, struct: jax.ShapeDtypeStruct, is_stacked: bool):
        self.struct, self.is_stacked = struct, is_stacked
        self.device_index = struct.sharding.addressable_devices_indices_map(struct.shape)

        # Devices that hold the same slice share one host buffer.
        self.shards: dict[tuple, tuple[tuple, np.ndarray]] = {}
        for index in self.device_index.values():
            ranges = [range(*cut.indices(n)) for cut, n in zip(index, struct.shape, strict=True)]
            buffer = np.empty([len(r) for r in ranges], struct.dtype)
            self.shards[_slice_bounds(index)] = (index, buffer)

    def store(self, layer: int, array: np.ndarray) -> None:
        """Cuts one layer's array, or the whole one, once for every distinct shard."""
        for index, shard in self.shards.values():
            if not self.is_stacked:
                copies.copy_into(shard, array[index])
                continue
            # A layer is copied to those shards that include it.
            layers = range(*index[0].indices(self.struct.shape[0]))
            if layer in layers:
                copies.copy_into(shard[layers.index(layer)], array[index[1:]])

    def finish(self) -> jax.Array:
        """Returns the array on its devices."""
        # Wait for the copies: the host buffers are freed with this object.
        on_devices = [
            jax.device_put(self.shards[_slice_bounds(index)][1], device)
            for device, index in self.device_index.items()
        ]
        jax.block_until_ready(on_devices)
        return jax.make_array_from_single_device_arrays(
            self.struct.shape, self.struct.sharding, on_devices
        )


def _slice_bounds(index: tuple[slice, ...]) -> tuple:
    """Returns a hashable form of a device's slices."""
    return tuple((cut.start, cut.stop) for cut in index)


def export_tree(
    rules: Iterable[Rule],
    params: Mapping[str, Any],
    *,
    dtype: Any = None,
    dropped: Sequence[str] = (),
) -> dict[str, LazyTensor]:
    """Returns Hugging Face key -> tensor, computed from the parameters when it is read.

    The reverse of `import_tree`.

    Args:
      params: path -> array (numpy or jax; anything with shape, dtype and indexing).
      dtype: dtype of the tensors; None keeps each parameter's own.
      dropped: regular expressions of paths that the format does not need to hold.

    Raises:
      WeightsError: naming the unmapped paths, for which the format has no key.
    """
    # The first rule of a path counts, as in an import.
    rule_by_path: dict[str, Rule] = {}
    for rule in rules:
        rule_by_path.setdefault(rule.path, rule)

    unmapped_paths = [
        path for path in params if path not in rule_by_path and not any_match(dropped, path)
    ]
    if unmapped_paths:
        raise WeightsError(f"the format cannot hold {format_names(sorted(unmapped_paths), 6)}")

    # Stacked parameters become one tensor per layer.
    tensors = {}
    for path, rule in rule_by_path.items():
        if path not in params:
            continue

        array = params[path]
        hf_shape = rule.hf_shape(array.shape)
        hf_dtype = np.dtype(array.dtype if dtype is None else dtype)
        for layer, hf_key in enumerate(rule.hf_keys(array.shape)):
            load = _tensor_loader(rule, array, layer, hf_dtype)
            tensors[hf_key] = LazyTensor(hf_shape, hf_dtype, load, path)
    return tensors


def _tensor_loader(rule: Rule, array: Any, layer: int, dtype: np.dtype) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        layer_array = np.asarray(array[layer] if rule.is_stacked else array)
        return rule.to_hf(layer_array, array.shape).astype(dtype, copy=False)

    return load
