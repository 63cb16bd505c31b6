"""Training files of other projects are read, or refused with the right reason."""

from __future__ import annotations

import collections
import pathlib

import pytest

from wings_jax.data import inspection, samples, sources
from wings_jax.errors import UserError

EVAL = pathlib.Path(__file__).parents[2] / "shared" / "data" / "eval" / "train_json"
pytestmark = pytest.mark.skipif(not EVAL.exists(), reason="the training files are not here")

FACTORY, LMMS, QWEN = "llama_factory/", "lmms_finetune/example_data/", "qwen_vl_finetune/demo/"
GOOD = "good"
# file -> (image directory, form, causes and counts)
EXPECTED = {
    f"{FACTORY}identity.json": ("", "instruction, output", {GOOD: 91}),
    f"{FACTORY}mllm_demo.json": ("", "messages", {GOOD: 6}),
    f"{FACTORY}mllm_audio_demo.json": ("", None, {samples.MEDIA: 3}),
    f"{FACTORY}mllm_video_demo.json": ("", None, {samples.MEDIA: 3}),
    f"{FACTORY}mllm_video_audio_demo.json": ("", None, {samples.MEDIA: 3}),
    f"{FACTORY}v1_multimodal_demo.jsonl": ("", "messages", {samples.MISSING_IMAGE: 24}),
    f"{LMMS}celeba_image_eval.json": (
        f"{LMMS}images",
        "conversations",
        {samples.MISSING_IMAGE: 10},
    ),
    f"{LMMS}celeba_image_train.json": (
        f"{LMMS}images",
        "conversations",
        {GOOD: 30, samples.MISSING_IMAGE: 60},
    ),
    f"{LMMS}ego4d_video_eval.json": (f"{LMMS}images", None, {samples.MEDIA: 4}),
    f"{LMMS}ego4d_video_train.json": (f"{LMMS}images", None, {samples.MEDIA: 8}),
    f"{LMMS}multi_images.json": (
        f"{LMMS}images",
        "conversations",
        {GOOD: 1, samples.MISSING_IMAGE: 1},
    ),
    f"{LMMS}single_image.json": (f"{LMMS}images", "conversations", {GOOD: 2}),
    f"{LMMS}single_image_has_text_only.json": (f"{LMMS}images", "conversations", {GOOD: 4}),
    f"{LMMS}video.json": (f"{LMMS}images", None, {samples.MEDIA: 2}),
    f"{QWEN}single_images.json": ("qwen_vl_finetune", "conversations", {GOOD: 3}),
    f"{QWEN}video.json": ("", None, {samples.MEDIA: 3}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_samples_are_read_or_refused_by_cause(name):
    images, form, causes = EXPECTED[name]
    source = sources.open_source(EVAL / name, images=EVAL / images if images else None)
    findings = inspection.inspect_source(source)
    counts = collections.Counter(
        finding.reason.cause if finding.reason else GOOD for finding in findings
    )
    assert counts == causes
    assert {finding.form for finding in findings if finding.form} == ({form} if form else set())


def test_a_file_of_another_kind_is_refused():
    with pytest.raises(UserError, match="expected a list of records"):
        sources.open_source(EVAL / FACTORY / "dataset_info.json")


def test_every_file_is_in_the_table():
    files = {path.relative_to(EVAL).as_posix() for path in EVAL.rglob("*.json*")}
    assert files == {*EXPECTED, f"{FACTORY}dataset_info.json"}


def test_system_prompts_of_records_are_read():
    source = sources.open_source(EVAL / LMMS / "single_image.json", images=EVAL / LMMS / "images")
    first = source[0].conversations[0]
    assert first == {"from": "system", "value": "Answer the following questions about the image."}
    assert source[1].conversations[0]["from"] == "human"
