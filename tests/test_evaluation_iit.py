"""Interleaved conversations: their settings, earlier turns, images, and what is scored."""

from __future__ import annotations

import re

import pytest

from wings_jax.evaluation import iit, tasks
from wings_jax.evaluation.benchmarks.record import TURNS
from wings_jax.scenes import drawings, skills


@pytest.fixture(scope="module")
def conversations():
    return iit.make_conversations(each=14)


def test_conversations_match_their_setting(conversations):
    assert [one.extra["setting"] for one in conversations[::14]] == list(iit.ROWS)
    for one in conversations:
        pattern = one.extra["setting"].strip("()").split(",")
        turns = one.conversations
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * len(pattern)
        assert len(one.extra["kinds"]) == len(pattern)
        markers = ["V" if "<image>" in turn["value"] else "T" for turn in turns[::2]]
        assert markers == pattern
        assert len(one.images) == pattern.count("V")
        last = one.extra["kinds"][-1]
        assert last in (iit.IMAGE_KINDS if pattern[-1] == "V" else iit.TEXT_KINDS)
        assert not skills.SKILLS[last].replayed if pattern[-1] == "T" else last != "sum"
    kinds = {one.extra["kinds"][-1] for one in conversations}
    assert kinds == {*iit.IMAGE_KINDS, *iit.TEXT_KINDS}


def test_earlier_turns_are_related_true_and_do_not_answer_the_last(conversations):
    shared = []
    for one in conversations:
        *before, last = zip(one.conversations[::2], one.conversations[1::2], strict=True)
        question, truth = (turn["value"] for turn in last)
        for asked, answered in before:
            assert "\n" not in asked["value"]  # no description beside an image
            assert asked["value"] != question
            assert answered["value"] in ("yes", "no") or answered["value"] not in truth.split()
            words = set(re.findall(r"\w+", asked["value"].lower()))
            shared.append(bool(words & set(re.findall(r"\w+", question.lower()))))
    assert sum(shared) > 0.9 * len(shared)
    riddles = {q: name for name, asked in skills.RIDDLES.items() for q in asked}
    riddle_turns = [
        (human["value"], gpt["value"])
        for one in conversations
        for human, gpt in zip(one.conversations[::2], one.conversations[1::2], strict=True)
        if human["value"] in riddles
    ]
    assert riddle_turns
    assert all(riddles[question] == answer for question, answer in riddle_turns)


def test_images_are_of_held_out_glyphs(monkeypatch):
    seen = []
    render = drawings.render

    def spy(objects, glyphs):
        seen.append(glyphs)
        return render(objects, glyphs)

    monkeypatch.setattr(drawings, "render", spy)
    one = iit.make_conversations(each=1)[-1]
    assert seen
    assert all(glyphs is drawings.load_glyphs("test") for glyphs in seen)
    assert one.images[0].shape == (64, 64, 3)


def test_conversations_are_deterministic(conversations):
    again = iit.make_conversations(each=14)
    assert [one.conversations for one in again] == [one.conversations for one in conversations]
    assert all(
        (a.images[0] == b.images[0]).all()
        for a, b in zip(again, conversations, strict=True)
        if a.images
    )


def test_the_last_question_is_scored():
    asked = tasks.read_items(tasks.TASKS["iit"], None)[:: iit.EACH // 2]
    assert [question.rows for question in asked] == [(row,) for row in iit.ROWS for _ in "ab"]
    for question in asked:
        before = question.extra.get(TURNS, ())
        assert len(before) == 2 * question.rows[0].count(",")
        assert all(
            turn["from"] == who for turn, who in zip(before, ("human", "gpt") * 9, strict=False)
        )
        assert question.answer
