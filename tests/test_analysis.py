"""Attention shift: the masses, the metric, and the conversations it is measured on."""

from __future__ import annotations

import dataclasses
import functools

import inference_cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny_data
import tiny_model

from wings_jax import config
from wings_jax.analysis import laws, probes
from wings_jax.analysis.probes import CLASSES, GROUPS, ProbeRows, Variant
from wings_jax.data import samples
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
        classes[row, used, probes.classify(modality[used], exclude)] = 1
        groups[row, used] = probes.group(modality[used], len(used))
    return ProbeRows(batch, classes, groups)


def build(name: str = "router", **settings) -> tuple[Wings, dict]:
    model = Wings(tiny_model.VARIANTS[name], **settings)
    return model, tiny_model.init(model)


def measure(model: Wings, params: dict, rows: ProbeRows) -> laws.Measurement:
    return jax.device_get(laws.measure(model, params, rows))


@functools.partial(jax.jit, static_argnums=0)
def embed(model: Wings, params: dict, batch: layout.Batch) -> jax.Array:
    return model.apply({"params": params}, batch.layout, batch.images, method=Wings.embed)


def materialised(model: Wings, params: dict, rows: ProbeRows) -> np.ndarray:
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
    found = np.zeros((*states.shape[1::-1], arch.num_heads, *[states.shape[2]] * 2))
    for row, each in enumerate(zip(*dataclasses.astuple(batch.layout)[1:4], strict=True)):
        for index, state in enumerate(states[:, row]):
            layer = oracle.at_layer(params["decoder"]["layers"], index)
            scale = layer["norm_attn"]["scale"]
            h = np.stack([oracle.rms_norm(x, scale, shape.norm_eps) for x in state])
            found[row, index] = oracle.main_attention(h, oracle.Slots(*each), layer, shape)[1]
    return found


def test_masses_are_those_of_the_attention_matrix():
    model, params = build()
    rows = rows_of(TEXTS, exclude=1)
    found = measure(model, params, rows)
    matrix = materialised(model, params, rows)
    wanted = np.einsum("blnts,bsc,btq->blnqc", matrix, rows.classes, rows.groups)
    np.testing.assert_allclose(found.masses, wanted.mean(2), atol=1e-6)
    np.testing.assert_allclose(found.heads, wanted.transpose(0, 1, 3, 2, 4)[:, :, :2], atol=1e-6)
    assert (wanted[:, :, :, ALL].max((0, 1, 2)) > 0.01).all()


def test_masses_of_a_query_add_up_to_one():
    model, params = build()
    rows = rows_of([*TEXTS, ""])
    found = measure(model, params, rows)
    has_query = rows.groups.sum(1) > 0
    sums = found.masses.sum(-1)
    wanted = np.broadcast_to(has_query[:, None], sums.shape)
    np.testing.assert_allclose(sums, wanted, atol=1e-6)
    assert not has_query[-1].any()


def test_queries_before_the_image_attend_to_before_alone():
    model, params = build()
    found = measure(model, params, rows_of(TEXTS)).masses
    groups = [i for i, name in enumerate(GROUPS) if name.startswith("before-")]
    reached = found[:, :, groups].max((0, 1, 2))
    np.testing.assert_allclose(reached, np.eye(len(CLASSES))[BEFORE], atol=1e-6)


def test_queries_before_the_image_leave_the_correlation_as_it_is():
    """They attend to "before" alone in every layer: that adds a constant to its curve."""
    model, params = build()
    rows = rows_of(TEXTS)
    after = rows.classes[..., CLASSES.index("before")] == 0
    groups = rows.groups.copy()
    chosen = (groups[..., 0] > 0) & after
    groups[..., 0] = chosen / chosen.sum(1, keepdims=True)
    assert (groups[..., 0] != rows.groups[..., 0]).any()
    fewer = dataclasses.replace(rows, groups=groups)
    curves = (measure(model, params, some).masses[:, :, 0] for some in (rows, fewer))
    with_all, without = map(laws.shifts, curves)
    assert np.isfinite(with_all).all()
    np.testing.assert_allclose(without, with_all, atol=1e-4)


def test_a_reading_depends_on_its_own_conversation_only():
    """Neither on padding, nor on batch mates, nor on what is packed beside it."""
    model, params = build()
    alone = [measure(model, params, rows_of([text])) for text in TEXTS]
    for changed in (rows_of(TEXTS), rows_of(TEXTS, length=48, images=3)):
        found = measure(model, params, changed)
        for row, wanted in enumerate(alone):
            jax.tree.map(
                lambda x, y, row=row: np.testing.assert_allclose(x[row], y[0], atol=2e-6),
                found,
                wanted,
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
    pictures = [single.batch.images[0, :n] for single, n in zip(singles, counts, strict=True)]
    batch = layout.Batch(packed, packed.tokens, np.concatenate(pictures)[None])
    classes, groups = joined(lambda s: s.classes), joined(lambda s: s.groups)
    for number, wanted in enumerate(alone[:2]):
        mine = np.where(segments[..., None] == number + 1, groups, 0)
        found = measure(model, params, ProbeRows(batch, classes, mine))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), found, wanted)


def test_the_order_of_heads_does_not_matter():
    model, params = build()
    rows = rows_of(TEXTS)
    wanted = measure(model, params, rows)
    kv, heads = [1, 0], [3, 2, 0, 1]  # query heads 2 and 3 read the second kv head
    moved = jax.tree.map(np.copy, params)
    block = moved["decoder"]["layers"]["attn"]
    for name, order in (("q", heads), ("k", kv), ("v", kv)):
        block[name]["kernel"] = block[name]["kernel"][:, :, order]
        block[name]["bias"] = block[name]["bias"][:, order]
    block["o"]["kernel"] = block["o"]["kernel"][:, heads]
    found = measure(model, moved, rows)
    np.testing.assert_allclose(found.masses, wanted.masses, atol=2e-6)
    np.testing.assert_allclose(found.heads, wanted.heads[:, :, :, heads], atol=2e-6)


def test_gates_and_norms_are_means_of_what_the_layers_do():
    model, params = build("some_layers")
    rows = rows_of(TEXTS)
    seen = tiny_model.intermediates(model, params, rows.batch)
    modality = rows.batch.layout.modality
    batches = [([2, 0, 1], jax.tree.map(lambda x: x[[2, 0, 1]], rows))]
    found = laws.measure_batches(model, params, batches)
    assert np.isnan(found.gates[:, 1]).all()  # this layer carries no learners
    assert not found.norms[:, 1].any()
    for layer in (0, 2):
        for kind, value in enumerate((layout.TEXT, layout.IMAGE)):
            chosen = modality[1] == value
            gates = np.asarray(seen["gates"])[layer, 1, chosen]
            np.testing.assert_allclose(found.gates[1, layer, kind], gates.mean(0), rtol=1e-5)
            for m, name in enumerate(model.arch.learners):
                wing = np.asarray(seen[f"{name}_wing"])[layer, 1, chosen]
                added = np.linalg.norm(wing, axis=-1) * gates[:, m] * model.arch.gain
                ratio = (added / np.asarray(seen["main_norm"])[layer, 1, chosen]).mean()
                np.testing.assert_allclose(found.norms[1, layer, kind, m], ratio, rtol=1e-5)


# --- the metric ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trend", "shift"), [((0.1, 0.2, 0.3, 0.25), 0), ((0.4, 0.3, 0.2, 0.25), 2)]
)
def test_attention_made_by_hand_has_the_shift_it_was_made_for(trend, shift):
    """Layers whose last query looks before the image more and more, and after it too, or less."""
    modality = np.array([layout.TEXT] * 3 + [layout.IMAGE] * 2 + [layout.TEXT] * 3)
    slots, count = layout.make_layout(np.ones((1, 8)), modality[None]), len(modality)
    classes = np.eye(len(CLASSES), dtype=np.float32)[probes.classify(modality)][None]
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
    np.testing.assert_allclose(laws.shifts(np.stack(curves)[None]), [shift], atol=1e-5)


def test_flat_and_short_curves_have_no_shift():
    rising = np.array([0.1, 0.2, 0.4])
    assert laws.correlation(rising, 5 * rising + 1) == pytest.approx(1)
    assert laws.correlation(rising, [1.0, 0.5, 0.9]) == pytest.approx(
        np.corrcoef(rising, [1.0, 0.5, 0.9])[0, 1]
    )
    assert np.isnan(laws.correlation(rising, np.full(3, 0.2)))
    assert np.isnan(laws.correlation(rising[:2], rising[:2]))


def test_the_interval_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = laws.interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert np.isnan(laws.interval(values[:1])).all()  # one value tells nothing of others
    both = laws.interval(np.stack([values, values], -1))
    np.testing.assert_allclose(both.T, [[low, high]] * 2)


# --- probes ----------------------------------------------------------------------------------


def test_classes_and_groups_of_a_drawn_conversation():
    text, image = layout.TEXT, layout.IMAGE
    modality = np.array([text, text, text, image, image, text, image, text, text])
    wanted = [EXCLUDED, EXCLUDED, BEFORE, IMAGE, IMAGE, BETWEEN, IMAGE, AFTER, AFTER]
    np.testing.assert_array_equal(probes.classify(modality, 2), wanted)
    np.testing.assert_array_equal(probes.classify(modality, 7)[:4], [EXCLUDED] * 3 + [IMAGE])
    groups = dict(zip(GROUPS, probes.group(modality, 8).T, strict=True))
    np.testing.assert_allclose(groups["all"], [1 / 8] * 8 + [0])
    np.testing.assert_allclose(groups["after"], [0] * 7 + [1, 0])
    np.testing.assert_allclose(groups["text"] * 5, [1, 1, 1, 0, 0, 1, 0, 1, 0])
    np.testing.assert_allclose(groups["image"] * 3, [0, 0, 0, 1, 1, 0, 1, 0, 0])
    np.testing.assert_allclose(sum(groups[f"image-{i}"] for i in range(probes.BINS))[3:7], 1)


def test_a_prompt_ends_where_its_last_answer_begins():
    ignore = layout.IGNORE
    targets = np.array([ignore, ignore, 7, 7, ignore, ignore, 9, 9, ignore])
    assert probes.last_prompt_slot(targets) == 7
    assert probes.last_prompt_slot(targets[:6]) == 3
    assert probes.last_prompt_slot(targets[:2]) == 2


def recipe(longest: int = 200):
    return tiny_data.recipe(sequence_length=longest)


def conversation(name: str, *texts: str, images: int = 1) -> samples.Sample:
    picture = np.zeros((8, 8, 3), np.uint8)
    return samples.Sample(name, (picture,) * images, tiny_data.turns(*texts))


LONG = "a long question"


def test_what_is_no_probe_is_skipped_and_counted():
    found = [
        conversation("good", LONG, "yes", "<image>" + LONG, "no"),
        conversation("text", LONG, "yes", images=0),
        conversation("other text", LONG, "yes", images=0),
        conversation("first", "<image>", "yes", LONG, "no"),
        conversation("long", LONG, "y" * 300, "<image>" + LONG, "no"),
        samples.BadSample(samples.MALFORMED, "record 5: image is 7"),
        conversation("no turn"),
    ]
    read, tally = probes.read_probes(found, recipe(), Variant())
    assert [probe.example.id for probe in read] == ["good"]
    assert tally.seen == len(found)
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
def test_enough_text_is_asked_for_on_both_sides(question, variant, cause):
    """Of the byte tokenizer's slots: system 8 + 13 and a newline, header 1 + 5."""
    ours = tiny_data.recipe(system="You are here.", sequence_length=200)
    _, tally = probes.read_probes([conversation("one", question, "yes")], ours, variant)
    assert list(tally.causes) == ([] if cause is None else [cause])


def test_only_the_prompt_is_queried_where_asked():
    one = conversation("one", LONG, "yes", "<image>" + LONG, "no")
    whole, part = (
        probes.make_probe(one, recipe(), Variant(prompt_only=only)) for only in (False, True)
    )
    np.testing.assert_array_equal(whole.classes, part.classes)
    asked = np.flatnonzero(part.groups[:, ALL])
    answer = [*b"no", 257]  # bytes have ids of their own; 257 is the end of a turn
    assert len(whole.classes) == len(asked) + len(answer)
    np.testing.assert_array_equal(asked, np.arange(len(asked)))
    assert part.example.targets[asked[-1]] == whole.example.tokens[len(asked)]
    assert whole.groups[-1, ALL] > 0


def test_the_embedded_probes_are_the_same_every_time_and_all_of_use():
    first, again = probes.embedded(6), probes.embedded(8)
    for one, other in zip(first, again, strict=False):
        assert one.conversations == other.conversations
        np.testing.assert_array_equal(one.images[0], other.images[0])
    assert len({one.conversations[0]["value"] for one in again}) > 4
    arch = inference_cases.ARCHS["plain"]
    arch = dataclasses.replace(arch, decoder=dataclasses.replace(arch.decoder, max_positions=1024))
    ours = probes.make_recipe(config.Config(), arch, inference_cases.tokenizer(), 2048)
    read, tally = probes.read_probes(again, ours, Variant())
    assert len(read) == len(again)
    assert not tally.bad
    for probe in read:
        counts = np.bincount(probe.classes, minlength=len(CLASSES))
        assert min(counts[BEFORE], counts[AFTER]) > 3 * probes.LEAST
