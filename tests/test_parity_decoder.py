"""Parity: the decoder equals Hugging Face's LLMs, with random imported weights."""

from __future__ import annotations

import hf_directories
import jax
import numpy as np
import pytest
import transformers

from wings_jax.model import hf_config, layout, presets, wings
from wings_jax.weights import store

torch = pytest.importorskip("torch")

LENGTH = 230
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 1e6}
CASES = {
    # family, kv heads, rope, tied, RMSNorm epsilon
    "qwen2_mha": ("Qwen2", 4, DEFAULT, False, 1e-6),
    "qwen2_gqa_tied": ("Qwen2", 2, DEFAULT, True, 1e-6),
    "qwen2_mqa": ("Qwen2", 1, DEFAULT, False, 1e-6),
    "llama_mha_linear": ("Llama", 4, LINEAR, False, 1e-5),
    "llama_gqa_llama3": ("Llama", 2, LLAMA3, False, 1e-5),
    "llama_mqa_llama3_tied": ("Llama", 1, LLAMA3, True, 1e-5),
    "mistral_gqa": ("Mistral", 2, DEFAULT, False, 1e-5),
    "qwen3_mha": ("Qwen3", 4, DEFAULT, False, 1e-6),
    "qwen3_gqa_tied": ("Qwen3", 2, DEFAULT, True, 1e-6),
    "qwen3_mqa_llama3": ("Qwen3", 1, LLAMA3, False, 1e-6),
    "smollm3_gqa_tied": ("SmolLM3", 2, DEFAULT, True, 1e-6),
    "smollm3_mqa": ("SmolLM3", 1, DEFAULT, False, 1e-6),
}
# What a family has beyond the sizes: wide heads, no window, every second layer without rope.
OPTIONS = {
    "Qwen3": {"head_dim": 32},
    "Mistral": {"sliding_window": None},
    "SmolLM3": {
        "no_rope_layer_interval": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    },
}


def make_torch(case: str):
    """Returns a small HF model with random weights, also of norms and biases."""
    family, kv_heads, rope, tied, eps = CASES[case]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        rms_norm_eps=eps,
        max_position_embeddings=1024,
        **OPTIONS.get(family, {}),
    )
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, value in model.named_parameters():
        torch.nn.init.normal_(value, 1.0 if "norm" in name else 0.0, 0.12)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_hidden_states(case: str, tmp_path):
    """230 slots: a full row, one padded on the right and one padded on the left."""
    reference = make_torch(case)
    reference.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    arch = hf_config.decoder_from_hf(store.read_config(tmp_path / "hf"))
    params = {"decoder": hf_directories.load_llm(tmp_path / "hf", arch)}

    tokens = np.random.default_rng(0).integers(0, arch.vocab_size, (3, LENGTH))
    mask = np.ones_like(tokens)
    mask[1, 170:] = 0
    mask[2, :45] = 0
    with torch.no_grad():
        out = reference(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(np.maximum(mask.cumsum(1) - 1, 0)),
            output_hidden_states=True,
        )

    model = wings.Wings(presets.WingsArch(arch, presets.VISION["siglip_base_224"]))
    rows = layout.make_layout(tokens, np.where(mask, layout.TEXT, layout.PADDING))

    @jax.jit
    def run(params):
        batch = layout.Batch(rows, tokens, np.zeros((3, 0, 224, 224, 3), np.uint8))
        hidden, sown = model.apply({"params": params}, batch, mutable=["intermediates"])
        logits = model.apply({"params": params}, hidden, method=wings.Wings.logits)
        return logits, hidden, sown["intermediates"]["decoder"]["layers"]["hidden"][0]

    logits, last, hidden = run(params)
    is_used = mask == 1
    states = [state.numpy()[is_used] for state in out.hidden_states]
    for index in range(arch.num_layers - 1):
        np.testing.assert_allclose(hidden[index][is_used], states[index + 1], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(last[is_used], states[-1], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(logits[is_used], out.logits.numpy()[is_used], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_one_layer(case: str, tmp_path):
    """The first layer alone, from embeddings of unit size: 1e-5."""
    reference = make_torch(case)
    reference.save_pretrained(tmp_path / "hf")
    arch = hf_config.decoder_from_hf(store.read_config(tmp_path / "hf"))
    params = {"decoder": hf_directories.load_llm(tmp_path / "hf", arch)}

    tokens = np.random.default_rng(1).integers(0, arch.vocab_size, (1, LENGTH))
    with torch.no_grad():
        expected = (
            reference(torch.tensor(tokens), output_hidden_states=True).hidden_states[1].numpy()
        )

    model = wings.Wings(presets.WingsArch(arch, presets.VISION["siglip_base_224"]))
    rows = layout.make_layout(tokens, np.full_like(tokens, layout.TEXT))
    batch = layout.Batch(rows, tokens, np.zeros((1, 0, 224, 224, 3), np.uint8))
    _, sown = jax.jit(lambda p: model.apply({"params": p}, batch, mutable=["intermediates"]))(
        params
    )
    hidden = sown["intermediates"]["decoder"]["layers"]["hidden"][0][0]
    np.testing.assert_allclose(hidden, expected, rtol=1e-5, atol=1e-5)
