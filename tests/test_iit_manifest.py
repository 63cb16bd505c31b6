"""IIT from benchmarks: anchors, companions, manifests, conversations, and a whole run."""

from __future__ import annotations

import json
import shutil

import benchmark_files
import numpy as np
import pytest
from benchmark_files import REAL, write, write_arrow, write_image, write_lines

from wings_jax.errors import UserError
from wings_jax.evaluation.interleaved import (
    command,
    conversation,
    embedding,
    manifest,
    pool,
    report,
    selection,
)

WORDS = benchmark_files.IIT_WORDS


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return benchmark_files.write_iit_data(tmp_path_factory.mktemp("data"))


def build(root, out, **more):
    values = {"sources": pool.MINI_SOURCES, "anchors": {"en": 4}, "embedder": "tfidf", **more}
    return command.build_manifest(out, root, **values)


@pytest.fixture(scope="module")
def built(root, tmp_path_factory):
    path = tmp_path_factory.mktemp("manifest") / "iit.jsonl"
    build(root, path)
    return path


def test_manifest_has_no_text_of_a_data_set(built, root):
    text = built.read_text()
    assert "nlvr:dev:" in text
    for phrase in ("Open the", "made of", "How many", "There is", "turn the"):
        assert phrase not in text
    assert json.loads(text.splitlines()[0]) == {
        "format": "iit-v1",
        "seed": 0,
        "embedder": "tfidf",
        "embedder_version": embedding.embedder_version("tfidf"),
        "sources": ["gsm8k", "nlvr", "openbookqa", "piqa"],
        "anchors": 8,
    }


def test_building_again_gives_the_same_bytes(built, root, tmp_path):
    build(root, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == built.read_bytes()
    build(root, tmp_path / "other.jsonl", seed=1)
    assert (tmp_path / "other.jsonl").read_bytes() != built.read_bytes()


def test_anchors_are_stratified_and_companions_are_near_and_of_other_sources(built, root):
    entries = manifest.read_manifest(built).entries
    assert [entry.modality for entry in entries] == ["T"] * 4 + ["V"] * 4
    sources = [report.source_of(entry.anchor.uid) for entry in entries[:4]]
    assert set(sources) == {"piqa", "openbookqa", "gsm8k"}

    for entry in entries:
        assert len(entry.companions) == len(entry.shuffled) == 2
        uids = [item.uid for item in (*entry.companions, entry.anchor)]
        assert len(set(uids)) == 3
        assert list(entry.cosines) == sorted(entry.cosines)  # the closest one is last
        for companion in entry.companions:
            assert report.source_of(companion.uid) != report.source_of(entry.anchor.uid)
            assert not companion.uid.startswith("nlvr")
        assert not {item.uid for item in entry.shuffled} & set(uids)

    # The nearest question is about the same thing, where one is left.
    items = {item.uid: item for item in pool.read_pool(pool.MINI_SOURCES, root)[0]}
    same = [
        any(
            word in items[entry.anchor.uid].text and word in items[entry.companions[-1].uid].text
            for word in WORDS
        )
        for entry in entries
    ]
    assert sum(same) >= 6
    counts = [item.uid for entry in entries for item in entry.companions]
    assert max(map(counts.count, counts)) <= selection.MAX_USES


def test_near_duplicates_and_the_same_stem_are_no_companions():
    def item(number, question):
        return pool.PoolItem(f"u{number}", "s", "en", "T", "", question, ("a", "b"), 0)

    texts = [item(0, "Which?"), item(1, "which"), item(2, "x"), item(3, "y"), item(4, "z")]
    vectors = np.eye(5, dtype=np.float32)
    cosines = np.array([1.0, 0.9, 0.96, 0.5, 0.4], np.float32)
    chosen = selection.choose_companions(texts[0], texts, cosines, vectors, {})
    assert chosen == [4, 3]
    assert selection.choose_companions(texts[0], texts, cosines, vectors, {3: 2}) == [4]


def test_languages_are_kept_apart():
    def item(number, language, modality="T"):
        return pool.PoolItem(
            f"{language}{number}", "s", language, modality, "", f"question {number}", ("a", "b"), 0
        )

    items = [item(n, language) for n in range(6) for language in ("en", "zh")]
    for language in ("en", "zh"):
        for found in selection.select_language(items, language, 2, embedder="tfidf", seed=0):
            assert {one.language for one in (*found.companions, *found.shuffled)} == {language}
    assert selection.select_language(items[:2], "en", 2, embedder="tfidf", seed=0) == []


def test_pool_leaves_out_what_is_no_single_choice_question(root, tmp_path):
    items, missing = pool.read_pool(("piqa", "mmlu"), root, is_default=True)
    assert len(items) == len(WORDS)
    assert len(missing) == 1
    assert missing[0].startswith("mmlu: no files")
    with pytest.raises(UserError, match="mmlu: no files"):
        pool.read_pool(("mmlu",), root)
    with pytest.raises(UserError, match="--sources: no benchmark 'x'"):
        pool.read_pool(("x",), root)

    rows = [
        {"goal": "a " * 401, "sol1": "x", "sol2": "y"},
        {"goal": "Same", "sol1": "x", "sol2": "y"},
        {"goal": "same ", "sol1": "X", "sol2": "y"},
        {"goal": "Empty", "sol1": " ", "sol2": "y"},
    ]
    write_lines(tmp_path, "piqa/valid.jsonl", rows)
    write(tmp_path, "piqa/valid-labels.lst", "0\n" * 4)
    assert [item.question for item in pool.read_pool(("piqa",), tmp_path)[0]] == ["Same"]


def test_numbers_of_gsm8k_become_options(root):
    items = pool.read_pool(("gsm8k",), root)[0]
    assert len(items) == len(WORDS)
    for number, item in enumerate(items):
        assert item.options[item.answer] == str(number + 2)
        assert len(set(item.options)) == 4


def test_conversations_of_a_manifest(built, root):
    turns = command.read_turns(built, root, is_shuffled=False)
    items = command.make_items(turns, {})
    assert len(items) == 8 * 3
    by_id = {item.id: item for item in items}
    for anchor, of_anchor in turns.items():
        modality = of_anchor[-1].item.modality
        found = [by_id[f"{anchor}/{name}"] for name in conversation.settings_of(modality)]

        # The scored question is the same everywhere, and has its letter.
        assert len({item.answer for item in found}) == 1
        last = of_anchor[-1]
        assert all(item.options[item.answer] == last.options[last.answer] for item in found)
        assert all(last.text in item.question for item in found)
        assert [len(item.extra["turns"]) for item in found] == [0, 2, 4]
        assert [len(item.images) for item in found] == [int(modality == "V")] * 3
        assert [item.question.count("<image>") for item in found] == [int(modality == "V")] * 3

        # The closest companion stands next to it, with its true answer.
        history = found[2].extra["turns"]
        assert history[:1] + history[2:3] != history[:2]
        assert history[-2]["value"].endswith(of_anchor[1].text)
        assert [turn["value"] for turn in history[1::2]] == [turn.letter for turn in of_anchor[:-1]]
        assert history[0]["value"] == of_anchor[0].text  # nothing before it to be connected with


def test_shuffled_histories_differ_in_the_earlier_questions_only(built, root):
    gold, shuffled = (
        command.make_items(command.read_turns(built, root, is_shuffled=flag), {})
        for flag in (False, True)
    )
    assert [(one.id, one.question, one.answer) for one in gold] == [
        (one.id, one.question, one.answer) for one in shuffled
    ]
    assert all(
        (one.extra["turns"] != other.extra["turns"]) == bool(one.extra["turns"])
        for one, other in zip(gold, shuffled, strict=True)
    )


def test_rotation_moves_the_right_option():
    item = pool.PoolItem("u", "s", "en", "T", "sociology", "Q?", ("a", "b", "c"), 0)
    for rotation, letter in enumerate("ACB"):
        turn = conversation.make_turn(item, manifest.ManifestItem("u", "", "", rotation, 0))
        assert turn.letter == letter
        assert turn.options[turn.answer] == "a"
        assert turn.text.startswith(
            "There is a single choice question about sociology. Answer the question by replying "
            "A, B or C.\nQuestion: Q?\nA. "
        )


def test_chinese_wording_and_inline_images():
    item = pool.PoolItem("u", "s", "zh", "V", "", "图<image>中是什么？", ("猫", "狗"), 1)
    turn = conversation.make_turn(item, manifest.ManifestItem("u", "", "", 0, 3))
    assert turn.spoken(is_first=True).count("<image>") == 1
    assert turn.spoken(is_first=False).startswith(conversation.TEXT_CONNECTIVES["zh"][3])
    assert "请回答 A 或 B" in turn.text


def test_another_form_of_the_files_gives_the_same_conversations(built, root, tmp_path):
    shutil.copytree(root, tmp_path / "data")
    rows = [json.loads(line) for line in (root / "piqa/valid.jsonl").read_text().splitlines()]
    shutil.rmtree(tmp_path / "data/piqa")
    labeled = [{**row, "label": 0} for row in rows]
    write_arrow(tmp_path / "data", "hf_arrow/piqa/plain_text/validation/data-0.arrow", labeled)
    made = [
        [(item.question, item.answer) for item in command.make_items(turns, {})]
        for turns in (
            command.read_turns(built, root, is_shuffled=False),
            command.read_turns(built, tmp_path / "data", is_shuffled=False),
        )
    ]
    assert made[0] == made[1]


def test_other_files_are_refused(built, root, tmp_path):
    shutil.copytree(root, tmp_path / "data")
    path = tmp_path / "data/piqa/valid.jsonl"
    path.write_text(path.read_text().replace("turn the", "twist the"))
    with pytest.raises(UserError, match=r"piqa:val:valid-\d: the text is not the one"):
        command.read_turns(built, tmp_path / "data", is_shuffled=False)

    shutil.copytree(root, tmp_path / "images")
    for number in range(len(WORDS)):
        write_image(tmp_path, f"images/nlvr/dev/images/0/dev-{number}-0-0.png", "green")
    with pytest.raises(UserError, match=r"nlvr:dev:\d-0: the image is not the one"):
        command.read_turns(built, tmp_path / "images", is_shuffled=False)

    shutil.rmtree(tmp_path / "data/gsm8k")
    with pytest.raises(UserError, match="gsm8k: no files of its test split"):
        command.read_turns(built, tmp_path / "data", is_shuffled=False)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text.replace("iit-v1", "iit-v9"), "has format 'iit-v9'"),
        (lambda text: text[: text.rindex("\n{")], "has 7 of its 8 anchors: it was cut off"),
        (lambda text: text[:-40], "line 9 is not of an IIT manifest"),
        (lambda text: "", "line 1 is not of an IIT manifest"),
    ],
)
def test_damaged_manifest(change, expected, built, tmp_path):
    path = write(tmp_path, "iit.jsonl", change(built.read_text()))
    with pytest.raises(UserError) as caught:
        manifest.read_manifest(path)
    assert expected in str(caught.value)


def test_wordllama_finds_neighbors_that_share_no_word():
    pytest.importorskip("wordllama")
    texts = ["How do I bake bread?", "Which oven makes a good loaf?", "Who won the election?"]
    vectors = embedding.embed_texts("wordllama", texts, "en")
    cosines = embedding.similarities(vectors, [0])[0]
    assert cosines[0] == pytest.approx(1, abs=1e-5)
    assert cosines[1] > cosines[2] + 0.1


def test_unknown_embedder():
    with pytest.raises(UserError, match="--embedder: no embedder 'x'"):
        embedding.choose_embedder("x")
    assert embedding.choose_embedder("tfidf") == "tfidf"


def test_real_data_make_a_manifest(tmp_path):
    if not REAL.exists():
        pytest.skip(f"{REAL} is not there")
    made = build(REAL, tmp_path / "iit.jsonl", sources=("piqa", "openbookqa", "nlvr"))
    assert len(made.entries) == 8
    turns = command.read_turns(tmp_path / "iit.jsonl", REAL, is_shuffled=True)
    assert len(command.make_items(turns, {})) == 24
