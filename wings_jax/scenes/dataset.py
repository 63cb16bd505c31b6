"""The embedded data set "scenes": pictures of real digits and drawings, and questions about them.

`write` makes a directory in the LLaVA layout from nothing but the package, the same for the same
settings, so that the ordinary data path is what runs:

    images/*.png             64 x 64 pixels; the files below name them relative to images/
    train_stage1.json        captions, for alignment
    train_stage2.json        conversations of several questions about one or two pictures
    train_interleaved.json   pictures among text-only questions of the replayed skills
    train_replay.json        text-only conversations of the replayed skills
    test_images.json         one scored question a record, pictures of held-out digits and drawings
    test_text.json           one scored text-only question a record, every skill
    scenes.json              the settings and the number of records

A record has the keys of LLaVA (`id`, `image`, `conversations`) and besides `kinds`, one for each
answer, and `setting` (single, several, interleaved, text). Test records end with the true answer.

    python -m wings_jax.scenes data/scenes --seed 0
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import random
import shutil
from collections.abc import Iterable, Sequence

from PIL import Image

from wings_jax import errors
from wings_jax.scenes import drawings, questions, skills
from wings_jax.scenes.questions import QuestionTurn

MARKER = "<image>"
Record = dict[str, object]
Scene = tuple[drawings.Placed, ...]


@dataclasses.dataclass(frozen=True)
class SceneSettings:
    """How much is written.

    pictures     number of training pictures
    turns        questions in a training conversation, at most (fewer about an emptier picture)
    replay       number of text-only training conversations
    test_each    number of test records of each kind, and of the settings several, interleaved
    seed         the whole directory is a function of these settings
    """

    pictures: int = 6000
    turns: int = 4
    replay: int = 2000
    test_each: int = 120
    seed: int = 0


class Album:
    """The pictures of one split while they are being invented: name -> scene."""

    def __init__(self, split: str, rng: random.Random):
        self.split = split
        self.rng = rng
        self.glyphs = drawings.load_glyphs(split)
        self.scenes: dict[str, Scene] = {}

    def add(self, *, with_kind: str | None = None) -> tuple[str, Scene]:
        """Returns (file name, objects) of a new picture about which `with_kind` can be asked."""
        while True:
            scene = questions.make_objects(self.rng, self.glyphs)
            if with_kind is None or questions.ask(self.rng, scene, with_kind) is not None:
                name = f"{self.split}-{len(self.scenes):05d}.png"
                self.scenes[name] = scene
                return name, scene

    def save(self, directory: pathlib.Path) -> None:
        """Writes every picture as a PNG file."""

        def save_one(item: tuple[str, Scene]) -> None:
            name, scene = item
            picture = Image.fromarray(drawings.render(scene, self.glyphs))
            picture.save(directory / name, compress_level=1)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(save_one, self.scenes.items()))


def make_record(
    name: str, setting: str, turns: Sequence[QuestionTurn], images: Sequence[str] = (), at: int = 0
) -> Record:
    """Returns a LLaVA record whose images stand at the start of question `at`."""
    conversations = []
    for number, turn in enumerate(turns):
        markers = f"{MARKER}\n" * len(images) if number == at else ""
        conversations.append({"from": "human", "value": markers + turn.question})
        conversations.append({"from": "gpt", "value": turn.answer})
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
    """Returns the records of the four training files."""
    rng = album.rng
    captions, asked, mixed = [], [], []
    pictures = [album.add() for _ in range(settings.pictures)]
    for number, (image, scene) in enumerate(pictures):
        caption = QuestionTurn("caption", questions.DESCRIBE, questions.describe(rng, scene))
        captions.append(make_record(f"caption-{number}", "single", [caption], [image]))
        if number % 8 == 7:
            before = pictures[number - 1]
            turns = questions.ask_turns(rng, [before[1], scene], settings.turns)
            asked.append(make_record(f"asked-{number}", "several", turns, [before[0], image]))
        elif number % 8 == 6:
            text = text_turns(rng, skills.REPLAYED, "train", rng.randint(1, 3))
            turns = text + questions.ask_turns(rng, [scene], settings.turns // 2)
            record = make_record(f"mixed-{number}", "interleaved", turns, [image], at=len(text))
            mixed.append(record)
        if number % 8 != 7:
            turns = questions.ask_turns(rng, [scene], min(settings.turns, 2 + 2 * len(scene)))
            asked.append(make_record(f"asked-{number}", "single", turns, [image]))
    replay = [
        make_record(f"replay-{i}", "text", text_turns(rng, skills.REPLAYED, "train", 4))
        for i in range(settings.replay)
    ]
    return {
        "train_stage1": captions,
        "train_stage2": asked,
        "train_interleaved": mixed,
        "train_replay": replay,
    }


def test_records(album: Album, settings: SceneSettings) -> dict[str, list[Record]]:
    """Returns the records of the two test files, one scored question each."""
    rng = album.rng
    kinds = list(questions.KINDS)
    images, text = [], []
    for kind in kinds:
        for i in range(settings.test_each):
            image, scene = album.add(with_kind=kind)
            turns = _one(rng, [scene], kind)
            images.append(make_record(f"single-{kind}-{i}", "single", turns, [image]))
    for i in range(settings.test_each):
        kind = questions.ALL_KINDS[i % len(questions.ALL_KINDS)]
        pair = [album.add(with_kind=None if kind == "which" else kind) for _ in range(2)]
        turns = _one(rng, [scene for _, scene in pair], kind)
        names = [name for name, _ in pair]
        images.append(make_record(f"several-{i}", "several", turns, names))
    for i in range(settings.test_each):
        kind = kinds[i % len(kinds)]
        image, scene = album.add(with_kind=kind)
        turns = text_turns(rng, skills.REPLAYED, "test", rng.randint(1, 2))
        turns += _one(rng, [scene], kind)
        at = len(turns) - 1
        images.append(make_record(f"interleaved-{i}", "interleaved", turns, [image], at=at))
    for name in skills.SKILLS:
        for i in range(settings.test_each):
            turns = text_turns(rng, [name], "test", 1)
            text.append(make_record(f"text-{name}-{i}", "text", turns))
    return {"test_images": images, "test_text": text}


def _one(rng: random.Random, scenes: Sequence[Scene], kind: str) -> list[QuestionTurn]:
    """Returns one question of this kind; asks again where the dice gave none."""
    while not (turns := questions.ask_turns(rng, scenes, 1, [kind])):
        pass
    return turns


def write_scenes(
    directory: str | os.PathLike[str], settings: SceneSettings | None = None
) -> pathlib.Path:
    """Writes the data set and returns its directory; one of the same settings is left as it is.

    It is made under a temporary name and then renamed: a directory of that name is whole.

    Raises:
      UserError: `directory` holds something else, or cannot be written.
    """
    settings = settings or SceneSettings()
    directory = pathlib.Path(directory)
    if directory.exists():
        _check_same(directory, settings)
        return directory
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        (temporary / "images").mkdir(parents=True)
        _fill(temporary, settings)
        temporary.rename(directory)
    except OSError as error:
        raise errors.UserError(f"{directory}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _check_same(directory: pathlib.Path, settings: SceneSettings) -> None:
    """Raises UserError unless the directory was written with these settings."""
    note = directory / "scenes.json"
    if not note.is_file():
        raise errors.UserError(f"{directory}: exists and is not a scenes data set")
    found = json.loads(note.read_text(encoding="utf-8"))["settings"]
    if found != dataclasses.asdict(settings):
        asked = dataclasses.asdict(settings)
        raise errors.UserError(f"{directory}: was written with {found}, asked for {asked}")


def _fill(directory: pathlib.Path, settings: SceneSettings) -> None:
    """Writes pictures, records and the note."""
    counts = {}
    for split, make in (("train", training_records), ("test", test_records)):
        album = Album(split, random.Random(f"{settings.seed}-{split}"))
        for name, records in make(album, settings).items():
            _dump(directory / f"{name}.json", records)
            counts[name] = len(records)
        album.save(directory / "images")
    note = {"settings": dataclasses.asdict(settings), "records": counts}
    (directory / "scenes.json").write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


def _dump(path: pathlib.Path, records: Iterable[Record]) -> None:
    """Writes a JSON list, a record a line."""
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
