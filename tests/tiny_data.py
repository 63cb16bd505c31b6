"""A tokenizer of single bytes, and small LLaVA files with their pictures."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers

from wings_jax.data import conversation, pipeline


def byte_tokenizer(*controls: str) -> tokenizers.Tokenizer:
    """Returns a tokenizer with an id for each byte, then the control tokens, in order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({part: i for i, part in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(controls or conversation.TEMPLATES["chatml"].controls))
    return backend


def turns(*texts: str, first: str = "human") -> list[dict[str, str]]:
    """Returns the turns of a conversation, human and gpt by turns, after a system text if any."""
    speakers = ["human", "gpt"] * len(texts)
    speakers = ["system", *speakers] if first == "system" else speakers
    return [{"from": who, "value": text} for who, text in zip(speakers, texts, strict=False)]


def write_records(folder: pathlib.Path, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Returns `count` records of 0, 1 or 2 images and various lengths, their pictures written."""
    random = np.random.default_rng(seed)
    records = []
    for number in range(count):
        names = [f"{number}-{place}.png" for place in range(number % 3)]
        for name in names:
            shape = (*random.integers(4, 24, 2), 3)
            Image.fromarray(random.integers(0, 256, shape, np.uint8)).save(folder / name)
        question = "<image>" * len(names) + "q" * int(random.integers(1, 12))
        answer = f"a{number}" + "y" * int(random.integers(0, 12))
        record = {"id": f"s{number}", "conversations": turns(question, answer)}
        records.append(record | ({"image": names} if names else {}))
    return records


def write_json(path: pathlib.Path, records: Sequence[Any]) -> pathlib.Path:
    """Returns `path`, which now holds the records."""
    path.write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    return path


def spec(*paths: pathlib.Path, **changes: Any) -> pipeline.DataSpec:
    """Returns a small DataSpec over the files."""
    settings = {
        "sources": tuple(pipeline.SourceSpec(str(path)) for path in paths),
        "sequence_length": 96,
        "rows": 4,
        "images_per_row": 2,
        "image_size": 8,
        "image_mean": (0.5, 0.5, 0.5),
        "image_slots": 4,
        "system": "",
        "threads": 2,
        "max_bad_share": 0.5,
    }
    return pipeline.DataSpec(**(settings | changes))
