"""The release's semantics generate too: cached for text, by reading anew where there are images."""

from __future__ import annotations

import dataclasses
import pathlib

import inference_cases as cases
import jax.numpy as jnp
import numpy as np
import pytest

from wings_jax import tree
from wings_jax.data import conversation
from wings_jax.inference import dialogue, engine, prompts, scheduler
from wings_jax.inference.prompts import Request
from wings_jax.inference.sampling import SamplingParams
from wings_jax.model import presets

FIXTURES = pathlib.Path(__file__).parents[2] / "shared" / "fixtures"
RELEASE = dataclasses.replace(
    cases.ARCHS["llama3"], semantics=presets.release_semantics(2), gain=2.0
)


def test_text_is_cached_and_images_are_read_anew():
    spec, weights, params = cases.make(RELEASE)
    for shape in ("tttttt", "ttiitt", "iit", "tiitiit"):
        row = cases.random_rows(spec.arch, [shape], seed=5)[0]
        wanted = cases.uncached_greedy(spec, params, [row], 5)[0]
        talk = dialogue.Dialogue(spec, weights, ())
        said = [
            t for piece in talk.answer(row, SamplingParams(max_new_tokens=5)) for t in piece.tokens
        ]
        assert said == wanted
        assert (talk.memory is None) == bool(row.images)


def test_a_mixed_batch():
    generator = cases.generator_of(RELEASE)
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    wish = SamplingParams(max_new_tokens=3)
    requests = [Request("red", (), wish), Request("What is this?", [picture], wish)]
    together = generator.generate(requests)
    assert together == [generator.generate([request])[0] for request in requests]
    streamed = ["".join(generator.stream(request)) for request in requests]
    assert streamed == [answer.text for answer in together]


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the golden arrays (../shared/fixtures)")
@pytest.mark.parametrize("kind", ["image", "text"])
def test_the_release_s_own_ids(kind: str):
    golden = pytest.importorskip("test_parity_release").Golden("wings_qwen2_b_image")
    arrays = np.load(FIXTURES / "wings_qwen2_h_generate.npz")
    ids, wanted = (arrays[f"{kind}_{side}_ids"][0] for side in ("input", "output"))
    vision = dataclasses.replace(golden.arch.vision, image_size=24, patch_size=8)
    spec = engine.ModelSpec(dataclasses.replace(golden.arch, vision=vision))
    params = {"decoder": tree.nest({k: jnp.asarray(v) for k, v in golden.flat.items()})}
    weights = engine.split_layers(params, spec)
    wish = SamplingParams(max_new_tokens=len(wanted) - len(ids))
    if kind == "text":
        talk = dialogue.Dialogue(spec, weights, ())
        pieces = talk.answer(cases.text(ids), wish)
        said = [token for piece in pieces for token in piece.tokens]
    else:
        assert conversation.IMAGE_ID in ids
        prompt = prompts.from_ids(ids, [np.zeros(0)], 9)
        features = jnp.asarray(arrays["image_features"][0])
        steps = scheduler.recompute(spec, weights, prompt, features, wish, ())
        said = [token for token, _, _ in steps]
    np.testing.assert_array_equal(said, wanted[len(ids) :])
