"""Kernels of accelerators: equal to the einsum, on random rows, in their portable forms.

splash runs in interpret mode, tokamax and cuDNN by their XLA implementations.
"""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from wings_jax import axes
from wings_jax.model import attention, context, layout
from wings_jax.model.kernels import choice, cudnn, intervals, splash, tokamax
from wings_jax.model.wings import Wings

T, H = 48, 8
KERNELS = ("splash", "tokamax", "cudnn")


@pytest.fixture(autouse=True)
def portable(monkeypatch):
    """Runs the kernels where there is no accelerator."""
    pytest.importorskip("tokamax")
    monkeypatch.setattr(tokamax, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    interpreted = functools.partial(splash.attend, interpret=True)
    monkeypatch.setattr(splash, "attend", interpreted)


def random_rows(seed: int) -> layout.Layout:
    """Returns two rows: packed conversations with text and images in any order, and padding."""
    rng = np.random.default_rng(seed)
    modality = rng.choice([layout.TEXT, layout.IMAGE], (2, T // 4)).repeat(4, axis=1)
    segments = np.cumsum(rng.random((2, T)) < 2 / T, axis=1) + 1
    used = rng.integers(1, T + 1, 2)
    is_padding = np.arange(T) >= used[:, None]
    modality[is_padding], segments[is_padding] = layout.PADDING, 0
    prompt_length = rng.choice([None, 3])
    return layout.make_layout(np.ones((2, T)), modality, segments, prompt_length=prompt_length)


@functools.cache
def compiled(kernel: str, kv_heads: int, dtype: str):
    """Returns a compiled function of both sides of a mask: output, probes and all gradients."""
    keys = jax.random.split(jax.random.key(3), 4)
    q = jax.random.normal(keys[0], (2, T, 4, H)).astype(dtype)
    k, v = (jax.random.normal(x, (2, T, kv_heads, H)).astype(dtype) for x in keys[1:3])
    probes = jax.random.normal(keys[3], (2, T, 3))

    @jax.jit
    def run(query, key):
        def scalar(q, k, v, probes):
            out, probed = attention.attend(
                q, k, v, probes=probes, kernel=kernel, query=query, key=key
            )
            total = (out.astype(jnp.float32) * jnp.cos(jnp.arange(H))).sum() + (probed**2).sum()
            return total / T, (out, probed)

        grads, values = jax.grad(scalar, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, probes)
        return {**dict(zip(("out", "probed"), values, strict=True)), "grads": grads}

    return run


def results(kernel: str, rows: layout.Layout, which: int, kv_heads: int, dtype: str = "float32"):
    run = compiled(kernel, kv_heads, dtype)
    return run(layout.query_visibility(rows), layout.key_visibility(rows, which))


def test_tokamax_does_not_warn_of_shapes_that_nobody_tuned(caplog):
    tokamax._hide_missing_tunings()
    logger = logging.getLogger("absl")
    caplog.set_level(logging.WARNING, "absl")  # commands of other tests set it higher
    logger.warning("Autotuning cache miss for %s", "a kernel")
    logger.warning("another warning")
    assert [record.message for record in caplog.records] == ["another warning"]


def test_cudnn_gets_no_query_without_keys(monkeypatch):
    """Its gradient of such a query is NaN, on the GPU only: rows and padding get a key."""
    masks = []

    def record(q, k, v, *, mask, **options):
        masks.append(np.asarray(mask))
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    rows = random_rows(5)
    query, key = layout.query_visibility(rows), layout.key_visibility(rows, layout.VISUAL)
    assert not np.asarray(layout.visible(query, key)).any(2).all(), "some have none"
    q = jnp.ones((2, T, 4, H))
    attention.attend(q, q, q, kernel="cudnn", query=query, key=key)
    (mask,) = masks
    assert mask.shape == (2, 1, 64, 64)
    assert mask.any(-1).all()


def test_weights_of_tokamax_backward_are_zero_for_a_query_without_keys():
    """Its kernel on Hopper, which no CPU runs, computes them as exp(logit - lse), masked or not."""
    rows = random_rows(5)
    mask, order = attention.prepare_keys(
        "tokamax",
        layout.query_visibility(rows),
        layout.key_visibility(rows, layout.VISUAL),
        is_causal=False,
    )
    has_keys = np.asarray(mask.intervals.has_keys)
    assert has_keys.any()
    assert not has_keys.all()

    arrays = jax.random.normal(jax.random.key(0), (3, 2, T, 4, H)) * 5
    q, k, v = arrays[0], *(intervals.take_slots(x, order) for x in arrays[1:])
    visible = intervals.without_empty(mask.intervals)
    starts, stops = visible.start[:, None], visible.stop[:, None]
    chosen = tokamax.Settings("xla", jnp.dtype("float32"), is_triangular=False)
    out, (*_, lse) = tokamax._forward(chosen, q, k, v, starts, stops, mask.intervals.has_keys)

    # [B, N, T, S]; the kernel's value of what is masked is the least float32.
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k) * tokamax._scale(q)
    slots = jnp.arange(T)
    is_visible = ((slots >= starts[..., None]) & (slots < stops[..., None]))[:, 0][:, None]
    masked = jnp.where(is_visible, logits, jnp.finfo(jnp.float32).min)
    for computed in (logits, masked):
        weights = np.asarray(jnp.exp(computed - lse[..., None])).swapaxes(1, 2)
        np.testing.assert_array_equal(weights[~has_keys], 0.0)
    np.testing.assert_allclose(weights.sum(-1)[has_keys], 1.0, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(out)[~has_keys], 0.0)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    which=st.sampled_from([layout.MAIN, layout.VISUAL, layout.TEXTUAL]),
    kv_heads=st.sampled_from([1, 2]),
)
def test_kernel_equals_the_reference_on_random_rows(kernel, seed, which, kv_heads):
    rows = random_rows(seed)
    actual = results(kernel, rows, which, kv_heads)
    expected = results("einsum", rows, which, kv_heads)
    for result, reference in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(result, reference, atol=1e-5)

    mask = layout.visible(layout.query_visibility(rows), layout.key_visibility(rows, which))
    has_no_keys = ~np.asarray(mask).any(-1)
    assert not np.asarray(actual["out"])[has_no_keys].any()
    assert not np.asarray(actual["probed"])[has_no_keys].any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_probes_are_not_rounded_to_bfloat16(kernel):
    """The rest of a probe has a column of its own: only the rows' own rounding remains."""
    rows = random_rows(1)
    actual = results(kernel, rows, layout.MAIN, 2, "bfloat16")
    expected = results("einsum", rows, layout.MAIN, 2, "bfloat16")
    assert actual["probed"].dtype == jnp.float32
    assert actual["out"].dtype == jnp.bfloat16
    np.testing.assert_allclose(actual["probed"], expected["probed"], atol=0.01)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), which=st.sampled_from([0, 1, 2]))
def test_visible_keys_are_an_interval_of_the_packed_keys(seed, which):
    rows = random_rows(seed)
    query, key = layout.query_visibility(rows), layout.key_visibility(rows, which)
    order = intervals.pack_order(key)
    packed = jax.tree.map(lambda x: intervals.take_slots(x, order), key)
    bounds = intervals.key_intervals(query, packed)
    slots = np.arange(T)
    expected = (slots >= bounds.start[..., None]) & (slots < bounds.stop[..., None])
    np.testing.assert_array_equal(layout.visible(query, packed), expected)

    nonempty = intervals.without_empty(bounds)
    assert bool((nonempty.start < nonempty.stop).all())
    assert int(nonempty.start.max()) < T


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), prompt_length=st.sampled_from([None, 2]))
def test_triangular_masks_have_no_key_after_the_query(seed, prompt_length):
    """In the order of the packed keys; backward kernels skip these blocks without a look."""
    rows = random_rows(seed)
    semantics = tiny_model.presets.Semantics(prompt_length=prompt_length)
    arch = tiny_model.arch(learners=tiny_model.BOTH, router=True, semantics=semantics)
    rows = layout.make_layout(
        rows.tokens, rows.modality, rows.segments, prompt_length=prompt_length
    )
    made = context.make_context(arch, jnp.zeros((2, T, 32)), rows, image_slots=40, kernel="tokamax")
    for kv_inputs in (made.main, *made.learners.values()):
        mask = kv_inputs.mask
        assert mask.is_triangular == (prompt_length is None or kv_inputs is made.main)
        stops = np.asarray(mask.intervals.stop)
        if mask.is_triangular:
            assert (stops <= np.arange(T) + 1).all()


@pytest.mark.parametrize("variant", ["router", "release"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_model_with_a_kernel_equals_the_model_without(kernel, variant):
    arch = tiny_model.VARIANTS["router"]
    rows = tiny_model.batch(["ttitt|tit", "titti"], length=24, images=2)
    if variant == "release":
        semantics = tiny_model.presets.release_semantics(2)
        arch = tiny_model.arch(learners=tiny_model.BOTH, router=True, semantics=semantics)
        slots = layout.make_layout(
            rows.layout.tokens, rows.layout.modality, rows.layout.segments, prompt_length=2
        )
        rows = layout.Batch(slots, rows.targets, rows.images)
    params = tiny_model.init(Wings(arch))
    expected = tiny_model.logits(Wings(arch, kernel="einsum"), params, rows)
    actual = tiny_model.logits(Wings(arch, kernel=kernel), params, rows)
    is_used = rows.layout.modality != layout.PADDING
    np.testing.assert_allclose(actual[is_used], expected[is_used], atol=2e-4)


def test_masks_are_made_once_and_keys_packed_for_kernels_that_need_it():
    arch = tiny_model.VARIANTS["router"]
    rows = tiny_model.batch(["ttitt|tit"], length=24, images=2).layout
    x0 = jnp.zeros((1, 24, 32))
    made = context.make_context(arch, x0, rows, image_slots=8, kernel="tokamax")
    assert made.main.mask.is_causal
    assert all(made.learners[name].mask.is_triangular for name in tiny_model.BOTH)
    packed = made.learners["textual"].visibility.visible_from[0]
    is_text = rows.modality[0] == layout.TEXT
    assert (packed[: is_text.sum()] < layout.NEVER).all()
    assert (packed[is_text.sum() :] == layout.NEVER).all()

    made = context.make_context(arch, x0, rows, image_slots=8, kernel="splash")
    assert made.learners["textual"].mask.is_causal
    assert not made.learners["visual"].mask.is_causal
    assert context.make_context(arch, x0, rows, kernel="chunked").main.mask is None


@pytest.mark.parametrize("kernel", ["splash", "tokamax"])
def test_kernel_on_a_mesh_equals_the_reference(kernel):
    """Rows over one axis, heads over the other: values and all gradients."""
    devices = jax.devices()
    assert len(devices) == 8  # of conftest.py
    rows = random_rows(5)
    expected = results("einsum", rows, layout.TEXTUAL, 2)
    compiled.cache_clear()
    mesh = axes.make_mesh({"data": 2, "tensor": 2}, devices[:4])
    with jax.set_mesh(mesh):
        actual = results(kernel, rows, layout.TEXTUAL, 2)
    compiled.cache_clear()
    assert actual["out"].sharding.num_devices == 4
    for result, reference in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(result, reference, atol=1e-5)


class Device:
    """A device that is not here."""

    def __init__(self, platform: str, capability: str = "", kind: str = "somewhere"):
        self.platform, self.compute_capability, self.device_kind = platform, capability, kind


@pytest.mark.parametrize(
    ("device", "dtype", "kernel"),
    [
        (Device("tpu"), "bfloat16", "splash"),
        (Device("tpu"), "float32", "splash"),
        (Device("gpu", "9.0"), "bfloat16", "tokamax"),
        (Device("gpu", "8.0"), "bfloat16", "cudnn"),
        (Device("gpu", "9.0"), "float32", "chunked"),
        (Device("gpu", "7.5"), "bfloat16", "chunked"),
        (Device("cpu"), "float32", "chunked"),
    ],
)
def test_auto_chooses_by_device_dtype_and_shape(device, dtype, kernel):
    with choice.compiling_for(device):
        options = {"is_cache": False, "dtype": jnp.dtype(dtype)}
        assert attention.choose_kernel("auto", 2048, 2048, **options) == kernel
        assert attention.choose_kernel("auto", 64, 64, **options) == "einsum"
        assert attention.choose_kernel("einsum", 2048, 2048, **options) == "einsum"


@pytest.mark.parametrize(
    ("kernel", "device", "dtype", "message"),
    [
        ("splash", Device("gpu", "9.0", "NVIDIA H100"), "bfloat16", "needs a TPU; this is NVIDIA"),
        ("tokamax", Device("gpu", "8.0", "A100"), "bfloat16", "capability 9.0 to 10.x"),
        ("cudnn", Device("gpu", "8.0", "A100"), "float32", "config.compute_dtype"),
    ],
)
def test_a_kernel_that_cannot_run_here_is_one_line(kernel, device, dtype, message):
    with choice.compiling_for(device), pytest.raises(choice.KernelError, match=message) as error:
        choice.check_kernel(kernel, jnp.dtype(dtype))
    assert str(error.value).startswith(f"config.attention: {kernel} ")
    assert "\n" not in str(error.value)
