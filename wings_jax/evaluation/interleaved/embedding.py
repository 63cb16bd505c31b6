"""Vectors of questions, whose cosine is the similarity of two questions.

wordllama: static vectors of Llama-2 tokens (package `wordllama`, 16 MB with its weights), averaged
over the tokens of a text; the default where it is installed. TF-IDF of character n-grams
(scikit-learn) needs nothing more. Neither aligns languages: neighbors are looked for within one.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from wings_jax.errors import UserError
from wings_jax.weights import store

EMBEDDERS = ("auto", "wordllama", "tfidf")
WEIGHTS = "weights/l2_supercat_256.safetensors"
TOKENIZER = "tokenizers/l2_supercat_tokenizer_config.json"
MAX_TEXT_TOKENS = 512
# Characters of an n-gram: a Chinese word has about two.
NGRAMS = {"en": (3, 5), "zh": (1, 3)}


def choose_embedder(name: str) -> str:
    """Returns the embedder that a flag names: "wordllama" or "tfidf". Raises UserError."""
    if name not in EMBEDDERS:
        raise UserError(f"--embedder: no embedder {name!r}; there are {', '.join(EMBEDDERS)}")
    has_wordllama = _wordllama_directory() is not None
    if name == "wordllama" and not has_wordllama:
        raise UserError("--embedder: wordllama is not installed: pip install wings_jax[iit]")

    # Word vectors if they are installed, else TF-IDF of characters.
    if name == "auto":
        return "wordllama" if has_wordllama else "tfidf"
    return name


def embedder_version(name: str) -> str:
    """Returns the version of the library that an embedder comes from."""
    package = {"wordllama": "wordllama", "tfidf": "scikit-learn"}[name]
    return f"{package} {importlib.metadata.version(package)}"


def embed_texts(name: str, texts: Sequence[str], language: str) -> Any:
    """Returns unit vectors [texts, width] of texts in one language: f32, dense or sparse rows."""
    if name == "wordllama":
        return _embed_wordllama(texts)

    from sklearn.feature_extraction.text import TfidfVectorizer

    # Characters instead of words: Chinese has no spaces between words.
    vectorizer = TfidfVectorizer(
        analyzer="char_wb", ngram_range=NGRAMS[language], sublinear_tf=True, dtype=np.float32
    )
    return vectorizer.fit_transform(texts)


def similarities(vectors: Any, rows: Sequence[int]) -> np.ndarray:
    """Returns cosines f32[rows, texts] of some rows with all texts."""
    product = vectors[list(rows)] @ vectors.T
    return np.asarray(product.todense() if hasattr(product, "todense") else product)


def _wordllama_directory() -> pathlib.Path | None:
    # The package itself is not imported: it looks for its files elsewhere.
    spec = importlib.util.find_spec("wordllama")
    if spec is None or not spec.submodule_search_locations:
        return None
    directory = pathlib.Path(spec.submodule_search_locations[0])
    return directory if (directory / WEIGHTS).is_file() else None


@functools.cache
def _load_wordllama() -> tuple[np.ndarray, Any]:
    """Returns the vectors f32[tokens, 256] and the tokenizer."""
    from tokenizers import Tokenizer

    directory = _wordllama_directory()
    assert directory is not None  # `choose_embedder` looked
    (table,) = store.open_tensors(directory / WEIGHTS).values()
    tokenizer = Tokenizer.from_file(str(directory / TOKENIZER))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TEXT_TOKENS)
    return np.asarray(table, np.float32), tokenizer


def _embed_wordllama(texts: Sequence[str]) -> np.ndarray:
    table, tokenizer = _load_wordllama()
    vectors = np.zeros((len(texts), table.shape[1]), np.float32)
    for row, encoding in enumerate(tokenizer.encode_batch(list(texts), add_special_tokens=False)):
        if encoding.ids:
            vectors[row] = table[encoding.ids].mean(axis=0)

    # Unit length: a product of two vectors is their cosine.
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, 1e-9)
