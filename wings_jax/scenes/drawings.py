"""Real handwriting and real drawings in color: the images of the embedded data set.

An image has 64 x 64 pixels, four cells of 32 x 32 (top left, top right, bottom left, bottom
right). A cell is empty or holds one object: a handwritten digit (UCI, 8 x 8 gray) or a
drawing of one of 20 things (`assets/drawings`, 28 x 28 gray), scaled, jittered and colored on a
dark background. Training and test use disjoint sets of digits and drawings.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
from collections.abc import Sequence

import numpy as np
from PIL import Image

IMAGE_SIZE, CELL = 64, 32  # pixels
GROUND = (16, 16, 24)
COLORS = {
    "red": (235, 40, 40),
    "green": (40, 190, 70),
    "blue": (50, 100, 255),
    "yellow": (250, 225, 50),
    "orange": (255, 140, 20),
    "purple": (180, 60, 220),
    "white": (245, 245, 245),
}
# fmt: off
THINGS = [
    "airplane", "apple", "banana", "bicycle", "book", "butterfly", "car", "cat", "chair", "clock",
    "cup", "fish", "flower", "house", "key", "ladder", "star", "sun", "tree", "umbrella",
]
# fmt: on
DIGITS = [str(digit) for digit in range(10)]
PLACES = ["top left", "top right", "bottom left", "bottom right"]

# Training uses the first 75 of the 100 drawings of a thing and the first 1,400 of 1,797 digits. The
# digits are ordered by writer, so most writers of the test set are not in the training set.
TRAINING_DRAWINGS = 75
TRAINING_DIGITS = 1400
SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Glyphs:
    """Gray shapes of one split.

    shapes  u8[n,28,28]  ink 0..255
    names   [n]          "0".."9" or one of THINGS
    ids     [n]          origin of the shape, such as "digit-17" or "drawing-203"
    """

    shapes: np.ndarray
    names: list[str]
    ids: list[str]

    @functools.cached_property
    def by_name(self) -> dict[str, list[int]]:
        """The indices of the shapes of each name."""
        index: dict[str, list[int]] = {}
        for number, name in enumerate(self.names):
            index.setdefault(name, []).append(number)
        return index


@dataclasses.dataclass(frozen=True)
class Placed:
    """One object of an image.

    name   "0".."9" or one of THINGS
    color  a key of COLORS
    cell   index into PLACES; None for an object that is only described
    shape  index of its glyph
    scale  side of the drawn glyph, in pixels
    shift  (right, down) from the middle of the cell, in pixels
    """

    name: str
    color: str
    cell: int | None
    shape: int
    scale: int
    shift: tuple[int, int]


@functools.cache
def load_glyphs(split: str) -> Glyphs:
    """Returns the digits and drawings of "train" or "test"; the two are disjoint."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    is_training = split == "train"

    images, targets = _digits()
    chosen = [index for index in range(len(targets)) if (index < TRAINING_DIGITS) == is_training]
    shapes = [_enlarge(images[index]) for index in chosen]
    names = [DIGITS[targets[index]] for index in chosen]
    ids = [f"digit-{index}" for index in chosen]

    # The number of a drawing among those of the same thing decides its split.
    pixels, labels = _drawings()
    ranks = np.zeros(len(labels), np.int64)
    for label in range(len(THINGS)):
        ranks[labels == label] = np.arange(np.sum(labels == label))
    for index in np.flatnonzero((ranks < TRAINING_DRAWINGS) == is_training):
        shapes.append(pixels[index])
        names.append(THINGS[labels[index]])
        ids.append(f"drawing-{index}")

    return Glyphs(np.stack(shapes), names, ids)


def _enlarge(digit: np.ndarray) -> np.ndarray:
    """Returns u8[28,28] of a handwritten digit u8[8,8] in 0..16, smoothly enlarged."""
    gray = Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8))
    return np.asarray(gray.resize((28, 28), Image.Resampling.BICUBIC))


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns images u8[1797,8,8] (0..16) and digits u8[1797], ordered by writer.

    They are those of `sklearn.datasets.load_digits`, which takes seconds to import.
    """
    path = importlib.resources.files("wings_jax") / "assets" / "drawings" / "digits.npz"
    with path.open("rb") as file, np.load(file) as stored:
        return stored["images"], stored["labels"]


def _drawings() -> tuple[np.ndarray, np.ndarray]:
    """Returns pixels u8[2000,28,28] (0..255) and labels u8[2000] (index into THINGS)."""
    path = importlib.resources.files("wings_jax") / "assets" / "drawings" / "quickdraw20.npz"
    with path.open("rb") as file, np.load(file) as stored:
        packed, labels, names = stored["pixels"], stored["labels"], stored["names"]
    if list(names) != THINGS:
        raise ValueError(f"{path}: names {list(names)} are not {THINGS}")

    # Two 4-bit gray values per byte, the left pixel in the high bits.
    pixels = np.stack([packed >> 4, packed & 15], axis=-1).reshape(len(packed), 28, 28)
    return pixels * np.uint8(17), labels


def render(objects: Sequence[Placed], glyphs: Glyphs) -> np.ndarray:
    """Returns u8[64,64,3]: the objects in their cells on the dark background."""
    ground = np.array(GROUND, np.float32)
    pixels = np.broadcast_to(ground, (IMAGE_SIZE, IMAGE_SIZE, 3)).copy()
    for placed in objects:
        assert placed.cell is not None  # only described objects have none
        gray = Image.fromarray(glyphs.shapes[placed.shape])
        size = (placed.scale, placed.scale)
        ink = np.asarray(gray.resize(size, Image.Resampling.BILINEAR), np.float32)[..., None] / 255

        # Top left pixel of the glyph: its cell, centered, shifted.
        corner = (CELL - placed.scale) // 2
        row, column = divmod(placed.cell, 2)
        top = row * CELL + corner + placed.shift[1]
        left = column * CELL + corner + placed.shift[0]

        color = np.array(COLORS[placed.color], np.float32)
        pixels[top : top + placed.scale, left : left + placed.scale] += ink * (color - ground)
    return np.round(np.clip(pixels, 0, 255)).astype(np.uint8)
