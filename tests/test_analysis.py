"""Attention shift: the masses, the metric, and the conversations it is measured on."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny_model

from wings_jax.analysis import laws, slot_classes
from wings_jax.analysis.probes import ProbeRows
from wings_jax.analysis.slot_classes import CLASSES, GROUPS
from wings_jax.model import attention, layout
from wings_jax.model.wings import Wings

TEXTS = ["tttittttt", "titttitttttt", "tttttttittt"]
EXCLUDED, BEFORE, IMAGE, BETWEEN, AFTER = range(5)
ALL = GROUPS.index("all")


# --- masses ----------------------------------------------------------------------------------


def rows_of(texts: list[str], length: int = 24, images: int = 2, exclude: int = 0) -> ProbeRows:
    """Returns the drawn conversations as probes, padded to one shape."""
    batch = tiny_model.batch(texts, length=length, images=images)
    classes = np.zeros((*batch.layout.tokens.shape, len(CLASSES)), np.float32)
    groups = np.zeros((*batch.layout.tokens.shape, len(GROUPS)), np.float32)
    for row, modality in enumerate(batch.layout.modality):
        used = np.flatnonzero(modality != layout.PADDING)
        if not len(used):  # a row of padding
            continue
        classes[row, used, slot_classes.classify(modality[used], exclude)] = 1
        groups[row, used] = slot_classes.group(modality[used], len(used))
    return ProbeRows(batch, classes, groups)


def build(name: str = "router", **settings) -> tuple[Wings, dict]:
    model = Wings(tiny_model.VARIANTS[name], **settings)
    return model, tiny_model.init(model)


def measure(model: Wings, params: dict, rows: ProbeRows) -> laws.Measurement:
    return jax.device_get(laws.measure(model, params, rows))


@functools.partial(jax.jit, static_argnums=0)
def embed(model: Wings, params: dict, batch: layout.Batch) -> jax.Array:
    return model.apply({"params": params}, batch.layout, batch.images, method=Wings.embed)


def attention_matrices(model: Wings, params: dict, rows: ProbeRows) -> np.ndarray:
    """Returns f64[B,L,N,T,T], the attention itself, from the states that the model passes on."""
    arch, batch = model.arch.decoder, rows.batch
    x0 = embed(model, params, batch)
    hidden = tiny_model.intermediates(model, params, batch)["hidden"]
    states = np.concatenate([np.asarray(x0)[None], np.asarray(hidden)[:-1]]).astype(np.float64)
    shape = oracle.Shape(
        arch.num_heads,
        arch.num_kv_heads,
        arch.head_dim,
        oracle.plain_frequencies(arch.head_dim, arch.rope_theta),
        arch.norm_eps,
    )
    actual = np.zeros((*states.shape[1::-1], arch.num_heads, *[states.shape[2]] * 2))
    for row, each in enumerate(zip(*dataclasses.astuple(batch.layout)[1:4], strict=True)):
        for index, state in enumerate(states[:, row]):
            layer = oracle.at_layer(params["decoder"]["layers"], index)
            scale = layer["norm_attn"]["scale"]
            h = np.stack([oracle.rms_norm(x, scale, shape.norm_eps) for x in state])
            main = oracle.main_attention(h, oracle.Slots(*each), layer, shape, has_rope=True)
            actual[row, index] = main[1]
    return actual


def test_masses_match_the_attention_matrix():
    model, params = build()
    rows = rows_of(TEXTS, exclude=1)
    actual = measure(model, params, rows)
    matrix = attention_matrices(model, params, rows)
    expected = np.einsum("blnts,bsc,btq->blnqc", matrix, rows.classes, rows.groups)
    np.testing.assert_allclose(actual.masses, expected.mean(2), atol=1e-6)
    np.testing.assert_allclose(
        actual.head_masses, expected.transpose(0, 1, 3, 2, 4)[:, :, :2], atol=1e-6
    )
    assert (expected[:, :, :, ALL].max((0, 1, 2)) > 0.01).all()


def test_masses_of_a_query_sum_to_one():
    model, params = build()
    rows = rows_of([*TEXTS, ""])
    actual = measure(model, params, rows)
    has_query = rows.groups.sum(1) > 0
    sums = actual.masses.sum(-1)
    expected = np.broadcast_to(has_query[:, None], sums.shape)
    np.testing.assert_allclose(sums, expected, atol=1e-6)
    assert not has_query[-1].any()


def test_masses_of_queries_before_the_image_are_on_before_only():
    model, params = build()
    actual = measure(model, params, rows_of(TEXTS)).masses
    groups = [i for i, name in enumerate(GROUPS) if name.startswith("before-")]
    reached = actual[:, :, groups].max((0, 1, 2))
    np.testing.assert_allclose(reached, np.eye(len(CLASSES))[BEFORE], atol=1e-6)


def test_correlation_is_invariant_to_queries_before_the_image():
    """They attend to "before" only in every layer, which adds a constant to its curve."""
    model, params = build()
    rows = rows_of(TEXTS)
    after = rows.classes[..., CLASSES.index("before")] == 0
    groups = rows.groups.copy()
    chosen = (groups[..., 0] > 0) & after
    groups[..., 0] = chosen / chosen.sum(1, keepdims=True)
    assert (groups[..., 0] != rows.groups[..., 0]).any()
    fewer = dataclasses.replace(rows, groups=groups)
    curves = (measure(model, params, some).masses[:, :, 0] for some in (rows, fewer))
    with_all, without = map(laws.attention_shift, curves)
    assert np.isfinite(with_all).all()
    np.testing.assert_allclose(without, with_all, atol=1e-4)


def test_measurement_is_invariant_to_padding_batch_mates_and_packing():
    model, params = build()
    alone = [measure(model, params, rows_of([text])) for text in TEXTS]
    for changed in (rows_of(TEXTS), rows_of(TEXTS, length=48, images=3)):
        actual = measure(model, params, changed)
        for row, expected in enumerate(alone):
            jax.tree.map(
                lambda x, y, row=row: np.testing.assert_allclose(x[row], y[0], atol=2e-6),
                actual,
                expected,
            )
    singles = [rows_of([text]) for text in TEXTS[:2]]
    used = [single.batch.layout.modality[0] != layout.PADDING for single in singles]
    pairs = list(zip(singles, used, strict=True))

    def joined(part) -> np.ndarray:
        return np.concatenate([np.asarray(part(single))[0, slots] for single, slots in pairs])[None]

    segments = np.concatenate([np.full(slots.sum(), n + 1) for n, slots in enumerate(used)])[None]
    packed = layout.make_layout(
        joined(lambda s: s.batch.layout.tokens), joined(lambda s: s.batch.layout.modality), segments
    )
    counts = [text.count("i") for text in TEXTS[:2]]
    images = [single.batch.images[0, :n] for single, n in zip(singles, counts, strict=True)]
    batch = layout.Batch(packed, packed.tokens, np.concatenate(images)[None])
    classes, groups = joined(lambda s: s.classes), joined(lambda s: s.groups)
    for number, expected in enumerate(alone[:2]):
        own_groups = np.where(segments[..., None] == number + 1, groups, 0)
        actual = measure(model, params, ProbeRows(batch, classes, own_groups))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), actual, expected)


def test_masses_are_invariant_to_the_order_of_heads():
    model, params = build()
    rows = rows_of(TEXTS)
    expected = measure(model, params, rows)
    kv, heads = [1, 0], [3, 2, 0, 1]  # query heads 2 and 3 read the second kv head
    moved = jax.tree.map(np.copy, params)
    block = moved["decoder"]["layers"]["attn"]
    for name, order in (("q", heads), ("k", kv), ("v", kv)):
        block[name]["kernel"] = block[name]["kernel"][:, :, order]
        block[name]["bias"] = block[name]["bias"][:, order]
    block["o"]["kernel"] = block["o"]["kernel"][:, heads]
    actual = measure(model, moved, rows)
    np.testing.assert_allclose(actual.masses, expected.masses, atol=2e-6)
    np.testing.assert_allclose(actual.head_masses, expected.head_masses[:, :, :, heads], atol=2e-6)


def test_gates_and_norms_are_means_of_the_layers_values():
    model, params = build("some_layers")
    rows = rows_of(TEXTS)
    seen = tiny_model.intermediates(model, params, rows.batch)
    modality = rows.batch.layout.modality
    batches = [([2, 0, 1], jax.tree.map(lambda x: x[[2, 0, 1]], rows))]
    actual = laws.measure_batches(model, params, batches)
    assert np.isnan(actual.gates[:, 1]).all()  # this layer carries no learners
    assert not actual.norms[:, 1].any()
    for layer in (0, 2):
        for kind, value in enumerate((layout.TEXT, layout.IMAGE)):
            chosen = modality[1] == value
            gates = np.asarray(seen["gates"])[layer, 1, chosen]
            np.testing.assert_allclose(actual.gates[1, layer, kind], gates.mean(0), rtol=1e-5)
            for m, name in enumerate(model.arch.learners):
                wing = np.asarray(seen[f"{name}_wing"])[layer, 1, chosen]
                added = np.linalg.norm(wing, axis=-1) * gates[:, m] * model.arch.gain
                ratio = (added / np.asarray(seen["main_norm"])[layer, 1, chosen]).mean()
                np.testing.assert_allclose(actual.norms[1, layer, kind, m], ratio, rtol=1e-5)


# --- the metric ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trend", "shift"), [((0.1, 0.2, 0.3, 0.25), 0), ((0.4, 0.3, 0.2, 0.25), 2)]
)
def test_attention_shift_of_hand_made_attention(trend, shift):
    """Attention on the text after the image rises and falls with that before it, or opposite."""
    modality = np.array([layout.TEXT] * 3 + [layout.IMAGE] * 2 + [layout.TEXT] * 3)
    slots, count = layout.make_layout(np.ones((1, 8)), modality[None]), len(modality)
    classes = np.eye(len(CLASSES), dtype=np.float32)[slot_classes.classify(modality)][None]
    curves = []
    for before, after in zip((0.1, 0.2, 0.3, 0.25), trend, strict=True):
        shares = {"before": before, "image": 1 - before - after, "after": after}
        row = sum(
            shares[name]
            * classes[0, :, CLASSES.index(name)]
            / classes[0, :, CLASSES.index(name)].sum()
            for name in shares
        )
        q = jnp.tile(jnp.log(row) * np.sqrt(count), (1, count, 1, 1)).reshape(1, count, 1, count)
        k = jnp.eye(count)[None, :, None]
        masses = attention.attend(
            q,
            k,
            k,
            query=layout.query_visibility(slots),
            key=layout.key_visibility(slots, layout.MAIN),
            probes=jnp.asarray(classes),
        )[1]
        curves.append(masses[0, -1, 0])
    np.testing.assert_allclose(laws.attention_shift(np.stack(curves)[None]), [shift], atol=1e-5)


def test_correlation_of_flat_and_short_curves_is_nan():
    rising = np.array([0.1, 0.2, 0.4])
    assert laws.correlation(rising, 5 * rising + 1) == pytest.approx(1)
    assert laws.correlation(rising, [1.0, 0.5, 0.9]) == pytest.approx(
        np.corrcoef(rising, [1.0, 0.5, 0.9])[0, 1]
    )
    assert np.isnan(laws.correlation(rising, np.full(3, 0.2)))
    assert np.isnan(laws.correlation(rising[:2], rising[:2]))


def test_bootstrap_interval_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = laws.mean_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert np.isnan(laws.mean_interval(values[:1])).all()  # one value has no interval
    both = laws.mean_interval(np.stack([values, values], -1))
    np.testing.assert_allclose(both.T, [[low, high]] * 2)
