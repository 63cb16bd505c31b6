"""Batches are a pure function of (seed, step), on any number of hosts; nothing is lost silently."""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging

import hypothesis
import jax
import numpy as np
import pytest
import tiny_data
from hypothesis import strategies
from tiny_data import loader

from wings_jax.data import examples, packing, pipeline, prepare, samples, settings, sources
from wings_jax.errors import UserError
from wings_jax.model import layout

COUNT = 48
PACKING = pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])


@pytest.fixture
def file(tmp_path):
    records = tiny_data.write_records(tmp_path, COUNT)
    return tiny_data.write_json(tmp_path / "x.json", records)


def assert_equal(actual: layout.Batch, expected: layout.Batch) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def conversations(batch: layout.Batch) -> list[tuple[bytes, ...]]:
    """Returns every conversation of a batch: tokens, modality, targets and images as bytes."""
    contents = []
    for row in range(len(batch.targets)):
        used_images = 0
        segments = batch.layout.segments[row]
        for segment in range(1, segments.max() + 1):
            span = np.flatnonzero(segments == segment)
            assert (np.diff(span) == 1).all()
            assert (batch.layout.positions[row, span] == np.arange(len(span))).all()
            modality = batch.layout.modality[row, span]
            count = int((modality == layout.IMAGE).sum()) // 4
            images = batch.images[row, used_images : used_images + count]
            used_images += count
            arrays = (batch.layout.tokens[row, span], modality, batch.targets[row, span], images)
            contents.append(tuple(array.tobytes() for array in arrays))

        rest = segments == 0
        assert (batch.layout.modality[row, rest] == layout.PADDING).all()
        assert (batch.targets[row, rest] == layout.IGNORE).all()
        assert (batch.images[row, used_images:] == 0).all()
    return contents


def single_examples(file) -> list[tuple[bytes, ...]]:
    """Returns the same of every sample of the file, made without a loader."""
    recipe = tiny_data.recipe()
    source = sources.open_source(file)
    contents = []
    for number in range(len(source)):
        example = examples.make_example(source[number], recipe)
        arrays = (example.tokens, example.modality, example.targets)
        images = b"".join(image.tobytes() for image in example.images)
        contents.append((*(array.tobytes() for array in arrays), images))
    return contents


@PACKING
def test_a_step_is_the_same_whenever_and_however_it_is_read(file, is_packed):
    steps = [loader(file, packing=is_packed)[step] for step in range(12)]
    again = loader(file, packing=is_packed)
    for step in (11, 3, 7, 3):
        assert_equal(again[step], steps[step])
    for start in (0, 5):
        ahead = loader(file, packing=is_packed).iterate(start)
        for step in range(start, 12):
            assert_equal(next(ahead), steps[step])
        ahead.close()
    other = loader(file, packing=is_packed, seed=1)[0]
    assert (other.layout.tokens != steps[0].layout.tokens).any()


@PACKING
@pytest.mark.parametrize("hosts", [2, 4])
def test_the_hosts_parts_are_the_global_batch(file, is_packed, hosts):
    whole = loader(file, packing=is_packed)
    parts = [loader(file, packing=is_packed, host=h, hosts=hosts) for h in range(hosts)]
    for step in (0, 9):
        joined = jax.tree.map(lambda *rows: np.concatenate(rows), *[part[step] for part in parts])
        assert_equal(joined, whole[step])
    assert {part.steps_per_epoch for part in parts} == {whole.steps_per_epoch}


def test_far_steps_are_as_quick_to_reach_as_near_ones(file):
    batch = next(loader(file).iterate(10**9))
    assert_equal(batch, loader(file)[10**9])


@PACKING
def test_an_epoch_has_every_conversation_once_and_whole(file, is_packed):
    data = loader(file, packing=is_packed, rows=1)
    expected = collections.Counter(single_examples(file))
    orders = []
    for epoch in range(2):
        first = epoch * data.steps_per_epoch
        contents = [conversations(data[first + step]) for step in range(data.steps_per_epoch)]
        flat = [one for row in contents for one in row]
        assert collections.Counter(flat) == expected
        orders.append(flat)
    assert orders[0] != orders[1]
    assert data.stats["bad"] == 0
    assert data.stats["seen"] == 2 * COUNT


def test_without_shuffling_the_order_is_the_files(file):
    data = loader(file, shuffle=False, rows=COUNT)
    assert conversations(data[0]) == conversations(data[1]) == single_examples(file)


def test_packing_fills_rows(tmp_path):
    records = tiny_data.write_records(tmp_path, 600)[::3]  # those without images
    file = tiny_data.write_json(tmp_path / "x.json", records)
    data = loader(file, packing=True, images_per_row=0, sequence_length=512, rows=2)
    share = np.mean([(data[s].layout.segments > 0).mean() for s in range(data.steps_per_epoch)])
    assert share > 0.9
    assert data[0].images.shape == (2, 0, 8, 8, 3)


sizes = strategies.tuples(strategies.integers(1, 20), strategies.integers(0, 3))


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(strategies.lists(sizes, min_size=1, max_size=300))
def test_every_member_has_one_place_and_no_row_overflows(contents):
    slots, images = np.array(contents).T
    members = np.arange(len(contents)) + 5
    rows = packing.first_fit(members, slots, images, length=20, images_per_row=3)
    assert sorted(np.concatenate([rows[r] for r in range(len(rows))])) == members.tolist()
    for row in range(len(rows)):
        assert slots[rows[row] - 5].sum() <= 20
        assert images[rows[row] - 5].sum() <= 3
    joined = packing.concatenate([rows, packing.one_each(400, 3), rows])
    assert [joined[r].tolist() for r in range(len(rows), len(rows) + 3)] == [[400], [401], [402]]
    assert joined[len(joined) - 1].tolist() == rows[len(rows) - 1].tolist()


@PACKING
def test_weights_are_shares_and_every_source_keeps_its_epochs(tmp_path, is_packed):
    paths = []
    for number, count in enumerate((12, 60)):
        records = tiny_data.write_records(tmp_path, 3 * count)[::3]
        for record in records:
            record["conversations"][0]["value"] = "AB"[number] * 60
        paths.append(tiny_data.write_json(tmp_path / f"{number}.json", records))
    weighted = {
        path.name: settings.SourceConfig(str(path), weight=weight)
        for path, weight in zip(paths, (3.0, 1.0), strict=True)
    }
    data = loader(sources=weighted, packing=is_packed, rows=48)
    a, b = tiny_data.byte_tokenizer().encode("AB").ids
    tokens = np.concatenate([data[step].layout.tokens for step in range(2)])
    is_first, is_second = (tokens == a).any(1), (tokens == b).any(1)
    assert (is_first.sum(), is_second.sum()) == (72, 24)
    seen = collections.Counter(row.tobytes() for row in tokens[is_first])
    assert set(seen.values()) == {6}  # 72 rows of 12 samples
    assert len({row.tobytes() for row in tokens[is_second]}) == 24


def break_records(records, directory):
    """Breaks one sample for each cause; returns cause -> id."""
    talk = tiny_data.turns("<image>q", "a")
    (directory / "broken.png").write_text("not an image")
    broken = {
        samples.MISSING_IMAGE: {"image": "nowhere.png", "conversations": talk},
        samples.UNREADABLE_IMAGE: {"image": "broken.png", "conversations": talk},
        samples.NO_ANSWER: {"conversations": talk[:1]},
        samples.NO_HUMAN_TURN: {"conversations": talk[1:]},
        samples.MALFORMED: {"conversations": [{"role": "user"}]},
        samples.MARKERS: {"image": ["1-0.png"] * 2, "conversations": talk},
        samples.TOO_MANY_IMAGES: {
            "image": ["1-0.png"] * 3,
            "conversations": tiny_data.turns("<image>" * 3, "a"),
        },
        samples.CUT_OFF: {"conversations": tiny_data.turns("q" * 200, "a")},
        samples.UNKNOWN_FORM: {"goal": "q"},
        samples.EMPTY_IMAGE: {"image": "", "conversations": talk},
        samples.MEDIA: {"video": "x.mp4", "conversations": talk},
        samples.TOOLS: {"tools": ["f"], "conversations": talk},
        samples.PREFERENCE: {"prompt": "q", "chosen": "a", "rejected": "b"},
        samples.WEIGHT: {"weight": 0, "conversations": talk},
        samples.URL: {"image": "https://a.b/c.png", "conversations": talk},
    }
    assert set(broken) == set(samples.CAUSES)

    for number, (cause, change) in enumerate(broken.items()):
        records[3 * number + 1] = {"id": f"bad {cause}"} | change
    return {cause: f"bad {cause}" for cause in broken}


@PACKING
def test_bad_samples_are_left_out_counted_and_logged(tmp_path, file, is_packed, caplog):
    whole = single_examples(file)
    records = tiny_data.write_records(tmp_path, COUNT)
    names = break_records(records, tmp_path)
    broken = tiny_data.write_json(tmp_path / "broken.json", records)
    data = loader(broken, packing=is_packed, rows=1)
    with caplog.at_level(logging.WARNING):
        contents = [one for s in range(data.steps_per_epoch) for one in conversations(data[s])]
    good = [one for number, one in enumerate(whole) if "bad" not in records[number]["id"]]
    assert collections.Counter(contents) == collections.Counter(good)
    counted = dict(data.stats["causes"]) | data.stats["left_out"]["causes"]
    assert {cause: row["count"] for cause, row in counted.items()} == dict.fromkeys(names, 1)
    for cause, name in names.items():
        assert counted[cause]["first"][0].startswith(name)
    assert all(name in caplog.text for name in names.values())


def test_a_bad_sample_changes_no_other_row(tmp_path, file):
    records = tiny_data.write_records(tmp_path, COUNT)
    break_records(records, tmp_path)
    broken = loader(tiny_data.write_json(tmp_path / "broken.json", records), rows=COUNT)
    whole = loader(file, rows=COUNT)
    for step in range(3):
        is_bad = (broken[step].layout.modality == layout.PADDING).all(1)
        assert is_bad.sum() == len(samples.CAUSES)
        select_good = functools.partial(jax.tree.map, lambda array, good=~is_bad: array[good])
        assert_equal(select_good(broken[step]), select_good(whole[step]))


@PACKING
def test_too_many_bad_samples_stop_the_run(tmp_path, is_packed):
    records = tiny_data.write_records(tmp_path, COUNT)
    for record in records[:6]:
        record["conversations"] = record["conversations"][:1]
    records[7]["image"] = "nowhere.png"
    file = tiny_data.write_json(tmp_path / "x.json", records)
    message = r"6 x no assistant turn \(first: s\d: 1 turns\)"
    with pytest.raises(UserError, match=message) as raised:
        loader(file, packing=is_packed, max_bad_share=0.1, rows=COUNT)[0]
    assert "more than max_bad_share = 0.1; to list them: wings check /" in str(raised.value)
    assert str(raised.value).endswith("x.json")
    assert "\n" not in str(raised.value)
    loader(file, packing=is_packed, max_bad_share=0.3, rows=COUNT)[0]


def test_a_prepared_directory_gives_the_same_batches(tmp_path, file):
    prepare.write_dataset(file, tmp_path / "out")
    from_json, prepared = loader(file), loader(tmp_path / "out")
    for step in range(3):
        assert_equal(prepared[step], from_json[step])


@pytest.mark.slow
@PACKING
def test_worker_processes_give_the_same_batches(file, is_packed):
    data = loader(file, packing=is_packed, workers=2)
    ahead = data.iterate(2)
    for step in range(2, 7):
        assert_equal(next(ahead), loader(file, packing=is_packed)[step])
    ahead.close()
    assert data.stats["seen"] > 0


def test_measured_sizes_are_cached_until_the_file_changes(tmp_path, file, monkeypatch):
    cache = tmp_path / "cache"
    first = loader(file, packing=True, cache=cache)
    loader(file, packing=True, cache=cache, sequence_length=80)
    assert len(list(cache.iterdir())) == 2
    with monkeypatch.context() as patched:
        patched.setattr(
            pipeline.mixing.parallel, "map_samples", None
        )  # nothing may be measured again
        again = loader(file, packing=True, cache=cache)
    assert_equal(first[2], again[2])
    assert first.stats["left_out"] == again.stats["left_out"]
    tiny_data.write_json(file, tiny_data.write_records(tmp_path, COUNT + 1))
    assert loader(file, packing=True, cache=cache).stats["samples"] == COUNT + 1
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": {}}, "no sources"),
        ({"rows": 3, "hosts": 2}, "3 rows do not split over 2 hosts"),
        ({"template": "qwen"}, "template 'qwen' is unknown"),
        ({"template": "llama3"}, "the tokenizer does not have"),
        ({"sequence_length": 0}, "sequence_length must be at least 1"),
        ({"images_per_row": -1}, "images_per_row must be at least 0"),
        ({"seed": -1}, "must not be negative"),
    ],
)
def test_settings_that_do_not_fit_are_named(file, changes, message):
    with pytest.raises(UserError, match=message):
        loader(file, **changes)


@pytest.mark.parametrize(
    "vision", [tiny_data.Vision(mean=(0.5,)), tiny_data.Vision(0), tiny_data.Vision(num_patches=0)]
)
def test_a_vision_format_that_cannot_be(vision):
    with pytest.raises(UserError, match="an image needs a size, slots and 3 mean values"):
        examples.make_recipe(tiny_data.data(), tiny_data.byte_tokenizer(), vision)


def test_weights_are_given_for_all_sources_or_none(file):
    source = settings.SourceConfig(str(file), weight=1.0)
    with pytest.raises(UserError, match="either every source has a weight or none"):
        loader(sources={"a": source, "b": dataclasses.replace(source, weight=0.0)})
    with pytest.raises(UserError, match="weights must be positive"):
        loader(sources={"a": dataclasses.replace(source, weight=-1.0)})
