"""Random records, data files and image files: a BadSample or UserError at most, and no hang.

`WINGS_FUZZ_SCALE=10` multiplies the number of inputs.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import os
import pathlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from PIL import Image

from wings_jax.data import images, records, samples, sources, turns
from wings_jax.errors import UserError

FUZZ_SCALE = int(os.environ.get("WINGS_FUZZ_SCALE", 1))
HERE = pathlib.Path("images")
MEAN = (0.2, 0.5, 0.8)


def seeds() -> list[bytes]:
    """Returns small valid files of several formats."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = []
    for suffix in ("png", "jpeg", "webp", "gif", "bmp", "tiff", "ppm", "ico", "tga", "pcx"):
        file = io.BytesIO()
        options = {"exif": exif} if suffix in ("png", "jpeg", "webp", "tiff") else {}
        Image.fromarray(pixels).save(file, suffix, **options)
        files.append(file.getvalue())

    # Gray images of more than 8 bits.
    for dtype, suffix in ((np.uint16, "png"), (np.uint16, "tiff"), (np.float32, "tiff")):
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0].astype(dtype)).save(file, suffix)
        files.append(file.getvalue())
    return files


@pytest.mark.fuzz
@hypothesis.settings(max_examples=300 * FUZZ_SCALE, deadline=None)
@hypothesis.given(
    file=strategies.sampled_from(seeds()),
    edits=strategies.lists(
        strategies.tuples(strategies.floats(0, 1, exclude_max=True), strategies.binary(max_size=6)),
        max_size=8,
    ),
    end=strategies.floats(0, 1),
)
def test_fuzz_damaged_image_files(file, edits, end):
    damaged = bytearray(file)
    for where, content in edits:
        start = int(where * len(damaged))
        damaged[start : start + len(content)] = content
    with contextlib.suppress(samples.BadSample):
        image = images.load_image(bytes(damaged[: max(1, int(end * len(damaged)))]))
        assert images.prepare_image(image, 8, MEAN).shape == (8, 8, 3)


scalars = strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats()


def encoded_image() -> str:
    file = io.BytesIO()
    Image.new("RGB", (4, 3)).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


ENCODED = encoded_image()
DATA_URL = f"data:image/png;base64,{ENCODED}"
WORDS = "human gpt user assistant system tool text image image_url <image> a.png https://a.b/c"
KEYS = (
    "id image images conversations messages conversation from value role content type text url "
    "bytes path instruction input output query response history system weight human assistant "
    "caption file_name"
)
words = strategies.sampled_from(
    [*WORDS.split(), r"\<image>", DATA_URL, ENCODED, "\ud800", "\0", "", "file://["]
)
characters = strategies.characters(exclude_categories=())  # lone surrogates too
texts = words | strategies.text(characters, max_size=8)
keys = strategies.sampled_from(KEYS.split())
values = strategies.recursive(
    scalars | texts | strategies.binary(max_size=4),
    lambda inner: (
        strategies.lists(inner, max_size=4) | strategies.dictionaries(keys, inner, max_size=5)
    ),
    max_leaves=16,
)


@pytest.mark.fuzz
@hypothesis.settings(max_examples=500 * FUZZ_SCALE, deadline=None)
@hypothesis.given(strategies.dictionaries(keys, values, max_size=6))
def test_fuzz_records(record):
    with contextlib.suppress(samples.BadSample):
        sample = records.to_sample(record, "x#0", HERE)
        sample.id.encode()
        talk = turns.normalize_sample(sample)
        marked = [turns.count_markers(turn["value"]) for turn in talk if turn["from"] == "human"]
        assert sum(marked) == len(sample.images)
        for image in sample.images:
            images.load_image(image)


@pytest.mark.fuzz
@hypothesis.settings(max_examples=200 * FUZZ_SCALE, deadline=None)
@hypothesis.given(
    rows=strategies.lists(strategies.dictionaries(keys, values, max_size=4), max_size=4),
    suffix=strategies.sampled_from(["json", "jsonl", "csv", "json.gz", "parquet", "arrow", "tsv"]),
    cut=strategies.floats(0, 1),
    noise=strategies.binary(max_size=5),
)
def test_fuzz_files(tmp_path_factory, rows, suffix, cut, noise):
    rows = json.loads(json.dumps(rows, default=lambda value: value.decode("latin-1")))
    text = (
        json.dumps(rows) if suffix.startswith("json") and suffix != "jsonl" else lines_ascii(rows)
    )
    content = text.encode()
    start = int(cut * len(content))
    content = content[:start] + noise + content[start:]
    path = tmp_path_factory.mktemp("fuzz") / f"x.{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    with contextlib.suppress(UserError):
        source = sources.open_source(path)
        for number in range(len(source)):
            with contextlib.suppress(samples.BadSample):
                turns.normalize_sample(source[number])


def lines_ascii(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
