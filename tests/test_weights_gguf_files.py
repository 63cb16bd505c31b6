"""GGUF files as people have them: rope scalings, tokenizers, split and damaged files."""

from __future__ import annotations

import pathlib

import gguf
import numpy as np
import pytest
import transformers
import weights_cases
from gguf_cases import SIZES, write_gguf
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from weights_cases import run

from wings_jax import checkpoint
from wings_jax.errors import UserError
from wings_jax.model import hf_config, presets
from wings_jax.weights import gguf_file, sources

HEAD_DIM = SIZES["hidden_size"] // SIZES["num_attention_heads"]


def read_arch(file: pathlib.Path) -> presets.DecoderArch:
    return hf_config.decoder_from_hf(gguf_file.read_gguf(file).config)


def linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def old_linear(writer: gguf.GGUFWriter) -> None:
    writer.add_float32(f"{writer.arch}.rope.scale_linear", 4.0)


@pytest.mark.parametrize("edit", [linear, old_linear])
def test_linear_rope_scaling_is_read(edit, tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama", edit=edit)
    assert read_arch(tmp_path / "m.gguf").rope_scaling == presets.RopeScaling("linear", 4.0)


def llama3_factors(factor: float) -> np.ndarray:
    """Returns what transformers' Llama 3.1 rope divides the frequencies by."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e4,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(**SIZES, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5e4 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return (plain / scaled.numpy()).astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_factors_of_llama_3_are_read(factor: float, tmp_path):
    """Llama 3.1 and 3.2 store the factors as a tensor."""
    factors = llama3_factors(factor)
    write_gguf(
        tmp_path / "m.gguf",
        "llama",
        edit=lambda writer: writer.add_tensor("rope_freqs.weight", factors),
    )
    expected = presets.RopeScaling("llama3", factor, 1.0, 4.0, 8192)
    assert read_arch(tmp_path / "m.gguf").rope_scaling == expected


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)


def sliding_window(writer: gguf.GGUFWriter) -> None:
    writer.add_sliding_window(128)


def other_rope_factors(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.linspace(1, 7, HEAD_DIM // 2, dtype=np.float32))


def part_of_split(writer: gguf.GGUFWriter) -> None:
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 3)


def heads_per_layer(writer: gguf.GGUFWriter) -> None:
    del writer.kv_data[0][f"{writer.arch}.attention.head_count_kv"]
    writer.add_head_count_kv([2, 4])


def text_as_size(writer: gguf.GGUFWriter) -> None:
    del writer.kv_data[0][f"{writer.arch}.block_count"]
    writer.add_string(f"{writer.arch}.block_count", "two")


def no_width(writer: gguf.GGUFWriter) -> None:
    del writer.kv_data[0][f"{writer.arch}.embedding_length"]


def q8_k(writer: gguf.GGUFWriter) -> None:
    blocks = np.zeros((1, 292), np.uint8)
    writer.add_tensor("x", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_K)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (yarn, r"rope\.scaling\.type 'yarn' is not supported"),
        (sliding_window, r"attention\.sliding_window 128 is not supported"),
        (other_rope_factors, r"rope_freqs\.weight is not the rope scaling"),
        (part_of_split, r"part 2 of 3: join the parts first"),
        (heads_per_layer, r"head_count_kv \[2, 4\] is not one number of heads"),
        (text_as_size, r"block_count 'two' is not a whole number"),
        (no_width, r"embedding_length is missing"),
        (q8_k, r"'x' has type Q8_K, which gguf cannot dequantize"),
    ],
)
def test_unsupported_files_are_refused_by_name(edit, message: str, tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama", edit=edit)
    with pytest.raises(UserError, match=message) as caught:
        gguf_file.read_gguf(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)


def test_a_window_of_the_whole_context_changes_nothing(tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama", edit=lambda w: w.add_sliding_window(512))
    assert read_arch(tmp_path / "m.gguf").max_positions == 512


@pytest.mark.parametrize("pre_tokenizer", [None, "default", "qwen2", "deepseek-r1-qwen"])
def test_qwen2_splits_digits(pre_tokenizer: str | None, tmp_path):
    """The merge '12' would apply if digits were one word, as in GPT-2's tokenizer."""
    write_gguf(tmp_path / "m.gguf", "qwen2", pre_tokenizer=pre_tokenizer)
    contents = gguf_file.read_gguf(tmp_path / "m.gguf").tokenizer_files
    tokenizer = checkpoint.open_tokenizer(contents)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a 12 a")["input_ids"]) == [
        *("a", "Ġ", "1", "2", "Ġa"),
    ]


def test_llama_3_keeps_whole_words_that_are_tokens(tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama", pre_tokenizer="llama-bpe")
    contents = gguf_file.read_gguf(tmp_path / "m.gguf").tokenizer_files
    assert '"ignore_merges":true' in contents["tokenizer.json"].replace(" ", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_tokenizer": None}, "'gpt2'/'default' is not supported; .*--tokenizer DIR"),
        ({"tokenizer": "llama"}, "'llama'/'smollm' is not supported; .*--tokenizer DIR"),
        ({"has_merges": False}, r"tokenizer\.ggml\.merges is not a list of texts; .*--tokenizer"),
    ],
)
def test_another_tokenizer_can_be_given(changes: dict, message: str, tmp_path):
    """A SentencePiece or unknown tokenizer is refused, unless --tokenizer gives another one."""
    write_gguf(tmp_path / "m.gguf", "llama", **changes)
    with pytest.raises(UserError, match=message):
        sources.from_gguf(tmp_path / "m.gguf")
    run(
        *("import", "--gguf", tmp_path / "m.gguf", "--out", tmp_path / "in"),
        *("--tokenizer", weights_cases.sources() / "llm"),
    )
    assert checkpoint.load(tmp_path / "in").tokenizer.eos_token == "<|im_end|>"


def test_git_lfs_pointers_are_named(tmp_path):
    weights_cases.write_pointer(tmp_path / "m.gguf")
    with pytest.raises(UserError, match="git-lfs pointer"):
        gguf_file.read_gguf(tmp_path / "m.gguf")
