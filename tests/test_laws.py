"""What holds for every variant of the model, whatever its weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_model import VARIANTS

from wings_jax.model import decoder, layers, layout
from wings_jax.model.wings import Wings

ROWS = ["ttittitttttt", "tttttttttt", "itt|titt|tttt", "tttiitt"]
SLOTS, IMAGES = 18, 2  # of the longest row; every single row is given these too, to compile once
every_variant = pytest.mark.parametrize("name", VARIANTS)


def build(name: str, **settings) -> tuple[Wings, dict]:
    model = Wings(VARIANTS[name], **settings)
    return model, tiny_model.init(model)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [*((name, "auto") for name in VARIANTS), ("router", "chunked"), ("prefix", "chunked")],
)
def test_no_slot_changes_an_earlier_one_by_a_single_bit(name, kernel):
    model, params = build(name, kernel=kernel)
    rows = tiny_model.batch(ROWS)
    before = tiny_model.logits(model, params, rows)
    slots = rows.layout.tokens.shape[1]
    for slot in range(slots):
        tokens = rows.layout.tokens.copy()
        tokens[:, slot] = (tokens[:, slot] + 7) % 64
        moved = dataclasses.replace(rows.layout, tokens=tokens)
        after = tiny_model.logits(model, params, dataclasses.replace(rows, layout=moved))
        np.testing.assert_array_equal(after[:, :slot], before[:, :slot])
        is_text = rows.layout.modality[:, slot] == layout.TEXT
        assert (after[is_text, slot] != before[is_text, slot]).any(-1).all()


@every_variant
def test_an_image_changes_nothing_before_it_and_something_after(name):
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
            is_image = rows.layout.modality[i] == layout.IMAGE
            first = np.flatnonzero(is_image)[number * tiny_model.P]
            np.testing.assert_array_equal(after[i, :first], before[i, :first])
            same = rows.layout.segments[i] == rows.layout.segments[i, first]
            later = same & (np.arange(len(same)) >= first)
            assert (after[i, later] != before[i, later]).any(-1).all()
            np.testing.assert_array_equal(after[i, ~same], before[i, ~same])


@every_variant
def test_a_row_is_the_same_alone_padded_and_beside_others(name):
    model, params = build(name)
    together = tiny_model.logits(model, params, tiny_model.batch(ROWS))
    padded = tiny_model.logits(model, params, tiny_model.batch(ROWS, length=40, images=4))
    for i, text in enumerate(ROWS):
        single = tiny_model.batch([text], length=SLOTS, images=IMAGES)
        used = single.layout.modality[0] != layout.PADDING
        wanted = tiny_model.logits(model, params, single)[0, used]
        np.testing.assert_allclose(together[i, :SLOTS][used], wanted, atol=1e-5)
        np.testing.assert_allclose(padded[i, :SLOTS][used], wanted, atol=1e-5)


@every_variant
def test_a_packed_conversation_is_the_same_as_alone(name):
    model, params = build(name)
    parts = ["titt", "ttttt", "itittt"]
    singles = [tiny_model.batch([part], length=SLOTS, images=IMAGES) for part in parts]
    used = [single.layout.modality[0] != layout.PADDING for single in singles]
    tokens, modality, segments, images = [], [], [], []
    for number, (part, single, slots) in enumerate(zip(parts, singles, used, strict=True), start=1):
        tokens.append(single.layout.tokens[0, slots])
        modality.append(single.layout.modality[0, slots])
        segments.append(np.full(len(tokens[-1]), number))
        images.extend(single.images[0, : part.count("i")])
    rows = layout.make_layout(*(np.concatenate(x)[None] for x in (tokens, modality, segments)))
    packed = layout.Batch(rows, np.full(rows.tokens.shape, -100), np.stack(images)[None])
    found = tiny_model.logits(model, params, packed)[0]
    wanted = [
        tiny_model.logits(model, params, single)[0, slots]
        for single, slots in zip(singles, used, strict=True)
    ]
    np.testing.assert_allclose(found, np.concatenate(wanted), atol=1e-5)


@pytest.mark.parametrize("name", ["visual", "both", "router"])
def test_the_visual_learner_gives_a_text_row_exactly_nothing(name):
    model, params = build(name)
    rows = tiny_model.batch(ROWS)
    wings = np.asarray(tiny_model.intermediates(model, params, rows)["visual_wing"])
    is_text_row = np.array(["i" not in text for text in ROWS])
    assert not wings[:, is_text_row].any()
    assert wings[:, ~is_text_row].any()


@pytest.mark.parametrize("name", ["visual", "textual", "both", "router", "lora", "prefix"])
def test_at_initialisation_wings_is_its_base(name):
    model = Wings(VARIANTS[name])
    rows = tiny_model.batch(ROWS)
    params = tiny_model.initial(model)
    base = Wings(VARIANTS["llava"])
    wanted = tiny_model.logits(base, params, rows)
    np.testing.assert_allclose(tiny_model.logits(model, params, rows), wanted, atol=1e-6)
    found = tiny_model.intermediates(model, params, rows)
    for learner in VARIANTS[name].learners:
        assert not np.asarray(found[f"{learner}_wing"]).any()


def test_switched_off_layers_carry_no_learners():
    model, params = build("some_layers")
    rows = tiny_model.batch(ROWS)
    wanted = tiny_model.logits(model, params, rows)
    moved = jax.tree.map(np.copy, params)
    for learner in ("visual", "textual"):
        out = moved["decoder"]["layers"][learner]["o"]["b"]
        out[1] = 9.0
    np.testing.assert_array_equal(tiny_model.logits(model, moved, rows), wanted)
    out[2] = 9.0
    assert np.abs(tiny_model.logits(model, moved, rows) - wanted).max() > 1e-3


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_no_gradient(remat):
    rows = tiny_model.batch(ROWS)

    def gradient(remat):
        model, params = build("router", remat=remat)
        run = jax.jit(jax.grad(lambda p: (model.apply({"params": p}, rows) ** 2).mean()))
        return run(params)

    for ours, wanted in zip(*(jax.tree.leaves(gradient(r)) for r in (remat, "none")), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-6)


def test_scan_equals_a_loop_over_layers():
    model, params = build("router")
    rows = tiny_model.batch(ROWS)
    x0 = model.apply({"params": params}, rows.layout, rows.images, method=Wings.embed)
    arch = model.arch.decoder
    table = layers.rope_table(jnp.asarray(rows.layout.positions), arch.head_dim, arch.rope_theta)
    around = decoder.LayerContext(
        table,
        layout.query_visibility(rows.layout),
        decoder.KVInputs(layout.key_visibility(rows.layout, layout.MAIN)),
        jnp.asarray(rows.layout.positions),
        {
            name: decoder.KVInputs(layout.key_visibility(rows.layout, which), None, x0, table)
            for name, which in layout.LEARNERS.items()
        },
    )
    x, layer = x0, decoder.DecoderLayer(model.arch)
    for i in range(arch.num_layers):
        part = jax.tree.map(lambda p, i=i: p[i], params["decoder"]["layers"])
        x, _ = layer.apply({"params": part}, x, (jnp.ones(()), None), around)
    scale = params["decoder"]["norm"]["scale"]
    wanted = np.asarray(x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale)
    found = np.asarray(model.apply({"params": params}, rows))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@every_variant
def test_bfloat16_is_near_float32(name):
    model, params = build(name)
    rows = tiny_model.batch(ROWS)
    wanted = tiny_model.logits(model, params, rows)
    found = tiny_model.logits(Wings(VARIANTS[name], jnp.bfloat16), params, rows)
    assert found.dtype == np.float32
    error = np.abs(found - wanted).mean() / wanted.std()
    assert 0 < error < 0.1
