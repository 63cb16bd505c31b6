"""A tokenizer of single bytes, and small LLaVA files with their images."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers

from wings_jax.data import conversation, examples, pipeline, settings


def byte_tokenizer(*controls: str) -> tokenizers.Tokenizer:
    """Returns a tokenizer with an id for each byte, then the control tokens, in order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({part: i for i, part in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(controls or conversation.TEMPLATES["chatml"].controls))
    return backend


def turns(*texts: str, first: str = "human") -> list[dict[str, str]]:
    """Returns a conversation, human and gpt alternating, after a system text if that is first."""
    speakers = ["human", "gpt"] * len(texts)
    speakers = ["system", *speakers] if first == "system" else speakers
    return [
        {"from": speaker, "value": text} for speaker, text in zip(speakers, texts, strict=False)
    ]


def write_records(directory: pathlib.Path, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Returns `count` records of 0, 1 or 2 images and various lengths; writes their images."""
    random = np.random.default_rng(seed)
    records = []
    for number in range(count):
        names = [f"{number}-{index}.png" for index in range(number % 3)]
        for name in names:
            shape = (*random.integers(4, 24, 2), 3)
            Image.fromarray(random.integers(0, 256, shape, np.uint8)).save(directory / name)

        question = "<image>" * len(names) + "q" * int(random.integers(1, 12))
        answer = f"a{number}" + "y" * int(random.integers(0, 12))
        record = {"id": f"s{number}", "conversations": turns(question, answer)}
        records.append(record | ({"image": names} if names else {}))
    return records


def write_json(path: pathlib.Path, records: Sequence[Any]) -> pathlib.Path:
    """Returns `path`, which now holds the records."""
    path.write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    return path


@dataclasses.dataclass(frozen=True)
class Vision:
    """The vision format of the tests: 8 pixels, 4 slots."""

    image_size: int = 8
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    num_patches: int = 4
    resample: str = "bicubic"


def data(*paths: pathlib.Path, **changes: Any) -> settings.DataConfig:
    """Returns small settings over the files."""
    values = {
        "sources": {str(path): settings.SourceConfig(str(path)) for path in paths},
        "sequence_length": 96,
        "images_per_row": 2,
        "system": "none",
        "threads": 2,
        "max_bad_share": 0.5,
    }
    return settings.DataConfig(**(values | changes))


def recipe(*, prompt_length: int | None = None, **changes: Any) -> examples.Recipe:
    """Returns how samples become examples with the byte tokenizer."""
    return examples.make_recipe(
        data(**changes), byte_tokenizer(), Vision(), prompt_length=prompt_length
    )


def loader(
    *paths: pathlib.Path, prompt_length: int | None = None, rows: int = 4, **changes: Any
) -> pipeline.Loader:
    """Returns batches of the files; `changes` are settings or arguments of Loader."""
    arguments = ("seed", "shuffle", "cache", "host", "hosts")
    own = {key: changes.pop(key) for key in arguments if key in changes}
    made = recipe(prompt_length=prompt_length, **changes)
    return pipeline.Loader(data(*paths, **changes), made, rows=rows, **own)
