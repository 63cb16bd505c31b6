"""Batches by step: `Loader[step]` is a pure function of (seed, step), on any number of hosts.

    sources -> rows (one sample each, or packed) -> shuffled anew each epoch -> mixed -> batches

A sample that is bad is never replaced: its row stays padding, or it is absent from its packed
row. It is counted by cause and logged; past `max_bad_share` the run stops.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from wings_jax.data import conversation, examples, packing, samples, sources, tokenization
from wings_jax.data import mixture as mixing
from wings_jax.errors import UserError
from wings_jax.model import layout

_LEAST_SEEN = 1000  # the share of bad samples is taken of at least so many (or of all there are)
_MOST_LOGGED = 100  # then they are only counted


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """One data file.

    path    .json, .jsonl, or a tensorflow-datasets folder
    images  folder of the image paths; None for the file's own
    weight  share of the rows that come from here; None (for all sources) to take every sample
            of all sources once per epoch
    split   of a tensorflow-datasets folder
    """

    path: str
    images: str | None = None
    weight: float | None = None
    split: str = "train"


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What the batches are made of.

    sequence_length  slots of a row (T)
    rows             rows of a global batch (B)
    images_per_row   most images of a row (I); a sample with more is bad
    image_size, image_mean   the vision tower's, in pixels and in [0, 1]
    image_slots      slots of one image (P)
    template         name of a conversation template
    system           another default system text than the template's; None for the template's
    prompt_length    None; for the release's semantics, `presets.Semantics.prompt_length`
    packing          whether several samples share a row
    shuffle          whether the order of the rows is drawn anew for each epoch
    max_bad_share    stop when a larger share of the samples is bad
    threads          threads of each process that build batches ahead of their use
    workers          processes that do so (and that measure samples for packing); 0 for this one
    cache            folder where packing remembers the sizes of samples between runs
    """

    sources: tuple[SourceSpec, ...]
    sequence_length: int
    rows: int
    images_per_row: int
    image_size: int
    image_mean: tuple[float, ...]
    image_slots: int
    template: str = "chatml"
    system: str | None = None
    prompt_length: int | None = None
    packing: bool = False
    seed: int = 0
    shuffle: bool = True
    max_bad_share: float = 0.01
    threads: int = 8
    workers: int = 0
    cache: str | None = None


class Steps:
    """This host's part of every batch, by step, with what was bad. Pure, and picklable."""

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
        self._mixture, self._recipe, self._rows, self._order = mixture, recipe, rows, order
        self._batch, self._part = batch, part

    def __len__(self) -> int:
        return sys.maxsize // self._batch

    def __getitem__(self, step: int) -> tuple[layout.Batch, int, list[mixing.Bad]]:
        """Returns the batch, how many samples were to be in it, and the bad ones of them."""
        first = step * self._batch
        seen, bad, rows = 0, [], []
        for place in range(first + self._part.start, first + self._part.stop):
            row = []
            for number in self._rows[self._order[place]]:
                made = self._mixture.make(int(number), self._recipe)
                (row if isinstance(made, examples.Example) else bad).append(made)
                seen += 1
            rows.append(row)
        return assemble(rows, self._recipe), seen, bad


def assemble(rows: Sequence[Sequence[examples.Example]], recipe: examples.Recipe) -> layout.Batch:
    """Returns the batch whose row r holds the examples rows[r] one after another."""
    shape = (len(rows), recipe.length)
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    modality = np.full(shape, layout.PADDING, np.int32)
    targets = np.full(shape, layout.IGNORE, np.int32)
    square = (recipe.image_size, recipe.image_size, 3)
    images = np.zeros((len(rows), recipe.images_per_row, *square), np.uint8)
    for number, row in enumerate(rows):
        start, pictures = 0, 0
        for segment, example in enumerate(row, start=1):
            span = slice(start, start + len(example.tokens))
            tokens[number, span] = example.tokens
            modality[number, span] = example.modality
            targets[number, span] = example.targets
            segments[number, span] = segment
            for picture in example.images:
                images[number, pictures] = picture
                pictures += 1
            start = span.stop
    prompt_length = recipe.prompt_length
    slots = layout.make_layout(tokens, modality, segments, prompt_length=prompt_length)
    return layout.Batch(slots, targets, images)


class Loader:
    """Batches by step. `loader[step]` is pure; `iterate` reads ahead.

    The global batch of a step is the same on any number of hosts; host h of n gets its rows
    h*B/n to (h+1)*B/n - 1.
    """

    def __init__(self, spec: DataSpec, tokenizer: Any, *, host: int = 0, hosts: int = 1):
        """Opens the sources and, for packing, plans the rows.

        Raises:
          UserError: a file is missing or malformed, `spec` does not fit together, the tokenizer
            does not fit the template, or too many samples are bad.
        """
        _check(spec, host, hosts)
        self.spec = spec
        self._tally, self._survey = samples.Tally(), samples.Tally()
        self._logged: set[str] = set()
        recipe = recipe_from_spec(spec, tokenizer)
        opened = [sources.open_source(s.path, images=s.images, split=s.split) for s in spec.sources]
        mixture = mixing.Mixture(opened, [part.path for part in spec.sources])
        self._samples = len(mixture)
        pools = self._pools(mixture, recipe)
        rows = packing.concatenate(pools)
        order = _order(spec, [len(pool) for pool in pools])
        self.steps_per_epoch = max(1, len(rows) // spec.rows)
        size = spec.rows // hosts
        part = slice(host * size, (host + 1) * size)
        self._steps = Steps(mixture, recipe, rows, order, batch=spec.rows, part=part)

    def __getitem__(self, step: int) -> layout.Batch:
        """Returns this host's part of the batch of `step`."""
        return self._account(*self._steps[step])

    def iterate(self, start: int = 0) -> Iterator[layout.Batch]:
        """Yields the batches of steps start, start+1, ..., built ahead of their use."""
        spec = self.spec
        ahead = grain.ReadOptions(num_threads=spec.threads, prefetch_buffer_size=2 * spec.threads)
        data = grain.MapDataset.source(self._steps)[start:].to_iter_dataset(ahead)
        if spec.workers:
            if not flags.FLAGS.is_parsed():  # grain's processes want to pass them on
                flags.FLAGS.mark_as_parsed()
            data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=spec.workers))
        iterator = iter(data)
        try:
            for batch, seen, bad in iterator:
                yield self._account(batch, seen, bad)
        finally:
            iterator.close()

    @property
    def stats(self) -> dict[str, Any]:
        """What was read so far: samples seen, bad ones by cause with the first ids.

        With packing, `left_out` tells the same of the samples that have no place in the plan.
        """
        return {
            "samples": self._samples,
            **self._tally.as_dict(),
            "left_out": self._survey.as_dict(),
        }

    def _account(self, batch: layout.Batch, seen: int, bad: Sequence[mixing.Bad]) -> layout.Batch:
        self._tally.add(seen, bad)
        for name, reason in bad:
            if name not in self._logged and len(self._logged) < _MOST_LOGGED:
                self._logged.add(name)
                logging.warning("sample %s is skipped: %s", name, reason)
        self._stop_if_bad(self._tally)
        return batch

    def _stop_if_bad(self, tally: samples.Tally) -> None:
        of = max(tally.seen, min(_LEAST_SEEN, self._samples))
        if tally.bad > self.spec.max_bad_share * of:
            share = f"more than max_bad_share = {self.spec.max_bad_share:g}"
            raise UserError(f"{tally.summary()}; {share}")

    def _pools(self, mixture: mixing.Mixture, recipe: examples.Recipe) -> list[packing.PackedRows]:
        """Returns the rows of each pool: of every source if they have weights, else of all."""
        is_weighted = self.spec.sources[0].weight is not None
        ends = mixture.starts if is_weighted else mixture.starts[[0, -1]]
        spans = list(itertools.pairwise(ends.tolist()))
        if not self.spec.packing:
            return [packing.one_each(first, last - first) for first, last in spans]
        sizes, tally = mixing.measure_mixture(
            mixture, recipe, workers=self.spec.workers, cache=self.spec.cache
        )
        self._survey = tally
        self._stop_if_bad(tally)
        if tally.bad:
            logging.warning("left out of the rows: %s", tally.summary(len(samples.CAUSES)))
        draw = np.random.default_rng(self.spec.seed)
        pools = []
        for first, last in spans:
            members = first + np.flatnonzero(sizes[first:last, 0])
            if not len(members):
                raise UserError(f"a source has no sample that can be used: {tally.summary()}")
            if self.spec.shuffle:
                members = draw.permutation(members)
            slots, pictures = sizes[members].T
            room = {"length": recipe.length, "images_per_row": recipe.images_per_row}
            pools.append(packing.first_fit(members, slots, pictures, **room))
        return pools


def recipe_from_spec(spec: DataSpec, tokenizer: Any) -> examples.Recipe:
    """Returns how the samples of `spec` become examples.

    Raises:
      UserError: the template is unknown, or does not fit the tokenizer.
    """
    template = conversation.get_template(spec.template, system=spec.system)
    text_tokenizer = tokenization.as_text_tokenizer(tokenizer)
    text_tokenizer.controls(template.controls)
    return examples.Recipe(
        tokenizer=text_tokenizer,
        template=template,
        length=spec.sequence_length,
        image_slots=spec.image_slots,
        images_per_row=spec.images_per_row,
        image_size=spec.image_size,
        image_mean=tuple(spec.image_mean),
        prompt_length=spec.prompt_length,
    )


def _order(spec: DataSpec, pools: Sequence[int]) -> grain.MapDataset:
    """Returns the endless sequence of row numbers: every pool over and over, mixed by weight."""
    weights = [part.weight for part in spec.sources]
    seeds = np.random.SeedSequence(spec.seed).generate_state(len(pools))
    endless, first = [], 0
    for size, seed in zip(pools, seeds, strict=True):
        rows = grain.MapDataset.range(first, first + size)
        rows = rows.seed(int(seed)).shuffle() if spec.shuffle else rows
        endless.append(rows.repeat())
        first += size
    return endless[0] if len(endless) == 1 else grain.MapDataset.mix(endless, weights)


def _check(spec: DataSpec, host: int, hosts: int) -> None:
    weights = [part.weight for part in spec.sources]
    if not spec.sources:
        raise UserError("data: no sources")
    if any(w is None for w in weights) and any(w is not None for w in weights):
        raise UserError("data: either every source has a weight or none has")
    if any(w is not None and w <= 0 for w in weights):
        raise UserError(f"data: weights must be positive, not {weights}")
    if not 0 <= host < hosts or spec.rows % hosts:
        raise UserError(f"data: {spec.rows} rows do not split over {hosts} hosts (host {host})")
    for name in ("sequence_length", "rows", "image_size", "image_slots", "threads"):
        if getattr(spec, name) < 1:
            raise UserError(f"data: {name} must be at least 1, not {getattr(spec, name)}")
    if spec.images_per_row < 0 or spec.workers < 0 or not 0 <= spec.seed < 2**32:
        raise UserError("data: images_per_row, workers and seed must not be negative")
    if len(spec.image_mean) != 3:
        raise UserError(f"data: image_mean has 3 parts, not {spec.image_mean}")
