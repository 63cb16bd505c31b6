"""The samples of several sources under one numbering, and their sizes, which packing needs."""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import tqdm

from wings_jax.data import examples, samples, sources
from wings_jax.errors import UserError

_CHUNK = 256

Bad = tuple[str, samples.BadSample]


class Mixture:
    """Samples numbered through all sources, in the order of the sources."""

    def __init__(self, parts: Sequence[sources.SampleSource], names: Sequence[str]):
        self._parts, self._names = tuple(parts), tuple(names)
        self.starts = np.cumsum([0] + [len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, number: int) -> samples.Sample:
        part, index = self._locate(number)
        return self._parts[part][index]

    def make(self, number: int, recipe: examples.Recipe) -> examples.Example | Bad:
        """Returns the example of a sample, or its id and what is wrong with it."""
        name = self._name(number)
        try:
            sample = self[number]
            name = sample.id
            return examples.make_example(sample, recipe)
        except samples.BadSample as reason:
            return name, reason

    def measure(self, number: int, recipe: examples.Recipe) -> tuple[int, int] | Bad:
        """Returns the slots and images of a sample, or its id and what is wrong with its text."""
        name = self._name(number)
        try:
            sample = self[number]
            name = sample.id
            slots = examples.truncate(examples.encode_sample(sample, recipe), recipe)
            return len(slots.tokens), slots.images
        except samples.BadSample as reason:
            return name, reason

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Returns what changes when the text of a source does."""
        return tuple(part.fingerprint for part in self._parts)

    def _locate(self, number: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        return part, int(number - self.starts[part])

    def _name(self, number: int) -> str:
        part, index = self._locate(number)
        return f"{self._names[part]}#{index}"


def measure_mixture(
    mixture: Mixture, recipe: examples.Recipe, *, workers: int = 0, cache: str | None = None
) -> tuple[np.ndarray, samples.Tally]:
    """Returns i32[n,2], slots and images of every sample (0, 0 where it is bad), and a tally.

    Args:
      workers: processes that share the work; 0 for this one alone.
      cache: a folder; what was measured there for the same files, tokenizer and limits is read
        back instead of being measured again.
    """
    kept = pathlib.Path(cache) / f"sizes-{_digest(mixture, recipe)}.npz" if cache else None
    if kept is not None and kept.exists():
        with np.load(kept) as found:
            return found["sizes"], samples.Tally.from_dict(json.loads(str(found["tally"])))
    sizes, tally = np.zeros((len(mixture), 2), np.int32), samples.Tally()
    with tqdm.tqdm(total=len(mixture), desc="measuring samples", disable=None) as bar:
        for at, measured in _chunks(mixture, recipe, workers):
            is_bad = [isinstance(size[1], samples.BadSample) for size in measured]
            bad = list(itertools.compress(measured, is_bad))
            for number, size in enumerate(measured):
                sizes[at + number] = (0, 0) if is_bad[number] else size
            tally.add(len(measured), bad)
            bar.update(len(measured))
    if kept is not None:
        _save(kept, sizes, tally)
    return sizes, tally


def _chunks(
    mixture: Mixture, recipe: examples.Recipe, workers: int
) -> Iterator[tuple[int, list[tuple[int, int] | Bad]]]:
    """Yields the number of a first sample, and the sizes from there on."""
    starts = range(0, len(mixture), _CHUNK)
    if not workers:
        for at in starts:
            yield at, _measure_chunk(mixture, recipe, at)
        return
    with concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),  # a fork would copy JAX's threads
        initializer=_receive,
        initargs=(mixture, recipe),
    ) as pool:
        yield from zip(starts, pool.map(_measure_received, starts), strict=True)


def _measure_chunk(
    mixture: Mixture, recipe: examples.Recipe, at: int
) -> list[tuple[int, int] | Bad]:
    return [mixture.measure(n, recipe) for n in range(at, min(at + _CHUNK, len(mixture)))]


_received: list = []  # in a worker process: the mixture and the recipe, sent once


def _receive(*parts) -> None:
    _received[:] = parts


def _measure_received(at: int) -> list[tuple[int, int] | Bad]:
    return _measure_chunk(*_received, at)


def _digest(mixture: Mixture, recipe: examples.Recipe) -> str:
    """Returns a name for everything that the sizes depend on."""
    limits = (recipe.length, recipe.image_slots, recipe.images_per_row)
    parts = (mixture.fingerprints, recipe.tokenizer.__getstate__(), recipe.template, limits)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _save(path: pathlib.Path, sizes: np.ndarray, tally: samples.Tally) -> None:
    """Writes the file whole or not at all: several hosts may share the folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
            np.savez(file, sizes=sizes, tally=json.dumps(tally.as_dict()))
        os.replace(file.name, path)
    except OSError as error:
        raise UserError(f"cache folder {path.parent}: {error.strerror}") from error
