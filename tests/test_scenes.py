"""Scenes: answers follow from the image, train and test are disjoint, files are complete."""

import collections
import dataclasses
import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from wings_jax import errors
from wings_jax.data import samples
from wings_jax.data import turns as turns_lib
from wings_jax.scenes import dataset, drawings, questions, skills

SMALL = dataset.SceneSettings(pictures=64, turns=6, replay=40, test_each=8, seed=3)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return dataset.write_scenes(tmp_path_factory.mktemp("data") / "scenes", SMALL)


def load_records(directory, name):
    return json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))


def answers(record):
    return [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]


def answer_by_hand(question, objects):
    """Returns the answer to a question about one image, computed another way."""
    digits = [o for o in objects if o.name.isdigit()]

    if found := re.fullmatch(r"How many (\w+) are there\?", question):
        others = len(objects) - len(digits)
        counts = {"digits": len(digits), "drawings": others, "objects": len(objects)}
        return str(counts[found[1]])
    if question == "What is the sum of the digits?":
        return str(sum(int(o.name) for o in digits))
    if found := re.fullmatch(r"Is there an? (\w+)\?", question):
        return "yes" if any(o.name == found[1] for o in objects) else "no"
    if found := re.fullmatch(r"Is anything (\w+)\?", question):
        return "yes" if any(o.color == found[1] for o in objects) else "no"
    if found := re.fullmatch(r"Where is the (\w+)\?", question):
        place = only(drawings.PLACES[o.cell] for o in objects if o.name == found[1])
        return f"The {found[1]} is {place}."
    if found := re.fullmatch(r"What colour is the (\w+)\?", question):
        color = only(o.color for o in objects if o.name == found[1])
        return f"The {found[1]} is {color}."

    which = re.fullmatch(r"(Which digit|What) is (.+)\?", question)[2]
    if question.startswith("Which digit"):
        name = only(o.name for o in digits if which in (o.color, drawings.PLACES[o.cell]))
        return f"The {which} digit is {name}."
    things = [o for o in objects if o not in digits]
    name = only(o.name for o in things if which in (o.color, drawings.PLACES[o.cell]))
    return f"The {which} thing is {'an' if name[0] in 'aeiou' else 'a'} {name}."


def only(values):
    (value,) = values
    return value


def test_training_and_test_share_no_shape():
    train, test = (drawings.load_glyphs(split) for split in drawings.SPLITS)
    assert not set(train.ids) & set(test.ids)
    counts = collections.Counter(name for name in train.names if name in drawings.THINGS)
    assert counts == dict.fromkeys(drawings.THINGS, 75)
    assert len(test.names) == 397 + 20 * 25
    together = np.concatenate([train.shapes, test.shapes]).reshape(-1, 28 * 28)
    seen = {shape.tobytes() for shape in together[: len(train.names)]}
    assert not any(shape.tobytes() in seen for shape in together[len(train.names) :])


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="'validation'"):
        drawings.load_glyphs("validation")


def test_every_answer_is_the_one_right_answer():
    rng, glyphs = random.Random(0), drawings.load_glyphs("test")
    asked = collections.Counter()
    for _ in range(400):
        objects = questions.make_objects(rng, glyphs)
        for kind, question, answer in questions.ask_turns(rng, [objects], 8):
            assert answer == answer_by_hand(question, objects), (question, objects)
            asked[kind] += 1
    assert set(asked) == set(questions.KINDS)


def test_a_description_is_true_and_complete():
    rng, glyphs = random.Random(3), drawings.load_glyphs("train")
    for _ in range(200):
        objects = questions.make_objects(rng, glyphs)
        statements = re.findall(r"[^.]+\.", questions.describe(rng, objects))
        true = {o.name: {f" {f.answer}" for f in questions.facts(o)} for o in objects}
        for statement in statements:
            assert any(" " + statement.strip() in facts for facts in true.values())
        for facts in true.values():
            assert any(" " + statement.strip() in facts for statement in statements)


def test_questions_among_images_are_about_the_one_they_name():
    rng, glyphs = random.Random(0), drawings.load_glyphs("train")
    for _ in range(200):
        images = [questions.make_objects(rng, glyphs) for _ in range(3)]
        for kind, question, answer in questions.ask_turns(rng, images, 4):
            if kind == "which":
                name = re.fullmatch(r"Which picture has an? (\w+)\?", question)[1]
                holders = [i for i, image in enumerate(images) if name in [o.name for o in image]]
                assert [questions.ORDINALS[i] for i in holders] == [answer]
                continue
            ordinal, rest = re.fullmatch(r"In the (\w+) picture, (.+)", question).groups()
            image = images[questions.ORDINALS.index(ordinal)]
            assert answer == answer_by_hand(rest[0].upper() + rest[1:], image)


def test_yes_and_no_are_balanced():
    rng, glyphs = random.Random(1), drawings.load_glyphs("train")
    given = [
        questions.ask(rng, questions.make_objects(rng, glyphs), "exists")[1] for _ in range(2000)
    ]
    assert 0.46 < np.mean([answer == "yes" for answer in given]) < 0.54
    for name, skill in skills.SKILLS.items():
        if name in ("parity", "property"):
            given = [skill.make(rng)[1] for _ in range(2000)]
            assert 0.44 < np.mean([answer == "yes" for answer in given]) < 0.56, name


def test_objects_stay_in_their_cells_and_have_their_color():
    rng, glyphs = random.Random(2), drawings.load_glyphs("train")
    for _ in range(50):
        objects = questions.make_objects(rng, glyphs)
        pixels = drawings.render(objects, glyphs)
        assert (pixels.shape, pixels.dtype) == ((64, 64, 3), np.uint8)
        cells = pixels.reshape(2, 32, 2, 32, 3).transpose(0, 2, 1, 3, 4).reshape(4, -1, 3)
        for cell in set(range(4)) - {o.cell for o in objects}:
            assert (cells[cell] == drawings.GROUND).all()
        for placed in objects:
            brightest = cells[placed.cell][cells[placed.cell].sum(-1).argmax()]
            distance = {
                name: np.abs(brightest.astype(int) - color).sum()
                for name, color in drawings.COLORS.items()
            }
            assert min(distance, key=distance.get) == placed.color


def test_held_out_text_questions_are_never_sampled_for_training():
    rng = random.Random(0)
    for name, skill in skills.SKILLS.items():
        train = {skills.sample(rng, name, "train")[0] for _ in range(300)}
        test = {skills.sample(rng, name, "test")[0] for _ in range(300)}
        assert skill.held_out == (not train & test), name
    assert set(skills.REPLAYED) < set(skills.SKILLS)


def test_text_answers_are_words_of_the_image_questions():
    words = {*drawings.THINGS, *drawings.COLORS, *drawings.PLACES, *questions.ORDINALS}
    words |= {"yes", "no", *map(str, range(64))}
    rng = random.Random(0)
    for name in set(skills.SKILLS) - {"lookup"}:
        assert {skills.sample(rng, name, "test")[1] for _ in range(200)} <= words, name
    for _ in range(200):
        question, answer = skills.sample(rng, "lookup", "test")
        assert answer in question.splitlines()[0]


def test_facts_are_about_all_things_and_each_riddle_has_one_answer():
    assert set(skills.RIDDLES) == set(drawings.THINGS)
    assert set(skills.COLOR_FACTS) == set(drawings.COLORS)
    riddles = [q for asked in skills.RIDDLES.values() for q in asked]
    assert len(riddles) == len(set(riddles))
    for _, holders in skills.PROPERTIES.values():
        assert set(holders) < set(drawings.THINGS)


def test_the_data_set_is_a_function_of_its_settings(written, tmp_path):
    again = dataset.write_scenes(tmp_path / "again", SMALL)
    files = sorted(p.relative_to(written) for p in written.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert all((written / f).read_bytes() == (again / f).read_bytes() for f in files)
    other = dataset.write_scenes(tmp_path / "other", dataclasses.replace(SMALL, seed=4))
    assert load_records(other, "train_stage2") != load_records(written, "train_stage2")


def test_records_are_llava_records_that_the_data_path_accepts(written):
    for name, count in json.loads((written / "scenes.json").read_text())["records"].items():
        records = load_records(written, name)
        assert len(records) == count > 0
        assert len({r["id"] for r in records}) == count
        for record in records:
            images = record.get("image", [])
            images = [images] if isinstance(images, str) else images
            for image in images:
                with Image.open(written / "images" / image) as opened:
                    assert opened.size == (64, 64)
            sample = samples.Sample(record["id"], images, record["conversations"])
            assert turns_lib.normalize_sample(sample) == record["conversations"]
            assert len(record["kinds"]) == len(answers(record))
            expected = {0: ("text",), 1: ("single", "interleaved"), 2: ("several",)}
            assert record["setting"] in expected[len(images)]


def test_images_of_training_and_test_are_disjoint(written):
    def image_names(prefix):
        names = set()
        for path in written.glob(f"{prefix}_*.json"):
            for record in load_records(written, path.stem):
                images = record.get("image", [])
                names |= {images} if isinstance(images, str) else set(images)
        return names

    assert image_names("train")
    assert not image_names("train") & image_names("test")
    everything = {path.name for path in (written / "images").iterdir()}
    assert image_names("train") | image_names("test") == everything


def test_tests_hold_every_kind_and_training_replays_only_some_skills(written):
    images, text = load_records(written, "test_images"), load_records(written, "test_text")
    counts = collections.Counter((r["setting"], r["kinds"][-1]) for r in images)
    for kind in questions.KINDS:
        assert counts["single", kind] == SMALL.test_each
    settings = collections.Counter(r["setting"] for r in images)
    assert settings["several"] == settings["interleaved"] == SMALL.test_each
    assert collections.Counter(r["kinds"][0] for r in text) == dict.fromkeys(
        skills.SKILLS, SMALL.test_each
    )
    replayed = {k for r in load_records(written, "train_replay") for k in r["kinds"]}
    assert replayed == set(skills.REPLAYED)
    mixed = {k for r in load_records(written, "train_interleaved") for k in r["kinds"]}
    assert mixed <= set(skills.REPLAYED) | set(questions.KINDS)
    assert dataset.SceneSettings().test_each >= 100


def test_an_existing_directory_is_unchanged_or_refused(written, tmp_path):
    before = (written / "scenes.json").stat().st_mtime_ns
    assert dataset.write_scenes(written, SMALL) == written
    assert (written / "scenes.json").stat().st_mtime_ns == before
    with pytest.raises(errors.UserError, match="seed"):
        dataset.write_scenes(written, dataclasses.replace(SMALL, seed=9))
    with pytest.raises(errors.UserError, match="not a scenes data set"):
        dataset.write_scenes(tmp_path, SMALL)


def test_a_failed_write_writes_nothing(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(errors.UserError, match="cannot write"):
        dataset.write_scenes(blocked / "scenes", SMALL)
    assert list(tmp_path.iterdir()) == [blocked]


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "wings_jax.scenes", str(tmp_path / "out")]
    command += ["--pictures", "8", "--replay", "4", "--test-each", "2", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "out")
    assert load_records(tmp_path / "out", "scenes")["settings"]["pictures"] == 8
    done = subprocess.run([*command[:-1], "2"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(tmp_path / "out") in done.stderr


def test_digits_are_those_of_scikit_learn():
    """They are shipped, because importing scikit-learn takes seconds at every start."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images, labels = drawings._digits()
    np.testing.assert_array_equal(images, digits.images)
    np.testing.assert_array_equal(labels, digits.target)
