"""Random access to the samples of a tensorflow-datasets directory."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from wings_jax.data import records, samples
from wings_jax.errors import UserError


class PreparedSource:
    """Samples that tensorflow-datasets wrote as array_record, read without TensorFlow.

    Features: `conversations` (sequence of {"from", "value"}), and optionally `id` and `image` or
    `images`: encoded files as bytes (what `wings_jax.data.prepare` writes) or decoded Image
    features, one or a sequence.
    """

    def __init__(self, path: pathlib.Path, split: str):
        import tensorflow_datasets as tfds  # slow to import, and only needed here

        # One data set: in this directory, or anywhere below it.
        notes = sorted(path.glob("dataset_info.json")) or sorted(path.rglob("dataset_info.json"))
        if len(notes) != 1:
            what = "no dataset_info.json" if not notes else f"{len(notes)} data sets, name one"
            raise UserError(f"data directory {path}: {what}")

        self._name = f"{path.name}[{split}]"
        status = notes[0].stat()
        self.fingerprint = f"{notes[0].absolute()} {split} {status.st_mtime_ns}"
        try:
            builder = tfds.builder_from_directory(str(notes[0].parent))
            self._records = builder.as_data_source(split=split)
        except (ValueError, KeyError, NotImplementedError, OSError) as error:
            detail = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"data directory {path}, split {split!r}: {detail}") from error

        if "conversations" not in builder.info.features:
            raise UserError(f"data directory {path} has no feature 'conversations'")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> samples.Sample:
        try:
            record = self._records[index]
        except (OSError, SyntaxError) as error:  # an Image feature that PIL cannot decode
            detail = f"record {index}: {error}"
            raise samples.BadSample(samples.UNREADABLE_IMAGE, detail) from error

        turns = record["conversations"]
        pairs = zip(turns["from"], turns["value"], strict=True)
        conversations = [{"from": _as_text(who), "value": _as_text(what)} for who, what in pairs]
        identity = _as_text(record["id"]) if "id" in record else f"{self._name}#{index}"
        return samples.Sample(identity, _prepared_images(record), conversations)


def _prepared_images(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns the images of a prepared record; an empty one stands for no image."""
    feature = next((record[key] for key in records.IMAGE_KEYS if key in record), ())
    # One image, or a sequence of them.
    is_array = isinstance(feature, np.ndarray) and feature.ndim == 3
    images = [feature] if is_array or isinstance(feature, bytes) else list(feature)
    return tuple(image for image in images if len(image))


def _as_text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
