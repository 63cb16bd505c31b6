"""The embedded data set "scenes": images of real digits and drawings, and questions about them.

`write_scenes` writes a directory in the LLaVA layout that is a function of its settings and needs
only the package, so it is read by the same data path as any other data:

    images/*.png             64 x 64 pixels; paths in the files below are relative to images/
    train_stage1.json        captions, for alignment
    train_stage2.json        conversations of several questions about one or two images
    train_interleaved.json   images among text-only questions of the replayed skills
    train_replay.json        text-only conversations of the replayed skills
    test_images.json         one scored question per record, images of held-out digits and drawings
    test_text.json           one scored text-only question per record, every skill
    scenes.json              the settings and the number of records

A record has the keys of LLaVA (`id`, `image`, `conversations`), and `kinds`, one for each answer,
and `setting` (single, several, interleaved, text). Test records end with the true answer.

    python -m wings_jax.scenes data/scenes --seed 0
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import random
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from wings_jax import errors, files
from wings_jax.scenes import drawings, questions, skills
from wings_jax.scenes.questions import QuestionTurn

MARKER = "<image>"
Record = dict[str, Any]
Scene = tuple[drawings.Placed, ...]


@dataclasses.dataclass(frozen=True)
class SceneSettings:
    """How much is written; the whole directory is a function of these settings.

    pictures   number of training images
    turns      most questions of a training conversation (fewer about an image of few objects)
    replay     number of text-only training conversations
    test_each  number of test records of each kind, and of the settings several, interleaved
    seed       of the random choices
    """

    pictures: int = 6000
    turns: int = 4
    replay: int = 2000
    test_each: int = 120
    seed: int = 0


class Album:
    """The images of one split while they are generated: file name -> objects.

    Args:
      split: "train" or "test".
      rng: draws the objects.
    """

    def __init__(self, split: str, rng: random.Random):
        self.split = split
        self.rng = rng
        self.glyphs = drawings.load_glyphs(split)
        self.scenes: dict[str, Scene] = {}

    def add(self, *, with_kind: str | None = None) -> tuple[str, Scene]:
        """Returns (file name, objects) of a new image about which `with_kind` can be asked."""
        # Not every image has an answer to every kind of question.
        while True:
            scene = questions.make_objects(self.rng, self.glyphs)
            if with_kind is None or questions.ask(self.rng, scene, with_kind) is not None:
                name = f"{self.split}-{len(self.scenes):05d}.png"
                self.scenes[name] = scene
                return name, scene

    def save(self, directory: pathlib.Path) -> None:
        """Writes every image as a PNG file."""

        def save_one(item: tuple[str, Scene]) -> None:
            name, scene = item
            image = Image.fromarray(drawings.render(scene, self.glyphs))
            image.save(directory / name, compress_level=1)

        with concurrent.futures.ThreadPoolExecutor(4) as executor:
            list(executor.map(save_one, self.scenes.items()))


def make_record(
    name: str, setting: str, turns: Sequence[QuestionTurn], images: Sequence[str] = (), at: int = 0
) -> Record:
    """Returns a LLaVA record with the markers of its images at the start of question `at`."""
    conversations = []
    for number, turn in enumerate(turns):
        markers = f"{MARKER}\n" * len(images) if number == at else ""
        conversations.append({"from": "human", "value": markers + turn.question})
        conversations.append({"from": "gpt", "value": turn.answer})

    # LLaVA's key is `image` for one image and for several.
    record: Record = {"id": name}
    if images:
        record["image"] = images[0] if len(images) == 1 else list(images)
    return record | {
        "conversations": conversations,
        "kinds": [turn.kind for turn in turns],
        "setting": setting,
    }


def text_turns(
    rng: random.Random, names: Sequence[str], split: str, number: int
) -> list[QuestionTurn]:
    """Returns text-only questions of random skills."""
    chosen = [rng.choice(names) for _ in range(number)]
    return [QuestionTurn(name, *skills.sample(rng, name, split)) for name in chosen]


def training_records(album: Album, settings: SceneSettings) -> dict[str, list[Record]]:
    """Returns the records of the four training files, file name -> records."""
    rng = album.rng
    captions, answered, mixed = [], [], []
    images = [album.add() for _ in range(settings.pictures)]

    for number, (image, scene) in enumerate(images):
        # Stage 1: every image has a caption.
        caption = QuestionTurn("caption", questions.DESCRIBE, questions.describe(rng, scene))
        captions.append(make_record(f"caption-{number}", "single", [caption], [image]))

        # Of eight images one is asked about together with the one before it, and one follows
        # text-only questions.
        if number % 8 == 7:
            previous_image, previous_scene = images[number - 1]
            turns = questions.ask_turns(rng, [previous_scene, scene], settings.turns)
            pair = [previous_image, image]
            answered.append(make_record(f"asked-{number}", "several", turns, pair))
            continue

        # One of eight images follows text-only questions, as its own record too.
        if number % 8 == 6:
            text = text_turns(rng, skills.REPLAYED, "train", rng.randint(1, 3))
            turns = text + questions.ask_turns(rng, [scene], settings.turns // 2)
            record = make_record(f"mixed-{number}", "interleaved", turns, [image], at=len(text))
            mixed.append(record)

        turns = questions.ask_turns(rng, [scene], min(settings.turns, 2 + 2 * len(scene)))
        answered.append(make_record(f"asked-{number}", "single", turns, [image]))

    replay = [
        make_record(f"replay-{number}", "text", text_turns(rng, skills.REPLAYED, "train", 4))
        for number in range(settings.replay)
    ]

    return {
        "train_stage1": captions,
        "train_stage2": answered,
        "train_interleaved": mixed,
        "train_replay": replay,
    }


def test_records(album: Album, settings: SceneSettings) -> dict[str, list[Record]]:
    """Returns the records of the two test files, one scored question each."""
    images = [
        *_single_tests(album, settings.test_each),
        *_several_tests(album, settings.test_each),
        *_interleaved_tests(album, settings.test_each),
    ]

    # Text: every skill alone, the replayed and the never replayed ones.
    text = []
    for name in skills.SKILLS:
        for number in range(settings.test_each):
            turns = text_turns(album.rng, [name], "test", 1)
            text.append(make_record(f"text-{name}-{number}", "text", turns))
    return {"test_images": images, "test_text": text}


def _single_tests(album: Album, count: int) -> list[Record]:
    """Returns `count` questions of every kind about one image."""
    records = []
    for kind in questions.KINDS:
        for number in range(count):
            image, scene = album.add(with_kind=kind)
            turns = _ask_one(album.rng, [scene], kind)
            records.append(make_record(f"single-{kind}-{number}", "single", turns, [image]))
    return records


def _several_tests(album: Album, count: int) -> list[Record]:
    """Returns `count` questions about two images."""
    records = []

    for number in range(count):
        kind = questions.ALL_KINDS[number % len(questions.ALL_KINDS)]
        pair = [album.add(with_kind=None if kind == "which" else kind) for _ in range(2)]
        turns = _ask_one(album.rng, [scene for _, scene in pair], kind)
        names = [name for name, _ in pair]
        records.append(make_record(f"several-{number}", "several", turns, names))
    return records


def _interleaved_tests(album: Album, count: int) -> list[Record]:
    """Returns `count` questions about an image after one or two text-only questions."""
    records = []
    kinds = list(questions.KINDS)

    for number in range(count):
        kind = kinds[number % len(kinds)]
        image, scene = album.add(with_kind=kind)
        turns = text_turns(album.rng, skills.REPLAYED, "test", album.rng.randint(1, 2))
        turns += _ask_one(album.rng, [scene], kind)

        last = len(turns) - 1
        record = make_record(f"interleaved-{number}", "interleaved", turns, [image], at=last)
        records.append(record)
    return records


def _ask_one(rng: random.Random, scenes: Sequence[Scene], kind: str) -> list[QuestionTurn]:
    """Returns one question of this kind; draws again if the first draws gave none."""
    turns: list[QuestionTurn] = []
    while not turns:
        turns = questions.ask_turns(rng, scenes, 1, [kind])
    return turns


def write_scenes(
    directory: str | os.PathLike[str], settings: SceneSettings | None = None
) -> pathlib.Path:
    """Writes the data set and returns its directory; one that exists is left unchanged.

    It is written under a temporary name and then renamed, so it is never incomplete. Without
    `settings` an existing data set may have any, and a new one gets the default ones.

    Raises:
      UserError: `directory` holds something else, or cannot be written.
    """
    directory = pathlib.Path(directory)
    if directory.exists():
        _check_same(directory, settings)
        return directory

    # All or nothing: a training run reads what exists.
    with files.new_directory(directory) as temporary:
        (temporary / "images").mkdir()
        _write_files(temporary, settings or SceneSettings())
    return directory


def _check_same(directory: pathlib.Path, settings: SceneSettings | None) -> None:
    """Raises UserError unless the directory is a data set, of these settings if there are any."""
    note = directory / "scenes.json"
    if not note.is_file():
        raise errors.UserError(f"{directory}: exists and is not a scenes data set")

    # The settings stand for the whole content.
    written = json.loads(note.read_text(encoding="utf-8"))["settings"]
    if settings is None:
        return

    requested = dataclasses.asdict(settings)
    if written != requested:
        raise errors.UserError(
            f"{directory}: was written with {written}, but {requested} was requested; give "
            "another directory or remove it"
        )


def _write_files(directory: pathlib.Path, settings: SceneSettings) -> None:
    """Writes images, records and the settings."""
    counts = {}
    for split, make_records in (("train", training_records), ("test", test_records)):
        # A seed of its own for each split: one can change without the other.
        album = Album(split, random.Random(f"{settings.seed}-{split}"))

        for name, records in make_records(album, settings).items():
            _write_records(directory / f"{name}.json", records)
            counts[name] = len(records)
        album.save(directory / "images")

    note = {"settings": dataclasses.asdict(settings), "records": counts}
    (directory / "scenes.json").write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


def _write_records(path: pathlib.Path, records: Iterable[Record]) -> None:
    """Writes a JSON list with one record per line."""
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
