"""The model's decoder equals a naive float64 decoder written from the equations alone."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import oracle
import pytest
from flax import linen as nn

from wings_jax.model import decoder, layout, presets

P, T, I = layout.PADDING, layout.TEXT, layout.IMAGE  # noqa: E741

# Two rows: two images, packed with a second conversation that begins with an image, padding;
# and a text-only conversation packed between two short ones.
MODALITY = np.array(
    [
        [T, T, I, I, I, T, I, I, I, T, T, I, I, I, T, T, T, P, P],
        [T, T, T, T, T, T, T, T, T, T, I, I, I, T, T, T, P, P, P],
    ]
)
SEGMENTS = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0],
        [1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 0, 0, 0],
    ]
)
LLAMA3 = presets.RopeScaling("llama3", 8.0, 1.0, 4.0, 32)


def make_arch(*, kv_heads: int = 4, scaling=None, tie: bool = False, bias: bool = True, **wings):
    arch = presets.DecoderArch(
        vocab_size=23,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=4,
        ffn_size=24,
        norm_eps=1e-5,
        rope_theta=50.0,
        rope_scaling=scaling,
        max_positions=64,
        qkv_bias=bias,
        tie_embeddings=tie,
    )
    vision = presets.VISION["siglip_base_224"]
    return presets.WingsArch(arch, vision, rank=3, router_positions=32, **wings)


CASES = {
    "llm": make_arch(),
    "visual": make_arch(learners=("visual",), kv_heads=2),
    "textual": make_arch(learners=("textual",), kv_heads=1),
    "both": make_arch(learners=("visual", "textual"), gain=2.0),
    "router": make_arch(learners=("visual", "textual"), router=True),
    "router_gqa_tied": make_arch(
        learners=("visual", "textual"), router=True, kv_heads=2, tie=True, bias=False, gain=2.0
    ),
    "router_llama3": make_arch(
        learners=("visual", "textual"), router=True, kv_heads=1, scaling=LLAMA3, bias=False
    ),
    "prefix": make_arch(learners=("visual", "textual"), router=True, kv_heads=2, prefix_length=3),
    "one_layer": make_arch(learners=("visual", "textual"), router=True, learner_layers=(1,)),
}


CASES |= {
    # Heads of width 8 in a model of width 16: learners have two of them.
    "qwen3": dataclasses.replace(
        CASES["router"],
        decoder=dataclasses.replace(
            CASES["router"].decoder, num_kv_heads=2, head_dim=8, qkv_bias=False, qk_norm=True
        ),
    ),
    "smollm3": dataclasses.replace(
        CASES["router"],
        decoder=dataclasses.replace(CASES["router"].decoder, qkv_bias=False, no_rope_layers=(1,)),
    ),
}


def random_params(module, *args, seed: int):
    """Returns random values for every parameter, also for those that are initialized to 0 or 1."""
    shapes = jax.eval_shape(lambda: nn.unbox(module.init(jax.random.key(0), *args)["params"]))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), shapes)


def shape_of(arch: presets.WingsArch) -> oracle.Shape:
    d, scaling = arch.decoder, arch.decoder.rope_scaling
    inv_freq = oracle.plain_frequencies(d.head_dim, d.rope_theta)
    if scaling is not None:
        inv_freq = oracle.llama3_frequencies(
            d.head_dim,
            d.rope_theta,
            scaling.factor,
            scaling.low_freq_factor,
            scaling.high_freq_factor,
            scaling.original_max_positions,
        )

    return oracle.Shape(
        num_heads=d.num_heads,
        num_kv_heads=d.num_kv_heads,
        head_dim=d.head_dim,
        inv_freq=inv_freq,
        norm_eps=d.norm_eps,
        gain=arch.gain,
        learners=arch.learners,
        has_router=arch.router,
        learner_layers=arch.learner_layers,
        no_rope_layers=d.no_rope_layers,
    )


class DecoderWithLogits(decoder.Decoder):
    """A decoder with its logits, so that `init` touches every parameter."""

    def __call__(self, x0, rows):
        return self.logits(super().__call__(x0 + self.embed(rows.tokens), rows))


@pytest.mark.parametrize("case", CASES)
def test_decoder_equals_the_equations(case: str):
    arch = CASES[case]
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, arch.decoder.vocab_size, MODALITY.shape)
    rows = layout.make_layout(tokens, MODALITY, SEGMENTS)
    features = rng.normal(0, 1, (*MODALITY.shape, 16)).astype(np.float32)

    module = DecoderWithLogits(arch)
    params = random_params(module, features, rows, seed=2)
    logits, sown = module.apply({"params": params}, features, rows, mutable=["intermediates"])
    hidden = sown["intermediates"]["layers"]["hidden"][0]
    x0 = features + params["embed"]["embedding"][rows.tokens]

    for b in range(len(MODALITY)):
        slots = oracle.Slots(rows.positions[b], MODALITY[b], SEGMENTS[b])
        expected, states = oracle.decoder(x0[b], slots, params, shape_of(arch))
        is_used = MODALITY[b] != P
        for index, state in enumerate(states[1:]):
            np.testing.assert_allclose(
                hidden[index, b][is_used], state[is_used], rtol=1e-5, atol=1e-4
            )
        np.testing.assert_allclose(logits[b][is_used], expected[is_used], rtol=1e-5, atol=1e-4)


def test_every_part_of_the_semantics_changes_the_oracle():
    """Otherwise agreement with the oracle would not test that part."""
    arch = CASES["router"]
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 23, MODALITY.shape)
    rows = layout.make_layout(tokens, MODALITY, SEGMENTS)
    x0 = rng.normal(0, 1, (*MODALITY.shape, 16)).astype(np.float32)
    params = random_params(DecoderWithLogits(arch), x0, rows, seed=4)

    slots = oracle.Slots(rows.positions[0], MODALITY[0], SEGMENTS[0])
    shape = shape_of(arch)
    reference, _ = oracle.decoder(x0[0], slots, params, shape)

    others = {
        "gain": (slots, dataclasses.replace(shape, gain=2.0)),
        "router": (slots, dataclasses.replace(shape, has_router=False)),
        "textual": (slots, dataclasses.replace(shape, learners=("visual",))),
        "packing": (dataclasses.replace(slots, segments=(MODALITY[0] != P) * 1), shape),
        "images": (dataclasses.replace(slots, modality=np.where(MODALITY[0], T, P)), shape),
        "rope": (slots, dataclasses.replace(shape, inv_freq=shape.inv_freq / 2)),
    }

    for name, (other_slots, other_shape) in others.items():
        logits, _ = oracle.decoder(x0[0], other_slots, params, other_shape)
        assert np.abs(logits - reference)[MODALITY[0] != P].max() > 1e-2, name
