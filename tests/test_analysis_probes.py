"""Probes: which conversations attention is measured on, and what their slots count as."""

from __future__ import annotations

import dataclasses

import inference_cases
import numpy as np
import pytest
import tiny_data

from wings_jax import config
from wings_jax.analysis import probes, slot_classes
from wings_jax.analysis.probes import Variant
from wings_jax.analysis.slot_classes import CLASSES, GROUPS
from wings_jax.data import samples
from wings_jax.model import layout

EXCLUDED, BEFORE, IMAGE, BETWEEN, AFTER = range(5)
ALL = GROUPS.index("all")


def test_classes_and_groups_of_a_conversation_with_two_images():
    text, image = layout.TEXT, layout.IMAGE
    modality = np.array([text, text, text, image, image, text, image, text, text])
    expected = [EXCLUDED, EXCLUDED, BEFORE, IMAGE, IMAGE, BETWEEN, IMAGE, AFTER, AFTER]
    np.testing.assert_array_equal(slot_classes.classify(modality, 2), expected)
    np.testing.assert_array_equal(slot_classes.classify(modality, 7)[:4], [EXCLUDED] * 3 + [IMAGE])
    groups = dict(zip(GROUPS, slot_classes.group(modality, 8).T, strict=True))
    np.testing.assert_allclose(groups["all"], [1 / 8] * 8 + [0])
    np.testing.assert_allclose(groups["after"], [0] * 7 + [1, 0])
    np.testing.assert_allclose(groups["text"] * 5, [1, 1, 1, 0, 0, 1, 0, 1, 0])
    np.testing.assert_allclose(groups["image"] * 3, [0, 0, 0, 1, 1, 0, 1, 0, 0])
    np.testing.assert_allclose(sum(groups[f"image-{i}"] for i in range(slot_classes.BINS))[3:7], 1)


def test_last_prompt_slot_is_before_the_last_answer():
    ignore = layout.IGNORE
    targets = np.array([ignore, ignore, 7, 7, ignore, ignore, 9, 9, ignore])
    assert slot_classes.last_prompt_slot(targets) == 7
    assert slot_classes.last_prompt_slot(targets[:6]) == 3
    assert slot_classes.last_prompt_slot(targets[:2]) == 2


def byte_recipe(longest: int = 200):
    return tiny_data.recipe(sequence_length=longest)


def conversation(name: str, *texts: str, images: int = 1) -> samples.Sample:
    image = np.zeros((8, 8, 3), np.uint8)
    return samples.Sample(name, (image,) * images, tiny_data.turns(*texts))


LONG = "a long question"


def test_unusable_samples_are_skipped_and_counted():
    actual = [
        conversation("good", LONG, "yes", "<image>" + LONG, "no"),
        conversation("text", LONG, "yes", images=0),
        conversation("other text", LONG, "yes", images=0),
        conversation("first", "<image>", "yes", LONG, "no"),
        conversation("long", LONG, "y" * 300, "<image>" + LONG, "no"),
        samples.BadSample(samples.MALFORMED, "record 5: image is 7"),
        conversation("no turn"),
    ]
    probe_list, tally = probes.read_probes(actual, byte_recipe(), Variant())
    assert [probe.example.id for probe in probe_list] == ["good"]
    assert tally.seen == len(actual)
    assert tally.causes == {
        probes.TEXT_ONLY: 2,
        probes.FEW_BEFORE: 1,
        probes.TOO_LONG: 1,
        samples.MALFORMED: 1,
        samples.NO_HUMAN_TURN: 1,
    }
    assert tally.first[probes.TEXT_ONLY][0].startswith("text:")


@pytest.mark.parametrize(
    ("question", "variant", "cause"),
    [
        ("0123456<image>" + LONG, Variant(), None),  # with the header before it these are enough
        ("0123456<image>" + LONG, Variant(exclude_prefix=30), probes.FEW_BEFORE),
        ("<image>" + LONG, Variant(), probes.FEW_BEFORE),
        ("0123456<image>", Variant(), None),
        ("0123456<image>", Variant(prompt_only=True), None),  # the answer's header is 12 slots
    ],
)
def test_minimum_text_on_both_sides_of_the_image(question, variant, cause):
    """Of the byte tokenizer's slots: system 8 + 13 and a newline, header 1 + 5."""
    recipe = tiny_data.recipe(system="You are here.", sequence_length=200)
    _, tally = probes.read_probes([conversation("one", question, "yes")], recipe, variant)
    assert list(tally.causes) == ([] if cause is None else [cause])


def test_prompt_only_has_no_queries_in_the_answer():
    one = conversation("one", LONG, "yes", "<image>" + LONG, "no")
    whole, part = (
        probes.make_probe(one, byte_recipe(), Variant(prompt_only=only)) for only in (False, True)
    )
    np.testing.assert_array_equal(whole.classes, part.classes)
    asked = np.flatnonzero(part.groups[:, ALL])
    answer = [*b"no", 257]  # bytes have ids of their own; 257 is the end of a turn
    assert len(whole.classes) == len(asked) + len(answer)
    np.testing.assert_array_equal(asked, np.arange(len(asked)))
    assert part.example.targets[asked[-1]] == whole.example.tokens[len(asked)]
    assert whole.groups[-1, ALL] > 0


def test_embedded_probes_are_deterministic_and_usable():
    first, again = probes.embedded_samples(6), probes.embedded_samples(8)
    for one, other in zip(first, again, strict=False):
        assert one.conversations == other.conversations
        np.testing.assert_array_equal(one.images[0], other.images[0])
    assert len({one.conversations[0]["value"] for one in again}) > 4
    arch = inference_cases.ARCHS["plain"]
    arch = dataclasses.replace(arch, decoder=dataclasses.replace(arch.decoder, max_positions=1024))
    recipe = probes.make_recipe(config.Config(), arch, inference_cases.tokenizer(), 2048)
    probe_list, tally = probes.read_probes(again, recipe, Variant())
    assert len(probe_list) == len(again)
    assert not tally.bad
    for probe in probe_list:
        counts = np.bincount(probe.classes, minlength=len(CLASSES))
        assert min(counts[BEFORE], counts[AFTER]) > 3 * probes.MIN_TEXT
