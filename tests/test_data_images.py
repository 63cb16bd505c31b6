"""Images equal what Hugging Face's processors compute from the padded square."""

from __future__ import annotations

import io
import itertools
import pathlib

import numpy as np
import pytest
import transformers
from PIL import Image

from wings_jax.data import images, samples

GOLDEN = pathlib.Path(__file__).parents[2] / "shared" / "fixtures" / "siglip_tiny.npz"
HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
PROCESSORS = {
    "siglip": (transformers.SiglipImageProcessorPil, HALF, {"size": {"height": 28, "width": 28}}),
    "clip": (
        transformers.CLIPImageProcessorPil,
        CLIP_MEAN,
        {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}},
    ),
}


def random_image(width: int, height: int, *, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(31, 50), (50, 31), (28, 28), (9, 9), (200, 3), (97, 96)])
@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_equal_to_hugging_face_bit_for_bit(name, size):
    processor, mean, settings = PROCESSORS[name]
    image = random_image(*size)
    square = images.pad_to_square(image, mean)
    prepared = images.prepare_image(image, 28, mean)
    assert prepared.dtype == np.uint8

    resize_only = processor(do_rescale=False, do_normalize=False, **settings)
    expected = np.asarray(resize_only(square)["pixel_values"][0])
    assert (prepared.transpose(2, 0, 1) == expected).all()

    full = processor(**settings)
    expected = np.asarray(full(square)["pixel_values"][0])
    std = np.array(full.image_std, np.float32)
    normalized = (prepared.astype(np.float32) / 255 - np.array(full.image_mean, np.float32)) / std
    np.testing.assert_allclose(normalized.transpose(2, 0, 1), expected, atol=1e-6)


@pytest.mark.parametrize("size", [(31, 50), (9, 9), (200, 3)])
def test_bilinear_is_that_of_siglip2(size, monkeypatch):
    """SigLIP2's processor resizes bilinearly; in strips a value may be rounded otherwise."""
    settings = {"size": {"height": 28, "width": 28}, "resample": 2}
    processor = transformers.SiglipImageProcessorPil(
        do_rescale=False, do_normalize=False, **settings
    )
    image = random_image(*size)
    expected = np.asarray(processor(images.pad_to_square(image, HALF))["pixel_values"][0])
    prepared = images.prepare_image(image, 28, HALF, resample="bilinear")
    assert (prepared.transpose(2, 0, 1) == expected).all()
    assert (prepared != images.prepare_image(image, 28, HALF)).any()

    monkeypatch.setattr(images, "MAX_SQUARE_PIXELS", 1)
    monkeypatch.setattr(images, "STRIP_PIXELS", 64)
    in_strips = images.prepare_image(image, 28, HALF, resample="bilinear")
    np.testing.assert_allclose(in_strips.astype(int), prepared, atol=1)
    assert (in_strips == prepared).mean() > 0.99


@pytest.mark.skipif(not GOLDEN.exists(), reason="the release's golden images are not here")
@pytest.mark.parametrize("number", [0, 1])
def test_release_golden_images(number):
    golden = np.load(GOLDEN)
    prepared = images.prepare_image(Image.fromarray(golden[f"image{number}_uint8"]), 28, HALF)
    normalized = (prepared.astype(np.float32) / 255 - 0.5) / 0.5
    assert np.abs(normalized.transpose(2, 0, 1) - golden[f"image{number}_pixel_values"]).max() == 0


def test_padding_is_centered_and_has_the_mean_color():
    square = np.asarray(images.pad_to_square(Image.new("RGB", (5, 2), (9, 9, 9)), CLIP_MEAN))
    gray = [int(255 * part) for part in CLIP_MEAN]
    assert square.shape == (5, 5, 3)
    assert (square[1:3] == 9).all()
    assert (square[[0, 3, 4]] == gray).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    random_image(6, 4).convert(mode).save(path)
    assert (images.load_image(path).mode, images.load_image(path).size) == ("RGB", (6, 4))


def test_paths_bytes_and_arrays_read_alike(tmp_path):
    path = tmp_path / "x.png"
    random_image(6, 4).save(path)
    as_path, as_bytes = images.load_image(path), images.load_image(path.read_bytes())
    as_array = images.load_image(np.asarray(random_image(6, 4)))
    assert as_path.tobytes() == as_bytes.tobytes() == as_array.tobytes()


def test_photographs_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    file = io.BytesIO()
    random_image(6, 4).save(file, "jpeg", exif=exif)
    assert images.load_image(file.getvalue()).size == (4, 6)


def break_file(path: pathlib.Path, kind: str) -> None:
    random_image(64, 64).save(path)
    whole = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "damaged":
        path.write_bytes(whole[:40] + bytes(200) + whole[240:])
    elif kind == "text":
        path.write_text("not found")
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        path.mkdir()


BROKEN = [
    *itertools.product(
        ("missing", "truncated", "text", "empty", "directory"), ("png", "jpg", "webp")
    ),
    ("damaged", "png"),  # the others have no checksum: damaged pixels decode to something
]


@pytest.mark.parametrize(("kind", "suffix"), BROKEN)
def test_broken_files_are_named(tmp_path, kind, suffix):
    path = tmp_path / f"x.{suffix}"
    break_file(path, kind)
    with pytest.raises(samples.BadSample, match=f"x.{suffix}") as raised:
        images.load_image(path)
    expected = samples.MISSING_IMAGE if kind == "missing" else samples.UNREADABLE_IMAGE
    assert raised.value.cause == expected
    assert "\n" not in str(raised.value)
