"""A model on several devices gives the answers of one device."""

from __future__ import annotations

import functools

import inference_cases as cases
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from wings_jax import axes, tree
from wings_jax.inference import chunks, decode, image_features
from wings_jax.inference.prompts import Request
from wings_jax.inference.sampling import SamplingParams

ARCH = cases.make_arch(learners=cases.BOTH, router=True, kv_heads=2, gain=2.0)
MESHES = {
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
    "rows": {"data": 8},  # more than there are rows
}
RNG = np.random.default_rng(2)
IMAGES = [RNG.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(3)]
SLOTS = (("main", 24), ("textual", 24), ("visual", 8))


@functools.cache
def generator(mesh: str = ""):
    return cases.generator_of(ARCH, mesh=axes.make_mesh(MESHES[mesh]) if mesh else None)


def prefill_and_extend(model):
    """Returns the logits after four prompts and after one more token, and the cache."""
    spec, weights = model.spec, model.weights
    rows = cases.random_rows(spec.arch, ["tiittt", "ttt", "iitiit", "t"], seed=3)
    starts = np.zeros(len(rows), np.int32)
    chunk = chunks.make_chunk(rows, starts, spec.arch, length=12, images=2)
    images = [image for row in rows for image in row.images]
    features = image_features.encode(spec, weights, images, batch_size=4, count=8)
    cache, first = decode.prefill(spec, weights, chunk, features, slots=SLOTS)
    more = [cases.text([7 + row]) for row in range(len(rows))]
    starts = np.array([row.count for row in rows], np.int32)
    chunk = chunks.make_chunk(more, starts, spec.arch, length=1, images=0)
    cache, second = decode.extend(spec, weights, cache, chunk, None)
    return np.stack([first, second]), cache


@pytest.mark.parametrize("mesh", MESHES)
def test_mesh_logits_match_one_device(mesh: str):
    expected, _ = prefill_and_extend(generator())
    actual, cache = prefill_and_extend(generator(mesh))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    for buffer in jax.tree.leaves(cache.layers):  # rows and heads are one dimension
        assert buffer.addressable_shards[0].data.shape[0] == buffer.shape[0] // 8
    rows = cache.lengths.addressable_shards[0].data.shape[0]
    assert rows == {"all": 1, "rows": 4}[mesh]


def test_mesh_answers_match_one_device():
    """Seven requests through four rows, so that rows are replaced, and one that is streamed."""
    params = SamplingParams(max_new_tokens=6, logprobs=True)
    requests = [Request("red", (), params), Request("What is this?", IMAGES[:1], params)]
    requests += [Request("<image> or <image>?", IMAGES[1:], params), Request("7", (), params)]
    requests += [Request(f"Is {n} even?", (), params) for n in range(3)]
    actual = generator("all").generate(requests)
    for answer, expected in zip(actual, generator().generate(requests), strict=True):
        assert answer.tokens == expected.tokens
        np.testing.assert_allclose(answer.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    assert "".join(generator("all").stream(requests[1])) == actual[1].text


def test_mesh_texts_with_a_common_beginning_match_one_device():
    params = SamplingParams(max_new_tokens=4, logprobs=True)
    requests = [Request("Is 4 even? " * 12 + str(number), (), params) for number in range(5)]
    actual = generator("all").generate(requests)
    for answer, expected in zip(actual, generator().generate(requests), strict=True):
        assert answer.prompt > 48
        assert answer.tokens == expected.tokens
        np.testing.assert_allclose(answer.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)


def test_mesh_weights_are_sharded_as_in_training():
    kernels = tree.flatten(generator("all").weights.layers[0])
    assert kernels["attn/q/kernel"].sharding.spec == PartitionSpec("fsdp", "tensor")
    assert kernels["visual/q/b"].sharding.spec == PartitionSpec(None, "tensor")
    assert kernels["mlp/down/kernel"].sharding.spec == PartitionSpec("tensor", "fsdp")
    assert kernels["router/kernel"].sharding.spec == PartitionSpec()


def test_mesh_that_does_not_divide_the_model_is_refused():
    with pytest.raises(axes.MeshError, match="the LLM: the mesh does not divide K=2"):
        cases.generator_of(ARCH, mesh=axes.make_mesh({"tensor": 4, "data": 2}))
