"""Typed access to the entries of a JSON file that somebody else wrote, such as `config.json`.

Every accessor raises UserError that names the file, the entry and its value; `null` counts as a
missing entry, as transformers writes it for defaults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from wings_jax.errors import UserError

MAX_SIZE = 2**31 - 1


class ConfigFields:
    """The entries of one JSON object.

    >>> fields = ConfigFields({"hidden_size": 64, "head_dim": None}, "config.json")
    >>> fields.size("hidden_size"), fields.size("head_dim", 16)
    (64, 16)
    """

    def __init__(self, entries: Mapping[str, Any], file: str):
        if not isinstance(entries, Mapping):
            raise UserError(f"{file}: {_shown(entries)} is not a JSON object")
        self._entries = entries
        self.file = file

    def has(self, name: str) -> bool:
        """Returns whether there is a value other than null."""
        return self._entries.get(name) is not None

    def value(self, name: str, default: Any = None) -> Any:
        """Returns the value as it is, or the default if it is missing or null.

        Raises:
          UserError: it is missing and there is no default.
        """
        if self.has(name):
            return self._entries[name]
        if default is None:
            raise UserError(f"{self.file}: {name} is missing")
        return default

    def size(self, name: str, default: int | None = None, *, maximum: int = MAX_SIZE) -> int:
        """Returns a positive integer."""
        value = self.value(name, default)
        # In Python, true and false are integers too.
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= maximum:
            raise self.error(name, f"a whole number from 1 to {maximum}")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """Returns an integer of any sign, at most 2^31 - 1 in size."""
        value = self.value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > MAX_SIZE:
            raise self.error(name, "a whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Returns a finite number above 0."""
        value = self.value(name, default)
        if not _is_number(value) or not value > 0:
            raise self.error(name, "a number above 0")
        return float(value)

    def numbers(self, name: str, count: int, default: Sequence[float]) -> tuple[float, ...]:
        """Returns a tuple of finite numbers."""
        value = self.value(name, default)
        is_list = isinstance(value, (list, tuple)) and len(value) == count
        if not is_list or not all(_is_number(item) for item in value):
            raise self.error(name, f"a list of {count} numbers")
        return tuple(float(item) for item in value)

    def flag(self, name: str, default: bool = False) -> bool:
        """Returns true or false."""
        value = self.value(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """Returns a string."""
        value = self.value(name, default)
        if not isinstance(value, str):
            raise self.error(name, "a string")
        return value

    def object(self, name: str) -> ConfigFields:
        """Returns the entries of a nested object; it has none if it is missing."""
        return ConfigFields(self.value(name, {}), f"{self.file}: {name}")

    def refuse(self, name: str, allowed: Sequence[Any]) -> None:
        """Raises UserError if there is a value other than the allowed ones."""
        value = self._entries.get(name)
        # Equal, not identical: 1 and 1.0 are the same in JSON.
        if value is not None and not any(value == item for item in allowed):
            choices = " or ".join(repr(item) for item in allowed)
            raise UserError(f"{self.file}: {name} {_shown(value)} is not supported, only {choices}")

    def error(self, name: str, expected: str) -> UserError:
        """Returns the error of a value that is not what was expected."""
        return UserError(f"{self.file}: {name} {_shown(self._entries.get(name))} is not {expected}")


def _is_number(value: Any) -> bool:
    """Returns whether a JSON value is a number that float32 can hold."""
    # JSON's true and false are not numbers, although Python counts them as such.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and abs(value) < 1e38


def _shown(value: Any) -> str:
    """Returns a value for a message: in one line, in ASCII, shortened."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
