"""LoRA in and out of the peft package: merged at an import, written alone."""

from __future__ import annotations

import json
import shutil

import hf_directories
import numpy as np
import pytest
import training_cases
import transformers
import weights_cases
from weights_cases import LLM, run

from wings_jax import checkpoint
from wings_jax import config as config_lib
from wings_jax.model import parameters
from wings_jax.weights import peft as peft_lib
from wings_jax.weights import starting
from wings_jax.weights.tensors import WeightsError

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

TOKENS = np.random.default_rng(0).integers(0, LLM["vocab_size"], (2, 30))


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model.float().eval()(torch.tensor(TOKENS)).logits.numpy()


def save_lora(directory, model, **settings) -> None:
    """Writes random LoRA on a model as peft writes it."""
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.3)
    adapted.save_pretrained(directory)


@pytest.fixture(scope="module")
def llms(tmp_path_factory):
    """A Qwen2 and a Llama in float32, so that merging rounds nothing."""
    root = tmp_path_factory.mktemp("llms")
    for family, ties in (("Qwen2", False), ("Llama", True)):
        config = getattr(transformers, f"{family}Config")(**LLM, tie_word_embeddings=ties)
        torch.manual_seed(5)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        model.save_pretrained(root / family)
        weights_cases.save_tokenizer(root / family)
    return root


SETTINGS = {
    "some": ("Qwen2", {"target_modules": ["q_proj", "down_proj"]}),
    "all": ("Llama", {"target_modules": "all-linear", "use_rslora": True, "lora_dropout": 0.1}),
    "patterns": (
        "Qwen2",
        {
            "target_modules": ["k_proj", "up_proj"],
            "rank_pattern": {"k_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.k_proj": 9},
            "layers_to_transform": [1],
        },
    ),
    "head": ("Qwen2", {"target_modules": ["lm_head", "v_proj"], "init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_peft_lora_is_merged_at_import(name: str, llms, tmp_path):
    family, settings = SETTINGS[name]
    source = transformers.AutoModelForCausalLM.from_pretrained(llms / family)
    save_lora(tmp_path / "lora", source, **settings)
    adapted = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(llms / family), tmp_path / "lora"
    )
    plain = torch_logits(transformers.AutoModelForCausalLM.from_pretrained(llms / family))
    expected = torch_logits(adapted)
    assert np.abs(expected - plain).max() > 1e-2

    # The adapter names its base; given beside it, the same comes out.
    named = name == "some"
    flags = ("--llm", tmp_path / "lora")
    if not named:
        flags = ("--llm", llms / family, "--peft", tmp_path / "lora")
    run("import", *flags, "--out", tmp_path / "in")
    loaded = checkpoint.load(tmp_path / "in")
    logits = hf_directories.text_logits(loaded.arch, loaded.params, TOKENS)
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=1e-4)


def test_adapters_that_cannot_be_merged(llms, tmp_path):
    """The entry, or the tensor, is named; nothing of the adapter is left out silently."""

    def save(**settings) -> None:
        shutil.rmtree(tmp_path / "lora", ignore_errors=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(llms / "Qwen2")
        save_lora(tmp_path / "lora", model, **{"target_modules": ["q_proj"], **settings})

    for settings, message in (
        ({"use_dora": True}, "use_dora 'True' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save .* is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.lora_embedding_A is not a matrix"),
    ):
        save(**settings)
        with pytest.raises(WeightsError, match=message):
            peft_lib.open_peft(tmp_path / "lora")

    # Of another LLM: its sizes differ, or it has no such modules.
    save()
    lora = peft_lib.open_peft(tmp_path / "lora")
    (module, _), *_ = lora.matrices.items()
    with pytest.raises(WeightsError, match=f"modules that the LLM does not have: {module}"):
        peft_lib.merge({}, lora)
    (a, b), tensors = lora.matrices[module], peft_lib.store.open_tensors(llms / "Qwen2")
    wider = {f"{module}.weight": tensors["lm_head.weight"]}
    with pytest.raises(WeightsError, match=rf"is for a weight \[{b.shape[0]}, {a.shape[1]}\]"):
        peft_lib.merge(wider, lora)

    # Entries of the config.
    model = transformers.AutoModelForCausalLM.from_pretrained(llms / "Llama")
    save_lora(tmp_path / "head", model, target_modules=["q_proj"])
    file = tmp_path / "head" / "adapter_config.json"
    for entry, value, message in (
        ("init_lora_weights", "pissa", "'pissa' changed the base's weights"),
        ("peft_type", "IA3", "peft_type 'IA3' cannot be merged"),
        ("lora_alpha", "8", "lora_alpha '8' is not a number"),
        ("new_option", 3, "new_option '3' is not supported"),
    ):
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, entry: value}))
        with pytest.raises(WeightsError, match=message):
            peft_lib.open_peft(tmp_path / "head")
        file.write_text(json.dumps(content))


def test_mistakes_of_the_command(llms, tmp_path, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained(llms / "Qwen2")
    save_lora(tmp_path / "lora", model, target_modules=["q_proj"])
    file = tmp_path / "lora" / "adapter_config.json"
    content = json.loads(file.read_text()) | {"base_model_name_or_path": None}
    file.write_text(json.dumps(content))
    for flags, message in (
        (("--llm", tmp_path / "lora"), "is a PEFT adapter that does not name its base"),
        (("--gguf", "x.gguf", "--peft", tmp_path / "lora"), "--peft: goes with --llm"),
        (("--llm", llms / "Qwen2", "--peft", llms / "Qwen2"), "is not a PEFT directory"),
    ):
        with pytest.raises(SystemExit):
            run("import", *flags, "--out", tmp_path / "in")
        assert message in capsys.readouterr().err
        assert not (tmp_path / "in").exists()


def test_lora_is_exported_for_peft(tmp_path, capsys):
    """PeftModel on the base LLM computes the logits of the model with LoRA."""
    config = config_lib.from_config_dict(
        training_cases.tree_of(
            "lora", model__lora_targets=("q", "o", "down"), model__lora_alpha=3.0
        )
    )
    arch = starting.resolve_arch(config.model)
    base = starting.load_base(arch, config.model)
    rng = np.random.default_rng(0)
    flat = {
        path: base[path] if path in base else rng.normal(0, 0.2, struct.shape).astype(np.float32)
        for path, struct in parameters.abstract_params(arch).items()
    }
    files = starting.tokenizer_files(config, None)
    checkpoint.write_checkpoint(tmp_path / "lora", flat, config, arch, files)
    flags = ("--checkpoint", tmp_path / "lora", "--format", "peft", "--out", tmp_path / "peft")
    run("export", *flags)
    printed = capsys.readouterr().out
    assert "left out: projector" in printed
    assert "note:" not in printed  # the config froze the LLM

    tokens = TOKENS % arch.decoder.vocab_size
    llm = transformers.AutoModelForCausalLM.from_pretrained(config.model.llm, dtype="float32")
    adapted = peft.PeftModel.from_pretrained(llm, tmp_path / "peft").eval()
    with torch.no_grad():
        expected = adapted(torch.tensor(tokens)).logits.numpy()
    logits = hf_directories.text_logits(arch, checkpoint.load(tmp_path / "lora").params, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)

    # And back: merged into the base it is the export of the merged model.
    flags = ("--llm", config.model.llm, "--peft", tmp_path / "peft", "--out", tmp_path / "back")
    run("import", *flags, "--template", "chatml")
    merged = checkpoint.load(tmp_path / "back")
    again = hf_directories.text_logits(merged.arch, merged.params, tokens)
    np.testing.assert_allclose(again, logits, atol=1e-5, rtol=1e-4)
