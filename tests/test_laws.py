"""Laws: what every variant of the model fulfills, whatever its weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_model import VARIANTS

from wings_jax.model import context, decoder, layers, layout, switches
from wings_jax.model.wings import Wings

ROWS = ["ttittitttttt", "tttttttttt", "itt|titt|tttt", "tttiitt"]
SLOTS, IMAGES = 18, 2  # of the longest row; single rows have as many, to compile once
every_variant = pytest.mark.parametrize("name", VARIANTS)


def build(name: str, **settings) -> tuple[Wings, dict]:
    model = Wings(VARIANTS[name], **settings)
    return model, tiny_model.init(model)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [*((name, "auto") for name in VARIANTS), ("router", "chunked"), ("prefix", "chunked")],
)
def test_causality_a_token_changes_no_earlier_slot_by_a_single_bit(name, kernel):
    model, params = build(name, kernel=kernel)
    rows = tiny_model.batch(ROWS)
    before = tiny_model.logits(model, params, rows)
    slots = rows.layout.tokens.shape[1]

    for slot in range(slots):
        tokens = rows.layout.tokens.copy()
        tokens[:, slot] = (tokens[:, slot] + 7) % 64
        changed = dataclasses.replace(rows.layout, tokens=tokens)
        after = tiny_model.logits(model, params, dataclasses.replace(rows, layout=changed))

        np.testing.assert_array_equal(after[:, :slot], before[:, :slot])
        is_text = rows.layout.modality[:, slot] == layout.TEXT
        assert (after[is_text, slot] != before[is_text, slot]).any(-1).all()


@every_variant
def test_causality_an_image_changes_later_slots_only(name):
    model, params = build(name)
    rows = tiny_model.batch(ROWS)
    before = tiny_model.logits(model, params, rows)

    for number in range(rows.images.shape[1]):
        images = rows.images.copy()
        images[:, number] = 255 - images[:, number]
        after = tiny_model.logits(model, params, dataclasses.replace(rows, images=images))

        for i, text in enumerate(ROWS):
            if text.count("i") <= number:
                np.testing.assert_array_equal(after[i], before[i])
                continue

            # Slots before the image, and other conversations of the row, are bit-identical.
            is_image = rows.layout.modality[i] == layout.IMAGE
            first = np.flatnonzero(is_image)[number * tiny_model.P]
            np.testing.assert_array_equal(after[i, :first], before[i, :first])
            same = rows.layout.segments[i] == rows.layout.segments[i, first]
            later = same & (np.arange(len(same)) >= first)
            assert (after[i, later] != before[i, later]).any(-1).all()
            np.testing.assert_array_equal(after[i, ~same], before[i, ~same])


@every_variant
def test_padding_and_batch_mates_change_no_row(name):
    model, params = build(name)
    together = tiny_model.logits(model, params, tiny_model.batch(ROWS))
    padded = tiny_model.logits(model, params, tiny_model.batch(ROWS, length=40, images=4))

    for i, text in enumerate(ROWS):
        single = tiny_model.batch([text], length=SLOTS, images=IMAGES)
        is_used = single.layout.modality[0] != layout.PADDING
        alone = tiny_model.logits(model, params, single)[0, is_used]
        np.testing.assert_allclose(together[i, :SLOTS][is_used], alone, atol=1e-5)
        np.testing.assert_allclose(padded[i, :SLOTS][is_used], alone, atol=1e-5)


@every_variant
def test_packing_changes_no_conversation(name):
    model, params = build(name)
    parts = ["titt", "ttttt", "itittt"]
    singles = [tiny_model.batch([part], length=SLOTS, images=IMAGES) for part in parts]
    is_used = [single.layout.modality[0] != layout.PADDING for single in singles]

    # One row of all conversations
    tokens, modality, segments, images = [], [], [], []
    conversations = zip(parts, singles, is_used, strict=True)
    for number, (part, single, slots) in enumerate(conversations, start=1):
        tokens.append(single.layout.tokens[0, slots])
        modality.append(single.layout.modality[0, slots])
        segments.append(np.full(len(tokens[-1]), number))
        images.extend(single.images[0, : part.count("i")])
    rows = layout.make_layout(*(np.concatenate(x)[None] for x in (tokens, modality, segments)))
    packed = layout.Batch(rows, np.full(rows.tokens.shape, -100), np.stack(images)[None])

    together = tiny_model.logits(model, params, packed)[0]
    alone = [
        tiny_model.logits(model, params, single)[0, slots]
        for single, slots in zip(singles, is_used, strict=True)
    ]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)


@pytest.mark.parametrize("name", ["visual", "both", "router"])
def test_visual_learner_output_is_exactly_zero_for_text_rows(name):
    model, params = build(name)
    rows = tiny_model.batch(ROWS)
    outputs = np.asarray(tiny_model.intermediates(model, params, rows)["visual_wing"])
    is_text_row = np.array(["i" not in text for text in ROWS])
    assert not outputs[:, is_text_row].any()
    assert outputs[:, ~is_text_row].any()


@pytest.mark.parametrize("name", ["visual", "textual", "both", "router", "lora", "prefix"])
def test_initialization_equals_the_base_llm(name):
    model = Wings(VARIANTS[name])
    rows = tiny_model.batch(ROWS)
    params = tiny_model.initial(model)
    base = Wings(VARIANTS["llava"])
    expected = tiny_model.logits(base, params, rows)
    np.testing.assert_allclose(tiny_model.logits(model, params, rows), expected, atol=1e-6)

    sown = tiny_model.intermediates(model, params, rows)
    for learner in VARIANTS[name].learners:
        assert not np.asarray(sown[f"{learner}_wing"]).any()


def test_learner_layers_other_layers_have_no_learners():
    model, params = build("some_layers")
    rows = tiny_model.batch(ROWS)
    expected = tiny_model.logits(model, params, rows)

    # Layer 1 has none, layer 2 has.
    changed = jax.tree.map(np.copy, params)
    for learner in ("visual", "textual"):
        output = changed["decoder"]["layers"][learner]["o"]["b"]
        output[1] = 9.0
    np.testing.assert_array_equal(tiny_model.logits(model, changed, rows), expected)
    output[2] = 9.0
    assert np.abs(tiny_model.logits(model, changed, rows) - expected).max() > 1e-3


@pytest.mark.parametrize(
    ("remat", "scan_layers"),
    [
        *((policy, True) for policy in sorted(decoder.REMAT.keys() - {"none"})),
        ("none", False),
        ("save_dots", False),
    ],
)
def test_rematerialization_and_loop_change_no_gradient(remat, scan_layers):
    """The einsum does not name its results, which `save_attn` and `save_dots` keep."""
    kernel = "chunked" if remat.startswith("save") else "auto"
    rows = tiny_model.batch(ROWS)

    def gradient(**settings):
        model, params = build("router", kernel=kernel, **settings)
        run = jax.jit(jax.grad(lambda p: (model.apply({"params": p}, rows) ** 2).mean()))
        return run(params)

    recomputed = gradient(remat=remat, scan_layers=scan_layers)
    saved = gradient(remat="none", scan_layers=True)
    for actual, expected in zip(*map(jax.tree.leaves, (recomputed, saved)), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_layers_without_a_loop_are_still_rematerialized():
    """Else XLA merges what the backward pass computes again with what the forward pass computed."""
    rows = tiny_model.batch(ROWS)

    def products(**settings) -> int:
        model, params = build("router", **settings)
        run = jax.jit(jax.grad(lambda p: (model.apply({"params": p}, rows) ** 2).mean()))
        return run.lower(params).compile().as_text().count(" dot(")

    saved, again = (products(remat=policy, scan_layers=False) for policy in ("none", "full"))
    assert again > saved


def test_scan_equals_a_loop_over_layers():
    model, params = build("router")
    rows = tiny_model.batch(ROWS)
    x0 = model.apply({"params": params}, rows.layout, rows.images, method=Wings.embed)
    arch = model.arch.decoder
    table = layers.rope_table(jnp.asarray(rows.layout.positions), arch.head_dim, arch.rope_theta)
    ctx = context.LayerContext(
        rope_table=table,
        query=layout.query_visibility(rows.layout),
        main=context.KVInputs(layout.key_visibility(rows.layout, layout.MAIN)),
        positions=jnp.asarray(rows.layout.positions),
        learners={
            name: context.KVInputs(
                layout.key_visibility(rows.layout, which), x0=x0, rope_table=table
            )
            for name, which in layout.LEARNERS.items()
        },
    )

    x, layer = x0, decoder.DecoderLayer(model.arch)
    for index in range(arch.num_layers):
        layer_params = jax.tree.map(lambda p, i=index: p[i], params["decoder"]["layers"])
        x, _ = layer.apply({"params": layer_params}, x, (switches.LayerSwitches(1.0), None), ctx)
    scale = params["decoder"]["norm"]["scale"]
    looped = np.asarray(x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale)

    scanned = np.asarray(model.apply({"params": params}, rows))
    np.testing.assert_allclose(scanned, looped, atol=1e-5)


@every_variant
def test_bfloat16_is_near_float32(name):
    model, params = build(name)
    rows = tiny_model.batch(ROWS)
    expected = tiny_model.logits(model, params, rows)
    results = tiny_model.logits(Wings(VARIANTS[name], jnp.bfloat16), params, rows)
    assert results.dtype == np.float32
    error = np.abs(results - expected).mean() / expected.std()
    assert 0 < error < 0.1
