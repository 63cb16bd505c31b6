"""The engine that carries weights between a foreign format and our parameter tree.

A table has one row per foreign tensor, read in both directions:

    model.layers.{l}.self_attn.q_proj.weight    layers/attn/q/kernel    (N H) D <-> D N H

says that the foreign tensor of layer `l` has shape [N*H, D], that ours is [L, D, N, H] with the
layers stacked in front, and how one becomes the other: split, transpose, and back. Sizes are
never written down: our shape gives a size to every name on the right, and these give the
foreign shape. Import and export are total: a foreign key that no row reads, a path of ours
that no row makes, or a shape that disagrees stops the work before anything is read, by name.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from wings_jax.errors import UserError

LAYER = "{l}"


class WeightsError(UserError):
    """Weights that do not fit; the message names keys, paths, shapes."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array that is read when asked for: `np.asarray(tensor)` reads it.

    shape, dtype   known without reading
    load           returns the array
    origin         the file it comes from, for messages
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
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row: foreign key (`{l}` is the layer) <-> our path, and the reversible dimensions."""

    foreign: str
    ours: str
    dims: str

    @property
    def is_stacked(self) -> bool:
        return LAYER in self.foreign

    def keys(self, shape: Sequence[int]) -> list[str]:
        """Returns the foreign keys that make our array of this shape, in the order of layers."""
        if not self.is_stacked:
            return [self.foreign]
        return [self.foreign.replace(LAYER, str(layer)) for layer in range(shape[0])]

    def foreign_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of one foreign tensor, given the shape of our whole array."""
        pattern, sizes = self._bind(shape)
        return tuple(
            math.prod(sizes[name] for name in group_keys) for group_keys in pattern.foreign
        )

    def to_ours(self, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Returns a view of one foreign tensor in our order (without the layers' dimension)."""
        pattern, sizes = self._bind(shape)
        split = array.reshape([sizes[name] for group in pattern.foreign for name in group])
        return split.transpose(pattern.order)

    def to_foreign(self, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Returns one foreign tensor from our array (without the layers' dimension)."""
        pattern, _ = self._bind(shape)
        return array.transpose(np.argsort(pattern.order)).reshape(self.foreign_shape(shape))

    def _bind(self, shape: Sequence[int]) -> tuple[Pattern, dict[str, int]]:
        pattern = parse(self.dims)
        own = tuple(shape)[1:] if self.is_stacked else tuple(shape)
        if len(own) != len(pattern.ours):
            raise WeightsError(f"{self.ours} has shape {list(shape)}, its rule says {self.dims!r}")
        return pattern, dict(zip(pattern.ours, own, strict=True))


@dataclasses.dataclass(frozen=True)
class Pattern:
    """`(N H) D <-> D N H`: foreign groups, our names, and the transposition between them."""

    foreign: tuple[tuple[str, ...], ...]
    ours: tuple[str, ...]
    order: tuple[int, ...]


@functools.cache
def parse(dims: str) -> Pattern:
    """Returns the pattern written in `dims`.

    Raises:
      ValueError: the two sides do not hold the same names, each once.
    """
    left, arrow, right = dims.partition("<->")
    groups = tuple(
        tuple((group or name).split()) for group, name in re.findall(r"\(([^()]*)\)|(\S+)", left)
    )
    names = [name for group in groups for name in group]
    ours = tuple(right.split())
    if not arrow or sorted(names) != sorted(ours) or len(set(ours)) != len(ours):
        raise ValueError(f"{dims!r}: both sides of <-> must hold the same names, each once")
    return Pattern(groups, ours, tuple(names.index(name) for name in ours))


def table(text: str) -> tuple[Rule, ...]:
    """Returns the rows of a text with three columns, two or more spaces apart."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.strip().splitlines() if line.strip()]
    for row in rows:
        parse(row[2])
    return tuple(Rule(*row) for row in rows)


def under(rules: Iterable[Rule], *, foreign: str = "", ours: str = "") -> tuple[Rule, ...]:
    """Returns the rules with prefixes put before their keys and paths."""
    return tuple(Rule(foreign + rule.foreign, ours + rule.ours, rule.dims) for rule in rules)


def shapes(
    rules: Iterable[Rule], sizes: Mapping[str, int], dtype: Any
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns path -> shape and dtype of all that a table can make, given the names' sizes.

    Args:
      sizes: name in the patterns -> size, and `L` for the stacked layers.
    """
    result = {}
    for rule in rules:
        own = tuple(sizes[name] for name in parse(rule.dims).ours)
        shape = (sizes["L"], *own) if rule.is_stacked else own
        result[rule.ours] = jax.ShapeDtypeStruct(shape, dtype)
    return result


def format_keys(many: Iterable[str], limit: int = 6) -> str:
    """Returns the first few names and how many more there are, for a message."""
    many = sorted(many)
    rest = f" and {len(many) - limit} more" if len(many) > limit else ""
    return ", ".join(many[:limit]) + rest


def group_keys(path: str) -> str:
    """Returns the part of the model that one of our paths belongs to, for people."""
    parts = path.split("/")
    return "/".join(parts[: 3 if parts[:2] == ["decoder", "layers"] else 1])


def any_match(patterns: Iterable[str], name: str) -> bool:
    """Returns whether a regular expression of `patterns` matches the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


@dataclasses.dataclass(frozen=True)
class TablePlan:
    """What an import would do, before a byte of a tensor is read.

    made      our path -> (rule, the foreign keys that make it)
    fresh     our paths that stay as initialised
    ignored   foreign keys that are left alone on purpose
    """

    made: dict[str, tuple[Rule, list[str]]]
    fresh: list[str]
    ignored: list[str]


def plan_import(
    rules: Iterable[Rule],
    foreign: Mapping[str, Any],
    ours: Mapping[str, jax.ShapeDtypeStruct],
    *,
    ignorable: Sequence[str] = (),
    fresh: Sequence[str] = (),
    source: str = "the checkpoint",
) -> TablePlan:
    """Returns the plan that reads every key of `foreign` and makes every path of `ours`.

    Args:
      foreign: key -> anything with a shape.
      ours: path -> shape and dtype; rows of other paths do not apply.
      ignorable: regular expressions of foreign keys that may be left unread.
      fresh: regular expressions of our paths that may stay as initialised.

    Raises:
      WeightsError: naming keys without a use, paths without a source, shapes that disagree.
    """
    made: dict[str, tuple[Rule, list[str]]] = {}
    absent: set[str] = set()
    for rule in rules:
        if rule.ours not in ours or rule.ours in made:
            continue
        keys = rule.keys(ours[rule.ours].shape)
        lacking = [key for key in keys if key not in foreign]
        if not lacking:
            made[rule.ours] = (rule, keys)
        elif not any_match(fresh, rule.ours):
            absent.update(lacking)
    left = [path for path in ours if path not in made]
    used = {key for _, keys in made.values() for key in keys}
    unread = [key for key in foreign if key not in used]
    unknown = [key for key in unread if not any_match(ignorable, key)]
    unmade = [path for path in left if not any_match(fresh, path)]
    if absent:
        hint = f"; it has unread keys: {format_keys(unknown, 3)}" if unknown else ""
        raise WeightsError(f"{source} lacks {format_keys(absent)}{hint}")
    if unmade:
        raise WeightsError(f"nothing in {source} makes our {format_keys(unmade)}")
    if unknown:
        raise WeightsError(
            f"{source} has keys that this model has no place for: {format_keys(unknown)}"
        )
    _check_shapes(made, foreign, ours, source)
    return TablePlan(made, left, unread)


def _check_shapes(made: Mapping, foreign: Mapping, ours: Mapping, source: str) -> None:
    wrong = []
    for path, (rule, keys) in made.items():
        wanted = rule.foreign_shape(ours[path].shape)
        for key in keys:
            shape = tuple(foreign[key].shape)
            if shape != wanted:
                wrong.append(f"{key} is {list(shape)}, our {path} needs {list(wanted)}")
    if wrong:
        raise WeightsError(f"shapes disagree in {source}: " + "; ".join(wrong[:3]) + _more(wrong))


def _more(wrong: Sequence[str]) -> str:
    return f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""


def import_tree(
    rules: Iterable[Rule],
    foreign: Mapping[str, Any],
    ours: Mapping[str, jax.ShapeDtypeStruct],
    *,
    ignorable: Sequence[str] = (),
    fresh: Sequence[str] = (),
    source: str = "the checkpoint",
    on_read: Callable[[str, int], None] = lambda key, size: None,
) -> dict[str, np.ndarray | jax.Array]:
    """Returns path -> array for every path of `ours` that the foreign checkpoint makes.

    Reads tensor by tensor straight into the final dtype: on the host, never more than the
    result and one foreign tensor. Where an entry of `ours` carries a sharding, its array is
    placed on the devices as soon as it is whole, so that the host holds one array at a time.

    Args: as for `plan_import`; on_read is called with each key and its bytes.

    Raises:
      WeightsError: as `plan_import`, and for a tensor that holds NaN or infinity.
    """
    plan = plan_import(rules, foreign, ours, ignorable=ignorable, fresh=fresh, source=source)
    result = {}
    for path, (rule, keys) in plan.made.items():

        def parts(rule=rule, keys=keys, path=path) -> Iterator[np.ndarray]:
            for key in keys:
                array = np.asarray(foreign[key])
                check_finite(key, array, source)
                on_read(key, array.nbytes)
                yield rule.to_ours(array, ours[path].shape)

        result[path] = _assemble(ours[path], parts(), is_stacked=rule.is_stacked)
    return result


def _assemble(
    struct: jax.ShapeDtypeStruct, parts: Iterable[np.ndarray], *, is_stacked: bool
) -> np.ndarray | jax.Array:
    """Returns the array of `struct` from its layers, on the devices where it has a sharding."""
    sharding = getattr(struct, "sharding", None)
    if sharding is None:
        whole = np.empty(struct.shape, struct.dtype)
        for layer, part in enumerate(parts):
            whole[layer if is_stacked else ...] = part
        return whole
    device_index = sharding.addressable_devices_indices_map(struct.shape)
    pieces: dict[tuple, tuple[tuple, np.ndarray]] = {}
    for index in device_index.values():
        ranges = [range(*cut.indices(n)) for cut, n in zip(index, struct.shape, strict=True)]
        pieces[_key(index)] = (index, np.empty([len(r) for r in ranges], struct.dtype))
    for layer, part in enumerate(parts):
        for index, piece in pieces.values():
            if not is_stacked:
                piece[...] = part[index]
                continue
            rows = range(*index[0].indices(struct.shape[0]))
            if layer in rows:
                piece[rows.index(layer)] = part[index[1:]]
    arrays = [jax.device_put(pieces[_key(i)][1], device) for device, i in device_index.items()]
    jax.block_until_ready(arrays)
    return jax.make_array_from_single_device_arrays(struct.shape, sharding, arrays)


def _key(index: tuple[slice, ...]) -> tuple:
    return tuple((cut.start, cut.stop) for cut in index)


def check_finite(key: str, array: np.ndarray, source: str) -> None:
    """Raises WeightsError if a floating-point array holds NaN or infinity."""
    if array.dtype == ml_dtypes.bfloat16:
        # The exponent is all ones exactly for NaN and infinity; far cheaper than a conversion.
        is_bad = bool(np.any((array.view(np.uint16) & 0x7F80) == 0x7F80))
    else:
        is_bad = array.dtype.kind == "f" and not np.isfinite(array).all()
    if is_bad:
        raise WeightsError(f"{key} of {source} holds NaN or infinity")


def export_tree(
    rules: Iterable[Rule],
    ours: Mapping[str, Any],
    *,
    dtype: Any = None,
    dropped: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Returns foreign key -> Tensor, made from our arrays when read; the reverse of import.

    Args:
      ours: path -> array (numpy or jax; anything with shape, dtype and indexing).
      dtype: what floating-point arrays become; None leaves them as they are.
      dropped: regular expressions of our paths that the foreign format may lose.

    Raises:
      WeightsError: naming paths that the format has no place for.
    """
    by_path: dict[str, Rule] = {}
    for rule in rules:
        by_path.setdefault(rule.ours, rule)
    homeless = [p for p in ours if p not in by_path and not any_match(dropped, p)]
    if homeless:
        raise WeightsError(f"the format has no place for {format_keys(homeless)}")
    result = {}
    for path, rule in by_path.items():
        if path not in ours:
            continue
        array = ours[path]
        for layer, key in enumerate(rule.keys(array.shape)):
            shape = rule.foreign_shape(array.shape)
            kind = np.dtype(array.dtype if dtype is None else dtype)
            result[key] = Tensor(shape, kind, _writer(rule, array, layer, kind), path)
    return result


def _writer(rule: Rule, array: Any, layer: int, dtype: np.dtype) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        own = np.asarray(array[layer] if rule.is_stacked else array)
        return np.ascontiguousarray(rule.to_foreign(own, array.shape).astype(dtype, copy=False))

    return load
