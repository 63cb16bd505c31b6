"""WebDataset shards: members of one key are one sample, with random access."""

from __future__ import annotations

import io
import json
import pathlib
import pickle
import tarfile

import pytest
import tiny_data
from PIL import Image

from wings_jax.data import inspection, samples, sources, turns
from wings_jax.errors import UserError


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), (shade, 0, 0)).save(stream, "png")
    return stream.getvalue()


def write_tar(path: pathlib.Path, members: dict[str, bytes]) -> pathlib.Path:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


TALK = {"id": "talk", "image": "http://x/y.jpg", "conversations": tiny_data.turns("<image>q", "a")}
TWO = {"conversations": tiny_data.turns("<image><image>which?", "the first")}


@pytest.fixture
def shards(tmp_path) -> pathlib.Path:
    """Two shards: a caption, a conversation, one with two images, and one without."""
    write_tar(
        tmp_path / "b-1.tar",
        {
            "c/3.0.png": png(3),
            "c/3.1.png": png(4),
            "c/3.json": json.dumps(TWO).encode(),
            "c/4.json": json.dumps({"question": "1 + 1?", "answer": "2"}).encode(),
        },
    )
    write_tar(
        tmp_path / "a-0.tar",
        {
            "c/1.png": png(1),
            "c/1.txt": "a red área".encode(),
            "c/1.md5": b"unused",
            "c/2.json": json.dumps(TALK).encode(),
            "c/2.PNG": png(2),
        },
    )
    return tmp_path


def test_tar_shards_are_samples_with_their_images(shards):
    source = sources.open_source(shards)
    read = [source[index] for index in (3, 1, 0, 2)]  # in any order
    assert [sample.id for sample in read[:2]] == [f"{shards.name}#3", "talk"]
    assert [list(sample.images) for sample in read] == [[], [png(2)], [png(1)], [png(3), png(4)]]
    assert [turn["value"] for turn in turns.normalize_sample(read[2])] == ["<image>", "a red área"]
    assert [turn["value"] for turn in read[0].conversations] == ["1 + 1?", "2"]
    assert pickle.loads(pickle.dumps(source))[1] == read[1]

    findings = inspection.inspect_source(source)
    assert [finding.reason for finding in findings] == [None] * 4
    one = sources.open_source(shards / "b-1.tar")
    assert len(one) == 2


def test_tar_members_that_are_bad_are_bad_samples(tmp_path):
    path = write_tar(
        tmp_path / "x.tar",
        {"1.json": b"{", "2.json": b"[]", "3.txt": b"\xff", "4.txt": b"no image", "5.png": b"x"},
    )
    causes = [
        finding.reason.cause for finding in inspection.inspect_source(sources.open_source(path))
    ]
    assert causes[:3] == [samples.MALFORMED] * 3
    assert causes[3:] == [samples.UNKNOWN_FORM] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a tar file at all" * 99, "x.tar cannot be read as a tar file"),
        (b"\x1f\x8b" + bytes(600), "decompress it first"),
        (None, "x.tar: unexpected end of data|x.tar cannot be read as a tar file: unexpected end"),
    ],
)
def test_tar_files_that_are_damaged_are_named(shards, content, message):
    path = shards / "x.tar"
    path.write_bytes(content or (shards / "a-0.tar").read_bytes()[:700])
    with pytest.raises(UserError, match=message):
        sources.open_source(path)
