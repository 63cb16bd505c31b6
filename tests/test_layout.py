"""Visibility (the attention mask) on hand-drawn rows."""

from __future__ import annotations

import numpy as np

from wings_jax.model import layout

P, T, I = layout.PADDING, layout.TEXT, layout.IMAGE  # noqa: E741


def draw_mask(modality, segments, which) -> list[str]:
    """Draws the attention mask: '#' where the query (line) sees the key (column)."""
    rows = layout.make_layout(
        np.ones((1, len(modality))), np.array([modality]), np.array([segments])
    )
    key = layout.key_visibility(rows, which)
    mask = np.asarray(layout.visible(layout.query_visibility(rows), key))[0]
    return ["".join("#" if is_visible else "." for is_visible in line) for line in mask]


PACKED = [T, I, I, T, T, T, P], [1, 1, 1, 1, 2, 2, 0]


def test_main_attention_is_causal_within_each_conversation():
    assert draw_mask(*PACKED, layout.MAIN) == [
        "#......",
        "##.....",
        "###....",
        "####...",
        "....#..",
        "....##.",
        ".......",
    ]


def test_visual_learner_sees_earlier_image_slots_only():
    assert draw_mask(*PACKED, layout.VISUAL) == [
        ".......",
        ".#.....",
        ".##....",
        ".##....",
        ".......",
        ".......",
        ".......",
    ]


def test_textual_learner_sees_earlier_text_only():
    assert draw_mask(*PACKED, layout.TEXTUAL) == [
        "#......",
        "#......",
        "#......",
        "#..#...",
        "....#..",
        "....##.",
        ".......",
    ]


def test_visual_learner_sees_all_earlier_images():
    assert draw_mask([I, T, I, T], [1, 1, 1, 1], layout.VISUAL) == ["#...", "#...", "#.#.", "#.#."]


def test_positions_count_within_segments_and_only_text_slots_have_tokens():
    tokens = np.array([[5, 6, 7, 8, 9, 4, 3]])
    rows = layout.make_layout(tokens, *(np.array([x]) for x in PACKED))
    assert rows.positions.tolist() == [[0, 1, 2, 3, 0, 1, 0]]
    assert rows.tokens.tolist() == [[5, 0, 0, 8, 9, 4, 0]]
    assert (
        rows.visible_from[0, :, layout.VISUAL].tolist() == [layout.NEVER, 1, 2] + [layout.NEVER] * 4
    )
