"""The settings of the data: the leaves of `config.data`, passed unchanged to every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One data file or data directory."""

    path: str = ""
    """JSON, JSONL, CSV, TSV, parquet, arrow or tar file, or a directory of tables, tar shards
    (WebDataset) or prepared data."""

    images: str = ""
    """Directory that the records' image paths are relative to; '' for the data file's own."""

    weight: float = 0.0
    """Share of the rows that come from this source, relative to the other sources' weights. Set
    it for all sources or for none; 0 everywhere: every sample of every source once per epoch."""

    split: str = "train"
    """Split of a prepared directory, such as 'train' or 'train[:10%]'."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What the batches are made of."""

    sources: Mapping[str, SourceConfig] = dataclasses.field(default_factory=dict)
    """Name -> data file; the names are free."""

    scenes: str = ""
    """Directory of the embedded data set, written there if it does not exist; '' for none."""

    tokenizer: str = ""
    """Directory or hub id of the tokenizer; '' for the LLM's own."""

    template: str = "chatml"
    """Conversation template: 'chatml', 'qwen3', 'qwen3_no_think', 'llama3', 'mistral', 'vicuna', or
    'tokenizer' for the tokenizer's own chat template."""

    system: str = ""
    """System prompt of conversations that have none; '' for the template's default, 'none' for no
    system turn."""

    sequence_length: int = 2048
    """Slots of a row (T); longer samples are truncated, never within an image."""

    images_per_row: int = 1
    """Most images of a row (I); a sample with more is skipped and counted."""

    packing: bool = False
    """Whether several samples share a row."""

    max_bad_share: float = 0.01
    """The run stops when a larger share of the samples cannot be used."""

    threads: int = 4
    """Threads of each process that build batches ahead of the training step."""

    workers: int = 0
    """Processes that build batches and, for packing, measure samples; 0 for the main process."""

    cache: str = ""
    """Directory where packing stores the measured sample sizes, so that a restart does not
    tokenize the data again; '' for WORKDIR/data_cache, 'none' to measure at every start."""
