"""Small checkpoints as PyTorch users have them, written once; `convert` within this process."""

from __future__ import annotations

import atexit
import functools
import json
import pathlib
import shutil
import tempfile

import ml_dtypes
import numpy as np
import pytest
import tokenizers
import transformers

from wings_jax import cli, convert
from wings_jax.model import hf_config, parameters, presets
from wings_jax.weights import exports, hf, release, safetensors_file, store, transfer
from wings_jax.weights.tensors import LazyTensor

torch = pytest.importorskip("torch")

RANK = 4
LLM = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def save_tokenizer(directory: pathlib.Path) -> None:
    """A byte-level vocabulary with ChatML's control tokens: 259 tokens."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.save_pretrained(directory)


def save_random(model, directory: pathlib.Path, **options) -> None:
    torch.manual_seed(5)
    for name, value in model.named_parameters():
        torch.nn.init.normal_(value, 1.0 if "norm" in name else 0.0, 0.15)
    model.to(torch.bfloat16).save_pretrained(directory, **options)


@functools.cache
def sources() -> pathlib.Path:
    """llm, tower, clip (bfloat16), and release checkpoints of both stages and of LLaVA."""
    root = pathlib.Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root)

    # Hugging Face models.
    config = transformers.Qwen2Config(**LLM, tie_word_embeddings=False)
    save_random(transformers.Qwen2ForCausalLM(config), root / "llm", max_shard_size="20KB")
    save_tokenizer(root / "llm")
    tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION))
    save_random(tower, root / "tower")
    clip = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**VISION | {"hidden_size": 8})
    )
    save_random(clip, root / "clip")

    # Checkpoints of the release, from the same LLM and tower.
    for name, entries in {
        "wings_stage2": {"learners": ("visual", "textual"), "router": True},
        "wings_stage1": {"learners": ("visual",)},
        "llava": {},
    }.items():
        save_release(root, name, **entries)
    return root


def save_release(root: pathlib.Path, name: str, **entries) -> None:
    """Random weights in the release's layout, in two shards; stage 1 has idle textual learners."""
    decoder = hf_config.decoder_from_hf(store.read_config(root / "llm"))
    vision = hf_config.vision_from_hf(store.read_config(root / "tower"))
    arch = presets.WingsArch(decoder, vision, rank=RANK, **entries)
    rng = np.random.default_rng(7)
    flat = {
        path: rng.normal(0, 0.2, struct.shape).astype(ml_dtypes.bfloat16)
        for path, struct in parameters.abstract_params(arch).items()
    }
    tensors = transfer.export_tree(release.release_rules(arch), flat)
    if entries.get("learners") == ("visual",):
        tensors |= {k.replace("attn_pool", "attn_t_pool"): t for k, t in tensors.items()}
    family = "wings_qwen2" if entries else "llava_qwen2"
    config = {**hf.llm_config(decoder), "model_type": family, "system_prompt_length": 9}
    config |= {"lora_dim": RANK, "mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "some/where"}
    files = {
        file.name: file.read_text() for file in (root / "llm").glob("*token*") if file.is_file()
    }
    exports.write_export(root / name, tensors, config, files, max_bytes=150_000)


def run(*arguments: object) -> None:
    """Runs the command line in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["convert", *map(str, arguments)])
        cli.run_main("wings_jax.convert", convert.main)


def write_pointer(file: pathlib.Path) -> None:
    """Writes what git leaves in place of a large file that was not downloaded."""
    oid = "0" * 64
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 1234567\n")


def edit_config(directory: pathlib.Path, **entries: object) -> None:
    """Changes entries of a directory's `config.json`."""
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **entries}))


def train_sentencepiece(directory: pathlib.Path) -> None:
    """Writes `tokenizer.model` as Vicuna has it: 300 pieces with byte fallback."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    text = directory / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    text.unlink()
    (directory / "tokenizer.vocab").unlink()


def use_sentencepiece(directory: pathlib.Path) -> None:
    """Replaces a directory's tokenizer by one as Vicuna has it."""
    (directory / "tokenizer.json").unlink(missing_ok=True)
    train_sentencepiece(directory)
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": "<unk>"}))


def read_arrays(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns all weights of a directory."""
    return {key: np.asarray(tensor) for key, tensor in store.open_tensors(directory).items()}


def to_torch(directory: pathlib.Path, *, is_zip: bool = True, shards: int = 1) -> None:
    """Replaces the safetensors files by torch files, in shards with an index if asked for."""
    arrays = read_arrays(directory)
    for file in directory.glob("model*"):
        file.unlink()
    state = {key: torch.tensor(a.astype(np.float32)).bfloat16() for key, a in arrays.items()}
    if shards == 1:
        file = directory / "pytorch_model.bin"
        torch.save(state, file, _use_new_zipfile_serialization=is_zip)
        return

    weight_map = {}
    for number in range(shards):
        name = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = dict(list(state.items())[number::shards])
        torch.save(part, directory / name, _use_new_zipfile_serialization=is_zip)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def rewrite(directory: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Replaces the weights by one file of these arrays."""
    for file in directory.glob("model*"):
        file.unlink()
    tensors = {k: LazyTensor(a.shape, a.dtype, lambda a=a: a) for k, a in arrays.items()}
    safetensors_file.write_safetensors(directory / "model.safetensors", tensors)
