"""What the declarations of several benchmarks share: forms at several paths, prompts, defaults."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from wings_jax.evaluation.benchmarks.record import Benchmark, FilePattern, Prompt

# Suffix of a glob -> name of the reader, where the format decides it.
SUFFIX_READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
# Option of the readers for tab-separated values.
TSV = {"delimiter": "\t"}
# LLaVA's request for a short answer, after the question.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."

# Multiple choice in English and in Chinese, and about images with a generated answer as headline.
english_choice = functools.partial(Benchmark, kind="choice", modality="text", language="en")
chinese_choice = functools.partial(Benchmark, kind="choice", modality="text", language="zh")
image_choice = functools.partial(Benchmark, kind="choice", modality="image", headline="generate")


def file_patterns(
    form: str,
    globs: tuple[str, ...],
    split: str,
    fields: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    *,
    reader: str = "",
) -> tuple[FilePattern, ...]:
    """Returns one form of a split at each of the globs, in their order.

    Args:
      form, split, fields, options: those of every `FilePattern`.
      globs: the patterns.
      reader: name of the reader; by default that of each glob's suffix.

    >>> [(one.pattern, one.reader) for one in file_patterns("any", ("a.tsv", "b.json"), "dev", {})]
    [('a.tsv', 'csv'), ('b.json', 'json')]
    """
    return tuple(
        FilePattern(
            form,
            glob,
            reader or SUFFIX_READERS[pathlib.PurePosixPath(glob).suffix],
            split,
            fields,
            options or {},
        )
        for glob in globs
    )


def likelihood_prompts(prompt: Prompt) -> dict[str, Prompt]:
    """Returns the prompts of likelihood protocols that write an item alike."""
    return {"ppl": prompt, "ll": prompt}


def chat_prompts(context: str, answer: str, extraction: str) -> dict[str, Prompt]:
    """Returns chat prompts: likelihood of each option's `answer`, and generation."""
    return {
        **likelihood_prompts(Prompt(context, answer, chat=True)),
        "generate": Prompt(context, chat=True, extraction=extraction),
    }
