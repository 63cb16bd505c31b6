"""Which samples make up each row and which rows each batch, planned once before the first step.

    samples -> pools (of a source, of a modality) -> rows -> one endless order for each form of
    batch -> batches

The plan is a function of the data, the settings and the seed, so every host computes the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from wings_jax.data import packing, settings
from wings_jax.errors import UserError

MODALITIES = ("all", "image", "text")  # of the samples of a source that are used


@dataclasses.dataclass(frozen=True)
class BatchForm:
    """The shape of a batch; for each form there is one compiled training step.

    length          slots of a row (T)
    images_per_row  most images of a row (I); with 0 the model computes neither the vision tower
                    nor the visual learner
    """

    length: int
    images_per_row: int


@dataclasses.dataclass(frozen=True)
class RowPool:
    """Rows that are shuffled among themselves, epoch by epoch.

    rows      the samples of each row
    weight    share of the batches' rows that are of this pool, relative to other pools
    form      of the batches that the rows are in
    is_text   whether none of its samples has an image, where that is known
    """

    rows: packing.PackedRows
    weight: float
    form: BatchForm
    is_text: bool = False


def needs_image_counts(data: settings.DataConfig) -> bool:
    """Returns whether the plan depends on which samples have images."""
    is_filtered = any(source.modality != "all" for source in data.sources.values())
    return data.batch_by_modality or data.text_share >= 0 or is_filtered


def needs_lengths(data: settings.DataConfig) -> bool:
    """Returns whether the plan depends on how many slots each sample has."""
    return data.packing or bool(data.length_buckets)


def check_settings(data: settings.DataConfig) -> None:
    """Raises UserError where the settings of the plan do not fit together."""
    weights = [source.weight for source in data.sources.values()]
    if not weights:
        raise UserError("data: no sources")
    if any(weight < 0 for weight in weights):
        raise UserError(f"data: weights must be positive, not {weights}")
    if any(weights) and not all(weights):
        raise UserError(f"data: either every source has a weight or none has, not {weights}")

    for name, source in data.sources.items():
        if source.modality not in MODALITIES:
            raise UserError(
                f"data.sources.{name}.modality: {source.modality!r} is not one of "
                + ", ".join(MODALITIES)
            )

    if data.text_share != -1 and not 0 <= data.text_share <= 1:
        raise UserError(f"data.text_share: {data.text_share} is neither -1 nor from 0 to 1")

    buckets = data.length_buckets
    if buckets and data.packing:
        raise UserError("data.length_buckets: packed rows are full already; set one of the two")
    if list(buckets) != sorted({*buckets}) or any(
        not 0 < length < data.sequence_length for length in buckets
    ):
        raise UserError(
            f"data.length_buckets: {buckets} must ascend and be less than data.sequence_length, "
            f"{data.sequence_length}"
        )


def plan_pools(
    data: settings.DataConfig,
    starts: np.ndarray,
    sizes: np.ndarray | None,
    *,
    seed: int,
    shuffle: bool,
) -> list[RowPool]:
    """Returns the pools of rows that the settings describe.

    Args:
      data: the sources with their weights, and how batches are made of them.
      starts: i64[sources+1], the number of the first sample of each source.
      sizes: i32[n,2], slots and images of each sample, 0 slots where it is not used; None where
        the plan needs neither. Slots matter only where `needs_lengths`.
      seed: of the order in which samples are packed.
      shuffle: whether they are packed in another order than that of the files.

    Raises:
      UserError: no sample of a source, or of a modality with a share, is left.
    """
    sources = data.sources
    is_weighted = any(source.weight for source in sources.values())
    boundaries = starts if is_weighted else starts[[0, -1]]
    weights = [source.weight for source in sources.values()] if is_weighted else [0.0]
    form = BatchForm(data.sequence_length, data.images_per_row)

    # Every sample has a row of its own, whatever it is.
    spans = list(itertools.pairwise(boundaries.tolist()))
    if sizes is None:
        return [
            RowPool(packing.one_each(first, last - first), weight, form)
            for (first, last), weight in zip(spans, weights, strict=True)
        ]

    # One generator for all pools, so that no two are permuted alike.
    generator = np.random.default_rng(seed) if shuffle else None
    is_used = _select_samples(data, starts, sizes)
    pools: list[RowPool] = []
    for (first, last), weight in zip(spans, weights, strict=True):
        members = first + np.flatnonzero(is_used[first:last])
        parts = [
            RowPool(_make_rows(data, group, sizes, generator), 0.0, group_form, is_text)
            for group, group_form, is_text in _split(data, members, sizes)
        ]

        # The pools of a source share its weight by their rows; without weights all do.
        total = sum(len(part.rows) for part in parts) if is_weighted else 1
        scale = (weight if is_weighted else 1) / total
        pools += [dataclasses.replace(part, weight=len(part.rows) * scale) for part in parts]

    return _share_modalities(pools, data.text_share)


def _select_samples(data: settings.DataConfig, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Returns bool[n], which samples are used: good ones of their source's modality."""
    is_used, has_images = sizes[:, 0] > 0, sizes[:, 1] > 0
    spans = itertools.pairwise(starts.tolist())

    for (name, source), (first, last) in zip(data.sources.items(), spans, strict=True):
        span = slice(first, last)
        if source.modality != "all":
            is_used[span] &= has_images[span] == (source.modality == "image")

        # Without weight and filter a source is only a part of all the samples.
        if is_used[span].any() or (source.modality == "all" and not source.weight):
            continue
        if source.modality == "all":
            raise UserError(f"data.sources.{name}: no sample of {source.path} can be used")
        what = "with an image" if source.modality == "image" else "without images"
        raise UserError(
            f"data.sources.{name}.modality: {source.path} has no sample {what} that can be used, "
            f"of {last - first}"
        )
    return is_used


def _split(
    data: settings.DataConfig, members: np.ndarray, sizes: np.ndarray
) -> Iterator[tuple[np.ndarray, BatchForm, bool]]:
    """Yields samples that may share a row, the form of their batches, whether all are text."""
    slots, images = sizes[members].T
    # The modality does not matter for rows that may be in any batch.
    by_modality = data.batch_by_modality or data.text_share >= 0
    is_text = (images == 0) & by_modality

    # The first bucket that is at least as long as the sample.
    lengths = [*data.length_buckets, data.sequence_length]
    bucket = np.searchsorted(lengths, slots) if data.length_buckets else np.full(len(slots), -1)

    # Images first, as most samples of most data have one.
    for text, number in sorted({*zip(is_text.tolist(), bucket.tolist(), strict=True)}):
        images_per_row = 0 if text and data.batch_by_modality else data.images_per_row
        group = members[(is_text == text) & (bucket == number)]
        yield group, BatchForm(lengths[number], images_per_row), text


def _make_rows(
    data: settings.DataConfig,
    members: np.ndarray,
    sizes: np.ndarray,
    generator: np.random.Generator | None,
) -> packing.PackedRows:
    if not data.packing:
        return packing.PackedRows(members, np.arange(len(members) + 1))

    members = generator.permutation(members) if generator else members
    slots, images = sizes[members].T
    return packing.first_fit(
        members, slots, images, length=data.sequence_length, images_per_row=data.images_per_row
    )


def _share_modalities(pools: Sequence[RowPool], text_share: float) -> list[RowPool]:
    """Returns the pools with weights of which `text_share` are those of text."""
    if text_share < 0:
        return list(pools)

    totals = {True: 0.0, False: 0.0}
    for pool in pools:
        totals[pool.is_text] += pool.weight

    shares = {True: text_share, False: 1 - text_share}
    for is_text, what in ((True, "without images"), (False, "with an image")):
        if shares[is_text] and not totals[is_text]:
            raise UserError(f"data.text_share: {text_share:g}, but no source has a sample {what}")

    # A modality without a share is not used at all.
    return [
        dataclasses.replace(pool, weight=pool.weight / totals[pool.is_text] * shares[pool.is_text])
        for pool in pools
        if shares[pool.is_text]
    ]


class RowPlan:
    """The rows of every batch, by step; pure, and can be pickled.

    Pools are repeated and mixed in proportion to their weights: first those of one form, whose
    endless order is cut into batches; then the batches of all forms.

    Attributes:
      row_count: rows of all pools.
    """

    def __init__(self, pools: Sequence[RowPool], *, batch: int, seed: int, shuffle: bool):
        """Orders the rows.

        Args:
          pools: the rows, at least one.
          batch: rows of a global batch (B).
          seed: the order of the rows is a function of it.
          shuffle: whether the rows have another order in each epoch.
        """
        self._rows = packing.concatenate([pool.rows for pool in pools])
        self._forms = [pool.form for pool in pools]
        # The number of each pool's first row.
        self._starts = np.cumsum([0] + [len(pool.rows) for pool in pools])
        self._batch, self.row_count = batch, len(self._rows)

        # Each pool has its own seed, or pools of equal size would be shuffled alike.
        seeds = np.random.SeedSequence(seed).generate_state(len(pools))
        endless = []
        for first, last, pool_seed in zip(self._starts, self._starts[1:], seeds, strict=False):
            rows = grain.MapDataset.range(int(first), int(last))
            rows = rows.seed(int(pool_seed)).shuffle() if shuffle else rows
            endless.append(rows.repeat())

        weights = [pool.weight for pool in pools]
        batches, form_weights = [], []
        for form in dict.fromkeys(self._forms):
            own = [number for number, other in enumerate(self._forms) if other == form]
            order = _mix([endless[n] for n in own], [weights[n] for n in own])
            batches.append(order.batch(batch, drop_remainder=True))
            form_weights.append(sum(weights[n] for n in own))
        self._batches = _mix(batches, form_weights)

    def __len__(self) -> int:
        return sys.maxsize // self._batch

    def rows(self, step: int, part: slice) -> tuple[list[np.ndarray], BatchForm]:
        """Returns the samples of each row of a part of the batch of `step`, and its form."""
        numbers = self._batches[step]
        pool = int(np.searchsorted(self._starts, numbers[0], side="right")) - 1
        return [self._rows[number] for number in numbers[part]], self._forms[pool]


def _mix(parts: Sequence[grain.MapDataset], weights: Sequence[float]) -> grain.MapDataset:
    """Returns elements of all parts in proportion to the weights; of one part, those."""
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)
