"""A model shared among devices answers as it does on one."""

from __future__ import annotations

import functools

import inference_cases as cases
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from wings_jax import axes, tree
from wings_jax.inference import decode, prompts, scheduler
from wings_jax.inference.prompts import Request
from wings_jax.inference.sampling import SamplingParams

ARCH = cases.make_arch(learners=cases.BOTH, router=True, kv_heads=2, gain=2.0)
MESHES = {
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
    "rows": {"data": 8},  # more than there are rows
}
RNG = np.random.default_rng(2)
PICTURES = [RNG.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(3)]
SLOTS = (("main", 24), ("textual", 24), ("visual", 8))


@functools.cache
def generator(mesh: str = ""):
    return cases.generator_of(ARCH, mesh=axes.make_mesh(MESHES[mesh]) if mesh else None)


def read_and_step(model):
    """Returns the logits behind four prompts and those behind a token more, and the memory."""
    spec, weights = model.spec, model.weights
    rows = cases.random_rows(spec.arch, ["tiittt", "ttt", "iitiit", "t"], seed=3)
    starts = np.zeros(len(rows), np.int32)
    chunk = prompts.make_chunk(rows, starts, spec.arch, length=12, images=2)
    pictures = [picture for row in rows for picture in row.images]
    features = scheduler.encode(spec, weights, pictures, at_once=4, room=8)
    grown, first = decode.prefill(spec, weights, chunk, features, slots=SLOTS)
    more = [cases.text([7 + row]) for row in range(len(rows))]
    starts = np.array([row.count for row in rows], np.int32)
    chunk = prompts.make_chunk(more, starts, spec.arch, length=1, images=0)
    grown, second = decode.extend(spec, weights, grown, chunk, None)
    return np.stack([first, second]), grown


@pytest.mark.parametrize("mesh", MESHES)
def test_logits_are_those_of_one_device(mesh: str):
    wanted, _ = read_and_step(generator())
    found, grown = read_and_step(generator(mesh))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    for cache in jax.tree.leaves(grown.layers):  # rows and heads are one dimension
        assert cache.addressable_shards[0].data.shape[0] == cache.shape[0] // 8
    rows = grown.lengths.addressable_shards[0].data.shape[0]
    assert rows == {"all": 1, "rows": 4}[mesh]


def test_answers_are_those_of_one_device():
    """Seven requests through four rows, so that rows are taken over, and one that is streamed."""
    wish = SamplingParams(max_new_tokens=6, logprobs=True)
    asked = [Request("red", (), wish), Request("What is this?", PICTURES[:1], wish)]
    asked += [Request("<image> or <image>?", PICTURES[1:], wish), Request("7", (), wish)]
    asked += [Request(f"Is {n} even?", (), wish) for n in range(3)]
    found = generator("all").generate(asked)
    for answer, wanted in zip(found, generator().generate(asked), strict=True):
        assert answer.tokens == wanted.tokens
        np.testing.assert_allclose(answer.logprobs, wanted.logprobs, rtol=1e-5, atol=1e-5)
    assert "".join(generator("all").stream(asked[1])) == found[1].text


def test_weights_lie_as_in_training():
    kernels = tree.flatten(generator("all").weights.layers[0])
    assert kernels["attn/q/kernel"].sharding.spec == PartitionSpec("fsdp", "tensor")
    assert kernels["visual/q/b"].sharding.spec == PartitionSpec(None, "tensor")
    assert kernels["mlp/down/kernel"].sharding.spec == PartitionSpec("tensor", "fsdp")
    assert kernels["router/kernel"].sharding.spec == PartitionSpec()


def test_a_mesh_that_does_not_divide_the_model_is_named():
    with pytest.raises(axes.MeshError, match="the LLM: the mesh does not divide K=2"):
        cases.generator_of(ARCH, mesh=axes.make_mesh({"tensor": 4, "data": 2}))
