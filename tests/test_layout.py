"""Visibility on hand-drawn rows."""

from __future__ import annotations

import numpy as np

from wings_jax.model import layout

P, T, I = layout.PADDING, layout.TEXT, layout.IMAGE  # noqa: E741


def see(modality, segments, which) -> list[str]:
    """Draws who sees whom, '#' where the query (line) sees the key (column)."""
    rows = layout.make_layout(
        np.ones((1, len(modality))), np.array([modality]), np.array([segments])
    )
    seen = np.asarray(
        layout.visible(layout.query_visibility(rows), layout.key_visibility(rows, which))
    )[0]
    return ["".join("#" if s else "." for s in line) for line in seen]


PACKED = [T, I, I, T, T, T, P], [1, 1, 1, 1, 2, 2, 0]


def test_main_sees_its_own_past():
    assert see(*PACKED, layout.MAIN) == [
        "#......",
        "##.....",
        "###....",
        "####...",
        "....#..",
        "....##.",
        ".......",
    ]


def test_visual_sees_earlier_image_slots_only():
    assert see(*PACKED, layout.VISUAL) == [
        ".......",
        ".#.....",
        ".##....",
        ".##....",
        ".......",
        ".......",
        ".......",
    ]


def test_textual_sees_earlier_text_only():
    assert see(*PACKED, layout.TEXTUAL) == [
        "#......",
        "#......",
        "#......",
        "#..#...",
        "....#..",
        "....##.",
        ".......",
    ]


def test_a_second_image_is_seen_after_the_first():
    assert see([I, T, I, T], [1, 1, 1, 1], layout.VISUAL) == ["#...", "#...", "#.#.", "#.#."]


def test_positions_count_within_segments_and_tokens_stand_in_text_slots_only():
    tokens = np.array([[5, 6, 7, 8, 9, 4, 3]])
    rows = layout.make_layout(tokens, *(np.array([x]) for x in PACKED))
    assert rows.positions.tolist() == [[0, 1, 2, 3, 0, 1, 0]]
    assert rows.tokens.tolist() == [[5, 0, 0, 8, 9, 4, 0]]
    assert (
        rows.visible_from[0, :, layout.VISUAL].tolist() == [layout.NEVER, 1, 2] + [layout.NEVER] * 4
    )
