"""Weight rules: reversible rows that relate Hugging Face keys to parameter paths.

A table has one row per tensor, and each row is applied in both directions:

    model.layers.{l}.self_attn.q_proj.weight    layers/attn/q/kernel    (N H) D <-> D N H

The Hugging Face tensor of layer `l` has shape [N*H, D], the parameter has shape [L, D, N, H]
with the layers stacked in front. An import splits and transposes, an export does the reverse.
No size is written down: the parameter's shape gives a size to every name on the right, and these
sizes give the shape of the Hugging Face tensor. `transfer` applies whole tables.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from wings_jax.weights import copies
from wings_jax.weights.tensors import WeightsError

LAYER = "{l}"


@dataclasses.dataclass(frozen=True)
class Pattern:
    """The two sides of `(N H) D <-> D N H`.

    hf_groups     dimensions of the Hugging Face tensor, each a product of names: ((N, H), (D,))
    names         dimensions of the parameter without its layers: (D, N, H)
    permutation   transposes the split Hugging Face dimensions (N, H, D) into `names`: (2, 0, 1)
    """

    hf_groups: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]
    permutation: tuple[int, ...]


@functools.cache
def parse(dims: str) -> Pattern:
    """Returns the pattern that `dims` describes.

    >>> parse("(N H) D <-> D N H")
    Pattern(hf_groups=(('N', 'H'), ('D',)), names=('D', 'N', 'H'), permutation=(2, 0, 1))

    Raises:
      ValueError: the two sides do not hold the same names, each once.
    """
    left, arrow, right = dims.partition("<->")
    # "(N H) D" -> (("N", "H"), ("D",)).
    groups = tuple(
        tuple((group or name).split()) for group, name in re.findall(r"\(([^()]*)\)|(\S+)", left)
    )
    hf_names = [name for group in groups for name in group]
    names = tuple(right.split())

    if not arrow or sorted(hf_names) != sorted(names) or len(set(names)) != len(names):
        raise ValueError(f"{dims!r}: both sides of <-> must hold the same names, each once")

    return Pattern(groups, names, tuple(hf_names.index(name) for name in names))


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a table.

    hf_key   key of the Hugging Face tensor; `{l}` stands for the layer
    path     path of the parameter; where `hf_key` has a layer, its first dimension is L
    dims     dimensions of the Hugging Face tensor <-> those of the parameter (`parse`)
    """

    hf_key: str
    path: str
    dims: str

    @property
    def is_stacked(self) -> bool:
        """Whether the parameter stacks one Hugging Face tensor per layer."""
        return LAYER in self.hf_key

    def hf_keys(self, shape: Sequence[int]) -> list[str]:
        """Returns the Hugging Face keys of a parameter of this shape, in the order of layers.

        >>> Rule("h.{l}.norm.weight", "layers/norm/scale", "D <-> D").hf_keys((2, 8))
        ['h.0.norm.weight', 'h.1.norm.weight']
        """
        if not self.is_stacked:
            return [self.hf_key]
        return [self.hf_key.replace(LAYER, str(layer)) for layer in range(shape[0])]

    def hf_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of one Hugging Face tensor, given the parameter's whole shape.

        >>> Rule("h.{l}.q.weight", "layers/q/kernel", "(N H) D <-> D N H").hf_shape((2, 6, 4, 3))
        (12, 6)
        """
        pattern, sizes = self._bind(shape)
        return tuple(math.prod(sizes[name] for name in group) for group in pattern.hf_groups)

    def from_hf(self, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Returns a view of one Hugging Face tensor with the parameter's order of dimensions.

        >>> rule = Rule("embed.weight", "kernel", "(N H) D <-> D N H")
        >>> rule.from_hf(np.arange(8).reshape(4, 2), (2, 2, 2)).tolist()
        [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]

        Args:
          shape: of the whole parameter, with the layers' dimension; the result has none.
        """
        # [N*H, D] -> [N, H, D] -> [D, N, H]
        pattern, sizes = self._bind(shape)
        split = array.reshape([sizes[name] for group in pattern.hf_groups for name in group])
        return split.transpose(pattern.permutation)

    def to_hf(self, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Returns one contiguous Hugging Face tensor; the reverse of `from_hf`.

        >>> rule = Rule("embed.weight", "kernel", "(N H) D <-> D N H")
        >>> rule.to_hf(np.array([[[0, 2], [4, 6]], [[1, 3], [5, 7]]]), (2, 2, 2)).tolist()
        [[0, 1], [2, 3], [4, 5], [6, 7]]
        """
        # [D, N, H] -> [N, H, D] -> [N*H, D]
        pattern, _ = self._bind(shape)
        view = array.transpose(np.argsort(pattern.permutation))

        # A contiguous copy, whose dimensions a reshape can join.
        if not view.flags.c_contiguous:
            contiguous = np.empty(view.shape, view.dtype)
            copies.copy_into(contiguous, view)
            view = contiguous
        return view.reshape(self.hf_shape(shape))

    def _bind(self, shape: Sequence[int]) -> tuple[Pattern, dict[str, int]]:
        """Returns the pattern and the size of each name for a parameter of this shape."""
        pattern = parse(self.dims)
        layer_shape = tuple(shape)[1:] if self.is_stacked else tuple(shape)
        if len(layer_shape) != len(pattern.names):
            raise WeightsError(
                f"{self.path} has shape {list(shape)}, which does not fit its rule {self.dims!r}"
            )
        return pattern, dict(zip(pattern.names, layer_shape, strict=True))


def table(text: str) -> tuple[Rule, ...]:
    """Returns the rules of a text with three columns, two or more spaces apart.

    >>> table("norm.weight    norm/scale    D <-> D")
    (Rule(hf_key='norm.weight', path='norm/scale', dims='D <-> D'),)
    """
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.strip().splitlines() if line.strip()]
    for row in rows:
        parse(row[2])
    return tuple(Rule(*row) for row in rows)


def with_prefix(rules: Iterable[Rule], *, hf_key: str = "", path: str = "") -> tuple[Rule, ...]:
    """Returns the rules with prefixes before their keys and paths.

    >>> with_prefix(table("norm.weight    norm/scale    D <-> D"), path="decoder/")[0].path
    'decoder/norm/scale'
    """
    return tuple(Rule(hf_key + rule.hf_key, path + rule.path, rule.dims) for rule in rules)


def group_name(path: str) -> str:
    """Returns the part of the model that a parameter belongs to, for messages.

    >>> group_name("decoder/layers/attn/q/kernel"), group_name("vision/position")
    ('decoder/layers/attn', 'vision')
    """
    parts = path.split("/")
    return "/".join(parts[: 3 if parts[:2] == ["decoder", "layers"] else 1])


def any_match(patterns: Iterable[str], name: str) -> bool:
    """Returns whether a regular expression of `patterns` matches the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)
