"""Records in the forms that people have: read into turns and images, or refused by cause."""

from __future__ import annotations

import base64
import gzip
import io
import json
import pathlib
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from wings_jax.data import images, prepare, records, samples, sources, turns
from wings_jax.errors import UserError

HERE = pathlib.Path("images")


def png(value: int = 7) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 0)).save(file, "png")
    return file.getvalue()


ENCODED = base64.b64encode(png()).decode()
DATA_URL = f"data:image/png;base64,{ENCODED}"


def read(record: dict) -> tuple[list[tuple[str, str]], list]:
    """Returns the turns (speaker, text) and the images of a record."""
    sample = records.to_sample(record, "x#0", HERE)
    talk = turns.normalize_sample(sample)
    files = [str(image) if isinstance(image, pathlib.Path) else image for image in sample.images]
    return [(turn["from"], turn["value"]) for turn in talk], files


QA = [("human", "q"), ("gpt", "a")]
SEEN = [("human", "<image>q"), ("gpt", "a")]
ONE = ["images/a.png"]
TALK = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
IMAGE_TALK = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def parts(*content, answer="a"):
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}]


TEXT = {"type": "text", "text": "q"}
FORMS = {
    "LLaVA": ({"conversations": IMAGE_TALK, "image": "a.png"}, SEEN, ONE),
    "other spellings": (
        {"conversations": [{"from": "USER", "value": "q"}, {"from": "Assistant", "value": "a"}]},
        QA,
        [],
    ),
    "observation": (
        {"conversations": [{"from": "observation", "value": "q"}, {"from": "gpt", "value": "a"}]},
        QA,
        [],
    ),
    "roles in conversations": ({"conversations": MESSAGES}, QA, []),
    "messages": ({"messages": MESSAGES}, QA, []),
    "messages and images": (
        {"messages": [{"role": "user", "content": "<image>q"}, MESSAGES[1]], "images": ["a.png"]},
        SEEN,
        ONE,
    ),
    "conversation of pairs": ({"conversation": [{"human": "q", "assistant": "a"}]}, QA, []),
    "system message": (
        {"messages": [{"role": "system", "content": "s"}, *MESSAGES]},
        [("system", "s"), *QA],
        [],
    ),
    "system": ({"system": "s", "conversations": TALK}, [("system", "s"), *QA], []),
    "system_prompt": ({"system_prompt": "s", "conversations": TALK}, [("system", "s"), *QA], []),
    "empty system": ({"system": "", "conversations": TALK}, QA, []),
    "text parts": ({"messages": parts(TEXT, answer=[{"type": "text", "text": "a"}])}, QA, []),
    "value parts": (
        {
            "messages": parts(
                {"type": "image_url", "value": "a.png"}, {"type": "text", "value": "q"}
            )
        },
        SEEN,
        ONE,
    ),
    "image part": ({"messages": parts({"type": "image", "image": "a.png"}, TEXT)}, SEEN, ONE),
    "image part of the list": (
        {"messages": parts({"type": "image"}, TEXT), "images": ["a.png"]},
        SEEN,
        ONE,
    ),
    "image_url with a data URL": (
        {"messages": parts(TEXT, {"type": "image_url", "image_url": {"url": DATA_URL}})},
        [("human", "q<image>"), ("gpt", "a")],
        [png()],
    ),
    "input_image": (
        {
            "messages": parts(
                {"type": "input_image", "image_url": DATA_URL}, {"type": "input_text", "text": "q"}
            )
        },
        SEEN,
        [png()],
    ),
    "the word in a part": (
        {
            "messages": parts(
                {"type": "image", "image": "a.png"}, {"type": "text", "text": "<image>"}
            )
        },
        [("human", r"<image>\<image>"), ("gpt", "a")],
        ONE,
    ),
    "the word without images": (
        {"messages": parts({"type": "text", "text": "<image>"})},
        [("human", r"\<image>"), ("gpt", "a")],
        [],
    ),
    "Alpaca": ({"instruction": "q", "input": "", "output": "a"}, QA, []),
    "Alpaca with input": (
        {"instruction": "q", "input": "i", "output": "a", "system": "s"},
        [("system", "s"), ("human", "q\ni"), ("gpt", "a")],
        [],
    ),
    "query, response": ({"query": "q", "response": "a"}, QA, []),
    "history": (
        {"query": "q", "response": "a", "history": [["h", "b"]], "images": ["a.png"]},
        [("human", "h"), ("gpt", "b"), ("human", "<image>\nq"), ("gpt", "a")],
        ONE,
    ),
    "prompt, completion": ({"prompt": "q", "completion": "a"}, QA, []),
    "question, answer": ({"question": "q", "answer": "a"}, QA, []),
    "caption": ({"image": "a.png", "caption": "a"}, [("human", "<image>"), ("gpt", "a")], ONE),
    "text": ({"image": "a.png", "text": "a"}, [("human", "<image>"), ("gpt", "a")], ONE),
    "label": ({"file_name": "a.png", "label": "a"}, [("human", "<image>"), ("gpt", "a")], ONE),
    "bytes": ({"image": {"bytes": png(), "path": None}, "conversations": TALK}, None, [png()]),
    "base64 bytes": (
        {"image": {"bytes": ENCODED, "path": "x"}, "conversations": TALK},
        None,
        [png()],
    ),
    "path of a struct": (
        {"image": {"bytes": None, "path": "a.png"}, "conversations": TALK},
        None,
        ONE,
    ),
    "base64": ({"image": ENCODED, "conversations": TALK}, None, [png()]),
    "data URL": ({"image": DATA_URL, "conversations": TALK}, None, [png()]),
    "file URL": ({"image": "file:///b/c%20d.png", "conversations": TALK}, None, ["/b/c d.png"]),
    "weight 1": ({"weight": 1, "conversations": TALK, "video": None, "tools": "[]"}, QA, []),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_are_read(name):
    record, expected, files = FORMS[name]
    talk, found = read(record)
    assert found == files
    assert talk == (expected or [("human", "<image>\nq"), ("gpt", "a")])


REFUSED = [
    ({"video": "a.mp4", "conversations": TALK}, samples.MEDIA, "video is"),
    ({"messages": MESSAGES, "audios": ["a.mp3"]}, samples.MEDIA, "audios is"),
    ({"messages": parts({"type": "video", "video": "a.mp4"})}, samples.MEDIA, "'video'"),
    ({"image": "", "conversations": IMAGE_TALK}, samples.EMPTY_IMAGE, 'image is ""'),
    ({"images": [], "conversations": IMAGE_TALK}, samples.EMPTY_IMAGE, "images is []"),
    ({"image": None, "conversations": IMAGE_TALK}, samples.EMPTY_IMAGE, "image is null"),
    ({"image": None, "text": "a"}, samples.EMPTY_IMAGE, "without an image"),
    ({"weight": 0, "conversations": TALK}, samples.WEIGHT, "weight is 0"),
    ({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0}]}, samples.WEIGHT, "weight is 0"),
    (
        {"messages": [MESSAGES[0], {**MESSAGES[1], "train": False}]},
        samples.WEIGHT,
        "train is false",
    ),
    ({"image": "https://a.b/c.png", "conversations": TALK}, samples.URL, "https://a.b"),
    (
        {"messages": parts({"type": "image_url", "image_url": {"url": "s3://a/b"}})},
        samples.URL,
        "s3",
    ),
    ({"conversations": TALK, "tools": [{"name": "f"}]}, samples.TOOLS, "tools is"),
    ({"messages": [{"role": "tool", "content": "x"}, *MESSAGES]}, samples.TOOLS, "'tool'"),
    ({"messages": [{**MESSAGES[0], "tool_calls": [1]}]}, samples.TOOLS, "tool_calls is"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, samples.PREFERENCE, "chosen"),
    ({"goal": "q", "label": 3}, samples.UNKNOWN_FORM, "its keys are id, goal, label"),
    ({}, samples.UNKNOWN_FORM, "its keys are id"),
    ({"messages": [{"role": "critic", "content": "x"}]}, samples.MALFORMED, "speaker 'critic'"),
    ({"messages": [{"role": "user", "content": None}]}, samples.MALFORMED, "value is null"),
    ({"messages": parts({"type": "image"}), "images": []}, samples.MARKERS, "0 images in the"),
    ({"messages": parts({"type": "image"}), "images": ["a", "b"]}, samples.MARKERS, "2 images in"),
    ({"query": "q", "response": "a", "history": 5}, samples.MALFORMED, "history has 5"),
    ({"query": "q", "response": "a", "history": [["h"]]}, samples.MALFORMED, "history has"),
    ({"instruction": "q", "input": {"a": 1}, "output": "a"}, samples.MALFORMED, "input is"),
    ({"query": "q", "response": 4}, samples.MALFORMED, "value is 4"),
    ({"system": 4, "conversations": TALK}, samples.MALFORMED, "system is 4, not a text"),
    (
        {"system": "s", "conversations": [{"from": "system", "value": "t"}, *TALK]},
        samples.MALFORMED,
        "and there is a system turn",
    ),
    (
        {"image": "data:image/png;base64,@", "conversations": TALK},
        samples.UNREADABLE_IMAGE,
        "base64",
    ),
    (
        {"image": "data:image/png,abc", "conversations": TALK},
        samples.UNREADABLE_IMAGE,
        "not base64",
    ),
]


@pytest.mark.parametrize(("record", "cause", "detail"), REFUSED)
def test_what_cannot_be_meant_is_refused_by_cause(record, cause, detail):
    with pytest.raises(samples.BadSample) as raised:
        read({"id": "name", **record})
    assert raised.value.cause == cause
    assert detail in raised.value.detail


def test_a_refused_record_keeps_its_id():
    with pytest.raises(samples.BadSample) as raised:
        records.to_sample({"id": "a\ud800", "video": "x", "conversations": TALK}, "x#0", HERE)
    assert raised.value.sample_id == r"a\ud800"
    assert pickle.loads(pickle.dumps(raised.value)).sample_id == r"a\ud800"


# --- files -------------------------------------------------------------------------------------

ROWS = [
    {"id": "a", "image": "a.png", "conversations": IMAGE_TALK},
    {"id": "b", "image": None, "conversations": [{"from": "human", "value": "né"}, TALK[1]]},
]


def lines(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_file(path: pathlib.Path) -> None:
    name = path.name.lower()
    if name.endswith((".csv", ".tsv")):
        delimiter = "," if name.endswith("csv") else "\t"
        rows = [("query", "response", "images"), ("q", 'a"\nb', '["a.png"]'), ("né", "c", "")]
        cells = [[f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row] for row in rows]
        path.write_text("\ufeff" + "\r\n".join(delimiter.join(row) for row in cells), "utf-8")
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=1)
    elif name.endswith(".arrow"):
        table = pa.Table.from_pylist(ROWS)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        text = json.dumps(ROWS) if ".json" in name and "jsonl" not in name else lines(ROWS)
        content = ("\ufeff" + text).encode()
        path.write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)


JSON_NAMES = ["x.json", "x.JSON", "x.jsonl", "x.ndjson", "x.NDJSON", "x.json.gz", "x.jsonl.GZ"]


@pytest.mark.parametrize("name", [*JSON_NAMES, "x.csv", "x.TSV", "x.parquet", "x.arrow"])
def test_file_formats(tmp_path, name):
    path = tmp_path / name
    write_file(path)
    (tmp_path / "a.png").write_bytes(png())
    source = sources.open_source(path)
    for opened in (source, pickle.loads(pickle.dumps(source))):
        first, second = opened[0], opened[1]
        assert [images.image_bytes(image) for image in first.images] == [png()]
        assert second.images == ()
        asked = [turns.normalize_sample(sample)[0]["value"] for sample in (first, second)]
        assert asked[0] in ("<image>q", "<image>\nq")
        assert asked[1] == "né"
    assert len(source) == 2


@pytest.mark.parametrize("kind", ["save_to_disk", "DatasetDict", "parquet shards"])
def test_directories_of_tables(tmp_path, kind):
    directory = tmp_path / "data" / "train" if kind == "DatasetDict" else tmp_path / "data"
    directory.mkdir(parents=True)
    suffix = "parquet" if kind == "parquet shards" else "arrow"
    for number in range(2):
        write_file(directory / f"data-{number:05}.{suffix}")
    if kind == "DatasetDict":
        (tmp_path / "data" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    source = sources.open_source(tmp_path / "data")
    assert [source[number].id for number in range(len(source))] == ["a", "b", "a", "b"]
    if kind == "DatasetDict":
        with pytest.raises(UserError, match="has no split 'test'"):
            sources.open_source(tmp_path / "data", split="test")


def test_prepared_data_of_another_form_is_the_same(tmp_path):
    rows = [
        {
            "messages": parts(
                {"type": "image", "image": DATA_URL}, {"type": "text", "text": "<image>?"}
            )
        },
        {"system": "s", "query": "<image>?", "response": "a <image>"},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text(lines(rows))
    prepare.write_dataset(path, tmp_path / "out")
    before, after = sources.open_source(path), sources.open_source(tmp_path / "out")
    for number in range(2):
        assert turns.normalize_sample(after[number]) == turns.normalize_sample(before[number])
        assert after[number].images == before[number].images


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json.gz", b"not gzip", "x.json.gz cannot be decompressed: Not a gzipped file"),
        ("x.json.gz", gzip.compress(b"[{}]" * 99, mtime=0)[:-9], "cannot be decompressed: "),
        ("x.parquet", b"PAR1 and more", "x.parquet cannot be read: "),
        ("x.arrow", b"ARROW1 and more", "x.arrow cannot be read: "),
        ("x.arrow", b"", "x.arrow cannot be read: "),
        ("x.csv", b'a,b\n1,2\n"1,2\n', "x.csv, after line 2: "),
        ("x.csv", b"a,b\n1,2,3\n", "x.csv, after line 2: more cells than the header's 2"),
        ("x.csv", b"a,b\n1,\xff\n", "x.csv, after line 1: "),
        ("x.csv", b"a,b\n", "x.csv has no samples"),
        ("x.json", b"[" * 100_000, "x.json: nested too deeply"),
        ("x.json", b'[{"a": ' + b"9" * 5000 + b"}]", "x.json: Exceeds the limit"),
        ("x.json", b"version https://git-lfs.github.com/spec/v1\noid", "is a git-lfs pointer"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "is a git-lfs pointer"),
        ("x.json", b'{"a": 1}\n{"a": 2}', "one record per line is named .jsonl"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^data file ") as raised:
        sources.open_source(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a\0b.json", "\ud800.json", "x" * 300 + ".json"])
def test_data_paths_that_cannot_be(tmp_path, name):
    with pytest.raises(UserError, match=r"does not exist|too long") as raised:
        sources.open_source(tmp_path / name)
    str(raised.value).encode()


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"id": 1}, {"id": 2}]')
    source = sources.open_source(path)
    path.write_text('[{"id": "longer"}, {"id": 2}]')
    with pytest.raises(UserError, match="was changed while it was in use"):
        source[1]
