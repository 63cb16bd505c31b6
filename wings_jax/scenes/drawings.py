"""Real handwriting and real drawings in colour: the pictures of the embedded data set.

A picture is 64 x 64 pixels, four cells of 32 x 32 (top left, top right, bottom left, bottom
right). A cell is empty or holds one object: a handwritten digit (scikit-learn, 8 x 8 grey) or a
drawing of one of 20 things (`assets/drawings`, 28 x 28 grey), scaled, jittered and inked in a
colour on a dark ground. Training and test draw from disjoint sets of digits and drawings.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
from collections.abc import Sequence

import numpy as np
from PIL import Image
from sklearn import datasets

PICTURE, CELL = 64, 32
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

# Of the 100 drawings of a thing the first 75 train; of 1,797 digits the first 1,400. (The digits
# are ordered by writer, so most hands in the test set were never seen in training.)
TRAINING_DRAWINGS = 75
TRAINING_DIGITS = 1400
SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Glyphs:
    """Grey shapes of one split.

    shapes  u8[n,28,28]  ink 0..255
    names   [n]          "0".."9" or one of THINGS
    ids     [n]          where the shape comes from, such as "digit-17" or "drawing-203"
    """

    shapes: np.ndarray
    names: list[str]
    ids: list[str]

    @functools.cached_property
    def by_name(self) -> dict[str, list[int]]:
        """Returns the indices of the shapes that show each name."""
        index: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            index.setdefault(name, []).append(i)
        return index


@dataclasses.dataclass(frozen=True)
class Placed:
    """One object of a picture: glyph `shape` of size `scale` px, moved by `shift` = (right, down)
    px from the middle of its cell (an index into PLACES; None for what is only told of)."""

    name: str
    colour: str
    cell: int | None
    shape: int
    scale: int
    shift: tuple[int, int]


@functools.cache
def load_glyphs(split: str) -> Glyphs:
    """Returns the digits and drawings of "train" or "test"; nothing is in both."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    wanted = split == "train"
    digits = datasets.load_digits()
    chosen = [i for i in range(len(digits.target)) if (i < TRAINING_DIGITS) == wanted]
    shapes = [_enlarge(digits.images[i]) for i in chosen]
    names = [DIGITS[digits.target[i]] for i in chosen]
    ids = [f"digit-{i}" for i in chosen]
    pixels, labels = _drawings()
    rank = np.zeros(len(labels), np.int64)
    for label in range(len(THINGS)):
        rank[labels == label] = np.arange(np.sum(labels == label))
    for i in np.flatnonzero((rank < TRAINING_DRAWINGS) == wanted):
        shapes.append(pixels[i])
        names.append(THINGS[labels[i]])
        ids.append(f"drawing-{i}")
    return Glyphs(np.stack(shapes), names, ids)


def _enlarge(digit: np.ndarray) -> np.ndarray:
    """Returns u8[28,28] of a handwritten digit f[8,8] in 0..16, smoothly enlarged."""
    grey = Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8))
    return np.asarray(grey.resize((28, 28), Image.Resampling.BICUBIC))


def _drawings() -> tuple[np.ndarray, np.ndarray]:
    """Returns pixels u8[2000,28,28] (0..255) and labels u8[2000] (index into THINGS)."""
    path = importlib.resources.files("wings_jax") / "assets" / "drawings" / "quickdraw20.npz"
    with path.open("rb") as file, np.load(file) as stored:
        packed, labels, names = stored["pixels"], stored["labels"], stored["names"]
    if list(names) != THINGS:
        raise ValueError(f"{path}: names {list(names)} are not {THINGS}")
    pixels = np.stack([packed >> 4, packed & 15], axis=-1).reshape(len(packed), 28, 28)
    return pixels * np.uint8(17), labels


def render(objects: Sequence[Placed], glyphs: Glyphs) -> np.ndarray:
    """Returns u8[64,64,3]: the objects in their cells on the dark ground."""
    ground = np.array(GROUND, np.float32)
    picture = np.broadcast_to(ground, (PICTURE, PICTURE, 3)).copy()
    for placed in objects:
        grey = Image.fromarray(glyphs.shapes[placed.shape])
        size = (placed.scale, placed.scale)
        ink = np.asarray(grey.resize(size, Image.Resampling.BILINEAR), np.float32)[..., None] / 255
        corner = (CELL - placed.scale) // 2
        row, column = divmod(placed.cell, 2)
        top = row * CELL + corner + placed.shift[1]
        left = column * CELL + corner + placed.shift[0]
        colour = np.array(COLORS[placed.colour], np.float32)
        picture[top : top + placed.scale, left : left + placed.scale] += ink * (colour - ground)
    return np.round(np.clip(picture, 0, 255)).astype(np.uint8)
