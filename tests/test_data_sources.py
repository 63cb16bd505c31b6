"""Data files: every record in its place, every mistake with its place."""

from __future__ import annotations

import io
import json
import pathlib
import pickle
import re
import threading

import pytest
import tensorflow_datasets as tfds
import tiny_data
from PIL import Image

from wings_jax.data import images, json_source, prepare, samples, sources
from wings_jax.errors import UserError

RECORDS = [
    {"id": 7, "image": "a.png", "conversations": tiny_data.turns("né", "ja 🙂"), "kind": "x"},
    {"conversations": []},
    {"id": "c", "image": ["a.png", "sub/b.png"], "conversations": tiny_data.turns("[{", "]\n}")},
    {"id": "d", "image": None, "conversations": tiny_data.turns("\u2028", "z")},
]


def dump(path: pathlib.Path, form: str) -> pathlib.Path:
    if form == "jsonl":
        path = path / "x.jsonl"
        path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS), "utf-8")
        return path
    path = path / "x.json"
    indent = 2 if form == "pretty" else None
    text = json.dumps(RECORDS, ensure_ascii=form == "ascii", indent=indent)
    path.write_text("\ufeff" + text + "\n" if form == "bom" else text, "utf-8")
    return path


@pytest.fixture(params=[1, 7, 1 << 22])
def block(request, monkeypatch) -> None:
    """Files are read in blocks of so many bytes: what is found must not depend on it."""
    monkeypatch.setattr(json_source, "_BLOCK", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("form", ["ascii", "plain", "pretty", "bom", "jsonl"])
def test_records_are_found_at_their_place(tmp_path, form):
    source = sources.open_source(dump(tmp_path, form))
    assert [source.record(i) for i in range(len(source))] == RECORDS
    ids = [source[i].id for i in range(4)]
    assert ids == ["7", f"x.{'jsonl' if form == 'jsonl' else 'json'}#1", "c", "d"]
    assert source[2].images == (tmp_path / "a.png", tmp_path / "sub/b.png")
    assert [len(source[i].images) for i in range(4)] == [1, 0, 2, 0]
    assert source[0].extra == {"kind": "x"}
    again = pickle.loads(pickle.dumps(source))
    assert again[2] == source[2]


def test_reading_from_many_threads(tmp_path):
    path = tiny_data.write_json(tmp_path / "x.json", [{"id": str(i)} for i in range(500)])
    source = sources.open_source(path)
    wrong = []

    def read(offset):
        wrong.extend(
            i
            for i in range(500)
            if source[(i * 7 + offset) % 500].id != str((i * 7 + offset) % 500)
        )

    threads = [threading.Thread(target=read, args=(offset,)) for offset in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", '[{"a": 1},\n {"b": }]', "line 2, column 8: Expecting value"),
        ("x.json", '[{"a": 1}\n {"b": 1}]', "line 2, column 2: expected ',' or ']'"),
        ("x.json", '[{"a": 1},]', "line 1, column 11: Expecting value"),
        ("x.json", '[{"a": 1}', "line 1, column 10: expected ',' or ']'"),
        ("x.json", '{"a": 1}', "line 1, column 1: expected a list of records"),
        ("x.json", "[{}]\n[{}]", "line 2, column 1: the list has ended, but text follows"),
        ("x.json", '[{}, "word"]', 'line 1, column 6: a record must be an object, this is "word"'),
        ("x.json", "", "line 1, column 1: expected a list of records"),
        ("x.json", "[]", "has no samples"),
        ("x.jsonl", "", "has no samples"),
        ("x.jsonl", '{"a": 1}\n{"b": \n', "Expecting value"),
        ("x.jsonl", '{"a": 1}\n\n{"b": 1} {"c": 1}\n', "line 3, column 9: expected one record per"),
        ("x.jsonl", '{"a": 1}\n{\n"b": 1}', "line 2, column 2: expected one record per line"),
    ],
)
def test_mistakes_have_line_and_column(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        sources.open_source(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("block")
def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'[{"id": "a"},\n{"id": "\xff"}]')
    with pytest.raises(UserError, match=r"x.json, line 2: not UTF-8"):
        sources.open_source(path)


def test_missing_things_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.json does not exist"):
        sources.open_source(tmp_path / "nowhere.json")
    path = tiny_data.write_json(tmp_path / "x.json", [{}])
    with pytest.raises(
        UserError, match=r"image directory .*/no-such of data file .* does not exist"
    ):
        sources.open_source(path, images=tmp_path / "no-such")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no dataset_info.json"):
        sources.open_source(tmp_path / "empty")


@pytest.mark.parametrize("image", [3, {"path": "x"}, ["a.png", None]])
def test_an_image_that_is_not_a_path(tmp_path, image):
    record = {"image": image, "conversations": tiny_data.turns("q", "a")}
    source = sources.open_source(tiny_data.write_json(tmp_path / "x.json", [record]))
    with pytest.raises(samples.BadSample, match="malformed: image is "):
        source[0]


def test_a_prepared_directory_has_the_same_samples(tmp_path):
    path = tiny_data.write_json(tmp_path / "x.json", tiny_data.write_records(tmp_path, 9))
    prepare.write_dataset(path, tmp_path / "out", split="test")
    before, after = (
        sources.open_source(path),
        sources.open_source(tmp_path / "out", split="test"),
    )
    assert len(before) == len(after) == 9
    for number in range(9):
        assert after[number].id == before[number].id
        assert after[number].conversations == before[number].conversations
        files = [images.image_bytes(path) for path in before[number].images]
        assert files == list(after[number].images)
    assert pickle.loads(pickle.dumps(after))[4] == after[4]
    assert len(sources.open_source(tmp_path / "out", split="test[:3]")) == 3
    with pytest.raises(UserError, match="split 'train': Unknown split"):
        sources.open_source(tmp_path / "out")


class _Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set of another author: one decoded image, no id."""

    VERSION = tfds.core.Version("1.0.0")
    name = "photos"

    def _info(self):
        text = tfds.features.Text()
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "conversations": tfds.features.Sequence({"from": text, "value": text}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"image": io.BytesIO(self.encoded), "conversations": tiny_data.turns("q", "a")}


def test_decoded_image_features_are_read_too(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (7, 7, 7)).save(file, "png")
    tfds.disable_progress_bar()
    _Photos.encoded = file.getvalue()
    _Photos(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    source = sources.open_source(tmp_path / "photos")
    assert source[0].id == "photos[train]#0"
    assert images.load_image(source[0].images[0]).getcolors() == [(12, (7, 7, 7))]
    assert source[0].conversations == tiny_data.turns("q", "a")
