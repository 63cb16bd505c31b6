"""Image files that people have: depths, orientations, sizes, and what is not an image."""

from __future__ import annotations

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from wings_jax.data import images, samples

EVAL = pathlib.Path(__file__).parents[2] / "shared" / "data" / "eval" / "images"
MEAN = (0.2, 0.5, 0.8)


def ramp(dtype, low: float, high: float) -> np.ndarray:
    """Returns 256 x 256 gray values from `low` to `high`."""
    return np.linspace(low, high, 65536).round(6).reshape(256, 256).astype(dtype)


def saved(array: np.ndarray, suffix: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, suffix)
    return file.getvalue()


DEPTHS = {
    "16-bit": ramp(np.uint16, 0, 65535),
    "32-bit with 16-bit values": ramp(np.int32, 0, 65535),
    "32-bit with 8-bit values": ramp(np.int32, 0, 255),
    "32-bit with large values": ramp(np.int32, -1_000_000, 1_000_000),
    "float in 0..1": ramp(np.float32, 0, 1),
    "float in 0..255": ramp(np.float32, 0, 255),
    "float in 0..65535": ramp(np.float32, 0, 65535),
    "float below 0": ramp(np.float32, -3, 3),
}


@pytest.mark.parametrize("name", DEPTHS)
@pytest.mark.parametrize("form", ["file", "PIL image", "array"])
def test_gray_depths_are_scaled_to_8_bit(name, form):
    array = DEPTHS[name]
    source = {"PIL image": Image.fromarray(array), "array": array}
    image = images.load_image(source[form] if form in source else saved(array, "tiff"))
    pixels = np.asarray(image).astype(float)
    assert image.mode == "RGB"
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert 126.5 < pixels.mean() < 128.5
    assert (np.diff(pixels[..., 0].reshape(-1)) >= 0).all()


def test_a_16_bit_png_is_scaled_by_the_range_of_its_mode():
    dark = np.full((4, 4), 257 * 3, np.uint16)
    assert (np.asarray(images.load_image(saved(dark, "png"))) == 3).all()


def test_8_bit_values_in_wider_images_stay_what_they_are():
    gray = np.arange(200, dtype=np.uint8).reshape(10, 20)
    for dtype in (np.int32, np.float32):
        assert (np.asarray(images.load_image(gray.astype(dtype)))[..., 0] == gray).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_not_numbers_are_refused(value):
    array = np.zeros((3, 3), np.float32)
    array[1, 1] = value
    with pytest.raises(samples.BadSample, match="not finite"):
        images.load_image(array)


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 2, 7), (2,), (2, 2, 2, 3)])
def test_arrays_of_other_shapes_are_refused(shape):
    with pytest.raises(samples.BadSample, match="unreadable image"):
        images.load_image(np.zeros(shape, np.uint8))


def test_arrays_of_colors_and_other_dtypes():
    color = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert (np.asarray(images.load_image(color)) == color).all()
    assert (np.asarray(images.load_image(color.astype(np.uint16) * 257)) == color).all()
    assert (np.asarray(images.load_image(np.array([[True, False]])))[..., 0] == [[255, 0]]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_pil_image_is_turned_as_its_file_is(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path, exif=exif)
    from_path = images.load_image(path)
    with Image.open(path) as opened:
        assert images.load_image(opened).tobytes() == from_path.tobytes()
    assert from_path.size == ((10, 6) if orientation < 5 else (6, 10))


@pytest.mark.parametrize(
    "size", [(90, 2500), (2500, 90), (1, 3000), (700, 700), (301, 299), (33, 1111)]
)
def test_large_images_are_resized_as_their_padded_square(size, monkeypatch):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    whole = images.prepare_image(image, 28, MEAN)
    monkeypatch.setattr(images, "MAX_SQUARE_PIXELS", 1000)
    monkeypatch.setattr(images, "STRIP_PIXELS", 100_000)
    assert (images.prepare_image(image, 28, MEAN) == whole).all()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1080, 60_000), (60_000, 1080)])
def test_memory_of_a_long_screenshot(size):
    """Its padded square would have 10.8 GB."""
    image = Image.new("RGB", size, (10, 20, 30))
    before = peak_memory()
    square = images.prepare_image(image, 384, MEAN)
    assert peak_memory() - before < 600e6
    inner = square[:, 188:196] if size[0] < size[1] else square[188:196]
    assert (inner[..., 0] < 60).all()
    assert (square[0, 0] == square[-1, -1]).all()


def peak_memory() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(
    ("name", "cause", "detail"),
    [
        ("a\0b.png", samples.UNREADABLE_IMAGE, "null"),
        ("\ud800.png", samples.UNREADABLE_IMAGE, r"\\ud800.png"),
        ("x" * 300 + ".png", samples.UNREADABLE_IMAGE, "too long"),
    ],
)
def test_paths_that_cannot_be(tmp_path, name, cause, detail):
    with pytest.raises(samples.BadSample, match=detail) as raised:
        images.load_image(tmp_path / name)
    assert raised.value.cause == cause
    str(raised.value).encode()


def test_a_git_lfs_pointer_is_named(tmp_path):
    path = tmp_path / "x.png"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(samples.BadSample, match=r"x.png: .*git-lfs pointer.*git lfs pull"):
        images.load_image(path)


@pytest.mark.parametrize("source", [None, 3, {"bytes": b""}, []])
def test_what_is_not_an_image_source_is_refused(source):
    with pytest.raises(samples.BadSample, match="unreadable image"):
        images.load_image(source)


EXPECTED = {  # file -> (mode of the file, size) or a part of the reason
    "16bit.cropped.tif": ("I;16", (64, 64)),
    "1_trns.png": ("1", (64, 64)),
    "LICENSE.pillow": "not an image",
    "apng_mode_16bit.png": ("RGBA", (128, 64)),
    "broken_data_stream.png": "broken_data_stream.png",
    "decompression_bomb.gif": "exceeds limit",
    "derived/html_error_page.jpg": "not an image",
    "derived/png_named.jpg": ("RGB", (128, 128)),
    "derived/tall_60x9000.jpg": ("RGB", (60, 9000)),
    "derived/truncated_60pct.jpg": "truncated",
    "derived/zero_bytes.jpg": "empty file",
    "hopper.Lab.tif": ("LAB", (128, 128)),
    "hopper.pfm": ("F", (128, 128)),
    "hopper_1bit.pbm": ("1", (128, 128)),
    "hopper_orientation_5.jpg": ("RGB", (128, 128)),
    "hopper_orientation_6.webp": ("RGB", (128, 128)),
    "i_trns.png": ("I;16", (64, 64)),
    "orientation_rectangle.jpg": ("RGB", (1, 2)),
    "p_trns_single.png": ("P", (64, 64)),
    "pil_sample_cmyk.jpg": ("CMYK", (100, 100)),
    "sugarshack.mpo": ("RGB", (640, 480)),
    "zero_width.gif": "not an image",
}


@pytest.mark.skipif(not EVAL.exists(), reason="the evaluation images are not here")
@pytest.mark.parametrize("name", EXPECTED)
def test_real_files_are_read_or_refused_with_the_right_reason(name):
    expected = EXPECTED[name]
    if isinstance(expected, str):
        with pytest.raises(samples.BadSample, match=expected) as raised:
            images.load_image(EVAL / name)
        assert raised.value.cause == samples.UNREADABLE_IMAGE
        assert str(raised.value).count(samples.UNREADABLE_IMAGE) == 1
        return
    opened = images.open_image(EVAL / name)
    assert (opened.mode, opened.size) == expected
    assert images.prepare_image(images.load_image(EVAL / name), 28, MEAN).shape == (28, 28, 3)


@pytest.mark.skipif(not EVAL.exists(), reason="the evaluation images are not here")
def test_every_real_file_is_in_the_table():
    files = {path.relative_to(EVAL).as_posix() for path in EVAL.rglob("*") if path.is_file()}
    assert files == set(EXPECTED)
