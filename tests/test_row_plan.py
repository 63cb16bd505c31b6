"""Which samples are in which batch: modalities, their shares, lengths, batches without images."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import tiny_data
import training_cases
from tiny_data import loader

from wings_jax.data import settings
from wings_jax.errors import UserError
from wings_jax.model import layout, vision
from wings_jax.training import meshes, optim, program

COUNT = 48  # samples, of which a third are text only
# The first rows of the file without and with packing, in version 0.1.
ORDER = ["s42", "s18", "s19", "s10", "s2", "s15"]
PACKED_ORDER = [["s4", "s18", "s38", "s15"], ["s8", "s42", "s14"]]
TEXT = {f"s{number}" for number in range(0, COUNT, 3)}


@pytest.fixture
def file(tmp_path):
    records = tiny_data.write_records(tmp_path, COUNT)
    return tiny_data.write_json(tmp_path / "x.json", records)


def is_text_only(batch: layout.Batch) -> bool:
    return batch.images.shape[1] == 0


def mixed() -> dict:
    """Returns changes of a config: half of the batches are of the scenes' text-only replay."""
    replay = training_cases.folder() / "scenes/train_replay.json"
    return {
        "data__batch_by_modality": True,
        "data__text_share": 0.5,
        "data__sources__replay": {"path": str(replay)},
    }


@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
def test_batches_by_modality_hold_every_sample_and_skip_images_of_text(file, is_packed):
    data = loader(file, batch_by_modality=True, packing=is_packed, rows=2)
    seen = []
    for step in range(data.steps_per_epoch):
        ids = data.sample_ids(step)
        assert {one in TEXT for one in ids} == {is_text_only(data[step])}
        assert data[step].images.shape[1] == (0 if is_text_only(data[step]) else 2)
        seen += ids

    if is_packed:  # what is left of a modality's rows after its last whole batch comes later
        assert len(seen) == len(set(seen)) > 0.8 * COUNT
    else:
        assert sorted(seen) == sorted(f"s{number}" for number in range(COUNT))
    assert data.stats["left_out"]["bad"] == 0


@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
def test_batches_by_modality_are_a_pure_function_of_the_step_on_any_hosts(file, is_packed):
    changes = {"batch_by_modality": True, "packing": is_packed, "length_buckets": ()}
    whole = loader(file, **changes)
    steps = [whole[step] for step in range(9)]
    assert {is_text_only(batch) for batch in steps} == {True, False}

    ahead = loader(file, **changes).iterate(4)
    for step in range(4, 9):
        jax.tree.map(np.testing.assert_array_equal, next(ahead), steps[step])
    ahead.close()

    parts = [loader(file, **changes, host=host, hosts=2) for host in range(2)]
    for step in range(9):
        joined = jax.tree.map(lambda *rows: np.concatenate(rows), *[part[step] for part in parts])
        jax.tree.map(np.testing.assert_array_equal, joined, steps[step])


def test_off_by_default_and_then_the_order_is_unchanged(file):
    assert not settings.DataConfig().batch_by_modality
    # The order of the released version, which runs in progress depend on.
    assert loader(file, rows=6).sample_ids(0) == ORDER
    packed = [loader(file, packing=True, rows=2).sample_ids(step) for step in (0, 5)]
    assert packed == PACKED_ORDER


def test_length_buckets_are_the_lengths_of_the_batches(file):
    data = loader(file, length_buckets=(35, 40), sequence_length=96, rows=2)
    lengths, seen = set(), []
    for step in range(data.steps_per_epoch):
        batch = data[step]
        length = batch.targets.shape[1]
        used = (batch.layout.modality != layout.PADDING).sum(1)
        assert (used <= length).all()
        assert (used > {35: 0, 40: 35, 96: 40}[length]).all()
        lengths.add(length)
        seen += data.sample_ids(step)
    assert lengths == {35, 40, 96}
    assert len(set(seen)) >= COUNT - 4


@pytest.mark.parametrize("is_weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("by_modality", [False, True], ids=["mixed", "by modality"])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_text_share_is_the_share_of_the_rows(file, is_weighted, by_modality, share):
    source = settings.SourceConfig(str(file), weight=1.0 if is_weighted else 0.0)
    sources = {"a": source, "b": dataclasses.replace(source, weight=3 * source.weight)}
    data = loader(sources=sources, text_share=share, batch_by_modality=by_modality, rows=4)
    ids = [one for step in range(40) for one in data.sample_ids(step)]
    assert sum(one in TEXT for one in ids) == pytest.approx(share * 160, abs=4)
    # An epoch has as many rows as the samples that are used.
    rows = 2 * {0.0: COUNT - len(TEXT), 0.25: COUNT, 1.0: len(TEXT)}[share]
    assert data.steps_per_epoch == rows // 4


def test_modality_of_a_source_filters_its_samples(file):
    source = settings.SourceConfig(str(file), modality="image")
    data = loader(sources={"a": source}, rows=4)
    assert data.steps_per_epoch == (COUNT - len(TEXT)) // 4
    ids = {one for step in range(data.steps_per_epoch) for one in data.sample_ids(step)}
    assert not ids & TEXT
    assert len(ids) == COUNT - len(TEXT)

    # The images of one source with the text of another: every sample once per epoch.
    both = {"a": source, "b": dataclasses.replace(source, modality="text")}
    data = loader(sources=both, rows=4)
    ids = [one for step in range(data.steps_per_epoch) for one in data.sample_ids(step)]
    assert len(ids) == len(set(ids)) == COUNT


def test_counted_images_are_cached_and_broken_records_are_found_in_the_run(tmp_path):
    records = tiny_data.write_records(tmp_path, COUNT)
    records[0] = {"id": "broken"}
    file = tiny_data.write_json(tmp_path / "x.json", records)
    data = loader(file, batch_by_modality=True, cache=tmp_path / "cache", rows=1)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for step in range(data.steps_per_epoch):
        data[step]
    assert data.stats["bad"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_share": 1.5}, "data.text_share: 1.5 is neither -1 nor from 0 to 1"),
        ({"length_buckets": (80, 70)}, r"length_buckets: \(80, 70\) must ascend"),
        ({"length_buckets": (96,)}, "must ascend and be less than data.sequence_length, 96"),
        ({"length_buckets": (70,), "packing": True}, "packed rows are full already"),
    ],
)
def test_settings_of_the_plan_that_do_not_fit(file, changes, message):
    with pytest.raises(UserError, match=message):
        loader(file, **changes)


def test_a_modality_that_no_sample_has_is_named(tmp_path):
    records = tiny_data.write_records(tmp_path, 12)[::3]  # text only
    file = tiny_data.write_json(tmp_path / "x.json", records)
    with pytest.raises(
        UserError, match=r"text_share: 0\.5, but no source has a sample with an image"
    ):
        loader(file, text_share=0.5)

    source = settings.SourceConfig(str(file), modality="image")
    message = r"sources.a.modality: .*x.json has no sample with an image that can be used, of 4"
    with pytest.raises(UserError, match=message):
        loader(sources={"a": source})
    with pytest.raises(UserError, match="modality: 'images' is not one of all, image, text"):
        loader(sources={"a": dataclasses.replace(source, modality="images")})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run whose batches are text only, or of images only."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return training_cases.run(workdir, **mixed(), steps=4), workdir


def test_text_only_step_equals_the_step_with_blank_images_and_has_no_tower(whole, monkeypatch):
    run = whole[0]
    text = next(run.loader[step] for step in range(4) if is_text_only(run.loader[step]))
    side = run.arch.vision.image_size
    blank = dataclasses.replace(text, images=np.zeros((8, 1, side, side, 3), np.uint8))
    placed = [
        meshes.place_batch(batch, run.mesh, batch_size=8, accumulation=1) for batch in (text, blank)
    ]

    results = []
    with jax.set_mesh(run.mesh):
        for batch in placed:
            state = jax.tree.map(lambda x: x.copy(), run.state)  # the update donates it
            results.append(jax.device_get(run.update(state, batch)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), *results)
    assert results[0][1]["targets"] > 0

    # Without images the step is traced without the tower.
    def refuse(*_):
        raise AssertionError("the tower is computed")

    monkeypatch.setattr(vision.VisionTower, "__call__", refuse)
    optimizer = optim.make_optimizer(
        run.state.trained,
        optim.label_groups({**run.state.trained, **run.state.frozen}, run.config.optimizer),
        run.config.optimizer,
        4,
    )
    update = program.jit_update(run.config, run.arch, optimizer, run.state)
    with jax.set_mesh(run.mesh):
        update.lower(run.state, placed[0])
        with pytest.raises(AssertionError, match="the tower is computed"):
            update.lower(run.state, placed[1])


def test_training_by_modality_resumes_bitwise(whole, tmp_path):
    run, workdir = whole
    assert {is_text_only(run.loader[step]) for step in range(2, 4)} == {True, False}

    changes = {**mixed(), "steps": 4, "checkpoint_every": 2}
    ready = training_cases.set_up(tmp_path / "run", **changes)
    ready.steps = 2
    with jax.set_mesh(ready.mesh):
        training_cases.loop.train(ready)
    training_cases.run(tmp_path / "run", **changes)
    assert training_cases.losses(tmp_path / "run") == training_cases.losses(workdir)
