"""LLaVA JSON and its pictures into one folder that streams well: array_record, by sample number.

    python -m wings_jax.data.prepare FILE.json --images DIR --out DIR [--split train]

tensorflow-datasets' own layout, so `tfds.builder_from_directory(OUT)` reads it too; TensorFlow
is not needed. Pictures are the files' bytes, unchanged, so training from the folder equals
training from the JSON. The folder appears when it is complete, and never replaces another.
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
from wings_jax.data import conversation, images, samples, sources

VERSION = "1.0.0"


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes what it is given; the order of the samples stays."""

    VERSION = tfds.core.Version(VERSION)
    code_path = None  # looked up to find lists of downloads, of which there are none

    def __init__(self, *, name: str, split: str, examples: Iterator[tuple[int, Any]], folder: str):
        self.name, self._split, self._examples = name, split, examples
        super().__init__(data_dir=folder, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description="Conversations about pictures, which are encoded files.",
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
    """Returns how many samples were read and which were bad; writes the others to `out`.

    Raises:
      UserError: `out` exists or cannot be written, the file is malformed, or a sample is bad and
        `skip_bad` is false. Nothing is left behind then.
    """
    out = pathlib.Path(out)
    if out.exists():
        raise errors.UserError(f"--out {out} exists; remove it, or choose another")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise errors.UserError(f"--name {name!r} must be lower-case letters, digits and _")
    source = sources.open_source(path, images=images)
    tally = samples.Tally()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            found = _examples(source, tally, skip_bad=skip_bad)
            _build(_Builder(name=name, split=split, examples=found, folder=folder))
            if tally.bad == tally.seen:
                raise errors.UserError(f"{path}: nothing to write, {tally.summary()}")
            shutil.move(pathlib.Path(folder) / name / VERSION, out)
    except OSError as error:
        raise errors.UserError(f"--out {out}: {error.strerror or error}") from error
    return tally


def _build(builder: _Builder) -> None:
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(None):  # it reports a download and a temporary place
        builder.download_and_prepare()


def _examples(
    source: sources.SampleSource, tally: samples.Tally, *, skip_bad: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    for number in tqdm.trange(len(source), desc="writing samples", disable=None):
        identity = f"#{number}"
        try:
            sample = source[number]
            identity = sample.id
            example = _example(sample)
        except samples.BadSample as reason:
            tally.add(1, [(identity, reason)])
            if not skip_bad:
                raise errors.UserError(
                    f"sample {identity}: {reason}; python -m wings_jax.data.check lists all such, "
                    "--skip-bad leaves them out"
                ) from reason
            continue
        tally.add(1, [])
        yield number, example


def _example(sample: samples.Sample) -> dict[str, Any]:
    """Returns the sample's features, having seen that its turns and pictures are sound."""
    conversation.normalize_sample(sample)
    for picture in sample.images:
        images.load_image(picture)
    return {
        "id": sample.id,
        "images": [images.image_bytes(picture) for picture in sample.images],
        "conversations": [
            {"from": turn["from"], "value": turn["value"]} for turn in sample.conversations
        ],
    }


def main() -> None:
    """Reads the command line and writes the folder."""
    parser = argparse.ArgumentParser(
        prog="python -m wings_jax.data.prepare", description=__doc__.splitlines()[0]
    )
    parser.add_argument("file", help="a LLaVA JSON or JSONL file")
    parser.add_argument("--images", help="folder of the image paths (default: the file's)")
    parser.add_argument("--out", required=True, help="folder to make; must not exist")
    parser.add_argument("--name", default="conversations", help="name of the data set")
    parser.add_argument("--split", default="train", help="name of its one split")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad samples out")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    tally = write_dataset(
        args.file,
        args.out,
        images=args.images,
        name=args.name,
        split=args.split,
        skip_bad=args.skip_bad,
    )
    if tally.bad:
        print(tally.summary(causes=len(samples.CAUSES)), file=sys.stderr)
    print(f"{tally.seen - tally.bad:,} samples written to {args.out}")


if __name__ == "__main__":
    cli.run_main("prepare", main)
