"""Shards of prepared data: written one at a time, read back, and noted with their hashes.

A shard holds the good samples of a range of a source. It is a pure function of them, so a shard
that is written again has the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from wings_jax import files
from wings_jax.data import images, samples, sources, turns
from wings_jax.data.samples import Tally
from wings_jax.errors import UserError

NOTES = "shard_notes"  # directory of the notes of finished shards, until the last is finished


@dataclasses.dataclass(frozen=True)
class FinishedShard:
    """A finished shard.

    file       its name
    samples    records in it
    images     images in them
    text_only  records without an image
    bytes      size of the file
    sha256     of the file, in hexadecimal
    bad        `Tally.as_dict` of the samples of its range, of which the bad ones are not in it
    """

    file: str
    samples: int
    images: int
    text_only: int
    bytes: int
    sha256: str
    bad: dict[str, Any]

    @property
    def tally(self) -> Tally:
        """The samples of its range and the bad ones of them."""
        return Tally.from_dict(self.bad)


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """What is to be written; it can be pickled.

    source    the samples
    work      directory of the shards while they are written, local or gs://
    name      of the data set
    split     of its one split
    count     shards
    skip_bad  whether bad samples are left out; else one is an error
    """

    source: sources.SampleSource
    work: str
    name: str
    split: str
    count: int
    skip_bad: bool

    def file(self, number: int) -> str:
        """Returns the name of a shard, as tensorflow-datasets has it."""
        return f"{self.name}-{self.split}.array_record-{number:05d}-of-{self.count:05d}"

    def range(self, number: int) -> range:
        """Returns the samples of the source that belong to a shard."""
        total = len(self.source)
        return range(number * total // self.count, (number + 1) * total // self.count)


@functools.cache
def features() -> Any:
    """Returns the features of a record, of tensorflow-datasets."""
    import tensorflow_datasets as tfds  # slow to import, and only needed here

    text = tfds.features.Text()
    return tfds.features.FeaturesDict(
        {
            "id": text,
            "images": tfds.features.Sequence(text),
            "conversations": tfds.features.Sequence({"from": text, "value": text}),
        }
    )


def write_shard(job: ShardJob, number: int) -> FinishedShard:
    """Returns a shard, which is written unless it is there already.

    Raises:
      UserError: a sample is bad and `job.skip_bad` is false, or the file that was written does
        not hold what it should.
    """
    work = files.as_path(job.work)
    note = work / NOTES / f"{number:05d}.json"
    path = work / job.file(number)

    # The note is written after the shard.
    if note.exists() and path.exists():
        shard = FinishedShard(**json.loads(note.read_text()))
        if not job.skip_bad and shard.tally.bad:
            ((cause, rows),) = list(shard.bad["causes"].items())[:1]
            raise UserError(_bad_message(f"{rows['first'][0]}, {cause}"))
        return shard

    tally, counts = Tally(max_examples=100), {"samples": 0, "images": 0, "text_only": 0}
    with files.replacing(path) as temporary:
        digest = _write_records(temporary, _examples(job, number, tally, counts))
        if _read_digest(temporary) != digest:
            raise UserError(f"{path}: what is read back differs from what was written")
        size, sha256 = temporary.stat().st_size, _sha256(temporary)

    shard = FinishedShard(path.name, **counts, bytes=size, sha256=sha256, bad=tally.as_dict())
    files.write_json(note, dataclasses.asdict(shard))
    return shard


def _write_records(path: pathlib.Path, examples: Iterator[dict[str, Any]]) -> str:
    """Writes the examples as array_record; returns a digest of the records."""
    from array_record.python import array_record_module
    from tensorflow_datasets.core import example_serializer

    serializer = example_serializer.ExampleSerializer(features().get_serialized_info())
    digest = hashlib.sha256()

    # Groups of one record: each is read by itself.
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1")
    try:
        for example in examples:
            # The order of the fields would differ from process to process.
            message = serializer.get_tf_example(features().encode_example(example))
            record = message.SerializeToString(deterministic=True)
            writer.write(record)
            digest.update(hashlib.sha256(record).digest())
    finally:
        writer.close()
    return digest.hexdigest()


def _read_digest(path: pathlib.Path) -> str:
    """Returns the digest of `_write_records` of the records that a file has."""
    from array_record.python import array_record_module

    digest = hashlib.sha256()
    reader = array_record_module.ArrayRecordReader(os.fspath(path))
    for index in range(reader.num_records()):
        digest.update(hashlib.sha256(reader.read([index])[0]).digest())
    reader.close()
    return digest.hexdigest()


def _examples(
    job: ShardJob, number: int, tally: Tally, counts: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """Yields the good samples of a shard as features, and counts them and the bad ones."""
    for index in job.range(number):
        # Its number, until the sample has been read and has an id.
        identity = f"#{index}"
        try:
            sample = job.source[index]
            identity = sample.id
            example = _features(sample)
        except samples.BadSample as reason:
            identity = reason.sample_id or identity
            tally.add(1, [(identity, reason)])
            if not job.skip_bad:
                raise UserError(_bad_message(f"{identity}: {reason}")) from reason
            continue

        tally.add(1, [])
        counts["samples"] += 1
        counts["images"] += len(example["images"])
        counts["text_only"] += not example["images"]
        yield example


def _bad_message(sample: str) -> str:
    return (
        f"sample {sample}; python -m wings_jax.data.check lists all bad samples, --skip-bad leaves "
        "them out"
    )


def _features(sample: samples.Sample) -> dict[str, Any]:
    """Returns the features of a sample. Raises BadSample if its turns or images are bad."""
    turns.normalize_sample(sample)

    # Decoded only to find damaged images: what is written are the bytes of their files.
    for image in sample.images:
        images.load_image(image)

    return {
        "id": sample.id,
        "images": [images.image_bytes(image) for image in sample.images],
        "conversations": [
            {"from": turn["from"], "value": turn["value"]} for turn in sample.conversations
        ],
    }


def find_damage(directory: str, shard: FinishedShard) -> str:
    """Returns how a shard of a directory differs from its note, "" if it does not."""
    path = files.as_path(directory) / shard.file
    if not path.exists():
        return "is missing"

    with _local_file(path) as local:
        size = local.stat().st_size
        if size != shard.bytes:
            return f"has {size:,} bytes, not {shard.bytes:,}"
        if _sha256(local) != shard.sha256:
            return "has another sha256"

        from array_record.python import array_record_module

        reader = array_record_module.ArrayRecordReader(os.fspath(local))
        count = reader.num_records()
        reader.close()
    return "" if count == shard.samples else f"has {count:,} records, not {shard.samples:,}"


@contextlib.contextmanager
def _local_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the file, or a temporary copy of one in a bucket."""
    if not files.is_url(path):
        yield path
        return

    with tempfile.TemporaryDirectory(prefix="wings-") as directory:
        local = pathlib.Path(directory) / path.name
        local.write_bytes(path.read_bytes())
        yield local


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
