"""The samples of several sources under one numbering, and their sizes, which plans of rows need."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from wings_jax import files
from wings_jax.data import examples, parallel, samples, sources
from wings_jax.errors import UserError

Bad = tuple[str, samples.BadSample]  # id of a sample, and why it is bad


class Mixture:
    """Samples numbered through all sources, in the order of the sources.

    Args:
      parts: the sources.
      names: what each source is called in messages.
    """

    def __init__(self, parts: Sequence[sources.SampleSource], names: Sequence[str]):
        self._parts, self._names = tuple(parts), tuple(names)
        self.starts = np.cumsum([0] + [len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, number: int) -> samples.Sample:
        part, index = self._locate(number)
        return self._parts[part][index]

    def sample_id(self, number: int) -> str:
        """Returns the id of a sample, or source and index if it cannot be read."""
        try:
            return self[number].id
        except samples.BadSample as reason:
            return reason.sample_id or self._default_id(number)

    def make_example(self, number: int, recipe: examples.Recipe) -> examples.Example | Bad:
        """Returns the example of a sample, or its id and the reason why it is bad."""
        # A record that cannot be read has no id of its own.
        identity = self._default_id(number)
        try:
            sample = self[number]
            identity = sample.id
            return examples.make_example(sample, recipe)
        except samples.BadSample as reason:
            return reason.sample_id or identity, reason

    def measure(self, number: int, recipe: examples.Recipe) -> tuple[int, int] | Bad:
        """Returns the slots and images of a sample, or its id and the reason why it is bad.

        Its images are not opened.
        """
        identity = self._default_id(number)

        try:
            sample = self[number]
            identity = sample.id
            slots = examples.truncate(examples.encode_sample(sample, recipe), recipe)
            return len(slots.tokens), slots.images
        except samples.BadSample as reason:
            return reason.sample_id or identity, reason

    def count_images(self, number: int) -> tuple[int, int]:
        """Returns (1, images of a sample); a record that cannot be read counts as one with images.

        It is found when its row is built, as without counting.
        """
        try:
            return 1, len(self[number].images)
        except samples.BadSample:
            return 1, 1

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """A string for each source that changes when its text does."""
        return tuple(part.fingerprint for part in self._parts)

    def _locate(self, number: int) -> tuple[int, int]:
        # The last source that begins at or before this number.
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        return part, int(number - self.starts[part])

    def _default_id(self, number: int) -> str:
        part, index = self._locate(number)
        return f"{self._names[part]}#{index}"


def measure_mixture(
    mixture: Mixture,
    recipe: examples.Recipe | None,
    *,
    workers: int = 0,
    cache: str | os.PathLike | None = None,
) -> tuple[np.ndarray, samples.Tally]:
    """Returns i32[n,2], slots and images of every sample (0, 0 if it is bad), and a tally.

    Args:
      mixture: the samples.
      recipe: how they become examples; None to count their images only, which takes no tokenizer:
        then every sample has 1 slot, and none is found to be bad.
      workers: processes that share the work; 0 for this one alone.
      cache: a directory; sizes stored there for the same files, tokenizer and limits are read
        instead of being measured again.
    """
    # The name of the file stands for everything that the sizes depend on.
    stored = pathlib.Path(cache) / f"sizes-{_digest(mixture, recipe)}.npz" if cache else None
    if stored is not None and stored.exists():
        return _read_sizes(stored)

    # Rows of bad samples stay 0, 0.
    sizes, tally = np.zeros((len(mixture), 2), np.int32), samples.Tally()
    chunks = parallel.map_samples(
        _measure, (mixture, recipe), len(mixture), workers=workers, title="measuring samples"
    )
    for first, measured in chunks:
        bad_samples = []
        for number, size in enumerate(measured, start=first):
            if isinstance(size[1], samples.BadSample):
                bad_samples.append(size)
            else:
                sizes[number] = size
        tally.add(len(measured), bad_samples)

    if stored is not None:
        _write_sizes(stored, sizes, tally)
    return sizes, tally


def _measure(shared: tuple[Mixture, examples.Recipe | None], number: int) -> tuple[int, int] | Bad:
    mixture, recipe = shared
    return mixture.measure(number, recipe) if recipe else mixture.count_images(number)


def _digest(mixture: Mixture, recipe: examples.Recipe | None) -> str:
    """Returns a name for everything that the sizes depend on."""
    if recipe is None:
        counted = repr(("images", mixture.fingerprints))
        return hashlib.sha256(counted.encode()).hexdigest()[:24]

    limits = (recipe.length, recipe.vision.num_patches, recipe.images_per_row)
    parts = (mixture.fingerprints, recipe.tokenizer.__getstate__(), recipe.template, limits)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _read_sizes(path: pathlib.Path) -> tuple[np.ndarray, samples.Tally]:
    try:
        with np.load(path) as stored:
            return stored["sizes"], samples.Tally.from_dict(json.loads(str(stored["tally"])))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"data.cache: {path} cannot be read ({error}); remove it") from error


def _write_sizes(path: pathlib.Path, sizes: np.ndarray, tally: samples.Tally) -> None:
    # A file, not its path: np.savez would add a suffix to the path.
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, sizes=sizes, tally=json.dumps(tally.as_dict()))
