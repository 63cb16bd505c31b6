"""Batches by step: `Loader[step]` is a pure function of (seed, step), on any number of hosts.

    sources -> rows and their order (`row_plan`) -> examples -> batches

A bad sample is never replaced: its row stays padding, or it is left out of its packed row. It is
counted by cause and logged; above `max_bad_share` the run stops.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from wings_jax.data import examples, parallel, row_plan, samples, settings, sources
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
        plan: row_plan.RowPlan,
        *,
        part: slice,
    ):
        """Stores what the batches are a function of.

        Args:
          mixture: the samples.
          recipe: how they become examples.
          plan: which of them make up each row and batch.
          part: the rows of a batch that are this host's.
        """
        self._mixture, self._recipe, self._plan, self._part = mixture, recipe, plan, part

    def __len__(self) -> int:
        return len(self._plan)

    def sample_ids(self, step: int) -> list[str]:
        """Returns the ids of the samples planned for this host's part of a batch, row by row."""
        rows, _ = self._plan.rows(step, self._part)
        return [self._mixture.sample_id(int(number)) for row in rows for number in row]

    def __getitem__(self, step: int) -> tuple[layout.Batch, int, list[mixing.Bad]]:
        """Returns the batch, the number of samples planned for it, and the bad ones of them."""
        planned, form = self._plan.rows(step, self._part)
        seen = 0
        bad_samples: list[mixing.Bad] = []
        rows: list[list[examples.Example]] = []

        for numbers in planned:
            # A row of packed data holds several samples.
            row: list[examples.Example] = []
            for number in numbers:
                example = self._mixture.make_example(int(number), self._recipe)
                # A bad sample takes no slots; what it would have filled stays padding.
                if isinstance(example, examples.Example):
                    row.append(example)
                else:
                    bad_samples.append(example)
                seen += 1
            rows.append(row)

        recipe = dataclasses.replace(
            self._recipe, length=form.length, images_per_row=form.images_per_row
        )
        return assemble(rows, recipe), seen, bad_samples


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
        """Opens the sources and plans the rows, for which some settings measure all samples.

        Args:
          data: the sources, how they are read, and which samples make up a row.
          recipe: how samples become examples, from `examples.make_recipe`.
          rows: rows of a global batch (B).
          seed: the order of the rows is a function of it.
          shuffle: whether the rows have another order in each epoch.
          cache: directory for the measured sizes of samples; None to measure each time.

        Raises:
          UserError: a file is missing or malformed, the settings do not fit together, or too many
            samples are bad.
        """
        _check_settings(data, rows, seed, host, hosts)
        self._data, self._recipe = data, recipe
        self._tally, self._left_out = samples.Tally(), samples.Tally()
        self._logged: set[str] = set()

        source_settings = list(data.sources.values())
        parts = [
            sources.open_source(source.path, images=source.images or None, split=source.split)
            for source in source_settings
        ]
        mixture = mixing.Mixture(parts, [source.path for source in source_settings])
        self._samples = len(mixture)

        sizes = self._measure(mixture, cache)
        pools = row_plan.plan_pools(data, mixture.starts, sizes, seed=seed, shuffle=shuffle)
        plan = row_plan.RowPlan(pools, batch=rows, seed=seed, shuffle=shuffle)
        self.steps_per_epoch = max(1, plan.row_count // rows)

        # This host builds a contiguous part of every global batch.
        size = rows // hosts
        part = slice(host * size, (host + 1) * size)
        self._steps = Steps(mixture, recipe, plan, part=part)

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

    def _measure(
        self, mixture: mixing.Mixture, cache: str | os.PathLike | None
    ) -> np.ndarray | None:
        """Returns i32[n,2], slots and images of every sample; None if no row depends on them."""
        has_lengths = row_plan.needs_lengths(self._data)
        if not has_lengths and not row_plan.needs_image_counts(self._data):
            return None

        # All cores where there is much to read: nothing else happens meanwhile.
        workers = self._data.workers or parallel.default_workers(len(mixture))
        sizes, self._left_out = mixing.measure_mixture(
            mixture, self._recipe if has_lengths else None, workers=workers, cache=cache
        )
        self._stop_if_bad(self._left_out)
        if self._left_out.bad:
            logging.warning("left out of the rows: %s", self._left_out.summary(len(samples.CAUSES)))
        if not sizes[:, 0].any():
            raise UserError(f"no sample of a source can be used: {self._left_out.summary()}")
        return sizes


def _check_command(data: settings.DataConfig) -> str:
    """Returns the commands that list the bad samples of the sources."""
    commands = []
    for source in data.sources.values():
        images = ["--images", source.images] if source.images else []
        commands.append(shlex.join(["wings", "check", source.path, *images]))
    return "; ".join(commands)


def _check_settings(data: settings.DataConfig, rows: int, seed: int, host: int, hosts: int) -> None:
    """Raises UserError where the settings do not fit together."""
    row_plan.check_settings(data)
    if rows < 1 or not 0 <= host < hosts or rows % hosts:
        raise UserError(f"data: {rows} rows do not split over {hosts} hosts (host {host})")
    if data.threads < 1 or data.workers < 0 or not 0 <= seed < 2**32:
        raise UserError(
            "data: threads must be at least 1, workers and seed must not be negative, not "
            f"{data.threads}, {data.workers} and {seed}"
        )
