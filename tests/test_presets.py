"""Architectures as data: what older versions wrote is read, and Hugging Face configs are."""

from __future__ import annotations

import dataclasses

import pytest

from wings_jax import serialization
from wings_jax.errors import UserError
from wings_jax.model import hf_config, presets


def test_the_old_name_of_the_rope_type_is_read():
    """`rope_type` was called `kind` in the meta of older checkpoints."""
    arch = presets.DECODERS["llama3_1_8b"]
    entries = serialization.to_dict(arch)
    assert serialization.from_dict(presets.DecoderArch, entries, "arch") == arch
    entries["rope_scaling"]["kind"] = entries["rope_scaling"].pop("rope_type")
    assert serialization.from_dict(presets.DecoderArch, entries, "arch") == arch


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({}, None),
        ({"rope_type": "default"}, None),
        ({"type": "linear", "factor": 4}, presets.RopeScaling("linear", 4.0)),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            presets.RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
        ),
    ],
)
def test_rope_scaling_of_a_hugging_face_config(rope, scaling):
    entries = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    arch = hf_config.decoder_from_hf({**entries, "rope_scaling": rope})
    assert arch.rope_scaling == scaling
    assert dataclasses.replace(arch, rope_scaling=None) == hf_config.decoder_from_hf(entries)


def test_an_unknown_rope_type_is_refused_by_name():
    entries = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    }
    with pytest.raises(UserError, match="rope type 'yarn' is not one of"):
        hf_config.decoder_from_hf(entries)
