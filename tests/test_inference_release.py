"""Generation with the release's semantics: cached for text, uncached where there are images."""

from __future__ import annotations

import dataclasses
import pathlib

import inference_cases as cases
import jax.numpy as jnp
import numpy as np
import pytest

from wings_jax import tree
from wings_jax.data import conversation
from wings_jax.inference import chunks, dialogue, engine, uncached
from wings_jax.inference.prompts import Request
from wings_jax.inference.sampling import SamplingParams
from wings_jax.model import presets

FIXTURES = pathlib.Path(__file__).parents[2] / "shared" / "fixtures"
RELEASE = dataclasses.replace(
    cases.ARCHS["llama3"], semantics=presets.release_semantics(2), gain=2.0
)


def test_release_semantics_cache_text_and_recompute_images():
    spec, weights, params = cases.make(RELEASE)
    for shape in ("tttttt", "ttiitt", "iit", "tiitiit"):
        row = cases.random_rows(spec.arch, [shape], seed=5)[0]
        expected = cases.uncached_greedy(spec, params, [row], 5)[0]
        dialog = dialogue.Dialogue(spec, weights, ())
        pieces = dialog.answer(row, SamplingParams(max_new_tokens=5))
        tokens = [token for piece in pieces for token in piece.tokens]
        assert tokens == expected
        assert (dialog.cache is None) == bool(row.images)


def test_release_semantics_mixed_batch():
    generator = cases.generator_of(RELEASE)
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    params = SamplingParams(max_new_tokens=3)
    requests = [Request("red", (), params), Request("What is this?", [image], params)]
    together = generator.generate(requests)
    assert together == [generator.generate([request])[0] for request in requests]
    streamed = ["".join(generator.stream(request)) for request in requests]
    assert streamed == [answer.text for answer in together]


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the golden arrays (../shared/fixtures)")
@pytest.mark.parametrize("kind", ["image", "text"])
def test_release_golden_ids(kind: str):
    golden = pytest.importorskip("test_parity_release").Golden("wings_qwen2_b_image")
    arrays = np.load(FIXTURES / "wings_qwen2_h_generate.npz")
    ids, expected = (arrays[f"{kind}_{side}_ids"][0] for side in ("input", "output"))
    vision = dataclasses.replace(golden.arch.vision, image_size=24, patch_size=8)
    spec = engine.ModelSpec(dataclasses.replace(golden.arch, vision=vision))
    params = {"decoder": tree.nest({k: jnp.asarray(v) for k, v in golden.flat.items()})}
    weights = engine.split_layers(params, spec)
    params = SamplingParams(max_new_tokens=len(expected) - len(ids))
    if kind == "text":
        dialog = dialogue.Dialogue(spec, weights, ())
        pieces = dialog.answer(cases.text(ids), params)
        tokens = [token for piece in pieces for token in piece.tokens]
    else:
        assert conversation.IMAGE_ID in ids
        prompt = chunks.from_ids(ids, [np.zeros(0)], 9)
        features = jnp.asarray(arrays["image_features"][0])
        steps = uncached.recompute(spec, weights, prompt, features, params, ())
        tokens = [token for token, _, _ in steps]
    np.testing.assert_array_equal(tokens, expected[len(ids) :])
