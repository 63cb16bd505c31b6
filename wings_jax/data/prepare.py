"""Writes LLaVA JSON and its images as array_record, for fast random access by sample number.

    python -m wings_jax.data.prepare FILE.json --images DIR --out DIR [--split train]

The layout is that of tensorflow-datasets, so `tfds.builder_from_directory(OUT)` reads it too;
TensorFlow is not needed. Images are the files' bytes, unchanged, so training from the directory
equals training from the JSON. The directory appears when it is complete and never replaces
another one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
import tqdm

from wings_jax import cli, errors
from wings_jax.data import images, samples, sources, turns

VERSION = "1.0.0"


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes the given examples in their order."""

    VERSION = tfds.core.Version(VERSION)
    code_path = None  # tfds would look for lists of downloads there; there are none

    def __init__(self, *, name: str, split: str, examples: Iterator[tuple[int, Any]], out: str):
        self.name, self._split, self._examples = name, split, examples
        super().__init__(data_dir=out, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description="Conversations about images, which are encoded files.",
            features=tfds.features.FeaturesDict(
                {
                    "id": text,
                    "images": tfds.features.Sequence(text),
                    "conversations": tfds.features.Sequence({"from": text, "value": text}),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
        del dl_manager  # nothing is downloaded
        return {self._split: self._examples}

    def _generate_examples(self) -> Iterator[tuple[int, Any]]:
        return self._examples


def write_dataset(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    images: str | os.PathLike | None = None,
    name: str = "conversations",
    split: str = "train",
    skip_bad: bool = False,
) -> samples.Tally:
    """Writes the good samples of `path` to the directory `out`; returns the counts of both kinds.

    Raises:
      UserError: `out` exists or cannot be written, the file is malformed, or a sample is bad and
        `skip_bad` is false. Nothing is written then.
    """
    out = pathlib.Path(out)
    if out.exists():
        raise errors.UserError(f"--out {out} exists; remove it or give another directory")

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise errors.UserError(f"--name {name!r} must be lower-case letters, digits and _")

    source = sources.open_source(path, images=images)

    # Written beside `out` and moved there when complete.
    tally = samples.Tally()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
            # A generator: each example is made when the builder writes it.
            examples = _make_examples(source, tally, skip_bad=skip_bad)
            _run_builder(_Builder(name=name, split=split, examples=examples, out=temporary))
            # After the run: only then is every sample counted.
            if tally.bad == tally.seen:
                raise errors.UserError(f"{path}: nothing to write, {tally.summary()}")

            shutil.move(pathlib.Path(temporary) / name / VERSION, out)
    except OSError as error:
        raise errors.UserError(f"--out {out}: {error.strerror or error}") from error
    return tally


def _run_builder(builder: _Builder) -> None:
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(None):  # tfds reports a download
        builder.download_and_prepare()


def _make_examples(
    source: sources.SampleSource, tally: samples.Tally, *, skip_bad: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    for number in tqdm.trange(len(source), desc="writing samples", disable=None):
        # Its number, until the sample has been read and has an id.
        identity = f"#{number}"
        try:
            sample = source[number]
            identity = sample.id
            features = _features(sample)
        except samples.BadSample as reason:
            identity = reason.sample_id or identity
            tally.add(1, [(identity, reason)])
            if not skip_bad:
                raise errors.UserError(
                    f"sample {identity}: {reason}; python -m wings_jax.data.check lists all bad "
                    "samples, --skip-bad leaves them out"
                ) from reason
            continue

        tally.add(1, [])
        yield number, features


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


def main() -> None:
    """Writes the directory from the command line."""
    parser = argparse.ArgumentParser(
        prog=cli.program_name("wings_jax.data.prepare"), description=__doc__.splitlines()[0]
    )
    parser.add_argument("file", help="a data file, of any format that training reads")
    parser.add_argument("--images", help="directory of the image paths (default: the file's)")
    parser.add_argument("--out", required=True, help="directory to write; must not exist")
    parser.add_argument("--name", default="conversations", help="name of the data set")
    parser.add_argument("--split", default="train", help="name of its one split")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad samples out")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args()

    tally = write_dataset(
        arguments.file,
        arguments.out,
        images=arguments.images,
        name=arguments.name,
        split=arguments.split,
        skip_bad=arguments.skip_bad,
    )

    if tally.bad:
        print(tally.summary(causes=len(samples.CAUSES)), file=sys.stderr)
    print(f"{tally.seen - tally.bad:,} samples written to {arguments.out}")


if __name__ == "__main__":
    cli.run_main("python -m wings_jax.data.prepare", main)
