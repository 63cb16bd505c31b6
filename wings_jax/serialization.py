"""Config dataclasses as nested dicts and back, with the names that fields had before.

Checkpoints, adapters and the `config.json` of a run hold these dicts.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import types
import typing
from collections.abc import Mapping
from typing import Any

from wings_jax.errors import UserError

# Class -> former config key -> its name now. The former one works everywhere, with a warning.
RENAMED: Mapping[str, Mapping[str, str]] = {
    "Config": {"keep": "max_checkpoints"},
    "OptimizerConfig": {"kind": "name", "clip": "max_grad_norm"},
}
# The same for fields that only checkpoints hold: nobody types them, so nobody is warned.
RENAMED_FIELDS: Mapping[str, Mapping[str, str]] = {
    "RopeScaling": {"kind": "rope_type"},
    "Semantics": {"lone_weight": "ungated_when_alone"},
}


def to_dict(value: Any) -> Any:
    """Returns nested dataclasses as nested dicts, which JSON can hold; `from_dict` reads them."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}

    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    return value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {'a.b': value} of nested mappings; tuples become lists.

    >>> flatten({"a": {"b": 1, "c": (2, 3)}})
    {'a.b': 1, 'a.c': [2, 3]}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def from_dict(kind: Any, value: Any, key: str) -> Any:
    """Returns `value`, as JSON or a ConfigDict holds it, as the type `kind`.

    Dataclasses, mappings, tuples and optional values are built from the inside out.

    Raises:
      UserError: naming the key that is unknown, or whose value has another type.
    """
    if dataclasses.is_dataclass(kind):
        return _dataclass_from_dict(kind, value, key)

    # Optional values, then containers, then plain values.
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # X | None
        return None if value is None else from_dict(arguments[0], value, key)

    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise UserError(f"{key}: {value!r} is not a tuple")
        return tuple(from_dict(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(value))

    if origin is not None:  # Mapping[str, X]
        if not isinstance(value, Mapping):
            raise UserError(f"{key}: {value!r} is not a mapping")
        return {
            name: from_dict(arguments[1], item, f"{key}.{name}") for name, item in value.items()
        }

    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{key}: {value!r} is not of type {kind.__name__}")
    return value


def _dataclass_from_dict(kind: Any, value: Any, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise UserError(f"{key}: {value!r} is not a mapping")

    renamed = RENAMED_FIELDS.get(kind.__name__, {})
    value = {current_name(kind, renamed.get(name, name)): item for name, item in value.items()}

    # All keys are checked before any value is built.
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise UserError(f"{key}.{unknown[0]}: no such key; there are {', '.join(sorted(hints))}")

    fields = {name: from_dict(hints[name], item, f"{key}.{name}") for name, item in value.items()}
    return kind(**fields)


def current_name(kind: type, name: str) -> str:
    """Returns the name that a config dataclass has for a key now; warns if it was renamed."""
    renamed = RENAMED.get(kind.__name__, {})
    if name not in renamed:
        return name
    _warn_renamed(name, renamed[name])
    return renamed[name]


@functools.cache  # one line per key and process
def _warn_renamed(former: str, name: str) -> None:
    logging.warning("the config key %s is now called %s; the former name still works", former, name)
