"""Batches by step: `Loader[step]` is a pure function of (seed, step), on any number of hosts.

    sources -> rows (one sample each, or packed) -> shuffled for each epoch -> mixed -> batches

A bad sample is never replaced: its row stays padding, or it is left out of its packed row. It is
counted by cause and logged; above `max_bad_share` the run stops.
"""

from __future__ import annotations

import itertools
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from wings_jax.data import examples, packing, samples, settings, sources
from wings_jax.data import mixture as mixing
from wings_jax.errors import UserError
from wings_jax.model import layout

_MIN_SEEN = 1000  # the share of bad samples is of at least so many, or of all samples
_MAX_LOGGED = 100  # bad samples after these are counted, but not logged


class Steps:
    """This host's part of every batch, by step, with its bad samples. Pure, and can be pickled."""

    def __init__(
        self,
        mixture: mixing.Mixture,
        recipe: examples.Recipe,
        rows: packing.PackedRows,
        order: grain.MapDataset,
        *,
        batch: int,
        part: slice,
    ):
        """Stores what the batches are a function of.

        Args:
          order: endless sequence of row numbers.
          batch: rows of a global batch.
          part: the rows of a batch that are this host's.
        """
        self._mixture, self._recipe, self._rows, self._order = mixture, recipe, rows, order
        self._batch, self._part = batch, part

    def __len__(self) -> int:
        return sys.maxsize // self._batch

    def sample_ids(self, step: int) -> list[str]:
        """Returns the ids of the samples planned for this host's part of a batch, row by row."""
        return [
            self._mixture.sample_id(int(number))
            for index in self._row_range(step)
            for number in self._rows[self._order[index]]
        ]

    def _row_range(self, step: int) -> range:
        # Steps are consecutive blocks of B rows in one endless order.
        first = step * self._batch
        return range(first + self._part.start, first + self._part.stop)

    def __getitem__(self, step: int) -> tuple[layout.Batch, int, list[mixing.Bad]]:
        """Returns the batch, the number of samples planned for it, and the bad ones of them."""
        seen = 0
        bad_samples: list[mixing.Bad] = []
        rows: list[list[examples.Example]] = []

        for index in self._row_range(step):
            # A row of packed data holds several samples.
            row: list[examples.Example] = []
            for number in self._rows[self._order[index]]:
                example = self._mixture.make_example(int(number), self._recipe)
                # A bad sample takes no slots; what it would have filled stays padding.
                if isinstance(example, examples.Example):
                    row.append(example)
                else:
                    bad_samples.append(example)
                seen += 1
            rows.append(row)

        return assemble(rows, self._recipe), seen, bad_samples


def assemble(rows: Sequence[Sequence[examples.Example]], recipe: examples.Recipe) -> layout.Batch:
    """Returns the batch whose row r holds the examples rows[r], one after another."""
    # Slots: i32[B,T]. Pixels: u8[B,I,height,width,3], of which rows with fewer images have blank
    # ones, which no slot refers to.
    shape = (len(rows), recipe.length)
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    modality = np.full(shape, layout.PADDING, np.int32)
    targets = np.full(shape, layout.IGNORE, np.int32)
    square = (recipe.vision.image_size, recipe.vision.image_size, 3)
    images = np.zeros((len(rows), recipe.images_per_row, *square), np.uint8)

    for number, row in enumerate(rows):
        # Examples follow each other without a gap; the rest of the row stays padding.
        start, image_count = 0, 0
        # Segments count from 1; padding is 0.
        for segment, example in enumerate(row, start=1):
            span = slice(start, start + len(example.tokens))
            tokens[number, span] = example.tokens
            modality[number, span] = example.modality
            targets[number, span] = example.targets
            segments[number, span] = segment
            start = span.stop

            for image in example.images:
                images[number, image_count] = image
                image_count += 1

    prompt_length = recipe.prompt_length
    slots = layout.make_layout(tokens, modality, segments, prompt_length=prompt_length)
    return layout.Batch(slots, targets, images)


class Loader:
    """Batches by step. `loader[step]` is pure; `iterate` builds batches ahead of their use.

    The global batch of a step is the same on any number of hosts; host h of n gets its rows
    h*B/n to (h+1)*B/n - 1.

    Attributes:
      steps_per_epoch: steps in which every row is used about once.
    """

    def __init__(
        self,
        data: settings.DataConfig,
        recipe: examples.Recipe,
        *,
        rows: int,
        seed: int = 0,
        shuffle: bool = True,
        cache: str | os.PathLike | None = None,
        host: int = 0,
        hosts: int = 1,
    ):
        """Opens the sources and, for packing, plans the rows.

        Args:
          data: the sources and how they are read.
          recipe: how samples become examples, from `examples.make_recipe`.
          rows: rows of a global batch (B).
          seed: the order of the rows is a function of it.
          shuffle: whether the rows have another order in each epoch.
          cache: directory where packing stores the measured sizes; None to measure each time.

        Raises:
          UserError: a file is missing or malformed, the settings do not fit together, or too many
            samples are bad.
        """
        _check_settings(data, rows, seed, host, hosts)
        self._data, self._recipe, self._seed, self._shuffle = data, recipe, seed, shuffle
        self._tally, self._left_out = samples.Tally(), samples.Tally()
        self._logged: set[str] = set()

        source_settings = list(data.sources.values())
        parts = [
            sources.open_source(source.path, images=source.images or None, split=source.split)
            for source in source_settings
        ]
        mixture = mixing.Mixture(parts, [source.path for source in source_settings])
        self._samples = len(mixture)

        pools = self._plan_pools(mixture, cache)
        packed = packing.concatenate(pools)
        order = self._order([len(pool) for pool in pools])
        self.steps_per_epoch = max(1, len(packed) // rows)

        # This host builds a contiguous part of every global batch.
        size = rows // hosts
        part = slice(host * size, (host + 1) * size)
        self._steps = Steps(mixture, recipe, packed, order, batch=rows, part=part)

    def __getitem__(self, step: int) -> layout.Batch:
        """Returns this host's part of the batch of `step`."""
        return self._account(*self._steps[step])

    def iterate(self, start: int = 0) -> Iterator[layout.Batch]:
        """Yields the batches of steps start, start+1, ..., built ahead of their use."""
        threads, workers = self._data.threads, self._data.workers
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        dataset = grain.MapDataset.source(self._steps)[start:].to_iter_dataset(options)
        if workers:
            if not flags.FLAGS.is_parsed():  # grain hands absl's flags to its processes
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))

        iterator = iter(dataset)
        try:
            for batch, seen, bad_samples in iterator:
                yield self._account(batch, seen, bad_samples)
        finally:
            iterator.close()

    def sample_ids(self, step: int) -> list[str]:
        """Returns the ids of the samples in this host's part of the batch of `step`."""
        return self._steps.sample_ids(step)

    @property
    def stats(self) -> dict[str, Any]:
        """What was read so far: samples seen, bad ones by cause with the first ids.

        With packing, `left_out` has the same for the samples that are not in the plan.
        """
        return {
            "samples": self._samples,
            **self._tally.as_dict(),
            "left_out": self._left_out.as_dict(),
        }

    def _account(
        self, batch: layout.Batch, seen: int, bad_samples: Sequence[mixing.Bad]
    ) -> layout.Batch:
        # The same sample can come up in every epoch: it is counted each time and logged once.
        self._tally.add(seen, bad_samples)
        for identity, reason in bad_samples:
            if identity not in self._logged and len(self._logged) < _MAX_LOGGED:
                self._logged.add(identity)
                logging.warning("sample %s is skipped: %s", identity, reason)

        self._stop_if_bad(self._tally)
        return batch

    def _stop_if_bad(self, tally: samples.Tally) -> None:
        # A first bad sample among few must not stop a run over many.
        counted = max(tally.seen, min(_MIN_SEEN, self._samples))
        if tally.bad > self._data.max_bad_share * counted:
            share = f"more than max_bad_share = {self._data.max_bad_share:g}"
            command = _check_command(self._data)
            raise UserError(f"{tally.summary()}; {share}; to list them: {command}")

    def _plan_pools(
        self, mixture: mixing.Mixture, cache: str | os.PathLike | None
    ) -> list[packing.PackedRows]:
        """Returns the rows of each pool: of every source if they have weights, else of all."""
        is_weighted = any(source.weight for source in self._data.sources.values())
        boundaries = mixture.starts if is_weighted else mixture.starts[[0, -1]]
        spans = list(itertools.pairwise(boundaries.tolist()))

        # Without packing every sample has a row of its own.
        if not self._data.packing:
            return [packing.one_each(first, last - first) for first, last in spans]

        sizes, self._left_out = mixing.measure_mixture(
            mixture, self._recipe, workers=self._data.workers, cache=cache
        )
        self._stop_if_bad(self._left_out)
        if self._left_out.bad:
            logging.warning("left out of the rows: %s", self._left_out.summary(len(samples.CAUSES)))

        # One generator for all pools, so that no two are permuted alike.
        generator = np.random.default_rng(self._seed)
        return [self._pack(sizes, first, last, generator) for first, last in spans]

    def _pack(
        self, sizes: np.ndarray, first: int, last: int, generator: np.random.Generator
    ) -> packing.PackedRows:
        """Returns rows of the good samples first..last-1, whose slots and images are `sizes`."""
        # A bad sample has no slots; it was counted when it was measured.
        members = first + np.flatnonzero(sizes[first:last, 0])
        if not len(members):
            raise UserError(f"no sample of a source can be used: {self._left_out.summary()}")

        if self._shuffle:
            members = generator.permutation(members)

        slots, images = sizes[members].T
        length, images_per_row = self._recipe.length, self._recipe.images_per_row
        return packing.first_fit(
            members, slots, images, length=length, images_per_row=images_per_row
        )

    def _order(self, pools: Sequence[int]) -> grain.MapDataset:
        """Returns the endless sequence of row numbers: the pools repeated and mixed by weight."""
        # Each pool has its own seed, or pools of equal size would be shuffled alike.
        endless, first = [], 0
        seeds = np.random.SeedSequence(self._seed).generate_state(len(pools))

        for size, seed in zip(pools, seeds, strict=True):
            rows = grain.MapDataset.range(first, first + size)
            rows = rows.seed(int(seed)).shuffle() if self._shuffle else rows
            endless.append(rows.repeat())
            first += size

        # One pool is one epoch after another; several are drawn from in proportion to the weights.
        weights = [source.weight for source in self._data.sources.values()]
        return endless[0] if len(endless) == 1 else grain.MapDataset.mix(endless, weights)


def _check_command(data: settings.DataConfig) -> str:
    """Returns the commands that list the bad samples of the sources."""
    commands = []
    for source in data.sources.values():
        images = ["--images", source.images] if source.images else []
        commands.append(shlex.join(["wings", "check", source.path, *images]))
    return "; ".join(commands)


def _check_settings(data: settings.DataConfig, rows: int, seed: int, host: int, hosts: int) -> None:
    """Raises UserError where the settings do not fit together."""
    weights = [source.weight for source in data.sources.values()]
    if not weights:
        raise UserError("data: no sources")
    if any(weight < 0 for weight in weights):
        raise UserError(f"data: weights must be positive, not {weights}")
    if any(weights) and not all(weights):
        raise UserError(f"data: either every source has a weight or none has, not {weights}")

    if rows < 1 or not 0 <= host < hosts or rows % hosts:
        raise UserError(f"data: {rows} rows do not split over {hosts} hosts (host {host})")
    if data.threads < 1 or data.workers < 0 or not 0 <= seed < 2**32:
        raise UserError(
            "data: threads must be at least 1, workers and seed must not be negative, not "
            f"{data.threads}, {data.workers} and {seed}"
        )
