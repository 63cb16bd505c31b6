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
    it for all sources or for none; 0 everywhere: every sample of every source once per epoch.
    With weights an epoch has as many rows, but some come up more often than others."""

    modality: str = "all"
    """Samples that are used: 'all', only those with an 'image', or only those of 'text'."""

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

    batch_by_modality: bool = False
    """Whether text-only samples have batches of their own, which compute neither the vision tower
    nor the visual learner. The training step is then compiled twice."""

    text_share: float = -1.0
    """Share of the rows that are text only, 0 (only images) to 1; -1: as in the sources."""

    length_buckets: tuple[int, ...] = ()
    """Shorter lengths of rows, such as (512, 1024): a sample is in a batch of the first that is
    long enough. Every length is a compiled training step; not with packing, which fills rows."""

    max_bad_share: float = 0.01
    """The run stops when a larger share of the samples cannot be used."""

    threads: int = 4
    """Threads of each process that build batches ahead of the training step."""

    workers: int = 0
    """Processes that build batches and measure sizes of samples; 0: the main process builds them,
    and all cores measure 5,000 samples or more."""

    cache: str = ""
    """Directory for the measured sizes of samples, so that a restart does not read all of them
    again; '' for WORKDIR/data_cache, 'none' to measure at every start."""
