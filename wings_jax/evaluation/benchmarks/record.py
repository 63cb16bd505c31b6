"""Declarations of benchmarks: what a data set is, and what its items are, as data.

A `Benchmark` declares where the files of a data set are in each published form, how its prompts
are written, and how answers are scored. Readers (`readers.READERS`, by name) turn files
into `Item`s; `prompts` renders an item by a protocol; `extraction` judges generated answers;
`metrics.METRICS` turns credits into scores. Nothing here reads a file or runs a model.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# What can be computed of an item. Those in LIKELIHOODS score continuations of one context.
LIKELIHOODS = ("ll", "ll_chars", "ll_bytes", "ll_token", "letter")
PROTOCOLS = ("ppl", *LIKELIHOODS, "generate", "perplexity")
# Keys of `Benchmark.prompts`. `ll_*` have the prompt of `ll`; so has `letter` if
# it has none of its own and the continuations of `ll` are letters.
PROMPT_KEYS = ("ppl", "ll", "letter", "generate", "perplexity")
TURNS = "turns"  # of `Item.extra`: the conversation before the item


@dataclasses.dataclass(frozen=True)
class ImageRef:
    """One image of an item; its bytes are read when the item is asked."""

    # Path or row, for messages and for the record of what was asked.
    name: str
    # Returns the encoded bytes; raises UserError naming the image if they cannot be had.
    read: Callable[[], bytes] = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a data set."""

    # Unique within the data set and split, stable from run to run.
    id: str
    # The question, without options. `<image>` stands for an image; without it images come first.
    question: str
    # Texts of the options in their order, without letters; () for an open question.
    options: tuple[str, ...] = ()
    # Index of the right option; the text of an open answer, or several that count (VQA has ten,
    # with repetitions); None if the data set withholds it: the item is answered, not scored.
    answer: int | str | tuple[str, ...] | None = None
    # Row of the per-group table and of the macro mean: subject, category, level.
    group: str = ""
    # Rows of a benchmark that declares them, which the item counts in; else its group is its row.
    rows: tuple[str, ...] = ()
    # Images in the order of the markers.
    images: tuple[ImageRef, ...] = ()
    # What else prompts and metrics use, by name: hint, subject, article, tests, circular, figure.
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Items with the same cluster are not independent (questions about one article or image); ""
    # for an item of its own. Intervals resample clusters.
    cluster: str = ""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """How an item is written. Templates are `str.format` with the fields of `prompts.fields`.

    Fields of every item: question, options (lines of `option_line`), group, subject (the group
    with spaces for underscores), letters ("A, B, C or D"), and the keys of `Item.extra`. Of one
    option: option, letter, number (from 1), filled (the question with `gap` replaced by the
    option), before and after (the question's parts around `gap`). Of the right answer, in shots:
    the same, of the right option; `answer` for open questions.
    """

    # Up to the answer. Where it depends on the option, each option has a context of its own.
    context: str
    # The scored continuation of one option; also the right answer of a shot.
    answer: str = " {option}"
    # Before everything, once; formatted with the item that is asked.
    hint: str = ""
    # Between shots, and between the last shot and the item.
    separator: str = "\n\n"
    # A line of {options}.
    option_line: str = "{letter}. {option}"
    # The string in `question` that stands for the option (cloze tasks); "" for none.
    gap: str = ""
    # Fixed text in place of shots from a split, such as worked examples that are published with
    # the prompt; it comes after the hint. No template: braces are text.
    examples: str = ""
    # Whether the prompt is a human turn of the model's chat template. Items with images always are.
    chat: bool = False
    # generate: strings that end an answer.
    stop: tuple[str, ...] = ()
    # generate: most tokens of an answer.
    max_new_tokens: int = 32
    # generate: how the answer is found in the text, a name of `extraction.EXTRACTIONS`.
    extraction: str = ""


@dataclasses.dataclass(frozen=True)
class Shots:
    """Solved examples before an item."""

    # How many by default; `--shots` changes it.
    count: int = 0
    # Split that they come from.
    split: str = ""
    # Their positions in that split (of the group, with `per_group`); () for the first `count`.
    positions: tuple[int, ...] = ()
    # Whether an item has shots of its own group.
    per_group: bool = False


@dataclasses.dataclass(frozen=True)
class FilePattern:
    """One on-disk form of one split."""

    # Name of the form, for messages: "original", "huggingface", "opencompass", "vlmevalkit", ...
    form: str
    # Glob below the directory of the data set, which is --data-root itself or a directory in it.
    pattern: str
    # Name of the reader in `readers.READERS`.
    reader: str
    # Split that the files hold.
    split: str
    # Field of Item, or key of its `extra` -> column of the file. "@stem" is the stem of the file,
    # "@parent" the name of its directory.
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Options of the reader, such as the file of the labels.
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A data set with its protocols, declared as data."""

    # Name in --tasks and in the names of files.
    name: str
    # Heading in reports.
    title: str
    # "choice", "generate", "yesno", "code" or "text" (nothing is asked: its likelihood counts).
    kind: str
    # "text" or "image".
    modality: str
    # "en" or "zh".
    language: str
    # Every form, the preferred one first: of each split the first form that matches is read.
    files: tuple[FilePattern, ...]
    # Key of PROMPT_KEYS -> prompt.
    prompts: Mapping[str, Prompt]
    # Split that is scored.
    split: str
    # Name of the repository that has the files, for people who look for them.
    source: str
    # License of the data, as its owner names it.
    license: str
    # Directories below --data-root that may have the files, tried in this order, then the root.
    directories: tuple[str, ...] = ()
    # Few-shot examples.
    shots: Shots = Shots()
    # Protocol of the paper's setting; it makes the headline score.
    headline: str = "ppl"
    # Name of the metric in `metrics.METRICS`.
    metric: str = "accuracy"
    # Heading of the groups: "subject", "category"; "" if the items are not grouped.
    grouping: str = ""
    # "micro" or "macro" (mean of the groups): which one is the headline score.
    average: str = "micro"
    # Groups in the order of reports, where an item may count in several: those of `Item.rows`. ()
    # if each item has the one group of its own.
    rows: tuple[str, ...] = ()
    # Those of `rows` that add up others.
    totals: tuple[str, ...] = ()
    # Number of items of the whole split, None where it is not known; a smaller file is reported.
    size: int | None = None
    # What is ambiguous about the paper's setting, for reports and docs.
    notes: str = ""
    # Whether it is one of the paper's, which `--suite wings` runs.
    in_paper: bool = True
    # Whether its items come with the package or with a checkpoint's config, not from files that
    # somebody published. Results of another model or version are replaced, not refused.
    is_embedded: bool = False

    @property
    def protocols(self) -> tuple[str, ...]:
        """Returns the protocols that there are prompts for, in the order of PROTOCOLS."""
        return tuple(name for name in PROTOCOLS if self.prompt_key(name) in self.prompts)

    def prompt_key(self, protocol: str) -> str:
        """Returns the key of the prompt of a protocol, which may be missing in `prompts`."""
        if protocol in self.prompts:
            return protocol
        is_letter = protocol == "letter" and "{letter}" in self.prompts.get("ll", Prompt("")).answer
        return "ll" if protocol.startswith("ll_") or is_letter else protocol


@dataclasses.dataclass(frozen=True)
class DataSet:
    """The items of a benchmark that were read from files."""

    # Items of the scored split, in the order of the files.
    items: Sequence[Item]
    # Items of the split that shots come from, in the order of the files; () if there are none.
    shots: Sequence[Item]
    # Files that were read, for their hashes.
    files: Sequence[pathlib.Path]
    # Form that was found.
    form: str
    # Cause -> number of rows that were left out, such as "label is '-'".
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    # What makes scores of the items differ from those of the benchmark, for reports.
    remarks: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Judgment:
    """What was found in a generated answer."""

    # Share of the item's point, 0 to 1; VQA's accuracy is fractional.
    credit: float
    # What was extracted: a letter, a number, "yes"; "" if nothing was.
    extracted: str


@dataclasses.dataclass(frozen=True)
class MetricValue:
    """One number of a metric, such as MME's perception score."""

    # Name of the row.
    name: str
    # The value, 0 to `scale`.
    value: float
    # Its maximum: 1 for accuracies, 2000 for MME's perception; 0 for a number without one.
    scale: float
    # How many items, pairs or groups it is over.
    count: int
