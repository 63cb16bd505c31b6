"""Tokenizers of model directories: SentencePiece models, byte order marks, broken files."""

from __future__ import annotations

import pathlib
import shutil

import pytest
import weights_cases
from weights_cases import run

from wings_jax import checkpoint
from wings_jax.errors import UserError
from wings_jax.weights import tokenizer_files


@pytest.fixture
def llm(tmp_path) -> pathlib.Path:
    """A copy of the small LLM, to be changed."""
    return shutil.copytree(weights_cases.sources() / "llm", tmp_path / "llm")


def test_a_sentencepiece_tokenizer_is_converted(llm, tmp_path):
    (tmp_path / "vicuna").mkdir()
    weights_cases.use_sentencepiece(tmp_path / "vicuna")
    run(
        *("import", "--llm", llm, "--tokenizer", tmp_path / "vicuna", "--template", "vicuna"),
        *("--out", tmp_path / "in"),
    )
    tokenizer = checkpoint.load(tmp_path / "in").tokenizer
    import sentencepiece

    model_file = str(tmp_path / "vicuna" / "tokenizer.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=model_file)
    text = "the lazy fox, 7 over"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)


def test_a_conversion_to_other_ids_is_refused(llm):
    """The class follows `model_type`: here Qwen2's, whose tokens are not SentencePiece's."""
    weights_cases.use_sentencepiece(llm)
    with pytest.raises(UserError, match="tokenizer with other ids"):
        tokenizer_files.read_tokenizer_files(llm, flag="--tokenizer")


def test_missing_sentencepiece_is_named(llm, monkeypatch):
    (llm / "tokenizer.json").unlink()
    (llm / "tokenizer.model").write_bytes(b"x")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="install sentencepiece and protobuf"):
        tokenizer_files.read_tokenizer_files(llm, flag="--tokenizer")


def test_tokenizer_files_with_a_byte_order_mark(llm, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        content = (llm / name).read_bytes()
        (llm / name).write_bytes(b"\xef\xbb\xbf" + content)
    run("import", "--llm", llm, "--out", tmp_path / "in")
    assert checkpoint.load(tmp_path / "in").tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"name": "caf\xe9"}', "tokenizer_config.json is not UTF-8 text .byte 0xe9"),
        (b"[1, 2]", "tokenizer_config.json does not hold a JSON object"),
        (b"{", "tokenizer_config.json is not JSON"),
        (b"[" * 100_000, "tokenizer_config.json is not JSON"),
    ],
)
def test_broken_tokenizer_files_are_one_line(llm, content: bytes, message: str, tmp_path, capsys):
    (llm / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(SystemExit):
        run("import", "--llm", llm, "--out", tmp_path / "in")
    error = capsys.readouterr().err
    assert message.replace(".byte", "(byte") in error
    assert "Traceback" not in error


@pytest.mark.parametrize("content", ["{}", '{"model": {"type": "BPE"}}', '{"version": 7}'])
def test_a_tokenizer_that_is_not_one_is_one_line(llm, content: str, tmp_path, capsys):
    (llm / "tokenizer.json").write_text(content)
    with pytest.raises(SystemExit):
        run("import", "--llm", llm, "--out", tmp_path / "in")
    assert "the tokenizer of" in capsys.readouterr().err
